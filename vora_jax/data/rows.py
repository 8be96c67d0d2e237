"""Row numbers to laid-out rows."""
import math

import numpy as np

from vora_jax.batch import Batch
from vora_jax.data.epochs import Epochs, Padding
from vora_jax.data.lengths import Lengths, too_long
from vora_jax.data.packing import Picture, Text, layout, stack
from vora_jax.data.quarantine import Quarantine
from vora_jax.data.samples import Samples
from vora_jax.types import Array, UserError

MAX_NOTED = 1000  # samples told where all is wrong, as with a wrong image root
PATCH_MARGIN = 1.08  # patches vary from row to row: what packing needs beyond the mean to fill all slots


class Rows:
    """The rows of all epochs by number, endless. A row is a pure function of its number.

    A sample that cannot be used leaves its slots empty, is counted in `Batch.tally` and named in the quarantine; none is put
    in its place. Picklable and safe between threads.
    """

    def __init__(self, samples: Samples, epochs: Epochs, quarantine: Quarantine, max_bad_fraction: float,
                 judges: bool = True):
        """Of all samples.

        Args:
            samples, epochs, quarantine: parts of the rows.
            max_bad_fraction: share of samples that may be unusable.
            judges: reading ends with a UserError where more are. Where several hosts read, none may leave the others.
        """
        self._samples, self._epochs, self._quarantine = samples, epochs, quarantine
        self._max_bad, self._judges = max_bad_fraction, judges
        self._num_lost, self._failed = 0, set()  # samples that no plan has a place for; those this process failed to read

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
        """Puts samples that could not be measured, or fit no row, into the quarantine; UserError if they are too many."""
        lost = np.flatnonzero(self._epochs.lengths[:, 3] == 0)
        self._num_lost, too_many = len(lost), self._is_too_many(len(lost))
        example = ''
        for number in lost[:MAX_NOTED if too_many else None].tolist():
            reason = index.reasons.get(number)
            if reason is None:
                needed = index.sizes[index.first[number]].tolist()
                reason = too_long(self._samples.find(number).where, needed, self._samples.budgets)
            self._note(number, reason)
            example = example or reason
        self._check_limit(example)

    def where(self, number: int) -> list[str]:
        """File and row of each sample of a row."""
        return [self._samples.find(sample).where for sample in self._epochs[number].tolist()]

    def batch(self, first: int, count: int) -> Batch:
        """`count` rows from row `first` on. Their pixels, most of a batch, are written once and never copied."""
        budgets, pixels = self._samples.budgets, [None] * count
        if budgets.patch_dim:
            pixels = np.empty((count, budgets.patches, budgets.patch_dim), budgets.pixel_dtype)
        rows = [self._lay_out(first + number, pixels[number]) for number in range(count)]
        return stack(rows, pixels if budgets.patch_dim else None)

    def _lay_out(self, number: int, pixels: Array | None) -> Batch:
        segments, tally = [], np.zeros((len(self._samples.sizes), 3), np.int32)
        for sample in self._epochs[number].tolist():
            source, dropped = self._samples.find(sample).source, self._epochs.lengths[sample, 4]
            segment = self._segment(sample)
            if segment is None:
                tally[source, 1] += 1
            else:
                segments.append(segment)
                tally[source] += 1, 0, dropped
        return layout(segments, self._samples.budgets, tally, self._samples.rule, pixels)

    def _segment(self, sample: int) -> list[Text | Picture] | None:
        """The sample as it was planned; None if it cannot be used."""
        *planned, turns, _ = self._epochs.lengths[sample].tolist()
        if not turns or sample in self._failed:
            return None
        try:
            segment, size = self._samples.segment(sample, turns)
            if size != tuple(planned):
                raise UserError(f'{self._samples.find(sample).where}: its (slots, patches, images) are {size} and were '
                                f'{tuple(planned)} when it was measured; restore the pictures, or remove the index (the '
                                'folder Data.cache, or data in the workdir) and start anew.')
        except UserError as error:
            self._failed.add(sample)
            self._note(sample, str(error))
            if self._judges:
                self._check_limit(str(error))
            return None
        return segment

    def _note(self, sample: int, reason: str) -> None:
        at = self._samples.find(sample)
        self._quarantine.add(self._samples.names[at.source], at.row, at.where, reason)

    def _is_too_many(self, bad: int) -> bool:
        return bad > self._max_bad * len(self._samples) or bad == len(self._samples)

    def _check_limit(self, example: str) -> None:
        # Not the lines of the quarantine: those of an earlier run may be repaired by now.
        bad = self._num_lost + len(self._failed)
        if self._is_too_many(bad):
            raise UserError(f'{bad} of {len(self._samples)} samples cannot be used, more than Data.max_bad_fraction = '
                            f'{self._max_bad:g} allows; repair the data, one is {example}')
