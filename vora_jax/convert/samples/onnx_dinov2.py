"""A DINOv2-shaped ViT in an ONNX graph."""
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from vora_jax.convert.samples.foreign_model import ForeignModel, check_names
from vora_jax.types import UserError

_POSITIONS, _MASK = 'embeddings.position_embeddings', 'embeddings.mask_token'
_PATCHES = 'embeddings.patch_embeddings.projection.weight'
_LINEARS = ('attention.attention.query', 'attention.attention.key', 'attention.attention.value',
            'attention.output.dense', 'mlp.fc1', 'mlp.fc2')
_PARTS = tuple(f'{name}.{kind}' for name in ('norm1', 'norm2', *_LINEARS) for kind in ('weight', 'bias'))

# What its training resized and normalised pictures to, in the words of transformers.
PREPROCESSOR = {
    'image_processor_type': 'BitImageProcessor', 'do_convert_rgb': True,
    'do_resize': True, 'size': {'shortest_edge': 256}, 'resample': 3,  # bicubic
    'do_center_crop': True, 'crop_size': {'height': 224, 'width': 224},
    'do_rescale': True, 'rescale_factor': 1 / 255,
    'do_normalize': True, 'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}


def read_dinov2(path: str, prefix: str = 'backbone', head_dim: int = 64) -> ForeignModel:
    """The ViT of a graph that PyTorch exported from `transformers`, as a Hugging Face folder's content in float32.

    The exporter keeps the names of biases, norms and layer scales. It transposes linear kernels and names them after
    the node that uses them, and it cuts the position table in two: [cls], which a Concat uses, and the grid, which a
    Reshape uses. The mask token, which only pre-training needs, is in no graph: it is zeros here.

    Args:
        path: the ONNX file; all of it is read into memory.
        prefix: of the ViT's names in the graph; what has another is left out.
        head_dim: width of an attention head, which no initialiser tells; 64 in every DINOv2.

    Raises:
        UserError: the file is no ONNX graph, or holds no such ViT.
        ModuleNotFoundError: the `onnx` package is not installed.
    """
    from onnx.numpy_helper import to_array  # late: an extra, and only this needs it

    graph = _load(path).graph
    given = {tensor.name: tensor for tensor in graph.initializer}
    kept = {name.removeprefix(f'{prefix}.'): name for name in given if name.startswith(f'{prefix}.')}
    kernels, tables = _anonymous(graph, given, prefix)
    found = {*kept, *kernels, _MASK, *([_POSITIONS] if len(tables) == 2 else [])}
    if _PATCHES not in kept or len(tables) != 2:
        raise UserError(f'{path} holds no ViT under {prefix!r}: its patch projection or position table is missing.')
    config = _config({name: tuple(given[source].dims) for name, source in kept.items()},
                     tuple(given[tables['grid']].dims), head_dim, path)
    names = tensor_names(config)
    check_names(path, names, found)

    def read(name: str) -> np.ndarray:
        if name == _MASK:
            array = np.zeros((1, config['hidden_size']))
        elif name == _POSITIONS:
            array = np.concatenate([to_array(given[tables[part]]) for part in ('cls', 'grid')], axis=1)
        elif name in kernels:
            array = to_array(given[kernels[name]]).T
        else:
            array = to_array(given[kept[name]])
        return np.ascontiguousarray(array, np.float32)

    def shape(name: str) -> tuple[int, ...]:
        if name == _MASK:
            return 1, config['hidden_size']
        if name == _POSITIONS:
            _, num_patches, width = given[tables['grid']].dims
            return 1, 1 + num_patches, width
        return tuple(reversed(given[kernels[name]].dims)) if name in kernels else tuple(given[kept[name]].dims)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        return ((name, read(name)) for name in names)

    infos = [(name, np.dtype(np.float32), shape(name)) for name in names]
    return ForeignModel(infos, tensors, {'config.json': config, 'preprocessor_config.json': PREPROCESSOR})


def tensor_names(config: dict[str, Any]) -> list[str]:
    """The tensors of a `Dinov2Model` of this configuration."""
    names = ['embeddings.cls_token', _MASK, _POSITIONS, _PATCHES, 'embeddings.patch_embeddings.projection.bias']
    for layer in range(config['num_hidden_layers']):
        for part in (*_PARTS, 'layer_scale1.lambda1', 'layer_scale2.lambda1'):
            names.append(f'encoder.layer.{layer}.{part}')
    return [*names, 'layernorm.weight', 'layernorm.bias']


def _load(path: str) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # onnx brings it

    if not pathlib.Path(path).is_file():
        raise UserError(f'{path} does not exist; correct the path.')
    try:
        return onnx.load(path)
    except (DecodeError, ValueError, OSError) as error:
        raise UserError(f'{path} is no complete ONNX file ({error}); download it again.') from error


def _anonymous(graph: Any, given: dict[str, Any], prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Initialisers without a name of their own, found by the nodes that use them.

    Returns:
        {Hugging Face name: initialiser} of linear kernels, and {'cls', 'grid': initialiser} of the position table.
    """
    kernels, tables = {}, {}
    for node in graph.node:
        if not node.name.startswith(f'/{prefix}/'):
            continue
        if node.op_type == 'MatMul' and node.input[1] in given:
            *parts, _ = node.name.removeprefix(f'/{prefix}/').split('/')
            kernels['.'.join(parts) + '.weight'] = node.input[1]
        elif node.op_type in ('Concat', 'Reshape') and node.name.startswith(f'/{prefix}/embeddings/'):
            if len(given[node.input[0]].dims if node.input[0] in given else ()) == 3:
                tables['cls' if node.op_type == 'Concat' else 'grid'] = node.input[0]
    return kernels, tables


def _config(shapes: dict[str, tuple[int, ...]], grid: tuple[int, ...], head_dim: int, path: str) -> dict[str, Any]:
    """The content of config.json."""
    width, channels, patch_size, _ = shapes[_PATCHES]
    side = round(grid[1] ** 0.5)
    fc1 = shapes.get('encoder.layer.0.mlp.fc1.bias', (0,))[0]
    if side * side != grid[1] or fc1 % width or not fc1 or width % head_dim:
        raise UserError(f'{path}: a ViT of width {width}, {grid[1]} positions and MLP width {fc1} is no DINOv2.')
    layers = {int(number) for name in shapes for number in re.findall(r'^encoder\.layer\.(\d+)\.', name)}
    return {
        'architectures': ['Dinov2Model'], 'model_type': 'dinov2', 'hidden_size': width,
        'num_hidden_layers': len(layers), 'num_attention_heads': width // head_dim, 'mlp_ratio': fc1 // width,
        'image_size': side * patch_size, 'patch_size': patch_size, 'num_channels': channels, 'hidden_act': 'gelu',
        'layer_norm_eps': 1e-6, 'qkv_bias': True, 'layerscale_value': 1.0, 'use_swiglu_ffn': False,
        'apply_layernorm': True, 'reshape_hidden_states': True, 'initializer_range': 0.02, 'drop_path_rate': 0.0,
        'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0, 'dtype': 'float32'}
