"""`vora bench attention`: tile area, time and FLOP/s of attention over a random packed batch."""
import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, get_args

import jax
import tqdm

from vora_jax.bench.compare import Timing, compare, peak_flops
from vora_jax.bench.mask_picture import draw_mask
from vora_jax.bench.random_batch import CAPTION, SAMPLES, Drawn, draw, parse
from vora_jax.bench.sides import random_case
from vora_jax.bench.tile_statistics import TileStatistics, tile_statistics
from vora_jax.cli.json_report import write_report
from vora_jax.cli.text_table import aligned
from vora_jax.ops.attention import Implementation, choose
from vora_jax.ops.tile_walk import Tile
from vora_jax.types import UserError

HELP = """Attention over a mask drawn from a described batch: how much tile area it needs, and how long it takes here.

Samples (images, then a caption) are packed first-fit into rows; images see themselves whole, text is causal. The table of
tiles says what area a kernel computes (halves of tiles, split by keys, that are seen) and loads (whole tiles). The table of
timings says what each implementation took, next to jax.nn.dot_product_attention, splash (TPU) and torch, where they are
there. FLOPs are those of the true mask area: 4 * area * heads * head dim forward, 2.5 times as many backward. Medians of
rounds in which all take turns, after compilation.
"""
EXAMPLE = 'vora bench attention --slots 8192 --samples "2x256-1024@.5, text@.5" --tile 128x512,256x256 --draw mask.png'

