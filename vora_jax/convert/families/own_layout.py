"""config.json of the folders that export writes."""
import dataclasses
from typing import Any

from vora_jax.llm.decoder import LanguageModel
from vora_jax.method import VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import Adapter, DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.gated_prompts import GatedPrompts
from vora_jax.nn.modality_mixture import MixtureTable, ModalityMixture
from vora_jax.nn.stack import LayerGroup, join_groups
from vora_jax.ops.rope import RopeScaling
from vora_jax.types import UserError
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import EncoderFrontend, Projector
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.vit import Vit

MODEL_TYPE = 'vora_jax'
MODEL_CLASS = 'VoraJaxForCausalLM'
ADAPTERS = {'low_rank': LowRank, 'dual_low_rank': DualLowRank, 'modality_kernel': ModalityKernel}


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How prompts are made of questions and pictures; plain values, so that the exported folder can hold them.

    tokenizer: folder of the tokenizer.    eos_id: id that ends an answer.
    system: system message of conversations that bring none; '' for none.
    min_patches, max_patches, image_kind, side, color, background, tiles: how a picture is resized, see
        `data.config.ImagePolicy`.
    """

    tokenizer: str
    eos_id: int
    system: str = ''
    min_patches: int = 1
    max_patches: int = 1024
    image_kind: str = 'native'
    side: int = 0
    color: tuple[int, int, int] = (0, 0, 0)
    background: tuple[int, int, int] = (255, 255, 255)
    tiles: tuple[tuple[int, int], ...] = ()


def own_config(model: VisionLanguageModel, rule: VisionTokenRule | None, prompting: Prompting) -> dict[str, Any]:
    """The content of config.json but for token ids and dtype; sizes under Qwen2's names.

    Distillation, dtypes of activations and remat are no part of it.

    Raises:
        UserError: the rule does not fit the model.
    """
    llm, vision, groups = model.llm, None, model_groups(model)
    if model.vision is not None:
        vision = {'patch_embed': dataclasses.asdict(model.vision.patch_embed)}
    if isinstance(model.vision, EncoderFrontend):
        vision |= _encoder_fields(model.vision, rule)
    if (rule is not None and rule.route_token) != model.route_token:
        raise UserError('export: the method\'s rule for ROUTE slots and its model\'s modality embedding do not belong '
                        'together; give both or none.')
    plain = not any(group.adapters or group.biases or group.mixtures or group.prompts for group in groups)
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
            'adapters': {linear: [_adapter_fields(adapter) for adapter in table] for linear, table in group.adapters},
            'mixtures': _mixture_fields(group.mixtures), 'num_prompts': group.prompts.num_prompts if group.prompts else 0,
        } for group in groups],
        'vision': vision,
    }
    if vision is not None:
        has_cls = rule.cls and isinstance(model.vision, EncoderFrontend)  # else it serves a teacher only
        config['vision_tokens'] = dataclasses.asdict(dataclasses.replace(rule, cls=has_cls))
        del config['vision_tokens']['patch_size']
        config['image_policy'] = {'kind': prompting.image_kind, 'min_patches': prompting.min_patches,
                                  'max_patches': prompting.max_patches, 'side': prompting.side, 'color': prompting.color,
                                  'background': prompting.background, 'tiles': prompting.tiles}
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
            adapters=tuple((linear, tuple(map(_adapter, table))) for linear, table in group['adapters'].items()),
            mixtures=_mixtures(group.get('mixtures', {})),
            prompts=GatedPrompts(group['num_prompts']) if group.get('num_prompts') else None)
            for group in config['layer_groups'])
        groups = groups or (LayerGroup(llm.num_layers),)
        if config['vision'] is None:
            return VisionLanguageModel(llm, groups), None
        patch_embed = PatchEmbed(**_tuples(config['vision']['patch_embed']))
        vision, rule = PatchFrontend(patch_embed), VisionTokenRule(patch_embed.patch_size, **config['vision_tokens'])
        if 'encoder' in config['vision']:
            vision = _frontend(patch_embed, rule, config['vision'])
        return VisionLanguageModel(llm, groups, vision, route_token=rule.route_token), rule
    except (KeyError, TypeError) as error:
        raise UserError(f'config.json is not as `vora export` writes it ({type(error).__name__}: {error}); export the '
                        'checkpoint again with this version.') from error


def model_groups(model: VisionLanguageModel) -> tuple[LayerGroup, ...]:
    """The model's groups without side modules; those that no longer differ are one."""
    return join_groups(dataclasses.replace(group, side=False) for group in model.groups)


def _encoder_fields(vision: EncoderFrontend, rule: VisionTokenRule) -> dict[str, Any]:
    """Of a front end with an encoder, beyond the patch embedding; `select` and `pool` stand in the rule."""
    if rule.cls and not vision.patch_embed.cls_token:
        raise UserError('export: the method gives pictures a [cls] slot, but PatchEmbed.cls_token is off; turn it on.')
    if (rule.select, rule.tokens_per_place, rule.pool) != (vision.select, vision.tokens_per_place, vision.pool):
        raise UserError(f'export: the front end gives {vision.tokens_per_place} vectors of each {vision.select} (pool '
                        f'{vision.pool}), and the method\'s rule makes {rule.tokens_per_place} slots of each {rule.select} '
                        f'(pool {rule.pool}); make them equal.')
    encoder = dataclasses.asdict(vision.encoder)
    del encoder['patch_embed']
    fusion = dataclasses.asdict(vision.fusion) if isinstance(vision.fusion, CueEnhancer) else vision.fusion
    return {'encoder': encoder, 'taps': vision.taps, 'fusion': fusion, 'projector': dataclasses.asdict(vision.projector),
            'mixtures': _mixture_fields(vision.mixtures)}


def _frontend(patch_embed: PatchEmbed, rule: VisionTokenRule, fields: dict[str, Any]) -> EncoderFrontend:
    fusion = fields.get('fusion', 'channels')
    return EncoderFrontend(
        Vit(patch_embed, **_tuples(fields['encoder'])), tuple(fields['taps']), Projector(**fields['projector']), rule.select,
        CueEnhancer(**fusion) if isinstance(fusion, dict) else fusion, _mixtures(fields.get('mixtures', {})), rule.pool)


def _adapter_fields(adapter: Adapter) -> dict[str, Any]:
    kind, = (kind for kind, made in ADAPTERS.items() if type(adapter) is made)
    return {'kind': kind, **dataclasses.asdict(adapter)}


def _adapter(fields: dict[str, Any]) -> Adapter:
    return ADAPTERS[fields.get('kind', 'low_rank')](**{name: value for name, value in fields.items() if name != 'kind'})


def _mixture_fields(table: MixtureTable) -> dict[str, Any]:
    return {site: dataclasses.asdict(mixture) for site, mixture in table}


def _mixtures(fields: dict[str, Any]) -> MixtureTable:
    return tuple((site, ModalityMixture(**mixture)) for site, mixture in fields.items())


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where our dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
