"""Questions to prompt rows of one static size."""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vora_jax.batch import Batch
from vora_jax.data.config import Data
from vora_jax.data.frame import Frame, frame_name
from vora_jax.data.images.decode import read_size
from vora_jax.data.images.patches import fit_grids, load_pictures
from vora_jax.data.images.picture_cache import PictureCache
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.data.samples import CACHE_BYTES
from vora_jax.data.text.conversation import Image, place, render_prompt
from vora_jax.data.text.templates import find_template
from vora_jax.data.text.tokenizer import Tokenizer
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

MULTIPLE = 8  # rows are rounded up to it, so that similar runs share a compiled program


class Prompt(NamedTuple):
    """A question to answer.

    images: picture files, or frames of rows.    system: system message, or None for the template's.
    where: file and row, in front of error messages; '' for none.
    """

    question: str
    images: tuple[str | Frame, ...] = ()
    system: str | None = None
    where: str = ''


class PromptRows:
    """Prompts as right-padded rows, one a row, all as long as the longest: one compiled program serves them.

    Attributes:
        budgets: sizes of a row.
        end_id: id that ends an answer.
    """

    def __init__(self, prompts: Sequence[Prompt], data: Data, rule: VisionTokenRule | None,
                 tokenizer: Tokenizer):
        """Measures the prompts; reads only the headers of their pictures.

        Args:
            prompts: at least one.
            data: gives the template and how pictures are resized.
            rule: slots a picture takes; None for a model without pictures.
            tokenizer: of the checkpoint.
        Raises:
            UserError: a picture cannot be read, the model takes none, or the placeholders do not match.
        """
        self._rule, self._cache = rule, PictureCache(CACHE_BYTES)
        self._policy = data.image_policy
        self._prompts, template = prompts, find_template(data.template)
        self.end_id = template.end_id(tokenizer)
        self._pieces, grids, sizes = [], {}, []
        for prompt in prompts:
            self._pieces.append(_named(prompt.where, render_prompt, prompt.question, len(prompt.images),
                                       tokenizer, template, prompt.system))
            for image in prompt.images:
                if frame_name(image) not in grids:
                    grids[frame_name(image)] = _named(prompt.where, self._grids, image)
            shown = [grid for image in prompt.images for grid in grids[frame_name(image)]]
            sizes.append(self._size(self._pieces[-1], shown))
        slots, patches, images = (max(column) for column in zip(*sizes))
        slots, patches = (-(-max(size, 1) // MULTIPLE) * MULTIPLE for size in (slots, patches))
        # A model with a front end reads patches even where no prompt has a picture.
        self.budgets = Budgets(slots)
        if rule is not None:
            self.budgets = Budgets(slots, patches, max(images, 1), rule.patch_size ** 2 * 3)

    def __len__(self) -> int:
        return len(self._prompts)

    def batches(self, batch_rows: int) -> Iterator[Batch]:
        """Batches of exactly `batch_rows` rows, in order; the last one repeats its last prompt.

        Raises:
            UserError: a picture cannot be decoded.
        """
        for start in range(0, len(self), batch_rows):
            rows = [self._row(index) for index in range(start, min(start + batch_rows, len(self)))]
            yield stack(rows + rows[-1:] * (batch_rows - len(rows)))

    def _row(self, index: int) -> Batch:
        prompt = self._prompts[index]
        pictures = [_named(prompt.where, self._picture, image) for image in prompt.images]
        return layout([place(self._pieces[index], pictures)], self.budgets, rule=self._rule)

    def _size(self, pieces: Sequence[Text | Image], grids: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
        """(slots, patches, images) of a prompt."""
        slots = sum(len(piece.ids) for piece in pieces if isinstance(piece, Text))
        slots += self._rule is not None and self._rule.route_token
        patches = sum(self._rule.num_places(*grid) for grid in grids)
        return slots + sum(self._rule.num_tokens(*grid) for grid in grids), patches, len(grids)

    def _grids(self, image: str | Frame) -> list[tuple[int, int]]:
        if self._rule is None:
            raise UserError(f'this checkpoint is a text-only language model, but it is asked about the image '
                            f'{frame_name(image)}; use a checkpoint of a method that sees, or leave the image out.')
        return fit_grids(*read_size(image), self._rule.patch_size, self._policy)

    def _picture(self, image: str | Frame) -> list[Picture]:
        return self._cache.get(frame_name(image), lambda: load_pictures(image, self._rule.patch_size, self._policy))


def _named(where, function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f'{where}: {error}' if where else str(error)) from error
