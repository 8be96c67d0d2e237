"""`vora plan`, with the real compiler where it is installed."""
import argparse
import importlib.util
import json
import math
import pathlib
import re

import pytest

from vora_jax.cli import gin_config
from vora_jax.cli import plan as plan_verb
from vora_jax.cli.main import main
from vora_jax.planning import topology, work
from vora_jax.training.config import validate

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
DEBUG = str(CONFIGS / 'vora' / 'debug.gin')
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec('libtpu'),
                                  reason='needs the extra `plan`: pip install .[plan]')

KEYS = {'config', 'topology', 'slices', 'chip', 'devices', 'mesh', 'gather', 'batch_rows', 'accumulation', 'remat',
        'attention', 'fits', 'usable_bytes', 'peak_bytes', 'memory', 'largest_buffers', 'collectives', 'traffic',
        'asynchronous_known', 'involuntary_rematerialisations', 'hlo_instructions', 'compilation', 'flops', 'bound'}


def plan(*arguments):
    return main(['plan', DEBUG, '--topology', 'v5e:2x2', *arguments])


def check(found, devices=4):
    """What holds for every plan."""
    memory, traffic = found['memory'], found['traffic']
    held = sum(memory[f'{part}_bytes'] for part in ('trainable', 'optimizer', 'frozen', 'teacher'))
    assert found['devices'] == devices and 0 < held < found['peak_bytes']
    told = held + (memory['teacher_features_bytes'] or 0) + memory['working_bytes']
    assert told == pytest.approx(found['peak_bytes'])
    assert traffic['wire_bytes'] == pytest.approx(sum(one['wire_bytes'] for one in found['collectives']))
    assert {one['kind'] for one in found['collectives']} >= {'all-gather', 'reduce-scatter'}
    parts = {one['part']: one for one in found['flops']['parts']}
    assert {'base', 'adapters', 'teacher', 'head', 'attention', 'distillation_heads'} <= set(parts)
    assert sum(one['model'] for one in parts.values()) == pytest.approx(found['flops']['model'])
    assert found['bound']['step_seconds'] > 0 and found['compilation']['cpu_seconds'] > 0


@needs_libtpu
def test_a_debug_configuration_for_a_slice(capsys):
    assert plan('--quick', '--json', '-') == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS and found['fits'] and not found['compilation']['complete']
    assert found['mesh'] == {'data': 1, 'fsdp': 4, 'context': 1, 'tensor': 1} and found['asynchronous_known']
    check(found)


