"""What an evaluation reads and measures."""
import dataclasses

from vora_jax.types import UserError

SCORER_NAMES = ('exact', 'choice')


@dataclasses.dataclass(frozen=True)
class Eval:
    """Marks for free greedy answers on a test file.

    data: a JSON-lines file of samples with one question each; its `groups` (a list, a question may count in several) or
        else its `kind`, where given, group the scores.
    image_root: folder the `frames` are relative to; '' is the folder of `data`.
    max_per_kind: (kind, questions at most) pairs; kinds not named are evaluated whole.
    batch_rows: questions answered at a time.
    max_new_tokens: tokens of an answer at most.
    seed: of the questions chosen by `max_per_kind`, of the blind run's shuffle, and of guesses.
    blind: also answer with the pictures shuffled between questions: what the text alone gives.
    scorer: 'exact' match with the expected answer; 'choice': the letter in the first `The answer is X.`, see `scorers`.
    guess_unreadable: an answer in which the scorer finds no letter counts as a choice at random instead of as wrong;
        needed to compare with published numbers of ScienceQA. Such answers are counted either way.
    """

    data: str
    image_root: str = ''
    max_per_kind: tuple[tuple[str, int], ...] = ()
    batch_rows: int = 64
    max_new_tokens: int = 8
    seed: int = 0
    blind: bool = True
    scorer: str = 'exact'
    guess_unreadable: bool = False

    def __post_init__(self):
        for name in ('batch_rows', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise UserError(f'Eval.{name} is {getattr(self, name)}; it must be at least 1.')
        if self.scorer not in SCORER_NAMES:
            raise UserError(f'Eval.scorer {self.scorer!r} is unknown; choose one of {", ".join(SCORER_NAMES)}.')
        if self.guess_unreadable and self.scorer != 'choice':
            raise UserError("Eval.guess_unreadable needs Eval.scorer = 'choice'; other answers are always readable.")
        for kind, limit in self.max_per_kind:
            if limit < 0:
                raise UserError(f'Eval.max_per_kind of {kind!r} is {limit}; it must not be negative.')
