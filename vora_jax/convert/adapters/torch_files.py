"""Tensors in files of torch."""
import pathlib
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vora_jax.types import UserError


class _Settings:
    """Stands for the `argparse.Namespace` that training scripts save beside their tensors; never read."""


def read_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: array} of a file that `torch.save` wrote: a dict of tensors, or one that holds such a dict as 'model'.

    Only tensors and plain values are unpickled, so a file cannot run code.

    Raises:
        UserError: torch is missing; the file cannot be read, holds other things, or no tensors.
    """
    torch = import_torch()
    try:
        with torch.serialization.safe_globals([(_Settings, 'argparse.Namespace')]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about the pickle's version
            content = torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        refused = next((line.strip() for line in str(error).splitlines() if 'nsupported' in line or 'GLOBAL' in line), '')
        raise UserError(f'{file} is not loaded, because it is damaged or holds more than tensors and plain values, which '
                        f'could run code{refused and f" ({refused})"}; save its dict of tensors alone.') from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f'{file} cannot be read ({reason}); give a file that torch.save wrote.') from error
    tensors = content.get('model', content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()):
        raise UserError(f'{file} holds no dict of tensors; give the file of weights that the training script wrote.')
    return {name: _array(torch, name, value, file) for name, value in tensors.items()}


def write_torch(file: pathlib.Path, tensors: Mapping[str, np.ndarray], key: str = '') -> None:
    """Writes {name: tensor}, or {key: {name: tensor}}, with `torch.save`. UserError where torch is missing."""
    torch = import_torch()
    content: dict[str, Any] = {}
    for name, array in tensors.items():
        array = np.array(array)  # own memory: torch shares it, and saves what lies behind it
        if array.dtype == ml_dtypes.bfloat16:
            content[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            content[name] = torch.from_numpy(array)
    torch.save({key: content} if key else content, file)


def import_torch() -> Any:
    """The module. UserError where it is not installed."""
    try:
        import torch  # an extra, so not at the top
    except ImportError:
        raise UserError('this adapter file is one of torch\'s, which is not installed; install it with '
                        "pip install 'vora_jax[torch]'.") from None
    return torch


def _array(torch: Any, name: str, tensor: Any, file: pathlib.Path) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.is_quantized or tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.itemsize < 2:
        raise UserError(f'{file}: {name} is of dtype {str(tensor.dtype).removeprefix("torch.")}; adapters are float16, '
                        'bfloat16 or float32.')
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy().astype(np.float32) if tensor.dtype == torch.float64 else tensor.numpy()
