"""Compiles a run's training step for absent devices.

Runs in a process of its own, which may be killed once the compiler has written down what is asked for.
"""
import json
import pathlib
import time
from typing import Any

import jax

from vora_jax.planning import topology as topology_lib
from vora_jax.planning.abstract_batch import batch_shapes
from vora_jax.planning.memory import held, stack_dims
from vora_jax.training import program
from vora_jax.training.config import Train
from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.attend import language_attention
from vora_jax.training.mesh.row_shards import open_mesh

PLAN, RESULT, TEXT = 'plan.json', 'result.json', 'compiled.txt'  # files in the folder, written in this order
MODULE = 'jit_step'  # as XLA names the compiled step in what it dumps


def compile_step(config: Train, topology: topology_lib.Topology, folder: pathlib.Path) -> None:
    """Writes what the step holds (PLAN), compiles it, and writes what the compiler says (RESULT) and the program (TEXT).

    Raises:
        UserError: an unknown topology, or a mesh that does not fit it or the model.
    """
    # XLA cannot read programs for absent devices back from the cache.
    jax.config.update('jax_enable_compilation_cache', False)
    begun = time.perf_counter()
    devices = topology_lib.devices(topology)
    mesh = open_mesh(config, devices)
    with sharding.use(mesh):
        built = program.build(config, batch_shapes(config), mesh)
        _write(folder / PLAN, {
            'platform': topology.platform, 'mesh': dict(mesh.shape), 'devices': mesh.size, 'held': held(built.plan),
            'stack': stack_dims(built.plan, mesh.shape),
            'attention': language_attention(built.plan.model, built.plan.batch, mesh, config.attention)})
        lowered = built.step.lower(built.plan.state, built.plan.frozen, batch_shapes(config, sharding.rows(mesh)))
        lower_seconds = time.perf_counter() - begun
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            _write(folder / RESULT, {'lower_seconds': lower_seconds, 'exhausted': str(error)})
            return
    memory = compiled.memory_analysis()
    (folder / TEXT).write_text(compiled.as_text(), encoding='utf-8')
    _write(folder / RESULT, {'lower_seconds': lower_seconds, 'peak_bytes': memory.peak_memory_in_bytes,
                             'argument_bytes': memory.argument_size_in_bytes, 'temporary_bytes': memory.temp_size_in_bytes})


def _write(path: pathlib.Path, content: Any) -> None:
    part = path.with_suffix('.part')
    part.write_text(json.dumps(content), encoding='utf-8')
    part.replace(path)
