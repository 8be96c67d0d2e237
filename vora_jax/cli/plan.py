"""`vora plan`: compiles the training step for devices that are not there."""
import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

import tqdm

from vora_jax.cli import gin_config
from vora_jax.cli.json_report import write_report
from vora_jax.cli.text_table import aligned
from vora_jax.types import UserError

HELP = """Compile the real training step of a stage for a TPU topology (or for GPUs) without having one: memory of each
device against what it has, what devices send each other, FLOPs, and the shortest time a step can take.

No data, checkpoint or tokenizer is read: sizes come from the configuration. Needs the extra `plan` for TPUs, `cuda` for
GPUs. A 7B model takes minutes; with --quick the compiler is stopped once memory is known, which takes seconds. Nothing is
run: times are bounds, not measurements.
"""
EXAMPLE = """vora plan configs/vora/pretrain_7b.gin --topology v5p:4x4x4 --gin.Mesh.data=4 --gin.Mesh.fsdp=16
vora plan configs/vora/pretrain_7b.gin --topology v5e:8x8 --slices 2 --gin.Mesh.data=2 --gin.Train.accumulation=1 --quick
vora plan configs/vora/pretrain_7b.gin --topology v6e:8x8 --search --max-compiles 6"""

# libtpu looks for the TPU machine around it, locks the chips it finds, and hides the warnings that are counted.
TPU_ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
                   'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_MIN_LOG_LEVEL': '0',
                   'TPU_STDERR_LOG_LEVEL': '1'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora plan`."""
    parser.add_argument('config', metavar='CONFIG', help='.gin file of the stage')
    parser.add_argument('--topology', required=True, metavar='CHIP:SHAPE', help='v5e:8x8, v5p:8x8x8, h100:8')
    parser.add_argument('--slices', type=int, default=1, metavar='N', help='slices of that shape; default %(default)s')
    parser.add_argument('--quick', action='store_true', help='stop before code is generated')
    parser.add_argument('--search', action='store_true',
                        help='compile (quickly) the most promising meshes, remat policies and accumulations, and rank those '
                             'that fit')
    parser.add_argument('--tensor', default='1', metavar='SIZES',
                        help='of Mesh.tensor that --search tries; default %(default)s')
    parser.add_argument('--max-compiles', type=int, default=8, metavar='N', help='of --search; default %(default)s')
    parser.add_argument('--timeout', type=float, default=3600, metavar='SECONDS',
                        help='of a compilation; default %(default)s')
    parser.add_argument('--keep', metavar='DIR', help='new folder that keeps what the compiler wrote down')
    parser.add_argument('--json', metavar='FILE', help='also write the results there; - prints them instead of the text')


def run(args: argparse.Namespace) -> int:
    """Compiles and reports; 0 when the step fits, 1 when not. UserError on bad input."""
    if args.max_compiles < 1 or args.timeout <= 0:
        raise UserError('--max-compiles and --timeout must be above 0.')
    if args.keep and args.search:
        raise UserError('--keep keeps one compilation, --search makes several; leave one of them out.')
    os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is loaded: this process computes nothing
    from vora_jax.planning import topology as topology_lib  # late: mistakes above are told first
    topology = topology_lib.parse(args.topology, args.slices)
    config, text = gin_config.load('Train', [args.config, *args.gin_files], list(args.gin_bindings))
    from vora_jax.training.config import validate
    validate(config)
    topology_lib.check_installed(topology)
    if args.search:
        from vora_jax.cli.plan_search import run_search
        return run_search(args, config, text, topology, _compile)
    from vora_jax.planning import kept, report, work
    with _progress(f'compiling for {topology}') as progress:
        facts = _compile(text, topology, args.quick, args.timeout, progress, args.keep)
    itemsize = kept.itemsize(config)
    found = {'config': args.config, **report.results(config, topology, facts, itemsize, work.work(config, topology, facts))}
    if args.json and write_report(json.dumps(found, indent=1), args.json):
        return 0 if found['fits'] else 1
    print('\n'.join([args.config, *report.heading(found)]))
    for title, rows in [*report.lines(found), *work.lines(found)]:
        if not rows:
            continue
        print('\n' + '\n'.join(([title] if title else []) + [f'  {line}' for line in aligned(rows)]))
    return 0 if found['fits'] else 1


def _compile(text: str, topology, quick: bool, timeout: float, progress: Callable[[float], None], keep: str | None = None):
    """`planning.facts.Facts` of the configuration of that text, compiled by a child process."""
    from vora_jax.cli.plan_step import REQUEST
    from vora_jax.planning import child, facts, kept, work
    config, _ = gin_config.load('Train', texts=[text])
    with contextlib.ExitStack() as stack:
        folder = _new_folder(keep) if keep else pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix='plan-')))
        request = {'config': text, 'topology': topology.name, 'slices': topology.slices}
        (folder / REQUEST).write_text(json.dumps(request), encoding='utf-8')
        root = str(pathlib.Path(__file__).parents[2])  # the child runs in its folder
        paths = [os.path.abspath(path) for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path]
        environment = os.environ | TPU_ENVIRONMENT | {
            'XLA_FLAGS': child.dump_flags(os.environ.get('XLA_FLAGS', '')), 'PYTHONPATH': os.pathsep.join([root, *paths])}
        command = [sys.executable, '-m', 'vora_jax.cli.plan_step', str(folder)]
        finished = child.run(command, environment, folder, quick, timeout, progress)
        return facts.facts(folder, finished, work.max_loss_chunks(config), kept.itemsize(config))


def _new_folder(name: str) -> pathlib.Path:
    folder = pathlib.Path(name).absolute()  # XLA writes there, wherever it runs
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f'--keep {name} cannot be made ({error.strerror}); give a new folder.') from error
    return folder


@contextlib.contextmanager
def _progress(told: str) -> Iterator[Callable[[float], None]]:
    """A line with the seconds so far, in a terminal; elsewhere one line at the beginning."""
    bar = tqdm.tqdm(total=0, bar_format='{desc} {elapsed}', desc=told, leave=False, disable=None)
    if bar.disable:
        print(f'{told} ...', file=sys.stderr, flush=True)

    def update(_: float) -> None:
        bar.refresh()

    with bar:
        yield update
