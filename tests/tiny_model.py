"""A small method with random parameters, for tests of the model."""
import dataclasses
import functools
import os

import flax.linen as nn
import jax
import numpy as np
import pytest

from vora_jax import variants
from vora_jax.data.fake import fake_batch
from vora_jax.llm.decoder import LanguageModel
from vora_jax.ops.cross_entropy import cross_entropy_sum
from vora_jax.params import flatten, unflatten
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

VOCAB = 61
PATCH = PatchEmbed(patch_size=2, width=12, table_rows=3, table_cols=4)
TEACHER = Vit(PATCH, num_layers=2, mlp_width=16, num_heads=3)
LLM = LanguageModel(VOCAB, num_layers=4, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8,
                    biases=('q_proj', 'k_proj', 'v_proj'))
SHORT = dataclasses.replace(LLM, num_layers=2)  # one group of layers: for what takes long to compile
_SHAPES = {}  # of the parameters, by model


@pytest.fixture(autouse=True)
def strict():
    """No silent promotion of dtypes or ranks, for every test of a module that imports this name."""
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        yield


def vora(**changes):
    """The method on a tiny model: 2 of 4 layers are adapted and distilled."""
    options = {'llm': LLM, 'patch_embed': PATCH, 'teacher': TEACHER, 'rank': 4, 'scale': 0.7,
               'num_adapted_layers': 2}
    return variants.vora(**options | changes)


def batch(seed=1, rows=3, slots=40, patches=24, text_only=False):
    """A random packed batch that fits the method."""
    return fake_batch(rows, slots, patches, PATCH.patch_size, VOCAB, 4, seed, text_only)


def random_params(model, example, seed=0, spread=1.0):
    """Parameters of `model`, none of them zero: adapters, biases, heads are random too. Compiles nothing."""
    if model not in _SHAPES:
        _SHAPES[model] = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path.endswith('scale'):
            return 1 + 0.1 * rng.normal(size=shape)
        fan_in = shape[-2] if len(shape) > 1 and not path.endswith(('embedding', 'bias')) else 4
        return spread * rng.normal(size=shape) / fan_in**0.5

    flat = {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in flatten(_SHAPES[model]).items()}
    return unflatten(flat)


def without(params, *parts):
    """The parameters without those whose path holds one of `parts`."""
    flat = flatten(params).items()
    return unflatten({path: leaf for path, leaf in flat if not any(part in path for part in parts)})


# Tests compile much and compute little: machine code that is not optimised comes 2.5 times as fast.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
# Claims about bits are made about the code that runs outside of tests.
USUAL = {'xla_backend_optimization_level': 3}
if 'xla_cpu_use_fusion_emitters' in os.environ['XLA_FLAGS']:
    USUAL['xla_cpu_use_fusion_emitters'] = True
full_jit = functools.partial(jax.jit, compiler_options=USUAL)


@functools.cache
def apply(model, compile=quick_jit):
    """The compiled call of a model: (params, batch, adapters_on) -> Output."""
    return compile(lambda params, batch, on=None: model.apply({'params': params}, batch, on))


@functools.cache
def gradients(model):
    """Compiled (loss, d loss / d params) of (params, batch, weight of words, weight of distillation)."""
    def loss(params, batch, words, distillation):
        out = model.apply({'params': params}, batch)
        head = model.unembedding(params)
        wrong = cross_entropy_sum(out.hidden, head, batch.targets, batch.loss_mask)
        return words * wrong + distillation * out.distill_sum.sum()
    return quick_jit(jax.value_and_grad(loss))
