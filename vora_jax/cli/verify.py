"""`vora verify`: compares a checkpoint with its export."""
import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

import numpy as np
import tqdm

from vora_jax.cli.export_source import Source, open_source
from vora_jax.cli.json_report import write_report
from vora_jax.cli.made_up_prompts import made_up_prompts
from vora_jax.convert.export.layouts import ADAPTERS
from vora_jax.convert.export.to_hf import read_record
from vora_jax.convert.verify.comparison import Comparison, Question, verify
from vora_jax.data.frame import Frame, frame_name
from vora_jax.data.sources.files import locate, open_binary
from vora_jax.data.sources.open_rows import open_rows
from vora_jax.data.sources.remote import folder_of, reason
from vora_jax.data.text.records import check_record
from vora_jax.data.text.tokenizer import IMAGE
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.model import VisionLanguageModel
from vora_jax.types import UserError

HELP = """Compare a checkpoint (JAX) with its exported folder (PyTorch).

Every exported tensor must equal the checkpoint's bit for bit (an export that merged is merged again); logits of prompts
with pictures and greedy answers must agree, both sides computed in float32. An encoder is compared by its features; the
layout vora, which ships no code, is imported again and runs in JAX. Prompts come from --data, or are made up. Exit code 0
if all is equal, 1 if not.
"""
EXAMPLE = 'vora verify runs/finetune exported --data data/easy_vqa/test.jsonl'
BATCH_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora verify`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('folder', metavar='DIR', help='what `vora export` made of it')
    parser.add_argument('--data', metavar='PATH', help='rows of any kind that training reads; their first questions are '
                                                       'the prompts; default: made up')
    parser.add_argument('--num', type=int, default=32, metavar='N', help='prompts; default %(default)s')
    parser.add_argument('--max-new-tokens', type=int, default=16, metavar='N',
                        help='length of the compared answers; default %(default)s')
    parser.add_argument('--tolerance', type=float, default=1e-3, metavar='X',
                        help='largest accepted difference of a logit; default %(default)s')
    parser.add_argument('--teacher', metavar='DIR', help="Hugging Face folder of the checkpoint's teacher: also compares "
                                                         'distillation losses')
    parser.add_argument('--json', metavar='FILE', help='also write the result there; - prints it instead of the text')


def run(args: argparse.Namespace) -> int:
    """Compares; 0 where the folder equals the checkpoint, 1 where it does not. UserError on bad input."""
    for name in ('num', 'max_new_tokens'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least 1.')
    if args.teacher and not (pathlib.Path(args.teacher) / 'config.json').is_file():
        raise UserError(f'--teacher {args.teacher} holds no config.json; give the Hugging Face folder of the encoder.')
    layout = read_record(pathlib.Path(args.folder))['layout']  # before anything large is read
    source = open_source(args.checkpoint, adapters_only=layout == ADAPTERS)
    prompting = source.prompting
    with tempfile.TemporaryDirectory() as folder:
        prompts, batches = [], ()
        asks = layout != ADAPTERS and isinstance(source.model, VisionLanguageModel)
        if asks and source.tokenizer is not None:
            prompts = read_prompts(args.data, args.num, pathlib.Path(folder)) if args.data else made_up_prompts(
                args.num, None if layout == 'llm' else source.rule, pathlib.Path(folder), _stock_side(source, args))
            rows = PromptRows(prompts, source.data, source.rule, source.tokenizer)
            batches = tqdm.tqdm(rows.batches(BATCH_ROWS), total=-(-len(rows) // BATCH_ROWS), leave=False, disable=None)
        questions = [Question(prompt.question, prompt.images, prompt.where) for prompt in prompts]
        found = verify(source.params, source.model, args.folder, questions, batches, eos_id=prompting.eos_id,
                       rule=source.rule, prompting=prompting, teacher=args.teacher or '',
                       max_new_tokens=args.max_new_tokens, tolerance=args.tolerance)
    _report(found, args)
    return 1 if found.problems else 0


def _stock_side(source: Source, args: argparse.Namespace) -> int:
    """Side of made-up pictures that stock code and ours read alike; 0 for any."""
    stock = read_record(pathlib.Path(args.folder))['layout'] in ('llava', 'vora') or args.teacher
    embed = getattr(source.model.vision, 'patch_embed', None)
    return embed.table_rows * embed.patch_size if stock and embed is not None else 0


def read_prompts(path: str, num: int, folder: pathlib.Path) -> list[Prompt]:
    """The first questions of `num` records, evenly spread over the rows; pictures that are no local files become files of
    `folder`."""
    rows, prompts = open_rows(path), []
    for number in np.unique(np.linspace(0, len(rows) - 1, num).round().astype(int)).tolist():
        where = rows.where(number)
        _, exchanges, frames = check_record(rows[number], where)
        question = exchanges[0][0]
        shown = [locate(frame, folder_of(path)) for frame in frames[:question.count(IMAGE)]]
        files = [_as_file(frame, folder / f'{number}-{place}', where) for place, frame in enumerate(shown)]
        prompts.append(Prompt(question, tuple(files), where=where))
    return prompts


def _as_file(frame: str | Frame, copy: pathlib.Path, where: str) -> str:
    """The name of a picture's file, which torch's side opens too."""
    if isinstance(frame, str) and '://' not in frame:
        return frame
    try:
        with frame.open() if isinstance(frame, Frame) else open_binary(frame) as file:
            copy.write_bytes(file.read())
    except (OSError, UserError) as error:
        raise UserError(f'{where}: image {frame_name(frame)} cannot be read ({reason(error)}); replace or remove '
                        'it.') from error
    return str(copy)


def _report(found: Comparison, args: argparse.Namespace) -> None:
    if args.json:
        text = json.dumps(dataclasses.asdict(found), ensure_ascii=False, indent=1)
        if write_report(text, args.json):
            return
    print(f'{found.tensors} tensors compared bit for bit (layout {found.layout}, {found.dtype})')
    if found.worst_tensor:
        print(f'worst tensor: {found.worst_tensor}, largest difference {found.max_abs_tensor_diff:.2e}')
    if found.max_abs_feature_diff is not None:
        print(f'largest difference of features {found.max_abs_feature_diff:.2e} ({found.worst})')
    if found.num_prompts:
        print(f'{found.num_prompts} prompts: largest logit difference {found.max_abs_logit_diff:.2e} ({found.worst})')
        ties = f', {found.near_ties} decided by logits closer than rounding:' if found.near_ties else ''
        kind = 'answers' if found.layout != 'vora' else 'prompts\' best tokens'
        print(f'{found.same_answers} of {found.num_prompts} greedy {kind} equal{ties}')
    for line in found.gaps:
        print(f'  {line}')
    for layer, ours, theirs in found.distill_losses:
        print(f'distillation loss of layer {layer}: {ours:.6f}, in torch {theirs:.6f}')
    for line in found.left_out:
        print(f'not compared: {line}')
    for problem in found.problems[:10]:
        print(f'vora: {problem}', file=sys.stderr)
    if len(found.problems) > 10:
        print(f'vora: and {len(found.problems) - 10} more', file=sys.stderr)
    print('equal' if not found.problems else f'NOT EQUAL: {args.folder} is not {args.checkpoint}')
