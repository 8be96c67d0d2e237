"""Steps of a launch: printed, or run."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from launch.shell import join
from vora_jax.types import UserError


class File(NamedTuple):
    """A file to write. path: relative to the present folder."""

    path: pathlib.PurePath
    text: str


class Command(NamedTuple):
    """A program to run; a failure ends the launch.

    unless: a question; the command is skipped if that program succeeds.
    output: file for its output, else the terminal.
    optional: its failure is told and passed over.
    """

    argv: tuple[str, ...]
    unless: tuple[str, ...] = ()
    output: pathlib.PurePath | None = None
    optional: bool = False


class Wait(NamedTuple):
    """A question, asked every `every_seconds` until the answer is in `wanted`; one in `hopeless` ends the launch."""

    argv: tuple[str, ...]
    wanted: tuple[str, ...]
    hopeless: tuple[str, ...]
    every_seconds: int = 30


class Here(NamedTuple):
    """Work of this program itself. text: what `--dry-run` prints for it; run() -> exit code."""

    text: str
    run: Callable[[], int]


Step = File | Command | Wait | Here


def show(steps: Sequence[Step]) -> str:
    """What would be run: commands as one would type them, files between two lines that no file contains."""
    return '\n'.join(_show(step) for step in steps) + '\n'


def _show(step: Step) -> str:
    if isinstance(step, File):
        return f'# ---- file {step.path}\n{step.text.rstrip()}\n# ---- end of {step.path}'
    if isinstance(step, Here):
        return step.text
    if isinstance(step, Wait):
        return (
            f'# asks every {step.every_seconds} s until it prints {" or ".join(step.wanted)} '
            f'(gives up at {", ".join(step.hopeless)}):\n{join(step.argv)}'
        )
    line = join(step.argv) + (f' >{join([str(step.output)])}' if step.output else '')
    return (
        f'{join(step.unless)} >/dev/null 2>&1 || {line}'
        if step.unless
        else line + (' || true' if step.optional else '')
    )


def run(steps: Sequence[Step], again: str) -> int:
    """Runs the steps in order.

    Args:
        steps: Sequence[Step]
        again: what to do after a failure that was not asked for; ends its sentence.

    Returns:
        0, or the exit code of the step that failed, which is named. UserError if a program is not installed.
    """
    for step in steps:
        try:
            code = _run(step)
        except FileNotFoundError as error:
            raise UserError(
                f'{error.filename} is not installed here; install it, or use another kind (--dry-run needs none).'
            ) from None
        if code:
            name = 'the run' if isinstance(step, Here) else join(step.argv)[:300]
            end = 'it was stopped, and the same command goes on.' if code in (130, 143) else again
            print(f'launch: exit code {code} from {name}; {end}', file=sys.stderr)
            return code
    return 0


def _run(step: Step) -> int:
    if isinstance(step, File):
        path = pathlib.Path(step.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step.text, encoding='utf-8')
        return 0
    if isinstance(step, Here):
        return step.run()
    print(f'launch: {join(step.argv)[:300]}', file=sys.stderr)
    if isinstance(step, Wait):
        return _wait(step)
    if (
        step.unless
        and subprocess.run(step.unless, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    ):
        print('launch: it is there already', file=sys.stderr)
        return 0
    if step.output is None:
        code = subprocess.run(step.argv).returncode
    else:
        os.makedirs(step.output.parent, exist_ok=True)
        with open(step.output, 'wb') as file:
            code = subprocess.run(step.argv, stdout=file).returncode
    return 0 if step.optional else code


def _wait(step: Wait) -> int:
    told = ''
    while True:
        answer = subprocess.run(step.argv, stdout=subprocess.PIPE, text=True)
        state = answer.stdout.strip()
        if answer.returncode:
            return answer.returncode
        if state != told:
            print(f'launch: {state}', file=sys.stderr)
            told = state
        if state in step.wanted:
            return 0
        if state in step.hopeless:
            return 1
        time.sleep(step.every_seconds)
