"""What is to be run: name, arguments, code, policy."""

import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vora_jax.types import UserError

FOLDER = pathlib.Path('runs', 'launch')
# The strictest of all kinds: Kubernetes puts it into the host names of pods, xpk allows 40 characters.
_NAME = re.compile(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?')
_GIT = re.compile(
    r'git\+(?P<url>((https?|git|file)://|ssh://([\w.-]+@)?|[\w.-]+@(?=[\w.-]+:))[\w.:/~%+-]+?)(@(?P<ref>[\w./-]+))?'
)
_USER = re.compile(r'(git\+)?(https?|git|file)://[^/]*@.*')  # in front of a host name: a password or a token, mostly


@dataclass(frozen=True)
class Job:
    """One run of `vora` on many hosts.

    name: of the run and of what is created for it; letters, digits and '-'.
    arguments: of `vora`, byte for byte.
    environment: variables of every host, in order.
    code: 'checkout' (this folder), 'installed' (the hosts have it), or 'git+URL@REF'.
    accelerator: 'tpu', 'cuda' or 'cpu': the extra that is installed.
    setup: bash that every host runs in the folder of the code before each start.
    max_restarts: after crashes; a user's mistake (exit code 2) is never tried again.
    grace_seconds: between SIGTERM and SIGKILL.
    """

    name: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    code: str = 'checkout'
    accelerator: str = 'tpu'
    max_restarts: int = 10
    grace_seconds: int = 300
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for what a cloud would refuse, or only notice late."""
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"--name {self.name!r} would be refused: use 1 to 40 of a-z, 0-9 and '-', a letter first and no '-' "
                'last; titles with spaces belong in --workdir.'
            )
        if any('\0' in word for word in (*self.arguments, *self.setup)):
            raise UserError('the arguments after -- or --setup contain a NUL byte, which no program can receive; remove it.')
        if _USER.fullmatch(self.code):
            raise UserError(
                '--code: the URL names a user or a token in front of @HOST, which scripts and --dry-run would show; use '
                'git+ssh://git@HOST/REPOSITORY@REF, or a public repository.'
            )
        if self.code not in ('checkout', 'installed') and not _GIT.fullmatch(self.code):
            raise UserError(
                f"--code {self.code!r} is not 'checkout', 'installed' or 'git+https://HOST/REPOSITORY@REF'."
            )
        if self.max_restarts < 0 or self.grace_seconds < 1:
            raise UserError('--max-restarts must be 0 or more, and --grace-seconds 1 or more.')

    @property
    def folder(self) -> pathlib.Path:
        """Where its scripts and logs go on this machine."""
        return FOLDER / self.name

    @property
    def workdir(self) -> str:
        """The value of --workdir; '' without."""
        return value_of('--workdir', self.arguments)

    @property
    def git(self) -> tuple[str, str]:
        """URL and ref of the code; two empty texts if it does not come from git."""
        match = _GIT.fullmatch(self.code)
        return (match['url'], match['ref'] or 'HEAD') if match else ('', '')


def value_of(flag: str, arguments: Sequence[str]) -> str:
    """The value of `--flag VALUE` or `--flag=VALUE`; '' without."""
    for word, following in zip(arguments, (*arguments[1:], '')):
        if word == flag:
            return following
        if word.startswith(flag + '='):
            return word.removeprefix(flag + '=')
    return ''
