"""The whole model: identity, scope, leakage, pictures."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_methods import METHODS, PATCH
from tiny_model import LLM, VOCAB, apply, batch, full_jit, quick_jit, random_params, strict, vora, without  # noqa: F401

from vora_jax import variants
from vora_jax.batch import Batch, Patches
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.nn.slots import SlotContext, vision_slots
from vora_jax.ops import blocked_attention
from vora_jax.ops.attention import Kernels, attention
from vora_jax.params import flatten, regroup, unflatten
from vora_jax.types import VISION


def method(scope):
    return vora(scope=scope, num_adapted_layers=3, distill_weight=0.0)


def without_adapters(model):
    """The same groups of layers with plain linears: the frozen language model and its front end."""
    return model.clone(groups=tuple(dataclasses.replace(group, adapters=(), mixtures=()) for group in model.groups))


def optimised(model):
    return apply(model, full_jit)


@pytest.mark.parametrize('scope', ['all', 'vision', 'text'])
def test_adapters_that_are_new_or_off_leave_the_base_bit_for_bit(scope):
    example = batch()
    model = method(scope).stage('pretrain').model
    params = random_params(model, example)
    new = unflatten({path: leaf * (not path.endswith('/b')) for path, leaf in flatten(params).items()})
    base = optimised(without_adapters(model))(without(params, 'adapter_'), example).hidden
    run = optimised(model)
    always = np.ones(3, bool)
    np.testing.assert_array_equal(run(new, example, always).hidden, base)
    np.testing.assert_array_equal(run(params, example, ~always).hidden, base)
    on = run(params, example, always).hidden
    mixed = run(params, example, np.array([True, False, True])).hidden
    np.testing.assert_array_equal(mixed, jnp.where(np.array([[[True]], [[False]], [[True]]]), on, base))
    assert (on != base).any(axis=(1, 2)).all()


def test_adapters_without_a_switch_start_as_the_base():
    example = batch()
    model = method('all').stage('pretrain').model
    params = random_params(model, example)
    new = unflatten({path: leaf * (not path.endswith('/b')) for path, leaf in flatten(params).items()})
    base = optimised(without_adapters(model))(without(params, 'adapter_'), example).hidden
    np.testing.assert_array_equal(optimised(model)(new, example).hidden, base)


@pytest.mark.parametrize('name', ['vce_dual_lora', 'lavin', 'llavit'])
def test_so_do_those_of_other_methods(name):
    """New ones bit for bit where they start at zero; kernels of gathered slots in `nn/test_adapters.py`."""
    method, stage = METHODS[name]
    model, example = method.stage(stage).model, two_pictures(name)
    params = random_params(model, example)
    base_model = without_adapters(model)
    base_model = base_model.clone(vision=dataclasses.replace(model.vision, mixtures=()))
    base = optimised(base_model)(without(params, 'adapter_'), example).hidden
    run = optimised(model)
    np.testing.assert_array_equal(run(params, example, np.zeros(2, bool)).hidden, base)
    assert (run(params, example, np.ones(2, bool)).hidden != base).any(axis=(1, 2)).all()
    if name != 'llavit':
        new = unflatten({path: leaf * (not path.endswith('/b') and '/adapter_attention/up_' not in path)
                         for path, leaf in flatten(params).items()})
        np.testing.assert_array_equal(run(new, example, np.ones(2, bool)).hidden, base)


def two_pictures(name, rows=2):
    """Rows of two segments: text between two pictures, and two pictures side by side; some padding."""
    rule, rng = METHODS[name][0].vision_tokens, np.random.default_rng(5)
    budgets = Budgets(26, 14, 4, PATCH.patch_size**2 * 3)

    def words(size):
        return Text(rng.integers(1, VOCAB, size).tolist(), supervised=True)

    def picture(rows, cols):
        return Picture(rng.integers(0, 256, (rows * cols, budgets.patch_dim)).astype(np.uint8), rows, cols)
    return stack([layout([[words(2), picture(1, 2), words(2), picture(2, 1), words(2)],
                          [words(1), picture(2, 2), picture(1, 2), words(2)]], budgets, rule=rule) for _ in range(rows)])


def rows_with_and_without_pictures():
    """A batch whose rows 1 and 3 have no picture, the text batch these rows come from, bool[B]."""
    pictures, text = batch(seed=13, rows=4), batch(seed=2, rows=4, text_only=True)
    budgets = Budgets(40, 24, 4, pictures.patches.pixels.shape[-1])
    empty = stack([layout([], budgets)] * 4)
    pick = np.array([True, False, True, False])

    def choose(a, b):
        return np.where(pick.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    text = text._replace(vision_slot=empty.vision_slot, vision_source=empty.vision_source, patches=None)
    patches = Patches(*(choose(a, b) for a, b in zip(pictures.patches, empty.patches)))
    nothing = np.zeros(4)
    leaves = zip(pictures._replace(patches=nothing), text._replace(patches=nothing))
    return Batch(*(choose(a, b) for a, b in leaves))._replace(patches=patches), text, pick


def test_a_vision_scope_leaves_rows_without_pictures_to_the_frozen_language_model():
    mixed, text, has_picture = rows_with_and_without_pictures()
    assert ((mixed.modality == VISION).any(1) == has_picture).all()
    model = method('vision').stage('pretrain').model
    params = random_params(model, mixed)
    frozen = variants.language_model(LLM).stage('pretrain').model
    llm_params = regroup({'decoder': without(params, 'adapter_')['decoder']}, [LLM.num_layers])
    base = np.asarray(optimised(frozen)(llm_params, text).hidden)
    hidden = np.asarray(optimised(model)(params, mixed, np.array(True)).hidden)
    np.testing.assert_array_equal(hidden[~has_picture], base[~has_picture])
    logits = jax.jit(jnp.dot)
    head = params['decoder']['lm_head']
    np.testing.assert_array_equal(logits(hidden, head)[~has_picture], logits(base, head)[~has_picture])
    off = np.asarray(optimised(model)(params, mixed, np.array(False)).hidden)
    np.testing.assert_array_equal(off[~has_picture], base[~has_picture])
    assert (hidden[has_picture] != off[has_picture]).any(axis=(1, 2)).all()


def small_blocks(q, k, v, key_range):
    forward, backward = (functools.partial(way, query_block=8, key_block=16)
                         for way in (blocked_attention.forward, blocked_attention.backward))
    return attention(q, k, v, key_range, implementation=Kernels(forward, backward, blocked_attention.refuses))


def dependencies(model, params, batch):
    """bool[B, S, S]: d hidden[t] / d input[s] is not exactly 0."""
    @quick_jit
    def run(params, batch):
        def readout(x):
            context = SlotContext(batch.key_range, batch.modality, route_slot=batch.route_slot,
                                  vision=vision_slots(batch.vision_slot, batch.modality))
            hidden, _ = model.apply({'params': params}, x, batch.positions, context, None, method='decode')
            return hidden.sum(-1)
        x = model.apply({'params': params}, batch, method='embed')
        _, pull = jax.vjp(readout, x)

        def of_slot(slot):  # of all rows at once
            seed = jnp.zeros(x.shape[:2], jnp.float32).at[:, slot].set(1.0)
            return (pull(seed)[0] != 0).any(-1)
        return jax.vmap(of_slot, out_axes=1)(jnp.arange(x.shape[1], dtype=jnp.int32))
    return np.asarray(run(params, batch))


@pytest.mark.parametrize('attend', [attention, small_blocks], ids=['dense', 'blocked'])
def test_a_slot_depends_on_exactly_the_slots_of_its_range(attend):
    """The derivative is exactly 0 for later text, other segments and padding, else not 0."""
    example = batch(rows=2)
    model = method('all').stage('pretrain').model.clone(attend=attend)
    params = random_params(model, example)
    slots = np.arange(40)
    expected = (slots >= example.key_start[..., None]) & (slots < example.key_stop[..., None])
    padding = example.modality == 0
    assert padding.any() and (example.segment_id.max(1) > 1).all()
    assert (example.modality == VISION).any(1).all()
    # A pad slot sees nothing, but its own residual stream passes through it.
    expected |= padding[..., None] & (slots[:, None] == slots)
    np.testing.assert_array_equal(dependencies(model, params, example), expected)


@pytest.mark.parametrize('name', METHODS)
def test_no_method_leaks_between_pictures_segments_or_from_later_text(name):
    """Also from the pixels on: what a picture shows reaches the slots that see it and no others."""
    method, stage = METHODS[name]
    model, example = method.stage(stage).model, two_pictures(name, rows=1)
    params = random_params(model, example)
    slots, own = np.arange(26), np.eye(26, dtype=bool)
    expected = (slots >= example.key_start[..., None]) & (slots < example.key_stop[..., None])
    expected |= (example.modality == 0)[..., None] & own
    if any(group.mixtures for group in model.groups):  # the slot that routes is no key, but tells the kind of its segment
        expected |= own[example.route_slot]
    np.testing.assert_array_equal(dependencies(model, params, example), expected)

    is_image = example.patches.image_id == 1
    pixels = np.where((is_image & (example.patches.row >= 0))[..., None], 255 - example.patches.pixels,
                      example.patches.pixels)
    other = example._replace(patches=example.patches._replace(pixels=pixels))
    hidden, changed = (np.asarray(apply(model)(params, some).hidden) for some in (example, other))
    second = np.flatnonzero(example.modality[0] == VISION)[method.vision_tokens.num_tokens(1, 2)]
    sees = expected[0, :, second:second + method.vision_tokens.num_tokens(2, 1)].any(-1)
    np.testing.assert_array_equal((hidden != changed).any(-1)[0], sees)


def test_vision_slots_take_the_front_ends_vectors_in_order():
    example = batch()
    model = method('all').stage('pretrain').model
    params = random_params(model, example)

    @functools.partial(quick_jit, static_argnums=2)
    def run(params, batch, method):
        return model.apply({'params': params}, batch, method=method)
    embedded = np.asarray(run(params, example, 'embed'))
    outputs = np.asarray(run(params, example, lambda model, batch: model.frontend(batch.patches)))
    expected = np.array(params['decoder']['embedding'][example.tokens])
    for row, token in zip(*np.nonzero(example.vision_slot >= 0)):
        expected[row, example.vision_slot[row, token]] = outputs[row, example.vision_source[row, token]]
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


def test_a_tied_head_is_the_embedding():
    model = variants.language_model(dataclasses.replace(LLM, tied_head=True)).stage('pretrain').model
    example = stack([layout([[Text([1, 2])]], Budgets(4))])
    params = random_params(model, example)
    assert 'lm_head' not in params['decoder']
    np.testing.assert_array_equal(model.unembedding(params), params['decoder']['embedding'].T)
    assert model.unembedding(params).shape == (LLM.width, VOCAB)


def test_bfloat16_activations_stay_close():
    example = batch()
    results = []
    for dtype in ('float32', 'bfloat16'):
        model = vora(llm=dataclasses.replace(LLM, activation_dtype=dtype)).stage('pretrain').model
        results.append(apply(model)(random_params(model, example), example))
    exact, rounded = results
    assert rounded.hidden.dtype == jnp.bfloat16 and rounded.distill_sum.dtype == jnp.float32
    error = np.abs(exact.hidden - rounded.hidden.astype(jnp.float32)).max() / np.abs(exact.hidden).max()
    assert error < 0.05
    np.testing.assert_allclose(rounded.distill_sum, exact.distill_sum, rtol=0.02)
