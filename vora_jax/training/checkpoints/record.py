"""What a checkpoint holds besides arrays."""

import dataclasses

from orbax.checkpoint.experimental import v1 as ocp

from vora_jax.training.checkpoints.storage import Path, absolute
from vora_jax.types import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """A step's record. Built-in types only: Orbax refuses (and then breaks on) NumPy numbers.

    step: optimizer steps done.
    config_text: the resolved configuration.
    frozen: content hash of the frozen weights; '' where nothing is frozen.
    origin: 'train', or the verb that wrote it.
    seed: of the run.
    data: position in the data after the last batch trained on.
    manifest: hash of the data's content.
    num_samples, bad_samples: samples met so far.
    by_source: the same of each source, see `losses.BY_SOURCE`.
    seconds: time spent in training so far.
    format: version of this layout.
    """

    step: int
    config_text: str
    frozen: str = ''
    origin: str = 'train'
    seed: int = 0
    data: dict[str, int] = dataclasses.field(default_factory=dict)
    manifest: str = ''
    num_samples: int = 0
    bad_samples: int = 0
    by_source: list[list[int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    format: int = FORMAT


def read_record(folder: Path) -> Record:
    """The record of a step."""
    stored = dict(ocp.checkpointables_metadata(absolute(folder)).custom_metadata or {})
    if stored.get('format') != FORMAT:
        raise UserError(f'{folder} has the layout {stored.get("format")}, but this version reads {FORMAT}; '
                        'use the version '
                        'of vora that wrote it.')
    return Record(**stored)
