"""TPU VMs: gcloud creates, copies, starts."""

import argparse

from launch import topology, worker
from launch.job import Job
from launch.steps import Command, Ensure, File, Step, fetch
from vora_jax.types import UserError

HELP = 'One Cloud TPU slice, created with gcloud, or one that is there.'
ACTIONS = ('create', 'run', 'logs', 'stop', 'delete')
CODE = 'checkout'
ACCELERATOR = 'tpu'
WORKDIR_ANYWHERE = False
SENDS_COMMIT = True
GROUP = ('gcloud', 'compute', 'tpus', 'tpu-vm')
DEAD = ('PREEMPTED', 'TERMINATED')
PASSING = ('CREATING', 'STARTING', 'RESTARTING', 'REIMAGING', 'REPAIRING', 'STOPPING', 'DELETING')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what gcloud needs to know."""
    parser.add_argument('--zone', required=True, help='for example us-east5-a')
    parser.add_argument('--project', help='else that of `gcloud config`')
    parser.add_argument(
        '--topology', metavar='T', help='v5e:8x8, v5p:4x4x4, ...: creates the slice unless it is there'
    )
    parser.add_argument('--runtime', metavar='VERSION', help='software of the VMs, else the usual one of the TPU')
    parser.add_argument('--spot', action='store_true', help="cheaper, and taken away at 30 seconds' notice")
    parser.add_argument('--service-account', metavar='EMAIL', help='identity of the VMs, which opens gs:// for them')


def raise_without_topology(args: argparse.Namespace, action: str, size: str) -> None:
    """UserError for an action that cannot do without it; `size` names the arguments that tell how many hosts there are."""
    if args.topology:
        return
    if action == 'create':
        raise UserError('create needs --topology, for example v5e:4x4.')
    if action == 'logs':
        raise UserError(f'logs needs {size}, as in the command that created it: each host is asked for its log.')


def steps(job: Job, args: argparse.Namespace, action: str) -> list[Step]:
    """The steps of an action."""
    raise_without_topology(args, action, '--topology')
    where, everyone = location(args), ('--worker=all',)
    create = [create_slice(job, args)] if args.topology else []
    return {
        'create': lambda: create,
        'run': lambda: [*create, *start(job, GROUP, (*where, *everyone))],
        'logs': lambda: fetch_logs(job, GROUP, where, [()], topology.parse(args.topology).hosts),
        'stop': lambda: [stop(job, GROUP, (*where, *everyone))],
        'delete': lambda: [Command((*GROUP, 'delete', job.name, *where, '--quiet'))],
    }[action]()


def location(args: argparse.Namespace) -> tuple[str, ...]:
    """gcloud's flags for where."""
    return (f'--zone={args.zone}', *([f'--project={args.project}'] if args.project else []))


def hardware(args: argparse.Namespace, runtime_flag: str) -> tuple[str, ...]:
    """gcloud's flags for what."""
    tpus = topology.parse(args.topology).by_count()
    return (
        f'--accelerator-type={tpus.accelerator_type}',
        f'{runtime_flag}={args.runtime or topology.GENERATIONS[tpus.kind].runtime}',
        *([f'--service-account={args.service_account}'] if args.service_account else []),
        *(['--spot'] if args.spot else []),
    )


def create_slice(job: Job, args: argparse.Namespace) -> Ensure:
    """Creates the slice unless it is there. One that was preempted is still described, but never comes back."""
    where = location(args)
    return Ensure(
        f'the slice {job.name}',
        (*GROUP, 'describe', job.name, *where, '--format=value(state)'),
        (*GROUP, 'create', job.name, *where, *hardware(args, '--version')),
        (*GROUP, 'delete', job.name, *where, '--quiet'),
        DEAD,
        PASSING,
        ('STOPPED',),
    )


def start(job: Job, group: tuple[str, ...], hosts: tuple[str, ...]) -> list[Step]:
    """Copies code and scripts to all hosts, starts the worker there, detached from this machine, and follows.

    Started everywhere before any is followed: gcloud sends commands to at most 64 hosts of a queued resource at once,
    and waits for these before it sends them to the next ones (--batch-size=all means 64 too).

    Args:
        job: Job
        group: gcloud's words before `ssh` and `scp`.
        hosts: gcloud's flags that choose the hosts.
    """
    source = 'git' if job.git[0] else {'checkout': 'tar', 'installed': 'installed'}[job.code]
    folder = f'"$HOME"/{job.name}'
    status = f"trap 'echo $? >{folder}/status' EXIT"  # for start.sh, which watches
    text = worker.script(job, [status], job.max_restarts, worker.install_lines(job, source, folder))
    files = [
        File(job.folder / 'worker.sh', text),
        File(job.folder / 'start.sh', _START.replace('NAME', job.name)),
        File(job.folder / 'follow.sh', _FOLLOW.replace('NAME', job.name)),
    ]
    pack = (
        [Command(('git', 'archive', '--format=tar.gz', f'--output={job.folder / "code.tar.gz"}', 'HEAD'))]
        if source == 'tar'
        else []
    )
    sent = [str(file.path) for file in files] + [str(job.folder / 'code.tar.gz')] * bool(pack)
    return [
        *files,
        *pack,
        Command((*group, 'ssh', job.name, *hosts, f'--command=mkdir -p {job.name}')),
        Command((*group, 'scp', *sent, f'{job.name}:{job.name}/', *hosts)),
        Command((*group, 'ssh', job.name, *hosts, f'--command=bash {job.name}/start.sh')),
        Command((*group, 'ssh', job.name, *hosts, f'--command=bash {job.name}/follow.sh')),
    ]


_START = """#!/usr/bin/env bash
# Starts worker.sh in a session of its own, unless it runs.
set -euo pipefail
{
cd "$HOME/NAME"
if [[ -e pid ]] && kill -0 "$(cat pid)" 2>/dev/null; then
    cmp -s worker.sh running.sh || { echo "launch: $(hostname) still runs another command; stop it first." >&2; exit 2; }
else
    cp worker.sh running.sh
    rm -f status
    touch log
    setsid nohup bash running.sh >>log 2>&1 </dev/null &
    echo "$!" >pid
fi
}
"""

# When the connection breaks, training goes on, and the same command follows again.
_FOLLOW = """#!/usr/bin/env bash
# Prints the log of worker.sh until it ends; with its exit code.
set -euo pipefail
{
cd "$HOME/NAME"
tail --pid="$(cat pid)" --lines=100 --follow=name log
exit "$(cat status 2>/dev/null || echo 1)"
}
"""


def fetch_logs(
    job: Job, group: tuple[str, ...], where: tuple[str, ...], nodes: list[tuple[str, ...]], hosts: int
) -> list[Step]:
    """Writes the log of each host to a file of its own, by what ssh prints (gcloud's --output-directory loses its path).

    Args:
        job: Job
        group: gcloud's words before `ssh`.
        where: gcloud's flags for where.
        nodes: gcloud's flags for each slice.
        hosts: of each slice.
    """
    return fetch(
        job.folder / 'logs',
        {
            (f'{number}-{host}.log' if len(nodes) > 1 else f'{host}.log'): (
                (*group, 'ssh', job.name, *where, *node, f'--worker={host}', f'--command=cat {job.name}/log')
            )
            for number, node in enumerate(nodes)
            for host in range(hosts)
        },
    )


def stop(job: Job, group: tuple[str, ...], hosts: tuple[str, ...]) -> Command:
    """Tells all hosts to save and stop."""
    return Command((*group, 'ssh', job.name, *hosts, f'--command=kill -TERM "$(cat {job.name}/pid)"'))
