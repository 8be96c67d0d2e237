"""Names of CLIP, SigLIP, AIMv2, DINOv2."""
from vora_jax.convert.names.layouts import BATCHED_TABLE, CONVOLUTION, LEADING_1, LEADING_2, SAME, TABLE, TRANSPOSED
from vora_jax.convert.names.name_map import Row, Table
from vora_jax.convert.names.rows import linear_rows, norm_rows

BLOCK = 'blocks/*/block/'
_QKV = ('q_proj', 'k_proj', 'v_proj')


def _patches(name: str) -> tuple[Row, Row]:
    return Row('patch_embed/kernel', f'{name}.weight', CONVOLUTION), Row('patch_embed/bias', f'{name}.bias', SAME)


_CLIP_LAYER = 'vision_model.encoder.layers.{layer}.'
# Common to CLIP and SigLIP, which transformers 5 also writes without `vision_model.`.
_TOWER = Table(
    rows=(
        *_patches('vision_model.embeddings.patch_embedding'),
        # CLIP: [cls]'s position is the table's first row.
        Row('patch_embed/cls', 'vision_model.embeddings.class_embedding', SAME),
        Row('patch_embed/cls_position', 'vision_model.embeddings.position_embedding.weight', LEADING_1),
        Row('patch_embed/positions', 'vision_model.embeddings.position_embedding.weight', TABLE),
        *norm_rows(f'{BLOCK}attention_norm', f'{_CLIP_LAYER}layer_norm1'),
        *(row for linear in _QKV for row in linear_rows(BLOCK + linear, f'{_CLIP_LAYER}self_attn.{linear}')),
        *linear_rows(f'{BLOCK}o_proj', f'{_CLIP_LAYER}self_attn.out_proj'),
        *norm_rows(f'{BLOCK}mlp_norm', f'{_CLIP_LAYER}layer_norm2'),
        *linear_rows(f'{BLOCK}up_proj', f'{_CLIP_LAYER}mlp.fc1'),
        *linear_rows(f'{BLOCK}down_proj', f'{_CLIP_LAYER}mlp.fc2'),
        *norm_rows('norm', 'vision_model.post_layernorm'),
    ),
    ignored=(
        ('vision_model.embeddings.position_ids', 'a list of indices'),
        *((pattern, 'only the vision encoder is taken, not its text side') for pattern in (
            'text_model.*', 'text_projection.*', 'visual_projection.weight', 'logit_scale', 'logit_bias')),
    ),
    renames=((r'(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)', 'vision_model.'),),
)
CLIP = _TOWER._replace(rows=(*_TOWER.rows, *norm_rows('pre_norm', 'vision_model.pre_layrnorm')))

_HEAD = 'vision_model.head.'
SIGLIP = _TOWER._replace(rows=(
    *_TOWER.rows,
    Row('pool/probe', f'{_HEAD}probe', LEADING_2),
    *(Row(f'pool/{linear}/kernel', f'{_HEAD}attention.in_proj_weight', TRANSPOSED) for linear in _QKV),
    *(Row(f'pool/{linear}/bias', f'{_HEAD}attention.in_proj_bias', SAME) for linear in _QKV),
    *linear_rows('pool/o_proj', f'{_HEAD}attention.out_proj'),
    *norm_rows('pool/mlp_norm', f'{_HEAD}layernorm'),
    *linear_rows('pool/up_proj', f'{_HEAD}mlp.fc1'),
    *linear_rows('pool/down_proj', f'{_HEAD}mlp.fc2'),
))

_AIMV2_LAYER = 'encoder.layers.{layer}.'
AIMV2 = Table(
    rows=(
        *_patches('embeddings.patch_embed'),
        Row('patch_embed/norm/scale', 'embeddings.rms_norm.weight', SAME),
        Row('patch_embed/positions', 'embeddings.position_embedding.weight', TABLE),
        Row(f'{BLOCK}attention_norm/scale', f'{_AIMV2_LAYER}rms_norm1.weight', SAME),
        *(row for linear in _QKV for row in linear_rows(BLOCK + linear, f'{_AIMV2_LAYER}attention.{linear}')),
        *linear_rows(f'{BLOCK}o_proj', f'{_AIMV2_LAYER}attention.out_proj'),
        Row(f'{BLOCK}mlp_norm/scale', f'{_AIMV2_LAYER}rms_norm2.weight', SAME),
        *(row for linear in ('gate_proj', 'up_proj', 'down_proj')
          for row in linear_rows(BLOCK + linear, f'{_AIMV2_LAYER}ffn.{linear}')),
        Row('norm/scale', 'rms_norm.weight', SAME),
        Row('pool/probe', 'head.cls_token', LEADING_2),
        *linear_rows('pool/k_proj', 'head.k_proj'),
        *linear_rows('pool/v_proj', 'head.v_proj'),
        *linear_rows('pool/o_proj', 'head.output_proj'),
    ),
    ignored=(
        ('embeddings.position_ids', 'a list of indices'),
        *((pattern, 'only the vision encoder is taken, not its text side') for pattern in (
            'text_model.*', 'text_projection.weight', 'visual_projection.weight', 'logit_scale')),
    ),
    renames=((r'vision_model\.', ''),),
)

