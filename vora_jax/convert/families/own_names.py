"""The names of tensors in our exports."""
from vora_jax.convert.names.layouts import BATCHED_TABLE, CONVOLUTION, SAME, TRANSPOSED
from vora_jax.convert.names.name_map import Row, Table, joined
from vora_jax.convert.names.rows import linear_rows, norm_rows
from vora_jax.convert.names.tables.decoder import BLOCK, DECODER, LAYER, LINEAR_NAMES

MAX_PROJECTOR_LAYERS = MAX_EXPERTS = 8


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


def _adapter_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Of one linear: low-rank products as PEFT names them, and kernels for one modality."""
    return (
        *(Row(f'{ours}/adapter_#/{part}', f'{theirs}.lora_{name}.#.weight', TRANSPOSED)
          for part, name in (('a', 'A'), ('b', 'B'), ('task', 'T'))),
        *norm_rows(f'{ours}/adapter_#/norm', f'{theirs}.lora_layer_norm.#'),
        *linear_rows(f'{ours}/adapter_#', f'{theirs}.modality_proj.#'),
    )


def _mixture_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Of one block; an up-projection is [groups, inputs, outputs] on both sides."""
    return tuple(row for site in ('adapter_attention', 'adapter_mlp') for row in (
        Row(f'{ours}{site}/down_kernel', f'{theirs}{site}.down.weight', TRANSPOSED),
        Row(f'{ours}{site}/down_bias', f'{theirs}{site}.down.bias', SAME),
        *(Row(f'{ours}{site}/up_{expert}_{part}', f'{theirs}{site}.up.{expert}.{name}', SAME)
          for expert in range(MAX_EXPERTS) for part, name in (('kernel', 'weight'), ('bias', 'bias'))),
        Row(f'{ours}{site}/router_kernel', f'{theirs}{site}.router.weight', TRANSPOSED),
        Row(f'{ours}{site}/router_bias', f'{theirs}{site}.router.bias', SAME),
    ))


def _prompt_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    return (Row(f'{ours}adapter_prompts/prompts', f'{theirs}self_attn.prompts', SAME),
            Row(f'{ours}adapter_prompts/gate', f'{theirs}self_attn.prompt_gate', SAME))


def _encoder_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Of a `Vit`; its layers have the names of the decoder's."""
    block, layer = f'{ours}blocks/*/block/', f'{theirs}layers.{{layer}}.'
    pool = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj')
    return (
        *_patch_embed_rows(f'{ours}patch_embed/', f'{theirs}embeddings.'),
        *norm_rows(f'{ours}pre_norm', f'{theirs}pre_norm'),
        *norm_rows(f'{block}attention_norm', f'{layer}input_layernorm'),
        *(row for linear, name in LINEAR_NAMES.items() for row in linear_rows(block + linear, layer + name)),
        *norm_rows(f'{block}mlp_norm', f'{layer}post_attention_layernorm'),
        *(Row(block + scale, layer + scale, SAME) for scale in ('attention_scale', 'mlp_scale')),
        *_mixture_rows(block, layer),
        *norm_rows(f'{ours}norm', f'{theirs}norm'),
        Row(f'{ours}pool/probe', f'{theirs}pool.probe', SAME),
        *(row for linear in pool for row in linear_rows(f'{ours}pool/{linear}', f'{theirs}pool.{linear}')),
        *norm_rows(f'{ours}pool/mlp_norm', f'{theirs}pool.mlp_norm'),
    )


def _enhancer_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *(row for norm in ('norm_query', 'norm_levels', 'norm_out') for row in norm_rows(ours + norm, theirs + norm)),
        *(row for linear in ('value_proj', 'offset_proj', 'weight_proj', 'out_proj')
          for row in linear_rows(ours + linear, theirs + linear)),
    )


# Qwen3's names for the decoder, PEFT-like ones for its adapters, VoRA's for the front end without an encoder.
OWN = joined(DECODER, Table(rows=(
    *(row for linear, name in LINEAR_NAMES.items() for row in _adapter_rows(BLOCK + linear, LAYER + name)),
    *_mixture_rows(BLOCK, LAYER),
    *_prompt_rows(BLOCK, LAYER),
    Row('modality_embedding', 'modality_embedding.weight', SAME),
    *_patch_embed_rows('frontend/patch_embed/', 'vision_embedding.'),
    Row('frontend/out_proj', 'vision_embedding.out_proj.weight', TRANSPOSED),
    *_encoder_rows('frontend/encoder/', 'vision_tower.'),
    *_enhancer_rows('frontend/enhancer/', 'enhancer.'),
    *(row for layer in range(MAX_PROJECTOR_LAYERS)
      for row in linear_rows(f'frontend/projector_{layer}', f'projector.{layer}')),
)))
