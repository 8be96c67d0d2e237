"""Exported adapter files against their checkpoint."""
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vora_jax.convert.adapters.formats import adapted
from vora_jax.convert.adapters.read import read_adapters
from vora_jax.convert.names.mismatch import name_list
from vora_jax.convert.verify.tensors import Comparison
from vora_jax.params import flatten
from vora_jax.types import Params, UserError


def compare_adapters(params: Params, model: Any, folder: pathlib.Path, record: Mapping[str, Any]) -> Comparison:
    """Reads the folder as `vora import` does; every parameter must be the checkpoint's, bit for bit.

    Args:
        params, model: the checkpoint.
        record: of the export, with its method and what that trains.
    """
    found, flat = Comparison(record['layout'], record['dtype']), flatten(params)
    try:
        given = read_adapters(folder, adapted(record['method'], model, record['trainable'], 'verify'))
    except UserError as error:
        found.problems.append(str(error))
        return found
    found.tensors, different = given.num_tensors, []
    for path, theirs in given.params.items():
        ours = None if path not in flat else np.asarray(flat[path]).astype(jnp.dtype(record['dtype']))
        if ours is not None and (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes()):
            continue
        different.append(path)
        size = float('inf')
        if ours is not None and ours.shape == theirs.shape:
            size = float(np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)), initial=0.0))
        if not found.worst_tensor or size > found.max_abs_tensor_diff:
            found.worst_tensor, found.max_abs_tensor_diff = path, size
    if different:
        found.problems.append(f'parameters that differ ({len(different)}): {name_list(different)}')
    if given.absent:
        found.problems.append(f'parameters that are not in the folder ({len(given.absent)}): {name_list(given.absent)}')
    found.left_out.append('logits were not compared: the files hold adapters only, and no code')
    return found