# The layout of Apple's own files and of VoRA's teacher.
_TRUNK = 'trunk.blocks.{layer}.'
AIMV2_ORIGINAL = Table(
    rows=(
        *_patches('preprocessor.patchifier.proj'),
        Row('patch_embed/norm/scale', 'preprocessor.patchifier.norm.weight', SAME),
        Row('patch_embed/positions', 'preprocessor.pos_embed', BATCHED_TABLE),
        Row(f'{BLOCK}attention_norm/scale', f'{_TRUNK}norm_1.weight', SAME),
        *(row for linear in _QKV for row in linear_rows(BLOCK + linear, f'{_TRUNK}attn.qkv')),
        *linear_rows(f'{BLOCK}o_proj', f'{_TRUNK}attn.proj'),
        Row(f'{BLOCK}mlp_norm/scale', f'{_TRUNK}norm_2.weight', SAME),
        *linear_rows(f'{BLOCK}gate_proj', f'{_TRUNK}mlp.fc1'),
        *linear_rows(f'{BLOCK}down_proj', f'{_TRUNK}mlp.fc2'),
        *linear_rows(f'{BLOCK}up_proj', f'{_TRUNK}mlp.fc3'),
        Row('norm/scale', 'trunk.post_trunk_norm.weight', SAME),
    ),
)

_DINOV2_LAYER = 'encoder.layer.{layer}.'
DINOV2 = Table(
    rows=(
        *_patches('embeddings.patch_embeddings.projection'),
        Row('patch_embed/cls', 'embeddings.cls_token', LEADING_2),
        Row('patch_embed/mask_token', 'embeddings.mask_token', LEADING_1),
        # [cls]'s position is the table's first row.
        Row('patch_embed/cls_position', 'embeddings.position_embeddings', LEADING_2),
        Row('patch_embed/positions', 'embeddings.position_embeddings', BATCHED_TABLE),
        *norm_rows(f'{BLOCK}attention_norm', f'{_DINOV2_LAYER}norm1'),
        *(row for linear, name in zip(_QKV, ('query', 'key', 'value'))
          for row in linear_rows(BLOCK + linear, f'{_DINOV2_LAYER}attention.attention.{name}')),
        *linear_rows(f'{BLOCK}o_proj', f'{_DINOV2_LAYER}attention.output.dense'),
        Row(f'{BLOCK}attention_scale', f'{_DINOV2_LAYER}layer_scale1.lambda1', SAME),
        *norm_rows(f'{BLOCK}mlp_norm', f'{_DINOV2_LAYER}norm2'),
        *linear_rows(f'{BLOCK}up_proj', f'{_DINOV2_LAYER}mlp.fc1'),
        *linear_rows(f'{BLOCK}down_proj', f'{_DINOV2_LAYER}mlp.fc2'),
        Row(f'{BLOCK}mlp_scale', f'{_DINOV2_LAYER}layer_scale2.lambda1', SAME),
        *norm_rows('norm', 'layernorm'),
    ),
    ignored=(('classifier.*', 'only the encoder is taken, not its classifier'),),
    renames=((r'dinov2\.', ''),),
)
# Its largest model has a gated MLP, gate and up in one tensor.
_GATED = {f'{BLOCK}gate_proj': 'mlp.weights_in', f'{BLOCK}up_proj': 'mlp.weights_in', f'{BLOCK}down_proj': 'mlp.weights_out'}
DINOV2_GATED = DINOV2._replace(rows=(
    *(row for row in DINOV2.rows if row.path.rpartition('/')[0] not in _GATED),
    *(row for path, name in _GATED.items() for row in linear_rows(path, _DINOV2_LAYER + name))))
