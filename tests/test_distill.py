"""Distillation against a plain loop."""
import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_model import (
    LLM,
    SHORT,
    TEACHER,
    apply,
    batch,
    gradients,
    quick_jit,
    random_params,
    strict,  # noqa: F401
    vora,
)

from vora_jax.data.packing import Budgets, Text, layout, stack
from vora_jax.distill import Distillation, cosine
from vora_jax.llm.decoder import Decoder
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import LayerGroup, Tap, join_groups
from vora_jax.params import flatten
from vora_jax.vision.vit import VisionTransformer

# Layers 0 and 2 meet blocks 1 and 0: nothing that follows from counting.
PAIRS = {0: 1, 2: 0}


@functools.cache
def paired(pairing):
    model = vora().stage('pretrain').model
    adapters = model.groups[0].adapters
    layers = [LayerGroup(1, adapters if layer < 3 else (), layer in PAIRS) for layer in range(LLM.num_layers)]
    distillation = Distillation(TEACHER, tuple(PAIRS), tuple(PAIRS.values()), pairing)
    return model.clone(groups=join_groups(layers), distillation=distillation)


@functools.cache
def states():
    """(example, params, states entering and leaving each layer, the teacher's block outputs)."""
    example, model = batch(), paired('input_to_output')
    params = random_params(model, example)
    groups = tuple(dataclasses.replace(group, side=True) for group in model.groups)
    decoder = Decoder(LLM, groups, lambda: Tap(name='side'))

    @quick_jit
    def run(params, batch):
        x = model.apply({'params': params}, batch, method='embed')
        context = SlotContext(batch.key_range, batch.modality)
        _, _, leaving = decoder.apply({'params': params['decoder']}, x, batch.positions, context, None, ())
        blocks = VisionTransformer(TEACHER).apply({'params': params['teacher']}, batch.patches).blocks
        return x, leaving, blocks
    x, leaving, blocks = (np.asarray(value, np.float64) for value in run(params, example))
    return example, params, np.concatenate([x[None], leaving[:-1]]), leaving, blocks


def head_params(params, layer):
    """The head of a layer, found through the groups."""
    sizes = [group.num_layers for group in paired('input_to_output').groups]
    group = next(i for i in range(len(sizes)) if layer < sum(sizes[:i + 1]))
    side = params['decoder']['layers'][f'group_{group}']['side']
    return jax.tree.map(lambda leaf: leaf[layer - sum(sizes[:group])].astype(np.float64), side)


@pytest.mark.parametrize('pairing', ['input_to_output', 'output_to_output'])
def test_the_sum_equals_a_loop_over_vision_tokens(pairing):
    example, params, entering, leaving, blocks = states()
    chosen = entering if pairing == 'input_to_output' else leaving
    expected, count = np.zeros(len(PAIRS)), 0
    for index, (layer, block) in enumerate(PAIRS.items()):
        head, count = head_params(params, layer), 0
        for row, token in zip(*np.nonzero(example.vision_slot >= 0)):
            state = chosen[layer, row, example.vision_slot[row, token]]
            state = state / np.sqrt((state**2).mean() + 1e-5) * head['norm']['scale']
            student, target = state @ head['kernel'], blocks[block, row, example.vision_source[row, token]]
            expected[index] += 1 - student @ target / np.linalg.norm(student) / np.linalg.norm(target)
            count += 1
    out = apply(paired(pairing))(params, example)
    np.testing.assert_allclose(out.distill_sum, expected, rtol=1e-5)
    assert out.distill_count == count > 10
    assert out.distill_sum.dtype == out.distill_count.dtype == np.float32


def distillation_gradients(batch):
    """(loss, gradients) of the distillation alone."""
    model = vora(llm=SHORT).stage('pretrain').model
    return gradients(model)(random_params(model, batch), batch, np.float32(0), np.float32(1))


def test_the_teacher_gets_no_gradient_and_the_student_does():
    _, result = distillation_gradients(batch())
    flat = flatten(result)
    assert all(not leaf.any() for path, leaf in flat.items() if path.startswith('teacher/'))
    for part in ('side/kernel', 'frontend/out_proj', 'q_proj/adapter_0/a'):
        assert any(leaf.any() for path, leaf in flat.items() if part in path), part


def test_a_batch_without_pictures_costs_nothing():
    budgets = Budgets(40, 24, 4, TEACHER.patch_embed.patch_size**2 * 3)
    rng = np.random.default_rng(0)
    words = rng.integers(1, LLM.vocab_size, (3, 9)).tolist()
    text = stack([layout([[Text(row, True)]], budgets) for row in words])
    value, result = distillation_gradients(text)
    assert value == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in flatten(result).values())


def test_the_cosine_of_a_vanishing_vector_is_zero_with_a_finite_gradient():
    a, b = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    value, gradient = jax.value_and_grad(lambda a: cosine(a, b).sum())(a)
    assert value == 0 and np.isfinite(gradient).all()


def test_pairings_that_do_not_fit_raise():
    for layers, blocks, message in (
            ((0, 1), (0,), '2 layers cannot be paired with 1 blocks'),
            ((1, 0), (0, 1), 'must rise'),
            ((0,), (2,), "not one of the teacher's 2 blocks")):
        with pytest.raises(ValueError, match=message):
            Distillation(TEACHER, layers, blocks)
