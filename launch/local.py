"""Processes of fake CPU devices on this machine."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

from launch.job import Job
from launch.shell import join, quote
from launch.steps import Here, Step
from vora_jax.types import UserError

HELP = 'Several processes of fake CPU devices on this machine: what a pod does, small.'
ACTIONS = ('run',)
CODE = 'installed'
ACCELERATOR = 'cpu'
WORKDIR_ANYWHERE = True
FOLLOW_SECONDS = 10  # for the others, once one has failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how many."""
    parser.add_argument('--processes', type=int, default=2, metavar='N', help='(default: %(default)s)')
    parser.add_argument('--devices', type=int, default=1, metavar='N', help='of each process (default: %(default)s)')


def steps(job: Job, args: argparse.Namespace, action: str) -> list[Step]:
    """The one step."""
    if args.processes < 1 or args.devices < 1:
        raise UserError('--processes and --devices must be 1 or more.')
    if job.code != 'installed':
        raise UserError('--code: local runs what is installed beside this Python; leave it out.')
    if job.setup:
        raise UserError('--setup: local starts on this machine; do it here first, and leave it out.')
    argv = [sys.executable, '-m', 'vora_jax.cli.main', *job.arguments]

    def variables(port: str) -> list[dict[str, str]]:
        return [who(job, args, number, port) for number in range(args.processes)]

    lines = [
        f'{" ".join(f"{name}={quote(value)}" for name, value in each.items())} {join(argv)} '
        f'>{job.folder}/logs/{number}.log 2>&1 &'
        for number, each in enumerate(variables(str(_free_port())))
    ]
    text = '\n'.join([f'mkdir -p {job.folder}/logs', *lines, 'wait'])
    return [Here(text, lambda: supervise(job, argv, variables(str(_free_port()))))]


def who(job: Job, args: argparse.Namespace, number: int, port: str) -> dict[str, str]:
    """The variables of one process."""
    devices = f'--xla_force_host_platform_device_count={args.devices}'
    variables = dict(job.environment)
    return variables | {
        'XLA_FLAGS': f'{variables.get("XLA_FLAGS", "")} {devices}'.strip(),
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': str(args.processes),
        'JAX_PROCESS_ID': str(number),
    }


def supervise(job: Job, argv: list[str], variables: list[dict[str, str]]) -> int:
    """Runs the processes, each with a log of its own; that of process 0 is shown here too.

    SIGTERM and Ctrl-C go on to all of them as SIGTERM, so that they save; a second one ends them.

    Returns:
        0 complete, 143 or 130 stopped by SIGTERM or Ctrl-C, 2 a user's mistake, 1 if a process crashed: its log's end
        is shown, and the others are ended.
    """
    logs = job.folder / 'logs'
    logs.mkdir(parents=True, exist_ok=True)
    files = [open(logs / f'{number}.log', 'wb') for number in range(len(variables))]
    shown = open(logs / '0.log', 'rb')
    processes: list[subprocess.Popen] = []
    told: list[int] = []

    def tell(number: int, _: object) -> None:
        told.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if len(told) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for each, file in zip(variables, files):
            if told:
                break
            # A session of their own: the terminal's Ctrl-C reaches this program only.
            processes.append(
                subprocess.Popen(argv, env=os.environ | each, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            )
        guilty = _watch(processes, shown)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, old in previous.items():
            signal.signal(number, old)
        for file in (*files, shown):
            file.close()
    if told and (guilty is None or processes[guilty].returncode < 0):  # ended before it could save, or by a second signal
        return {signal.SIGTERM: 143, signal.SIGINT: 130}[told[0]]
    if guilty is None:
        return 0
    code = processes[guilty].returncode
    end = (logs / f'{guilty}.log').read_text(errors='replace').splitlines()[-20:]
    what = f'was ended by {signal.Signals(-code).name}' if code < 0 else f'ended first, with exit code {code}'
    print(
        '\n'.join([f'launch: process {guilty} {what}; the end of {logs / f"{guilty}.log"}:', *end]), file=sys.stderr
    )
    return code if code in (2, 130) else 1


def _watch(processes: list[subprocess.Popen], shown: object) -> int | None:
    """The number of the process that failed first, or None when all have ended well."""
    guilty, deadline = None, float('inf')
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        sys.stdout.write(shown.read().decode(errors='replace'))
        sys.stdout.flush()
        if guilty is None:
            guilty = _guilty(processes)
            deadline = float('inf') if guilty is None else time.monotonic() + FOLLOW_SECONDS
        time.sleep(0.1)
    sys.stdout.write(shown.read().decode(errors='replace'))
    return _guilty(processes) if guilty is None else guilty


def _guilty(processes: list[subprocess.Popen]) -> int | None:
    """Of those that have failed by now: one that a signal ended comes first, as the others fail because of it."""
    failed = [number for number, process in enumerate(processes) if process.poll()]
    return min(failed, key=lambda number: (processes[number].returncode > 0, number), default=None)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]
