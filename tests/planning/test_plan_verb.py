"""`vora plan`, with the real compiler where it is installed."""
import importlib.util
import json
import pathlib

import pytest

from vora_jax.cli.main import main
from vora_jax.planning import topology

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
    told = held + memory['teacher_features_bytes'] + memory['working_bytes']
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
    assert 'cheapest change: ' in out or 'no single change' in out
    assert '--gin.LanguageModel.remat=matmuls' in out and '--gin.Train.accumulation=2' in out and '--topology v5e:2x4' in out


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
    (['--search', '--gin.Train.batch_rows=6'], 'divides over no mesh of the 4 devices of v5e:2x2'),
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
