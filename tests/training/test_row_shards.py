"""Rows that processes share, and rows of their own."""
import math
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.row_shards import check_rows, row_shard
from vora_jax.types import UserError


class Device(types.SimpleNamespace):
    __hash__ = object.__hash__


def mesh(processes, **sizes):
    """A mesh of devices that belong to these processes; no program can run on it."""
    devices = np.array([Device(id=i, device_kind='fake', process_index=p) for i, p in enumerate(processes)])
    return jax.sharding.Mesh(devices.reshape([sizes.get(axis, 1) for axis in sharding.AXES]), sharding.AXES)


def shards(on):
    return [row_shard(on, process) for process in range(1 + max(d.process_index for d in on.devices.flat))]


@pytest.mark.parametrize('processes, sizes, expected', [
    ([0, 0, 1, 1], {'fsdp': 4}, [(0, 2), (1, 2)]),
    ([0, 0, 1, 1], {'fsdp': 2, 'tensor': 2}, [(0, 2), (1, 2)]),
    ([0, 0, 1, 1], {'tensor': 4}, [(0, 1), (0, 1)]),
    ([0, 1, 0, 1], {'fsdp': 2, 'tensor': 2}, [(0, 1), (0, 1)]),
    ([0, 0, 1, 1, 2, 2, 3, 3], {'data': 2, 'context': 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ([1, 1, 0, 0], {'fsdp': 4}, [(1, 2), (0, 2)]),  # the order of the mesh, not of the processes
    ([0, 1, 0, 1], {'fsdp': 4}, [(0, 2), (1, 2)]),  # rows of a share need not be neighbours
], ids=str)
def test_processes_with_the_same_rows_read_the_same_ones(processes, sizes, expected):
    assert shards(mesh(processes, **sizes)) == expected


@pytest.mark.parametrize('processes, sizes', [
    ([0, 0, 0, 1, 1, 1], {'fsdp': 3, 'tensor': 2}),
    ([0, 0, 0, 1, 2, 2, 2, 1], {'fsdp': 4, 'tensor': 2}),
    ([0, 1, 0, 0], {'fsdp': 4}),
], ids=str)
def test_rows_that_are_shared_in_part_are_refused(processes, sizes):
    config = types.SimpleNamespace(batch_rows=12, accumulation=1)
    with pytest.raises(UserError, match='share only some.*choose a product'):
        check_rows(config, mesh(processes, **sizes))


def test_rows_must_divide_over_the_mesh():
    config = types.SimpleNamespace(batch_rows=8, accumulation=2)
    check_rows(config, mesh([0, 0, 1, 1], fsdp=4))
    with pytest.raises(UserError, match=r'4 rows, which the 8 devices .* data \(2\) and fsdp \(4\)'):
        check_rows(config, mesh([0] * 8, data=2, fsdp=4))


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(4)), st.sampled_from([(4, 2, 1, 1), (2, 2, 1, 2), (2, 1, 2, 2), (1, 1, 2, 4), (1, 2, 4, 1)]))
def test_shares_cover_all_rows_once_in_order(order, sizes):
    """Four processes of two neighbouring devices each: one of each share hold every row exactly once."""
    on = mesh(np.repeat(order, 2), **dict(zip(sharding.AXES, sizes)))
    held = {process: {place[:2] for place, d in np.ndenumerate(on.devices) if d.process_index == process}
            for process in range(4)}
    by_index = {}
    for process, (index, count) in enumerate(shards(on)):
        assert by_index.setdefault(index, held[process]) == held[process]
    assert sorted(by_index) == list(range(count))
    assert sum(map(len, by_index.values())) == math.prod(sizes[:2]) == len(set().union(*by_index.values()))
    assert [min(by_index[index]) for index in range(count)] == sorted(map(min, by_index.values()))
