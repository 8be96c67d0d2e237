"""The console command `vora`.

Each verb is a module of this package (`import_` for import, a word of Python), imported when it is asked for:

    HELP: str                    what it does, with an example
    EXAMPLE: str                 the example, if HELP has none
    add_arguments(parser)        argparse arguments
    run(args) -> int             exit code; `args.gin_files` and `args.gin_bindings` hold the --gin arguments
"""

import argparse
import importlib
import importlib.metadata
import keyword
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from vora_jax.types import RETRY, TryAgain, UserError

VERBS = {
    'prepare': 'turn a data set into the format that training reads',
    'train': 'run one training stage; the same command resumes it',
    'eval': 'score a checkpoint on tasks',
    'generate': 'answer a question about a picture in the terminal',
    'merge': 'fold the adapters of a checkpoint into its weights',
    'import': 'read a Hugging Face folder as a checkpoint',
    'export': 'write a checkpoint as a PyTorch / Hugging Face folder',
    'verify': 'compare a checkpoint with its exported folder',
    'plan': 'compile a training step for a pod without having one: memory, traffic, bounds',
    'bench': 'measure attention or data feeding on the present hardware',
}
# The others read the configuration that the checkpoint holds.
TAKES_GIN = ('train', 'eval', 'import', 'prepare', 'plan', 'bench')

_GIN_HELP = """gin arguments:
  --gin.NAME=VALUE      set one value, for example --gin.vora.rank=64 or --gin.Train.stage=finetune
  --gin_file FILE       read one more .gin file
  --gin_bindings TEXT   set values, one NAME = VALUE a line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        The exit code: the verb's own, 2 for a user's mistake (told in one sentence), 75 for trouble that may pass
        (so too), 130 after Ctrl-C.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (UserError, TryAgain) as error:
        print(f'vora: {error}', file=sys.stderr)
        return 2 if isinstance(error, UserError) else RETRY
    except KeyboardInterrupt:
        print('vora: interrupted.', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`head`, say) has gone; nothing may be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == '--version':
        print(f'vora {importlib.metadata.version("vora_jax")}')
        return 0
    verb, *arguments = argv
    if verb not in VERBS:
        raise UserError(f'there is no verb {verb!r}{_closest(verb)}')
    module = _import(verb)
    arguments, files, bindings = _split(arguments)
    if (files or bindings) and verb not in TAKES_GIN:
        raise UserError(
            f'{verb} takes no --gin arguments, only {", ".join(TAKES_GIN)} do; leave them out.'
        )
    args = _parser(verb, module).parse_args(arguments)
    args.gin_files, args.gin_bindings = files, bindings
    return module.run(args) or 0


def _overview() -> str:
    rows = '\n'.join(f'  {verb:10}{text}' for verb, text in VERBS.items())
    return (
        f'usage: vora VERB ...\n\nTeaches a language model to see.\n\nverbs:\n{rows}\n\n'
        '`vora VERB --help` shows the arguments of a verb and an example.'
    )


def _import(verb: str) -> ModuleType:
    name = f'{__package__}.{verb}{"_" * keyword.iskeyword(verb)}'
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UserError(f'this version has no {verb!r} yet; see `vora --help`.') from None
        if not (error.name or '').startswith('vora_jax'):
            raise UserError(
                f'{verb} needs the Python package {error.name!r}, which is not installed; '
                'the README lists which extra brings it.'
            ) from error
        raise


def _split(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    if not any(a.startswith('--gin') for a in arguments):
        return arguments, [], []
    from vora_jax.cli.gin_config import split_arguments  # late: other verbs need no gin

    return split_arguments(arguments)


def _parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    example = getattr(module, 'EXAMPLE', '').strip().replace('\n', '\n  ')
    epilog = [_GIN_HELP] * (verb in TAKES_GIN) + [f'example:\n  {example}'] * bool(example)
    parser = argparse.ArgumentParser(
        prog=f'vora {verb}',
        description=module.HELP,
        epilog='\n'.join(epilog),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def _closest(verb: str) -> str:
    from vora_jax.cli.typed_value import did_you_mean  # late: keeps `vora --help` quick

    suggestion = did_you_mean(verb, VERBS)
    return suggestion if suggestion != '.' else f'; there are {", ".join(VERBS)}.'


if __name__ == '__main__':
    sys.exit(main())
