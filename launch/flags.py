"""Environment variables and libtpu flags of a run, checked."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from vora_jax.types import UserError

# Compiled away from hardware with libtpu 0.0.42, which knows all of them; none has been timed. `vora plan` with the same
# LIBTPU_INIT_ARGS tells what a set does to memory: compare before you train. The groups follow the lists that MaxText
# publishes (https://github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py).
TPU_FLAGS = {
    'none': (),
    # Gathers of FSDP run beside matrix products, in pieces that are fused with them.
    'overlap': (
        '--xla_tpu_enable_async_collective_fusion=true',
        '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
        '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
        '--xla_tpu_overlap_compute_collective_tc=true',
        '--xla_enable_async_all_gather=true',
    ),
    # Several slices: gradients cross the data centre's network while other layers are still computed.
    'slices': (
        '--xla_tpu_enable_data_parallel_all_reduce_opt=true',
        '--xla_tpu_data_parallel_opt_different_sized_ops=true',
    ),
    # Gradients: an all-reduce whose result is cut becomes a reduce-scatter.
    'scatter': (
        '--xla_tpu_use_minor_sharding_for_major_trivial_input=true',
        '--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1',
        '--xla_tpu_assign_all_reduce_scatter_layout=true',
    ),
    # Kernels may use 96 of 128 MiB of VMEM (v5e, v6e): less is left to fetch the next operands.
    'vmem': ('--xla_tpu_scoped_vmem_limit_kib=98304',),
}

EVERYWHERE = {
    'PYTHONUNBUFFERED': '1',  # a crash must not take the last lines of the log with it
    'PYTHONFAULTHANDLER': '1',  # stacks of all threads when a library aborts
}
BY_ACCELERATOR = {
    # A host that does not see its TPU fails; otherwise it would go on alone, on its CPUs.
    'tpu': {'JAX_PLATFORMS': 'tpu,cpu'},
    'cuda': {'JAX_PLATFORMS': 'cuda,cpu', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92'},
    'cpu': {'JAX_PLATFORMS': 'cpu'},
}
# Who is who is for the launcher and the cluster to say.
_OURS = re.compile(r'JAX_(COORDINATOR_ADDRESS|NUM_PROCESSES|PROCESS_ID)|(MEGASCALE|TPU_WORKER|SLURM|JOB)_.*')
_SECRET = re.compile(r'(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS)?KEY)($|_)', re.I)
_FLAG = re.compile(r'--\w+=\S+')


def environment(accelerator: str, sets: Sequence[str] = (), extra: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
    """The variables of every host.

    Args:
        accelerator: 'tpu', 'cuda' or 'cpu'.
        sets: Sequence[str] keys of TPU_FLAGS.
        extra: Sequence[str] 'NAME=VALUE', which override the others.

    Raises:
        UserError: a name that no shell takes, that the launcher sets, or that looks like a secret; flags that are
            misspelt, or that the installed libtpu does not know.
    """
    variables = EVERYWHERE | BY_ACCELERATOR[accelerator]
    flags = [flag for key in sets for flag in TPU_FLAGS[key]]
    if flags and accelerator != 'tpu':
        raise UserError(f'--tpu-flags {sets[0]} is for TPUs, and this run has none; leave it out.')
    if flags:
        variables['LIBTPU_INIT_ARGS'] = ' '.join(flags)
    for text in extra:
        name, equals, value = text.partition('=')
        _check_variable(name, bool(equals))
        variables[name] = value
    if 'LIBTPU_INIT_ARGS' in variables:
        check_flags(variables['LIBTPU_INIT_ARGS'])
    return tuple(variables.items())


def _check_variable(name: str, has_value: bool) -> None:
    if not has_value or not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', name):
        raise UserError(f'--env {name!r} is not NAME=VALUE; write for example --env JAX_LOG_COMPILES=1.')
    if _OURS.fullmatch(name):
        raise UserError(f'--env {name}: the launcher or the cluster sets it; leave it out.')
    if _SECRET.search(name):
        raise UserError(
            f'--env {name} looks like a secret, which scripts and --dry-run would show; give the machines an identity '
            "(a service account) or the cluster's own secret store instead."
        )


def check_flags(text: str) -> None:
    """Raises UserError for flags that are not `--name=value`, or that libtpu, if it is installed here, refuses."""
    for word in text.split():
        if not _FLAG.fullmatch(word):
            raise UserError(
                f'LIBTPU_INIT_ARGS has {word!r}, which is not --name=value; libtpu would end every process.'
            )
    complaint = libtpu_complaint(text)
    if complaint:
        raise UserError(f'libtpu refuses LIBTPU_INIT_ARGS ({complaint}); correct or remove that flag.')


def libtpu_complaint(flags: str) -> str:
    """What the installed libtpu says against the flags; '' if nothing, or if there is no libtpu. Takes a second."""
    if not (importlib.util.find_spec('libtpu') and importlib.util.find_spec('jax')):
        return ''
    code = "from jax.experimental import topologies; topologies.get_topology_desc('v5e:2x2', platform='tpu')"
    # A topology that is not there: nothing is asked of the machine or of the network.
    fake = {
        'JAX_PLATFORMS': 'cpu',
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
        'TPU_WORKER_HOSTNAMES': 'localhost',
    }
    try:
        done = subprocess.run(
            [sys.executable, '-c', code],
            env=os.environ | fake | {'LIBTPU_INIT_ARGS': flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return ''
    lines = [line for line in done.stdout.splitlines() if line.startswith('ERROR:') and 'flag' in line]
    return lines[0].removeprefix('ERROR: ') if lines else ''
