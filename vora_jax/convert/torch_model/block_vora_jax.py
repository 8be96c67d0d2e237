"""The transformer block of decoder and vision encoder."""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

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


class Slots(NamedTuple):
    """What every layer knows about its slots.

    visible: bool[B, 1, T, S] the keys each query sees; None: all.
    angles: (cos, sin), each f32[B, 1, T, head_dim / 2]; None without rotary positions.
    is_image: bool[B, T, 1] slots that hold a patch; None where no adapter asks.
    """

    visible: torch.Tensor | None = None
    angles: tuple | None = None
    is_image: torch.Tensor | None = None


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


class AdaptedLinear(nn.Linear):
    """A linear layer plus `scale * B(A(x))` of each adapter, on the slots of its scope: all, vision or text."""

    def __init__(self, in_features, out_features, bias, adapters=()):
        super().__init__(in_features, out_features, bias=bias)
        self.adapters = adapters
        if adapters:
            self.lora_A = nn.ModuleList(nn.Linear(in_features, adapter['rank'], bias=False) for adapter in adapters)
            self.lora_B = nn.ModuleList(nn.Linear(adapter['rank'], out_features, bias=False) for adapter in adapters)

    def forward(self, x, is_image=None):
        y = super().forward(x)
        for index, adapter in enumerate(self.adapters):
            low = self.lora_A[index](F.dropout(x, adapter['dropout'], self.training)) * adapter['scale']
            adapted = y + self.lora_B[index](low)
            if adapter['scope'] != 'all':
                adapted = torch.where(is_image if adapter['scope'] == 'vision' else ~is_image, adapted, y)
            y = adapted
        return y


class Attention(nn.Module):
    def __init__(self, shape, layer, biases, adapters):
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

    def forward(self, x, slots, cache=None):
        q, k, v = (linear(x, slots.is_image).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if slots.angles is not None:
            q, k = rotate(q, *slots.angles), rotate(k, *slots.angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (z.repeat_interleave(self.queries_per_key, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=slots.visible)
        return self.o_proj(y.transpose(1, 2).flatten(2), slots.is_image)


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

    def forward(self, x, is_image=None):
        y = self.up_proj(x, is_image)
        y = F.silu(self.gate_proj(x, is_image)) * y if self.activation is None else self.activation(y)
        return self.down_proj(y, is_image)


class Block(nn.Module):
    """Norm, attention, norm, MLP; each branch is added to its input. x: [B, T, width]."""

    def __init__(self, shape, layer, biases=(), adapters=None):
        super().__init__()
        self.input_layernorm = make_norm(shape.norm, shape.width, shape.norm_eps)
        self.self_attn = Attention(shape, layer, biases, adapters or {})
        self.post_attention_layernorm = make_norm(shape.norm, shape.width, shape.norm_eps)
        self.mlp = MLP(shape, biases, adapters or {})
        self.attention_scale, self.mlp_scale = (
            nn.Parameter(torch.ones(shape.width)) if shape.layer_scale else 1.0 for _ in range(2))

    def forward(self, x, slots, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), slots, cache) * self.attention_scale
        return x + self.mlp(self.post_attention_layernorm(x), slots.is_image) * self.mlp_scale
