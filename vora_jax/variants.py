"""The papers' methods, one short function each.

Each takes leaf configurations and the paper's own numbers, and returns a `Method`: the model of each stage, what it
trains, and how many slots an image takes. Everything they combine is named for what it computes, in other files.
"""
import dataclasses
from typing import Literal

from vora_jax.distill import Distillation, Pairing
from vora_jax.llm.decoder import LanguageModel
from vora_jax.merge import merged_model
from vora_jax.method import Method, Stage, VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import Adapter, DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.block import LINEARS, AdapterTable
from vora_jax.nn.gated_prompts import GatedPrompts
from vora_jax.nn.modality_mixture import ModalityMixture, Site
from vora_jax.nn.stack import LayerGroup, join_groups
from vora_jax.types import Scope, UserError
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import EncoderFrontend, Projector
from vora_jax.vision.image_encoder import ImageEncoder
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.token_classifier import TokenClassifier
from vora_jax.vision.vit import Vit


def language_model(llm: LanguageModel) -> Method:
    """A text-only language model, all of it trained: the base that a method then teaches to see."""
    model = VisionLanguageModel(llm, (LayerGroup(llm.num_layers),))
    return Method('language_model', {'pretrain': Stage(model)})


def image_tagger(vit: Vit, vocab_size: int) -> Method:
    """A ViT trained to predict the answers' tokens from the picture alone: a teacher for runs that have none.

    Text as classification labels, Huang et al. 2024 (SuperClass).
    """
    return Method('image_tagger', {'pretrain': Stage(TokenClassifier(vit, vocab_size))},
                  VisionTokenRule(vit.patch_embed.patch_size, vit.patch_embed.cls_token))


def image_encoder(vit: Vit) -> Method:
    """A vision encoder alone, not to be trained: what `vora import` makes of one, for other runs to start from."""
    rule = VisionTokenRule(vit.patch_embed.patch_size, vit.patch_embed.cls_token)
    return Method('image_encoder', {'frozen': Stage(ImageEncoder(vit), trainable=())}, rule)


def llava(llm: LanguageModel, encoder: Vit, projector: Projector, taps: tuple[int, ...] = (-2,),
          adapter: Adapter | None = None, targets: tuple[str, ...] = LINEARS, pool: int = 1) -> Method:
    """LLaVA-1.5 (arXiv 2310.03744): a frozen encoder's features, a projector, and a causal language model.

    pretrain: trains the projector. finetune: projector and language model. adapt, where an adapter is given: projector
    and the adapters of all layers (the LoRA recipe).
    pool: side of the windows of patches averaged into one token, as in InfMLLM (arXiv 2311.06791), whose `pool_out_size` k
    of an s x s grid is s / pool here.
    """
    frontend = EncoderFrontend(encoder, taps, projector, pool=pool)
    model = VisionLanguageModel(llm, (LayerGroup(llm.num_layers),), frontend)
    stages = {'pretrain': Stage(model, ('frontend/projector_*',)),
              'finetune': Stage(model, ('frontend/projector_*', 'decoder/*'))}
    if adapter is not None:
        adapted = model.clone(groups=(LayerGroup(llm.num_layers, _adapter_table(targets, adapter)),))
        merged = merged_model(adapted)
        if merged not in (model, adapted):  # adapters of vision slots leave kernels of vision slots
            stages['merged'] = Stage(merged, ('frontend/projector_*', 'decoder/*'))
        merges_into = {model: 'finetune', adapted: None}.get(merged, 'merged')
        stages['adapt'] = Stage(adapted, ('frontend/projector_*', '*/adapter_*'), merges_into=merges_into)
    return Method('llava', stages, _encoder_tokens(frontend, bidirectional=False))


