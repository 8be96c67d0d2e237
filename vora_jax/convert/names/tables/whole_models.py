"""Names of LLaVA and VoRA checkpoints."""
from vora_jax.convert.names.layouts import BATCHED_TABLE, CONVOLUTION, SAME, TRANSPOSED
from vora_jax.convert.names.name_map import Row, Table, joined, prefixed
from vora_jax.convert.names.rows import linear_rows
from vora_jax.convert.names.tables.decoder import BLOCK, DECODER, LAYER, LINEAR_NAMES
from vora_jax.convert.names.tables.encoders import AIMV2_ORIGINAL, CLIP


def llava_table(vision: Table) -> Table:
    """Hugging Face's LLaVA-1.5 around a vision tower of this table; the names of transformers 4.x and 5.x."""
    projector = Table(
        rows=tuple(row for layer in range(2)
                   for row in linear_rows(f'frontend/projector_{layer}', f'multi_modal_projector.linear_{layer + 1}')),
        renames=((r'model\.language_model\.', 'language_model.model.'), (r'lm_head\.', 'language_model.lm_head.'),
                 (r'model\.(?=vision_tower\.|multi_modal_projector\.)', '')))
    return joined(projector, prefixed(DECODER, '', 'language_model.'),
                  prefixed(vision, 'frontend/encoder/', 'vision_tower.'))


LLAVA = llava_table(CLIP)

# The official layout: github.com/Hon-Wong/VoRA.
VORA = joined(
    prefixed(DECODER, '', 'llm.'),
    Table(rows=(
        *(Row(f'{BLOCK}{linear}/adapter_0/{side}', f'llm.{LAYER}{module}.lora_{side.upper()}.weight', TRANSPOSED)
          for linear, module in LINEAR_NAMES.items() for side in 'ab'),
        Row('frontend/patch_embed/kernel', 'vision_embedding.patchifier.proj.weight', CONVOLUTION),
        Row('frontend/patch_embed/bias', 'vision_embedding.patchifier.proj.bias', SAME),
        Row('frontend/patch_embed/norm/scale', 'vision_embedding.patchifier.norm.weight', SAME),
        Row('frontend/patch_embed/positions', 'vision_embedding.pos_embed', BATCHED_TABLE),
        Row('frontend/out_proj', 'vision_embedding.out_proj.weight', TRANSPOSED),
        Row('decoder/layers/*/side/norm/scale', 'aux_vision.aux_layer_{layer}.0.weight', SAME),
        Row('decoder/layers/*/side/kernel', 'aux_vision.aux_layer_{layer}.1.weight', TRANSPOSED),
    )),
    prefixed(AIMV2_ORIGINAL, 'teacher/', 'aux_vision.aux_model.'),
)
