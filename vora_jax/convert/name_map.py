"""Our parameter paths and Hugging Face's names.

One table, read in both directions. The decoder has Qwen2's names; adapters are PEFT-like (`q_proj.lora_A.0.weight`); the
front end has the names of VoRA's own checkpoints (`vision_embedding.*`).
"""
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from vora_jax.nn.block import LINEARS
from vora_jax.types import Array, UserError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # our parameter path -> shape, layers stacked


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor lies in memory on the two sides.

    export: our array -> theirs.    restore: (their array, our shape) -> ours.    shape: our shape -> theirs.
    """

    export: Callable[[Array], Array]
    restore: Callable[[Array, Shape], Array]
    shape: Callable[[Shape], Shape]


def _patch_side(patch_dim: int) -> int:
    return round((patch_dim // 3) ** 0.5)


SAME = Layout(lambda x: x, lambda x, _: x, lambda shape: shape)
# Kernels: ours [in, out], theirs [out, in].
TRANSPOSED = Layout(lambda x: x.T, lambda x, _: x.T, lambda shape: shape[::-1])
# Patch kernel: ours [p * p * 3, C] in (row, column, channel) order, theirs [C, 3, p, p] as a convolution.
CONVOLUTION = Layout(
    lambda x: x.reshape(_patch_side(len(x)), _patch_side(len(x)), 3, -1).transpose(3, 2, 0, 1),
    lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
    lambda shape: (shape[1], 3, _patch_side(shape[0]), _patch_side(shape[0])))
# Position table: ours [R, K, C], theirs [1, R * K, C].
TABLE = Layout(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x, shape: x.reshape(shape),
               lambda shape: (1, shape[0] * shape[1], shape[2]))

# Path, foreign name, layout. `#` is the number of an adapter.
OUTER = (
    ('decoder/embedding', 'model.embed_tokens.weight', SAME),
    ('decoder/lm_head', 'lm_head.weight', TRANSPOSED),
    ('decoder/norm/scale', 'model.norm.weight', SAME),
    ('frontend/patch_embed/kernel', 'vision_embedding.patchifier.proj.weight', CONVOLUTION),
    ('frontend/patch_embed/bias', 'vision_embedding.patchifier.proj.bias', SAME),
    ('frontend/patch_embed/norm/scale', 'vision_embedding.patchifier.norm.weight', SAME),
    ('frontend/patch_embed/positions', 'vision_embedding.pos_embed', TABLE),
    ('frontend/out_proj', 'vision_embedding.out_proj.weight', TRANSPOSED),
)
# Under decoder/layers/group_i/block/ here and model.layers.j. there.
BLOCK = (
    ('attention_norm/scale', 'input_layernorm.weight', SAME),
    ('mlp_norm/scale', 'post_attention_layernorm.weight', SAME),
    *(row for linear in LINEARS for module in ['self_attn' if linear[0] in 'qkvo' else 'mlp'] for row in (
        (f'{linear}/kernel', f'{module}.{linear}.weight', TRANSPOSED),
        (f'{linear}/bias', f'{module}.{linear}.bias', SAME),
        (f'{linear}/adapter_#/a', f'{module}.{linear}.lora_A.#.weight', TRANSPOSED),
        (f'{linear}/adapter_#/b', f'{module}.{linear}.lora_B.#.weight', TRANSPOSED))),
)
_GROUP = re.compile(r'decoder/layers/group_(\d+)/block/(.*)')
_NUMBER = re.compile(r'adapter_(\d+)')


@dataclasses.dataclass(frozen=True)
class Entry:
    """One foreign tensor.

    path: our parameter.    layer: index into its stacked first axis; None where it is not stacked.
    name: theirs.    ours: shape of our (one layer's) array.    layout: how the two relate.
    """

    path: str
    layer: int | None
    name: str
    ours: Shape
    layout: Layout

    @property
    def shape(self) -> Shape:
        """The foreign tensor's shape."""
        return self.layout.shape(self.ours)


def entries(shapes: Shapes) -> list[Entry]:
    """All foreign tensors of a model with these parameters, in our order; each layer of a stack is one.

    Raises:
        UserError: parameters that have no foreign name.
    """
    outer = {path: row for path, *row in OUTER}
    block = {path: row for path, *row in BLOCK}
    first_layer = _first_layers(shapes)
    found, unknown = [], []
    for path, shape in shapes.items():
        match = _GROUP.fullmatch(path)
        number = _NUMBER.search(path)
        key = _NUMBER.sub('adapter_#', match[2] if match else path)
        name, layout = (block if match else outer).get(key, (None, None))
        if name is None:
            unknown.append(path)
            continue
        name = name.replace('#', number[1] if number else '#')
        if match is None:
            found.append(Entry(path, None, name, shape, layout))
            continue
        start = first_layer[int(match[1])]
        found += [Entry(path, layer, f'model.layers.{start + layer}.{name}', shape[1:], layout)
                  for layer in range(shape[0])]
    if unknown:
        raise UserError(f'these parameters have no name in a Hugging Face folder: {name_list(unknown)}.')
    return found


def to_foreign(params: Mapping[str, Array], shapes: Shapes,
               dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, C-contiguous array) of every foreign tensor, one at a time.

    Args:
        params: our flat parameters.
        shapes: what the model expects; every parameter is used, and every expected one is there.
        dtype: of the result; None keeps that of `params`.

    Raises:
        UserError: lists missing, unexpected and misshapen parameters.
    """
    check(shapes, {path: leaf.shape for path, leaf in params.items()}, 'the checkpoint')
    for entry in entries(shapes):
        leaf = params[entry.path]
        # The layout changes in JAX, which transposes faster than NumPy; safetensors needs contiguous arrays.
        piece = jnp.asarray(leaf if entry.layer is None else leaf[entry.layer])
        yield entry.name, np.ascontiguousarray(np.asarray(entry.layout.export(piece.astype(dtype or piece.dtype))))


def from_foreign(tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, np.ndarray]:
    """Our flat parameters, layers stacked again; every tensor is used exactly once and every parameter filled.

    Raises:
        UserError: lists missing, unexpected and misshapen tensors.
    """
    table = entries(shapes)
    check({entry.name: entry.shape for entry in table}, {name: x.shape for name, x in tensors.items()}, 'the folder')
    params: dict[str, list[np.ndarray]] = {}
    for entry in table:
        array = entry.layout.restore(np.asarray(tensors[entry.name]), entry.ours)
        params.setdefault(entry.path, []).append(array)
    stacked = {entry.path for entry in table if entry.layer is not None}
    return {path: np.stack(parts) if path in stacked else np.ascontiguousarray(parts[0])
            for path, parts in params.items()}


def check(expected: Shapes, given: Shapes, where: str) -> None:
    """UserError naming what is missing from, unexpected in or of another shape in `given`; None where all is right."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    misshapen = [f'{name} ({list(given[name])} instead of {list(shape)})' for name, shape in expected.items()
                 if name in given and tuple(given[name]) != tuple(shape)]
    problems = [f'{kind} {name_list(names)}' for kind, names in (
        ('misses', missing), ('has unexpected', unexpected), ('has other shapes of', misshapen)) if names]
    if problems:
        raise UserError(f'{where} does not fit the model: it {"; it ".join(problems)}.')


def _first_layers(shapes: Shapes) -> dict[int, int]:
    """{group: its first layer}, from the stacked shapes."""
    sizes = {int(match[1]): shape[0] for path, shape in shapes.items() if (match := _GROUP.fullmatch(path))}
    first, starts = 0, {}
    for group in sorted(sizes):
        starts[group] = first
        first += sizes[group]
    return starts


def name_list(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
