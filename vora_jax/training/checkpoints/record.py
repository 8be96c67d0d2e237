"""What a checkpoint holds besides arrays."""

import dataclasses

from orbax.checkpoint.experimental import v1 as ocp

from vora_jax.training.checkpoints.storage import Path, absolute
from vora_jax.types import UserError

FORMAT = 2  # 1: the optimizer's state alone, without the counts of the step guard


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
    """The record of a step.

    Raises:
        UserError: another version of this package wrote it.
    """
    stored = dict(ocp.checkpointables_metadata(absolute(folder)).custom_metadata or {})
    found = stored.get('format')
    if found != FORMAT:
        older = not isinstance(found, int) or found < FORMAT
        raise UserError(f'{folder} was written by {"an older" if older else "a newer"} version of vora (layout {found}, '
                        f'this one reads {FORMAT}); go on with the version that wrote it, or train anew in another workdir.')
    return Record(**stored)
