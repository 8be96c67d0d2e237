"""`vora train`: one training stage."""
import argparse
import logging
import sys

from vora_jax.cli import gin_config
from vora_jax.cli.cluster import this_place
from vora_jax.training.config import Train
from vora_jax.types import UserError

HELP = 'Run one training stage of a method. The same command resumes it where the last checkpoint left it.'

EXAMPLE = """vora train configs/vora.gin --workdir runs/vora --init-from runs/lm --gin.vora.rank=64
vora train configs/vora.gin --workdir runs/vora --init-from teacher=runs/tagger:encoder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora train`."""
    parser.add_argument('config', metavar='CONFIG', help='.gin file of the stage')
    parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of the run: checkpoints, '
                                                                        'metrics, configuration')
    parser.add_argument(
        '--init-from', action='append', default=[], metavar='CKPT', dest='init_from',
        help='start from the parameters of a checkpoint: CKPT for all that fit, or TARGET=CKPT:SOURCE for a '
             'subtree '
             '(repeatable; added to Train.init_from)',
    )
    parser.add_argument('--profile_steps', '--profile-steps', metavar='FIRST:LAST', default='',
                        help='write a profiler trace of these steps to DIR/profile (sets Train.profile_steps)')
    parser.add_argument('--coordinator', metavar='HOST:PORT', help='of several processes: where the first one is (TPU pods, '
                        'SLURM and mpirun tell it themselves; so does JAX_COORDINATOR_ADDRESS)')
    parser.add_argument('--num-processes', metavar='N', help='how many processes the run has (or JAX_NUM_PROCESSES)')
    parser.add_argument('--process-id', metavar='I', help='which of them this is, from 0 (or JAX_PROCESS_ID)')


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when the run is complete, or saved for a scheduler that wants its machine; 130 when saved after Ctrl-C,
    so that a script does not go on with the next stage. UserError on bad input."""
    flags = {'--coordinator': args.coordinator, '--num-processes': args.num_processes, '--process-id': args.process_id}
    place, mistake = this_place(flags), None
    try:
        config, text = _configuration(args)
    except UserError as error:
        if place.kind == 'alone':  # told before JAX and Orbax are loaded
            raise
        mistake = error
    _show_messages()
    from vora_jax.cli.processes import join_processes
    with join_processes(place) as joined:
        if mistake:
            raise mistake  # now the other processes hear it
        if joined.number:
            _show_messages(f' [{joined.number}]', logging.WARNING)
        from vora_jax.training.loop import train
        from vora_jax.training.prefetch import is_left_behind
        ended = train(config, text, args.workdir, _parse, joined.hang)
    code = 130 if ended == 'interrupted' else 0
    if is_left_behind():
        joined.leave(code, '')
    return code


def _configuration(args: argparse.Namespace) -> tuple[Train, str]:
    files, bindings = [args.config, *args.gin_files], list(args.gin_bindings)
    config, text = gin_config.load('Train', files, bindings)
    if args.init_from:
        entries = (*config.init_from, *args.init_from)
        config, text = gin_config.load('Train', texts=[text], bindings=[f'Train.init_from={entries!r}'])
    if args.profile_steps:
        steps = _first_and_last(args.profile_steps)
        config, text = gin_config.load('Train', texts=[text], bindings=[f'Train.profile_steps={steps!r}'])
    return config, text


def _first_and_last(text: str) -> tuple[int, int]:
    first, _, last = text.partition(':')
    if not (first.isdecimal() and last.isdecimal()):
        raise UserError(f'--profile_steps is {text!r}; give the first and the last step to trace, such as 10:13.')
    return int(first), int(last)


def _parse(text: str) -> Train:
    return gin_config.load('Train', texts=[text])[0]


def _show_messages(who: str = '', level: int = logging.INFO) -> None:
    """Our own messages to the terminal, one line each; other packages keep quiet below warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f'vora{who}: %(message)s'))
    logger = logging.getLogger('vora_jax')
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
