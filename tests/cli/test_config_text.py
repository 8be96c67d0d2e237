"""The configuration of an imported model."""
import dataclasses

import pytest
import tiny_folder
import tiny_run

from vora_jax import variants
from vora_jax.cli import gin_config
from vora_jax.cli.config_text import config_text
from vora_jax.data.config import Data, ImagePolicy
from vora_jax.nn.adapters import DualLowRank
from vora_jax.nn.gated_prompts import GatedPrompts
from vora_jax.nn.modality_mixture import ModalityMixture
from vora_jax.training.config import validate
from vora_jax.types import UserError
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import Projector

DATA = Data((), 'w/tokenizer', 'vicuna_v1', 128, 5, 1, ImagePolicy(kind='square_crop', side=8))
SINES = dataclasses.replace(tiny_run.EMBED, positions='sincos')
WITH_CLS = dataclasses.replace(tiny_run.VIT, patch_embed=dataclasses.replace(tiny_run.EMBED, cls_token=True))
SEEING = {'llm': tiny_run.LLM, 'encoder': WITH_CLS, 'projector': Projector()}
CASES = {name: (found.method, found.stage, found.arguments)
         for name, found in ((name, tiny_folder.found(name)) for name in tiny_folder.CONFIGS)} | {
    'vora': ('vora', 'pretrain', {'llm': tiny_run.LLM, 'patch_embed': tiny_run.EMBED, 'teacher': tiny_run.VIT, 'rank': 2,
                                  'num_adapted_layers': 2, 'extra_biases': True}),
    'vora_finetune': ('vora', 'finetune', {'llm': tiny_run.LLM, 'patch_embed': SINES, 'teacher': tiny_run.VIT,
                                           'num_adapted_layers': 2, 'targets': ('q_proj',), 'distill_weight': 0.0}),
    'llavit': ('llavit', 'pretrain', SEEING | {'taps': (0, 1)}),
    'vce_dual_lora': ('vce_dual_lora', 'finetune', SEEING | {'taps': (1, 0), 'enhancer': CueEnhancer(num_heads=2),
                                                             'adapter': DualLowRank(4)}),
    'lavin': ('lavin', 'finetune', SEEING | {'taps': (0, 1), 'mixture': ModalityMixture(4, temperature=5.0)}),
    'llama_adapter': ('llama_adapter', 'pretrain', SEEING | {'prompts': GatedPrompts(3), 'num_prompted_layers': 2}),
    'image_tagger': ('image_tagger', 'pretrain', {'vit': tiny_run.VIT, 'vocab_size': 9}),
}


@pytest.mark.parametrize('case', CASES)
def test_the_text_loads_to_the_model_that_was_imported(case):
    method, stage, arguments = CASES[case]
    config, text = config_text(method, stage, arguments, DATA)
    wanted = getattr(variants, method)(**arguments)
    for loaded, again in ((config, text), gin_config.load('Train', texts=[text])):
        assert again == text
        assert loaded.method == wanted and loaded.stage == stage and loaded.data == DATA
        assert loaded.method.stage(stage).model == wanted.stage(stage).model


def test_every_method_is_covered():
    methods = {name for name, target in gin_config.bindables().items() if target.__module__ == variants.__name__}
    assert methods <= {method for method, *_ in CASES.values()}


def test_scopes_stand_only_where_two_of_a_class_differ():
    _, text = config_text(*CASES['vora'], DATA)
    assert 'vora.teacher = @Vit()' in text and '/PatchEmbed' not in text
    _, text = config_text(*CASES['vora_finetune'], DATA)
    assert "\nPatchEmbed.positions = 'sincos'" in text
    assert "\nteacher/PatchEmbed.positions = 'bilinear'" in text and 'Vit.patch_embed = @teacher/PatchEmbed()' in text


def test_it_can_be_trained_once_it_has_sources():
    _, text = config_text(*CASES['llama'], DATA)
    with pytest.raises(UserError, match='Data.sources is empty; give at least one Source'):
        validate(gin_config.load('Train', texts=[text])[0])
    config, _ = gin_config.load('Train', texts=[text], bindings=['Data.sources=[@Source()]', 'Source.path=a.jsonl'])
    validate(config)


def test_a_frozen_stage_says_that_it_trains_nothing():
    config, _ = config_text(*CASES['clip'], DATA)
    with pytest.raises(UserError, match="'frozen' of image_encoder trains nothing"):
        validate(config)
