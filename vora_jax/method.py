"""What a method is: its model, stages and tokens per image.

Plain frozen dataclasses that name no device library, so that the data pipeline can read them.
"""
import dataclasses
from typing import Any, Literal

import numpy as np

from vora_jax.types import Array


@dataclasses.dataclass(frozen=True)
class VisionTokenRule:
    """How many language-model slots an image takes, and what its slots see.

    patch_size: side of a square patch, pixels.
    cls: the encoder has a [cls] token: each image's patches come after one [cls] slot of their own.
    bidirectional: an image's slots see the whole image; otherwise they are as causal as text.
    join_adjacent: images with no text between them see each other as one block, a quirk of VoRA's code.
    select: the places of an image that become tokens: its patches, or its [cls] alone.
    pool: side of the windows of patches that become one token; those at the lower and right edge may be smaller.
    tokens_per_place: tokens made of each of them; the first of all places comes before the second of any.
    route_token: each segment begins with a ROUTE slot that no other slot sees; its token is 1 where the segment has a
        picture, else 0.
    """

    patch_size: int
    cls: bool = False
    bidirectional: bool = True
    join_adjacent: bool = False
    select: Literal['patch', 'cls'] = 'patch'
    pool: int = 1
    tokens_per_place: int = 1
    route_token: bool = False

    def num_tokens(self, rows: int, cols: int) -> int:
        """Vision tokens of an image of `rows x cols` patches."""
        windows = -(-rows // self.pool) * -(-cols // self.pool)
        return self.tokens_per_place * (windows if self.select == 'patch' else 1)

    def max_tokens(self, patches: int, images: int) -> int:
        """Vision tokens that a row of so many patches and images can need: its static budget Q.

        An image one patch high has the most windows: one for its first patch, another for every `pool` more.
        """
        images = min(images, patches) if self.select == 'patch' else images
        windows = images + (patches - images) // self.pool
        return self.tokens_per_place * (windows if self.select == 'patch' else images)

    def sources(self, rows: int, cols: int, place: int, image: int) -> Array:
        """i64[tokens] the front-end output (`Batch.vision_source`) of each token of an image.

        place: its first place in `Patches`.    image: its number in the row.
        A window's output stands at its first patch: windows of side 2 of 3 x 3 patches at 0 and 2, 6 and 8.
        """
        places = np.array([image])
        if self.select == 'patch':
            windows = np.arange(0, rows, self.pool)[:, None] * cols + np.arange(0, cols, self.pool)
            places = place + self.cls + windows.ravel()
        return (places * self.tokens_per_place + np.arange(self.tokens_per_place)[:, None]).ravel()

    def num_places(self, rows: int, cols: int) -> int:
        """Places such an image takes in `Patches`: its patches and its [cls] slot."""
        return rows * cols + self.cls


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage of a method.

    model: the Linen module of this stage; its call takes a `Batch` and returns a `model.Output`.
    trainable: path patterns (`fnmatch`, `/`-joined parameter paths) that are trained; all else is frozen.
    distill_weight: weight of the distillation loss; the language loss has weight 1.
    merges_into: the stage whose model `merge` turns this one into, or None where nothing can be merged.
    """

    model: Any
    trainable: tuple[str, ...] = ('*',)
    distill_weight: float = 0.0
    merges_into: str | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A paper's recipe: named stages, and the token rule the data pipeline applies (None: text only)."""

    name: str
    stages: dict[str, Stage]
    vision_tokens: VisionTokenRule | None = None

    def stage(self, name: str) -> Stage:
        """The stage called `name`; ValueError naming the known ones otherwise."""
        if name not in self.stages:
            raise ValueError(f'Train.stage: {self.name} has no stage {name!r}; it has {", ".join(self.stages)}.')
        return self.stages[name]
