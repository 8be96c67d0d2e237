"""Gated prompts: identity, a plain loop, decoding, gradients."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_methods import ENCODER, PROJECTOR
from tiny_model import LLM, SHORT, apply, full_jit, gradients, random_params, strict  # noqa: F401
from tiny_model import batch as example_batch

from vora_jax import variants
from vora_jax.convert.export.exportable import exportable, folded
from vora_jax.llm.decoder import LanguageModel
from vora_jax.llm.generate import empty_cache
from vora_jax.merge import merge
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.block import Block
from vora_jax.nn.gated_prompts import GatedPrompts, PromptBranch
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import LayerGroup
from vora_jax.ops.attention import attention
from vora_jax.ops.rope import rope_angles
from vora_jax.params import count, flatten, partition, unflatten
from vora_jax.types import PAD, KeyRange, UserError

# A decoder alone, whose batches have pictures all the same: prompts do not ask what a slot holds.
MODEL = VisionLanguageModel(SHORT, (LayerGroup(1), LayerGroup(1, prompts=GatedPrompts(3))))
PLAIN = MODEL.clone(groups=(LayerGroup(1), LayerGroup(1)))
PATH = 'decoder/layers/group_1/block/adapter_prompts/'


def without_prompts(params):
    return unflatten({path: leaf for path, leaf in flatten(params).items() if 'adapter_prompts' not in path})


def with_gates(params, factor):
    return unflatten({path: leaf * np.float32(factor) if path.endswith('/gate') else leaf
                      for path, leaf in flatten(params).items()})


def test_closed_gates_and_the_switch_leave_the_base_bit_for_bit():
    example = example_batch()
    params = random_params(MODEL, example)
    base = apply(PLAIN, full_jit)(without_prompts(params), example).hidden
    run, always = apply(MODEL, full_jit), np.ones(3, bool)
    np.testing.assert_array_equal(run(with_gates(params, 0), example).hidden, base)
    np.testing.assert_array_equal(run(with_gates(params, 0), example, always).hidden, base)
    np.testing.assert_array_equal(run(params, example, ~always).hidden, base)
    on = run(params, example, always).hidden
    mixed = run(params, example, np.array([True, False, True])).hidden
    np.testing.assert_array_equal(mixed, jnp.where(np.array([[[True]], [[False]], [[True]]]), on, base))
    assert (on != base).any(axis=(1, 2)).all()


def test_new_gates_are_closed():
    q, none = np.zeros((1, 1, 4, 8), np.float32), np.zeros((1, 1), np.int32)
    branch = PromptBranch(GatedPrompts(3), width=100)
    params = nn.unbox(branch.init(jax.random.key(0), q, q, lambda x, _: [jnp.zeros((1, 3, 2, 8))] * 2,
                                  SlotContext(KeyRange(none, none + 1)))['params'])
    assert params['gate'].shape == (4,) and not params['gate'].any()
    assert params['prompts'].shape == (3, 100) and 0.9 < params['prompts'].std() < 1.1


@pytest.mark.parametrize('qk_norm', [False, True])
def test_a_block_equals_a_loop_over_heads(qk_norm):
    """Keys and values of prompts are the layer's own (bias, adapters and key norm included) at no rotary position."""
    rng, prompts = np.random.default_rng(0), GatedPrompts(3)
    shape = dataclasses.replace(LLM, qk_norm=qk_norm).block_shape
    low_rank = LowRank(2, 0.5)
    calls = []

    def attend(q, k, v, key_range):
        calls.append((q, k, v, key_range, attention(q, k, v, key_range)))
        return calls[-1][-1]

    slots = np.arange(5, dtype=np.int32)[None]
    stop = np.minimum(slots + 1, 4)
    angles = rope_angles(slots, LLM.head_dim, LLM.rope_theta)
    context = SlotContext(KeyRange(np.where(slots < 4, 0, 4).astype(np.int32), stop), np.ones((1, 5), np.int8), angles)
    x = jnp.asarray(rng.normal(size=(1, 5, LLM.width)), jnp.float32)
    block = Block(shape, (('k_proj', (low_rank,)), ('v_proj', (low_rank,))), prompts=prompts, attend=attend)
    shapes = nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x, context)['params'])
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    calls.clear()
    block.apply({'params': params}, x, context)
    (q, _, _, _, plain), (same_q, keys, values, seen, _) = calls
    np.testing.assert_array_equal(q, same_q)

    own, flat = params['adapter_prompts'], flatten(params)
    vectors = {}
    for name in ('k_proj', 'v_proj'):
        a, b = (flat[f'{name}/adapter_0/{side}'] for side in 'ab')
        kernel = flat[f'{name}/kernel'].astype(np.float64) + 0.5 * a.astype(np.float64) @ b
        vectors[name] = (own['prompts'] @ kernel + flat[f'{name}/bias']).reshape(3, 2, 8)
    if qk_norm:
        k = vectors['k_proj']
        vectors['k_proj'] = k / np.sqrt((k**2).mean(-1, keepdims=True) + LLM.norm_eps) * flat['k_norm/scale']
    np.testing.assert_allclose(keys[0], vectors['k_proj'], atol=1e-5)  # measured 1.2e-6, of values up to 19
    np.testing.assert_allclose(values[0], vectors['v_proj'], atol=1e-5)
    assert seen.stop.tolist() == [[3, 3, 3, 3, 0]]

    branch = PromptBranch(prompts, LLM.width)
    changed = branch.apply({'params': own}, plain, q, lambda prompts, context: (keys, values), context)
    q, expected = np.asarray(q, np.float64), np.array(plain, np.float64)
    for slot in range(4):
        for head in range(4):
            scores = vectors['k_proj'][:, head // 2] @ q[0, slot, head] / np.sqrt(8)
            weights = np.exp(scores - scores.max())
            added = weights / weights.sum() @ vectors['v_proj'][:, head // 2]
            expected[0, slot, head] += np.tanh(own['gate'][head]) * added
    np.testing.assert_allclose(changed, expected, atol=1e-5)  # measured 1.7e-6, of values up to 19
    assert not np.asarray(changed)[0, 4].any()  # the slot that sees nothing


def test_prefill_and_decoding_equal_the_whole_row():
    example = example_batch()
    params = random_params(MODEL, example)
    whole = apply(MODEL)(params, example).hidden
    variables = {'params': params}
    slots = np.broadcast_to(np.arange(40, dtype=np.int32), (3, 40))
    x = MODEL.apply(variables, example, method='embed')
    cache = empty_cache(MODEL, 3, 40)
    cut = int(max(example.key_stop.max(1).min() - 3, 1))
    cut = next(c for c in range(cut, 0, -1) if (example.key_stop[:, :c] <= c).all())  # no image is split

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(first, last, cache):
        def part(z):
            return z[:, first:last]
        context = SlotContext(KeyRange(part(example.key_start), part(example.key_stop)), part(example.modality),
                              write_slot=part(slots), route_slot=part(slots))
        return MODEL.apply(variables, x[:, first:last], part(example.positions), context, cache, method='decode')

    before, cache = run(0, cut, cache)
    after, cache = run(cut, 40, cache)
    both = np.concatenate([before, after], axis=1)
    real = example.modality != PAD
    assert 0 < cut < 40
    np.testing.assert_allclose(both[real], np.asarray(whole)[real], atol=1e-5)  # measured 1e-6, of values up to 3


def test_gradients_open_the_gates_first():
    example = example_batch(2)
    params = random_params(MODEL, example)
    one, none = np.float32(1), np.float32(0)
    closed = flatten(gradients(MODEL)(with_gates(params, 0), example, one, none)[1])
    assert np.abs(closed[PATH + 'gate']).min() > 0 and not np.asarray(closed[PATH + 'prompts']).any()
    grads = flatten(gradients(MODEL)(params, example, one, none)[1])
    rng, flat = np.random.default_rng(0), flatten(params)
    for name in ('gate', 'prompts'):
        step = rng.normal(size=flat[PATH + name].shape).astype(np.float32)
        moved = [unflatten(flat | {PATH + name: flat[PATH + name] + np.float32(by) * step}) for by in (1e-2, -1e-2)]
        up, down = (gradients(MODEL)(tree, example, one, none)[0] for tree in moved)
        slope = float((grads[PATH + name] * step).sum())
        np.testing.assert_allclose(float(up - down) / 2e-2, slope, rtol=3e-3)  # measured 4e-4
        assert abs(slope) > 0.05


def test_stages_train_what_the_recipe_trains():
    method = variants.llama_adapter(LLM, ENCODER, PROJECTOR, GatedPrompts(3), num_prompted_layers=3, pool=2)
    model = method.stage('pretrain').model
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example_batch())['params'])
    trained = {stage: set(flatten(partition(shapes, method.stage(stage).trainable)[0])) for stage in method.stages}
    assert not any('adapter_prompts' in path and 'group_0' in path for path in flatten(shapes))
    assert method.vision_tokens.num_tokens(3, 4) == 4
    assert {path.split('/')[0] for path in trained['finetune']} == {'decoder'}
    assert all(path.endswith(('norm/scale', '/bias')) for path in trained['finetune'])
    biases = {path for path in flatten(shapes) if path.startswith('decoder/') and path.endswith('/bias')}
    assert biases <= trained['finetune']
    assert 'decoder/layers/group_0/block/down_proj/bias' in trained['finetune']
    assert 'decoder/norm/scale' in trained['finetune']
    assert not trained['pretrain'] & trained['finetune']
    assert any('adapter_prompts/gate' in path for path in trained['pretrain'])


