"""GKE through xpk, which also makes clusters."""

import argparse
import base64
import hashlib

from launch import jobset, topology, worker
from launch.job import Job
from launch.steps import Command, File, Step
from vora_jax.types import UserError

HELP = 'Cloud TPU slices on a GKE cluster, both through xpk.'
ACTIONS = ('create', 'run', 'logs', 'delete', 'delete-cluster')
CODE, ACCELERATOR, WORKDIR_ANYWHERE = jobset.CODE, jobset.ACCELERATOR, jobset.WORKDIR_ANYWHERE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what xpk needs to know."""
    parser.add_argument('--cluster', required=True, help='name of the cluster; `create` makes it')
    parser.add_argument('--zone', required=True, help='for example us-east5-a')
    parser.add_argument('--project', required=True)
    parser.add_argument('--topology', required=True, metavar='T', help='v5e:8x8, v5p:4x4x4, ... of each slice')
    parser.add_argument('--slices', type=int, default=1, metavar='N', help='slices of this topology')
    parser.add_argument('--image', help='one that has vora, see launch/Dockerfile; with --code git+...: any Python')
    parser.add_argument('--spot', action='store_true', help='create: spot nodes')
    parser.add_argument('--reservation', metavar='NAME', help='create: nodes of a reservation')


def steps(job: Job, args: argparse.Namespace, action: str) -> list[Step]:
    """The steps of an action."""
    tpus = topology.parse(args.topology).by_count()
    if args.slices < 1:
        raise UserError('--slices must be 1 or more.')
    where = (f'--cluster={args.cluster}', f'--project={args.project}', f'--zone={args.zone}')
    size = (f'--tpu-type={tpus.accelerator_type}', f'--num-slices={args.slices}')
    if action == 'create':
        capacity = (
            [f'--reservation={args.reservation}'] if args.reservation else ['--spot' if args.spot else '--on-demand']
        )
        return [Command(('xpk', 'cluster', 'create', *where, *size, *capacity))]
    if action == 'delete-cluster':
        return [Command(('xpk', 'cluster', 'delete', *where))]
    delete = ('xpk', 'workload', 'delete', f'--workload={job.name}', *where)
    if action == 'delete':
        return [Command(delete)]
    enter = Command(('xpk', 'workload', 'list', *where, f'--filter-by-job={job.name}'))  # kubectl then asks that cluster
    if action == 'logs':
        return [enter, *jobset.log_commands(job, ('kubectl',), args.slices, tpus.hosts)]
    text = worker.script(job, [_NO_CTRL_C], 0, jobset.container_install(job, args.image))
    return [
        File(job.folder / 'worker.sh', text),
        enter,
        jobset.ensure(
            job,
            ('kubectl',),
            '{.spec.replicatedJobs[*].template.spec.template.spec.containers[*].command}',
            _path(job, text),
            (
                'xpk',
                'workload',
                'create',
                f'--workload={job.name}',
                *where,
                *size,
                f'--docker-image={args.image or jobset.PYTHON_IMAGE}',
                f'--max-restarts={job.max_restarts}',
                '--restart-on-exit-codes=1',  # beside its own 42 and 127 to 255; our 2 is a mistake
                f'--termination-grace-period-seconds={job.grace_seconds}',
                f'--command={in_one_line(job, text)}',
            ),
            delete,
        ),
    ]


# xpk tries 130 again, whatever it is told; 2 it does not.
_NO_CTRL_C = "trap '[[ $? != 130 ]] || exit 2' EXIT"


def _path(job: Job, text: str) -> str:
    """Of the script in the container: another script has another."""
    return f'/tmp/{job.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.sh'


def in_one_line(job: Job, text: str) -> str:
    """A command that is the script. xpk cuts commands at line ends, Kubernetes rewrites `$`: this has neither.

    `exec`, as xpk sends SIGTERM to the first process of the command.
    """
    path = _path(job, text)
    return f'echo {base64.b64encode(text.encode()).decode()} | base64 --decode >{path} && exec bash {path}'
