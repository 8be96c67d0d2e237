"""Debug-size models with random weights, prompts, pictures."""
import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import tiny_tokenizers
from tiny_methods import METHODS

from vora_jax import variants
from vora_jax.convert.export.exportable import smallest_batch
from vora_jax.convert.export.to_hf import Prompting
from vora_jax.convert.verify.comparison import Question
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.text.tokenizer import load_tokenizer, train_sentencepiece
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.llm.decoder import LanguageModel
from vora_jax.merge import merge
from vora_jax.method import Method, Stage, VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.block import LINEARS
from vora_jax.nn.gated_prompts import GatedPrompts
from vora_jax.nn.modality_mixture import ModalityMixture
from vora_jax.nn.stack import LayerGroup
from vora_jax.ops.rope import RopeScaling
from vora_jax.params import flatten, unflatten
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import EncoderFrontend, Projector
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.vit import Vit

VOCAB = 300
PATCH = 4
TEXTS = ['what is the colour of the shape?', 'is there a red triangle?', 'how many?', 'user', 'assistant',
         'no, it is blue'] * 9
KINDS = ('all', 'vision', 'text', 'merged', 'text_only')
LLM = LanguageModel(VOCAB, num_layers=3, width=24, mlp_width=40, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4,
                    norm_eps=1e-5)
QKV = ('q_proj', 'k_proj', 'v_proj')
UNGATED = tuple(linear for linear in LINEARS if linear != 'gate_proj')


def make_tokenizer(folder: pathlib.Path) -> str:
    train_sentencepiece(TEXTS, str(folder / 'tokenizer'), VOCAB)
    return str(folder / 'tokenizer')


def tokenizer_folders(tmp_path_factory) -> dict:
    """{kind: folder} of one tokenizer of each kind that can be exported."""
    def new(name):
        return tmp_path_factory.mktemp(name)

    model, qwen = tiny_tokenizers.llama_model(new('model')), tiny_tokenizers.byte_level(new('qwen'))
    return {'qwen': qwen, 'qwen_pair': tiny_tokenizers.pair(qwen, new('pair')), 'own': make_tokenizer(new('own')),
            'llama3': tiny_tokenizers.byte_level(new('llama3'), tiny_tokenizers.LLAMA3_MARKERS),
            'llama2': tiny_tokenizers.llama_json(model, new('llama2')), 'llama2_model': model,
            'llama2_legacy': tiny_tokenizers.llama_json(model, new('llama2_legacy'), legacy=True)}


@functools.cache
def make_model(kind: str):
    """(params, model): `kind` is a scope of unmerged adapters with teacher and heads, 'merged', or 'text_only'."""
    tied = kind in ('text', 'text_only')
    llm = dataclasses.replace(LLM, biases=() if tied else QKV, tied_head=tied)
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


def _embed(**changes) -> PatchEmbed:
    return PatchEmbed(PATCH, width=16, table_rows=3, table_cols=4, **changes)


def _built(model: VisionLanguageModel, **rule) -> Method:
    """A method of none of `variants`' functions."""
    return Method('built', {'only': Stage(model)}, VisionTokenRule(PATCH, **rule))


def _vit(embed: PatchEmbed, norm: str, activation: str, **changes) -> Vit:
    biases = UNGATED if norm == 'layer' else ()
    return Vit(embed, num_layers=3, mlp_width=20, num_heads=2, norm_eps=1e-5, norm=norm, activation=activation,
               biases=biases, **changes)