def test_the_size_of_prompts_at_7b():
    """30 layers of 10 prompts are the 1.2 million parameters that the first paper's title page states."""
    llama = LanguageModel(32000, 32, 4096, 11008, 32, 32, 128)
    model = variants.llama_adapter(llama, ENCODER, PROJECTOR, num_prompted_layers=30).stage('pretrain').model
    flat = flatten(jax.eval_shape(model.init, jax.random.key(0), example_batch())['params'])
    assert sum(count(leaf) for path, leaf in flat.items() if 'adapter_' in path) == 30 * (10 * 4096 + 32) == 1_229_760


def test_what_cannot_be_done_is_told():
    params = random_params(MODEL, example_batch())
    with pytest.raises(UserError, match='^merge: GatedPrompts'):
        merge(params, MODEL)
    with pytest.raises(UserError, match='^merge: GatedPrompts'):
        folded(exportable(params, MODEL))
    with pytest.raises(UserError, match='num_prompts = 0'):
        GatedPrompts(0)
    with pytest.raises(UserError, match='num_prompted_layers = 5'):
        variants.llama_adapter(LLM, ENCODER, PROJECTOR, num_prompted_layers=5)
    every = variants.llama_adapter(LLM, ENCODER, PROJECTOR, num_prompted_layers=4).stage('pretrain').model
    assert [group.num_layers for group in every.groups] == [4] and isinstance(every.groups[0], LayerGroup)
