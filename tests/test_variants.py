"""The methods at their published sizes, and their mistakes."""
import dataclasses

import jax
import numpy as np
import pytest
from tiny_methods import CLS, METHODS, method_batch
from tiny_model import LLM, PATCH, TEACHER, VOCAB, vora

from vora_jax import variants
from vora_jax.data.fake import fake_batch
from vora_jax.llm.decoder import LanguageModel
from vora_jax.merge import merged_model
from vora_jax.method import VisionTokenRule
from vora_jax.nn.adapters import DualLowRank, LowRank, ModalityKernel
from vora_jax.params import count, flatten, partition
from vora_jax.types import ROUTE, TEXT, VISION, UserError
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

QWEN_7B = LanguageModel(vocab_size=152064, num_layers=28, width=3584, mlp_width=18944, num_heads=28,
                        num_kv_heads=4, head_dim=128, rope_theta=1e6, biases=('q_proj', 'k_proj', 'v_proj'))


def sizes(model, parts):
    """{part: number of parameters whose path holds it}, without making any."""
    example = fake_batch(1, 8, 4, 14, 100, 1, seed=0)
    flat = flatten(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
    return {part: sum(count(leaf) for path, leaf in flat.items() if part in f'/{path}') for part in parts}


def test_the_papers_parameter_counts_at_7b():
    method = variants.vora(QWEN_7B, PatchEmbed(), Vit())
    counts = sizes(method.stage('pretrain').model, ('/adapter_', '/frontend/', '/side/', '/'))
    assert counts['/adapter_'] == 2_214_592_512
    assert counts['/frontend/'] == 7_984_128
    assert counts['/side/'] == 132_206_592
    finetune = sizes(method.stage('finetune').model, ('/decoder/', '/'))
    assert finetune['/decoder/'] == 7_615_616_512  # Qwen2.5-7B
    assert finetune['/'] == finetune['/decoder/'] + counts['/frontend/']


def test_stages_say_what_they_train_and_where_they_lead():
    method = vora()
    pretrain, finetune = method.stage('pretrain'), method.stage('finetune')
    assert pretrain.trainable == ('*/adapter_*', 'frontend/*', '*/side/*')
    assert pretrain.merges_into == 'finetune' and finetune.merges_into is None
    assert finetune.trainable == ('*',) and finetune.distill_weight == 0
    assert method.vision_tokens == VisionTokenRule(PATCH.patch_size)
    with pytest.raises(ValueError, match="vora has no stage 'pretrian'; it has pretrain, finetune"):
        method.stage('pretrian')


PROJECTOR, ENCODER = {'frontend/projector_0', 'frontend/projector_1'}, 'frontend/encoder'
EYES = {'frontend/patch_embed', 'frontend/out_proj'}
LLM_PARTS = {'decoder/embedding', 'decoder/layers', 'decoder/lm_head', 'decoder/norm'}
# {method: {stage: parts that are trained, adapters apart}}; '+' where the adapters are trained too.
TRAINED = {
    'llava': {'pretrain': PROJECTOR, 'finetune': PROJECTOR | LLM_PARTS},
    'llava_lora': {'pretrain': PROJECTOR, 'finetune': PROJECTOR | LLM_PARTS, 'adapt': PROJECTOR | {'+'}},
    'vora': {'pretrain': EYES | {'+', 'side'}, 'finetune': EYES | LLM_PARTS},
    'vora_vision': {'pretrain': EYES | {'+', 'side'}, 'finetune': EYES | LLM_PARTS | {'+'}},
    'llavit': {'pretrain': PROJECTOR | {'+'}, 'finetune': PROJECTOR | LLM_PARTS | {'+'}},
    'vce_dual_lora': {'pretrain': PROJECTOR | {'frontend/enhancer'}, 'finetune': PROJECTOR | {'frontend/enhancer', '+'}},
    'lavin': {'finetune': PROJECTOR | {'+', 'modality_embedding'}},
    'kernels_on_patches': {'pretrain': EYES | {'+', 'side'}, 'finetune': EYES | LLM_PARTS | {'+'}},
    'dual_on_llava': {'pretrain': PROJECTOR, 'finetune': PROJECTOR | LLM_PARTS, 'adapt': PROJECTOR | {'+'}},
}


@pytest.mark.parametrize('name', TRAINED)
def test_what_each_stage_trains(name):
    """Every pattern matches something, the encoder and the teacher stay frozen; only mixtures stand inside it."""
    method = METHODS[name][0]
    assert method.stages.keys() == TRAINED[name].keys()
    for title, expected in TRAINED[name].items():
        stage = method.stage(title)
        shapes = jax.eval_shape(stage.model.init, jax.random.key(0), method_batch(name))['params']
        trained, frozen = (flatten(part) for part in partition(shapes, stage.trainable))
        kinds = {'+' if '/adapter_' in path else 'side' if '/side/' in path else '/'.join(path.split('/')[:2])
                 for path in trained}
        assert kinds == expected, title
        assert not any('/adapter_' in path or path.startswith('frontend/projector') for path in frozen)
        assert not any(path.startswith('teacher/') for path in trained)
        assert all('/adapter_' in path for path in trained if path.startswith(ENCODER))


def test_token_rules_of_the_methods():
    rules = {name: METHODS[name][0].vision_tokens for name in METHODS}
    own = VisionTokenRule(PATCH.patch_size)
    causal = VisionTokenRule(PATCH.patch_size, cls=True, bidirectional=False)
    both_ways = dataclasses.replace(causal, bidirectional=True)
    kinds = dataclasses.replace(causal, select='cls', tokens_per_place=2, route_token=True)
    for name, rule in {'llava': causal, 'llava_lora': causal, 'vora': own, 'vora_vision': own, 'llavit': both_ways,
                       'vce_dual_lora': causal, 'lavin': kinds, 'kernels_on_patches': own, 'dual_on_llava': causal}.items():
        assert rules[name] == rule, name
    assert CLS.cls_token and not PATCH.cls_token


def test_an_image_of_cls_tokens_and_its_routing_slot():
    batch = method_batch('lavin')
    assert METHODS['lavin'][0].vision_tokens.num_tokens(2, 3) == 2
    routes = batch.modality == ROUTE
    for row in range(len(routes)):
        for slot in np.flatnonzero(routes[row]):
            segment = batch.segment_id[row] == batch.segment_id[row, slot]
            assert (batch.route_slot[row, segment] == slot).all()
            assert batch.tokens[row, slot] == (batch.modality[row, segment] == VISION).any()
            seen = batch.key_start[row, segment & (batch.modality[row] != ROUTE)]
            assert (seen == slot + 1).all()  # no other slot sees it
    assert set(np.unique(batch.tokens[routes])) == {0, 1} and {TEXT, VISION} < set(np.unique(batch.modality))


def test_two_hybrids_are_only_other_arguments():
    kernels = METHODS['kernels_on_patches'][0].stage('pretrain').model
    assert dict(kernels.groups[0].adapters) == dict.fromkeys(('q_proj', 'k_proj', 'v_proj'), (ModalityKernel(),))
    assert kernels.vision == vora().stage('pretrain').model.vision and kernels.distillation is not None
    stage = METHODS['dual_on_llava'][0].stage('adapt')
    assert dict(stage.model.groups[0].adapters) == dict.fromkeys(('q_proj', 'v_proj'), (DualLowRank(4),))
    assert stage.model.vision == METHODS['llava'][0].stage('finetune').model.vision and stage.merges_into is None


def test_an_adapter_stage_merges_where_the_plain_model_is_what_comes_out():
    lora = METHODS['llava_lora'][0]
    assert lora.stage('adapt').merges_into == 'finetune'
    eyes = variants.llava(LLM, TEACHER, METHODS['llava'][0].stage('finetune').model.vision.projector,
                          adapter=LowRank(2, scope='vision'))
    assert eyes.stage('adapt').merges_into == 'merged'
    assert eyes.stage('merged').model == merged_model(eyes.stage('adapt').model)
    with pytest.raises(UserError, match="targets: a block has no linear 'query'"):
        variants.llavit(LLM, TEACHER, eyes.stage('adapt').model.vision.projector, taps=(0,), targets=('query',))


def test_without_distillation_there_is_no_teacher():
    stage = vora(distill_weight=0.0).stage('pretrain')
    assert stage.model.distillation is None and not any(group.side for group in stage.model.groups)
    assert stage.trainable == ('*/adapter_*', 'frontend/*')


def test_equal_arguments_give_equal_hashable_models():
    assert vora() == vora() and vora() != vora(rank=3)
    assert hash(vora().stage('pretrain').model) == hash(vora().stage('pretrain').model)


def test_adapters_sit_on_the_chosen_linears():
    group = vora(targets=('q_proj', 'v_proj'), scope='vision').stage('pretrain').model.groups[0]
    assert [name for name, _ in group.adapters] == ['q_proj', 'v_proj']
    assert group.adapters[0][1][0].scope == 'vision'


def test_the_text_model_and_the_tagger():
    assert variants.language_model(LLM).vision_tokens is None
    tagger = variants.image_tagger(TEACHER, VOCAB)
    assert tagger.vision_tokens == VisionTokenRule(PATCH.patch_size)


@pytest.mark.parametrize('changes', [
    {'targets': ('query',)}, {'num_adapted_layers': 5}, {'num_adapted_layers': 0},
    {'teacher': dataclasses.replace(TEACHER, num_layers=5)},
    {'teacher': dataclasses.replace(TEACHER, patch_embed=dataclasses.replace(PATCH, patch_size=4))}], ids=str)
def test_arguments_that_do_not_fit_are_told(changes):
    with pytest.raises(UserError, match='^vora'):
        vora(**changes)
