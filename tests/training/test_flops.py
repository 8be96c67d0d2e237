"""The FLOPs of a step, by formula, against the products in its jaxpr and the specification's table."""
import dataclasses
import functools
import math
from typing import get_args

import flax.linen as nn
import jax
import numpy as np
import pytest
from jaxpr_flops import matmul_flops
from tiny_methods import ENCODER, METHODS, PROJECTOR
from tiny_model import LLM, PATCH, TEACHER, VOCAB, vora

from vora_jax import variants
from vora_jax.data.fake import fake_batch
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.llm.decoder import LanguageModel
from vora_jax.nn.gated_prompts import GatedPrompts
from vora_jax.nn.remat import Remat
from vora_jax.ops.cross_entropy import CHUNK
from vora_jax.params import flatten, partition
from vora_jax.training import state as state_lib
from vora_jax.training.config import Mesh, Optimizer
from vora_jax.training.flops.statistics import Count, statistics_of
from vora_jax.training.flops.step_work import executed_flops, flops_of_row, model_flops, step_work
from vora_jax.training.losses import counts
from vora_jax.training.mesh import sharding
from vora_jax.training.optimizer import schedule
from vora_jax.training.step import make_step
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

ALL = {name: method for name, (method, _) in METHODS.items()} | {
    'language_model': variants.language_model(LLM),
    'tied': variants.language_model(dataclasses.replace(LLM, tied_head=True)),
    'image_tagger': variants.image_tagger(TEACHER, VOCAB), 'vora_input': vora(pairing='input_to_output'),
    'vora_text': vora(scope='text'),
    'llama_adapter': variants.llama_adapter(LLM, ENCODER, PROJECTOR, GatedPrompts(3), num_prompted_layers=3, pool=2)}
STAGES = [(name, title) for name, method in ALL.items() for title in method.stages]
POLICIES = get_args(Remat)


def jaxpr_of(stage, batch, accumulation):
    """(jaxpr of the optimizer step, paths that are trained)."""
    rows = len(batch.tokens) // accumulation
    mesh = sharding.make_mesh(Mesh(), devices=jax.devices()[:1])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    with sharding.use(mesh):
        plan = state_lib.plan(stage, Optimizer(), shapes, mesh, 'float32')
        step = make_step(plan.model, plan.optimizer, schedule(Optimizer()), stage.distill_weight, accumulation, 0)
        return jax.make_jaxpr(step)(plan.state, plan.frozen, batch), flatten(plan.state.trainable)


def check(name, title, remat='none', accumulation=1):
    """(formula, count) of executed FLOPs."""
    method = ALL[name]
    stage = method.stage(title)
    if remat != 'none':
        model = stage.model.clone(llm=dataclasses.replace(stage.model.llm, remat=remat))
        stage = dataclasses.replace(stage, model=model)
    patches, slots = 27, 40
    batch = fake_batch(4, slots, patches, PATCH.patch_size, VOCAB, 4, 1, rule=method.vision_tokens,
                       text_only=method.vision_tokens is None)
    jaxpr, trained = jaxpr_of(stage, batch, accumulation)
    statistics = statistics_of(batch, stage.model, accumulation)
    trips = {math.ceil((batch.loss_mask[i::accumulation] > 0).sum(1).max() / CHUNK) for i in range(accumulation)}
    assert len(trips) == 1
    return executed_flops(step_work(stage.model, trained, statistics)), matmul_flops(jaxpr, trips.pop())


# One stage of each kind of product in every run; the others are slow.
QUICK = {('vora', 'pretrain'), ('llavit', 'finetune'), ('vce_dual_lora', 'finetune'), ('lavin', 'finetune')}


def quickly(cases, quick):
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize('name, title', quickly(STAGES, QUICK))
def test_executed_flops_are_those_of_the_steps_jaxpr(name, title):
    found, counted = check(name, title)
    assert found == counted


RECOMPUTED = [(name, title, policy) for name, title in STAGES if name != 'image_tagger'
              for policy in POLICIES if policy != 'none']


QUICK_POLICIES = [('vora', 'pretrain', policy) for policy in ('full', 'adapters', 'matmuls')]


@pytest.mark.parametrize('name, title, remat', quickly(RECOMPUTED, QUICK_POLICIES))
def test_what_remat_computes_again(name, title, remat):
    found, counted = check(name, title, remat)
    assert found == counted


def test_micro_batches_have_chunks_of_their_own():
    found, counted = check('llama_adapter', 'pretrain', accumulation=2)
    assert found == counted


QWEN_7B = LanguageModel(vocab_size=152064, num_layers=28, width=3584, mlp_width=18944, num_heads=28, num_kv_heads=4,
                        head_dim=128, activation_dtype='bfloat16')
