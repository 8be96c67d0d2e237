"""Adapters of linears, and mixtures routed by modality."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Slots(NamedTuple):
    """What every layer knows about its slots.

    visible: bool[B, 1, T, S] the keys each query sees; None: all.
    angles: (cos, sin), each f32[B, 1, T, head_dim / 2]; None without rotary positions.
    scopes: {'vision' or 'text': (rows, slots) as `nonzero` gives them}, of slots that hold a picture's vector, or a token;
        None where no adapter asks.
    route_slot: i64[B] the slot that routes its row; None: each slot routes itself.
    routes: {(layer, site): f32[B, 1, E]} what that slot gave; filled where the row begins, read when it is continued.
    """

    visible: torch.Tensor | None = None
    angles: tuple | None = None
    scopes: dict | None = None
    route_slot: torch.Tensor | None = None
    routes: dict | None = None


class AdaptedLinear(nn.Linear):
    """A linear layer whose output each adapter changes in turn, on the slots of its scope: all, vision or text.

    adapters: [{'kind', 'scope', and its numbers}]. Of the kinds, 'low_rank' adds `scale * B(A(x))`, 'dual_low_rank'
    `scale * B(layer_norm(A(x)) * relu(T(x)))`, and 'modality_kernel' is a kernel and bias of its own.
    """

    def __init__(self, in_features, out_features, bias, adapters=()):
        super().__init__(in_features, out_features, bias=bias)
        self.adapters = adapters
        for index, adapter in enumerate(adapters):
            for name, part in self.make_parts(adapter).items():
                if name not in self._modules:
                    self.add_module(name, nn.ModuleDict())
                self.get_submodule(name)[str(index)] = part

    def make_parts(self, adapter):
        """{name: module} of an adapter."""
        if adapter['kind'] == 'modality_kernel':
            return {'modality_proj': nn.Linear(self.in_features, self.out_features, self.bias is not None)}
        parts = {'lora_A': nn.Linear(self.in_features, adapter['rank'], bias=False),
                 'lora_B': nn.Linear(adapter['rank'], self.out_features, bias=False)}
        if adapter['kind'] == 'dual_low_rank':
            parts['lora_T'] = nn.Linear(self.in_features, adapter['rank'], bias=False)
            parts['lora_layer_norm'] = nn.LayerNorm(adapter['rank'], adapter['norm_eps'])
        return parts

    def forward(self, x, scopes=None):
        y = super().forward(x)
        for index, adapter in enumerate(self.adapters):
            if adapter['scope'] == 'all':
                y = self.changed(str(index), adapter, x, y)
                continue
            here = scopes[adapter['scope']]
            if len(here[0]) or self.training:  # so that every weight has a gradient in every batch
                y = y.index_put(here, self.changed(str(index), adapter, x[here], y[here]))
        return y

    def changed(self, index, adapter, x, y):
        """What an adapter makes of the outputs y of inputs x."""
        if adapter['kind'] == 'modality_kernel':
            return self.modality_proj[index](x)
        low = self.lora_A[index](F.dropout(x, adapter['dropout'], self.training))
        if adapter['kind'] == 'dual_low_rank':  # no dropout before T
            low = self.lora_layer_norm[index](low) * F.relu(self.lora_T[index](x))
        return y + self.lora_B[index](low * adapter['scale'])


class GroupedLinear(nn.Module):
    """Each group of outputs reads its own group of inputs; weight: [groups, inputs, outputs]."""

    def __init__(self, num_groups, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_groups, in_features // num_groups, out_features // num_groups))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        groups = x.unflatten(-1, (len(self.weight), -1))
        return torch.einsum('...gr,grc->...gc', groups, self.weight).flatten(-2) + self.bias


class ModalityMixture(nn.Module):
    """`z + scale * sum_e w_e * up_e(down(z))`, w a softmax that the routing slot gives.

    settings: rank, num_groups, scale, temperature, dropout, num_experts and route_by: 'slot' (`Slots.route_slot`) or 'own';
    'first_row' is 'own' here: what training reads in the first example of a batch, a prompt by itself reads in itself.
    """

    def __init__(self, width, place, settings):
        super().__init__()
        self.place, self.settings = place, settings
        self.down = nn.Linear(width, settings['rank'])
        self.up = nn.ModuleList(GroupedLinear(settings['num_groups'], settings['rank'], width)
                                for _ in range(settings['num_experts']))
        if settings['num_experts'] > 1:
            self.router = nn.Linear(width, settings['num_experts'])

    def forward(self, z, slots):
        inner = F.dropout(self.down(z), self.settings['dropout'], self.training)
        if len(self.up) == 1:
            return z + self.settings['scale'] * self.up[0](inner)
        weights = self.route(z, slots).to(z.dtype)
        paths = torch.stack([up(inner) for up in self.up], dim=-1)
        return z + self.settings['scale'] * (paths * weights[..., None, :]).sum(-1)

    def route(self, z, slots):
        """f32[B, T or 1, E]: the weight of each path."""
        if self.settings['route_by'] != 'slot' or slots.route_slot is None:
            return self.weigh(z)
        if slots.routes is not None and self.place in slots.routes:
            return slots.routes[self.place]
        weights = self.weigh(z[torch.arange(len(z), device=z.device), slots.route_slot][:, None])
        if slots.routes is not None:
            slots.routes[self.place] = weights
        return weights

    def weigh(self, z):
        logits = F.linear(z.float(), self.router.weight.float(), self.router.bias.float())
        return (logits / self.settings['temperature']).softmax(-1)
