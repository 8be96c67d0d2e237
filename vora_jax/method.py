"""What a method is: its model, stages and tokens per image.

Plain frozen dataclasses that name no array library, so that the data pipeline can read them.
"""
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class VisionTokenRule:
    """How many language-model slots an image takes, and what its slots see.

    patch_size: side of a square patch, pixels. An image of `rows x cols` patches takes `rows * cols` slots.
    cls: the encoder has a [cls] token: each image's patches come after one [cls] slot of their own.
    bidirectional: an image's slots see the whole image; otherwise they are as causal as text.
    join_adjacent: images with no text between them see each other as one block, a quirk of VoRA's code.
    """

    patch_size: int
    cls: bool = False
    bidirectional: bool = True
    join_adjacent: bool = False

    def num_tokens(self, rows: int, cols: int) -> int:
        """Vision tokens of an image of `rows x cols` patches."""
        return rows * cols

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