ROW = [[Text([1] * 16), Picture(np.zeros((1024, 588), np.uint8), 32, 32), Text([1] * 2032, supervised=True)]]


@functools.cache
def seven_billion(pairing):
    """(model, trained paths, statistics of 256 rows of 16 words, a picture of 1,024 patches, 2,032 words) of the pods'
    specification."""
    method = variants.vora(QWEN_7B, PatchEmbed(), Vit(), pairing=pairing)
    stage = method.stage('pretrain')
    batch = stack([layout(ROW, Budgets(3072, 1024, 1, 588), rule=method.vision_tokens)])
    shapes = nn.unbox(jax.eval_shape(stage.model.init, jax.random.key(0), batch)['params'])
    statistics = statistics_of(batch, stage.model, 1, 'pallas_tpu', 'tpu').times(256)
    # The specification takes logits of 2,048 slots of a row, and counts whole tiles.
    statistics = dataclasses.replace(statistics, targets=Count(256 * 2048, 256 * 2048))
    return stage.model, flatten(partition(shapes, stage.trainable)[0]), statistics


def test_the_specifications_table_of_7b():
    model, trained, statistics = seven_billion('input_to_output')
    work = {one.part: one for one in step_work(model, trained, statistics, 'full')}
    told = {'base': (10.26, 10.26), 'adapters': (3.48, 6.97), 'attention': (.54, 1.35), 'head': (.57, .57),
            'teacher': (.40, 0), 'distillation_heads': (.07, .14), 'patch_embedding': (.003, .006)}
    assert {part: (one.forward / 1e15, one.backward / 1e15) for part, one in work.items()} == {
        part: pytest.approx(pair, abs=0.006) for part, pair in told.items()}
    assert model_flops(work.values()) == pytest.approx(34.62e15, abs=0.005e15)
    pairs = statistics.attention.pairs
    assert pairs.needed / (256 * 3072**2) == pytest.approx(0.556, abs=5e-4)
    assert pairs.computed / (256 * 3072**2) == pytest.approx(0.611, abs=5e-4) and statistics.attention.backward_products == 7


# The specification's, with whole tiles of 128 x 512 (0.667 of all pairs); the kernel walks halves of tiles.
@pytest.mark.parametrize('remat, executed, ceiling', [
    ('full', 46.98, .737), ('attention', 46.33, .747), ('adapters', 44.77, .773), ('no_mlp', 43.16, .802),
    ('matmuls', 35.71, .969)])
def test_the_specifications_ceilings_of_7b(remat, executed, ceiling):
    model, trained, statistics = seven_billion('input_to_output')
    area = statistics.attention._replace(pairs=statistics.attention.pairs._replace(computed=256 * 3072**2 * 2 / 3))
    work = step_work(model, trained, dataclasses.replace(statistics, attention=area), remat)
    assert executed_flops(work) / 1e15 == pytest.approx(executed, abs=0.006)
    assert model_flops(work) / executed_flops(work) == pytest.approx(ceiling, abs=6e-4)


def test_heads_on_states_that_leave_a_layer_make_its_last_product_again_unless_they_are_kept():
    layers = 24 * 256 * 3072 * 2 * 3584
    for remat, more in (('full', layers * (18944 + 1024)), ('attention', 0)):  # the base's product, the adapter's second
        inner, outer = (executed_flops(step_work(*seven_billion(pairing), remat))
                        for pairing in ('input_to_output', 'output_to_output'))
        assert outer - inner == pytest.approx(more)


def test_flops_of_a_row_are_those_of_its_batch():
    """From the counts of the step alone; tiles and chunks as in another batch."""
    method, model = ALL['lavin'], ALL['lavin'].stage('finetune').model
    batches = [fake_batch(4, 40, 27, PATCH.patch_size, VOCAB, 4, seed, rule=method.vision_tokens) for seed in (1, 2)]
    _, trained = jaxpr_of(method.stage('finetune'), batches[0], 1)
    flops = flops_of_row(model, trained, statistics_of(batches[0], model))
    row = jax.device_get(counts(jax.tree.map(jax.numpy.asarray, batches[1])))
    pairs = {f'num_{kind}attention_pairs': float(np.maximum(one.key_stop - one.key_start, 0).sum())
             for kind, one in (('', batches[1]), ('image_', batches[1].patches))}
    exact = step_work(model, trained, statistics_of(batches[1], model))
    assert flops(row | pairs)[0] == pytest.approx(model_flops(exact), rel=1e-5)
    assert flops(row | pairs)[1] == pytest.approx(executed_flops(exact), rel=0.03)
    assert flops(row)[0] == pytest.approx(model_flops(exact), rel=0.05)
