"""What to read and how to pack it.

Frozen dataclasses, bindable from a configuration file.
"""
import dataclasses
import math
from typing import Literal

from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, or a set of files, of samples `{id, frames, conversations}`.

    path: JSON lines, a JSON list, Parquet, tar files or a folder made by `vora prepare`, see `sources.open_rows`.
    image_root: folder the `frames` are relative to; '' is the folder of `path`.
    weight: share of the samples seen in one epoch: 1 all of them once, 0.5 a half (the next epoch sees the other one),
        2 all of them twice.
    """

    path: str
    image_root: str = ''
    weight: float = 1.0

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise UserError(f'Source.weight of {self.path} is {self.weight}; it must be a number of 0 or more.')


@dataclasses.dataclass(frozen=True)
class ImagePolicy:
    """How a picture is brought to whole patches, with bicubic resizing.

    kind: `native` keeps the aspect ratio. `square_pad` puts the picture in the middle of a square of `color` first,
        `square_crop` brings the shorter side to `side` and cuts the middle out of the longer one (CLIP); `square_stretch`
        changes the aspect ratio (SigLIP); all three end at `side` x `side` pixels. `tiles` gives several such squares: the
        whole picture stretched to one, then the picture at its own aspect ratio, in the middle of the best fitting of
        `tiles`, cut into squares (LLaVA-NeXT).
    max_patches, min_patches: limits of the patches of one picture, all its squares together; the lower one is for native
        pictures. A native picture that is already a multiple of the patch size within the limits keeps every pixel.
    side: of a square, pixels.
    color: red, green and blue of the padding, 0 to 255.    background: the same, of what lies under transparent pixels.
    tiles: (rows, columns) of squares that a picture may be cut into; LLaVA-NeXT has (1, 2), (2, 1), (2, 2), (3, 1), (1, 3).
    decoder: reads JPEG files: `pillow`, or `simplejpeg`, which is a little faster and whose pixels may differ by a rounding.
    """

    max_patches: int = 1024
    min_patches: int = 1
    kind: Literal['native', 'square_pad', 'square_crop', 'square_stretch', 'tiles'] = 'native'
    side: int = 0
    color: tuple[int, int, int] = (0, 0, 0)
    background: tuple[int, int, int] = (255, 255, 255)
    tiles: tuple[tuple[int, int], ...] = ()
    decoder: Literal['pillow', 'simplejpeg'] = 'pillow'

    def __post_init__(self):
        if (self.kind == 'native') != (self.side == 0) or self.side < 0:
            raise UserError(f'ImagePolicy: kind {self.kind!r} and side {self.side} do not fit; give square pictures a side '
                            'in pixels, and native ones none.')
        if (self.kind == 'tiles') != bool(self.tiles):
            raise UserError(f'ImagePolicy: kind {self.kind!r} and tiles {self.tiles} do not fit; give the kind \'tiles\' '
                            '(rows, columns) of squares, and other kinds none.')
        if not all(len(tile) == 2 and min(tile) >= 1 for tile in self.tiles):
            raise UserError(f'ImagePolicy.tiles is {self.tiles}; it must be pairs (rows, columns) of 1 or more.')
        for name in ('color', 'background'):
            value = getattr(self, name)
            if len(value) != 3 or not all(0 <= part <= 255 for part in value):
                raise UserError(f'ImagePolicy.{name} is {value}; it must be three values from 0 to 255.')
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
    cut_first_turn: a first turn that is longer than a row loses its end, and an end mark is learned in its place, a quirk of
        VoRA's code; otherwise such a sample cannot be used. Later turns are left out as a whole.
    video_frames: most frames taken from a video; 0 reads no videos.
    cache: folder that keeps the length index and the plans of the data, so that they are made once; '' keeps them in the
        run's workdir.
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
    cut_first_turn: bool = False
    video_frames: int = 0
    cache: str = ''

    def __post_init__(self):
        for name in ('max_slots', 'max_patches', 'max_images'):
            if getattr(self, name) < 1:
                raise UserError(f'Data.{name} is {getattr(self, name)}; it must be at least 1.')
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f'Data.max_bad_fraction is {self.max_bad_fraction}; it must be from 0 to 1.')
        if self.video_frames < 0:
            raise UserError(f'Data.video_frames is {self.video_frames}; it must be at least 0.')

    @property
    def image_policy(self) -> ImagePolicy:
        """`image` within the patches of a row."""
        most = min(self.image.max_patches, self.max_patches)
        return dataclasses.replace(self.image, max_patches=most, min_patches=min(self.image.min_patches, most))
