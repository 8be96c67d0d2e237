"""`vora verify`: compares a checkpoint with its export."""
import argparse
import dataclasses
import json
import os
import pathlib
import random
import sys
import tempfile

import numpy as np
import PIL.Image
import tqdm

from vora_jax.cli.opened_model import OpenedModel, open_model
from vora_jax.convert.verify import Comparison, Question, verify
from vora_jax.data.conversation import check_record
from vora_jax.data.sources import JsonLines
from vora_jax.data.tokenizer import IMAGE
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.types import UserError

HELP = """Compare a checkpoint (JAX) with its exported folder (PyTorch).

Every exported tensor must equal the checkpoint's bit for bit; logits of prompts with pictures and greedy answers must
agree, both sides computed in float32. Prompts come from --data, or are made up. Exit code 0 if all is equal, 1 if not.
"""
EXAMPLE = 'vora verify runs/finetune exported --data data/easy_vqa/test.jsonl'
BATCH_ROWS = 8
WORDS = ('what', 'is', 'the', 'colour', 'of', 'this shape', 'how many', 'are there?', '12', '3.5', '(yes)', 'Zürich', '東京',
         '🙂')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora verify`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('folder', metavar='DIR', help='what `vora export` made of it')
    parser.add_argument('--data', metavar='FILE', help='JSON lines; their questions are the prompts; default: made up')
    parser.add_argument('--num', type=int, default=32, metavar='N', help='prompts; default %(default)s')
    parser.add_argument('--max-new-tokens', type=int, default=16, metavar='N',
                        help='length of the compared answers; default %(default)s')
    parser.add_argument('--tolerance', type=float, default=1e-3, metavar='X',
                        help='largest accepted difference of a logit; default %(default)s')
    parser.add_argument('--json', metavar='FILE', help='also write the result there; - prints it instead of the text')


def run(args: argparse.Namespace) -> int:
    """Compares; 0 where the folder equals the checkpoint, 1 where it does not. UserError on bad input."""
    for name in ('num', 'max_new_tokens'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least 1.')
    opened = open_model(args.checkpoint)
    with tempfile.TemporaryDirectory() as pictures:
        if args.data:
            prompts = read_prompts(args.data, args.num)
        else:
            prompts = made_up_prompts(args.num, opened, pathlib.Path(pictures))
        rows = PromptRows(prompts, opened.data, opened.rule, opened.tokenizer)
        batches = tqdm.tqdm(rows.batches(BATCH_ROWS), total=-(-len(rows) // BATCH_ROWS), leave=False, disable=None)
        questions = [Question(prompt.question, prompt.images, prompt.where) for prompt in prompts]
        found = verify(opened.params, opened.model, args.folder, questions, batches, eos_id=rows.end_id,
                       max_new_tokens=args.max_new_tokens, tolerance=args.tolerance)
    _report(found, args)
    return 1 if found.problems else 0


def read_prompts(path: str, num: int) -> list[Prompt]:
    """The first questions of `num` records, evenly spread over the file."""
    rows, prompts = JsonLines(path), []
    for number in np.unique(np.linspace(0, len(rows) - 1, num).round().astype(int)).tolist():
        where = rows.where(number)
        _, exchanges, frames = check_record(rows[number], where)
        question = exchanges[0][0]
        shown = frames[:question.count(IMAGE)]
        files = tuple(os.path.join(os.path.dirname(path), frame) for frame in shown)
        prompts.append(Prompt(question, files, where=where))
    return prompts


def made_up_prompts(num: int, opened: OpenedModel, folder: pathlib.Path) -> list[Prompt]:
    """Random words; where the model sees, also random pictures of any shape, written to `folder`."""
    rng, pixels, prompts = random.Random(0), np.random.default_rng(0), []
    for number in range(num):
        question, images = ' '.join(rng.choices(WORDS, k=rng.randint(1, 12))), []
        for _ in range(number % 3 if opened.rule is not None else 0):
            height, width = (rng.randint(1, 10) * opened.rule.patch_size + rng.randint(0, 3) for _ in range(2))
            images.append(str(folder / f'{number}-{len(images)}.png'))
            PIL.Image.fromarray(pixels.integers(0, 256, (height, width, 3), np.uint8)).save(images[-1])
        prompts.append(Prompt(question, tuple(images), where=f'made-up prompt {number} with {len(images)} pictures'))
    return prompts


def _report(found: Comparison, args: argparse.Namespace) -> None:
    if args.json:
        text = json.dumps(dataclasses.asdict(found), ensure_ascii=False, indent=1)
        if args.json == '-':
            print(text)
            return
        try:
            pathlib.Path(args.json).write_text(text + '\n', encoding='utf-8')
        except OSError as error:
            raise UserError(f'--json {args.json} cannot be written ({error.strerror}); give another file.') from error
    print(f'{found.tensors} tensors compared bit for bit ({found.dtype})')
    print(f'{found.num_prompts} prompts: largest logit difference {found.max_abs_logit_diff:.2e} ({found.worst})')
    ties = f', {found.near_ties} decided by logits closer than rounding' if found.near_ties else ''
    print(f'{found.same_answers} of {found.num_prompts} greedy answers equal{ties}')
    for problem in found.problems[:10]:
        print(f'vora: {problem}', file=sys.stderr)
    if len(found.problems) > 10:
        print(f'vora: and {len(found.problems) - 10} more', file=sys.stderr)
    print('equal' if not found.problems else f'NOT EQUAL: {args.folder} is not {args.checkpoint}')
