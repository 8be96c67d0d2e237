"""Checkpoints of adapters without their model."""
from vora_jax.params import count
from vora_jax.training.checkpoints.checkpoint import Opened
from vora_jax.types import UserError

PARTIAL = 'import of adapters'  # `Record.origin` of those


def is_partial(opened: Opened) -> bool:
    """Whether only what a stage trains is there."""
    return opened.metadata.origin == PARTIAL


def check_whole(opened: Opened) -> None:
    """UserError where only adapters are there."""
    if is_partial(opened):
        raise UserError(f'{opened.workdir} holds {count(opened.params):,} parameters of imported adapters, but not the '
                        'frozen weights they belong to; import them again with --init-from BASE, or train from both.')
