"""The papers' methods, one short function each.

Each takes leaf configurations and the paper's own numbers, and returns a `Method`: the model of each stage, what it
trains, and how many slots an image takes. Everything they combine is named for what it computes, in other files.
"""
from vora_jax.distill import Distillation, Pairing
from vora_jax.llm.decoder import LanguageModel
from vora_jax.merge import merged_model
from vora_jax.method import Method, Stage, VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.block import LINEARS
from vora_jax.nn.stack import group_layers
from vora_jax.types import Scope, UserError
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.token_classifier import TokenClassifier
from vora_jax.vision.vit import Vit


def language_model(llm: LanguageModel) -> Method:
    """A text-only language model, all of it trained: the base that a method then teaches to see."""
    model = VisionLanguageModel(llm, group_layers([((), False)] * llm.num_layers))
    return Method('language_model', {'pretrain': Stage(model)})


def image_tagger(vit: Vit, vocab_size: int) -> Method:
    """A ViT trained to predict the answers' tokens from the picture alone: a teacher for runs that have none.

    Text as classification labels, Huang et al. 2024 (SuperClass).
    """
    return Method('image_tagger', {'pretrain': Stage(TokenClassifier(vit, vocab_size))},
                  VisionTokenRule(vit.patch_embed.patch_size))


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
    pairing: Pairing = 'input_to_output',
) -> Method:
    """Vision as LoRA (arXiv 2503.20680): patches enter the LLM, LoRA in its first blocks, ViT blocks as teachers.

    pretrain: trains adapters, patch embedding and heads; head i of the first `teacher.num_layers` layers meets the
    teacher's block i, cosine, weight 1 (`distill_weight` 0 drops the teacher). finetune: the merged model, all trained.
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
    adapters = tuple((name, (LowRank(rank, scale, dropout, scope),)) for name in targets)
    paired = tuple(range(teacher.num_layers)) if distill_weight else ()
    groups = group_layers([(adapters if i < num_adapted_layers else (), i in paired) for i in range(llm.num_layers)])
    distillation = Distillation(teacher, paired, paired, pairing) if paired else None
    adapted = VisionLanguageModel(llm, groups, PatchFrontend(patch_embed), distillation)
    trainable = ('*/adapter_*', 'frontend/*') + (('*/side/*',) if paired else ())
    return Method('vora', {
        'pretrain': Stage(adapted, trainable, distill_weight, merges_into='finetune'),
        'finetune': Stage(merged_model(adapted)),
    }, VisionTokenRule(patch_embed.patch_size))
