"""GKE JobSet: raw YAML for kubectl."""

import argparse
import hashlib
from typing import Any

from launch import topology, worker, yaml_text
from launch.job import Job
from launch.steps import Command, Ensure, File, Step, fetch
from vora_jax.types import UserError

HELP = 'A JobSet of Cloud TPU slices on a GKE cluster that has JobSet installed, as YAML for kubectl.'
ACTIONS = ('run', 'logs', 'delete')
CODE = 'installed'
ACCELERATOR = 'tpu'
WORKDIR_ANYWHERE = False
PYTHON_IMAGE = 'python:3.12'
PORT = 8482  # of JAX's coordinator
GROUP_NAME = 'workers'
MARK = 'launch-files'  # annotation: a digest of what was asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the YAML says about the cluster."""
    parser.add_argument(
        '--topology',
        required=True,
        metavar='T',
        help='v5e:8x8, v5p:4x4x4, ... of each slice; a node pool must have it',
    )
    parser.add_argument('--slices', type=int, default=1, metavar='N', help='slices, one node pool each')
    parser.add_argument('--image', help='one that has vora, see launch/Dockerfile; with --code git+...: any Python')
    parser.add_argument('--namespace', default='default')
    parser.add_argument('--service-account', metavar='NAME', help='Kubernetes account that may read and write gs://')
    parser.add_argument('--spot', action='store_true', help='run on spot nodes')


def steps(job: Job, args: argparse.Namespace, action: str) -> list[Step]:
    """The steps of an action."""
    tpus = topology.parse(args.topology)
    if args.slices < 1:
        raise UserError('--slices must be 1 or more.')
    kubectl = ('kubectl', f'--namespace={args.namespace}')
    if action == 'logs':
        return log_commands(job, kubectl, args.slices, tpus.hosts)
    path = job.folder / 'jobset.yaml'
    # In the foreground: pods that still save keep their names until they are gone.
    delete = (*kubectl, 'delete', 'jobset,configmap', job.name, '--cascade=foreground', '--ignore-not-found')
    if action == 'delete':
        return [Command(delete)]
    asked = documents(job, args, tpus)
    mark = hashlib.sha256('---\n'.join(map(yaml_text.dump, asked)).encode()).hexdigest()[:16]
    asked[1]['metadata']['annotations'][MARK] = mark
    return [
        File(path, '---\n'.join(map(yaml_text.dump, asked))),
        ensure(job, kubectl, f'{{.metadata.annotations.{MARK}}}', mark, (*kubectl, 'apply', f'--filename={path}'), delete),
    ]


def ensure(
    job: Job, kubectl: tuple[str, ...], shown: str, same: str, create: tuple[str, ...], delete: tuple[str, ...]
) -> Ensure:
    """Creates the JobSet of this name. `kubectl apply` would leave one that has ended as it is.

    Args:
        job: Job
        kubectl: the program, and its flags for where.
        shown: jsonpath of a text of the JobSet that tells what it runs.
        same: what that text holds if it runs this.
        create, delete: commands.
    """
    state = '{.status.conditions[?(@.status=="True")].type}'
    return Ensure(
        f'the JobSet {job.name}',
        (*kubectl, 'get', 'jobset', job.name, f'--output=jsonpath={state} {shown}'),
        create,
        delete,
        ('Completed', 'Failed'),
        same=same,
    )


def log_commands(job: Job, kubectl: tuple[str, ...], slices: int, hosts: int) -> list[Step]:
    """Writes the log of each worker to a file of its own; JobSet labels the pods."""
    labels = 'jobset.sigs.k8s.io/jobset-name={},jobset.sigs.k8s.io/job-index={},batch.kubernetes.io/job-completion-index={}'
    return fetch(
        job.folder / 'logs',
        {
            f'{number}-{host}.log': (
                (*kubectl, 'logs', '--tail=-1', '--selector=' + labels.format(job.name, number, host))
            )
            for number in range(slices)
            for host in range(hosts)
        },
    )


def container_install(job: Job, image: str | None) -> list[str]:
    """Bash that brings the code into a container. UserError for a checkout, which is not there, or no code at all."""
    if job.code == 'checkout':
        raise UserError(
            '--code checkout: containers do not see this folder; build an image (launch/Dockerfile) and leave --code '
            'out, or use --code git+https://HOST/REPOSITORY@REF.'
        )
    if job.code == 'installed' and not image:
        raise UserError('--image is missing: name an image that has vora (launch/Dockerfile), or use --code git+https://....')
    return worker.install_lines(job, 'git' if job.git[0] else 'installed', '/tmp/' + job.name)


