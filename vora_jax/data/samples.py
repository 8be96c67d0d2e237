"""Sample numbers to segments.

One place that reads a record, renders it, cuts it to the row budget and decodes its pictures; used both to
measure samples before packing and to build rows.
"""
import os
from typing import Any

from vora_jax.data.config import Data
from vora_jax.data.images.decode import read_size
from vora_jax.data.images.patches import fit_grid, load_picture
from vora_jax.data.images.picture_cache import PictureCache
from vora_jax.data.packing import Budgets, Picture, Text
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.text.conversation import Image, Turn, place, render_turns
from vora_jax.data.text.templates import find_template
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

CACHE_BYTES = 512 << 20


class Samples:
    """The samples of all sources by number. Picklable and safe to share between threads.

    Attributes:
        sizes: samples of each source.
        vocab_size: ids the tokenizer can give.
        budgets: sizes of a row; without a rule a row has no patches.
        rule: how pictures become slots.
    """

    def __init__(self, data: Data, rule: VisionTokenRule | None, cache_bytes: int = CACHE_BYTES):
        self._data, self.rule = data, rule
        self._tokenizer, self._template = load_tokenizer(data.tokenizer), find_template(data.template)
        self._template.end_id(self._tokenizer)  # a template for another tokenizer is told now, not with every sample
        self.vocab_size = self._tokenizer.vocab_size
        self._sources = [JsonLines(source.path) for source in data.sources]
        self._roots = [source.image_root or os.path.dirname(source.path) for source in data.sources]
        self.sizes = [len(source) for source in self._sources]
        self.hashes = [source.sha256 for source in self._sources]
        self._cache = PictureCache(cache_bytes)
        self._grids: dict[str, tuple[int, int]] = {}
        if rule is None:
            self.budgets = Budgets(data.max_slots)
        else:
            patch_dim = rule.patch_size ** 2 * 3
            self.budgets = Budgets(data.max_slots, data.max_patches, data.max_images, patch_dim)
        self._policy = data.image_policy
        self._lead = int(rule is not None and rule.route_token)  # slots before a sample's own

    def __len__(self) -> int:
        return sum(self.sizes)

    def measure(self, number: int) -> tuple[int, int, int]:
        """(slots, patches, images) of the sample as `segment` will give it; reads only the headers of
        pictures.

        Raises:
            UserError: the sample cannot be used; one sentence with file, row and reason.
        """
        where, turns, paths = self._read(number)
        pieces, grids = self._fit(where, turns, paths)
        shown = [grids[piece.index] for piece in pieces if isinstance(piece, Image)]
        text = sum(len(piece.ids) for piece in pieces if isinstance(piece, Text))
        slots = self._lead + text + sum(self._num_slots(grid) for grid in shown)
        return slots, sum(self.rule.num_places(*grid) for grid in shown), len(shown)

    def segment(self, number: int) -> list[Text | Picture]:
        """The sample with its pictures decoded; UserError if it cannot be used."""
        where, turns, paths = self._read(number)
        pieces, _ = self._fit(where, turns, paths)
        shown = max((piece.index + 1 for piece in pieces if isinstance(piece, Image)), default=0)
        pictures = [self._named(where, self._load, path) for path in paths[:shown]]
        return place(pieces, pictures)

    def _read(self, number: int) -> tuple[str, list[Turn], list[str]]:
        source = 0
        while number >= self.sizes[source]:
            number, source = number - self.sizes[source], source + 1
        where = self._sources[source].where(number)
        turns, frames = render_turns(self._sources[source][number], self._tokenizer, self._template, where)
        if frames and self.rule is None:
            raise UserError(f'{where}: the sample has frames, but this method reads text; use other data.')
        return where, turns, [os.path.join(self._roots[source], frame) for frame in frames]

    def _fit(self, where: str, turns: list[Turn],
             paths: list[str]) -> tuple[Turn, dict[int, tuple[int, int]]]:
        """The leading turns that fit a row, and the grids of their pictures. Never cuts inside a turn."""
        kept: Turn = []
        grids: dict[int, tuple[int, int]] = {}
        limits, slots, patches = self.budgets, self._lead, 0
        for turn in turns:
            for piece in turn:
                if isinstance(piece, Image):
                    grid = self._named(where, self._grid, paths[piece.index])
                    grids[piece.index] = grid
                    slots += self._num_slots(grid)
                    patches += self.rule.num_places(*grid)
                else:
                    slots += len(piece.ids)
            if slots > limits.slots or patches > limits.patches or len(grids) > limits.images:
                break
            kept += turn
        if not kept:
            needed, room = (slots, patches, len(grids)), tuple(limits[:3])
            raise UserError(f'{where}: the first turn needs (slots, patches, images) = {needed}, a row has '
                            f'{room}; raise the limits of Data or shorten the turn.')
        return kept, grids

    def _num_slots(self, grid: tuple[int, int]) -> int:
        return self.rule.num_tokens(*grid)

    def _grid(self, path: str) -> tuple[int, int]:
        if path not in self._grids:
            self._grids[path] = fit_grid(*read_size(path), self.rule.patch_size, self._policy)
        return self._grids[path]

    def _load(self, path: str) -> Picture:
        return self._cache.get(path, lambda: load_picture(path, self.rule.patch_size, self._policy))

    @staticmethod
    def _named(where: str, read: Any, path: str) -> Any:
        try:
            return read(path)
        except UserError as error:
            raise UserError(f'{where}: {error}') from error
