"""Names of the papers' own adapter files.

They hold what a method trained and nothing else. Prefixes that wrappers put before the names (`module.`,
`base_model.model.`) are other spellings of the same names.
"""
from vora_jax.convert.names.layouts import GROUPED_POINTWISE, POINTWISE, SAME, TRANSPOSED
from vora_jax.convert.names.name_map import Row, Table, joined
from vora_jax.convert.names.rows import linear_rows, norm_rows
from vora_jax.convert.names.tables.decoder import BLOCK, LAYER, LINEAR_NAMES

_IMAGE_BLOCK, _IMAGE_LAYER = 'frontend/encoder/blocks/*/block/', 'backbone.visual.transformer.resblocks.{layer}.'
_MOST_LAYERS = 4  # of a projector


def _mixture(path: str, name: str) -> tuple[Row, ...]:
    """A `ModalityMixture` of two paths, which that code calls B and D."""
    return tuple(Row(f'{path}/{ours}', f'{name}.{theirs}', layout) for ours, theirs, layout in (
        ('down_kernel', 'conv_A.weight', POINTWISE), ('down_bias', 'conv_A.bias', SAME),
        ('up_0_kernel', 'conv_B.weight', GROUPED_POINTWISE), ('up_0_bias', 'conv_B.bias', SAME),
        ('up_1_kernel', 'conv_D.weight', GROUPED_POINTWISE), ('up_1_bias', 'conv_D.bias', SAME),
        ('router_kernel', 'expert_weights.weight', TRANSPOSED), ('router_bias', 'expert_weights.bias', SAME)))


# github.com/luogen1996/LaVIN: `checkpoint-N.pth`. The layers of adapter_proj are linear, whatever their names say.
LAVIN_ADAPTERS = Table(
    rows=(
        *(row for ours, theirs in (('adapter_attention', 'adapter_attn'), ('adapter_mlp', 'adapter_mlp'))
          for block, layer in ((BLOCK, 'layers.{layer}.'), (_IMAGE_BLOCK, _IMAGE_LAYER))
          for row in _mixture(block + ours, layer + theirs)),
        *linear_rows('frontend/projector_0', 'adapter_proj.conv_A'),
        *linear_rows('frontend/projector_1', 'adapter_proj.conv_B'),
        Row('modality_embedding', 'adapter_modality_embedding.weight', SAME),
    ),
    renames=((r'module\.', ''),),
)


def _projector(num_layers: int, module: str) -> Table:
    """A linear, or a torch Sequential of linears with an activation after each but the last."""
    names = [module] if num_layers == 1 else [f'{module}.{2 * layer}' for layer in range(_MOST_LAYERS)]
    rows = tuple(row for layer, name in enumerate(names) for row in linear_rows(f'frontend/projector_{layer}', name))
    return Table(rows, renames=(
        (r'(?:module\.)?(?:base_model\.model\.)?(?:model\.)?(?=layers\.|mm_projector\.)', 'model.'),))


_LORA = Table(tuple(
    Row(f'{BLOCK}{linear}/adapter_0/{side}', f'{LAYER}{module}.lora_{side.upper()}.weight', TRANSPOSED)
    for linear, module in LINEAR_NAMES.items() for side in 'ab'))


def llava_adapters(num_projector_layers: int) -> Table:
    """github.com/haotian-liu/LLaVA: `mm_projector.bin`, and the LoRA folder."""
    return joined(_projector(num_projector_layers, 'model.mm_projector'), _LORA)


_CUES = 'model.mm_projector.VCE_module.'
_DUAL_LORA = Table(
    rows=tuple(row for linear, module in LINEAR_NAMES.items() for row in (
        Row(f'{BLOCK}{linear}/adapter_0/a', f'{LAYER}{module}.lora_A0.weight', TRANSPOSED),
        Row(f'{BLOCK}{linear}/adapter_0/task', f'{LAYER}{module}.lora_T.weight', TRANSPOSED),
        *norm_rows(f'{BLOCK}{linear}/adapter_0/norm', f'{LAYER}{module}.lora_layer_norm'),
        Row(f'{BLOCK}{linear}/adapter_0/b', f'{LAYER}{module}.lora_B0.weight', TRANSPOSED))))
_VCE = Table(
    rows=(
        *(row for ours, theirs in (('norm_query', 'query_norm'), ('norm_levels', 'feat_norm'), ('norm_out', 'norm'))
          for row in norm_rows(f'frontend/enhancer/{ours}', _CUES + theirs)),
        *(row for ours, theirs in (('value_proj', 'value_proj'), ('offset_proj', 'sampling_offsets'),
                                   ('weight_proj', 'attention_weights'), ('out_proj', 'output_proj'))
          for row in linear_rows(f'frontend/enhancer/{ours}', f'{_CUES}cross_attn.{theirs}')),
    ),
    ignored=((f'{_CUES}norm.*', 'that code computes this norm and drops it, and CueEnhancer.final_norm is off here too'),),
)


def dual_lora_adapters(num_projector_layers: int) -> Table:
    """github.com/pengkun-jiao/FHTC: `adapter_weight.pth`, and `VCE_weights.pth` of the stage before the adapters."""
    return joined(_projector(num_projector_layers, 'model.mm_projector.mm_projector_llava'), _VCE, _DUAL_LORA)
