"""Each adapter against its formula, and together on one linear."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_methods import METHODS, PATCH
from tiny_model import LLM, apply, full_jit, quick_jit, random_params, strict, without  # noqa: F401

from vora_jax.data.fake import random_segments
from vora_jax.data.packing import Budgets, layout, stack
from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.adapters import DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.slots import SlotContext, vision_slots
from vora_jax.params import flatten, regroup, starts_as, unflatten
from vora_jax.types import PAD, TEXT, VISION
from vora_jax.variants import language_model

MODALITY = np.int8([[TEXT, VISION, VISION, TEXT, PAD, VISION], [TEXT] * 5 + [PAD], [VISION] * 4 + [TEXT, PAD]])
SLOT = np.int32([[1, 2, 5, -1], [-1] * 4, [0, 1, 2, 3]])
IS_VISION = MODALITY == VISION
X = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
COTANGENT = np.random.default_rng(1).normal(size=(3, 6, 5)).astype(np.float32)
SCOPES = {'all': np.ones((3, 6), bool), 'vision': IS_VISION, 'text': MODALITY == TEXT}
KINDS = [LowRank(2), LowRank(2, scope='vision'), LowRank(2, scope='text'), DualLowRank(8), DualLowRank(8, scope='vision'),
         DualLowRank(8, scope='text'), ModalityKernel(), ModalityKernel('text')]
PAIRS = [(LowRank(2), ModalityKernel()), (ModalityKernel(), LowRank(2, 1.5, scope='vision')), (ModalityKernel(), LowRank(3)),
         (DualLowRank(9), LowRank(2, scope='vision'), ModalityKernel('text'))]


def context(on=None):
    return SlotContext(None, MODALITY, adapters_on=on, vision=vision_slots(SLOT, MODALITY, on))


def layer(*adapters, use_bias=True, training=False, compile=jax.jit):
    """(call of (params, x, adapters_on, dropout seed), random parameters) of a layer 8 -> 5."""
    module = AdaptedDense(5, ('embed', 'mlp'), adapters, use_bias, not training)

    def run(params, x=X, on=None, seed=0):
        return module.apply({'params': params}, x, context(on), rngs={'dropout': jax.random.key(seed)})

    class Shaped:  # `random_params` asks for `init(key, example)`
        init = staticmethod(lambda key, x: module.init(key, x, context()))
    return compile(run), random_params(Shaped, X)


def transcription(adapters, params, x, torch):
    """The same in float64, slot by slot: each adapter changes what those before it left."""
    functional = torch.nn.functional

    def change(adapter, own, x, y):
        if isinstance(adapter, ModalityKernel):
            return x @ own['kernel'] + (own['bias'] if 'bias' in own else 0)
        skill = x @ own['a']
        if isinstance(adapter, DualLowRank):
            skill = functional.layer_norm(skill, skill.shape[-1:], own['norm']['scale'], own['norm']['bias'], 1e-5)
            skill = skill * functional.relu(x @ own['task'])
        return y + adapter.scale * skill @ own['b']

    y = x @ params['kernel'] + params['bias']
    for number, adapter in enumerate(adapters):
        acts = torch.tensor(SCOPES[adapter.scope])[..., None]
        y = torch.where(acts, change(adapter, params[f'adapter_{number}'], x, y), y)
    return y


@pytest.mark.parametrize('adapters', [*((kind,) for kind in KINDS), *PAIRS], ids=str)
def test_values_and_gradients_equal_a_transcription(adapters):
    torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    call, params = layer(*adapters)

    @quick_jit
    def run(params, x):
        out, pull = jax.vjp(call, params, x)
        return out, *pull(COTANGENT)
    out, d_params, d_x = run(params, X)
    leaves = {path: torch.tensor(leaf, dtype=torch.float64, requires_grad=True) for path, leaf in flatten(params).items()}
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    expected = transcription(adapters, unflatten(leaves), x, torch)
    expected.backward(torch.tensor(COTANGENT, dtype=torch.float64))
    for name, ours, theirs in [('out', out, expected.detach()), ('x', d_x, x.grad),
                               *((path, leaf, leaves[path].grad) for path, leaf in flatten(d_params).items())]:
        theirs = np.zeros_like(ours) if theirs is None else theirs.numpy()  # a kernel that another one hides
        error = np.abs(np.asarray(ours) - theirs).max() / max(1.0, np.abs(theirs).max())
        assert error <= 2e-6, (name, error)


@pytest.mark.parametrize('adapters', [*((kind,) for kind in KINDS), *PAIRS], ids=str)
def test_new_or_switched_off_they_leave_the_base_bit_for_bit(adapters):
    call, params = layer(*adapters, compile=full_jit)
    base = np.asarray(layer(compile=full_jit)[0](without(params, 'adapter_')))
    np.testing.assert_array_equal(call(params, X, np.array(False)), base)
    on = np.asarray(call(params, X, np.array(True)))
    np.testing.assert_array_equal(call(params, X, np.array([True, False, True]))[1], base[1])
    np.testing.assert_array_equal(call(params, X, np.array([True, False, True]))[::2], on[::2])
    acts = np.any([SCOPES[adapter.scope] for adapter in adapters], axis=0)
    np.testing.assert_array_equal((on != base).any(-1), acts)

    flat = flatten({'linear': params})
    new = {path: flat.get(starts_as(path), leaf * (not path.endswith('/b'))) for path, leaf in flat.items()}
    fresh = np.asarray(call(unflatten(new)['linear']))
    kernels = [SCOPES[adapter.scope] for adapter in adapters if isinstance(adapter, ModalityKernel)]
    copied = np.any(kernels, axis=0) if kernels else np.zeros_like(IS_VISION)
    np.testing.assert_array_equal(fresh[~copied], base[~copied])
    np.testing.assert_allclose(fresh[copied], base[copied], atol=1e-5)  # gathered rows: a product of another shape


def test_a_modality_kernel_begins_as_a_copy_with_its_bias():
    module = AdaptedDense(5, ('embed', 'mlp'), (ModalityKernel(),), True, bias_init=nn.initializers.normal(1.0))
    params = nn.unbox(module.init(jax.random.key(0), X, context())['params'])
    assert params['bias'].any() and params['adapter_0'].keys() == {'kernel', 'bias'}
    for name in ('kernel', 'bias'):
        np.testing.assert_array_equal(params['adapter_0'][name], params[name])
    assert layer(ModalityKernel(), use_bias=False)[1]['adapter_0'].keys() == {'kernel'}


def test_a_modality_kernel_learns_from_its_own_slots_only():
    call, params = layer(ModalityKernel())
    gradient = jax.jit(jax.grad(lambda params, cotangent: jnp.vdot(call(params), cotangent)))
    here = IS_VISION[..., None]
    from_vision = gradient(params, np.where(here, COTANGENT, np.float32(0)))
    from_text = gradient(params, np.where(here, np.float32(0), COTANGENT))
    assert not from_text['adapter_0']['kernel'].any() and not from_text['adapter_0']['bias'].any()
    assert not from_vision['kernel'].any() and not from_vision['bias'].any()
    expected = np.einsum('bsd,bsf->df', X * here, COTANGENT)
    np.testing.assert_allclose(from_vision['adapter_0']['kernel'], expected, atol=1e-5)
    np.testing.assert_allclose(from_text['bias'], (COTANGENT * ~here).sum((0, 1)), atol=1e-5)


def test_a_new_dual_adapter_changes_nothing_and_only_b_learns():
    module = AdaptedDense(5, ('embed', 'mlp'), (DualLowRank(16, dropout=0.0),))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), X, context())['params'])
    new = params['adapter_0']
    assert not new['b'].any() and (new['norm']['scale'] == 1).all() and not new['norm']['bias'].any()
    for name in ('a', 'task'):  # kaiming_uniform(a=sqrt(5))
        assert 0.9 / 8**0.5 < np.abs(new[name]).max() <= 1 / 8**0.5, name
    assert (new['a'] != new['task']).any()
    gradients = jax.jit(jax.grad(lambda params: jnp.vdot(module.apply({'params': params}, X, context()), COTANGENT)))(params)
    learning = {path for path, leaf in flatten(gradients['adapter_0']).items() if leaf.any()}
    assert learning == {'b'}


def test_dropout_acts_on_the_skill_alone():
    call, params = layer(DualLowRank(3, dropout=0.5), training=True)
    exact, _ = layer(DualLowRank(3, dropout=0.5))
    assert (call(params, X, None, 0) != call(params, X, None, 1)).any() and (call(params) != exact(params)).any()
    constant = params | {'adapter_0': params['adapter_0'] | {'norm': {
        'scale': np.zeros(3, np.float32), 'bias': params['adapter_0']['norm']['bias']}}}
    for seed in range(3):  # the norm hides the skill: what is left is the task's factor, of all of the input
        np.testing.assert_array_equal(call(constant, X, None, seed), exact(constant))


def test_a_dual_adapter_grows_with_its_input_and_does_not_add():
    call, params = layer(DualLowRank(8), use_bias=False)

    def change(x):
        return np.asarray(call(params, x, np.array(True))) - np.asarray(call(params, x, np.array(False)))
    # The norm takes the scale out of the skill up to its epsilon, the rectifier keeps it in the task.
    np.testing.assert_allclose(change(np.float32(4) * X), 4 * change(X), rtol=0.02, atol=0.02)
    other = X[:, ::-1]
    assert np.abs(change(X + other) - change(X) - change(other)).max() > 0.5


def test_a_model_with_copied_kernels_equals_the_base_model():
    """Bit for bit in rows without pictures, which are also the plain language model's; there even after training."""
    method, stage = METHODS['llavit']
    rng, budgets = np.random.default_rng(3), Budgets(40, 27, 4, PATCH.patch_size**2 * 3)
    rows = [random_segments(rng, budgets if has else Budgets(40), 61, method.vision_tokens) for has in (1, 0, 1, 0)]
    mixed = stack([layout(row, budgets, rule=method.vision_tokens) for row in rows])
    pictures = (mixed.modality == VISION).any(1)
    assert pictures.tolist() == [True, False, True, False]
    model = method.stage(stage).model
    params = random_params(model, mixed)
    flat = flatten(params)
    new = unflatten({path: flat.get(starts_as(path), leaf) for path, leaf in flat.items()})
    base_model = METHODS['llava'][0].stage('finetune').model.clone(vision=model.vision)
    base = np.asarray(apply(base_model, full_jit)(without(params, 'adapter_'), mixed).hidden)
    fresh, trained = (np.asarray(apply(model, full_jit)(some, mixed).hidden) for some in (new, params))
    np.testing.assert_allclose(fresh, base, atol=1e-5)
    for hidden in (fresh, trained):
        np.testing.assert_array_equal(hidden[~pictures], base[~pictures])
    assert np.abs(trained[pictures] - base[pictures]).max() > 0.1

    text = stack([layout(row, Budgets(40)) for row in (rows[1], rows[3])])
    plain = language_model(LLM).stage('pretrain').model
    decoder = regroup({'decoder': without(params, 'adapter_')['decoder']}, [LLM.num_layers])
    hidden = np.asarray(apply(plain, full_jit)(decoder, text).hidden)
    np.testing.assert_allclose(hidden, base[~pictures], atol=1e-5)
