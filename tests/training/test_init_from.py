"""Parameters from other checkpoints."""

import jax
import numpy as np
import pytest

from vora_jax.training import init_from
from vora_jax.training.checkpoints.checkpoint import write_checkpoint
from vora_jax.types import UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """`lm`: 3 layers in one group; `tagger`: an encoder."""
    root = tmp_path_factory.mktemp('runs')
    (root / 'tokenizer').mkdir()
    layers = np.arange(3 * 4, dtype=np.float32).reshape(3, 4)
    lm = {'decoder': {'embedding': np.ones((5, 4), np.float32), 'layers': {'group_0': {'kernel': layers}}}}
    tagger = {
        'encoder': {'embed': {'kernel': np.full((2, 2), 7, np.float32)}, 'norm': np.ones(2, np.float32)},
        'head': np.zeros((2, 5), np.float32),
    }
    q_proj = {'kernel': np.ones((3, 4, 4), np.float32), 'adapter_0': {'a': np.ones((3, 4, 2), np.float32),
                                                                    'b': np.ones((3, 2, 4), np.float32)}}
    low = {'decoder': {'layers': {'group_0': {'q_proj': q_proj}}}}
    for name, params in (('lm', lm), ('tagger', tagger), ('low', low)):
        write_checkpoint(root / name, params, '', str(root / 'tokenizer'))
    return root


def shapes(**paths):
    return {path.replace('__', '/'): jax.ShapeDtypeStruct(shape, 'float32') for path, shape in paths.items()}


def test_whole_checkpoint_gives_common_paths_over_other_layer_groups(folder):
    wanted = shapes(
        decoder__embedding=(5, 4),
        decoder__layers__group_0__kernel=(2, 4),
        decoder__layers__group_0__adapter=(2, 4),
        decoder__layers__group_1__kernel=(1, 4),
        frontend__x=(2,),
    )
    taken = init_from.take([str(folder / 'lm')], wanted)
    assert set(taken) == {
        'decoder/embedding',
        'decoder/layers/group_0/kernel',
        'decoder/layers/group_1/kernel',
    }
    np.testing.assert_array_equal(taken['decoder/layers/group_1/kernel'], [[8, 9, 10, 11]])


def test_subtrees_go_where_they_are_sent(folder):
    wanted = shapes(
        teacher__embed__kernel=(2, 2), teacher__norm=(2,), frontend__embed__kernel=(2, 2), other=(1,)
    )
    tagger = folder / 'tagger'
    taken = init_from.take([f'teacher={tagger}:encoder', f'frontend/embed={tagger}:encoder/embed'], wanted)
    assert set(taken) == {'teacher/embed/kernel', 'teacher/norm', 'frontend/embed/kernel'}
    assert (taken['frontend/embed/kernel'] == 7).all()


@pytest.mark.parametrize(
    'entry, wanted, words',
    [
        ('{}/tagger', shapes(decoder__x=(1,)), 'gives none of the parameters'),
        ('{}/lm', shapes(decoder__embedding=(6, 4)), r'\(5, 4\).*\(6, 4\)'),
        ('{}/lm', shapes(decoder__layers__group_0__kernel=(4, 4)), '3 layers does not fit a model of 4'),
        ('teacher={}/tagger:vit', shapes(teacher__norm=(2,)), 'no parameters at vit; it has encoder'),
        (
            'teacher={}/tagger:encoder',
            shapes(teacher__norm=(2,), teacher__gate=(2,)),
            'leaves teacher/gate without a value',
        ),
        ('teacher={}/tagger', shapes(teacher__norm=(2,)), 'cannot read'),
        ('{}/nowhere', shapes(a=(1,)), 'does not exist'),
    ],
)
def test_mistakes_are_told(folder, entry, wanted, words):
    with pytest.raises(UserError, match=words):
        init_from.take([entry.format(folder)], wanted)


Q_PROJ = 'decoder/layers/group_{}/q_proj/'


def linear(sizes, **adapter):
    """Shapes of a linear in groups of these sizes, with an adapter in the first."""
    found = {Q_PROJ.format(group) + 'kernel': (size, 4, 4) for group, size in enumerate(sizes)}
    found |= {f'{Q_PROJ.format(0)}adapter_0/{name}': (sizes[0], *shape) for name, shape in adapter.items()}
    return {path: jax.ShapeDtypeStruct(shape, 'float32') for path, shape in found.items()}


@pytest.mark.parametrize('wanted', [
    linear([3]),  # no adapter
    linear([3], kernel=(4, 4)),  # a kernel of vision slots
    linear([3], a=(4, 2), b=(2, 4), task=(4, 2)),  # another kind of the same names
    linear([2, 1], a=(4, 2), b=(2, 4)),  # in fewer layers
])
def test_no_adapter_is_lost(folder, wanted):
    with pytest.raises(UserError, match='holds adapters, which this model does not have, or not alike'):
        init_from.take([str(folder / 'low')], wanted)


def test_a_kernel_of_vision_slots_starts_as_a_copy(folder):
    same = linear([3], a=(4, 2), b=(2, 4))
    assert set(init_from.take([str(folder / 'low')], same)) == set(same)
    path = 'decoder/layers/group_0/kernel'
    wanted = {path: jax.ShapeDtypeStruct((3, 4), 'float32'),
              path.replace('kernel', 'adapter_0/kernel'): jax.ShapeDtypeStruct((3, 4), 'float32')}
    taken = init_from.take([str(folder / 'lm')], wanted)
    np.testing.assert_array_equal(taken[path.replace('kernel', 'adapter_0/kernel')], taken[path])
