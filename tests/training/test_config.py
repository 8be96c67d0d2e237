"""Identity, free fields and validation."""

import dataclasses

import jax
import pytest
import tiny_run

from vora_jax.data.config import Data, Source
from vora_jax.training.config import Mesh, Optimizer, Train, validate
from vora_jax.training.config_changes import differences, first_difference
from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.row_shards import check_rows
from vora_jax.types import UserError

DATA = Data((Source('rows.jsonl'),), 'tokenizer')
RUN = Train(tiny_run.vora(), DATA, 'pretrain', steps=10, batch_rows=8)


@pytest.mark.parametrize(
    'changes, path',
    [
        ({'seed': 1}, 'Train.seed'),
        ({'batch_rows': 16}, 'Train.batch_rows'),
        ({'stage': 'finetune'}, 'Train.stage'),
        ({'optimizer': Optimizer(b2=0.9)}, 'Train.optimizer.b2'),
        ({'optimizer': Optimizer(warmup_from_zero=True)}, 'Train.optimizer.warmup_from_zero'),
        ({'data': dataclasses.replace(DATA, max_slots=9)}, 'Train.data.max_slots'),
        ({'data': dataclasses.replace(DATA, sources=(Source('a'), Source('b')))}, 'Train.data.sources'),
        (
            {'method': tiny_run.vora(dropout=0.1)},
            "Train.method.stages['pretrain'].model.groups[0].adapters[0][1][0].dropout",
        ),
    ],
)
def test_identity_fields_must_agree(changes, path):
    difference = first_difference(RUN, dataclasses.replace(RUN, **changes))
    assert difference.path == path
    assert difference.old != difference.new


@pytest.mark.parametrize(
    'changes',
    [
        {'steps': 20},
        {'mesh': Mesh(8)},
        {'attention': 'xla'},
        {'workers': 2},
        {'log_every': 1},
        {'data': dataclasses.replace(DATA, tokenizer='moved', sources=(Source('moved.jsonl'),))},
    ],
)
def test_free_fields_may_change_and_are_listed(changes):
    other = dataclasses.replace(RUN, **changes)
    assert first_difference(RUN, other) is None
    assert all(change.free for change in differences(RUN, other)) and list(differences(RUN, other))


def test_remat_and_attention_are_free():
    stage = RUN.method.stage('pretrain')
    model = stage.model.clone(
        llm=dataclasses.replace(stage.model.llm, remat='full'), attend=lambda *args: None
    )
    stages = RUN.method.stages | {'pretrain': dataclasses.replace(stage, model=model)}
    other = dataclasses.replace(RUN, method=dataclasses.replace(RUN.method, stages=stages))
    assert first_difference(RUN, other) is None
    assert {change.path.rpartition('.')[2] for change in differences(RUN, other)} == {'attend', 'remat'}


def test_equal_runs_do_not_differ():
    again = Train(tiny_run.vora(), DATA, 'pretrain', steps=10, batch_rows=8)
    assert list(differences(RUN, again)) == []


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'steps': 0}, ('Train.steps', '0')),
        ({'accumulation': 3}, ('Train.batch_rows', '8', 'Train.accumulation = 3')),
        ({'stage': 'pretain'}, ('Train.stage', "'pretain'", 'pretrain')),
        ({'optimizer': Optimizer(schedule='cosine')}, ('Optimizer.decay_steps',)),
        ({'optimizer': Optimizer(warmup_from_zero=True)}, ('Optimizer.warmup_from_zero', 'Optimizer.warmup_steps')),
        ({'optimizer': Optimizer(learning_rate=-1.0)}, ('Optimizer.learning_rate', '-1')),
        ({'frozen_dtype': 'float16'}, ('Train.frozen_dtype', 'bfloat16')),
        ({'attention': 'flash'}, ('Train.attention', "'flash'", 'pallas_tpu')),
    ],
)
def test_senseless_values_are_named(changes, words):
    with pytest.raises(UserError) as error:
        validate(dataclasses.replace(RUN, **changes))
    assert all(word in str(error.value) for word in words)


def test_mesh_takes_what_is_left_and_must_fit():
    devices = jax.devices()[:8]
    assert dict(sharding.make_mesh(Mesh(2, -1, 2), devices).shape) == {'data': 2, 'fsdp': 2, 'context': 1, 'tensor': 2}
    assert dict(sharding.make_mesh(Mesh(context=4), devices).shape) == {'data': 1, 'fsdp': 2, 'context': 4, 'tensor': 1}
    for sizes in (Mesh(3, -1, 1), Mesh(2, 2, 1), Mesh(-1, -1, 1), Mesh(0, -1, 1), Mesh(context=3)):
        with pytest.raises(UserError, match='Mesh.data = '):
            sharding.make_mesh(sizes, devices)


def test_rows_slots_and_dimensions_must_divide_over_the_mesh():
    mesh = sharding.make_mesh(Mesh(1, 8, 1), jax.devices()[:8])
    with pytest.raises(UserError, match='4 rows.*choose a multiple of 8'):
        check_rows(dataclasses.replace(RUN, accumulation=2), mesh)
    check_rows(RUN, mesh)
    sharding.check_slots(RUN, mesh)
    mesh = sharding.make_mesh(Mesh(context=8), jax.devices()[:8])
    with pytest.raises(UserError, match='Data.max_slots is 60, .* choose a multiple of 8'):
        sharding.check_slots(dataclasses.replace(RUN, data=dataclasses.replace(DATA, max_slots=60)), mesh)
    with pytest.raises(UserError, match='Mesh.tensor = 4 does not divide dimension . of .*, of size 6'):
        tiny_run.start(tiny_run.narrow(), tiny_run.batch(rows=8), (1, 1, 4))