@pytest.mark.parametrize('example', plan_verb.EXAMPLE.splitlines())
def test_examples(example):
    """Of `vora plan --help`: they parse, load, and their meshes fit devices, slices and rows."""
    arguments, files, bindings = gin_config.split_arguments(example.split()[2:])
    parser = argparse.ArgumentParser()
    plan_verb.add_arguments(parser)
    args = parser.parse_args(arguments)
    config, _ = gin_config.load('Train', [str(CONFIGS.parent / args.config), *files], bindings)
    validate(config)
    found = topology.parse(args.topology, args.slices)
    devices = work.num_devices(found)
    sizes = [getattr(config.mesh, axis) for axis in ('data', 'fsdp', 'context', 'tensor')]
    known = math.prod(size for size in sizes if size != -1)
    data, fsdp, *others = [devices // known if size == -1 else size for size in sizes]
    assert data * fsdp * math.prod(others) == devices and data % args.slices == 0
    assert args.search or config.batch_rows // config.accumulation % (data * fsdp) == 0


@needs_libtpu
@pytest.mark.slow
def test_quick_and_whole_tell_the_same_in_a_folder_with_a_space(tmp_path, capsys):
    peaks = []
    for arguments in (['--quick'], ['--keep', str(tmp_path / 'a b')]):
        assert plan('--json', '-', *arguments) == 0
        peaks.append(json.loads(capsys.readouterr().out)['peak_bytes'])
    assert peaks[0] == peaks[1] > 0


@needs_libtpu
@pytest.mark.slow
def test_the_whole_compilation_as_text_on_two_slices(tmp_path, capsys):
    report, keep = tmp_path / 'plan.json', tmp_path / 'kept'
    arguments = ['--slices', '2', '--gin.Mesh.data=2', '--gin.Train.accumulation=1', '--json', str(report),
                 '--keep', str(keep)]
    assert plan(*arguments) == 0
    out, found = capsys.readouterr().out, json.loads(report.read_text())
    assert found['compilation']['complete'] and (keep / 'compiled.txt').exists()
    check(found, devices=8)
    assert any(one['kind'] == 'send' and one['axes'] == ['slices'] for one in found['collectives'])
    assert '2 slices of v5e:2x2, 8 devices: data 2 x fsdp 4' in out and 'fits: needs' in out and 'compiled, not run' in out
    with pytest.raises(SystemExit):
        main(['plan', '--help'])
    assert plan(*arguments) == 2 and 'kept cannot be made' in capsys.readouterr().err


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_gets_advice(capsys):
    """2,048 rows of 8,192 slots a chip."""
    arguments = ['--gin.Train.batch_rows=8192', '--gin.Train.accumulation=1', '--gin.Data.max_slots=8192',
                 '--gin.LanguageModel.activation_dtype=float32', '--gin.LanguageModel.remat=none']
    assert plan(*arguments) == 1
    out = capsys.readouterr().out
    assert 'does not fit: needs' in out and 'of 15.75 GiB' in out
    assert ('cheapest change: ' in out) != ('no single change' in out)
    told = [float(size) for size in re.findall(r'; about ([\d.]+) GiB\)', out)]
    assert all(size <= 15.75 for size in told)


@needs_libtpu
@pytest.mark.slow
def test_a_search(tmp_path, capsys):
    report = tmp_path / 'search.json'
    assert plan('--search', '--max-compiles', '2', '--json', str(report), '--gin.Train.batch_rows=4',
                '--gin.Train.accumulation=1') == 0
    found = json.loads(report.read_text())
    assert 1 <= len(found['tried']) <= 2 and found['tried'][0]['fits'] and found['candidates'] > 2
    assert 'best: --gin.Mesh.data=' in capsys.readouterr().out


@needs_libtpu
@pytest.mark.parametrize('arguments, told', [
    (['--gin.Mesh.data=3'], 'does not fit 4 devices'),
    (['--search', '--gin.Train.batch_rows=6'], 'divides over no mesh of the 4 devices of v5e:2x2; choose a multiple of 4'),
    (['--search', '--tensor', '0'], "--tensor '0' is not a list of sizes"),
    (['--search', '--tensor', '3'], '--tensor 3: none of these sizes, times Mesh.context = 1, divides the 4 devices'),
    (['--search', '--gin.Mesh.context=3'], 'Mesh.context = 3 does not divide the 4 devices'),
])
def test_mistakes_that_the_devices_tell(arguments, told, capsys):
    assert plan(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('vora: ') and told in error


@pytest.mark.parametrize('arguments, told', [
    (['--topology', 'v9:2x2'], "no chip 'v9'"),
    (['--topology', 'v5e:3x3'], 'whole hosts of 2x2 chips'),
    (['--slices', '0'], '--slices is 0'),
    (['--max-compiles', '0'], 'must be above 0'),
    (['--search', '--keep', 'somewhere'], 'leave one of them out'),
    (['--gin.Train.steps=0'], 'Train.steps is 0'),
    (['--gin.Train.stage=merged'], 'Train.stage'),
])
def test_mistakes(arguments, told, capsys):
    assert plan(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('vora: ') and told in error


@pytest.mark.parametrize('name, extra', [('v5e:2x2', 'plan'), ('h100:8', 'cuda')])
def test_a_compiler_that_is_missing(name, extra, monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
    assert main(['plan', DEBUG, '--topology', name]) == 2
    assert f'install the extra `{extra}`' in capsys.readouterr().err
