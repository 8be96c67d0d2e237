"""`vora plan --search`: compiles the most promising settings and ranks them."""
import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import tqdm

from vora_jax.cli import gin_config
from vora_jax.cli.json_report import write_report
from vora_jax.cli.text_table import aligned
from vora_jax.planning import report, search, work
from vora_jax.planning.kept import REMATS, remat_of, row_bytes
from vora_jax.planning.topology import Topology, larger
from vora_jax.planning.unplaced import held_on, parameter_shapes
from vora_jax.training.config import Train
from vora_jax.types import UserError


def run_search(args: argparse.Namespace, config: Train, text: str, topology: Topology, compile_text: Callable) -> int:
    """Searches, prints the ranking and the flags of the best; 0 when something fits, else 1.

    compile_text: `(text, topology, quick, timeout, progress)` gives the facts of a configuration.
    """
    try:
        tensors = [int(size) for size in args.tensor.split(',')]
    except ValueError:
        tensors = []
    if not tensors or min(tensors) < 1:
        raise UserError(f'--tensor {args.tensor!r} is not a list of sizes such as 1,2,4.')
    num_devices, context = work.num_devices(topology), config.mesh.context
    if context < 1 or num_devices % context:
        raise UserError(f'Mesh.context = {context} does not divide the {num_devices} devices of {topology}; choose a '
                        'divisor.')
    if all(num_devices % (context * size) for size in tensors):
        raise UserError(f'--tensor {args.tensor}: none of these sizes, times Mesh.context = {context}, divides the '
                        f'{num_devices} devices of {topology}; choose divisors.')
    remats = REMATS if remat_of(config) else ('',)
    every = list(search.candidates(num_devices, topology.slices, config.batch_rows, remats, context, tensors))
    if not every:
        ways = min(num_devices // (context * size) for size in tensors if num_devices % (context * size) == 0)
        raise UserError(f'Train.batch_rows = {config.batch_rows} divides over no mesh of the {num_devices} devices of '
                        f'{topology}; choose a multiple of {ways}.')

    def changed(candidate: search.Candidate) -> tuple[Train, str]:
        return gin_config.load('Train', texts=[text], bindings=list(candidate.bindings))

    shapes = parameter_shapes(config)
    held = functools.cache(lambda mesh, gather: held_on(config, shapes, dict(mesh), gather))
    counts = functools.cache(lambda one: work.executed(config, one, topology, held(one.mesh, one.gather)))

    def bound(candidate: search.Candidate, facts: Any) -> tuple[float, float]:
        arrays = held(candidate.mesh, candidate.gather)
        return work.bound_seconds(config, candidate, topology, arrays, counts(candidate), facts)

    def need(candidate: search.Candidate) -> float:
        try:
            arrays = held(candidate.mesh, candidate.gather)
        except UserError:
            return math.inf  # the mesh does not divide the model
        # Besides what is kept: all values of the layer whose backward pass runs.
        return search.least_bytes(candidate, arrays, config.batch_rows, row(candidate.remat) + row(REMATS[-1], True))

    row = functools.cache(functools.partial(row_bytes, config))
    with tqdm.tqdm(total=args.max_compiles, desc=f'{len(every)} settings', unit='compile', leave=False, disable=None) as bar:
        def told(tried: search.Tried) -> None:
            bar.update()
            if bar.disable:
                verdict = 'fits' if tried.fits else tried.why or 'does not fit'
                print(f'tried {" ".join(tried.candidate.flags)}: {verdict}', file=sys.stderr)

        tried, left = search.search(
            every, need, topology.chip.usable_bytes, bound,
            lambda one: compile_text(changed(one)[1], topology, True, args.timeout, lambda seconds: bar.refresh()),
            args.max_compiles, UserError, told)
    if args.json:
        found = [{'flags': one.candidate.flags, 'fits': one.fits,
                  'seconds': one.seconds if one.facts else None, 'serial_seconds': one.serial_seconds if one.facts else None,
                  'peak_bytes': one.facts.peak_bytes if one.facts else None, 'why': one.why} for one in tried]
        settings = {'config': args.config, 'topology': topology.name, 'slices': topology.slices, 'candidates': len(every),
                    'usable_bytes': topology.chip.usable_bytes, 'tried': found}
        if write_report(json.dumps(settings, indent=1), args.json):
            return 0 if any(one.fits for one in tried) else 1
    print(f'{args.config} on {topology}: {len(tried)} of {len(every)} settings compiled up to buffer assignment, not run')
    print('\n'.join(aligned(report.ranking(tried))))
    if tried and tried[0].fits:
        print(f'best: {" ".join(tried[0].candidate.flags)}')
        return 0
    print(search_advice(topology, left))
    return 1


def search_advice(topology: Topology, left: int) -> str:
    """What to do where nothing that was compiled fits.

    left: settings that were not compiled and may fit.
    """
    if left:
        return f'none of them fits, but {left} settings are left that may; let it compile more with --max-compiles.'
    more = larger(topology)
    other = f'try --topology {more.name}' if more else f'{topology.kind} has no larger slices: take another chip'
    return f'nothing fits by estimate or by compilation; {other}, or --tensor 2,4.'
