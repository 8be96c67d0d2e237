"""Which processes form a run: flags, variables, clusters."""

import itertools

import pytest

from vora_jax.cli.cluster import VARIABLES, Place, find_place
from vora_jax.types import UserError

SRUN = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '0'}
GKE = {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1', 'TPU_SKIP_MDS_QUERY': '1', 'KUBERNETES_SERVICE_HOST': 'k',
       'JOB_COMPLETION_INDEX': '1'}
SLICES = {'MEGASCALE_COORDINATOR_ADDRESS': 'a', 'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '0'}
INDEXED_JOB = {'KUBERNETES_SERVICE_HOST': 'k', 'JOB_COMPLETION_INDEX': '1'}
MPIRUN = {'OMPI_MCA_orte_hnp_uri': '65536.0;tcp://10.0.0.1:3', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1'}
WHOLE = ('10.0.0.1:8476', '4', '3')


def place(environment=(), installed=(), **flags):
    named = {f'--{name.replace("_", "-")}': value for name, value in flags.items()}
    return find_place(named, dict(environment), frozenset(installed))


@pytest.mark.parametrize('environment, installed, kind', [
    ({}, (), 'alone'),
    ({}, ('kubernetes',), 'alone'),
    ({}, ('tpu',), 'tpu'),  # a TPU VM; its metadata server tells the rest
    ({'TPU_SKIP_MDS_QUERY': '1'}, ('tpu',), 'alone'),  # chips without a cluster
    ({'JAX_PLATFORMS': 'cpu'}, ('tpu',), 'alone'),  # a trial on a TPU VM's processor
    ({'JAX_PLATFORMS': 'tpu,cpu'}, ('tpu',), 'tpu'),
    (GKE, ('tpu', 'kubernetes'), 'tpu'),
    (GKE | SLICES, ('tpu',), 'tpu'),
    (SRUN, (), 'slurm'),
    ({name: SRUN[name] for name in ('SLURM_JOB_ID', 'SLURM_NTASKS', 'SLURM_PROCID')}, (), 'alone'),  # sbatch without srun
    (MPIRUN, (), 'mpi'),
    (INDEXED_JOB, ('kubernetes',), 'kubernetes'),
    (INDEXED_JOB, (), 'alone'),
    ({'KUBERNETES_SERVICE_HOST': 'k'}, ('kubernetes',), 'alone'),  # a notebook in a pod
])
def test_clusters(environment, installed, kind):
    assert place(environment, installed) == Place(kind)


@pytest.mark.parametrize('by_flag', [*itertools.product([False, True], repeat=3)])
def test_three_values_by_flag_or_variable(by_flag):
    flags = {flag: value for flag, value, here in zip(VARIABLES, WHOLE, by_flag) if here}
    variables = {name: value if not here else 'overruled' for name, value, here in zip(VARIABLES.values(), WHOLE, by_flag)}
    expected = Place('given', '10.0.0.1:8476', 4, 3)
    for cluster in ({}, SRUN, GKE):  # what is told comes before what could be found
        assert find_place(flags, variables | cluster, frozenset({'tpu'} if cluster is GKE else ())) == expected


def test_a_cluster_fills_in_what_is_not_told():
    assert place(SRUN, coordinator='[::1]:99') == Place('slurm', '[::1]:99')
    assert place({'JAX_COORDINATOR_ADDRESS': 'head:1'} | GKE, ('tpu',)) == Place('tpu', 'head:1')


def test_one_process_is_alone_wherever_it_is():
    assert place({'JAX_NUM_PROCESSES': '1'}) == place(GKE, ('tpu',), num_processes='1') == Place('alone')
    assert place(coordinator='a:1', num_processes='1', process_id='0') == Place('alone')


@pytest.mark.parametrize('tasks, gpus, devices', [
    ('1(x2)', '8', tuple(range(8))), ('1', '4', (0, 1, 2, 3)), ('8(x2)', '8', None), ('1(x2)', '', None),
])
def test_one_slurm_task_takes_all_gpus_of_its_machine(tasks, gpus, devices):
    found = place(SRUN | {'SLURM_STEP_TASKS_PER_NODE': tasks, 'SLURM_GPUS_ON_NODE': gpus})
    assert found == Place('slurm', local_devices=devices)


@pytest.mark.parametrize('environment, flags, told', [
    ({}, {'coordinator': 'a:1'}, '--num-processes (or JAX_NUM_PROCESSES) and --process-id (or JAX_PROCESS_ID) as well'),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}, {}, 'needs --coordinator (or JAX_COORDINATOR_ADDRESS) as well'),
    ({'JAX_PROCESS_ID': '1'}, {}, '--num-processes'),
    ({'JAX_COORDINATOR_ADDRESS': 'head'}, {}, "JAX_COORDINATOR_ADDRESS is 'head'; it is HOST:PORT"),
    ({}, {'coordinator': 'a:70000', 'num_processes': '2', 'process_id': '0'}, "--coordinator is 'a:70000'"),
    ({}, {'coordinator': 'a b:1', 'num_processes': '2', 'process_id': '0'}, 'HOST:PORT'),
    ({'JAX_NUM_PROCESSES': 'two'}, {}, "JAX_NUM_PROCESSES is 'two'; it is a whole number"),
    ({}, {'coordinator': 'a:1', 'num_processes': '2', 'process_id': '-1'}, "--process-id is '-1'"),
    ({}, {'coordinator': 'a:1', 'num_processes': '2', 'process_id': '2'}, 'the numbers are 0 to 1'),
    ({}, {'coordinator': 'a:1', 'num_processes': '0', 'process_id': '0'}, 'at least one process'),
    ({'OMPI_COMM_WORLD_SIZE': '4'}, {}, 'started 4 processes'),  # Open MPI 5: four runs would fight for one workdir
    ({'PMI_SIZE': '4'}, {}, 'give each --coordinator'),
])
def test_mistakes_are_one_sentence(environment, flags, told):
    with pytest.raises(UserError) as error:
        place(environment, **flags)
    assert told in str(error.value) and '\n' not in str(error.value)
