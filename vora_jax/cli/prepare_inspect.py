"""`vora prepare --inspect`: what a model will see."""
import argparse
import functools
import os

import numpy as np
import tqdm

from vora_jax.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--inspect` and what belongs to it."""
    group = parser.add_argument_group('looking at what a configuration makes of its rows')
    group.add_argument('--inspect', metavar='CONFIG', help='.gin file of a stage: show a row as its model will see it: '
                                                           'text, what is learned, mask; needs no SOURCE')
    which = group.add_mutually_exclusive_group()
    which.add_argument('--row', type=int, metavar='N', help='row N of the run, counted from 0; default: 0')
    which.add_argument('--sample', type=int, metavar='N', help='sample N of the sources instead, alone in a row')
    group.add_argument('--draw', metavar='FILE.png', help="write the row's pictures there, put together from their patches")


def run(args: argparse.Namespace) -> int:
    """Prints one row; 0 on success. UserError on bad input."""
    # Late: other sources of `vora prepare` need none of this.
    from vora_jax.cli import gin_config
    from vora_jax.data.inspect.chosen_row import read_row, read_sample
    from vora_jax.data.inspect.row_mask import draw_mask
    from vora_jax.data.inspect.row_text import find_runs, tell_row
    from vora_jax.data.text.tokenizer import load_tokenizer
    if args.draw and not os.path.isdir(os.path.dirname(args.draw) or '.'):
        raise UserError(f'--draw {args.draw}: its folder does not exist; make it, or choose another file.')
    config, _ = gin_config.load('Train', [args.inspect, *args.gin_files], list(args.gin_bindings))
    data, rule = config.data, config.method.vision_tokens
    if args.sample is not None:
        title, row = read_sample(data, rule, args.sample)
    else:
        progress = functools.partial(tqdm.tqdm, leave=False, disable=None, unit='')
        title, row = read_row(data, rule, config.seed, args.row or 0, progress)
    print(f'{title}\n\n{tell_row(row, rule, load_tokenizer(data.tokenizer))}\n\nmask: queries downwards, keys to the right')
    print(draw_mask(row))
    if args.draw and row.patches is not None:
        from vora_jax.data.inspect.unpatchify import pictures_of
        _draw(pictures_of(row.patches), {run.picture: run.segment for run in find_runs(row, rule)}, args.draw)
    return 0


def _draw(pictures: list[np.ndarray], owners: dict[int, int], path: str) -> None:
    """Writes the pictures with their numbers, those of their samples, and their sizes."""
    from vora_jax.data.inspect.unpatchify import contact_sheet
    captions = [f'picture {number} of sample {owners[number]}, {picture.shape[0]} x {picture.shape[1]}'
                for number, picture in enumerate(pictures)]
    try:
        contact_sheet(pictures, captions).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f'--draw {path} cannot be written ({error}); give the name of a .png file.') from error
    print(f'\n{len(pictures)} picture{"s" * (len(pictures) != 1)}: {path}')