IMPLEMENTATIONS = get_args(Implementation)
# Defaults on CPUs, where the whole takes less than a minute, and on accelerators.
SIZES = {'slots': (4096, 8192), 'heads': (4, 16), 'kv_heads': (2, 4), 'head_dim': (64, 128),
         'dtype': ('float32', 'bfloat16')}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora bench attention`."""
    def default(name):
        return 'default {}, on accelerators {}'.format(*SIZES[name])
    parser.add_argument('--slots', type=int, metavar='S', help=f'length of a row; {default("slots")}')
    parser.add_argument('--rows', type=int, default=1, metavar='B', help='default %(default)s')
    parser.add_argument('--heads', type=int, metavar='N', help=f'query heads; {default("heads")}')
    parser.add_argument('--kv-heads', type=int, metavar='K', help=f'key/value heads; {default("kv_heads")}')
    parser.add_argument('--head-dim', type=int, metavar='H', help=default('head_dim'))
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help=default('dtype'))
    parser.add_argument('--soft-cap', type=float, metavar='C', help='bound of the scores; default: none')
    parser.add_argument('--samples', default=SAMPLES, metavar='KINDS',
                        help='IMAGESxTOKENS@WEIGHT or text@WEIGHT, with commas between; default "%(default)s"')
    parser.add_argument('--caption', default=CAPTION, metavar='MIN-MAX', help='tokens of a caption; default %(default)s')
    parser.add_argument('--own-image-only', action='store_true', help='images see nothing before them')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of samples and tensors; default %(default)s')
    parser.add_argument('--implementation', default='auto', metavar='NAMES',
                        help=f'of {", ".join(IMPLEMENTATIONS)}, with commas between; default %(default)s')
    parser.add_argument('--no-baselines', action='store_true', help='time only the implementations')
    parser.add_argument('--tile', default='128x512', metavar='TILES',
                        help='QUERIESxKEYS whose area is told, with commas between; default %(default)s')
    parser.add_argument('--repeats', type=int, default=5, metavar='N', help='rounds; default %(default)s')
    parser.add_argument('--draw', metavar='FILE.png', help='draw the first row: its mask and the first of --tile')
    parser.add_argument('--json', metavar='FILE', help='also write the results there; - prints them instead of the tables')


def run(args: argparse.Namespace) -> int:
    """Draws the batch, times it, prints tables, writes the asked files; 0 on success. UserError on bad input."""
    _check(args)
    tiles, names = [_tile(text) for text in args.tile.split(',')], _implementations(args.implementation)
    drawn = draw(parse(args.samples, args.caption, args.own_image_only), args.rows, args.slots, args.seed)
    statistics = [tile_statistics(drawn.key_range, args.slots, tile) for tile in tiles]
    if args.draw:
        _draw(args.draw, drawn, args.slots, tiles[0])
    case = random_case(drawn.key_range, drawn.segment_id, args.heads, args.kv_heads, args.head_dim, args.dtype, args.seed,
                       args.soft_cap)
    chosen = choose(case.q, case.k, case.v)
    timings, reasons = compare(case, names, args.repeats, not args.no_baselines,
                               functools.partial(tqdm.tqdm, leave=False, disable=None))
    if not {row.name for row in timings} & set(names):
        raise UserError(f'--implementation {args.implementation} cannot run here ({reasons[names[0]]}); choose auto.')
    peak = peak_flops(args.dtype)
    if args.json:
        results = {**_described(args, drawn), 'device': jax.devices()[0].device_kind, 'peak_flops_per_second': peak,
                   'auto': chosen._asdict(), 'tiles': [_tile_row(row) for row in statistics],
                   'timings': [dataclasses.asdict(row) for row in timings], 'not_run': reasons}
        if write_report(json.dumps(results, indent=1), args.json):
            return 0
    _print(args, drawn, statistics)
    print(f'\n{jax.devices()[0].device_kind}, auto is {chosen.implementation} ({chosen.reason})')
    print('\n'.join(timing_table(timings, peak)))
    for name, reason in reasons.items():
        print(f'not run: {name}: {reason}')
    return 0


def tile_table(statistics: Sequence[TileStatistics]) -> list[str]:
    """Aligned lines: what each tile visits."""
    rows = [('tile', 'visited', 'per true area', 'per causal tiles', 'loaded', 'full', 'zeros fwd', 'zeros dkv')]
    rows += [(f'{row.tile.queries}x{row.tile.keys}', f'{row.visited:.1%}', f'{row.visited_per_true:.2f}',
              f'{row.visited_per_causal:.2f}', f'{row.loaded:.1%}', f'{row.full:.0%}',
              str(row.zero_rows), str(row.zero_columns)) for row in statistics]
    return aligned(rows)


def timing_table(timings: Sequence[Timing], peak: float | None) -> list[str]:
    """Aligned lines: what each implementation took."""
    share = ('of peak',) * bool(peak)
    rows = [('', 'forward ms', 'GFLOP/s', *share, 'with backward ms', 'GFLOP/s', *share, 'differs by')]
    for number, row in enumerate(timings):
        cells = [row.name]
        for seconds, rate in ((row.forward_seconds, row.forward_flops_per_second),
                              (row.both_seconds, row.both_flops_per_second)):
            cells += [f'{1e3 * seconds:,.2f}', f'{rate / 1e9:,.1f}', *([f'{rate / peak:.1%}'] if peak else [])]
        differs = 'another mask' if row.difference is None else f'{row.difference:.0e}' if number else '-'
        rows.append((*cells, differs))
    return aligned(rows)


def _print(args: argparse.Namespace, drawn: Drawn, statistics: Sequence[TileStatistics]) -> None:
    padding = float((drawn.segment_id == 0).mean())
    print(f'{args.rows} x {args.slots:,} slots, {drawn.samples} samples, {padding:.1%} padding; {args.heads} heads, '
          f'{args.kv_heads} kv heads, head dim {args.head_dim}, {args.dtype}')
    print(f'mask: {statistics[0].density:.1%} of all pairs; tiles of queries x keys:')
    print('\n'.join(tile_table(statistics)))


def _described(args: argparse.Namespace, drawn: Drawn) -> dict[str, Any]:
    names = (*SIZES, 'rows', 'soft_cap', 'samples', 'caption', 'own_image_only', 'seed', 'repeats')
    return {name: getattr(args, name) for name in names} | {'num_samples': drawn.samples}


def _tile_row(row: TileStatistics) -> dict[str, Any]:
    return dataclasses.asdict(row) | {'tile': list(row.tile), 'visited_per_true': row.visited_per_true,
                                      'visited_per_causal': row.visited_per_causal}


def _check(args: argparse.Namespace) -> None:
    """Fills in the sizes that were not given; UserError where a number cannot be used."""
    for name, defaults in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[jax.default_backend() != 'cpu'])
    for name in ('slots', 'rows', 'heads', 'kv_heads', 'head_dim', 'repeats'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least 1.')
    if args.heads % args.kv_heads:
        raise UserError(f'--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}, which share them evenly.')
    if args.soft_cap is not None and not args.soft_cap > 0:
        raise UserError(f'--soft-cap is {args.soft_cap}; it must be above 0.')


def _tile(text: str) -> Tile:
    match = re.fullmatch(r'(\d+)x(\d+)', text.strip())
    if not match or not int(match[1]) or not int(match[2]) or int(match[2]) % 2:
        raise UserError(f'--tile: {text.strip()!r} is not QUERIESxKEYS, keys even, such as 128x512.')
    return Tile(int(match[1]), int(match[2]))


def _implementations(text: str) -> list[str]:
    names = [name.strip() for name in text.split(',')]
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise UserError(f'--implementation: there is no {name!r}; there are {", ".join(IMPLEMENTATIONS)}.')
    return names


def _draw(path: str, drawn: Drawn, slots: int, tile: Tile) -> None:
    try:
        draw_mask(drawn.key_range, slots, tile).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f'--draw {path} cannot be written ({error}); give another .png file.') from error
