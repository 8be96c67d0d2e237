"""Steps of a launch: printed, or run."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from launch.shell import join, quote
from vora_jax.types import UserError


class File(NamedTuple):
    """A file to write. path: relative to the present folder."""

    path: pathlib.PurePath
    text: str


class Command(NamedTuple):
    """A program to run; a failure ends the launch.

    output: file for its output, else the terminal.
    optional: its failure is told and passed over.
    """

    argv: tuple[str, ...]
    output: pathlib.PurePath | None = None
    optional: bool = False


class Wait(NamedTuple):
    """A question, asked every `every_seconds` until the answer is in `wanted`; one in `hopeless` ends the launch."""

    argv: tuple[str, ...]
    wanted: tuple[str, ...]
    hopeless: tuple[str, ...]
    every_seconds: int = 30


class Ensure(NamedTuple):
    """Something that is to be there once, whatever its state.

    what: it, in a sentence.
    ask: a question; it fails if nothing is there, else prints words, the state among them.
    create, delete: make it; remove what is in one of the states `dead`.
    dead: states that it never leaves.
    passing: states that it leaves by itself: asked again every `every_seconds`.
    stuck: states that only the user can decide about.
    same: a text that the answer holds if what is there is what `create` makes; '' if it always is.
    """

    what: str
    ask: tuple[str, ...]
    create: tuple[str, ...]
    delete: tuple[str, ...]
    dead: tuple[str, ...]
    passing: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    same: str = ''
    every_seconds: int = 30


class Here(NamedTuple):
    """Work of this program itself. text: what `--dry-run` prints for it; run() -> exit code."""

    text: str
    run: Callable[[], int]


Step = File | Command | Wait | Ensure | Here


def fetch(folder: pathlib.PurePath, asked: Mapping[str, tuple[str, ...]]) -> list[Step]:
    """Writes what each program prints to the file of its name in a folder; one that fails is passed over."""
    make = Command(('mkdir', '-p', str(folder)))
    return [make, *(Command(argv, output=folder / name, optional=True) for name, argv in asked.items())]


def show(steps: Sequence[Step]) -> str:
    """What would be run: commands as one would type them, files between two lines that no file contains."""
    return '\n'.join(_show(step) for step in steps) + '\n'


def _show(step: Step) -> str:
    if isinstance(step, File):
        return f'# ---- file {step.path}\n{step.text.rstrip()}\n# ---- end of {step.path}'
    if isinstance(step, Here):
        return step.text
    if isinstance(step, Ensure):
        return _show_ensure(step)
    if isinstance(step, Wait):
        return (
            f'# asks every {step.every_seconds} s until it prints {" or ".join(step.wanted)} '
            f'(gives up at {", ".join(step.hopeless)}):\n{join(step.argv)}'
        )
    line = join(step.argv) + (f' >{join([str(step.output)])}' if step.output else '')
    return line + (' || true' if step.optional else '')


def _show_ensure(step: Ensure) -> str:
    create = join(step.create)
    cases = [
        (('none',), create),
        (step.dead, f'{join(step.delete)} && {create}'),
        (step.passing, f'sleep {step.every_seconds}; continue'),
        (step.stuck, 'echo "$state" >&2; false'),
    ]
    # Whole words: `StartupPolicyCompleted` is not `Completed`.
    lines = [
        f'    {" | ".join("*" + quote(f" {word} ") + "*" for word in words)}) {command} ;;'
        for words, command in cases
        if words
    ]
    if step.same:
        lines += [f'    *{quote(step.same)}*) ;;', '    *) echo "another command runs there" >&2; false ;;']
    ask = f'    state=$({join(step.ask)}) || state=none'
    return '\n'.join(['while :; do', ask, '    case " $state " in', *lines, '    esac', '    break', 'done'])


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
            name = 'the run' if isinstance(step, Here) else join(_argv(step))[:300]
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
    print(f'launch: {join(_argv(step))[:300]}', file=sys.stderr)
    if isinstance(step, Wait):
        return _wait(step)
    if isinstance(step, Ensure):
        return _ensure(step)
    if step.output is None:
        code = subprocess.run(step.argv).returncode
    else:
        os.makedirs(step.output.parent, exist_ok=True)
        with open(step.output, 'wb') as file:
            code = subprocess.run(step.argv, stdout=file).returncode
    return 0 if step.optional else code


def _argv(step: Command | Wait | Ensure) -> tuple[str, ...]:
    return step.create if isinstance(step, Ensure) else step.argv


def _ensure(step: Ensure) -> int:
    """0, or the exit code of the command that failed. UserError for what the user has to decide."""
    told = ''
    while True:
        answer = subprocess.run(step.ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if answer.returncode:  # nothing there; what else it may be, `create` will say
            return subprocess.run(step.create).returncode
        states = answer.stdout.split()
        dead, passing, stuck = (
            next((state for state in states if state in kind), '') for kind in (step.dead, step.passing, step.stuck)
        )
        if dead:
            print(f'launch: {step.what} is {dead}: it is deleted and created again', file=sys.stderr)
            return subprocess.run(step.delete).returncode or subprocess.run(step.create).returncode
        if stuck:
            raise UserError(f'{step.what} is {stuck}, which only you can decide about; start it again, or `delete` it.')
        if not passing:
            if step.same not in answer.stdout:
                raise UserError(f'{step.what} runs another command; `delete` it first, or use another --name.')
            print(f'launch: {step.what} is there already', file=sys.stderr)
            return 0
        if passing != told:
            print(f'launch: {step.what} is {passing}; waits', file=sys.stderr)
            told = passing
        time.sleep(step.every_seconds)


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
