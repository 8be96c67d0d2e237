"""`vora prepare rows`: rows of any kind into a folder that is read at random."""
import argparse
import os
from typing import Any

from vora_jax.data.prepare import rows_folder
from vora_jax.data.prepare.row_parts import Plan
from vora_jax.data.sources.open_rows import open_rows
from vora_jax.data.sources.remote import folder_of

ROWS_PER_PART = 4096  # about 256 MB of ordinary photographs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that only `rows` has."""
    parser.add_argument('path', metavar='PATH',
                        help='rows {"id", "frames", "conversations"} and their relatives: a file, a folder, or a pattern '
                             'of files such as data/*.parquet')
    parser.add_argument('--image-root', default='', metavar='DIR',
                        help='folder that the names of pictures are relative to; default: that of PATH')
    parser.add_argument('--workers', type=_count, metavar='N',
                        help='processes; 0 works in this one; default: the number of cores')
    parser.add_argument('--rows-per-part', type=_number, default=ROWS_PER_PART, metavar='N',
                        help=f'rows that go into one pair of files; default {ROWS_PER_PART}')
    parser.add_argument('--no-check', action='store_true', help='read only the headers of pictures, do not decode them')
    parser.add_argument('--tokenizer', default='', metavar='DIR', help='count tokens with it; default: do not')
    parser.add_argument('--patch-size', type=_count, default=0, metavar='N',
                        help='count patches of N pixels, at native aspect ratio; default: do not')
    parser.add_argument('--vocab-size', type=_count, default=0, metavar='N',
                        help='also train a tokenizer of N pieces; default: none')


def prepare(args: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Prepares the rows, unless it is done already; returns the manifest. UserError on bad input."""
    rows = open_rows(args.path)
    root = args.image_root or folder_of(args.path)
    plan = Plan(args.rows_per_part, root if '://' in root else os.path.abspath(root), not args.no_check, args.tokenizer,
                args.patch_size)
    if manifest := rows_folder.find(args.to, rows, plan, args.vocab_size):
        if not args.json:
            print(f'{args.to} is already prepared')
        return manifest
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    return rows_folder.prepare(rows, args.to, plan, progress, workers, args.max_bad, args.vocab_size)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text} is not a number from 0')
    return int(text)


def _number(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError(f'{text} is not a number from 1')
    return int(text)
