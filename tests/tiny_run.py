"""Debug-size methods, batches, runs on disk."""

import dataclasses
import functools
import json
import math
import pathlib
import random

import jax
import numpy as np
import optax

from vora_jax import variants
from vora_jax.batch import Batch
from vora_jax.data.fake import fake_batch
from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.llm.decoder import LanguageModel
from vora_jax.method import Method, Stage
from vora_jax.training import state
from vora_jax.training.config import Mesh, Optimizer
from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.head import make_cross_entropy
from vora_jax.training.mesh.row_shards import row_shard
from vora_jax.training.program import placed
from vora_jax.training.step import compile_step, make_step
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

VOCAB = 320
LLM = LanguageModel(VOCAB, num_layers=3, width=16, mlp_width=32, num_heads=4, num_kv_heads=2, head_dim=4)
EMBED = PatchEmbed(patch_size=4, width=8, table_rows=4, table_cols=4)
VIT = Vit(EMBED, num_layers=2, mlp_width=16, num_heads=2)


def vora(dropout: float = 0.0) -> Method:
    targets = ('q_proj', 'down_proj')  # a program half as long as with all seven
    return variants.vora(LLM, EMBED, VIT, 2, dropout=dropout, num_adapted_layers=2, targets=targets)


def batch(seed: int = 0, rows: int = 8, text_only: bool = False) -> Batch:
    return fake_batch(rows, 32, 16, 4, VOCAB, 3, seed, text_only)


def start(
    stage: Stage,
    on: Batch,
    sizes: tuple[int, ...] = (1, 1, 1),
    accumulation: int = 1,
    seed: int = 0,
    optimizer: optax.GradientTransformation | None = None,
    rate: float = 1e-2,
):
    """(plan, state, frozen, step) of a stage on a mesh, with random parameters: no adapter is zero.

    sizes: data, fsdp, tensor and, where not usual, context and gather.

    With `optimizer` (of gradients alone, such as `optax.sgd(1.0)`) the change of the parameters shows the
    gradients.
    """
    config = Mesh(*sizes)
    mesh = sharding.make_mesh(config, jax.devices()[: math.prod(sizes[:4])])
    micro = jax.tree.map(lambda x: x[: x.shape[0] // accumulation], on)
    with sharding.use(mesh):
        plan = state.plan(stage, Optimizer(rate), micro, mesh, 'float32', how=config.gather)
        new, frozen = state.create(plan, seed, _random(plan.params))
        if optimizer is not None:
            plan = dataclasses.replace(plan, optimizer=optimizer)
            new = new._replace(opt_state=optimizer.init(new.trainable))
        rates = optax.constant_schedule(rate)
        one = make_step(plan.model, plan.optimizer, rates, stage.distill_weight, accumulation, seed,
                        in_shards=functools.partial(placed, plan=plan, mesh=mesh, how=config.gather),
                        cross_entropy=make_cross_entropy(mesh, config.gather))
        places = jax.tree.map(lambda x: x.sharding, new)
        values = _own_rows(on, mesh)
        lowered = compile_step(one, places, plan.frozen_shardings, mesh).lower(new, frozen, values)
        compiled = lowered.compile({'xla_backend_optimization_level': 0})  # they run a few times only

    def step(now, frozen, values):
        return compiled(now, frozen, _own_rows(values, mesh))

    return plan, new, frozen, step


def _own_rows(on: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """A global batch on the devices, of which each process gives the rows it would read."""
    index, count = row_shard(mesh)
    size = len(on.tokens) // count
    return sharding.to_device(jax.tree.map(lambda x: x[index * size:(index + 1) * size], on), sharding.rows(mesh))


def _random(shapes):
    """Random parameters by path, the same on every mesh; no initialisation is compiled."""
    rng = np.random.default_rng(7)

    def draw(path, shape):
        if path.endswith('scale'):
            return 1 + 0.1 * rng.normal(size=shape)
        return rng.normal(size=shape) / (shape[-2] ** 0.5 if len(shape) > 1 else 4)

    return {path: draw(path, shapes[path].shape).astype(np.float32) for path in sorted(shapes)}


@functools.cache
def questions() -> tuple[dict, ...]:
    pick = random.Random(0)
    words = 'red blue green circle square what is the colour of shape yes no a'.split()
    return tuple(
        {
            'id': str(i),
            'frames': [],
            'conversations': [
                {'from': 'human', 'value': ' '.join(pick.choices(words, k=5))},
                {'from': 'gpt', 'value': pick.choice(words)},
            ],
        }
        for i in range(60)
    )


def write_text_run(folder: pathlib.Path, **train: str) -> pathlib.Path:
    """A .gin file for a text-only language model of 40,000 parameters, with its data and tokenizer."""
    rows = questions()
    (folder / 'data.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
    texts = [turn['value'] for row in rows for turn in row['conversations']]
    train_sentencepiece(texts, str(folder / 'tokenizer'), VOCAB)
    settings = {
        'LanguageModel.vocab_size': VOCAB,
        'LanguageModel.num_layers': 2,
        'LanguageModel.width': 16,
        'LanguageModel.mlp_width': 32,
        'LanguageModel.num_heads': 2,
        'LanguageModel.num_kv_heads': 1,
        'LanguageModel.head_dim': 8,
        'Train.method': '@language_model()',
        'Train.stage': "'pretrain'",
        'Source.path': repr(str(folder / 'data.jsonl')),
        'Data.sources': '(@Source(),)',
        'Data.tokenizer': repr(str(folder / 'tokenizer')),
        'Data.max_slots': 64,
        'Train.steps': 30,
        'Train.batch_rows': 4,
        'Train.log_every': 5,
        'Checkpoint.every_steps': 5,
        'Optimizer.learning_rate': 0.01,
    } | train
    path = folder / 'run.gin'
    path.write_text('\n'.join(f'{name} = {value}' for name, value in settings.items()) + '\n')
    return path


def narrow() -> Stage:
    """A stage whose MLP is 6 wide, which 4 devices do not divide."""
    llm = dataclasses.replace(LLM, num_kv_heads=4, mlp_width=6)
    return variants.language_model(llm).stage('pretrain')
