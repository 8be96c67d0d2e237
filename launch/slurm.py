"""SLURM: GPUs of a cluster with shared folders."""

import argparse

from launch import worker
from launch.job import Job
from launch.steps import Command, File, Step
from vora_jax.types import UserError

HELP = 'GPUs of a SLURM cluster; run it on a login node, in a checkout on a file system that all nodes share.'
ACTIONS = ('run', 'logs', 'stop', 'delete')
CODE = 'checkout'
ACCELERATOR = 'cuda'
WORKDIR_ANYWHERE = True  # the present folder is shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what SLURM needs to know."""
    parser.add_argument('--nodes', type=int, required=True, metavar='N')
    parser.add_argument('--gpus', type=int, default=8, metavar='N', help='of each node (default: %(default)s)')
    parser.add_argument(
        '--cpus-per-task', type=int, default=8, metavar='N', help='CPUs of each process, for its data (default: %(default)s)'
    )
    parser.add_argument(
        '--sbatch',
        action='append',
        default=[],
        metavar='OPTION',
        help='one more option of sbatch, for example --sbatch=--partition=gpu (repeatable)',
    )


def steps(job: Job, args: argparse.Namespace, action: str) -> list[Step]:
    """The steps of an action."""
    if args.nodes < 1 or args.gpus < 1 or args.cpus_per_task < 1:
        raise UserError('--nodes, --gpus and --cpus-per-task must be 1 or more.')
    wrong = next((option for option in args.sbatch if not option.startswith('--')), None)
    if wrong is not None:
        raise UserError(f'--sbatch={wrong!r} is no long option; write for example --sbatch=--partition=gpu.')
    stop, logs = job.folder / 'stop', job.folder / 'logs'
    cancel = ('scancel', '--me', f'--name={job.name}')
    if action == 'logs':
        return [
            Command(
                ('tail', '--lines=30', *(str(logs / f'{number}.log') for number in range(args.nodes * args.gpus)))
            )
        ]
    if action == 'stop':
        # The file first: what starts meanwhile ends by itself. A signal does not reach what waits.
        return [
            File(stop, 'asked for\n'),
            Command((*cancel, '--state=PENDING')),
            Command((*cancel, '--state=RUNNING', '--signal=TERM')),
        ]
    if action == 'delete':
        return [Command(cancel)]
    return [
        File(job.folder / 'worker.sh', worker.script(job)),
        File(job.folder / 'job.sbatch', batch(job, args)),
        Command(('mkdir', '-p', str(logs))),  # srun does not make it
        Command(('rm', '-f', str(stop))),
        *_install(job),
        Command(('sbatch', *args.sbatch, str(job.folder / 'job.sbatch'))),
    ]


def _install(job: Job) -> list[Step]:
    """Installs on the login node, once for each version: compute nodes often have no internet."""
    lines = _install_lines(job)
    if not lines:
        return []
    path = job.folder / 'install.sh'
    head = ['#!/usr/bin/env bash', 'set -euo pipefail', f'folder=$PWD/{job.folder}', worker.SAY]
    return [File(path, '\n'.join([*head, *lines]) + '\n'), Command(('bash', str(path)))]


def _install_lines(job: Job) -> list[str]:
    source = 'git' if job.git[0] else {'checkout': 'here', 'installed': 'installed'}[job.code]
    return worker.install_lines(job, source, '"$folder"')


def batch(job: Job, args: argparse.Namespace) -> str:
    """The batch script: starts a process for every GPU, and asks to be queued again after a crash."""
    lines = [
        '#!/usr/bin/env bash',
        f'#SBATCH --job-name={job.name}',
        f'#SBATCH --nodes={args.nodes}',
        # JAX takes one GPU a process under SLURM, by SLURM_LOCALID; all are visible to all (no --gpus-per-task).
        f'#SBATCH --ntasks-per-node={args.gpus}',
        f'#SBATCH --gpus-per-node={args.gpus}',
        f'#SBATCH --cpus-per-task={args.cpus_per_task}',
        f'#SBATCH --output={job.folder}/slurm.log',
        '#SBATCH --open-mode=append',
        '#SBATCH --requeue',
        # Before the time limit: the trainer saves, and the job goes on from there.
        f'#SBATCH --signal=TERM@{job.grace_seconds}',
        'set -euo pipefail',
        f'folder=$PWD/{job.folder}',
        worker.SAY,
        '[[ ! -e $folder/stop ]] || { say "it was stopped before it started"; exit 0; }',
        *_install_lines(job),  # finds what install.sh made
        'code=0',
        # One process that ends first does not end those that still save (no --kill-on-bad-exit); --wait bounds that.
        # srun does not inherit --cpus-per-task (since 22.05).
        f'srun --cpus-per-task={args.cpus_per_task} --wait={job.grace_seconds} \\',
        '    --open-mode=append --output="$folder/logs/%t.log" \\',
        '    bash "$folder/worker.sh" || code=$?',
        'say "exit code $code"',
        '# 0 complete, 2 a mistake, 130 Ctrl-C: over. Anything else goes on from the last checkpoint.',
        'case $code in 0 | 2 | 130) exit "$code" ;; esac',
        '[[ ! -e $folder/stop ]] || exit 0',
        f'if ((${{SLURM_RESTART_COUNT:-0}} < {job.max_restarts})); then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return '\n'.join(lines) + '\n'
