"""`vora bench data`: what reading, decoding and packing cost, alone and beside training steps."""
import argparse
import contextlib
import json
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import tqdm

from vora_jax.bench.data_feed import BARE, ROW_PICTURES, bare, data_config, fed
from vora_jax.bench.data_parts import cpu_parts
from vora_jax.bench.data_pictures import Photographs, write_photographs
from vora_jax.bench.data_turns import Cost, take_turns
from vora_jax.cli import gin_config
from vora_jax.cli.json_report import write_report
from vora_jax.cli.text_table import aligned
from vora_jax.data import loader
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

HELP = """What feeding a trainer costs.

Without CONFIG: generated photographs are read, decoded, resized to squares and packed, by the loader that feeds training
(its cache of decoded pictures switched off), in threads and in worker processes, next to a bare loop that decodes and
resizes with the same decoder and does nothing else. All take turns in one run; medians.

With CONFIG (of `vora train`): steps of that stage, from random weights, fed by the data pipeline, next to the same steps fed
with a few batches that wait on the devices; what the pipeline alone takes for a batch; padding, and size of an epoch.

With CONFIG also --gin.NAME=VALUE, --gin_file FILE and --gin_bindings TEXT, as in `vora train`.
"""
EXAMPLE = """vora bench data --decoder pillow,simplejpeg
  vora bench data configs/quickstart/vora.gin --steps 10 --gin.Train.workers=1"""

