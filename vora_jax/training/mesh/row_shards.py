"""Which rows of a batch a process reads.

Rows are cut over the mesh axes `sharding.ROWS`; devices along the other axes hold the same rows. Processes whose devices
hold the same rows read the same ones.
"""
from typing import Any, NamedTuple

import jax
import numpy as np

from vora_jax.training import config as config_lib
from vora_jax.training.mesh import sharding
from vora_jax.types import UserError


class RowShard(NamedTuple):
    """The `index`-th of `count` equal shares of a batch's rows."""

    index: int
    count: int


def row_shard(mesh: jax.sharding.Mesh, process: int | None = None) -> RowShard:
    """The share of the rows that the devices of a process (default: this one) hold.

    Shares are numbered in the order of their first rows, whatever the order of processes in the mesh. On a mesh of 2 x 2
    devices (rows x tensor), with processes a and b:

        a a    a reads the first half,        a b    both read
        b b    b the second                   a b    all rows

    Raises:
        UserError: the devices of two processes have some rows in common, but not all, or one has more rows than another.
    """
    shares = _shares(mesh)
    own = shares[jax.process_index() if process is None else process]
    order = sorted(set(shares.values()))
    overlap = sum(map(len, order)) > len(set().union(*order))
    if overlap or len(set(map(len, order))) > 1:
        raise UserError('Mesh.context x Mesh.tensor devices share their rows, but the devices of a process share only some '
                        'of theirs with those of another; choose a product that divides the devices of a process, or is a '
                        'multiple of them.')
    return RowShard(order.index(own), len(order))


def open_mesh(config: config_lib.Train, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of a run, before anything else of it is opened.

    Raises:
        UserError: it does not fit the devices (default: all), or the rows or slots of a batch do not divide over it.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    sharding.check_slots(config, mesh)
    return mesh


def check_rows(config: config_lib.Train, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless the rows of a micro-batch divide over the mesh, and as `row_shard` has it."""
    rows, parts = config.batch_rows // config.accumulation, mesh.shape['data'] * mesh.shape['fsdp']
    if rows % parts:
        raise UserError(
            f'Train.batch_rows / Train.accumulation is {rows} rows, which the {parts} devices of the mesh axes data '
            f'({mesh.shape["data"]}) and fsdp ({mesh.shape["fsdp"]}) do not divide; choose a multiple of {parts}.')
    row_shard(mesh, mesh.devices.flat[0].process_index)


def _shares(mesh: jax.sharding.Mesh) -> dict[int, tuple[int, ...]]:
    """Which blocks of rows the devices of each process hold."""
    blocks: dict[int, set[int]] = {}
    num_axes = len(sharding.ROWS)
    for place, device in np.ndenumerate(mesh.devices):
        block = np.ravel_multi_index(place[:num_axes], mesh.devices.shape[:num_axes])
        blocks.setdefault(device.process_index, set()).add(int(block))
    return {process: tuple(sorted(held)) for process, held in blocks.items()}
