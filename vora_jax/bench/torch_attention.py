"""torch's attention, to compare with: the only file of this package that imports torch, and imported only with it."""
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention


def masked_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, mask: np.ndarray, dtype: str,
                     platform: str) -> tuple[Callable, Callable, Callable]:
    """(forward, both, computed) of a `bench.sides.Side`.

    Args:
        q, k, v, d_out: f32[B, S, N or K, H], cast to `dtype`.
        mask: bool[B, S, S].
        platform: JAX's name of the device to compare on.

    Raises:
        ValueError: torch has no such device here.
    """
    device = {'cpu': 'cpu', 'gpu': 'cuda', 'cuda': 'cuda'}.get(platform)
    if device is None or (device == 'cuda' and not torch.cuda.is_available()):
        raise ValueError(f'this torch does not run on the {platform}')
    q, k, v, d_out = (torch.from_numpy(x).to(device, getattr(torch, dtype)).transpose(1, 2).contiguous()
                      for x in (q, k, v, d_out))
    mask = torch.from_numpy(mask)[:, None].to(device)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def attend():
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def finished(result):
        if device == 'cuda':
            torch.cuda.synchronize()
        return result

    def forward():
        with torch.no_grad():
            return finished(attend())

    def both():
        out = attend()
        return finished((out, *torch.autograd.grad(out, inputs, d_out)))

    return forward, both, lambda out: out.detach().float().cpu().transpose(1, 2).numpy()
