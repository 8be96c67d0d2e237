"""Pictures to vectors: patch embedding and encoder.

Pictures of one size run together, so there is no padding and no mask here.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .adapters_vora_jax import Slots
from .block_vora_jax import ACTIVATIONS, Block, BlockShape, RMSNorm, make_norm


class PatchEmbedding(nn.Module):
    """Patches of bytes to vectors: linear, norm, position, and where `out_width` is given one more linear."""

    def __init__(self, settings, out_width=None):
        super().__init__()
        self.settings, width, size = settings, settings['width'], settings['patch_size']
        self.patchifier = nn.ModuleDict({'proj': nn.Conv2d(3, width, size, stride=size, bias=settings['bias'])})
        if settings['norm']:
            self.patchifier['norm'] = RMSNorm(width, settings['norm_eps'])
        if settings['positions'] != 'sincos':
            self.pos_embed = nn.Parameter(torch.zeros(1, settings['table_rows'] * settings['table_cols'], width))
        if settings['cls_token']:
            self.cls_token, self.cls_position = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        if settings['mask_token']:  # of DINOv2's training; nothing here reads it
            self.mask_token = nn.Parameter(torch.zeros(width))
        if out_width is not None:
            self.out_proj = nn.Linear(width, out_width, bias=False)

    def forward(self, pixels, rows, cols):
        """[n, rows * cols, width] of n pictures.

        pixels: [n, rows * cols, patch_dim], each patch in (row, column, channel) order; bytes are normalised here,
        floats are normalised already.
        """
        size, kernel = self.settings['patch_size'], self.patchifier['proj'].weight
        pixels = pixels.unflatten(-1, (size, size, 3))
        if pixels.dtype == torch.uint8:
            mean, std = (torch.tensor(self.settings[name], device=pixels.device) for name in ('mean', 'std'))
            pixels = (pixels.float() / 255.0 - mean) / std
        # The convolution as the matrix product it is: kernels for convolutions do not expect one output a patch.
        x = pixels.movedim(-1, 2).flatten(2).to(kernel.dtype)
        x = F.linear(x, kernel.flatten(1), self.patchifier['proj'].bias)
        if self.settings['norm']:
            x = self.patchifier['norm'](x)
        x = x + self.positions(rows, cols, x.device).to(x.dtype)
        return self.out_proj(x) if hasattr(self, 'out_proj') else x

    def positions(self, rows, cols, device):
        """f32[rows * cols, width]: the position table, brought to this grid."""
        kind, table = self.settings['positions'], (self.settings['table_rows'], self.settings['table_cols'])
        if kind == 'sincos':
            return sincos_positions(rows, cols, self.settings['width'], device)
        if (rows, cols) == table or kind == 'first_rows' and rows * cols <= table[0] * table[1]:
            return self.pos_embed[0, :rows * cols].float()  # 'first_rows' is a quirk of VoRA's checkpoints
        grid = self.pos_embed.float().unflatten(1, table).movedim(-1, 1)
        mode = 'bicubic' if kind == 'bicubic' else 'bilinear'
        return F.interpolate(grid, size=(rows, cols), mode=mode, align_corners=False)[0].flatten(1).T


def sincos_positions(rows, cols, width, device):
    """f32[rows * cols, width]: [sin(col), cos(col), sin(row), cos(row)], a quarter of the width each."""
    exponents = torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4)
    frequencies = (1.0 / 10000.0 ** exponents).float()
    row, col = torch.meshgrid(torch.arange(rows, device=device), torch.arange(cols, device=device), indexing='ij')
    angles = [place.flatten().float()[:, None] * frequencies for place in (col, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1)


class Features(NamedTuple):
    """Of n pictures; what lies before the first patch is the [cls] token.

    output: [n, P, width] the last block's output, normed.    blocks: every block's output.
    pooled: [n, width] one vector for each picture; None where the encoder has no such head.
    """

    output: torch.Tensor
    blocks: list
    pooled: torch.Tensor | None


class VisionTransformer(nn.Module):
    """A pre-norm ViT. vision: the configuration's 'patch_embed' and 'encoder'; with_cls: pictures get a [cls] token."""

    def __init__(self, vision, with_cls):
        super().__init__()
        encoder, width, self.with_cls = vision['encoder'], vision['patch_embed']['width'], with_cls
        shape = BlockShape(width, encoder['mlp_width'], encoder['num_heads'], encoder['num_heads'],
                           width // encoder['num_heads'], encoder['norm_eps'], encoder['norm'], encoder['activation'],
                           layer_scale=encoder['layer_scale'])
        self.embeddings = PatchEmbedding(vision['patch_embed'])
        self.pre_norm = make_norm(shape.norm, width, shape.norm_eps) if encoder['pre_norm'] else nn.Identity()
        self.layers = nn.ModuleList(Block(shape, layer, encoder['biases'], mixtures=vision['mixtures'])
                                    for layer in range(encoder['num_layers']))
        self.norm = make_norm(shape.norm, width, shape.norm_eps)
        self.pool = None if encoder['pool'] == 'none' else AttentionPool(encoder['pool'], shape)

    def forward(self, pixels, rows, cols):
        """`Features`; pixels as in PatchEmbedding."""
        x = self.embeddings(pixels, rows, cols)
        if self.with_cls:
            cls = self.embeddings.cls_token + self.embeddings.cls_position
            x = torch.cat([cls.expand(len(x), 1, -1), x], dim=1)
        x, blocks = self.pre_norm(x), []
        slots = Slots(route_slot=torch.zeros(len(x), dtype=torch.long, device=x.device))  # [cls], where there is one
        for block in self.layers:
            x = block(x, slots)
            blocks.append(x)
        output = self.norm(x)
        return Features(output, blocks, self.pool(output) if self.pool is not None else None)


