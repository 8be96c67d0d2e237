"""What the papers' code does with exported adapters."""
from typing import Any

from vora_jax.convert.adapters.formats import Adapted
from vora_jax.convert.families.hf_config import llm_to_config
from vora_jax.types import UserError
from vora_jax.vision.cue_enhancer import CueEnhancer

# The towers LLaVA knows: (layers, width, patch size, rows of the position table) -> name.
_TOWERS = {(24, 1024, 14, 24): 'openai/clip-vit-large-patch14-336', (24, 1024, 14, 16): 'openai/clip-vit-large-patch14'}


def refuse(what: Adapted) -> None:
    """UserError where the method's code would compute something else from these files and has no setting for it."""
    vision = what.model.vision
    adapters = {adapter for group in what.model.groups for _, many in group.adapters for adapter in many}
    if any(adapter.scope != 'all' for adapter in adapters) or len(adapters) > 1:
        raise UserError(f'export: the adapters of {what.method}\'s code are equal on all linears and act on all slots; '
                        'these are not, so take the layout `own`.')
    projector, mixtures = vision.projector, what.method == 'lavin'
    plain = projector.bias and (projector.activation == 'silu' and projector.num_layers == 2 if mixtures else
                                projector.activation == 'gelu' and not projector.hidden_width)
    if not plain:
        raise UserError(f'export: the projector of {what.method}\'s code is another one than {projector}; take the layout '
                        '`own`.')
    if what.method == 'llava' and (len(vision.taps) > 1 or vision.pool > 1):
        raise UserError(f'export: LLaVA\'s code takes one level of its encoder, a token for each patch; this model has taps '
                        f'= {vision.taps} and pool = {vision.pool}, so take the layout `own`.')
    if mixtures and any(mixture.num_experts != 2 for group in what.model.groups for _, mixture in group.mixtures):
        raise UserError('export: LaVIN\'s mixtures have 2 paths; take the layout `own`.')


def facts(what: Adapted, lora_folder: str = '') -> list[str]:
    """Sentences on what the files do not tell, and where that code differs.

    Args:
        lora_folder: name of the LoRA folder to be; '' where it is none.
    """
    vision, found = what.model.vision, []
    if what.method == 'lavin':
        (_, mixture), *_ = vision.mixtures
        found.append(f'Run LaVIN\'s code with --adapter_dim {mixture.rank} --adapter_scale {mixture.scale:g} --temperature '
                     f'{mixture.temperature:g} and groups {mixture.num_groups}; the file does not tell them.')
        every_fourth = tuple(range(3, vision.encoder.num_layers, 4))
        if tuple(tap % vision.encoder.num_layers for tap in vision.taps) != every_fourth:
            found.append(f'LaVIN\'s code takes the [cls] of every fourth block; these adapters were trained with taps = '
                         f'{vision.taps}.')
        if mixture.route_by != 'first_row':
            found.append(f'LaVIN\'s vision tower routes each place by that of the batch\'s first image; these adapters were '
                         f'trained with route_images_by = {mixture.route_by!r}'
                         f'{", the same for batches of one" if mixture.route_by == "own" else ""}.')
    elif what.method == 'vce_dual_lora':
        adapter = next((many[0] for group in what.model.groups for _, many in group.adapters), None)
        if adapter is not None and (adapter.scale, adapter.norm_eps) != (2.0, 1e-5):
            found.append(f'The released code fixes the scale of its adapters at 2 and the epsilon of their norms at 1e-05; '
                         f'these have {adapter.scale:g} and {adapter.norm_eps:g}.')
        if isinstance(vision.fusion, CueEnhancer):
            found += _enhancer_facts(vision.fusion, len(vision.taps))
    elif lora_folder and not all(word in lora_folder.lower() for word in ('llava', 'lora')):
        found.append('LLaVA\'s loader takes a folder for a LoRA one only if its name holds `llava` and `lora`: rename it.')
    if what.method == 'llava':
        family = llm_to_config(what.model.llm)['model_type']
        found.append('LLaVA\'s loader also needs the base: --model-base.' if family == 'llama' else
                     f'LLaVA\'s code has no {family}: its loader takes adapters of Llamas.')
    return found


def training_config(what: Adapted, dtype: str, base: str) -> dict[str, dict[str, Any]]:
    """{'config.json': content} for LLaVA, whose loader reads it beside the adapters; {} for others.

    Raises:
        UserError: no stock language model has these sizes.
    """
    if what.method != 'llava':
        return {}
    vision, embed = what.model.vision, what.model.vision.patch_embed
    text = llm_to_config(what.model.llm, dtype)
    tap, = vision.taps  # more are refused
    tap = tap if tap < 0 else tap - vision.encoder.num_layers
    size = vision.encoder.num_layers, vision.encoder.width, embed.patch_size, embed.table_rows
    return {'config.json': text | {
        'architectures': ['LlavaLlamaForCausalLM'], 'model_type': 'llava_llama', '_name_or_path': base,
        'mm_vision_tower': _TOWERS.get(size, ''), 'mm_hidden_size': vision.encoder.width,
        'mm_projector_type': f'mlp{vision.projector.num_layers}x_gelu' if vision.projector.num_layers > 1 else 'linear',
        'mm_vision_select_layer': tap, 'mm_vision_select_feature': 'patch', 'use_mm_proj': True,
        'mm_use_im_start_end': False, 'mm_use_im_patch_token': False}}


def _enhancer_facts(fusion: CueEnhancer, num_taps: int) -> list[str]:
    """Where the released enhancer computes something else."""
    found = []
    if fusion.final_norm:
        found.append('The released code computes the enhancer\'s outer norm (`VCE_module.norm`) and drops it; this one was '
                     'trained with it: assign its result there.')
    else:
        found.append('The enhancer was trained without its outer norm, so the file has no `VCE_module.norm`: the released '
                     'code never uses it.')
    if fusion.anchor % num_taps != num_taps - 1:
        found.append(f'The released code queries with the last of its levels (`query_layer = -1`); this one was trained '
                     f'with number {fusion.anchor % num_taps}: set query_layer there.')
    return found
