"""What an export will write, layout by layout."""
import dataclasses
from typing import Any, NamedTuple

from vora_jax.convert.export.exportable import Exportable, Leaf, Model
from vora_jax.convert.families.own_layout import Prompting
from vora_jax.convert.names.name_map import Shapes, Table
from vora_jax.method import VisionTokenRule


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from, for the model card.

    method, stage, step: of the run.    base: what the run started from (`Train.init_from`).
    manifest: hash of its data.    sources: files of its data.    config_text: its resolved configuration.
    """

    method: str = ''
    stage: str = ''
    step: int = 0
    base: tuple[str, ...] = ()
    manifest: str = ''
    sources: tuple[str, ...] = ()
    config_text: str = ''


class Request(NamedTuple):
    """What a layout is asked for.

    what: the model, merged or not.    dtype: of the weights to be written.
    prompting, rule: how prompts and pictures are made; rule None: a text-only model.
    image_token_id: of `<image>` in the exported tokenizer; None where that has none.
    base: name of the base model elsewhere; '' for none.    target: absolute path of the folder to be.
    """

    what: Exportable
    dtype: str
    prompting: Prompting
    rule: VisionTokenRule | None = None
    image_token_id: int | None = None
    base: str = ''
    target: str = ''

    @property
    def token_ids(self) -> dict[str, int]:
        """As configurations state them."""
        return {'eos_token_id': self.prompting.eos_id, 'pad_token_id': self.prompting.eos_id}


class Part(NamedTuple):
    """One folder of an export.

    table: names of its tensors.    params, shapes: its parameters, see `Exportable`.
    files: {file name: JSON content, or text}.    stem: of the weight files.    ships_code: our own modeling files go in.
    """

    table: Table
    params: dict[str, Leaf]
    shapes: Shapes
    files: dict[str, Any]
    stem: str = 'model'
    ships_code: bool = False


class Plan(NamedTuple):
    """An export in one layout.

    parts: {folder inside the export: part}, '' for itself.
    model: computes what the folder computes, from all parts' parameters.
    usage: Python that loads it.    notes: sentences on what differs in that layout.
    """

    parts: dict[str, Part]
    model: Model
    usage: str
    notes: tuple[str, ...] = ()
