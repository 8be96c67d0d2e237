"""Routed mixtures against float64, in segments, sites and training."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_methods import ENCODER, METHODS, method_batch
from tiny_model import LLM, apply, full_jit, quick_jit, random_params, strict  # noqa: F401

from vora_jax import variants
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.nn.block import LINEARS, Block
from vora_jax.nn.modality_mixture import MixtureBranch, ModalityMixture
from vora_jax.nn.slots import SlotContext
from vora_jax.params import flatten, unflatten
from vora_jax.types import ROUTE, TEXT, VISION, KeyRange, UserError
from vora_jax.vision.encoder_frontend import Projector

# (rank, num_groups, scale, temperature, dropout, num_experts)
FORMS = [(8, 2, 1.0, 10.0, 0.0, 2), (6, 3, 0.3, 5.0, 0.0, 2), (4, 1, -2.0, 0.5, 0.0, 3), (4, 4, 1.5, 1.0, 0.0, 1)]
ROUTES = 'slot', 'own', 'first_row'
ROUTE_SLOT = np.int32([[0, 0, 0, 3, 3], [0, 1, 1, 1, 4]])
WIDTH = 12


def drawn(mixture, seed=0):
    """(z, parameters of the branch, weights that make its output a number), none of them zero."""
    rng = np.random.default_rng(seed)
    rank, groups = mixture.rank, mixture.num_groups
    shapes = {'down_kernel': (WIDTH, rank), 'down_bias': (rank,)}
    for expert in range(mixture.num_experts):
        shapes[f'up_{expert}_kernel'] = groups, rank // groups, WIDTH // groups
        shapes[f'up_{expert}_bias'] = WIDTH,
    if mixture.num_experts > 1:
        shapes |= {'router_kernel': (WIDTH, mixture.num_experts), 'router_bias': (mixture.num_experts,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    z, readout = rng.normal(size=(2, *ROUTE_SLOT.shape, WIDTH)).astype(np.float32)
    return z, params, readout


def reference(mixture, params, z):
    """The formula slot by slot, in float64, with each `up` written out as one block-diagonal matrix."""
    params, z = ({k: np.float64(v) for k, v in params.items()}, np.float64(z))
    ups = np.zeros((mixture.num_experts, mixture.rank, WIDTH))
    for expert, up in enumerate(ups):
        for group, piece in enumerate(params[f'up_{expert}_kernel']):
            inner, outer = piece.shape
            up[group * inner:(group + 1) * inner, group * outer:(group + 1) * outer] = piece
    new = z.copy()
    for row, slot in np.ndindex(z.shape[:2]):
        weights = [1.0]
        if mixture.num_experts > 1:
            source = {'slot': (row, ROUTE_SLOT[row, slot]), 'own': (row, slot), 'first_row': (0, slot)}[mixture.route_by]
            logits = (z[source] @ params['router_kernel'] + params['router_bias']) / mixture.temperature
            weights = np.exp(logits) / np.exp(logits).sum()
        inner = z[row, slot] @ params['down_kernel'] + params['down_bias']
        for expert, weight in enumerate(weights):
            new[row, slot] += mixture.scale * weight * (inner @ ups[expert] + params[f'up_{expert}_bias'])
    return new


def call(mixture, params, z, adapters_on=None, **kwargs):
    context = SlotContext(None, adapters_on=adapters_on, route_slot=jnp.asarray(ROUTE_SLOT))
    return MixtureBranch(mixture, **kwargs).apply({'params': params}, z, context)[0]


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('route_by', ROUTES)
def test_values_and_gradients_are_those_of_the_formula(form, route_by):
    """Gradients against central differences of the float64 formula."""
    mixture = ModalityMixture(*form, route_by=route_by)
    z, params, readout = drawn(mixture)
    np.testing.assert_allclose(call(mixture, params, z), reference(mixture, params, z), rtol=0, atol=5e-5)  # measured: 8e-6

    def loss(inputs):
        return jnp.sum(call(mixture, inputs, inputs['z']) * readout)

    inputs, step = {k: np.float64(v) for k, v in (params | {'z': z}).items()}, 1e-5
    gradients = quick_jit(jax.grad(loss))(params | {'z': z})
    assert gradients.keys() == inputs.keys()
    for name, array in inputs.items():
        expected = np.empty_like(array)
        for index in np.ndindex(array.shape):
            sums = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                changed = inputs | {name: moved}
                sums.append(np.sum(reference(mixture, changed, changed['z']) * readout))
            expected[index] = (sums[0] - sums[1]) / (2 * step)
        error = np.max(np.abs(gradients[name] - expected)) / np.max(np.abs(expected))
        assert error < 2e-5, (name, error)  # measured: 2e-6


def test_a_new_branch_and_one_that_is_off_leave_the_state_bit_for_bit():
    mixture = ModalityMixture()
    z, params, _ = drawn(mixture)
    context = SlotContext(None, route_slot=jnp.asarray(ROUTE_SLOT))
    fresh = nn.unbox(MixtureBranch(mixture).init(jax.random.key(0), z, context)['params'])
    assert {name for name, leaf in fresh.items() if leaf.any()} == {'down_kernel', 'router_kernel', 'router_bias'}
    assert np.abs(fresh['down_kernel']).max() <= (6 / (WIDTH + 8))**0.5 and np.abs(fresh['router_bias']).max() <= WIDTH**-0.5
    np.testing.assert_array_equal(call(mixture, fresh, z), z)
    np.testing.assert_array_equal(call(mixture, params, z, jnp.asarray(False)), z)
    by_row = call(mixture, params, z, np.array([True, False]))
    np.testing.assert_array_equal(by_row[1], z[1])
    np.testing.assert_array_equal(by_row[0], call(mixture, params, z)[0])


def test_dropout_acts_only_in_training():
    mixture = ModalityMixture(dropout=0.5)
    z, params, _ = drawn(mixture)

    def train(seed, mixture=mixture):
        context = SlotContext(None, route_slot=jnp.asarray(ROUTE_SLOT))
        branch, rngs = MixtureBranch(mixture, deterministic=False), {'dropout': jax.random.key(seed)}
        return branch.apply({'params': params}, z, context, rngs=rngs)[0]

    np.testing.assert_array_equal(train(0), train(0))
    assert (train(0) != train(1)).any()
    still = call(mixture, params, z)
    np.testing.assert_array_equal(still, call(dataclasses.replace(mixture, dropout=0.0), params, z))
    np.testing.assert_array_equal(train(0, dataclasses.replace(mixture, dropout=0.0)), still)
    mean = jax.vmap(train)(jnp.arange(200)).mean(0)
    assert np.abs(mean - still).max() < 0.2 * np.abs(train(0) - still).max()  # kept values are scaled up; measured: 0.07


def test_senseless_sizes_are_named():
    with pytest.raises(UserError, match='rank 8 must be a multiple of num_groups 3'):
        ModalityMixture(num_groups=3)
    with pytest.raises(UserError, match='temperature 0.0'):
        ModalityMixture(temperature=0.0)
    with pytest.raises(UserError, match="num_groups = 5 does not divide the layer's width 12"):
        call(ModalityMixture(10, 5), {}, drawn(ModalityMixture())[0])


@pytest.mark.parametrize('site, first, changed', [('attention', 'attention_norm', ('q_proj', 'k_proj', 'v_proj')),
                                                  ('mlp', 'mlp_norm', ('gate_proj', 'up_proj'))])
def test_a_site_is_the_normed_input_of_its_branch(site, first, changed):
    """A mixture of one path is linear, so it equals other kernels in the linears that read it (RepAdapter, 2302.08106)."""
    mixture = ModalityMixture(4, 2, 0.7, num_experts=1, dropout=0.0)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 5, LLM.width)).astype(np.float32)
    context = SlotContext(KeyRange(*jnp.broadcast_to(jnp.int32([[[0] * 5], [[1, 2, 3, 4, 5]]]), (2, 2, 5))))

    class Shaped:  # `random_params` asks for `init(key, example)`
        block = Block(LLM.block_shape, biases=LINEARS, mixtures=((site, mixture),))
        init = staticmethod(lambda key, x: Shaped.block.init(key, x, context))
    params = random_params(Shaped, x)
    branch = params.pop(f'adapter_{site}')
    up = np.zeros((4, LLM.width), np.float32)
    up[:2, :LLM.width // 2], up[2:, LLM.width // 2:] = branch['up_0_kernel']
    matrix = np.eye(LLM.width, dtype=np.float32) + np.float32(0.7) * branch['down_kernel'] @ up
    shift = np.float32(0.7) * (branch['down_bias'] @ up + branch['up_0_bias'])
    folded = {name: params[name] | {'kernel': matrix @ params[name]['kernel'],
                                    'bias': params[name]['bias'] + shift @ params[name]['kernel']} for name in changed}
    expected, _ = Block(LLM.block_shape, biases=LINEARS).apply({'params': params | folded}, x, context)
    ours, _ = Shaped.block.apply({'params': params | {f'adapter_{site}': branch}}, x, context)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-5)  # measured: 2e-6
    assert np.abs(ours - Block(LLM.block_shape, biases=LINEARS).apply({'params': params}, x, context)[0]).max() > 0.1


def lavin(num_experts=2, route_images_by='slot', sites=('attention',), llm=LLM):
    """The method on a tiny model."""
    mixture = ModalityMixture(4, temperature=0.5, dropout=0.0, num_experts=num_experts)
    return variants.lavin(llm, ENCODER, Projector(activation='silu', hidden_width=6), mixture, (0, 1), sites,
                          route_images_by).stage('finetune').model


def test_a_model_whose_mixtures_are_new_or_off_is_the_base_bit_for_bit():
    """Those of the encoder too."""
    example, model = method_batch('lavin'), lavin(sites=('attention', 'mlp'))
    params = random_params(model, example)
    ups = [path for path in flatten(params) if '/adapter_' in path]
    assert {path.split('/')[-2] for path in ups} == {'adapter_attention', 'adapter_mlp'}
    new = unflatten({path: leaf * (path not in ups or '/up_' not in path) for path, leaf in flatten(params).items()})
    frozen = unflatten({path: leaf for path, leaf in flatten(params).items() if path not in ups})
    base_model = model.clone(groups=tuple(dataclasses.replace(group, mixtures=()) for group in model.groups),
                             vision=dataclasses.replace(model.vision, mixtures=()))
    base = apply(base_model, full_jit)(frozen, example).hidden
    run = apply(model, full_jit)
    np.testing.assert_array_equal(run(new, example, np.ones(3, bool)).hidden, base)
    np.testing.assert_array_equal(run(params, example, np.zeros(3, bool)).hidden, base)
    assert (run(params, example, np.ones(3, bool)).hidden != base).any(-1)[example.modality > 0].all()


@pytest.mark.parametrize('route_images_by', ROUTES)
def test_a_packed_segment_is_routed_by_its_own_slot_and_pictures(route_images_by):
    """Another modality token or picture changes its segment alone; if the first row routes pictures, those of other rows."""
    rng, rule = np.random.default_rng(0), METHODS['lavin'][0].vision_tokens

    def picture(rows, cols):
        return Picture(rng.integers(0, 256, (rows * cols, 12)).astype(np.uint8), rows, cols)
    rows = ([[Text([1, 2]), picture(1, 2)], [Text([3]), picture(2, 2), Text([4, 5])], [Text([6, 7])]],
            [[picture(3, 3), Text([8])]])
    example = stack([layout(row, Budgets(20, 12, 2, 12), rule=rule) for row in rows])
    model = lavin(route_images_by=route_images_by)
    params, run = random_params(model, example, spread=2.0), apply(model)
    before = np.asarray(run(params, example).hidden)

    def changed(example):
        return np.asarray(run(params, example).hidden != before).any(-1)
    segment = (example.segment_id == 2) & (np.arange(2)[:, None] == 0)
    tokens = np.where(segment & (example.modality == ROUTE), 0, example.tokens)
    np.testing.assert_array_equal(changed(example._replace(tokens=tokens)), segment)

    image = (example.patches.image_id == 1) & (np.arange(2)[:, None] == 0)
    pixels = np.where(image[..., None], 255 - example.patches.pixels, example.patches.pixels)
    seen = segment & (np.cumsum(example.modality == VISION, axis=1) > 2)  # of the segment, from its picture on
    if route_images_by == 'first_row':  # row 1's picture has patches in the same places
        seen[1] = (np.cumsum(example.modality == VISION, axis=1) > 0)[1] & (example.segment_id[1] == 1)
    np.testing.assert_array_equal(changed(example._replace(patches=example.patches._replace(pixels=pixels))), seen)


def test_nothing_but_routing_reads_the_modality_token():
    """Without a choice of paths, or with a router that is constant, its gradient is exactly 0."""
    example = method_batch('lavin', seed=4)
    largest = {}
    for num_experts in (2, 1):
        model = lavin(num_experts)

        def words(vectors, params, batch):
            hidden = model.apply({'params': params | {'modality_embedding': vectors}}, batch).hidden
            return jnp.sum(jnp.where((batch.modality == TEXT)[..., None], hidden, 0.0))
        gradient, flat = quick_jit(jax.grad(words)), flatten(random_params(model, example))
        for constant in (False, True)[:num_experts]:
            params = unflatten({path: 0 * leaf if constant and path.endswith('router_kernel') else leaf
                                for path, leaf in flat.items()})
            largest[num_experts, constant] = np.abs(gradient(params['modality_embedding'], params, example)).max()
    assert largest[2, False] > 1e-3 and largest[2, True] == largest[1, False] == 0


def test_bfloat16_activations_stay_close():
    example, results = method_batch('lavin'), []
    for dtype in ('float32', 'bfloat16'):
        model = lavin(llm=dataclasses.replace(LLM, activation_dtype=dtype))
        results.append(apply(model)(random_params(model, example), example).hidden)
    exact, rounded = results
    assert rounded.dtype == jnp.bfloat16
    assert np.abs(exact - rounded.astype(jnp.float32)).max() / np.abs(exact).max() < 0.05  # measured: 0.035
