"""Checks what `vora` is asked for, early."""

import os
import pathlib
import re
import subprocess
from collections.abc import Sequence

from launch.job import value_of
from vora_jax.cli.main import VERBS
from vora_jax.types import UserError

_ALONE = ('--dry-run', '--spot')  # flags of the launcher without a value
_INCLUDE = re.compile(r"""^include\s+['"]([^'"]+)['"]""", re.M)


def raise_if_bare(words: Sequence[str]) -> None:
    """UserError if a verb of `vora` stands before `--`, or without one.

    Args:
        words: Sequence[str] of the command line, up to `--`.
    """
    for before, word in zip(words, words[1:]):
        if word in VERBS and (not before.startswith('--') or '=' in before or before in _ALONE):
            raise UserError(f'-- is missing in front of {word!r}: write ... -- {word} ..., what follows it is for vora.')


def check(arguments: Sequence[str], code: str, workdir_anywhere: bool, sends_commit: bool) -> None:
    """Raises UserError for mistakes that would cost a pod's start.

    Args:
        arguments: Sequence[str] of `vora`.
        code: as Job has it.
        workdir_anywhere: the hosts share the present folder.
        sends_commit: what is sent is the last commit of the present folder.
    """
    if not arguments or arguments[0] not in VERBS:
        raise UserError(
            f'what to run goes after --, a verb of vora first ({", ".join(VERBS)}), for example '
            '-- train CONFIG --workdir DIR.'
        )
    if arguments[0] != 'train':
        return
    configs = _configs(arguments)
    if not any(arguments[at].endswith('.gin') and arguments[at - 1] != '--gin_file' for at in range(1, len(arguments))):
        raise UserError('train needs a configuration, for example -- train configs/vora/pretrain_7b.gin --workdir DIR.')
    workdir = value_of('--workdir', arguments)
    if not workdir:
        raise UserError('train needs --workdir, the folder of the run: gs://BUCKET/FOLDER, or one that all hosts share.')
    if not workdir_anywhere and '://' not in workdir and not workdir.startswith('/'):
        raise UserError(
            f'--workdir {workdir!r} would be a folder of each host alone; use gs://BUCKET/FOLDER, or the absolute '
            'path of a file system that all hosts share.'
        )
    if code == 'checkout':
        for config in configs:
            if not pathlib.Path(config).is_file():
                raise UserError(f'there is no file {config!r} in this folder, which is sent to the hosts; correct its path.')
    if sends_commit:
        _check_committed([path for config in configs for path in (config, *_included(config, set()))])


def _configs(arguments: Sequence[str]) -> list[str]:
    words = (word.removeprefix('--gin_file=') for word in arguments[1:])
    return [word for word in words if word.endswith('.gin') and not word.startswith('--')]


def _included(config: str, seen: set[str]) -> list[str]:
    """The files that a .gin file includes, and theirs."""
    path = pathlib.Path(config)
    if config in seen or not path.is_file():
        return []
    seen.add(config)
    own = [os.path.normpath(path.parent / name) for name in _INCLUDE.findall(path.read_text(errors='replace'))]
    return own + [deeper for name in own for deeper in _included(name, seen)]


def _check_committed(paths: Sequence[str]) -> None:
    """UserError for a file that the last commit has not, or has otherwise."""
    try:
        top = _git('rev-parse', '--show-prefix').stdout.strip()
        listed = set(_git('ls-tree', '-r', '--name-only', 'HEAD', '--', *paths).stdout.splitlines())
        changed = {name.removeprefix(top) for name in _git('diff', '--name-only', 'HEAD', '--', *paths).stdout.splitlines()}
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            '--code checkout sends the last commit of this folder, but git finds none here, or a file outside it; go to a '
            'checkout, or use --code git+https://HOST/REPOSITORY@REF.'
        ) from None
    for path in paths:
        if os.path.normpath(path) not in listed:
            raise UserError(f'{path} is not in the last commit, which is what is sent; commit it.')
        if os.path.normpath(path) in changed:
            raise UserError(f'{path} is not what the last commit has, which is what is sent; commit it.')


def _git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ('git', '-c', 'core.quotePath=false', *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
