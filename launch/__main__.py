"""`python -m launch KIND`: chooses a kind, prints or runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from launch import asked, flags, steps
from launch.job import Job
from vora_jax.types import UserError

KINDS = ('local', 'tpu-vm', 'queued-resource', 'xpk', 'jobset', 'skypilot', 'slurm')
_EPILOG = """everything after -- are the arguments of `vora`; they arrive as they are. launch/README.md has more examples:

  python -m launch local --name trial --processes 2 -- train configs/quickstart/lm.gin --workdir runs/trial
  python -m launch tpu-vm --name pod --zone us-east5-a --topology v5e:8x8 --dry-run -- train CONFIG --workdir gs://BUCKET/run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Launches; 0 when done, 2 for a user's mistake (told in one sentence), else the exit code of what failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index('--') if '--' in words else len(words)
    try:
        asked.raise_if_bare(words[:cut])
        args = parser().parse_args(words[:cut])
        planned = plan(args, tuple(words[cut + 1 :]))
        if not args.dry_run:
            return steps.run(planned, 'once its cause is removed, the same command goes on where it stopped.')
        print(steps.show(planned), end='')
        return 0
    except UserError as error:
        print(f'launch: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('launch: interrupted; what runs elsewhere goes on; `stop` or `delete` ends it.', file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line: a parser for each kind."""
    top = argparse.ArgumentParser(
        prog='python -m launch',
        description='Starts `vora` on pods, clusters and fake devices.',
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = top.add_subparsers(dest='kind', required=True, metavar='KIND')
    for name in KINDS:
        kind = module(name)
        one = kinds.add_parser(
            name,
            help=kind.HELP,
            description=kind.HELP,
            allow_abbrev=False,
            usage=f'python -m launch {name} [{"|".join(kind.ACTIONS)}] --name NAME ... -- VERB ...',
        )
        one.add_argument('action', nargs='?', default='run', choices=kind.ACTIONS, help='(default: run)')
        one.add_argument('--name', required=True, help="of the run and of what is created for it: a-z, 0-9 and '-'")
        one.add_argument('--dry-run', action='store_true', help='print the commands and files, and run nothing')
        kind.add_arguments(one)
        one.add_argument(
            '--code',
            default=kind.CODE,
            metavar='WHERE',
            help="'checkout' (this folder), 'installed', or git+https://HOST/REPOSITORY@REF (default: %(default)s)",
        )
        one.add_argument(
            '--env', action='append', default=[], metavar='NAME=VALUE', help='a variable of every host (repeatable)'
        )
        one.add_argument(
            '--setup',
            action='append',
            default=[],
            metavar='BASH',
            help='what every host does before vora starts, such as a copy from gs:// (repeatable)',
        )
        one.add_argument(
            '--tpu-flags',
            action='append',
            default=[],
            choices=flags.TPU_FLAGS,
            metavar='SET',
            help=f'libtpu flags, see launch/flags.py: {", ".join(flags.TPU_FLAGS)} (repeatable)',
        )
        one.add_argument(
            '--max-restarts', type=int, default=10, metavar='N', help='after crashes (default: %(default)s)'
        )
        one.add_argument(
            '--grace-seconds',
            type=int,
            default=300,
            metavar='S',
            help='between SIGTERM and SIGKILL, where the kind can say it: a step, a save, 30 s (default: %(default)s)',
        )
    return top


def module(kind: str) -> ModuleType:
    """The module of a kind: HELP, ACTIONS, CODE, ACCELERATOR, WORKDIR_ANYWHERE, add_arguments and steps; SENDS_COMMIT if
    its checkout is the last commit."""
    return importlib.import_module('launch.' + kind.replace('-', '_'))


def plan(args: argparse.Namespace, arguments: tuple[str, ...]) -> list[steps.Step]:
    """What the command line asks for. UserError for mistakes in it."""
    kind = module(args.kind)
    if args.action == 'run':
        sends_commit = getattr(kind, 'SENDS_COMMIT', False) and args.code == 'checkout'
        asked.check(arguments, args.code, kind.WORKDIR_ANYWHERE, sends_commit)
    accelerator = 'cuda' if getattr(args, 'gpus', None) else kind.ACCELERATOR
    job = Job(
        args.name,
        arguments,
        flags.environment(accelerator, args.tpu_flags, args.env),
        args.code,
        accelerator,
        args.max_restarts,
        args.grace_seconds,
        tuple(args.setup),
    )
    return kind.steps(job, args, args.action)


if __name__ == '__main__':
    sys.exit(main())
