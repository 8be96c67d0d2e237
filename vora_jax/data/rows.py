"""Row numbers to laid-out rows."""
import hashlib
import math

import numpy as np

from vora_jax.batch import Batch
from vora_jax.data.epochs import Epochs, Padding
from vora_jax.data.lengths import Lengths
from vora_jax.data.packing import layout
from vora_jax.data.quarantine import Quarantine
from vora_jax.data.samples import Samples
from vora_jax.types import UserError

MAX_NOTED = 1000  # samples told where all is wrong, as with a wrong image root
PATCH_MARGIN = 1.08  # patches vary from row to row: what packing needs beyond the mean to fill all slots


class Rows:
    """The rows of all epochs by number, endless: a random-access source for grain. A row is a pure function of its number.

    A sample that cannot be used leaves its slots empty, is counted in `Batch.tally` and named in the quarantine; none is put
    in its place. Picklable and safe between threads.
    """

    def __init__(self, samples: Samples, epochs: Epochs, quarantine: Quarantine, max_bad_fraction: float):
        self._samples, self._epochs, self._quarantine = samples, epochs, quarantine
        self._max_bad = max_bad_fraction

    @property
    def sizes_hash(self) -> str:
        """Of the sizes of all samples, on which the plans rest."""
        return hashlib.sha256(np.ascontiguousarray(self._epochs.lengths).tobytes()).hexdigest()

    @property
    def warnings(self) -> list[str]:
        """One sentence for each bad sample met so far on this host."""
        return self._quarantine.reasons

    def num_rows(self, epoch: int) -> int:
        """Rows of an epoch."""
        return self._epochs.num_rows(epoch)

    def num_samples(self, epoch: int) -> int:
        """Samples of an epoch."""
        return self._epochs.num_samples(epoch)

    def find(self, number: int) -> tuple[int, int]:
        """(epoch, row in it) of a row."""
        return self._epochs.find(number)

    def padding(self) -> Padding:
        """What the plan of the first epoch leaves empty."""
        return self._epochs.padding()

    def fitting_patches(self) -> int:
        """The patch budget with which slots and patches of a row fill at about the same rate; 0 without pictures."""
        slots, patches = self._epochs.lengths[:, :2].sum(0, dtype=np.int64)
        largest = int(self._epochs.lengths[:, 1].max())
        fitting = math.ceil(patches / max(slots, 1) * self._samples.budgets.slots * PATCH_MARGIN / 8) * 8
        return max(largest, fitting)

    def note_measured(self, index: Lengths) -> None:
        """Puts samples that could not be measured, or do not fit a row, into the quarantine; UserError if they are too many."""
        budgets = self._samples.budgets
        lost = np.flatnonzero(self._epochs.lengths[:, 3] == 0)
        too_many = self._is_too_many(len(lost))
        for number in lost[:MAX_NOTED if too_many else None].tolist():
            reason = index.reasons.get(number)
            if reason is None:
                needed, room = tuple(index.sizes[index.first[number]].tolist()), tuple(budgets[:3])
                reason = (f'{self._samples.find(number).where}: the first turn needs (slots, patches, images) = {needed}, a '
                          f'row has {room}; raise the limits of Data or shorten the turn.')
            self._note(number, reason)
        self._check_limit(len(lost))

    def __getitem__(self, number: int) -> Batch:
        segments, tally = [], np.zeros((len(self._samples.sizes), 3), np.int32)
        for sample in self._epochs[number].tolist():
            at = self._samples.find(sample)
            planned, turns, dropped = np.split(self._epochs.lengths[sample], [3, 4])
            try:
                if not turns[0] or (self._samples.names[at.source], at.row) in self._quarantine:
                    raise UserError('')
                segment, size = self._samples.segment(sample, int(turns[0]))
                if size != tuple(planned.tolist()):
                    raise UserError(f'{at.where}: its (slots, patches, images) are {size} and were {tuple(planned.tolist())} when '
                                    'it was measured; restore the pictures, or remove the folder Data.cache and start anew.')
            except UserError as error:
                if str(error):
                    self._note(sample, str(error))
                    self._check_limit(len(self._quarantine.reasons))
                tally[at.source, 1] += 1
                continue
            segments.append(segment)
            tally[at.source] += 1, 0, int(dropped[0])
        return layout(segments, self._samples.budgets, tally, self._samples.rule)

    def _note(self, sample: int, reason: str) -> None:
        at = self._samples.find(sample)
        self._quarantine.add(self._samples.names[at.source], at.row, at.where, reason)

    def _is_too_many(self, bad: int) -> bool:
        return bad > self._max_bad * len(self._samples) or bad == len(self._samples)

    def _check_limit(self, bad: int) -> None:
        if self._is_too_many(bad):
            raise UserError(f'{bad} of {len(self._samples)} samples cannot be used, more than Data.max_bad_fraction = '
                            f'{self._max_bad:g} allows; repair the data, the first is {self._quarantine.reasons[0]}')
