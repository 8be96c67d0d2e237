"""What the partitioner makes of a step: no activation is gathered or summed whole, and nothing is copied everywhere."""
import types

import jax
import jax.numpy as jnp
import pytest
import tiny_mesh_runs
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax.data.fake import fake_batch
from vora_jax.planning import hlo
from vora_jax.planning.collectives import first_group
from vora_jax.training.config import Guard, Mesh, Optimizer
from vora_jax.training.mesh import sharding
from vora_jax.training.program import build

# Rows, slots and places of patches are multiples of primes that no dimension of a parameter has.
ROWS, SLOTS, PATCHES, PRIMES = 7 * 8, 13 * 4, 11 * 3, (7, 11, 13)
GATHERS = ('all-gather', 'all-gather-start', 'all-reduce', 'all-reduce-start')
WARNING = 'Involuntary full rematerialization'


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_cache():
    """A program from the cache was not partitioned now, and warns of nothing."""
    before = jax.config.jax_enable_compilation_cache
    _use_cache(False)
    yield
    _use_cache(before)


def _use_cache(on):
    compilation_cache.reset_cache()  # JAX asks for the setting once
    jax.config.update('jax_enable_compilation_cache', on)


def activations(compiled, mesh, primes=PRIMES):
    """'opcode shape' of every gather or sum over devices of numbers that belong to rows, slots or patches."""
    found = []
    for instructions in hlo.read(compiled.as_text()).computations.values():
        for one in instructions:
            if one.opcode in GATHERS and len(first_group(one.attributes, mesh)) > 1:  # else over axes of size 1
                found += [f'{one.opcode} {shape.dtype}{list(shape.dims)}' for shape in one.shapes
                          if shape.dtype in ('f32', 'bf16') and any(dim % p == 0 for dim in shape.dims for p in primes)]
    return found


def compile_tiny(mesh_config, accumulation):
    """The program that `vora train` would run."""
    method, title = tiny_mesh_runs.method('vora')
    config = types.SimpleNamespace(
        method=method, stage=title, batch_rows=ROWS, accumulation=accumulation, optimizer=Optimizer(), mesh=mesh_config,
        seed=0, frozen_dtype='float32', attention='auto', guard=Guard(), data=types.SimpleNamespace(max_slots=SLOTS))
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:8])
    batch = fake_batch(ROWS, SLOTS, PATCHES, 4, tiny_mesh_runs.LLM.vocab_size, 3, 0)
    with sharding.use(mesh):
        plan, step = build(config, batch, mesh)
        assert not any(dim % p == 0 for shape in plan.params.values() for dim in shape.shape for p in PRIMES)
        return step.lower(plan.state, plan.frozen, batch).compile()


@pytest.mark.parametrize('mesh, accumulation', [
    (Mesh(2, 4), 1), slow(Mesh(1, 8), 1), slow(Mesh(2, 4), 7), slow(Mesh(2, 2, context=2), 1),
    slow(Mesh(2, 4, gather='two_hop'), 1)], ids=str)
def test_no_activation_is_gathered_and_nothing_is_copied_everywhere(mesh, accumulation, capfd):
    # Pictures are whole on each device of context, which cuts slots alone: the sum of their gradients is no accident.
    primes = PRIMES if mesh.context == 1 else (13,)
    compiled = compile_tiny(mesh, accumulation)
    assert activations(compiled, {axis: getattr(mesh, axis) for axis in sharding.AXES}, primes) == []
    assert WARNING not in capfd.readouterr().err


def test_both_are_found_where_they_are(capfd):
    mesh = jax.make_mesh((2, 2, 2), ('a', 'b', 'c'), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def turn(x, rows):
        x = jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P(None, ('c', 'a'))))
        return jax.lax.with_sharding_constraint(jnp.take(x, rows, axis=0), NamedSharding(mesh, P('c', None)))

    shapes = jax.ShapeDtypeStruct((2 * 13, 16), jnp.float32), jax.ShapeDtypeStruct((2 * 13,), jnp.int32)
    assert activations(jax.jit(turn).lower(*shapes).compile(), dict(mesh.shape))
    assert WARNING in capfd.readouterr().err
