"""The methods at their published sizes, and their mistakes."""
import dataclasses

import jax
import pytest
from tiny_model import LLM, PATCH, TEACHER, VOCAB, vora

from vora_jax import variants
from vora_jax.data.fake import fake_batch
from vora_jax.llm.decoder import LanguageModel
from vora_jax.method import VisionTokenRule
from vora_jax.params import count, flatten
from vora_jax.types import UserError
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
