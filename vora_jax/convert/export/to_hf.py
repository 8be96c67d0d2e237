"""A model as a PyTorch / Hugging Face folder."""
import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from vora_jax.batch import Batch
from vora_jax.convert.export.foreign_stream import Losses, ahead, stream, tensor_infos
from vora_jax.convert.export.layouts import ADAPTERS, LAYOUTS, choose_layout, plan_of, select
from vora_jax.convert.export.merge_report import MergeReport, logit_difference, make_report
from vora_jax.convert.export.model_card import CONFIG_FILE, model_card
from vora_jax.convert.export.plan import Part, Plan, Provenance, Request
from vora_jax.convert.export.sentencepiece_json import CHAT_TEMPLATE
from vora_jax.convert.export.tokenizer_files import write_tokenizer_files
from vora_jax.convert.families.own_layout import MODEL_TYPE, Prompting
from vora_jax.convert.files.new_folder import new_folder
from vora_jax.convert.files.safetensors_files import write_shards
from vora_jax.method import VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.types import Params, UserError

__all__ = ['DTYPES', 'Exported', 'Prompting', 'Provenance', 'export', 'is_export', 'read_record']

TORCH_MODEL = pathlib.Path(__file__).parent.parent / 'torch_model'
DTYPES = ('keep', 'float32', 'bfloat16', 'float16')
RECORD = 'vora_export.json'  # what `verify` reads
RECORDED = {'layout', 'merged', 'dtype', 'base', 'image_token_id'}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote.

    layout, dtype: as chosen.    merged: adapters were folded.    num_tensors, num_parameters, num_bytes: of the weights.
    dropped: phrases for what was left out.    notes: what differs in this layout.
    report: of merge or cast; None without.    seconds: by phase.
    """

    layout: str
    dtype: str
    merged: bool
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    report: MergeReport | None
    seconds: dict[str, float]


def export(params: Params, model: Any, prompting: Prompting, folder: str, *, rule: VisionTokenRule | None = None,
           layout: str | None = None, merge: bool = False, dtype: str = 'keep', base: str = '', template: str = '',
           provenance: Provenance = Provenance(), overwrite: bool = False,
           max_shard_bytes: int = 4 << 30, probe: Callable[[], Batch | None] = lambda: None,
           on_bytes: Callable[[int, int], None] = lambda done, total: None) -> Exported:
    """Writes a folder in one of the layouts of `export_layouts`; it appears when it is complete.

    Args:
        params: nested parameters.    model: the module they belong to.
        prompting: tokenizer and prompt rules.
        folder: to be made.
        rule: the method's; None: a front end without encoder, by its defaults.
        layout: None takes `own`, or `encoder` for an encoder.
        merge: folds adapters; `llm` and `llava` always do.
        dtype: of the weights; 'keep' takes the narrowest that holds all of the checkpoint's exactly (float32 after a fold).
        base: name of the base model elsewhere, for `peft` and `vora`.
        template: chat template, as the content of chat_template.jinja; '' for ChatML with the system message.
        provenance: for the model card.
        overwrite: replaces an earlier export; never another folder.
        max_shard_bytes: files grow to about this size.
        probe: gives prompts on which the effect of a cast on logits is measured; None measures weights only.
        on_bytes: is called with (bytes of weights just written, all bytes).

    Raises:
        UserError: the folder exists, the layout cannot hold the model, weights are not finite, or the disk is full.
    """
    if dtype not in DTYPES:
        raise UserError(f'export: dtype {dtype!r} is unknown; choose one of {", ".join(DTYPES)}.')
    clock = _Clock()
    layout = choose_layout(model, layout)
    if base and layout not in ('peft', 'vora'):
        raise UserError(f'export: the layout `{layout}` names no base model; leave out --base.')
    what, merged = select(params, model, layout, merge)
    source, dtype = what.dtype, what.dtype if dtype == 'keep' else dtype
    narrow = dtype if dtype != 'float32' else 'bfloat16'  # of a merge in float32: what a later cast would lose
    losses = Losses(narrow) if merged or _loses(source, dtype) else None
    clock('check')
    request = Request(what, dtype, prompting, rule, None, base, os.path.abspath(folder))
    if layout != 'own' and layout != 'llava':
        plan_of(request, layout)  # refusals before anything is written
    with new_folder(folder, overwrite, is_export) as partial:
        request = request._replace(image_token_id=_write_tokenizer(request, layout, template, partial))
        plan = plan_of(request, layout)
        counts = _counts(plan, dtype)
        clock('tokenizer')
        for place, part in plan.parts.items():
            target = partial / place
            if place:
                target.mkdir()
                _write_tokenizer(request, layout, template, target)
            _write_files(part, target)
            most = max_shard_bytes if part.stem == 'model' else counts[2] + 1  # PEFT reads one file only
            write_shards(target, ahead(stream(part, dtype, losses)), tensor_infos(part, dtype), most, part.stem,
                         lambda count: on_bytes(count, counts[2]))
        clock('weights')
        report = None
        if losses is not None:
            batch = probe() if isinstance(model, VisionLanguageModel) else None
            report = make_report(losses, None if batch is None else logit_difference(what, narrow, batch))
        clock('report')
        card = model_card(plan, layout, merged, provenance, what.dropped, report)
        texts = {'README.md': card} | ({CONFIG_FILE: provenance.config_text} if provenance.config_text else {})
        record = {'layout': layout, 'merged': merged, 'dtype': dtype, 'base': base, 'image_token_id': request.image_token_id}
        write_texts(partial, texts | {RECORD: record})
    clock('finish')
    return Exported(layout, dtype, merged, *counts, what.dropped, plan.notes, report, clock.seconds)


def is_export(folder: pathlib.Path) -> bool:
    """True where `export` wrote the folder."""
    try:
        if (folder / RECORD).is_file():
            return True
        return json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model_type') == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """What `export` noted in the folder: layout, merged, dtype, base, image_token_id. UserError for other folders."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'{folder} is not a folder that `vora export` wrote; export the checkpoint first.') from error
    if not isinstance(record, dict) or record.get('layout') not in (*LAYOUTS, ADAPTERS) or RECORDED - set(record):
        raise UserError(f'{folder / RECORD} is not as `vora export` writes it; export the checkpoint again.')
    return record