def llavit(llm: LanguageModel, encoder: Vit, projector: Projector, taps: tuple[int, ...] = (4, 14, 22),
           targets: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj')) -> Method:
    """LLaViT (arXiv 2511.10301): vision slots have query, key and value kernels of their own and see their whole image.

    taps: the 5th, 15th and 23rd block of CLIP ViT-L, side by side in the channels. An image's slots see their own image,
    not (as the paper's formula reads) those of others, which would leak labels standing between two images.
    pretrain: trains projector and vision kernels. finetune: projector and language model.
    """
    frontend = EncoderFrontend(encoder, taps, projector)
    groups = (LayerGroup(llm.num_layers, _adapter_table(targets, ModalityKernel())),)
    model = VisionLanguageModel(llm, groups, frontend)
    return Method('llavit', {
        'pretrain': Stage(model, ('frontend/projector_*', '*/adapter_*')),
        'finetune': Stage(model, ('frontend/projector_*', 'decoder/*')),
    }, _encoder_tokens(frontend, bidirectional=True))


def vce_dual_lora(llm: LanguageModel, encoder: Vit, projector: Projector, enhancer: CueEnhancer = CueEnhancer(),
                  adapter: DualLowRank = DualLowRank(), taps: tuple[int, ...] = (-2, -8, -14, -20),
                  targets: tuple[str, ...] = ('q_proj', 'v_proj')) -> Method:
    """VCE + Dual-LoRA (arXiv 2411.12787): cues of lower ViT levels in the features, skill x task low-rank adapters.

    It starts from a LLaVA-1.5 whose projector and language model are trained. pretrain: trains enhancer and projector.
    finetune: and the adapters. Nothing merges: the adapters' channels are gated by their input.
    """
    frontend = EncoderFrontend(encoder, taps, projector, fusion=enhancer)
    model = VisionLanguageModel(llm, (LayerGroup(llm.num_layers),), frontend)
    adapted = model.clone(groups=(LayerGroup(llm.num_layers, _adapter_table(targets, adapter)),))
    seeing = 'frontend/projector_*', 'frontend/enhancer/*'
    return Method('vce_dual_lora', {
        'pretrain': Stage(model, seeing),
        'finetune': Stage(adapted, (*seeing, '*/adapter_*')),
    }, _encoder_tokens(frontend, bidirectional=False))


def lavin(llm: LanguageModel, encoder: Vit, projector: Projector = Projector(activation='silu', hidden_width=128),
          mixture: ModalityMixture = ModalityMixture(), taps: tuple[int, ...] = (3, 7, 11, 15, 19, 23),
          sites: tuple[Site, ...] = ('attention',),
          route_images_by: Literal['slot', 'own', 'first_row'] = 'slot') -> Method:
    """LaVIN, mixture-of-modality adaptation (arXiv 2305.15023): routed adapters in a frozen ViT and a frozen LLM.

    An image is one token for each tap, its [cls] after that block; a ROUTE slot tells the router whether it is there.
    projector: whoever binds another one states all its numbers: a plain `Projector()` is LLaVA's.
    Not here: the released evaluation's sampling, and its rotary positions that lag by one behind training's while decoding.
    route_images_by: see `ModalityMixture.route_by`, for the ViT; released weights were trained with 'first_row', which
    for single examples is 'own'. finetune: trains mixtures, projector (the "visual neck") and modality embedding.
    """
    table = tuple((site, mixture) for site in sites)
    images = tuple((site, dataclasses.replace(mixture, route_by=route_images_by)) for site in sites)
    frontend = EncoderFrontend(encoder, taps, projector, 'cls', 'tokens', images)
    model = VisionLanguageModel(llm, (LayerGroup(llm.num_layers, mixtures=table),), frontend, route_token=True)
    trainable = 'frontend/projector_*', '*/adapter_*', 'modality_embedding'
    return Method('lavin', {'finetune': Stage(model, trainable)},
                  dataclasses.replace(_encoder_tokens(frontend, bidirectional=False), route_token=True))


def vora(
    llm: LanguageModel,
    patch_embed: PatchEmbed,
    teacher: Vit,
    rank: int = 1024,
    scale: float = 1.0,
    dropout: float = 0.0,
    scope: Scope = 'all',
    num_adapted_layers: int = 24,
    targets: tuple[str, ...] = LINEARS,
    distill_weight: float = 1.0,
    pairing: Pairing = 'output_to_output',
    head_eps: float = 1e-6,
    extra_biases: bool = False,
    join_adjacent_images: bool = False,
    adapter: Adapter | None = None,
) -> Method:
    """Vision as LoRA (arXiv 2503.20680): patches enter the LLM, LoRA in its first blocks, ViT blocks as teachers.

    pretrain: trains adapters, patch embedding and heads; head i of the first `teacher.num_layers` layers meets the
    teacher's block i, cosine, weight 1 (`distill_weight` 0 drops the teacher). finetune: the merged model, all trained.
    adapter: stands on the adapted linears instead of the paper's LoRA of this rank, scale, dropout and scope.

    Quirks of the released code, off by default, on where an imported checkpoint has them: `extra_biases` gives every
    adapted linear a trained bias; `join_adjacent_images`, see `VisionTokenRule`; `pairing` and `head_eps`, see
    `Distillation`; `PatchEmbed.positions = 'first_rows'`.
    """
    if teacher.patch_embed.patch_size != patch_embed.patch_size:
        raise UserError(f'vora: the teacher\'s patches are {teacher.patch_embed.patch_size} pixels wide and the student\'s '
                        f'{patch_embed.patch_size}; they must be equal.')
    if not (num_adapted_layers <= llm.num_layers and teacher.num_layers <= llm.num_layers):
        raise UserError(f'vora: {num_adapted_layers} adapted layers and {teacher.num_layers} teacher blocks do not fit a '
                        f'language model of {llm.num_layers} layers.')
    unknown = sorted(set(targets) - set(LINEARS))
    if unknown or not targets or num_adapted_layers < 1 or rank < 1:
        raise UserError(f'vora: nothing to adapt with targets {targets}, {num_adapted_layers} layers and rank {rank}; '
                        f'take targets from {", ".join(LINEARS)}, and at least 1 layer and rank 1.')
    table = _adapter_table(targets, adapter or LowRank(rank, scale, dropout, scope))
    paired = tuple(range(teacher.num_layers)) if distill_weight else ()
    biases = tuple(name for name in targets if name not in llm.biases) if extra_biases else ()
    plain = ((), ())
    groups = join_groups(LayerGroup(1, adapters, i in paired, extra) for i in range(llm.num_layers)
                         for adapters, extra in [(table, biases) if i < num_adapted_layers else plain])
    distillation = Distillation(teacher, paired, paired, pairing, head_eps) if paired else None
    adapted = VisionLanguageModel(llm, groups, PatchFrontend(patch_embed), distillation)
    trainable = ('*/adapter_*', 'frontend/*', *(f'decoder/*/{name}/bias' for name in biases))
    trainable += ('*/side/*',) if paired else ()
    return Method('vora', {
        'pretrain': Stage(adapted, trainable, distill_weight, merges_into='finetune'),
        'finetune': Stage(merged_model(adapted)),
    }, VisionTokenRule(patch_embed.patch_size, teacher.patch_embed.cls_token and bool(paired),
                       join_adjacent=join_adjacent_images))


def llama_adapter(llm: LanguageModel, encoder: Vit, projector: Projector, prompts: GatedPrompts = GatedPrompts(),
                  num_prompted_layers: int = 31, taps: tuple[int, ...] = (-1,), pool: int = 4,
                  biases: tuple[str, ...] = ('q_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')) -> Method:
    """LLaMA-Adapter V2 (arXiv 2304.15010): a frozen language model with zero-gated prompts, its norms and biases tuned.

    pretrain: trains projector, prompts and gates. finetune: norms and biases; both as the released code does it.
    Faithful: prompts and gates of the last `num_prompted_layers` (V1: 30), and which linears get a new bias (released 7B).
    Not faithful: images come early, as in the paper, but as ordinary vision tokens that all layers see: the patch grid
    (without CLIP's last norm) averaged by `pool`, 16 tokens for 16 x 16 patches, where the paper has 20 queries of a small
    transformer, and the released code adds 10 of these to the prompts of all layers. No scale beside each bias, like the
    released 7B and unlike the paper; nor the paper's joint training, where a batch with images trains other parameters than
    one without.
    """
    plain = llm.num_layers - num_prompted_layers
    if not 0 <= plain < llm.num_layers:
        raise UserError(f'llama_adapter.num_prompted_layers = {num_prompted_layers} does not fit a language model of '
                        f'{llm.num_layers} layers.')
    extra = tuple(name for name in biases if name not in llm.biases)
    groups = (LayerGroup(num_prompted_layers, biases=extra, prompts=prompts),)
    groups = (LayerGroup(plain, biases=extra), *groups) if plain else groups
    frontend = EncoderFrontend(encoder, taps, projector, pool=pool)
    model = VisionLanguageModel(llm, groups, frontend)
    return Method('llama_adapter', {
        'pretrain': Stage(model, ('frontend/projector_*', '*/adapter_*')),
        'finetune': Stage(model, ('decoder/*norm/scale', 'decoder/*/bias')),
    }, _encoder_tokens(frontend, bidirectional=False))


def _adapter_table(targets: tuple[str, ...], adapter: Adapter) -> AdapterTable:
    """The same adapter on each of these linears; UserError for one that no block has."""
    if unknown := sorted(set(targets) - set(LINEARS)):
        raise UserError(f'targets: a block has no linear {unknown[0]!r}; choose from {", ".join(LINEARS)}.')
    return tuple((name, (adapter,)) for name in targets)


def _encoder_tokens(frontend: EncoderFrontend, bidirectional: bool) -> VisionTokenRule:
    """The token rule of a front end with an encoder."""
    embed = frontend.patch_embed
    return VisionTokenRule(embed.patch_size, embed.cls_token, bidirectional, select=frontend.select, pool=frontend.pool,
                           tokens_per_place=frontend.tokens_per_place)