def documents(job: Job, args: argparse.Namespace, tpus: topology.Slice) -> list[dict[str, Any]]:
    """A ConfigMap with the script, so that Kubernetes does not rewrite its `$$` and `$(...)`, and the JobSet."""
    who = [
        # GKE tells libtpu which host and slice this is (TPU_WORKER_*, MEGASCALE_*); JAX is told in the same order.
        f'export JAX_COORDINATOR_ADDRESS={job.name}-{GROUP_NAME}-0-0.{job.name}:{PORT}',
        f'export JAX_NUM_PROCESSES={args.slices * tpus.hosts}',
        f'export JAX_PROCESS_ID=$((SLICE_INDEX * {tpus.hosts} + JOB_COMPLETION_INDEX))',
    ]
    text = worker.script(job, who, 0, container_install(job, args.image))
    metadata = {'name': job.name, 'namespace': args.namespace}
    return [
        {'apiVersion': 'v1', 'kind': 'ConfigMap', 'metadata': metadata, 'data': {'worker.sh': text}},
        {
            'apiVersion': 'jobset.x-k8s.io/v1alpha2',
            'kind': 'JobSet',
            # All pods of a slice go to one node pool.
            'metadata': metadata
            | {'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}},
            'spec': {
                'network': {'enableDNSHostnames': True, 'publishNotReadyAddresses': True},
                # A crash of one pod fails its Job, and JobSet starts all of them again; a user's mistake ends them.
                'failurePolicy': {
                    'maxRestarts': job.max_restarts,
                    'rules': [
                        {'name': 'mistake', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
                    ],
                },
                'replicatedJobs': [
                    {'name': GROUP_NAME, 'replicas': args.slices, 'template': {'spec': job_spec(job, args, tpus)}}
                ],
            },
        },
    ]


def job_spec(job: Job, args: argparse.Namespace, tpus: topology.Slice) -> dict[str, Any]:
    """The Kubernetes Job of one slice."""
    spot = 'cloud.google.com/gke-spot'
    pod = {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': job.grace_seconds,
        'nodeSelector': {
            'cloud.google.com/gke-tpu-accelerator': topology.GENERATIONS[tpus.kind].gke,
            'cloud.google.com/gke-tpu-topology': tpus.text,
        }
        | ({spot: 'true'} if args.spot else {}),
        'tolerations': [
            {'key': 'google.com/tpu', 'operator': 'Exists'},
            *([{'key': spot, 'operator': 'Exists'}] if args.spot else []),
        ],
        'containers': [
            {
                'name': 'trainer',
                'image': args.image or PYTHON_IMAGE,
                'command': ['bash', '/launch/worker.sh'],
                'env': [
                    {
                        'name': 'SLICE_INDEX',
                        'valueFrom': {
                            'fieldRef': {'fieldPath': "metadata.annotations['jobset.sigs.k8s.io/job-index']"}
                        },
                    }
                ],
                'ports': [{'containerPort': PORT}],
                'resources': {
                    'requests': {'google.com/tpu': tpus.chips // tpus.hosts},
                    'limits': {'google.com/tpu': tpus.chips // tpus.hosts},
                },
                'volumeMounts': [
                    {'name': 'launch', 'mountPath': '/launch'},
                    {'name': 'shared-memory', 'mountPath': '/dev/shm'},
                ],
            }
        ],
        'volumes': [
            {'name': 'launch', 'configMap': {'name': job.name}},
            {'name': 'shared-memory', 'emptyDir': {'medium': 'Memory'}},  # worker processes pass batches through it
        ],
    } | ({'serviceAccountName': args.service_account} if args.service_account else {})
    return {
        'parallelism': tpus.hosts,
        'completions': tpus.hosts,
        'completionMode': 'Indexed',
        'backoffLimit': 0,
        'podFailurePolicy': {
            'rules': [
                {'action': 'FailJob', 'onExitCodes': {'containerName': 'trainer', 'operator': 'In', 'values': [2, 130]}},
            ]
        },
        'template': {'spec': pod},
    }
