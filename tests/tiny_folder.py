"""Tiny Hugging Face folders with random weights, written without `transformers`."""
import contextlib
import json
import pathlib
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from vora_jax import variants
from vora_jax.cli import import_
from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.files.safetensors_files import write_shards
from vora_jax.convert.names.name_map import to_foreign


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """For tests of `vora import`: JAX runs already in this process; a test's process keeps its signal handlers."""
    monkeypatch.setattr(import_, 'join_processes', contextlib.nullcontext)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)


LLM = {'vocab_size': 320, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 3, 'num_attention_heads': 4,
       'num_key_value_heads': 2, 'max_position_embeddings': 256, 'rms_norm_eps': 1e-5}
VIT = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'image_size': 8,
       'patch_size': 4}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 64}
CONFIGS = {
    'llama': {'model_type': 'llama', **LLM},
    'llama3': {'model_type': 'llama', **LLM, 'rope_scaling': LLAMA3, 'tie_word_embeddings': True},
    'qwen2': {'model_type': 'qwen2', **LLM, 'rope_theta': 1e6},
    'qwen3': {'model_type': 'qwen3', **LLM, 'head_dim': 8},
    'clip': {'model_type': 'clip_vision_model', **VIT},
    'siglip': {'model_type': 'siglip_vision_model', **VIT},
    'aimv2': {'model_type': 'aimv2_vision_model', **VIT},
    'dinov2': {'model_type': 'dinov2', **VIT, 'mlp_ratio': 2},
    'llava': {'model_type': 'llava', 'text_config': {'model_type': 'llama', **LLM}, 'image_token_index': 319,
              'vision_config': {'model_type': 'clip_vision_model', **VIT}},
}


def found(name):
    """What the configuration of this name is recognised as."""
    return recognise(CONFIGS[name], {})


def random_params(name, dtype='float32', seed=0):
    """({path: NumPy array}, {path: shape}) of all parameters."""
    here, rng = found(name), np.random.default_rng(seed)
    shapes = parameter_shapes(getattr(variants, here.method)(**here.arguments).stage(here.stage).model)
    params = {}
    for path, shape in shapes.items():
        centre = 1.0 if path.endswith('scale') else 0.0
        params[path] = np.asarray(centre + 0.2 * rng.standard_normal(shape, np.float32), jnp.dtype(dtype))
    return params, shapes


def write_folder(folder, name, dtype='float32', change=lambda tensors: tensors, max_shard_bytes=1 << 30):
    """Writes the folder; returns its parameters by our paths. `change`: {foreign name: array} -> what is written."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params, shapes = random_params(name, dtype)
    tensors = {key: np.array(x) for key, x in to_foreign(params, shapes, found(name).table)}
    tensors = change(tensors)
    infos = [(key, array.dtype, array.shape) for key, array in tensors.items()]
    write_shards(folder, tensors.items(), infos, max_shard_bytes)
    (folder / 'config.json').write_text(json.dumps(CONFIGS[name]))
    return params
