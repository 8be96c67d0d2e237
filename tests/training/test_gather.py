"""Which dimension of a parameter is cut, and how it is made whole."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_mesh_runs
import tiny_run
from jax.sharding import PartitionSpec as P

from vora_jax import variants
from vora_jax.params import flatten
from vora_jax.training import state
from vora_jax.training.config import Mesh, Optimizer
from vora_jax.training.mesh import sharding
from vora_jax.training.program import placed
from vora_jax.training.step import compile_step, make_step
from vora_jax.types import UserError


def mesh(**sizes):
    config = Mesh(**{'fsdp': 1} | sizes)
    return sharding.make_mesh(config, jax.devices()[:config.data * config.fsdp * config.context * config.tensor])


def spec_of(names, shape, on, cut=('fsdp',)):
    boxed = {'kernel': nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)}
    return sharding.param_shardings(boxed, on, cut)['kernel'].spec


@pytest.mark.parametrize('names, shape, expected', [
    (('layers', 'embed', 'mlp'), (3, 16, 32), P(None, 'fsdp', 'tensor')),
    (('layers', 'mlp', 'embed'), (3, 32, 16), P(None, 'tensor', 'fsdp')),
    (('vocab', 'embed'), (32, 16), P('tensor', 'fsdp')),
    (('layers', 'rank', 'heads'), (3, 8, 16), P(None, 'fsdp', 'tensor')),
    (('layers', 'embed', 'rank'), (3, 6, 8), P(None, None, 'fsdp')),  # 6 does not divide by 4: the next one that does
    (('layers', 'rank', 'heads'), (3, 2, 16), P(None, None, 'tensor')),  # none is left: whole, for it is small
    (('layers', 'embed'), (3, 16), P(None, None)),  # a vector
    (('embed', None), (16, 4), P(None, None)),  # too small to be worth it, says the model
])
def test_fsdp_cuts_the_first_dimension_that_it_divides(names, shape, expected):
    assert spec_of(names, shape, mesh(fsdp=4, tensor=2)) == expected


def test_two_hops_cut_over_all_that_rows_are_cut_over():
    on = mesh(data=2, fsdp=4)
    assert spec_of(('embed', 'mlp'), (16, 32), on, ('data', 'fsdp')) == P(('data', 'fsdp'), None)
    assert spec_of(('embed', 'mlp'), (12, 32), on, ('data', 'fsdp')) == P(None, ('data', 'fsdp'))


def test_what_does_not_divide_is_told():
    with pytest.raises(UserError, match='Mesh.tensor = 4 does not divide dimension 1 of kernel, of size 6'):
        spec_of(('embed', 'mlp'), (16, 6), mesh(fsdp=2, tensor=4))
    with pytest.raises(UserError, match='none of the dimensions of kernel, 4098 x 2050, divides by the 4 devices of fsdp'):
        spec_of(('embed', 'mlp'), (4098, 2050), mesh(fsdp=4))
    with pytest.raises(UserError, match="two_hop.*Mesh.context = 1 and Mesh.tensor = 2 to 1"):
        mesh(data=2, tensor=2, gather='two_hop')


def test_cut_matrices_travel_in_the_dtype_of_the_states_and_gradients_in_float32():
    """Of a program with bf16 states: what the collectives carry."""
    method, stage = tiny_mesh_runs.method('vora')
    llm = dataclasses.replace(tiny_mesh_runs.LLM, activation_dtype='bfloat16')
    stage = dataclasses.replace(method.stage(stage), model=method.stage(stage).model.clone(llm=llm))
    on, batch = mesh(data=2, fsdp=4, gather='two_hop'), tiny_mesh_runs.uneven_batch('vora', 0)
    with sharding.use(on):
        plan = state.plan(stage, Optimizer(), batch, on, 'float32', how='two_hop')
        step = make_step(plan.model, plan.optimizer, lambda _: 0.0, 1.0, 1, 0,
                         in_shards=lambda gradient: placed(gradient, plan, on, 'two_hop'))
        lines = str(jax.make_jaxpr(step)(plan.state, plan.frozen, batch)).splitlines()
    gathers = [line.split('=')[0] for line in lines if ' all_gather[' in line]
    scatters = [line.split('=')[0] for line in lines if ' reduce_scatter[' in line]
    assert gathers and all('bf16[' in made for made in gathers)
    assert scatters and all('f32[' in made for made in scatters)


@pytest.mark.parametrize('sizes', [(2, 4, 1, 1, 'two_hop'), (2, 4, 1)])
def test_micro_batches_in_shards_give_the_step_of_one_device(sizes):
    batch, stage = tiny_mesh_runs.uneven_batch('vora', 1), tiny_mesh_runs.method('vora')[0].stage('pretrain')
    results = []
    for mesh_sizes, accumulation in (((1, 1, 1), 1), (sizes, 2)):
        _, now, frozen, step = tiny_run.start(stage, batch, mesh_sizes, accumulation)
        now, metrics = step(now, frozen, batch)
        results.append((flatten(now.trainable), metrics))
    (expected, wanted), (actual, told) = results
    for name in ('loss', 'grad_norm', 'distill_loss'):
        assert abs(float(told[name]) - float(wanted[name])) < 1e-5
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, atol=2e-5, err_msg=path)


@pytest.mark.parametrize('trainable', [('*',), ('decoder/*norm/scale',)])
def test_gathered_weights_are_not_kept_for_the_backward_pass(trainable):
    """Without rematerialisation too: all layers' would be the whole model on each device."""
    llm = dataclasses.replace(tiny_run.LLM, num_layers=8, width=128, mlp_width=512)
    stage = dataclasses.replace(variants.language_model(llm).stage('pretrain'), trainable=trainable)
    on = mesh(fsdp=8)
    batch = tiny_run.batch(text_only=True)
    with sharding.use(on):
        plan = state.plan(stage, Optimizer(), batch, on, 'float32')
        step = make_step(plan.model, plan.optimizer, lambda _: 0.0, 0.0, 1, 0)
        compiled = compile_step(step, plan.state_shardings, plan.frozen_shardings, on).lower(
            plan.state, plan.frozen, batch).compile()
    whole = sum(leaf.size * 4 for path, leaf in plan.params.items() if 'group_0' in path)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * whole  # 1.0, and 2.0 where they are kept
