"""What merging and casting did to a model.

The weights are read layer by layer; of the logits, one layer in both dtypes at a time is in memory.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.batch import Batch
from vora_jax.convert.export.exportable import Exportable, folded
from vora_jax.convert.export.foreign_stream import Losses, stream
from vora_jax.convert.export.lazy_arrays import part
from vora_jax.convert.export.plan import Part
from vora_jax.convert.families.own_names import OWN
from vora_jax.nn.block import Block
from vora_jax.nn.norms import RMSNorm
from vora_jax.nn.slots import SlotContext, vision_slots
from vora_jax.nn.stack import LayerGroup
from vora_jax.ops.rope import rope_angles
from vora_jax.params import unflatten
from vora_jax.types import PAD

_COLUMNS = 8192  # of the head at a time


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Numbers on a merge, or on a cast alone.

    num_folded: adapters.    dtype: of the cast (of one to bfloat16, where nothing was cast).
    change, change_at, change_rms: of weights by the adapters; largest, its tensor, root mean square.
    lost, lost_at, lost_rms: of weights by the cast: of adapted kernels, or of all where nothing was folded.
    logits, logits_mean: largest and mean |difference| of logits by the cast, on probe prompts; None: not measured.
    """

    num_folded: int
    dtype: str
    change: float
    change_at: str
    change_rms: float
    lost: float
    lost_at: str
    lost_rms: float
    logits: float | None = None
    logits_mean: float | None = None

    def lines(self) -> list[str]:
        """Sentences for a reader."""
        told = []
        if self.num_folded:
            told.append(f'{self.num_folded} adapters folded; largest change of a weight: {self.change:.3g} '
                        f'({self.change_at}), root mean square {self.change_rms:.3g}')
        part = f', {self.lost_rms / self.change_rms:.2%} of the adapters\' change' if self.change_rms else ''
        told.append(f'rounding weights to {self.dtype} changes them by at most {self.lost:.3g} ({self.lost_at}), root mean '
                    f'square {self.lost_rms:.3g}{part}')
        if self.logits is not None:
            told.append(f'that rounding changes the logits of the probe prompts by at most {self.logits:.3g}, '
                        f'{self.logits_mean:.3g} in the mean')
        return told


def make_report(losses: Losses, logits: tuple[float, float] | None = None) -> MergeReport:
    """The report of a stream that gathered `losses`."""
    return MergeReport(losses.num_folded, losses.dtype, losses.change, losses.change_at,
                       math.sqrt(losses.change_squares / losses.count) if losses.num_folded and losses.count else 0.0,
                       losses.largest, losses.largest_at, math.sqrt(losses.sum_squares / max(1, losses.count)),
                       *(logits or (None, None)))


def merge_report(what: Exportable, dtype: str, probe: Batch | None = None) -> MergeReport:
    """The report of merging an unmerged model in float32 and casting it to `dtype`, without writing anything."""
    what, losses = folded(what), Losses(dtype)
    for _ in stream(Part(OWN, what.params, what.shapes, {}), what.dtype, losses):
        pass
    return make_report(losses, None if probe is None else logit_difference(what, dtype, probe))


def logit_difference(what: Exportable, dtype: str, probe: Batch) -> tuple[float, float]:
    """(largest, mean) |difference| of the logits of real slots, all weights in float32 against all cast to `dtype`.

    Activations are float32 on both sides.
    """
    model = what.model.clone(llm=dataclasses.replace(what.model.llm, activation_dtype='float32'))
    states = _embedded(model, what, dtype, probe)
    context = SlotContext(probe.key_range, probe.modality,
                          rope_angles(jnp.asarray(probe.positions), model.llm.head_dim, model.llm.rope_theta,
                                      model.llm.rope_scaling),
                          route_slot=probe.route_slot, vision=vision_slots(probe.vision_slot, probe.modality))
    for index, group in enumerate(model.groups):
        prefix = f'decoder/layers/group_{index}/block/'
        paths = [path for path in what.params if path.startswith(prefix)]
        for layer in range(group.num_layers):
            one = {path[len(prefix):]: part(what.params[path], layer) for path in paths}
            states = _layer(model, group, jnp.dtype(dtype), one, states, context)
    real = np.asarray(probe.modality) != PAD
    states, largest, total = [x[real] for x in states], 0.0, 0.0
    tied, norm = model.llm.tied_head, what.params['decoder/norm/scale']
    head = part(what.params['decoder/embedding' if tied else 'decoder/lm_head'], None)
    for start in range(0, model.llm.vocab_size, _COLUMNS):
        some = slice(start, start + _COLUMNS)
        kernel = head[some].T if tied else head[:, some]
        most, summed = _logits(model.llm.norm_eps, jnp.dtype(dtype), norm, kernel, states)
        largest, total = max(largest, float(most)), total + float(summed)
    return largest, total / max(1, len(states[0]) * model.llm.vocab_size)


def _embedded(model, what: Exportable, dtype: str, probe: Batch) -> list[jax.Array]:
    """f32[B, S, D] twice; of the embedding, only the rows of the probe's tokens are read."""
    tokens, index = np.unique(probe.tokens, return_inverse=True)
    small = model.clone(llm=dataclasses.replace(model.llm, vocab_size=len(tokens), tied_head=True))
    params = {path: part(leaf, None) for path, leaf in what.params.items()
              if '/layers/' not in path and path != 'decoder/lm_head'}
    params['decoder/embedding'] = params['decoder/embedding'][tokens]
    probe = probe._replace(tokens=index.reshape(probe.tokens.shape).astype(np.int32))
    return [_embed(small, unflatten({path: _round(leaf, jnp.dtype(one)) for path, leaf in params.items()}), probe)
            for one in ('float32', dtype)]


def _round(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.asarray(x).astype(dtype)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _embed(model, params, batch: Batch) -> jax.Array:
    return model.apply({'params': params}, batch, method='embed')


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(model, group: LayerGroup, dtype: jnp.dtype, params: dict, states: list, context: SlotContext) -> list:
    """Both states one layer further, each with its own weights."""
    block = Block(model.llm.block_shape, group.adapters, group.biases, group.mixtures, group.prompts, model.attend)
    return [block.apply({'params': unflatten({path: _round(leaf, one) for path, leaf in params.items()})}, x, context)[0]
            for x, one in zip(states, (jnp.dtype('float32'), dtype), strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(norm_eps: float, dtype: jnp.dtype, scale: jax.Array, kernel: jax.Array, states: list):
    """(largest, sum) of the differences of some columns of logits."""
    logits = [RMSNorm(norm_eps).apply({'params': {'scale': _round(scale, one)}}, x) @ _round(kernel, one)
              for x, one in zip(states, (jnp.dtype('float32'), dtype), strict=True)]
    difference = jnp.abs(logits[0] - logits[1])
    return difference.max(), difference.sum()
