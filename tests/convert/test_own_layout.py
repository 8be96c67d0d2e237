"""Names and config.json of our own folders."""
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_methods import METHODS
from tiny_models import KINDS, LLM, PATCH, make_any, make_model, make_variety

from vora_jax import variants
from vora_jax.convert.export.exportable import exportable
from vora_jax.convert.families.own_arguments import model_arguments
from vora_jax.convert.families.own_layout import Prompting, own_config, own_model
from vora_jax.convert.families.own_names import OWN
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.names.name_map import from_foreign, to_foreign
from vora_jax.data.config import ImagePolicy
from vora_jax.method import VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.stack import LayerGroup
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import EncoderFrontend
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.vit import Vit

PROMPTING = Prompting('', 3, min_patches=2, max_patches=24)
BUILT = [kind for kind in make_variety() if make_variety()[kind][0].name != 'built']
FOUND = {kind: ('llava', 'finetune') for kind in ('clip', 'siglip', 'aimv2', 'pooled', 'llava')} | {
    kind: (kind, 'finetune') for kind in ('llavit', 'vce_dual_lora', 'lavin')} | {
    kind: ('llava', 'adapt') for kind in ('llava_lora', 'dual_on_llava')} | {'prompted': ('llama_adapter', 'finetune')}


def written(model, rule, **changes):
    """config.json as a reader finds it."""
    return json.loads(json.dumps(own_config(model, rule, dataclasses.replace(PROMPTING, **changes))))


def layers(model):
    return [(dict(group.adapters), set(group.biases), dict(group.mixtures), group.prompts) for group in model.groups
            for _ in range(group.num_layers)]


@pytest.mark.parametrize('kind', [*KINDS, *make_variety(), *METHODS])
def test_every_parameter_there_and_back(kind):
    what = exportable(*make_any(kind)[:2])
    tensors = dict(to_foreign(what.params, what.shapes, OWN))
    assert len(tensors) >= len(what.params)
    back = from_foreign(tensors, what.shapes, OWN)
    for path, leaf in what.params.items():
        np.testing.assert_array_equal(back[path], leaf, path)


def test_names():
    names = {kind: set(dict(to_foreign((what := exportable(*make_any(kind)[:2])).params, what.shapes, OWN)))
             for kind in ('several', 'clip', 'dino', 'siglip', 'causal')}
    assert {'model.layers.0.self_attn.q_proj.lora_A.2.weight', 'model.layers.1.mlp.up_proj.bias',
            'vision_embedding.patchifier.norm.weight', 'vision_embedding.out_proj.weight'} <= names['several']
    assert {'vision_tower.embeddings.cls_token', 'vision_tower.pre_norm.bias', 'vision_tower.norm.weight',
            'vision_tower.layers.2.self_attn.q_proj.bias', 'projector.1.bias'} <= names['clip']
    assert {'vision_tower.layers.0.mlp_scale', 'vision_tower.embeddings.mask_token', 'projector.0.weight'} <= names['dino']
    assert {'vision_tower.pool.probe', 'vision_tower.pool.mlp_norm.bias', 'projector.2.weight',
            'model.layers.0.self_attn.q_norm.weight'} <= names['siglip']
    assert {'vision_embedding.cls_position', 'vision_embedding.pos_embed'} <= names['causal']


@pytest.mark.parametrize('kind', [*KINDS, *make_variety(), *METHODS])
def test_the_config_describes_the_whole_model(kind):
    _, model, rule = make_any(kind)
    back, back_rule = own_model(written(model, rule))
    assert (back.llm, back.vision, layers(back), back.distillation) == (model.llm, model.vision, layers(model), None)
    assert back_rule == (rule if isinstance(model.vision, EncoderFrontend) or model.vision is None else
                         dataclasses.replace(rule, cls=False))