@functools.cache
def make_variety() -> dict[str, tuple[Method, str]]:
    """{kind: (method, stage)}: between them every choice that decoder, adapters, front ends and token rules have."""
    low = {scope: LowRank(rank, 0.6, scope=scope) for rank, scope in enumerate(('all', 'vision', 'text'), 2)}
    table = (('q_proj', tuple(low.values())), ('down_proj', (low['text'], low['all'])))
    several = (LayerGroup(1, table, biases=('o_proj',)),
               LayerGroup(1, (('gate_proj', (low['vision'],)),), biases=('up_proj', 'k_proj')), LayerGroup(1))
    llama = dataclasses.replace(LLM, tied_head=True, num_kv_heads=1, rope_scaling=RopeScaling(
        4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_positions=32))
    linear = dataclasses.replace(LLM, biases=QKV, rope_scaling=RopeScaling(3.0, 'linear'))
    qwen3 = dataclasses.replace(LLM, qk_norm=True, num_kv_heads=4)
    first_rows = _embed(positions='first_rows', bias=False)
    teacher = Vit(first_rows, num_layers=1, mlp_width=16, num_heads=2)
    clip = _vit(_embed(norm=False, bias=False, cls_token=True), 'layer', 'gelu_quick', pre_norm=True)
    dino = _vit(_embed(norm=False, positions='bicubic', cls_token=True, mask_token=True), 'layer', 'gelu', layer_scale=True)
    siglip = _vit(_embed(norm=False, mean=(0.5,) * 3, std=(0.4, 0.5, 0.6)), 'layer', 'gelu_tanh', pool='attention_mlp')
    aimv2 = _vit(_embed(positions='sincos'), 'rms', 'silu_gated', pool='attention')
    no_adapters = (LayerGroup(3),)
    patches = PatchFrontend(_embed(positions='bicubic', norm=False, cls_token=True, mask_token=True))
    dual = {scope: DualLowRank(rank, scope=scope) for rank, scope in enumerate(('all', 'vision', 'text'), 8)}
    kernels = (('q_proj', (ModalityKernel('text'), dual['vision'])), ('o_proj', (low['vision'], dual['all'])),
               ('v_proj', (ModalityKernel(), low['all'], ModalityKernel('text'))), ('up_proj', (dual['text'],)))
    mixture = ModalityMixture(4, 2, 0.7, 3.0)
    three, one = (dataclasses.replace(mixture, num_experts=count, num_groups=1) for count in (3, 1))
    routed = LayerGroup(1, mixtures=(('mlp', three), ('attention', mixture)))
    by_itself = dataclasses.replace(three, route_by='own')
    own = LayerGroup(2, (('k_proj', (ModalityKernel(),)),), mixtures=(('attention', by_itself),), prompts=GatedPrompts(2))
    tokens = EncoderFrontend(clip, (0, -1, 1), Projector(activation='silu', hidden_width=7), fusion='tokens',
                             mixtures=(('mlp', mixture), ('attention', one)))
    cls = EncoderFrontend(dino, (1, 0), Projector(3, hidden_width=9), 'cls', mixtures=(('mlp', three),))
    cued = EncoderFrontend(siglip, (-1, 0), Projector(1), fusion=CueEnhancer(4, 3, -1, final_norm=False))
    return {
        'llama': (variants.language_model(llama), 'pretrain'),
        'several': (_built(VisionLanguageModel(LLM, several, PatchFrontend(_embed()))), 'only'),
        'quirks': (variants.vora(linear, first_rows, teacher, 2, num_adapted_layers=2, extra_biases=True,
                                 join_adjacent_images=True), 'finetune'),
        'causal': (_built(VisionLanguageModel(qwen3, no_adapters, patches), bidirectional=False), 'only'),
        'clip': (variants.llava(LLM, clip, Projector()), 'finetune'),
        'dino': (_built(VisionLanguageModel(LLM, no_adapters, EncoderFrontend(dino, (0, -1), Projector(1, False))),
                        cls=True), 'only'),
        'siglip': (variants.llava(qwen3, siglip, Projector(3), (-1,)), 'pretrain'),
        'aimv2': (variants.llava(linear, aimv2, Projector(2, False), (-2, -1)), 'finetune'),
        'kernels': (_built(VisionLanguageModel(linear, (LayerGroup(3, kernels),), PatchFrontend(_embed()))), 'only'),
        'routed': (_built(VisionLanguageModel(LLM, (routed, own), tokens, route_token=True), cls=True, tokens_per_place=3,
                          route_token=True), 'only'),
        'cls': (_built(VisionLanguageModel(qwen3, no_adapters, cls), cls=True, select='cls', bidirectional=False), 'only'),
        'pooled': (variants.llava(LLM, clip, Projector(), pool=2), 'finetune'),
        'pooled_tokens': (_built(VisionLanguageModel(LLM, no_adapters, EncoderFrontend(
            dino, (0, -1), Projector(1), fusion='tokens', pool=3)), cls=True, tokens_per_place=2, pool=3), 'only'),
        'prompted': (variants.llama_adapter(qwen3, clip, Projector(1), GatedPrompts(3), 2, pool=2), 'finetune'),
        'cued': (_built(VisionLanguageModel(LLM, no_adapters, cued)), 'only'),
    }


@functools.cache
def make_any(kind: str):
    """(params, model, rule) of a kind of KINDS, METHODS or `make_variety`."""
    if kind in KINDS:
        params, model = make_model(kind)
        return params, model, VisionTokenRule(PATCH) if model.vision else None
    method, stage = METHODS[kind] if kind in METHODS else make_variety()[kind]
    model = method.stage(stage).model
    if kind in METHODS:  # the words of `make_tokenizer`
        model = model.clone(llm=dataclasses.replace(model.llm, vocab_size=VOCAB))
    return random_params(model), model, method.vision_tokens


def random_params(model):
    """Every parameter random, adapters too; large enough that logits are of order 1."""
    shapes = flatten(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), smallest_batch(model))['params']))
    rng = np.random.default_rng(7)
    drawn = {path: rng.normal(size=leaf.shape) * 0.2 + path.endswith('scale') for path, leaf in shapes.items()}
    return unflatten({path: jnp.asarray(array.astype(np.float32)) for path, array in drawn.items()})


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


def rows(questions, tokenizer: str, sees: bool, template: str = 'chatml', max_patches: int = 24,
         rule: VisionTokenRule | None = None) -> PromptRows:
    """The questions as rows of the training code; rule: None is that of KINDS."""
    data = Data((Source('none'),), tokenizer, template, image=ImagePolicy(max_patches))
    prompts = [Prompt(question.text, question.images) for question in questions]
    return PromptRows(prompts, data, rule or VisionTokenRule(PATCH) if sees else None, load_tokenizer(tokenizer))
