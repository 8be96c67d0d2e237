"""What an export needs of a checkpoint."""
import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple

from vora_jax.batch import Batch
from vora_jax.cli import gin_config
from vora_jax.cli.made_up_prompts import probe_batch
from vora_jax.cli.partial_checkpoint import check_whole
from vora_jax.convert.export.to_hf import Provenance
from vora_jax.convert.families.own_layout import Prompting
from vora_jax.data.config import Data
from vora_jax.data.text.templates import find_template, jinja
from vora_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from vora_jax.method import VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.training.checkpoints import checkpoint
from vora_jax.training.unfinished import unfinished
from vora_jax.types import Params


class Source(NamedTuple):
    """An opened checkpoint.

    params: full.    model, rule: of its stage and method.    data: with the checkpoint's own tokenizer folder.
    tokenizer: None where the checkpoint has none (an encoder).
    """

    params: Params
    model: Any
    rule: VisionTokenRule | None
    data: Data
    tokenizer: Tokenizer | None
    provenance: Provenance

    @property
    def prompting(self) -> Prompting:
        """How prompts and pictures are made."""
        if self.tokenizer is None:
            return Prompting('', 0)
        template, policy = find_template(self.data.template), self.data.image_policy
        return Prompting(self.data.tokenizer, template.end_id(self.tokenizer), template.system, policy.min_patches,
                         policy.max_patches, policy.kind, policy.side, tuple(policy.color), tuple(policy.background),
                         tuple(map(tuple, policy.tiles)))

    @property
    def template(self) -> str:
        """The content of chat_template.jinja."""
        return jinja(find_template(self.data.template), self.tokenizer) if self.tokenizer else ''

    def probe(self) -> Batch | None:
        """A few made-up prompts; None where the model reads none."""
        if self.tokenizer is None or not isinstance(self.model, VisionLanguageModel):
            return None
        return probe_batch(self.data, self.rule, self.tokenizer)


def open_source(path: str, adapters_only: bool = False) -> Source:
    """The checkpoint of a workdir or step, of any method.

    Args:
        adapters_only: nothing else is needed of it.

    Raises:
        UserError: not a checkpoint, or adapters without their model.
    """
    opened = checkpoint.open_checkpoint(path)
    told = unfinished(path, opened)
    if told:
        print(f'vora: {told}', file=sys.stderr)
    if not adapters_only:
        check_whole(opened)
    config, _ = gin_config.load('Train', texts=[opened.config_text])
    stage, folder = config.method.stage(config.stage), opened.tokenizer_dir
    tokenizer = load_tokenizer(str(folder)) if folder and pathlib.Path(folder).is_dir() else None
    data = dataclasses.replace(config.data, tokenizer=str(folder))
    record = opened.metadata
    provenance = Provenance(config.method.name, config.stage, opened.step, tuple(config.init_from), record.manifest,
                            tuple(source.path for source in config.data.sources), opened.config_text)
    return Source(opened.params, stage.model, config.method.vision_tokens, data, tokenizer, provenance)
