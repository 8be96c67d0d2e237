"""Sample numbers to segments.

One place that reads a record, renders it and decodes its pictures; used both to measure samples before packing and to build
rows.
"""
import bisect
import functools
import itertools
from typing import Any, Callable, NamedTuple, Sequence

from vora_jax.data.config import Data
from vora_jax.data.frame import Frame, frame_name
from vora_jax.data.images.decode import read_size
from vora_jax.data.images.fast_jpeg import check_decoder
from vora_jax.data.images.patches import check_squares, fit_grids, load_pictures
from vora_jax.data.images.picture_cache import PictureCache
from vora_jax.data.packing import Budgets, Picture, Text
from vora_jax.data.sources.files import locate
from vora_jax.data.sources.open_rows import open_rows
from vora_jax.data.sources.remote import folder_of
from vora_jax.data.text.conversation import Image, Turn, place, render_turns
from vora_jax.data.text.templates import find_template
from vora_jax.data.text.tokenizer import fingerprint, load_tokenizer
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

CACHE_BYTES = 512 << 20
MAX_KNOWN_SIZES = 1 << 16  # sizes of pictures kept: questions about one picture often follow each other

Size = tuple[int, int, int]  # slots, patches, images


class Place(NamedTuple):
    """Where a sample stands: number of its source, its row there, and both in words."""

    source: int
    row: int
    where: str


