"""`vora eval`: scores of a checkpoint."""
import argparse
import functools
import json
from collections.abc import Sequence
from typing import Any

import tqdm

from vora_jax.cli import gin_config
from vora_jax.cli.opened_model import open_model
from vora_jax.evaluation.config import SCORER_NAMES, Eval
from vora_jax.evaluation.report import choose_examples, draw_grid
from vora_jax.evaluation.tasks import Prediction, evaluate
from vora_jax.params import count, partition
from vora_jax.types import UserError

HELP = """Score a checkpoint: exact match of free greedy answers, lower-cased and stripped.

--scorer choice reads the letter of `The answer is X.` instead; on rows of `vora prepare science-qa` the table then has
the columns of ScienceQA. Answers without a letter count as wrong and are told below the table.
The column `blind` is the same model with the pictures shuffled between the questions: what the text gives.
CONFIG.gin and the --gin arguments set `Eval` (Eval.data, Eval.batch_rows, ...); some have a flag below.
"""
EXAMPLE = 'vora eval runs/finetune --data data/easy_vqa/test.jsonl --max-per-kind yes_no=1000 --grid grid.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora eval`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('config', metavar='CONFIG.gin', nargs='?', help='a file that sets Eval')
    parser.add_argument('--data', metavar='FILE', help='JSON lines with one question each (Eval.data)')
    parser.add_argument('--max-per-kind', action='append', default=[], type=_kind_limit, metavar='KIND=N',
                        help='a seeded choice of N questions of a kind; repeatable (Eval.max_per_kind)')
    parser.add_argument('--scorer', choices=SCORER_NAMES, help='what makes an answer right; default exact (Eval.scorer)')
    parser.add_argument('--no-blind', action='store_true', help='leave the blind run out (Eval.blind)')
    parser.add_argument('--json', metavar='FILE', help='write the results as JSON')
    parser.add_argument('--predictions', metavar='FILE', help='write every answer as JSON lines')
    parser.add_argument('--grid', metavar='FILE.png', help='draw examples, right and wrong ones as they are')
    parser.add_argument('--grid-count', type=int, default=12, metavar='N', help='examples in it; default 12')


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a table, writes the asked files; 0 on success. UserError on bad input."""
    config = _config(args)
    opened = open_model(args.checkpoint)
    progress = functools.partial(tqdm.tqdm, leave=False, disable=None)
    results, predictions = evaluate(opened.model, opened.params, opened.data, opened.rule, config, progress)
    trainable, _ = partition(opened.params, opened.stage.trainable)
    results |= {'total_params': count(opened.params), 'trainable_params': count(trainable),
                'step': opened.step, 'checkpoint': args.checkpoint, 'data': config.data}
    print(table(results))
    if args.json:
        _write(args.json, '--json', json.dumps(results, indent=1) + '\n')
    if args.predictions:
        rows = (json.dumps(prediction.row(), ensure_ascii=False) + '\n' for prediction in predictions)
        _write(args.predictions, '--predictions', ''.join(rows))
    if args.grid:
        _draw(args.grid, choose_examples(predictions, args.grid_count, config.seed))
    return 0


def table(results: dict[str, Any]) -> str:
    """The results as a small text table, kinds first and all questions last."""
    blind = results.get('blind_by_kind')
    rows = [('kind', 'questions', 'accuracy') + (('blind',) if blind else ())]
    for kind, accuracy in results['by_kind'].items():
        rows.append((kind, f'{results["num_by_kind"][kind]:,}', _percent(accuracy),
                     *([_percent(blind[kind])] if blind else [])))
    rows.append(('all', f'{results["num_questions"]:,}', _percent(results['accuracy']),
                 *([_percent(results['blind_accuracy'])] if blind else [])))
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + ''.join(cell.rjust(11) for cell in row[1:]) for row in rows]
    if results['num_unreadable']:
        lines.append(f'{results["num_unreadable"]:,} answers name no choice')
    return '\n'.join(lines)


def _config(args: argparse.Namespace) -> Eval:
    bindings = list(args.gin_bindings)
    if args.data is not None:
        bindings.append(f'Eval.data={args.data!r}')
    if args.max_per_kind:
        bindings.append(f'Eval.max_per_kind={tuple(args.max_per_kind)!r}')
    if args.scorer is not None:
        bindings.append(f'Eval.scorer={args.scorer!r}')
    if args.no_blind:
        bindings.append('Eval.blind=False')
    files = [args.config] * bool(args.config) + list(args.gin_files)
    if not files and not any(binding.startswith('Eval.data') for binding in bindings):
        raise UserError('eval needs questions; give --data FILE, or a CONFIG.gin that sets Eval.data.')
    config, _ = gin_config.load('Eval', files, bindings)
    return config


def _kind_limit(text: str) -> tuple[str, int]:
    kind, equals, limit = text.partition('=')
    if not (kind and equals and limit.isdigit()):
        raise argparse.ArgumentTypeError(f'{text!r} is not KIND=N, such as yes_no=1000')
    return kind, int(limit)


def _percent(share: float) -> str:
    return f'{100 * share:.2f} %'


def _write(path: str, flag: str, text: str) -> None:
    try:
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'{flag} {path} cannot be written ({error.strerror}); give another file.') from error


def _draw(path: str, examples: Sequence[Prediction]) -> None:
    if not examples:
        raise UserError('--grid: no evaluated question has a picture; leave --grid out.')
    try:
        draw_grid(examples).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f'--grid {path} cannot be written ({error}); give another .png file.') from error
