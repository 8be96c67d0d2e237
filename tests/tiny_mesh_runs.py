"""Losses of a few steps on a mesh, in one process or several."""
import dataclasses
import functools
import os
import socket
import subprocess
import sys

import numpy as np
import tiny_run

from vora_jax import variants
from vora_jax.batch import Batch
from vora_jax.data.fake import random_segments
from vora_jax.data.packing import Budgets, layout, stack
from vora_jax.method import Method
from vora_jax.nn.modality_mixture import ModalityMixture
from vora_jax.vision.encoder_frontend import Projector

STEPS, ROWS, SLOTS = 5, 16, 32
# Heads that 4 devices of the axis tensor divide, and widths that 8 of fsdp do.
LLM, PATCH = dataclasses.replace(tiny_run.LLM, num_kv_heads=4), dataclasses.replace(tiny_run.EMBED, width=16)
TEACHER = dataclasses.replace(tiny_run.VIT, patch_embed=PATCH, num_heads=4)
ENCODER = dataclasses.replace(TEACHER, patch_embed=dataclasses.replace(PATCH, cls_token=True))


@functools.cache
def method(name: str) -> tuple[Method, str]:
    """(a method, one of its stages): with distillation, or with routed mixtures."""
    if name == 'vora':
        targets = ('q_proj', 'down_proj')
        return variants.vora(LLM, PATCH, TEACHER, 2, num_adapted_layers=2, targets=targets), 'pretrain'
    mixtures = variants.lavin(LLM, ENCODER, Projector(activation='silu', hidden_width=16),
                              ModalityMixture(4, dropout=0.0), taps=(0, 1))
    return mixtures, 'finetune'


def uneven_batch(name: str, seed: int) -> Batch:
    """Rows with many targets, with few, with none (all rows of one of eight devices), of unequal weights; rows without
    pictures."""
    rng, rule = np.random.default_rng(seed), method(name)[0].vision_tokens
    full, text = Budgets(SLOTS, 16, 3, PATCH.patch_size**2 * 3), Budgets(SLOTS)
    rows = [layout(random_segments(rng, text if row % 5 == 0 else full, tiny_run.VOCAB, rule), full, rule=rule)
            for row in range(ROWS)]
    batch = stack(rows)
    weight = rng.uniform(0.2, 3, (ROWS, 1))
    weight[[2, 3, 9]] = 0  # rows 2 and 3 lie on one device
    weight = weight * (rng.random((ROWS, SLOTS)) < rng.choice([0.1, 0.5, 1.0], (ROWS, 1)))
    return batch._replace(loss_mask=(batch.loss_mask * weight).astype(np.float32))


def losses(name: str, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Metrics of each of `STEPS` steps with AdamW on a mesh of these sizes."""
    on, stage = method(name)
    batches = [uneven_batch(name, seed) for seed in range(STEPS)]
    _, state, frozen, step = tiny_run.start(on.stage(stage), batches[0], sizes)
    rows = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        rows.append({key: float(metrics[key]) for key in ('loss', 'lm_loss', 'distill_loss', 'grad_norm')})
    return rows


def losses_of_processes(name: str, sizes: tuple[int, ...], count: int, devices: int) -> list[list[dict[str, float]]]:
    """`losses` as each of `count` new processes with so many devices each tells them."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    flags = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')
    code = f'import tiny_mesh_runs; tiny_mesh_runs.tell({name!r}, {sizes!r})'
    environment = os.environ | {
        'XLA_FLAGS': flags, 'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(count),
        'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), os.environ['PYTHONPATH']])}
    processes = [
        subprocess.Popen([sys.executable, '-c', code], env=environment | {'JAX_PROCESS_ID': str(number)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(count)]
    told = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), '\n'.join(errors[-3000:] for _, errors in told)
    return [[dict(zip(('loss', 'lm_loss', 'distill_loss', 'grad_norm'), map(float, line.split()[1:])))
             for line in out.splitlines() if line.startswith('step ')] for out, _ in told]


def tell(name: str, sizes: tuple[int, ...]) -> None:
    """Prints the losses with nine digits, as one of the processes of a run."""
    from vora_jax.cli.processes import join_processes
    with join_processes():
        for row in losses(name, sizes):
            print('step', *(f'{value:.9g}' for value in row.values()), flush=True)
