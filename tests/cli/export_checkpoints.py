"""Tiny checkpoints of random weights, for tests of the verbs that export them."""
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny_pictures

from vora_jax.convert.export.exportable import smallest_batch
from vora_jax.params import flatten, unflatten
from vora_jax.training.checkpoints.checkpoint import write_checkpoint

TAGGER = '\n'.join(line for line in tiny_pictures.CONFIG.replace('@vora()', '@image_tagger()').splitlines()
                   if not line.startswith(('LanguageModel', 'vora'))) + '\nimage_tagger.vocab_size = 300\n'
QWEN = "LanguageModel.biases = ('q_proj', 'k_proj', 'v_proj')\nPatchEmbed.norm_eps = 1e-6\nVit.norm_eps = 1e-6\n"
SQUARE = "Data.image = @ImagePolicy()\nImagePolicy.kind = 'square_crop'\nImagePolicy.side = 16\n"
ADAPTED = tiny_pictures.CONFIG + QWEN + SQUARE
# An encoder, a projector and a causal language model.
CLIP = tiny_pictures.CONFIG.replace('@vora()', '@llava()').replace("'pretrain'", "'finetune'").replace('vora.', '# ')
CLIP += SQUARE + '''
PatchEmbed.norm = False
PatchEmbed.bias = False
PatchEmbed.positions = 'bicubic'
PatchEmbed.cls_token = True
PatchEmbed.norm_eps = 1e-5
Vit.norm_eps = 1e-5
Vit.norm = 'layer'
Vit.activation = 'gelu_quick'
Vit.pre_norm = True
Vit.biases = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj')
'''


def write(folder: pathlib.Path, name: str, config_text: str) -> str:
    """A checkpoint of random weights, adapters too, beside the pictures of `tiny_pictures.make`."""
    config, text = tiny_pictures.config(folder, config_text)
    model = config.method.stage(config.stage).model
    rng = np.random.default_rng(0)
    shapes = flatten(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), smallest_batch(model))['params']))
    params = unflatten({path: jnp.asarray((rng.normal(size=leaf.shape) * 0.3).astype(np.float32))
                        for path, leaf in shapes.items()})
    write_checkpoint(folder / name, params, text, str(folder / 'tokenizer'), origin='test')
    return str(folder / name)
