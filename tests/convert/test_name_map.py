"""The table of names: both directions, exact errors."""
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import KINDS, make_model

from vora_jax.convert.exportable import exportable, parameter_shapes
from vora_jax.convert.name_map import entries, from_foreign, to_foreign
from vora_jax.types import UserError


@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back_keeps_every_bit(kind):
    what = exportable(*make_model(kind))
    tensors = dict(to_foreign(what.params, what.shapes))
    assert all(array.flags.c_contiguous for array in tensors.values())
    back = from_foreign(tensors, what.shapes)
    assert back.keys() == what.params.keys()
    for path, leaf in what.params.items():
        np.testing.assert_array_equal(back[path], leaf, path)


def test_layouts_and_names():
    what = exportable(*make_model('all'))
    tensors, params = dict(to_foreign(what.params, what.shapes)), what.params
    blocks = 'decoder/layers/group_{}/block/'
    # Layer 0 has a distillation head, layer 1 only adapters, layer 2 neither: three groups.
    np.testing.assert_array_equal(tensors['model.layers.1.self_attn.k_proj.weight'],
                                  np.asarray(params[blocks.format(1) + 'k_proj/kernel'])[0].T)
    np.testing.assert_array_equal(tensors['model.layers.2.mlp.down_proj.weight'],
                                  np.asarray(params[blocks.format(2) + 'down_proj/kernel'])[0].T)
    np.testing.assert_array_equal(tensors['model.layers.0.mlp.up_proj.lora_B.0.weight'],
                                  np.asarray(params[blocks.format(0) + 'up_proj/adapter_0/b'])[0].T)
    assert 'model.layers.2.mlp.up_proj.lora_B.0.weight' not in tensors
    kernel = np.asarray(params['frontend/patch_embed/kernel']).reshape(4, 4, 3, 16)
    convolution = tensors['vision_embedding.patchifier.proj.weight']
    assert convolution.shape == (16, 3, 4, 4)
    assert convolution[5, 2, 1, 3] == kernel[1, 3, 2, 5]
    assert tensors['vision_embedding.pos_embed'].shape == (1, 12, 16)
    np.testing.assert_array_equal(tensors['vision_embedding.pos_embed'][0, 1 * 4 + 2],
                                  params['frontend/patch_embed/positions'][1, 2])
    assert not [name for name in tensors if 'teacher' in name or 'side' in name]


def test_every_foreign_tensor_is_told_with_its_shape():
    model = make_model('vision')[1]
    what = exportable(*make_model('vision'))
    table = {entry.name: entry.shape for entry in entries(parameter_shapes(what.model))}
    assert table == {name: array.shape for name, array in to_foreign(what.params, what.shapes)}
    assert model.distillation is not None and what.model.distillation is None


def test_missing_unexpected_and_misshapen_tensors_are_listed():
    what = exportable(*make_model('text_only'))
    tensors = dict(to_foreign(what.params, what.shapes))
    tensors['model.norm.bias'] = tensors.pop('model.norm.weight')
    tensors['model.embed_tokens.weight'] = tensors['model.embed_tokens.weight'][:-1]
    with pytest.raises(UserError) as error:
        from_foreign(tensors, what.shapes)
    assert str(error.value) == (
        'the folder does not fit the model: it misses model.norm.weight; it has unexpected model.norm.bias; it has '
        'other shapes of model.embed_tokens.weight ([299, 24] instead of [300, 24]).')


def test_missing_and_unexpected_parameters_are_listed():
    what = exportable(*make_model('text_only'))
    params = dict(what.params) | {'decoder/extra': jnp.zeros(3)}
    del params['decoder/embedding']
    with pytest.raises(UserError, match='misses decoder/embedding; it has unexpected decoder/extra'):
        list(to_foreign(params, what.shapes))


def test_a_parameter_without_a_foreign_name_is_told():
    with pytest.raises(UserError, match='no name in a Hugging Face folder: decoder/norm/shift'):
        entries({'decoder/norm/scale': (3,), 'decoder/norm/shift': (3,)})