MAX_PIXELS, MAX_SIDE = 1 << 25, 1 << 14  # of a photograph: making it takes 50 bytes a pixel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora bench data`."""
    parser.add_argument('config', nargs='?', metavar='CONFIG', help='.gin file of a training stage; without it, pictures '
                                                                     'are generated')
    parser.add_argument('--steps', type=int, default=20, metavar='N',
                        help='with CONFIG: steps in each measurement; default %(default)s')
    parser.add_argument('--repeats', type=int, default=7, metavar='N', help='rounds; default %(default)s')
    parser.add_argument('--decoder', default='pillow', metavar='NAMES',
                        help=f'of {", ".join(BARE)}, with commas between; default %(default)s')
    parser.add_argument('--size', default='640x480', metavar='WxH', help='pixels of a photograph; default %(default)s')
    parser.add_argument('--side', type=int, default=448, metavar='PIXELS',
                        help='of the squares they are resized to; default %(default)s')
    parser.add_argument('--patch-size', type=int, default=14, metavar='PIXELS', help='default %(default)s')
    parser.add_argument('--images', type=int, default=256, metavar='N',
                        help='photographs, and how many a measurement takes; default %(default)s')
    parser.add_argument('--rows', type=int, default=2, metavar='B',
                        help=f'of a batch, {ROW_PICTURES} pictures each; default %(default)s')
    parser.add_argument('--workers', type=int, metavar='N', help='worker processes; default: one for each core; 0 times '
                                                                 'threads alone')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the photographs; default %(default)s')
    parser.add_argument('--json', metavar='FILE', help='also write the results there; - prints them instead of the tables')


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables, writes the asked file; 0 on success. UserError on bad input."""
    for name in ('steps', 'repeats', 'side', 'patch_size', 'images', 'rows'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least 1.')
    if args.config:
        return _run_steps(args)
    if args.gin_files or args.gin_bindings:
        raise UserError('bench data takes --gin arguments only with a CONFIG; give the .gin file of a stage.')
    return _run_pictures(args)


def _run_steps(args: argparse.Namespace) -> int:
    config, _ = gin_config.load('Train', [args.config, *args.gin_files], list(args.gin_bindings))
    from vora_jax.cli.fed_steps import measure_steps  # late: mistakes in the configuration are told first
    with tempfile.TemporaryDirectory(prefix='vora-bench-') as folder, _bar(3 * args.repeats) as bar:
        found = measure_steps(config, pathlib.Path(folder), args.steps, args.repeats, bar.update)
    ratio = found.fed.seconds / found.cached.seconds
    steps_per_epoch = found.rows / config.batch_rows
    results = {
        'config': args.config, 'device': jax.devices()[0].device_kind, 'cores': num_cores(), 'workers': config.workers,
        'steps': args.steps, 'repeats': args.repeats, 'fed': found.fed._asdict(), 'cached': found.cached._asdict(),
        'fed_per_cached': ratio, 'pipeline_alone': found.alone._asdict(), 'slot_padding': found.slot_padding,
        'patch_padding': found.patch_padding, 'rows_per_epoch': found.rows, 'samples_per_epoch': found.samples,
        'steps_per_epoch': steps_per_epoch}
    if args.json and write_report(json.dumps(results, indent=1), args.json):
        return 0
    print(f'{args.config}: {config.batch_rows} rows a step, {config.workers} workers, {results["cores"]} cores, '
          f'{results["device"]}')
    costs = {'step on cached batches': found.cached, 'step fed by the pipeline': found.fed,
             'batch of the pipeline alone': found.alone}
    rows = [(name, f'{1e3 * cost.seconds:,.2f}', f'{1e3 * cost.cpu_seconds:,.2f}') for name, cost in costs.items()]
    print('\n'.join(aligned([('', 'ms', 'CPU ms'), *rows])))
    print(f'a step takes {ratio:.3f} times as long with the pipeline attached')
    print(f'an epoch: {found.samples:,} samples in {found.rows:,} rows, {steps_per_epoch:,.1f} steps; empty: '
          f'{found.slot_padding:.1%} of slots, {found.patch_padding:.1%} of places for patches')
    return 0


def _run_pictures(args: argparse.Namespace) -> int:
    width, height = _size(args.size)
    if args.side % args.patch_size:
        raise UserError(f'--side {args.side} is not a multiple of --patch-size {args.patch_size}; choose one that is.')
    decoders = [name.strip() for name in args.decoder.split(',')]
    for name in decoders:
        if name not in BARE:
            raise UserError(f'--decoder: there is no {name!r}; there are {", ".join(BARE)}.')
    workers = num_cores() if args.workers is None else args.workers
    if workers < 0:
        raise UserError(f'--workers is {workers}; it must be at least 0.')
    with tempfile.TemporaryDirectory(prefix='vora-bench-') as folder:
        photographs = write_photographs(pathlib.Path(folder), args.images, height, width, args.seed,
                                        lambda steps: tqdm.tqdm(steps, desc='photographs', leave=False, disable=None))
        rule = VisionTokenRule(args.patch_size)
        found = {name: _measure(args, photographs, name, rule, workers) for name in decoders}
    results = {
        'cores': num_cores(), 'size': [width, height], 'file_bytes': photographs.mean_bytes, 'side': args.side,
        'patch_size': args.patch_size, 'images': args.images, 'rows': args.rows, 'repeats': args.repeats, 'seed': args.seed,
        'decoders': found}
    if args.json and write_report(json.dumps(results, indent=1), args.json):
        return 0
    print(f'JPEG files of {width} x {height}, {photographs.mean_bytes / 1e3:.0f} kB, to {args.side} x {args.side}, '
          f'{(args.side // args.patch_size) ** 2:,} patches; batches of {args.rows} x {ROW_PICTURES} pictures; '
          f'{results["cores"]} cores')
    for name, one in found.items():
        print(f'\n{name}, pictures a second:')
        print('\n'.join(rate_table(one['sides'])))
        parts = ', '.join(f'{part} {ms:.2f}' for part, ms in one['cpu_ms_of_parts'].items())
        print(f'CPU ms a picture by part, one thread: {parts}')
    return 0


def _measure(args: argparse.Namespace, photographs: Photographs, decoder: str, rule: VisionTokenRule,
             workers: int) -> dict[str, Any]:
    """{sides: [...], cpu_ms_of_parts} of one decoder."""
    cores = num_cores()
    data = data_config(photographs, args.side, args.patch_size, decoder)
    sides = {'bare loop, 1 thread': (bare(photographs.files, args.images, args.side, decoder), 1)}
    if cores > 1:
        sides[f'bare loop, {cores} threads'] = bare(photographs.files, args.images, args.side, decoder, cores), cores
    with contextlib.ExitStack() as stack:
        for number in dict.fromkeys((0, workers)):
            feed = stack.enter_context(contextlib.closing(
                loader.batches(data, rule, args.rows, args.seed, workers=number, cache_bytes=0)))
            sides[f'loader, {number} processes' if number else 'loader, threads'] = fed(feed, args.images), cores
        with _bar(args.repeats * len(sides)) as bar:
            costs = take_turns({name: side for name, (side, _) in sides.items()}, args.repeats, bar.update)
    parts = cpu_parts(photographs, data, rule, args.rows)
    return {'sides': rates(costs, {name: used for name, (_, used) in sides.items()}),
            'cpu_ms_of_parts': {name: 1e3 * seconds for name, seconds in parts.items()}}


def rates(costs: dict[str, Cost], cores: dict[str, int]) -> list[dict[str, Any]]:
    """Pictures a second of each side: in all, a core, and a second of CPU time; the latter two also as shares of the first
    side's."""
    first = next(iter(costs))
    alone, alone_cpu = 1 / (costs[first].seconds * cores[first]), 1 / costs[first].cpu_seconds
    found = []
    for name, cost in costs.items():
        per_core, per_cpu = 1 / (cost.seconds * cores[name]), 1 / cost.cpu_seconds
        found.append({'name': name, 'cores': cores[name], 'per_second': 1 / cost.seconds,
                      'per_core': per_core, 'per_core_of_bare': per_core / alone,
                      'per_cpu_second': per_cpu, 'per_cpu_second_of_bare': per_cpu / alone_cpu})
    return found


def rate_table(sides: list[dict[str, Any]]) -> list[str]:
    """Aligned lines of `rates`."""
    rows = [('', 'in all', 'a core', 'of bare', 'a CPU second', 'of bare')]
    rows += [(row['name'], f'{row["per_second"]:.1f}', f'{row["per_core"]:.1f}', f'{row["per_core_of_bare"]:.1%}',
              f'{row["per_cpu_second"]:.1f}', f'{row["per_cpu_second_of_bare"]:.1%}') for row in sides]
    return aligned(rows)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _bar(total: int) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, desc='measuring', leave=False, disable=None)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r'([1-9]\d{0,4})x([1-9]\d{0,4})', text.strip())
    if not match:
        raise UserError(f'--size: {text!r} is not WIDTHxHEIGHT in pixels, such as 640x480.')
    width, height = int(match[1]), int(match[2])
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise UserError(f'--size: {text} is too large; give at most {MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side.')
    return width, height
