"""Finds the other processes of a run."""
import glob
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from vora_jax.types import UserError

VARIABLES = {'--coordinator': 'JAX_COORDINATOR_ADDRESS', '--num-processes': 'JAX_NUM_PROCESSES',
             '--process-id': 'JAX_PROCESS_ID'}
SLURM = {'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID'}  # set by srun
OPEN_MPI = 'OMPI_MCA_orte_hnp_uri'  # mpirun of Open MPI up to 4
MPI_SIZES = ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')  # of Open MPI; of MPICH and its kin
GKE_HOSTS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')


class Place(NamedTuple):
    """Where a process stands in its run.

    kind: 'alone', 'given' (by hand), or the cluster ('tpu', 'slurm', 'mpi', 'kubernetes') on which JAX finds what is None
        here.
    coordinator: host:port of process 0.    count, number: of processes; of this one.
    local_devices: the GPUs this process uses; None leaves it to JAX.
    """

    kind: str
    coordinator: str | None = None
    count: int | None = None
    number: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_place(flags: Mapping[str, str | None], environment: Mapping[str, str], installed: frozenset[str]) -> Place:
    """Where this process stands; flags come before variables, both before what the cluster tells.

    Args:
        flags: values of the keys of `VARIABLES`, None where not given.
        environment: environment variables.
        installed: of 'tpu' (chips and libtpu) and 'kubernetes' (the Python package), what this machine has.

    Raises:
        UserError: values that are no address or number, do not fit together, or are too few.
    """
    values = {flag: flags.get(flag) or environment.get(name) or None for flag, name in VARIABLES.items()}
    coordinator = _address(values['--coordinator'], flags)
    count, number = (_whole(flag, values[flag], flags) for flag in ('--num-processes', '--process-id'))
    if count == 0:
        raise UserError('--num-processes is 0; a run has at least one process.')
    if None not in (count, number) and number >= count:
        raise UserError(f'--process-id is {number}, but with --num-processes {count} the numbers are 0 to {count - 1}.')
    kind = _cluster(environment, installed)
    if count == 1 or (count is None and kind is None and not any(values.values())):
        _refuse_many(environment, kind, count)
        return Place('alone')
    missing = [flag for flag, value in values.items() if value is None]
    if kind is None and missing:
        told = ' and '.join(f'{flag} (or {VARIABLES[flag]})' for flag in missing)
        raise UserError(f'a run of several processes needs {told} as well, since this machine belongs to no cluster that '
                        'JAX knows.')
    return Place(kind if missing else 'given', coordinator, count, number, _slurm_devices(environment, kind))


def this_place(flags: Mapping[str, str | None]) -> Place:
    """`find_place` with the environment of this process."""
    found = {name for name in ('kubernetes',) if importlib.util.find_spec(name)}
    if (glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')) and importlib.util.find_spec('libtpu'):
        found.add('tpu')
    return find_place(flags, os.environ, frozenset(found))


def _cluster(environment: Mapping[str, str], installed: frozenset[str]) -> str | None:
    """The kind of cluster on which JAX finds the processes, or None."""
    variables = set(environment)
    on_tpu = 'tpu' in installed and environment.get('JAX_PLATFORMS', 'tpu').split(',')[0] == 'tpu'
    # GKE sets the hosts; a TPU VM asks its metadata server, unless it is told that there is none.
    if on_tpu and (variables & {*GKE_HOSTS} or 'TPU_SKIP_MDS_QUERY' not in variables):
        return 'tpu'
    if variables >= SLURM:
        return 'slurm'
    if OPEN_MPI in variables:
        return 'mpi'
    if variables >= {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} and 'kubernetes' in installed:
        return 'kubernetes'
    return None


def _refuse_many(environment: Mapping[str, str], kind: str | None, count: int | None) -> None:
    """UserError where a launcher started several processes, each of which would take itself for the whole run."""
    size = next((environment[name] for name in MPI_SIZES if environment.get(name, '').isdigit()), '1')
    if kind is None and count is None and int(size) > 1:
        raise UserError(f'the MPI launcher started {size} processes, but not in a way that tells JAX where they meet; give '
                        'each --coordinator, --num-processes and --process-id.')


def _slurm_devices(environment: Mapping[str, str], kind: str | None) -> tuple[int, ...] | None:
    """All GPUs of the machine where it runs one task only; JAX would take just the first."""
    tasks, gpus = environment.get('SLURM_STEP_TASKS_PER_NODE', ''), environment.get('SLURM_GPUS_ON_NODE', '')
    if kind != 'slurm' or not re.fullmatch(r'1(\(x\d+\))?', tasks) or not gpus.isdigit():
        return None
    return tuple(range(int(gpus)))


def _address(value: str | None, flags: Mapping[str, str | None]) -> str | None:
    match = re.fullmatch(r'(\[[0-9a-fA-F:.%\w]+\]|[\w.-]+):(\d+)', value or '')
    if value is not None and not (match and 0 < int(match[2]) < 65536):
        raise UserError(f'{_name("--coordinator", flags)} is {value!r}; it is HOST:PORT of the machine of process 0.')
    return value


def _whole(flag: str, value: str | None, flags: Mapping[str, str | None]) -> int | None:
    if value is not None and not (value.isascii() and value.isdigit()):
        raise UserError(f'{_name(flag, flags)} is {value!r}; it is a whole number, 0 or more.')
    return None if value is None else int(value)


def _name(flag: str, flags: Mapping[str, str | None]) -> str:
    return flag if flags.get(flag) else VARIABLES[flag]