class _Clock:
    """Seconds since the last call, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self._last = round(now - self._last, 3), now


def _loses(source: str, dtype: str) -> bool:
    """Whether a cast may change values."""
    return source != dtype and dtype != 'float32'


def _counts(plan: Plan, dtype: str) -> tuple[int, int, int]:
    """Tensors, parameters and bytes."""
    infos = [info for part in plan.parts.values() for info in tensor_infos(part, dtype)]
    sizes = [math.prod(shape) for _, _, shape in infos]
    return len(sizes), sum(sizes), sum(size * info[1].itemsize for size, info in zip(sizes, infos))


def _write_tokenizer(request: Request, layout: str, template: str, folder: pathlib.Path) -> int | None:
    """The tokenizer's files; the id of `<image>` where the layout has it."""
    if layout == 'encoder':
        return None
    sees = request.what.model.vision is not None
    image_token = layout in ('own', 'llava') or layout == 'peft' and sees and not request.base
    prompting = request.prompting
    template = template or CHAT_TEMPLATE.replace('__SYSTEM__', json.dumps(prompting.system, ensure_ascii=False))
    return write_tokenizer_files(prompting.tokenizer, folder, template, prompting.eos_id, image_token)


def _write_files(part: Part, folder: pathlib.Path) -> None:
    write_texts(folder, part.files)
    if part.ships_code:
        for file in TORCH_MODEL.glob('*_vora_jax.py'):
            shutil.copyfile(file, folder / file.name)


def write_texts(folder: pathlib.Path, files: dict[str, Any]) -> None:
    """Writes {file name: text, or JSON content}."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + '\n'
        (folder / name).write_text(text, encoding='utf-8')
