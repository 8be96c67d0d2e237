"""The folders that export writes: names, config.json."""
import dataclasses
from typing import Any

from vora_jax import variants
from vora_jax.convert.names.layouts import BATCHED_TABLE, CONVOLUTION, SAME, TRANSPOSED
from vora_jax.convert.names.name_map import Row, Table, joined
from vora_jax.convert.names.tables.decoder import BLOCK, DECODER, LAYER, LINEAR_NAMES
from vora_jax.llm.decoder import LanguageModel
from vora_jax.method import VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.block import LINEARS
from vora_jax.nn.stack import LayerGroup, join_groups
from vora_jax.ops.rope import RopeScaling
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import EncoderFrontend, Projector
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.vit import Vit

MODEL_TYPE = 'vora_jax'
MODEL_CLASS = 'VoraJaxForCausalLM'
MAX_PROJECTOR_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How prompts are made of questions and pictures; plain values, so that the exported folder can hold them.

    tokenizer: folder of the tokenizer.    eos_id: id that ends an answer.
    system: system message of conversations that bring none; '' for none.
    min_patches, max_patches, image_kind, side, color: how a picture is resized, see `data.config.ImagePolicy`.
    """

    tokenizer: str
    eos_id: int
    system: str = ''
    min_patches: int = 1
    max_patches: int = 1024
    image_kind: str = 'native'
    side: int = 0
    color: tuple[int, int, int] = (0, 0, 0)


def _patch_embed_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f'{ours}kernel', f'{theirs}patchifier.proj.weight', CONVOLUTION),
        Row(f'{ours}bias', f'{theirs}patchifier.proj.bias', SAME),
        Row(f'{ours}norm/scale', f'{theirs}patchifier.norm.weight', SAME),
        Row(f'{ours}positions', f'{theirs}pos_embed', BATCHED_TABLE),
        Row(f'{ours}cls', f'{theirs}cls_token', SAME),
        Row(f'{ours}cls_position', f'{theirs}cls_position', SAME),
        Row(f'{ours}mask_token', f'{theirs}mask_token', SAME),
    )


def _norm_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    return Row(f'{ours}/scale', f'{theirs}.weight', SAME), Row(f'{ours}/bias', f'{theirs}.bias', SAME)


def _linear_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    return Row(f'{ours}/kernel', f'{theirs}.weight', TRANSPOSED), Row(f'{ours}/bias', f'{theirs}.bias', SAME)


def _encoder_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Of a `Vit`; its layers have the names of the decoder's."""
    block, layer = f'{ours}blocks/*/block/', f'{theirs}layers.{{layer}}.'
    pool = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj')
    return (
        *_patch_embed_rows(f'{ours}patch_embed/', f'{theirs}embeddings.'),
        *_norm_rows(f'{ours}pre_norm', f'{theirs}pre_norm'),
        *_norm_rows(f'{block}attention_norm', f'{layer}input_layernorm'),
        *(row for linear, name in LINEAR_NAMES.items() for row in _linear_rows(block + linear, layer + name)),
        *_norm_rows(f'{block}mlp_norm', f'{layer}post_attention_layernorm'),
        *(Row(block + scale, layer + scale, SAME) for scale in ('attention_scale', 'mlp_scale')),
        *_norm_rows(f'{ours}norm', f'{theirs}norm'),
        Row(f'{ours}pool/probe', f'{theirs}pool.probe', SAME),
        *(row for linear in pool for row in _linear_rows(f'{ours}pool/{linear}', f'{theirs}pool.{linear}')),
        *_norm_rows(f'{ours}pool/mlp_norm', f'{theirs}pool.mlp_norm'),
    )


