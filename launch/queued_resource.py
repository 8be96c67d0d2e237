"""Queued resources: waits for TPUs, several slices too."""

import argparse

from launch import topology, tpu_vm
from launch.job import Job
from launch.steps import Command, Ensure, Step, Wait
from vora_jax.types import UserError

HELP = 'Cloud TPU slices that gcloud queues for: one or several, on demand or spot.'
ACTIONS = tpu_vm.ACTIONS
CODE, ACCELERATOR, WORKDIR_ANYWHERE = tpu_vm.CODE, tpu_vm.ACCELERATOR, tpu_vm.WORKDIR_ANYWHERE
SENDS_COMMIT = True
GROUP = ('gcloud', 'compute', 'tpus', 'queued-resources')
DEAD, PASSING = ('FAILED', 'SUSPENDED'), ('SUSPENDING', 'DELETING')  # states from which it never becomes ACTIVE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what gcloud needs to know."""
    tpu_vm.add_arguments(parser)
    parser.add_argument(
        '--slices',
        type=int,
        default=1,
        metavar='N',
        help='slices of this topology, joined by the data centre network',
    )
    parser.add_argument('--valid-for', metavar='TIME', help='how long to wait in the queue, for example 6h')


def steps(job: Job, args: argparse.Namespace, action: str) -> list[Step]:
    """The steps of an action."""
    tpu_vm.raise_without_topology(args, action, '--topology and --slices')
    if args.slices < 1:
        raise UserError('--slices must be 1 or more.')
    where = tpu_vm.location(args)
    hosts = (*where, '--node=all', '--worker=all')
    create = _create(job, args, where) if args.topology else []
    return {
        'create': lambda: create,
        'run': lambda: [*create, *tpu_vm.start(job, GROUP, hosts)],
        'logs': lambda: tpu_vm.fetch_logs(
            job, GROUP, where, [(f'--node={node}',) for node in range(args.slices)], topology.parse(args.topology).hosts
        ),
        'stop': lambda: [tpu_vm.stop(job, GROUP, hosts)],
        'delete': lambda: [Command(_delete(job, where))],
    }[action]()


def _create(job: Job, args: argparse.Namespace, where: tuple[str, ...]) -> list[Step]:
    """Asks for the slices unless they were asked for, and waits until they are there. A preempted request is SUSPENDED
    and never comes back: another takes its place.

    The slices of one request know of each other: the machines carry MEGASCALE_COORDINATOR_ADDRESS, _NUM_SLICES and
    _SLICE_ID in their metadata, where JAX and libtpu read them. Slices that are created one by one do not.
    """
    nodes = (
        (f'--node-count={args.slices}', f'--node-prefix={job.name}')
        if args.slices > 1
        else (f'--node-id={job.name}',)
    )
    until = (f'--valid-until-duration={args.valid_for}',) if args.valid_for else ()
    describe = (*GROUP, 'describe', job.name, *where)
    return [
        Ensure(
            f'the request {job.name}',
            (*describe, '--format=value(state.state)'),
            (*GROUP, 'create', job.name, *where, *nodes, *tpu_vm.hardware(args, '--runtime-version'), *until),
            _delete(job, where),
            DEAD,
            PASSING,
        ),
        Wait((*describe, '--format=value(state.state)'), ('ACTIVE',), DEAD + PASSING),
    ]


def _delete(job: Job, where: tuple[str, ...]) -> tuple[str, ...]:
    return (*GROUP, 'delete', job.name, *where, '--force', '--quiet')
