"""A checkpoint opened for answering questions."""
import dataclasses
from typing import NamedTuple

from vora_jax.cli import gin_config
from vora_jax.cli.partial_checkpoint import check_whole
from vora_jax.data.config import Data
from vora_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from vora_jax.method import Stage, VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.training.checkpoints import checkpoint
from vora_jax.types import Params, UserError


class OpenedModel(NamedTuple):
    """What answering needs of a checkpoint.

    params: full.    data: with the checkpoint's own tokenizer folder.    rule: None in a text-only model.
    """

    stage: Stage
    params: Params
    data: Data
    rule: VisionTokenRule | None
    tokenizer: Tokenizer
    step: int

    @property
    def model(self) -> VisionLanguageModel:
        return self.stage.model


def open_model(path: str) -> OpenedModel:
    """The checkpoint's stage, parameters, data and tokenizer.

    Raises:
        UserError: not a checkpoint, or adapters alone, or its model does not generate text.
    """
    opened = checkpoint.open_checkpoint(path)
    check_whole(opened)
    config, _ = gin_config.load('Train', texts=[opened.config_text])
    stage = config.method.stage(config.stage)
    if not isinstance(stage.model, VisionLanguageModel):
        raise UserError(f'{path} holds a {config.method.name}, which does not generate text; give a '
                        'checkpoint of a language model.')
    data = dataclasses.replace(config.data, tokenizer=str(opened.tokenizer_dir))
    tokenizer = load_tokenizer(data.tokenizer)
    return OpenedModel(stage, opened.params, data, config.method.vision_tokens, tokenizer, opened.step)