# Qwen3's names for the decoder, PEFT-like ones for its adapters, VoRA's for the front end without an encoder.
OWN = joined(DECODER, Table(rows=(
    *(Row(f'{BLOCK}{linear}/adapter_#/{side}', f'{LAYER}{name}.lora_{side.upper()}.#.weight', TRANSPOSED)
      for linear, name in LINEAR_NAMES.items() for side in 'ab'),
    *_patch_embed_rows('frontend/patch_embed/', 'vision_embedding.'),
    Row('frontend/out_proj', 'vision_embedding.out_proj.weight', TRANSPOSED),
    *_encoder_rows('frontend/encoder/', 'vision_tower.'),
    *(row for layer in range(MAX_PROJECTOR_LAYERS)
      for row in _linear_rows(f'frontend/projector_{layer}', f'projector.{layer}')),
)))


def own_config(model: VisionLanguageModel, rule: VisionTokenRule | None, prompting: Prompting) -> dict[str, Any]:
    """The content of config.json but for token ids and dtype; sizes under Qwen2's names.

    Distillation, dtypes of activations and remat are no part of it.

    Raises:
        UserError: the rule gives pictures a [cls] slot that the encoder has no vector for.
    """
    llm, vision, groups = model.llm, None, model_groups(model)
    if model.vision is not None:
        vision = {'patch_embed': dataclasses.asdict(model.vision.patch_embed)}
    if isinstance(model.vision, EncoderFrontend):
        if rule.cls and not model.vision.patch_embed.cls_token:
            raise UserError('export: the method gives pictures a [cls] slot, but PatchEmbed.cls_token is off; turn it on.')
        encoder = dataclasses.asdict(model.vision.encoder)
        del encoder['patch_embed']
        projector = dataclasses.asdict(model.vision.projector)
        vision |= {'encoder': encoder, 'taps': model.vision.taps, 'projector': projector}
    plain = not any(group.adapters or group.biases for group in groups)
    config = {
        'model_type': MODEL_TYPE, 'architectures': [MODEL_CLASS],
        'auto_map': {'AutoConfig': 'configuration_vora_jax.VoraJaxConfig',
                     'AutoModelForCausalLM': f'modeling_vora_jax.{MODEL_CLASS}'},
        'vocab_size': llm.vocab_size, 'hidden_size': llm.width, 'intermediate_size': llm.mlp_width,
        'num_hidden_layers': llm.num_layers, 'num_attention_heads': llm.num_heads,
        'num_key_value_heads': llm.num_kv_heads, 'head_dim': llm.head_dim, 'hidden_act': 'silu',
        'rope': {'theta': llm.rope_theta, 'scaling': llm.rope_scaling and dataclasses.asdict(llm.rope_scaling)},
        'rms_norm_eps': llm.norm_eps, 'biases': llm.biases, 'qk_norm': llm.qk_norm, 'tie_word_embeddings': llm.tied_head,
        'max_position_embeddings': llm.max_positions,
        'layer_groups': [] if plain else [{
            'num_layers': group.num_layers, 'biases': group.biases,
            'adapters': {linear: [dataclasses.asdict(adapter) for adapter in table] for linear, table in group.adapters},
        } for group in groups],
        'vision': vision,
    }
    if vision is not None:
        has_cls = rule.cls and isinstance(model.vision, EncoderFrontend)  # else it serves a teacher only
        config['vision_tokens'] = {'cls': has_cls, 'bidirectional': rule.bidirectional, 'join_adjacent': rule.join_adjacent}
        config['image_policy'] = {'kind': prompting.image_kind, 'min_patches': prompting.min_patches,
                                  'max_patches': prompting.max_patches, 'side': prompting.side, 'color': prompting.color}
    return config


