"""What an evaluation reads and measures."""
import dataclasses

from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Eval:
    """Exact match of free greedy answers on a test file.

    data: a JSON-lines file of samples with one question each; its `kind`, where given, groups the scores.
    image_root: folder the `frames` are relative to; '' is the folder of `data`.
    max_per_kind: (kind, questions at most) pairs; kinds not named are evaluated whole.
    batch_rows: questions answered at a time.
    max_new_tokens: tokens of an answer at most.
    seed: of the questions chosen by `max_per_kind` and of the blind run's shuffle.
    blind: also answer with the pictures shuffled between questions: what the text alone gives.
    """

    data: str
    image_root: str = ''
    max_per_kind: tuple[tuple[str, int], ...] = ()
    batch_rows: int = 64
    max_new_tokens: int = 8
    seed: int = 0
    blind: bool = True

    def __post_init__(self):
        for name in ('batch_rows', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise UserError(f'Eval.{name} is {getattr(self, name)}; it must be at least 1.')
        for kind, limit in self.max_per_kind:
            if limit < 0:
                raise UserError(f'Eval.max_per_kind of {kind!r} is {limit}; it must not be negative.')
