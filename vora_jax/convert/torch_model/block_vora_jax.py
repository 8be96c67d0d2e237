"""The transformer block of decoder and vision encoder."""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .adapters_vora_jax import AdaptedLinear, ModalityMixture

ACTIVATIONS = {
    'gelu': F.gelu,
    'gelu_tanh': functools.partial(F.gelu, approximate='tanh'),
    'gelu_quick': lambda x: x * torch.sigmoid(1.702 * x),
}


class BlockShape(NamedTuple):
    """Sizes of a block, and the choices in which families of models differ.

    norm: 'rms' or 'layer'.    activation: 'silu_gated', or one of ACTIVATIONS without a gate.
    qk_norm: an RMSNorm on each query and key head.    layer_scale: a learned factor for each channel of both branches.
    """

    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    norm: str = 'rms'
    activation: str = 'silu_gated'
    qk_norm: bool = False
    layer_scale: bool = False


class RMSNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weight


def make_norm(kind, width, epsilon):
    return RMSNorm(width, epsilon) if kind == 'rms' else nn.LayerNorm(width, epsilon)


class Attention(nn.Module):
    """Attention of queries x: [B, T, width] to the keys that `Slots` and cache give.

    num_prompts: learned inputs of its keys and values, to which each head attends besides, behind a gate of its own.
    """

    def __init__(self, shape, layer, biases, adapters, num_prompts=0):
        super().__init__()
        self.layer, self.head_dim = layer, shape.head_dim
        self.queries_per_key = shape.num_heads // shape.num_kv_heads

        def linear(name, inputs, outputs):
            return AdaptedLinear(inputs, outputs, name in biases, adapters.get(name, ()))

        width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = linear('q_proj', shape.width, width)
        self.k_proj = linear('k_proj', shape.width, kv_width)
        self.v_proj = linear('v_proj', shape.width, kv_width)
        self.o_proj = linear('o_proj', width, shape.width)
        self.q_norm, self.k_norm = (RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
                                    for _ in 'qk')
        self.num_prompts = num_prompts
        if num_prompts:
            self.prompts = nn.Parameter(torch.zeros(num_prompts, shape.width))
            self.prompt_gate = nn.Parameter(torch.zeros(shape.num_heads))

    def forward(self, x, slots, cache=None):
        q, k, v = (linear(x, slots.scopes).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if slots.angles is not None:
            q, k = rotate(q, *slots.angles), rotate(k, *slots.angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (z.repeat_interleave(self.queries_per_key, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=slots.visible)
        if self.num_prompts:
            y = y + self.prompt_gate.tanh()[:, None, None] * self.attend_prompts(q)
        return self.o_proj(y.transpose(1, 2).flatten(2), slots.scopes)

    def attend_prompts(self, q):
        """[B, heads, T, head_dim]: the prompts are words to adapters, and stand at no position."""
        every = torch.arange(self.num_prompts, device=q.device)
        scopes = {'vision': (every[:0], every[:0]), 'text': (every * 0, every)}
        k, v = (linear(self.prompts[None], scopes).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for linear in (self.k_proj, self.v_proj))
        k, v = (z.repeat_interleave(self.queries_per_key, dim=1).expand(len(q), -1, -1, -1) for z in (self.k_norm(k), v))
        return F.scaled_dot_product_attention(q, k, v)


def rotate(x, cos, sin):
    """Rotary positions on x [B, heads, T, head_dim]; pairs are (i, i + head_dim / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, shape, biases, adapters):
        super().__init__()
        self.activation = ACTIVATIONS.get(shape.activation)

        def linear(name, inputs, outputs):
            return AdaptedLinear(inputs, outputs, name in biases, adapters.get(name, ()))

        if self.activation is None:
            self.gate_proj = linear('gate_proj', shape.width, shape.mlp_width)
        self.up_proj = linear('up_proj', shape.width, shape.mlp_width)
        self.down_proj = linear('down_proj', shape.mlp_width, shape.width)

    def forward(self, x, scopes=None):
        y = self.up_proj(x, scopes)
        y = F.silu(self.gate_proj(x, scopes)) * y if self.activation is None else self.activation(y)
        return self.down_proj(y, scopes)


class Block(nn.Module):
    """Norm, attention, norm, MLP; each branch is added to its input. x: [B, T, width].

    mixtures: {'attention' or 'mlp': settings of a `ModalityMixture` of what that branch reads}.
    """

    def __init__(self, shape, layer, biases=(), adapters=None, mixtures=None, num_prompts=0):
        super().__init__()
        self.input_layernorm = make_norm(shape.norm, shape.width, shape.norm_eps)
        self.self_attn = Attention(shape, layer, biases, adapters or {}, num_prompts)
        self.post_attention_layernorm = make_norm(shape.norm, shape.width, shape.norm_eps)
        self.mlp = MLP(shape, biases, adapters or {})
        self.attention_scale, self.mlp_scale = (
            nn.Parameter(torch.ones(shape.width)) if shape.layer_scale else 1.0 for _ in range(2))
        self.sites = tuple(mixtures or ())
        for site in self.sites:
            self.add_module(f'adapter_{site}', ModalityMixture(shape.width, (layer, site), mixtures[site]))

    def forward(self, x, slots, cache=None):
        y = self.mixed(self.input_layernorm(x), 'attention', slots)
        x = x + self.self_attn(y, slots, cache) * self.attention_scale
        y = self.mixed(self.post_attention_layernorm(x), 'mlp', slots)
        return x + self.mlp(y, slots.scopes) * self.mlp_scale

    def mixed(self, y, site, slots):
        return getattr(self, f'adapter_{site}')(y, slots) if site in self.sites else y