def own_model(config: dict[str, Any]) -> tuple[VisionLanguageModel, VisionTokenRule | None]:
    """The model of a config.json that `own_config` made, and its rule.

    Raises:
        UserError: naming a field that is missing or unknown.
    """
    try:
        scaling = config['rope']['scaling']
        llm = LanguageModel(
            config['vocab_size'], config['num_hidden_layers'], config['hidden_size'], config['intermediate_size'],
            config['num_attention_heads'], config['num_key_value_heads'], config['head_dim'],
            config['rope']['theta'], config['rms_norm_eps'], scaling and RopeScaling(**scaling),
            tuple(config['biases']), config['qk_norm'], config['tie_word_embeddings'],
            config['max_position_embeddings'])
        groups = tuple(LayerGroup(
            group['num_layers'], biases=tuple(group['biases']),
            adapters=tuple((linear, tuple(LowRank(**adapter) for adapter in table))
                           for linear, table in group['adapters'].items())) for group in config['layer_groups'])
        groups = groups or (LayerGroup(llm.num_layers),)
        if config['vision'] is None:
            return VisionLanguageModel(llm, groups), None
        patch_embed = PatchEmbed(**_tuples(config['vision']['patch_embed']))
        vision = PatchFrontend(patch_embed)
        if 'encoder' in config['vision']:
            encoder = Vit(patch_embed, **_tuples(config['vision']['encoder']))
            vision = EncoderFrontend(encoder, tuple(config['vision']['taps']), Projector(**config['vision']['projector']))
        return VisionLanguageModel(llm, groups, vision), VisionTokenRule(patch_embed.patch_size, **config['vision_tokens'])
    except (KeyError, TypeError) as error:
        raise UserError(f'config.json is not as `vora export` writes it ({type(error).__name__}: {error}); export the '
                        'checkpoint again with this version.') from error


def model_arguments(config: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """(method, stage, arguments) of the function of `variants` that builds the model of this config.json.

    Raises:
        UserError: no method here builds such a model.
    """
    model, rule = own_model(config)
    if model.vision is None:
        method, stage, arguments = 'language_model', 'pretrain', {'llm': model.llm}
    elif isinstance(model.vision, EncoderFrontend):
        vision = model.vision
        method, stage, arguments = 'llava', 'finetune', {
            'llm': model.llm, 'encoder': vision.encoder, 'projector': vision.projector, 'taps': vision.taps}
    else:
        method, (stage, arguments) = 'vora', _vora_arguments(model, rule)
    built = getattr(variants, method)(**arguments)
    twin = built.stage(stage).model
    if (twin.llm, twin.vision, _layers(twin), built.vision_tokens) != (model.llm, model.vision, _layers(model), rule):
        raise UserError(f'config.json describes a model that no method here builds (`{method}` comes nearest); its '
                        'layer_groups or vision_tokens are of another kind.')
    return method, stage, arguments


def model_groups(model: VisionLanguageModel) -> tuple[LayerGroup, ...]:
    """The model's groups without side modules; those that no longer differ are one."""
    return join_groups(dataclasses.replace(group, side=False) for group in model.groups)


def _vora_arguments(model: VisionLanguageModel, rule: VisionTokenRule) -> tuple[str, dict[str, Any]]:
    """(stage, arguments); nothing is left to distil, so the teacher is a stand-in that `distill_weight` 0 drops."""
    first = model.groups[0]
    embed = model.vision.patch_embed
    arguments = {'llm': model.llm, 'patch_embed': embed, 'teacher': Vit(embed, num_layers=1, mlp_width=1, num_heads=1),
                 'distill_weight': 0.0, 'extra_biases': bool(first.biases), 'join_adjacent_images': rule.join_adjacent,
                 'num_adapted_layers': first.num_layers}
    if not first.adapters:
        biased = (*first.biases, *model.llm.biases)
        targets = tuple(linear for linear in LINEARS if linear in biased) if first.biases else LINEARS
        return 'finetune', arguments | {'targets': targets}
    adapter = first.adapters[0][1][0]
    return 'pretrain', arguments | dataclasses.asdict(adapter) | {'targets': tuple(linear for linear, _ in first.adapters)}


def _layers(model: VisionLanguageModel) -> list[tuple]:
    """For each layer (adapters, biases), in no order of linears."""
    return [(dict(group.adapters), set(group.biases)) for group in model.groups for _ in range(group.num_layers)]


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where our dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
