"""Says that a checkpoint's run is not complete."""
import re

from vora_jax.training.checkpoints.checkpoint import Opened


def unfinished(given: str, opened: Opened) -> str:
    """A sentence, or '' where the run is complete, nothing trained it, or `given` names a step and not its workdir.

    A run that a scheduler stopped ends without an error: a script may have gone on with the next stage.
    """
    steps = re.search(r'^Train\.steps = (\d+)$', opened.config_text, re.MULTILINE)
    named = given.rstrip('/').endswith(f'/{opened.step}')
    if named or opened.metadata.origin != 'train' or not steps or opened.step >= int(steps[1]):
        return ''
    return (f'{given} is at step {opened.step} of {steps[1]}: its training was stopped before the end; run its command '
            'again to complete it, or name the step to take it as it is.')
