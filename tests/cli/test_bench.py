"""`vora bench attention`, small; and what it compares with."""
import importlib.util
import json

import jax
import numpy as np
import PIL.Image
import pytest

from vora_jax.bench import compare, sides
from vora_jax.bench.random_batch import draw, parse
from vora_jax.bench.timing import median_seconds
from vora_jax.cli.main import main
from vora_jax.ops.key_range import causal
from vora_jax.types import KeyRange

TINY = ['--slots', '256', '--heads', '4', '--kv-heads', '2', '--head-dim', '16', '--samples', '1x40@.6, 2x20-60@.2, text@.2',
        '--caption', '4-30', '--repeats', '2']


def case(soft_cap=None, head_dim=16):
    drawn = draw(parse('1x40@.6, 2x20-60@.2, text@.2', '4-30'), 1, 256, 0)
    return sides.random_case(*drawn[:2], 2, 1, head_dim, 'float32', 0, soft_cap)


def test_tables_picture_and_reasons(tmp_path, capsys):
    picture, report = tmp_path / 'mask.png', tmp_path / 'bench.json'
    code = main(['bench', 'attention', *TINY, '--implementation', 'auto,xla,pallas_tpu', '--tile', '32x64,64x64',
                 '--draw', str(picture), '--json', str(report)])
    out = capsys.readouterr().out
    assert code == 0
    assert PIL.Image.open(picture).width > 500
    results = json.loads(report.read_text())
    first, second = results['tiles']
    assert first['tile'] == [32, 64] and 1 < first['visited_per_true'] < second['visited_per_true']
    assert first['visited'] < first['loaded'] and f'  {first["loaded"]:.1%}  ' in out
    rows = {row['name']: row for row in results['timings']}
    assert {'auto', 'xla', 'jax.nn.dot_product_attention'} <= set(rows)
    assert all(row['difference'] < 1e-5 for row in rows.values())  # they compute the same
    assert {'pallas_tpu', 'splash, causal + segments'} <= set(results['not_run'])
    assert 'auto is xla (cpu has no kernel of its own)' in out
    assert 'not run: splash, causal + segments: it needs a TPU' in out
    lines = [line for line in out.splitlines() if line.startswith(('auto ', 'xla ', 'jax.nn', '32x64', '64x64'))]
    assert len(lines) == 5 and len({len(line) for line in lines[:2]}) == len({len(line) for line in lines[2:]}) == 1


def test_json_alone_and_a_soft_cap_that_others_lack(capsys):
    assert main(['bench', 'attention', *TINY, '--dtype', 'bfloat16', '--soft-cap', '20', '--json', '-']) == 0
    results = json.loads(capsys.readouterr().out)
    assert [row['name'] for row in results['timings']] == ['auto']
    assert results['not_run']['jax.nn.dot_product_attention'] == 'it has no soft cap'
    assert results['dtype'] == 'bfloat16' and results['peak_flops_per_second'] is None


def test_flops_count_the_mask_alone():
    case_ = case()
    area = int(np.maximum(case_.key_range.stop - case_.key_range.start, 0).sum())
    assert compare.forward_flops(case_.key_range, 2, 16) == 4 * area * 2 * 16
    (row,), _ = compare.compare(case_, ['xla'], repeats=1, baselines=False)
    assert row.forward_flops_per_second * row.forward_seconds == pytest.approx(4 * area * 2 * 16)
    assert row.both_flops_per_second * row.both_seconds == pytest.approx(3.5 * 4 * area * 2 * 16)


@pytest.mark.skipif(not importlib.util.find_spec('torch'), reason='torch is not installed (extra `torch`)')
def test_torch_computes_the_same_gradients():
    case_ = case()
    ours, theirs = sides.range_attention(case_, 'reference').both(), sides.torch_attention(case_).both()
    seen = np.asarray(case_.key_range.stop > case_.key_range.start)[..., None, None]
    for actual, wanted in zip(theirs, ours):
        np.testing.assert_allclose(actual.detach().transpose(1, 2).numpy() * seen, np.asarray(wanted) * seen, atol=2e-5)


def test_splash_is_called_with_causal_segments():
    case_ = case(head_dim=128)
    side = sides.splash_attention(case_, interpret=True)
    own = np.asarray(case_.segment_id)[0]
    first = np.array([np.argmax(own == number) for number in own])[None]
    image_free = KeyRange(first.astype(np.int32), causal(1, 256).stop)
    expected = sides.range_attention(case_._replace(key_range=image_free), 'reference').both()
    actual = side.both()
    seen = (own > 0)[None, :, None, None]
    np.testing.assert_allclose(side.computed(actual[0]) * seen, np.asarray(expected[0]) * seen, atol=2e-5)
    d_v = np.swapaxes(actual[3], 1, 2)
    np.testing.assert_allclose(d_v * seen, np.asarray(expected[3]) * seen, atol=2e-5)


def test_what_would_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(sides, 'MAX_DENSE_BYTES', 1000)
    _, reasons = compare.compare(case(), ['xla'], repeats=1)
    assert 'its scores would take about 0 GiB' in reasons['jax.nn.dot_product_attention']


def test_calls_take_turns(monkeypatch):
    monkeypatch.setattr('vora_jax.bench.timing.MIN_SECONDS', 0.0)
    seen = []
    found = median_seconds({name: lambda name=name: seen.append(name) for name in 'ab'}, 3)
    assert ''.join(seen) == 'ab' + 'ab' + 'ba' + 'ab' and set(found) == {'a', 'b'}


def test_peaks_are_known_by_the_name_of_the_device(monkeypatch):
    device = type('Device', (), {'device_kind': 'TPU v5 lite'})
    monkeypatch.setattr(jax, 'devices', lambda: [device])
    assert compare.peak_flops('bfloat16') == 197e12 and compare.peak_flops('float32') is None


@pytest.mark.parametrize('arguments, message', [
    (['--slots', '0'], '--slots is 0; it must be at least 1.'),
    (['--kv-heads', '3'], '--heads 4 is not a multiple of --kv-heads 3'),
    (['--soft-cap', '-1'], '--soft-cap is -1.0; it must be above 0.'),
    (['--tile', '128'], "--tile: '128' is not QUERIESxKEYS"),
    (['--tile', '128x0'], "--tile: '128x0' is not QUERIESxKEYS"),
    (['--tile', '128x63'], "--tile: '128x63' is not QUERIESxKEYS, keys even"),
    (['--implementation', 'flash'], "--implementation: there is no 'flash'; there are auto, reference"),
    (['--implementation', 'pallas_tpu', '--no-baselines'], '--implementation pallas_tpu cannot run here ('),
    (['--samples', 'cats'], "--samples: 'cats' is not"),
    (['--slots', '8'], 'fits into a row of 8 slots'),
    (['--draw', 'gone/mask.png'], '--draw gone/mask.png cannot be written'),
    (['--draw', 'mask.what'], '--draw mask.what cannot be written'),
], ids=str)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert main(['bench', 'attention', *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_help_shows_examples(capsys):
    for arguments in (['bench', '--help'], ['bench', 'attention', '--help']):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0 and '\n  vora bench attention --' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(['bench'])
    assert 'KIND' in capsys.readouterr().err
