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
from vora_jax.vision.encoder_frontend import EncoderFrontend, Projector
from vora_jax.vision.image_encoder import ImageEncoder
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
                  VisionTokenRule(vit.patch_embed.patch_size, vit.patch_embed.cls_token))


def image_encoder(vit: Vit) -> Method:
    """A vision encoder alone, not to be trained: what `vora import` makes of one, for other runs to start from."""
    rule = VisionTokenRule(vit.patch_embed.patch_size, vit.patch_embed.cls_token)
    return Method('image_encoder', {'frozen': Stage(ImageEncoder(vit), trainable=())}, rule)


def llava(llm: LanguageModel, encoder: Vit, projector: Projector, taps: tuple[int, ...] = (-2,)) -> Method:
    """LLaVA-1.5 (arXiv 2310.03744): a frozen encoder's features, a projector, and a causal language model.

    pretrain: trains the projector. finetune: projector and language model.
    """
    groups = group_layers([((), False)] * llm.num_layers)
    model = VisionLanguageModel(llm, groups, EncoderFrontend(encoder, taps, projector))
    rule = VisionTokenRule(encoder.patch_embed.patch_size, encoder.patch_embed.cls_token, bidirectional=False)
    return Method('llava', {
        'pretrain': Stage(model, ('frontend/projector_*',)),
        'finetune': Stage(model, ('frontend/projector_*', 'decoder/*')),
    }, rule)


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
) -> Method:
    """Vision as LoRA (arXiv 2503.20680): patches enter the LLM, LoRA in its first blocks, ViT blocks as teachers.

    pretrain: trains adapters, patch embedding and heads; head i of the first `teacher.num_layers` layers meets the
    teacher's block i, cosine, weight 1 (`distill_weight` 0 drops the teacher). finetune: the merged model, all trained.

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
    adapters = tuple((name, (LowRank(rank, scale, dropout, scope),)) for name in targets)
    paired = tuple(range(teacher.num_layers)) if distill_weight else ()
    biases = tuple(name for name in targets if name not in llm.biases) if extra_biases else ()
    plain = ((), ())
    groups = group_layers([(table, i in paired, extra) for i in range(llm.num_layers)
                           for table, extra in [(adapters, biases) if i < num_adapted_layers else plain]])
    distillation = Distillation(teacher, paired, paired, pairing, head_eps) if paired else None
    adapted = VisionLanguageModel(llm, groups, PatchFrontend(patch_embed), distillation)
    trainable = ('*/adapter_*', 'frontend/*', *(f'decoder/*/{name}/bias' for name in biases))
    trainable += ('*/side/*',) if paired else ()
    return Method('vora', {
        'pretrain': Stage(adapted, trainable, distill_weight, merges_into='finetune'),
        'finetune': Stage(merged_model(adapted)),
    }, VisionTokenRule(patch_embed.patch_size, teacher.patch_embed.cls_token and bool(paired),
                       join_adjacent=join_adjacent_images))
