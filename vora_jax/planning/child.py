"""Runs a compilation in a child process."""
import json
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vora_jax.planning.compile_step import MODULE, RESULT
from vora_jax.types import UserError

DUMP, ERRORS = 'dump', 'errors.txt'  # in the folder: what XLA writes down, and what goes to stderr
REPORTS = ('memory-usage-report.txt', 'live-range.txt')  # the last that XLA dumps before it generates code
POLL_SECONDS = 0.25


class Finished(NamedTuple):
    """seconds, cpu_seconds, rss_bytes: what it took.    complete: code was generated too, or the program does not fit."""

    seconds: float
    cpu_seconds: float
    rss_bytes: int
    complete: bool


def dump_flags(own: str = '') -> str:
    """XLA_FLAGS of the child: the user's own, then those that write down. XLA splits them at spaces, which a folder's name
    may have: the child runs in its folder.

    own: the user's.
    """
    return f'{own} --xla_dump_to={DUMP} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*{MODULE}.*'.strip()


def run(command: Sequence[str], environment: Mapping[str, str], folder: pathlib.Path, quick: bool, timeout: float,
        progress: Callable[[float], None] = lambda seconds: None) -> Finished:
    """Runs the command until it ends, or, if `quick`, until XLA has assigned the buffers; then it is killed.

    It runs in `folder`, and should call `end_with_parent`. SIGTERM and SIGHUP end it too, as Ctrl-C does, and then this
    process with code 128 + signal.

    Args:
        command: writes RESULT into `folder`, or one sentence about a user's mistake to stderr with exit code 2.
        timeout: seconds after which it is killed.
        progress: is told the seconds so far, several times a second.

    Raises:
        UserError: the command's own, or that it took too long.
        RuntimeError: it failed otherwise; with the end of what it wrote.
    """
    begun = time.monotonic()
    with open(folder / ERRORS, 'wb') as errors:
        child = subprocess.Popen(list(command), env=dict(environment), stdout=subprocess.DEVNULL, stderr=errors,
                                 stdin=subprocess.PIPE, cwd=folder)  # see `end_with_parent`
    ended, killed, sizes = None, '', ()
    before_signals = {}
    try:
        if threading.current_thread() is threading.main_thread():
            before_signals = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)
                              if signal.getsignal(number) not in (signal.SIG_IGN, None)}
        while not ended:
            number, status, usage = os.wait4(child.pid, os.WNOHANG)
            if number:
                ended = status, usage
                break
            progress(time.monotonic() - begun)
            if time.monotonic() - begun > timeout:
                killed = 'timeout'
            elif quick:
                before, sizes = sizes, _report_sizes(folder)
                killed = 'quick' if sizes and sizes == before else ''
            if killed:
                child.kill()
                ended = os.wait4(child.pid, 0)[1:]
            else:
                time.sleep(POLL_SECONDS)
    finally:
        if ended is None:
            child.kill()
            child.wait()
        child.stdin.close()
        for number, handler in before_signals.items():
            signal.signal(number, handler)
    child.returncode = os.waitstatus_to_exitcode(ended[0])  # else Popen would wait for it again
    usage = ended[1]
    if killed == 'timeout':
        raise UserError(f'the compiler did not finish within {timeout:,.0f} s; give it more with --timeout, or take '
                        '--quick.')
    complete = (folder / RESULT).exists()
    if not complete and killed != 'quick':
        _explain(child.returncode, (folder / ERRORS).read_text(encoding='utf-8', errors='replace'))
    return Finished(time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, complete)


def end_with_parent() -> None:
    """Called by the child: it ends when `run` is gone, also by SIGKILL, which closes the pipe that is its stdin."""
    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name='parent', daemon=True).start()


def _end(number: int, _) -> None:
    raise SystemExit(128 + number)


def _report_sizes(folder: pathlib.Path) -> tuple[int, ...]:
    """Sizes of the reports, once all are there."""
    found = [max((path.stat().st_size for path in (folder / DUMP).glob(f'*{MODULE}*{report}')), default=0)
             for report in REPORTS]
    return tuple(found) if all(found) else ()


def _explain(code: int, errors: str) -> None:
    mistakes = [line.removeprefix('vora: ') for line in errors.splitlines() if line.startswith('vora: ')]
    if code == 2 and mistakes:
        raise UserError(mistakes[-1])
    raise RuntimeError(f'the compiler ended with code {code}:\n{errors[-4000:]}')


def read_json(path: pathlib.Path) -> dict:
    """A file that the child wrote; {} where there is none."""
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
