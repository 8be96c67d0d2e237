"""A small method with random parameters, for tests of the model."""
import functools

import flax.linen as nn
import jax
import numpy as np

from vora_jax import variants
from vora_jax.data.fake import fake_batch
from vora_jax.llm.decoder import LanguageModel
from vora_jax.params import flatten, unflatten
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

VOCAB = 61
PATCH = PatchEmbed(patch_size=2, width=12, table_rows=3, table_cols=4)
TEACHER = Vit(PATCH, num_layers=2, mlp_width=16, num_heads=3)
LLM = LanguageModel(VOCAB, num_layers=4, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8,
                    qkv_bias=True)


@functools.cache
def vora(**changes):
    """The method on a tiny model: 3 of 4 layers adapted, 2 of them distilled."""
    options = {'llm': LLM, 'patch_embed': PATCH, 'teacher': TEACHER, 'rank': 4, 'num_adapted_layers': 3}
    return variants.vora(**options | changes)


def batch(seed=0, rows=3, slots=40, patches=24, text_only=False):
    """A random packed batch that fits the method."""
    return fake_batch(rows, slots, patches, PATCH.patch_size, VOCAB, 4, seed, text_only)


def random_params(model, example, seed=0, spread=1.0):
    """Parameters of `model` with nothing at zero: adapters, biases and heads are all random. Compiles nothing."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path.endswith('scale'):
            return 1 + 0.1 * rng.normal(size=shape)
        fan_in = shape[-2] if len(shape) > 1 and not path.endswith(('embedding', 'bias')) else 4
        return spread * rng.normal(size=shape) / fan_in**0.5
    return unflatten({path: draw(path, leaf.shape).astype(np.float32) for path, leaf in flatten(shapes).items()})