class AttentionPool(nn.Module):
    """A learned query attends to a picture (AIMv2); 'attention_mlp' projects it first and adds an MLP (SigLIP)."""

    def __init__(self, kind, shape):
        super().__init__()
        width, with_mlp = shape.width, kind == 'attention_mlp'
        self.head_dim, self.activation = shape.head_dim, ACTIVATIONS[shape.activation] if with_mlp else None
        self.probe = nn.Parameter(torch.zeros(width))
        self.q_proj = nn.Linear(width, width) if with_mlp else nn.Identity()
        self.k_proj, self.v_proj = (nn.Linear(width, width, bias=with_mlp) for _ in 'kv')
        self.o_proj = nn.Linear(width, width)
        if with_mlp:
            self.mlp_norm = make_norm(shape.norm, width, shape.norm_eps)
            self.up_proj, self.down_proj = nn.Linear(width, shape.mlp_width), nn.Linear(shape.mlp_width, width)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for z in (
            self.q_proj(self.probe.expand(len(x), 1, -1)), self.k_proj(x), self.v_proj(x)))
        out = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.activation is not None:
            out = out + self.down_proj(self.activation(self.up_proj(self.mlp_norm(out))))
        return out[:, 0]


class CueEnhancer(nn.Module):
    """`norm(f + deformable_attention(norm(f), levels))`: each patch of level f looks at learned places of all levels."""

    def __init__(self, settings, num_levels, width):
        super().__init__()
        self.settings = settings
        self.shape = settings['num_heads'], num_levels, settings['num_points']  # of each patch's places
        self.norm_query, self.norm_levels = (nn.LayerNorm(width, settings['norm_eps']) for _ in range(2))
        if settings['final_norm']:
            self.norm_out = nn.LayerNorm(width, settings['norm_eps'])
        self.value_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.offset_proj = nn.Linear(width, 2 * math.prod(self.shape))
        self.weight_proj = nn.Linear(width, math.prod(self.shape))

    def forward(self, levels, rows, cols):
        """[n, rows * cols, width] of n pictures' levels, each [n, rows * cols, width]."""
        anchor, heads = levels[self.settings['anchor']], self.shape[0]
        query = self.norm_query(anchor)
        # In float32: places of a few patches would lose their fractions in half precision.
        weights, offsets = (F.linear(query.float(), linear.weight.float(), linear.bias.float())
                            for linear in (self.weight_proj, self.offset_proj))
        weights = weights.unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, self.shape[1:])
        offsets = offsets.unflatten(-1, (*self.shape, 2))
        row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing='ij')
        centre = torch.stack([col, row], dim=-1).flatten(0, 1).to(offsets) + 0.5
        places = (centre[:, None, None, None] + offsets) / centre.new_tensor([cols, rows]) * 2 - 1  # from -1 to 1
        total = 0
        for index, level in enumerate(levels):
            values = self.value_proj(self.norm_levels(level)).float().transpose(1, 2)
            values = values.unflatten(1, (heads, -1)).flatten(0, 1).unflatten(-1, (rows, cols))  # [n * heads, H, rows, cols]
            at, weight = (x[:, :, :, index].transpose(1, 2).flatten(0, 1) for x in (places, weights))
            found = F.grid_sample(values, at, align_corners=False)  # [n * heads, H, rows * cols, points]
            total = total + (found * weight[:, None]).sum(-1)
        x = anchor + self.out_proj(total.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2).to(anchor.dtype))
        return self.norm_out(x) if self.settings['final_norm'] else x


def window_means(x, rows, cols, side):
    """[n, Q, C]: means of x [n, rows * cols, C] over windows of `side x side` patches; at the edge over what is there."""
    grid = x.transpose(1, 2).unflatten(2, (rows, cols))
    return F.avg_pool2d(grid, side, ceil_mode=True).flatten(2).transpose(1, 2)


class Projector(nn.ModuleList):
    """Linears with an activation in between, to the language model's width."""

    def __init__(self, settings, in_width, out_width):
        count, inner = settings['num_layers'], settings['hidden_width'] or out_width
        widths = [in_width, *[inner] * (count - 1), out_width]
        super().__init__(nn.Linear(*widths[layer:layer + 2], bias=settings['bias']) for layer in range(count))
        self.activation = F.silu if settings['activation'] == 'silu' else F.gelu

    def forward(self, x):
        for layer, linear in enumerate(self):
            x = linear(self.activation(x) if layer else x)
        return x
