"""`vora bench`: measures one thing on the present hardware.

Each kind is a module `bench_KIND` of this package with the contents of a verb's module (see `main`).
"""
import argparse
import importlib

from vora_jax.types import UserError

HELP = """Measure one thing on the present hardware; `vora bench KIND --help` shows its arguments.
"""
EXAMPLE = """vora bench attention --slots 4096 --draw mask.png
vora bench data --decoder pillow,simplejpeg"""

KINDS = {'attention': 'attention over a random packed batch: tile area, time, FLOP/s',
         'data': 'reading, decoding and packing: pictures a second, and what they add to a training step'}
TAKES_GIN = ('data',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora bench`."""
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND')
    for kind, text in KINDS.items():
        module = importlib.import_module(f'{__package__}.bench_{kind}')
        command = kinds.add_parser(kind, help=text, description=module.HELP, epilog=f'example:\n  {module.EXAMPLE}',
                                   allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run_kind=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs the kind; 0 on success. UserError on bad input."""
    if (args.gin_files or args.gin_bindings) and args.kind not in TAKES_GIN:
        raise UserError(f'bench {args.kind} takes no --gin arguments, only bench {", ".join(TAKES_GIN)} does; leave them '
                        'out.')
    return args.run_kind(args)
