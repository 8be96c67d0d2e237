"""`vora train`: one training stage."""
import argparse
import logging
import sys

from vora_jax.cli import gin_config
from vora_jax.training.config import Train

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


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when the run is complete, 130 when it was stopped and saved. UserError on bad input."""
    files, bindings = [args.config, *args.gin_files], list(args.gin_bindings)
    config, text = gin_config.load('Train', files, bindings)
    if args.init_from:
        entries = (*config.init_from, *args.init_from)
        config, text = gin_config.load('Train', texts=[text], bindings=[f'Train.init_from={entries!r}'])
    _show_messages()
    # Late: mistakes in the configuration are told before JAX and Orbax are loaded.
    from vora_jax.cli.processes import join_processes
    from vora_jax.training.loop import train
    with join_processes():
        complete = train(config, text, args.workdir, _parse)
    return 0 if complete else 130  # 130 stops a script that would go on with the next stage


def _parse(text: str) -> Train:
    return gin_config.load('Train', texts=[text])[0]


def _show_messages() -> None:
    """Our own messages to the terminal, one line each; other packages keep quiet below warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('vora: %(message)s'))
    logger = logging.getLogger('vora_jax')
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
