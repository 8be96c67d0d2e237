"""Which method builds an exported model."""
import dataclasses
from typing import Any

from vora_jax import variants
from vora_jax.convert.families.own_layout import own_model
from vora_jax.method import VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import LowRank, ModalityKernel
from vora_jax.nn.block import LINEARS
from vora_jax.types import UserError
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import EncoderFrontend
from vora_jax.vision.vit import Vit

Arguments = tuple[str, str, dict[str, Any]]  # method, stage, arguments


def model_arguments(config: dict[str, Any]) -> Arguments:
    """(method, stage, arguments) of the function of `variants` that builds the model of this config.json.

    Raises:
        UserError: no method here builds such a model.
    """
    model, rule = own_model(config)
    if model.vision is None:
        method, stage, arguments = 'language_model', 'pretrain', {'llm': model.llm}
    elif isinstance(model.vision, EncoderFrontend):
        method, stage, arguments = _encoder_arguments(model, rule)
    else:
        method, stage, arguments = _patch_arguments(model, rule)
    same = False
    try:
        built = getattr(variants, method)(**arguments)
        twin = built.stage(stage).model
        same = (_told(twin), built.vision_tokens) == (_told(model), rule)
    except UserError:
        pass  # numbers that the method does not take
    if not same:
        raise UserError(f'config.json describes a model that no method here builds (`{method}` comes nearest); its '
                        'layer_groups, vision or vision_tokens are of another kind.')
    return method, stage, arguments


def _encoder_arguments(model: VisionLanguageModel, rule: VisionTokenRule) -> Arguments:
    """Of a model with an encoder, by what it has beyond the others."""
    vision, first, last = model.vision, model.groups[0], model.groups[-1]
    arguments = {'llm': model.llm, 'encoder': vision.encoder, 'projector': vision.projector, 'taps': vision.taps}
    targets = tuple(linear for linear, _ in first.adapters)
    adapter = first.adapters[0][1][0] if first.adapters else None
    adapted = {'adapter': adapter, 'targets': targets} if adapter else {}
    if first.mixtures:
        routed = dict(vision.mixtures)
        sites = tuple(site for site, _ in first.mixtures)
        arguments |= {'mixture': first.mixtures[0][1], 'sites': sites}
        if sites[0] in routed:
            arguments['route_images_by'] = routed[sites[0]].route_by
        return 'lavin', 'finetune', arguments
    if isinstance(vision.fusion, CueEnhancer):
        return 'vce_dual_lora', 'finetune' if adapter else 'pretrain', arguments | {'enhancer': vision.fusion} | adapted
    if rule.bidirectional and isinstance(adapter, ModalityKernel):
        return 'llavit', 'finetune', arguments | {'targets': targets}
    arguments['pool'] = vision.pool
    if last.prompts:
        prompted = {'prompts': last.prompts, 'num_prompted_layers': last.num_layers, 'biases': last.biases}
        return 'llama_adapter', 'finetune', arguments | prompted
    return 'llava', 'adapt' if adapter else 'finetune', arguments | adapted


def _patch_arguments(model: VisionLanguageModel, rule: VisionTokenRule) -> Arguments:
    """Of a model without an encoder. Nothing is left to distil: the teacher is a stand-in that `distill_weight` 0 drops."""
    first = model.groups[0]
    embed = model.vision.patch_embed
    arguments = {'llm': model.llm, 'patch_embed': embed, 'teacher': Vit(embed, num_layers=1, mlp_width=1, num_heads=1),
                 'distill_weight': 0.0, 'extra_biases': bool(first.biases), 'join_adjacent_images': rule.join_adjacent,
                 'num_adapted_layers': first.num_layers}
    if not first.adapters:
        biased = (*first.biases, *model.llm.biases)
        targets = tuple(linear for linear in LINEARS if linear in biased) if first.biases else LINEARS
        return 'vora', 'finetune', arguments | {'targets': targets}
    adapter = first.adapters[0][1][0]
    recipe = dataclasses.asdict(adapter) if isinstance(adapter, LowRank) else {'adapter': adapter}
    stage = 'finetune' if isinstance(adapter, ModalityKernel) else 'pretrain'  # a merge leaves such kernels
    return 'vora', stage, arguments | recipe | {'targets': tuple(linear for linear, _ in first.adapters)}


def _told(model: VisionLanguageModel) -> tuple:
    """What must be equal; of each layer (adapters, biases, mixtures, prompts), in no order of linears."""
    layers = [(dict(group.adapters), set(group.biases), dict(group.mixtures), group.prompts)
              for group in model.groups for _ in range(group.num_layers)]
    return model.llm, model.vision, layers, model.route_token
