"""SkyPilot: TPUs or GPUs of many clouds."""

import argparse
import re
from typing import Any

from launch import topology, worker, yaml_text
from launch.job import Job
from launch.steps import Command, File, Step
from vora_jax.types import UserError

HELP = 'TPUs or GPUs that SkyPilot finds in the clouds; with --spot as a managed job that it brings back after preemptions.'
ACTIONS = ('run', 'logs', 'stop', 'delete')
CODE = 'checkout'
ACCELERATOR = 'tpu'
WORKDIR_ANYWHERE = False
PORT = 8476


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what SkyPilot needs to know."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--topology', metavar='T', help='v5e:8x8, v5p:4x4x4, ...: one TPU slice')
    what.add_argument('--gpus', metavar='KIND:N', help='H100:8, ...: of each node')
    parser.add_argument('--nodes', type=int, default=1, metavar='N', help='nodes, with --gpus')
    parser.add_argument('--infra', metavar='CLOUD', help='for example gcp/us-east5/us-east5-a; else the cheapest')
    parser.add_argument('--spot', action='store_true', help='spot machines, as a managed job')


def steps(job: Job, args: argparse.Namespace, action: str) -> list[Step]:
    """The steps of an action."""
    if args.gpus and not re.fullmatch(r'[\w.-]+:[1-9]\d*', args.gpus):
        raise UserError(f'--gpus {args.gpus!r} is not KIND:NUMBER, for example H100:8.')
    if args.nodes < 1 or (args.topology and args.nodes > 1):
        raise UserError('--nodes is 1 or more, and 1 with --topology: a slice is one node of SkyPilot.')
    path = job.folder / 'task.yaml'
    launch = (
        ('sky', 'jobs', 'launch', f'--name={job.name}', '--yes')
        if args.spot
        else ('sky', 'launch', f'--cluster={job.name}', '--yes')
    )
    return {
        'run': lambda: [File(path, yaml_text.dump(task(job, args))), Command((*launch, str(path)))],
        'logs': lambda: [
            Command(
                ('sky', 'jobs', 'logs', f'--name={job.name}', '--sync-down')
                if args.spot
                else ('sky', 'logs', job.name, '--sync-down')
            )
        ],
        'stop': lambda: [_cancel(job, args)],
        'delete': lambda: [_cancel(job, args) if args.spot else Command(('sky', 'down', job.name, '--yes'))],
    }[action]()


def _cancel(job: Job, args: argparse.Namespace) -> Command:
    return Command(
        ('sky', 'jobs', 'cancel', f'--name={job.name}', '--yes')
        if args.spot
        else ('sky', 'cancel', job.name, '--all', '--yes')
    )


def task(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """The task file. Crashes are tried again by the worker; machines that vanish are replaced by SkyPilot."""
    source = 'git' if job.git[0] else {'checkout': 'here', 'installed': 'installed'}[job.code]
    who = (
        []
        if args.topology
        else [
            f'JAX_COORDINATOR_ADDRESS=$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{PORT}',
            'export JAX_COORDINATOR_ADDRESS',
            'export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES',
            'export JAX_PROCESS_ID=$SKYPILOT_NODE_RANK',
        ]
    )
    text = worker.script(job, who, job.max_restarts, worker.install_lines(job, source, f'"$HOME"/{job.name}'))
    return {
        'name': job.name,
        **({'workdir': '.'} if source == 'here' else {}),
        'num_nodes': args.nodes,
        'resources': _hardware(args)
        | ({'infra': args.infra} if args.infra else {})
        | (
            {'use_spot': True, 'job_recovery': {'recover_on_exit_codes': [143]}} if args.spot else {}
        ),  # 143: told to stop
        'run': text,
    }


def _hardware(args: argparse.Namespace) -> dict[str, Any]:
    if args.gpus:
        return {'accelerators': args.gpus}
    tpus = topology.parse(args.topology).by_count()
    return {
        'accelerators': f'tpu-{tpus.accelerator_type}:1',
        'accelerator_args': {'runtime_version': topology.GENERATIONS[tpus.kind].runtime, 'tpu_vm': True},
    }