@pytest.mark.parametrize('kind', [*KINDS, *BUILT, *METHODS])
def test_arguments_build_the_model_again(kind):
    _, model, rule = make_any(kind)
    method, stage, arguments = model_arguments(written(model, rule))
    built = getattr(variants, method)(**arguments)
    twin = built.stage(stage).model
    assert (twin.llm, twin.vision, layers(twin)) == (model.llm, model.vision, layers(model))
    assert twin.distillation is None and built.vision_tokens == rule
    patches = 'vora', 'finetune' if kind in ('merged', 'quirks', 'kernels_on_patches') else 'pretrain'
    assert (method, stage) == FOUND.get(kind, ('language_model', 'pretrain') if model.vision is None else patches)


@pytest.mark.parametrize('changes', [
    {'targets': ('v_proj', 'o_proj'), 'extra_biases': True, 'num_adapted_layers': 1, 'dropout': 0.1, 'scope': 'text'},
    {'targets': ('up_proj', 'q_proj'), 'extra_biases': True, 'num_adapted_layers': 3, 'join_adjacent_images': True},
    {'num_adapted_layers': 2},
])
@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_arguments_of_other_recipes(changes, stage):
    embed = PatchEmbed(PATCH, width=16, table_rows=3, table_cols=4)
    teacher = Vit(dataclasses.replace(embed, cls_token=True), num_layers=3, mlp_width=8, num_heads=2)
    method = variants.vora(LLM, embed, teacher, 2, 0.3, **changes)
    model = method.stage(stage).model
    name, found, arguments = model_arguments(written(model, method.vision_tokens))
    kept = 'pretrain' if changes.get('scope') == 'text' else stage  # what cannot be folded stays
    again = variants.vora(**arguments)
    assert (name, found, layers(again.stage(stage).model)) == ('vora', kept, layers(model))
    # The [cls] slot was the teacher's.
    assert again.vision_tokens == dataclasses.replace(method.vision_tokens, cls=False)
    if kept == 'pretrain':
        assert {key: arguments[key] for key in changes} == changes and arguments['scale'] == 0.3


def test_what_no_method_builds_is_told():
    low = LowRank(2)
    for groups in ((LayerGroup(3, (('q_proj', (low, low)),)),), (LayerGroup(1), LayerGroup(2, (('q_proj', (low,)),)))):
        model = VisionLanguageModel(LLM, groups, PatchFrontend(PatchEmbed(PATCH)))
        with pytest.raises(UserError, match='describes a model that no method here builds'):
            model_arguments(written(model, VisionTokenRule(PATCH)))
    config = written(*make_any('clip')[1:])
    del config['qk_norm'], config['vision']['taps']
    with pytest.raises(UserError, match=r"config.json is not as `vora export` writes it \(KeyError: 'qk_norm'\)"):
        own_model(config)
    model = make_any('siglip')[1]
    with pytest.raises(UserError, match='PatchEmbed.cls_token is off'):
        own_config(model, VisionTokenRule(PATCH, cls=True), PROMPTING)


def test_the_image_policy_is_told():
    _, model, rule = make_any('clip')
    assert written(model, rule)['image_policy'] == {
        'kind': 'native', 'min_patches': 2, 'max_patches': 24, 'side': 0, 'color': [0, 0, 0],
        'background': [255, 255, 255], 'tiles': []}
    square = written(model, rule, image_kind='tiles', side=4, color=(1, 2, 3), background=(4, 5, 6), tiles=((1, 2), (3, 1)))
    assert square['image_policy'] == {
        'kind': 'tiles', 'min_patches': 2, 'max_patches': 24, 'side': 4, 'color': [1, 2, 3], 'background': [4, 5, 6],
        'tiles': [[1, 2], [3, 1]]}
    hints = recognise(square, {}).hints
    assert ImagePolicy(**hints['image']) == ImagePolicy(24, 2, 'tiles', 4, (1, 2, 3), (4, 5, 6), ((1, 2), (3, 1)))
    assert 'image_policy' not in written(make_model('text_only')[1], None)


def test_dtype_of_parameters_is_no_matter():
    params = {'decoder/norm/scale': jnp.ones(4, jnp.bfloat16)}
    (name, array), = to_foreign(params, {'decoder/norm/scale': (4,)}, OWN)
    assert name == 'model.norm.weight' and str(array.dtype) == 'bfloat16'
