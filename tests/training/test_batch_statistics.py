"""Counts of a batch against plain loops."""
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_methods import METHODS, method_batch

from vora_jax.bench.random_batch import draw, parse
from vora_jax.ops import range_attention_tpu
from vora_jax.ops.cross_entropy import CHUNK
from vora_jax.training.config import Mesh
from vora_jax.training.flops.statistics import attention_area, statistics_of
from vora_jax.training.mesh import sharding
from vora_jax.types import TEXT, KeyRange


def tiles(mask, queries, keys):
    """bool[row, query tile, key tile]: anything seen there; sides that do not divide are padded."""
    rows, num_queries, num_keys = mask.shape
    padded = np.zeros((rows, -(-num_queries // queries) * queries, -(-num_keys // keys) * keys), bool)
    padded[:, :num_queries, :num_keys] = mask
    return padded.reshape(rows, padded.shape[1] // queries, queries, -1, keys).any((2, 4))


@pytest.mark.parametrize('seed', range(3))
def test_areas_are_those_that_implementations_visit(seed):
    key_range = draw(parse('1x200@1, 2x30-90@2, text@1', '1-70'), 2, 700, seed).key_range
    start, stop = (np.array(x) for x in key_range)
    start[1, :300] = stop[1, :300] = 0  # whole tiles that see nothing
    key_range = KeyRange(start, stop)
    keys = np.arange(700)
    mask = (keys >= start[..., None]) & (keys < stop[..., None])

    def area(implementation, group=4, dtype='bfloat16'):
        found = attention_area(key_range, 700, 2 * group, 2, 128, jnp.dtype(dtype), implementation)
        assert found.pairs.needed == mask.sum()
        return found.pairs.computed, found.backward_products

    assert area('reference') == (2 * 700 * 700, 5)
    halves = tiles(mask, 128, 256)
    assert area('pallas_tpu') == (halves.sum() * 128 * 256, 5)
    held = 4 * 16 * 768 * 128  # of f32 d_q
    assert area('pallas_tpu', 16)[1] == (5 if held <= range_attention_tpu.MAX_RESIDENT_BYTES else 7) == 7
    assert area('pallas_gpu') == (tiles(mask, 128, 64).sum() * 128 * 64, 7)
    assert area('pallas_gpu', dtype='float32') == (tiles(mask, 32, 16).sum() * 32 * 16, 7)
    runs = [np.flatnonzero(line) for line in tiles(mask, 128, 128).reshape(-1, 6)]
    assert area('xla') == (sum(run[-1] - run[0] + 1 for run in runs if len(run)) * 128 * 128, 5)


def test_a_batch_on_devices_counts_each_row_once():
    batch, model = method_batch('vora', rows=8), METHODS['vora'][0].stages['pretrain'].model
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    assert statistics_of(sharding.to_device(batch, sharding.rows(mesh)), model, 2) == statistics_of(batch, model, 2)


@pytest.mark.parametrize('name', ['vora', 'lavin'])
def test_counts_of_a_batch(name):
    batch = method_batch(name, rows=4)
    found = statistics_of(batch, METHODS[name][0].stages[METHODS[name][1]].model, accumulation=2)
    rows, slots = batch.tokens.shape
    assert found.rows == rows and found.micro_batches == 2
    assert found.slots == ((batch.segment_id > 0).sum(), rows * slots)
    assert found.text == ((batch.modality == TEXT).sum(), rows * slots)
    assert found.vision == ((batch.vision_slot >= 0).sum(), batch.vision_slot.size)
    assert found.places == ((batch.patches.image_id >= 0).sum(), batch.patches.image_id.size)
    assert found.images == (sum(len(set(row[row >= 0])) for row in batch.patches.image_id), batch.patches.grid[..., 0].size)
    chunk = min(CHUNK, slots)
    most = [max((batch.loss_mask[row] > 0).sum() for row in rows) for rows in ((0, 2), (1, 3))]
    assert found.targets == ((batch.loss_mask > 0).sum(), sum(2 * chunk * math.ceil(targets / chunk) for targets in most))
    assert found.image_attention.pairs == ((batch.patches.key_stop - batch.patches.key_start).sum(), rows * 27**2)
    twice = found.times(2)
    assert twice.rows == 8 and twice.slots.needed == 2 * found.slots.needed and twice.micro_batches == 2
    assert twice.attention.pairs.computed == 2 * rows * slots**2
