"""`vora bench data`, small."""
import json

import pytest
import tiny_pictures
import tiny_run

from vora_jax.bench import cpu_clock
from vora_jax.cli import main as verbs
from vora_jax.cli.main import main

TINY = ['bench', 'data', '--size', '64x48', '--side', '32', '--patch-size', '8', '--images', '10', '--rows', '1',
        '--repeats', '2']


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(cpu_clock, 'LOOK_SECONDS', 0.001)
    monkeypatch.setattr(cpu_clock, 'MAX_WAIT_SECONDS', 0.01)
    monkeypatch.setattr(verbs, 'TAKES_GIN', {*verbs.TAKES_GIN, 'bench'})


def test_pictures_a_second_as_a_table_and_as_json(tmp_path, capsys):
    report = tmp_path / 'bench.json'
    assert main([*TINY, '--workers', '0', '--json', str(report)]) == 0
    out = capsys.readouterr().out
    results = json.loads(report.read_text())
    sides = {row['name']: row for row in results['decoders']['pillow']['sides']}
    first, loader = sides['bare loop, 1 thread'], sides['loader, threads']
    assert first['per_core_of_bare'] == first['per_cpu_second_of_bare'] == 1 and first['per_core'] == first['per_second']
    assert loader['per_core'] == pytest.approx(loader['per_second'] / results['cores'])
    assert loader['per_core_of_bare'] == pytest.approx(loader['per_core'] / first['per_core'])
    assert loader['per_cpu_second_of_bare'] == pytest.approx(loader['per_cpu_second'] / first['per_cpu_second'])
    assert f'{loader["per_cpu_second_of_bare"]:.1%}' in out and '64 x 48' in out and '16 patches' in out
    assert 'decode ' in out and results['decoders']['pillow']['cpu_ms_of_parts']['lay out a batch'] > 0


def test_a_step_beside_its_pipeline(tmp_path, capsys):
    config = tiny_run.write_text_run(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    code = main(['bench', 'data', str(config), '--steps', '3', '--repeats', '2', '--json', '-',
                 '--gin.Train.batch_rows=8'])
    results = json.loads(capsys.readouterr().out)
    assert code == 0 and sorted(tmp_path.rglob('*')) == before
    assert results['fed_per_cached'] == pytest.approx(results['fed']['seconds'] / results['cached']['seconds'])
    assert results['samples_per_epoch'] == 60 and results['steps_per_epoch'] == results['rows_per_epoch'] / 8
    assert 0 < results['slot_padding'] < 0.5 and results['patch_padding'] == 0
    assert results['pipeline_alone']['cpu_seconds'] > 0


@pytest.mark.slow
def test_worker_processes_and_pictures(tmp_path, capsys):
    assert main([*TINY, '--workers', '2', '--decoder', 'pillow, simplejpeg']) == 0
    out = capsys.readouterr().out
    assert out.count('loader, 2 processes') == out.count('loader, threads') == 2 and '\nsimplejpeg, ' in out
    config = tmp_path / 'run.gin'
    config.write_text(tiny_pictures.CONFIG.format(folder=tiny_pictures.make(tmp_path)))
    bindings = [f'--gin.{one}' for one in ('Train.batch_rows=8', 'Train.workers=1', 'Mesh.data=8', 'Mesh.fsdp=1')]
    assert main(['bench', 'data', str(config), '--steps', '2', '--repeats', '1', *bindings]) == 0
    out = capsys.readouterr().out
    assert 'step fed by the pipeline' in out and '1 workers' in out and '12 samples in ' in out


@pytest.mark.parametrize('arguments, message', [
    (['--size', '640'], "--size: '640' is not WIDTHxHEIGHT"), (['--size', '9999x9999'], '--size: 9999x9999 is too large'),
    (['--side', '33'], '--side 33 is not a multiple of --patch-size 8'),
    (['--decoder', 'opencv'], "--decoder: there is no 'opencv'; there are pillow, simplejpeg."),
    (['--images', '0'], '--images is 0; it must be at least 1.'),
    (['--workers', '-1'], '--workers is -1; it must be at least 0.'),
    (['--json', 'gone/there.json', '--workers', '0'], '--json gone/there.json cannot be written'),
    (['--gin.Train.steps=3'], '--gin arguments only with a CONFIG'),
    (['missing.gin'], 'cannot read the configuration file missing.gin'),
], ids=str)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_other_kinds_take_no_gin_arguments(capsys):
    assert main(['bench', 'attention', '--gin.Train.steps=3']) == 2
    assert 'bench attention takes no --gin arguments, only bench data does' in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['bench', 'data', '--help'])
    assert stop.value.code == 0 and '\n  vora bench data configs/' in capsys.readouterr().out
