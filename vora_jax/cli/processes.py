"""Joins the processes of a run."""

import contextlib
import glob
import importlib.util
import os
import socket
from collections.abc import Iterator

import jax

HEARTBEAT_SECONDS = 30  # JAX's default leaves a pod idle for 100 s after one of its hosts died
# One process waits for nobody, and JAX aborts a process that missed its own heartbeats: it must outlast
# Ctrl-Z, a laptop's sleep, a paused virtual machine.
ALONE_SECONDS = 30 * 24 * 3600
SHUTDOWN_SECONDS = 30
SLURM = {
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
}  # set by srun


@contextlib.contextmanager
def join_processes() -> Iterator[None]:
    """Initialises `jax.distributed`, for one process too, and leaves it at the end.

    One process alone initialises it as well: its reductions then run in the same order as on several, and
    SIGTERM is answered with a checkpoint. Several processes are found on TPU pods and SLURM by JAX itself;
    elsewhere set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call it before
    anything touches a device.
    """
    together = {'heartbeat_timeout_seconds': HEARTBEAT_SECONDS, 'shutdown_timeout_seconds': SHUTDOWN_SECONDS}
    alone = together | {'heartbeat_timeout_seconds': ALONE_SECONDS, 'cluster_detection_method': 'deactivate'}
    with contextlib.ExitStack() as stack:
        if 'JAX_NUM_PROCESSES' in os.environ:
            number, count = int(os.environ['JAX_PROCESS_ID']), int(os.environ['JAX_NUM_PROCESSES'])
            jax.distributed.initialize(os.environ['JAX_COORDINATOR_ADDRESS'], count, number, **together)
        elif _is_cluster():
            jax.distributed.initialize(**together)
        else:
            address = stack.enter_context(_free_address())
            jax.distributed.initialize(address, 1, 0, coordinator_bind_address=address, **alone)
        try:
            yield
        finally:
            jax.distributed.shutdown()


def _is_cluster() -> bool:
    """True on a TPU machine or below srun or mpirun: where JAX knows how to find the other processes."""
    tpu = bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')) and bool(
        importlib.util.find_spec('libtpu')
    )
    variables = set(os.environ)
    return tpu or 'OMPI_MCA_orte_hnp_uri' in variables or variables >= SLURM


@contextlib.contextmanager
def _free_address() -> Iterator[str]:
    """A local host:port that stays ours: JAX's server crashes the process if another program takes it first.

    The socket is bound but does not listen; SO_REUSEPORT lets the server of this process bind the same port.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(('127.0.0.1', 0))
        yield f'127.0.0.1:{reserved.getsockname()[1]}'
