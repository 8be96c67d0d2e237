"""Debug-size models with random weights, prompts, pictures."""
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vora_jax import variants
from vora_jax.convert.exportable import smallest_batch
from vora_jax.convert.to_hf import Prompting
from vora_jax.convert.verify import Question
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.llm.decoder import LanguageModel
from vora_jax.merge import merge
from vora_jax.method import VisionTokenRule
from vora_jax.params import flatten, unflatten
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

VOCAB = 300
PATCH = 4
TEXTS = ['what is the colour of the shape?', 'is there a red triangle?', 'how many?', 'user', 'assistant',
         'no, it is blue'] * 9
KINDS = ('all', 'vision', 'text', 'merged', 'text_only')


def make_tokenizer(folder: pathlib.Path) -> str:
    train_sentencepiece(TEXTS, str(folder / 'tokenizer'), VOCAB)
    return str(folder / 'tokenizer')


@functools.cache
def make_model(kind: str):
    """(params, model): `kind` is a scope of unmerged adapters with teacher and heads, 'merged', or 'text_only'."""
    tied = kind in ('text', 'text_only')
    llm = LanguageModel(VOCAB, num_layers=3, width=24, mlp_width=40, num_heads=4, num_kv_heads=2, head_dim=8,
                        rope_theta=1e4, norm_eps=1e-5, biases=() if tied else ('q_proj', 'k_proj', 'v_proj'), tied_head=tied)
    if kind == 'text_only':
        model = variants.language_model(llm).stage('pretrain').model
        return random_params(model), model
    embed = PatchEmbed(PATCH, width=16, table_rows=3, table_cols=4)
    scope = kind if kind != 'merged' else 'all'
    method = variants.vora(llm, embed, Vit(embed, num_layers=1, mlp_width=16, num_heads=2), rank=3, scale=0.7,
                           scope=scope, num_adapted_layers=2)
    model = method.stage('pretrain').model
    params = random_params(model)
    return merge(params, model) if kind == 'merged' else (params, model)


def random_params(model):
    """Every parameter random, adapters too; large enough that logits are of order 1."""
    shapes = flatten(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), smallest_batch(model))['params']))
    rng = np.random.default_rng(7)
    return unflatten({path: jnp.asarray(rng.normal(size=leaf.shape) * 0.2 + path.endswith('scale'), jnp.float32)
                      for path, leaf in shapes.items()})


def prompting(tokenizer: str, **changes) -> Prompting:
    return Prompting(tokenizer, load_tokenizer(tokenizer).eos_id, **{'max_patches': 24, **changes})


def make_questions(folder: pathlib.Path, sees: bool) -> list[Question]:
    """Prompts of different lengths: none, one and two pictures, native and other grids, sizes that are resized."""
    rng, files = np.random.default_rng(3), []
    for number, (height, width) in enumerate(((12, 16), (9, 30), (40, 21), (4, 4))):
        files.append(str(folder / f'{number}.png'))
        PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(files[-1])
    questions = [Question('is it red?'), Question('what is the colour of the shape, the shape?\nZ \U0001f642')]
    if sees:
        questions += [Question('what is this?', (files[0],)), Question('how many?', (files[1],)),
                      Question('<image> and <image>same?', (files[2], files[0])),
                      Question('<image><image>\nwhat', (files[3], files[1]))]
    return questions


def rows(questions, tokenizer: str, sees: bool, template: str = 'chatml', max_patches: int = 24) -> PromptRows:
    """The questions as rows of the training code."""
    data = Data((Source('none'),), tokenizer, template, image=ImagePolicy(max_patches))
    prompts = [Prompt(question.text, question.images) for question in questions]
    return PromptRows(prompts, data, VisionTokenRule(PATCH) if sees else None, load_tokenizer(tokenizer))
