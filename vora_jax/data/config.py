"""What to read and how to pack it.

Frozen dataclasses, bindable from a configuration file.
"""
import dataclasses
from typing import Literal

from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """One JSON-lines file of samples `{id, frames, conversations}`.

    path: the file.
    image_root: folder the `frames` are relative to; '' is the folder of `path`.
    weight: share of the file seen in one epoch: 1 all of it once, 0.5 a fixed random half, 2 all of it twice.
    """

    path: str
    image_root: str = ''
    weight: float = 1.0

    def __post_init__(self):
        if self.weight < 0:
            raise UserError(f'Source.weight of {self.path} is {self.weight}; it must not be negative.')


@dataclasses.dataclass(frozen=True)
class ImagePolicy:
    """How a picture is brought to whole patches, with bicubic resizing.

    kind: `native` keeps the aspect ratio. `square_pad` puts the picture in the middle of a square of `color` first,
        `square_crop` brings the shorter side to `side` and cuts the middle out of the longer one (CLIP); `square_stretch`
        changes the aspect ratio (SigLIP); all three end at `side` x `side` pixels.
    max_patches, min_patches: limits of rows * columns of patches of one native picture. A picture that is already a
        multiple of the patch size within the limits keeps every pixel.
    side: of a square, pixels.    color: red, green and blue of the padding, 0 to 255.
    """

    max_patches: int = 1024
    min_patches: int = 1
    kind: Literal['native', 'square_pad', 'square_crop', 'square_stretch'] = 'native'
    side: int = 0
    color: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        if (self.kind == 'native') != (self.side == 0) or self.side < 0:
            raise UserError(f'ImagePolicy: kind {self.kind!r} and side {self.side} do not fit; give square pictures a side '
                            'in pixels, and native ones none.')
        if len(self.color) != 3 or not all(0 <= value <= 255 for value in self.color):
            raise UserError(f'ImagePolicy.color is {self.color}; it must be three values from 0 to 255.')
        if not 1 <= self.min_patches <= self.max_patches:
            raise UserError(f'ImagePolicy: min_patches {self.min_patches} and max_patches {self.max_patches} '
                            'must be at least 1 and in this order.')


@dataclasses.dataclass(frozen=True)
class Data:
    """The samples of a run, and the budgets of a row.

    sources: the files, mixed by their weights; () where nothing is trained (an imported model).
    tokenizer: folder of the tokenizer.
    template: name of the chat template, see `templates.TEMPLATES`.
    max_slots, max_patches, max_images: budgets of one row: language-model slots, patches, pictures.
    image: how pictures are resized.
    pack: several samples share a row; otherwise one sample a row.
    max_bad_fraction: share of samples that may be unreadable before a run stops, 0 to 1.
    """

    sources: tuple[Source, ...]
    tokenizer: str
    template: str = 'chatml'
    max_slots: int = 512
    max_patches: int = 256
    max_images: int = 8
    image: ImagePolicy = ImagePolicy()
    pack: bool = True
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        for name in ('max_slots', 'max_patches', 'max_images'):
            if getattr(self, name) < 1:
                raise UserError(f'Data.{name} is {getattr(self, name)}; it must be at least 1.')

    @property
    def image_policy(self) -> ImagePolicy:
        """`image` within the patches of a row."""
        most = min(self.image.max_patches, self.max_patches)
        return dataclasses.replace(self.image, max_patches=most, min_patches=min(self.image.min_patches, most))