class Samples:
    """The samples of all sources by number. Picklable and safe to share between threads.

    Attributes:
        sizes: samples of each source.
        names: a name for each source, all different.
        vocab_size: ids the tokenizer can give.
        budgets: sizes of a row; without a rule a row has no patches.
        rule: how pictures become slots.
    """

    def __init__(self, data: Data, rule: VisionTokenRule | None, cache: str = '', cache_bytes: int = CACHE_BYTES):
        """Opens the sources.

        Args:
            data: what to read.
            rule: how pictures become slots; None for a method without pictures.
            cache: folder for the indices of the sources; '' keeps none.
            cache_bytes: most bytes of patches kept in memory for their next use.
        """
        self._data, self.rule = data, rule
        self._tokenizer, self._template = load_tokenizer(data.tokenizer), find_template(data.template)
        self._template.end_id(self._tokenizer)  # a template for another tokenizer is told now, not with every sample
        self.vocab_size = self._tokenizer.vocab_size
        self._sources = [open_rows(source.path, cache) for source in data.sources]
        self._roots = [source.image_root or folder_of(source.path) for source in data.sources]
        self.sizes = [len(source) for source in self._sources]
        self.names = _names([source.path for source in data.sources])
        self._ends = list(itertools.accumulate(self.sizes))
        self._pictures = PictureCache(cache_bytes)
        self._grids: dict[str, list[tuple[int, int]]] = {}
        if rule is None:
            self.budgets = Budgets(data.max_slots)
        else:
            patch_dim = rule.patch_size ** 2 * 3
            self.budgets = Budgets(data.max_slots, data.max_patches, data.max_images, patch_dim)
        self._policy = data.image_policy
        check_decoder(self._policy.decoder)
        if rule is not None and self._policy.kind != 'native':
            check_squares(rule.patch_size, self._policy)
        self._lead = int(rule is not None and rule.route_token)  # slots before a sample's own

    def __len__(self) -> int:
        return sum(self.sizes)

    @functools.cached_property
    def content(self) -> list[str]:
        """What decides the ids and sizes of samples, besides `Data` and the rule: equal content, equal samples."""
        return [*(source.sha256 for source in self._sources), fingerprint(self._data.tokenizer)]

    @property
    def roots(self) -> list[str]:
        """Folder of each source's pictures."""
        return list(self._roots)

    def find(self, number: int) -> Place:
        """Where sample `number` stands."""
        source = bisect.bisect_right(self._ends, number)
        row = number - (self._ends[source - 1] if source else 0)
        return Place(source, row, self._sources[source].where(row))

    def measure(self, number: int) -> list[Size]:
        """The sample's size up to and with each of its turns; reads only the headers of pictures.

        Raises:
            UserError: the sample cannot be used; one sentence with file, row and reason.
        """
        at = self.find(number)
        turns, frames = self._read(at)
        slots, patches, images, sizes = self._lead, 0, 0, []
        for turn in turns:
            grids = [grid for piece in turn if isinstance(piece, Image)
                     for grid in _told(at.where, self._frame_grids, frames[piece.index])]
            slots += sum(len(piece.ids) for piece in turn if isinstance(piece, Text))
            slots += sum(self.rule.num_tokens(*grid) for grid in grids)
            patches += sum(self.rule.num_places(*grid) for grid in grids)
            images += len(grids)
            sizes.append((slots, patches, images))
        return sizes

    def segment(self, number: int, num_turns: int) -> tuple[list[Text | Picture], Size]:
        """(the sample's first turns with their pictures decoded, their size).

        Raises:
            UserError: it cannot be used.
        """
        at = self.find(number)
        turns, frames = self._read(at)
        pieces: Turn = [piece for turn in turns[:num_turns] for piece in turn]
        shown = max((piece.index + 1 for piece in pieces if isinstance(piece, Image)), default=0)
        pictures = [_told(at.where, self._load, frame) for frame in frames[:shown]]
        parts = place(pieces, pictures)
        return parts, self._size(parts)

    def _read(self, at: Place) -> tuple[list[Turn], list[str | Frame]]:
        source, root = self._sources[at.source], self._roots[at.source]
        turns, frames = render_turns(source[at.row], self._tokenizer, self._template, at.where, self._data.video_frames)
        if frames and self.rule is None:
            raise UserError(f'{at.where}: the sample has frames, but this method reads text; use other data.')
        frames = [locate(frame, root) for frame in frames]
        if self._data.cut_first_turn:
            turns[0] = self._cut(turns[0], frames, at.where)
        return turns, frames

    def _cut(self, turn: Turn, frames: Sequence[str | Frame], where: str) -> Turn:
        """A turn that fits a row's slots: its beginning, never half a picture, and a learned end mark."""
        sizes = [len(piece.ids) if isinstance(piece, Text) else
                 sum(self.rule.num_tokens(*grid) for grid in _told(where, self._frame_grids, frames[piece.index]))
                 for piece in turn]
        room = self.budgets.slots - self._lead
        if sum(sizes) <= room:
            return turn
        kept, room = [], room - 1
        for piece, size in zip(turn, sizes):
            if size > room:
                kept += [Text(piece.ids[:room], piece.supervised)] if isinstance(piece, Text) and room else []
                break
            kept.append(piece)
            room -= size
        return [*kept, Text([self._template.end_id(self._tokenizer)], supervised=True)]

    def _size(self, parts: Sequence[Text | Picture]) -> Size:
        shown = [(part.rows, part.cols) for part in parts if isinstance(part, Picture)]
        text = sum(len(part.ids) for part in parts if isinstance(part, Text))
        slots = self._lead + text + sum(self.rule.num_tokens(*grid) for grid in shown)
        return slots, sum(self.rule.num_places(*grid) for grid in shown), len(shown)

    def _frame_grids(self, frame: str | Frame) -> list[tuple[int, int]]:
        name = frame_name(frame)
        grids = self._grids.get(name)
        if grids is None:
            grids = fit_grids(*read_size(frame), self.rule.patch_size, self._policy)
            if len(self._grids) >= MAX_KNOWN_SIZES:
                self._grids.clear()  # also while another thread is here
            self._grids[name] = grids
        return grids

    def _load(self, frame: str | Frame) -> list[Picture]:
        return self._pictures.get(frame_name(frame), lambda: load_pictures(frame, self.rule.patch_size, self._policy))


def _names(paths: Sequence[str]) -> list[str]:
    """Short and different names of the sources, for counters: the ends of their paths."""
    parts = [path.rstrip('/').split('/') for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ['/'.join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f'{path}#{number}' for number, path in enumerate(paths)]


def _told(where: str, read: Callable[[str | Frame], Any], frame: str | Frame) -> Any:
    try:
        return read(frame)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
