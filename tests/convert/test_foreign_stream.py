"""Streams of tensors, and the numbers on merges."""
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_layouts import make
from tiny_models import LLM, PATCH, make_questions, make_tokenizer, random_params, rows

from vora_jax.convert.export.exportable import exportable, folded
from vora_jax.convert.export.foreign_stream import Losses, stream, tensor_infos
from vora_jax.convert.export.host_arrays import Scratch, is_finite, transposed
from vora_jax.convert.export.merge_report import merge_report
from vora_jax.convert.export.plan import Part
from vora_jax.convert.families.own_names import OWN
from vora_jax.convert.names.name_map import to_foreign
from vora_jax.merge import merge
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.stack import LayerGroup
from vora_jax.params import flatten, unflatten
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.patch_frontend import PatchFrontend

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def part_of(what):
    return Part(OWN, what.params, what.shapes, {})


@pytest.mark.parametrize('name', ['adapted', 'clip', 'qwen3'])
@pytest.mark.parametrize('on_host', [True, False])
def test_it_gives_what_the_name_map_gives(name, on_host):
    params, model, _ = make(name)
    what = exportable(jax.tree.map(np.asarray if on_host else jnp.asarray, params), model)
    for dtype in ('float32', 'bfloat16'):
        expected = dict(to_foreign(what.params, what.shapes, OWN, dtype))
        infos = tensor_infos(part_of(what), dtype)
        for (given, array), (info, kind, shape) in zip(stream(part_of(what), dtype), infos, strict=True):
            assert (given, array.dtype, array.shape) == (info, kind, shape) and array.flags.c_contiguous
            np.testing.assert_array_equal(array.view(np.uint8), expected.pop(given).view(np.uint8))
        assert not expected


def test_a_fold_is_what_merge_gives_bit_for_bit():
    params, model, _ = make('adapted')
    merged = exportable(*merge(params, model))
    lazy = folded(exportable(params, model))
    expected = {name: np.array(array) for name, array in stream(part_of(merged), 'bfloat16')}
    for name, array in stream(part_of(lazy), 'bfloat16'):
        np.testing.assert_array_equal(array.view(np.uint8), expected.pop(name).view(np.uint8))
    assert not expected


@pytest.mark.parametrize('dtype', DTYPES)
def test_host_arrays(dtype):
    rng, scratch = np.random.default_rng(0), Scratch()
    for shape in ((1, 1), (3, 200), (64, 65), (130, 128), (7, 3)):
        x = rng.normal(size=shape).astype(dtype)
        np.testing.assert_array_equal(transposed(x, scratch).view(np.uint8), np.ascontiguousarray(x.T).view(np.uint8))
        assert is_finite(x)
        for value in (np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[-1, -1] = value
            assert not is_finite(bad)
    assert is_finite(np.full((2, 2), np.finfo(np.float16).max, np.float16)) and is_finite(np.zeros((0, 4), dtype))


def test_a_merge_report(tmp_path):
    """Against the plain way: everything merged, cast and run whole."""
    params, model, rule = make('adapted')
    what = exportable(params, model)
    batch, = rows(make_questions(tmp_path, True), make_tokenizer(tmp_path), True, rule=rule).batches(6)
    report = merge_report(what, 'bfloat16', batch)
    merged, single = merge(params, model)
    flat = flatten(merged)
    cast = {path: np.asarray(leaf, ml_dtypes.bfloat16).astype(np.float32) for path, leaf in flat.items()}
    old = flatten(params)
    kernels = [path for path in old if '/adapter_0/a' in path]
    changes, losses = [], []
    for path in kernels:
        kernel = path.replace('/adapter_0/a', '/kernel')
        new = np.asarray(flat[kernel][:2])  # the adapted layers
        changes.append(new - np.asarray(old[kernel]))
        losses.append(new - cast[kernel][:2])
    assert report.num_folded == 2 * len(kernels) == 14
    rms = [np.sqrt(np.mean(np.concatenate([x.ravel() for x in each])**2)) for each in (changes, losses)]
    np.testing.assert_allclose((report.change_rms, report.lost_rms), rms, rtol=1e-4)
    np.testing.assert_allclose(report.change, max(np.abs(x).max() for x in changes), rtol=1e-5)
    np.testing.assert_allclose(report.lost, max(np.abs(x).max() for x in losses), rtol=1e-5)
    assert report.change_at in report.lines()[0] and 'model.layers.' in report.lost_at
    logits = []
    for one in (flat, cast):
        tree = unflatten(one)
        logits.append(np.asarray(single.apply({'params': tree}, batch).hidden @ single.unembedding(tree)))
    difference = np.abs(logits[0] - logits[1])[np.asarray(batch.modality) > 0]
    np.testing.assert_allclose(report.logits, difference.max(), rtol=0.02)
    np.testing.assert_allclose(report.logits_mean, difference.mean(), rtol=0.02)
    assert merge_report(what, 'float16').lost < report.lost and dataclasses.asdict(report)['dtype'] == 'bfloat16'


def test_an_adapter_in_two_kernels_counts_once():
    many = LowRank(2), LowRank(2, scope='vision')
    model = VisionLanguageModel(LLM, (LayerGroup(3, (('q_proj', many),)),), PatchFrontend(PatchEmbed(PATCH)))
    what, losses = folded(exportable(random_params(model), model)), Losses('bfloat16')
    names = [name for name, _ in stream(part_of(what), 'float32', losses)]
    assert sum('q_proj' in name for name in names) == 6 and losses.num_folded == 6  # 3 layers, 2 kernels and 2 adapters
