"""The contract between data, model and losses.

NumPy arrays on the host, device arrays in the model. All shapes are static for a run: budgets of S slots, P patches,
Q vision tokens and M images a row. NamedTuples, so that JAX and grain see them as trees without this file importing
either.
"""
from typing import NamedTuple

from vora_jax.types import Array, KeyRange


class Patches(NamedTuple):
    """Images as packed patches at their native aspect ratio.

    pixels: u8[B, P, patch_dim] raw bytes, normalised on the device (f32: already normalised).
        patch_dim = patch_size * patch_size * 3 in (row, column, channel) order.
    row, col: i16[B, P] place of a patch in its image's grid; -1 in empty places.
    image_id: i32[B, P] which image of the row a patch belongs to, from 0; -1 in empty places.
    grid: i32[B, M, 2] rows and columns of each image; 0 where there is none.
    key_start, key_stop: i32[B, P] the patches each patch sees in a vision encoder: its own image.
    """

    pixels: Array
    row: Array
    col: Array
    image_id: Array
    grid: Array
    key_start: Array
    key_stop: Array

    @property
    def key_range(self) -> KeyRange:
        return KeyRange(self.key_start, self.key_stop)


class Batch(NamedTuple):
    """Rows of packed samples ("segments").

    tokens: i32[B, S] token ids; 0 in vision and pad slots; in ROUTE slots 1 with pictures, else 0.
    targets: i32[B, S] the id each slot predicts (already shifted); 0 where loss_mask is 0.
    loss_mask: f32[B, S] weight of each slot's language loss.
    modality: i8[B, S] PAD 0, TEXT 1, VISION 2, ROUTE 3.
    key_start, key_stop: i32[B, S] slots of the same row that each slot sees; equal in pad slots.
    positions: i32[B, S] rotary position, from 0 in each segment.
    route_slot: i32[B, S] slot whose state routes this one; its own where nothing routes.
    segment_id: i32[B, S] from 1; 0 is padding.
    vision_slot: i32[B, Q] slot of the q-th vision token; -1 where there is none.
    vision_source: i32[B, Q] which front-end output feeds it (`VisionTokenRule.sources`); 0 where there is none.
    patches: the pictures, or None in a run without any.
    tally: i32[B, K, 3] of each of K sources: samples in this row, samples that could not be used and have no slots in it,
        and turns that were left out because their conversation is longer than a row.
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    modality: Array
    key_start: Array
    key_stop: Array
    positions: Array
    route_slot: Array
    segment_id: Array
    vision_slot: Array
    vision_source: Array
    patches: Patches | None
    tally: Array

    @property
    def key_range(self) -> KeyRange:
        return KeyRange(self.key_start, self.key_stop)


class Output(NamedTuple):
    """What a model computes from a batch; losses apply the head.

    hidden: f[B, S, D] last hidden states, after the final norm.
    distill_sum: f32[L_distilled] sum over vision tokens of 1 - cos, one for each distilled layer; f32[0] without.
    distill_count: f32[] vision tokens in the batch.
    """

    hidden: Array
    distill_sum: Array
    distill_count: Array
