"""An encoder model as stock LLaVA."""
import dataclasses
from typing import Any

from vora_jax.convert.export.encoder import preprocessor, refuse_pictures
from vora_jax.convert.export.exportable import Exportable
from vora_jax.convert.export.lazy_arrays import extended
from vora_jax.convert.export.llm import generation, with_equal_layers
from vora_jax.convert.export.plan import Part, Plan, Request
from vora_jax.convert.families.hf_config import llm_to_config
from vora_jax.convert.families.vit_config import vit_table, vit_to_config
from vora_jax.convert.names.tables import llava_table
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import EncoderFrontend
from vora_jax.vision.patch_embed import PatchEmbed

MULTIPLE = 64  # rows of an embedding that grows
USAGE = """\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model, processor = LlavaForConditionalGeneration.from_pretrained('.'), AutoProcessor.from_pretrained('.')
chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': '\\nyour question'}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open('picture.png'), add_special_tokens=False, return_tensors='pt')
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""


def plan(request: Request) -> Plan:
    """`LlavaForConditionalGeneration`, no remote code.

    Raises:
        UserError: LLaVA has no place for a part of the model.
    """
    model, rule = request.what.model, request.rule
    if not isinstance(model.vision, EncoderFrontend):
        raise UserError('export: the layout `llava` needs a vision encoder and a projector; '
                        f'take {"`vora` or `own`" if model.vision else "`llm`"}.')
    if request.what.has_adapters or model.route_token:
        raise UserError('export: stock LLaVA has no kernels of their own for a picture\'s slots, no mixtures and no ROUTE '
                        'slot; take the layout `own`.')
    if rule is None or rule.bidirectional:
        raise UserError('export: in this method a picture\'s slots see all of it, in LLaVA they are causal; take the layout '
                        '`own`.')
    vision = model.vision
    if (vision.select, vision.fusion, vision.mixtures, vision.pool) != ('patch', 'channels', (), 1):
        raise UserError('export: stock LLaVA reads a picture\'s patches with its taps side by side in the channels; this '
                        'front end selects, fuses, pools or routes in another way; take the layout `own`.')
    if vision.projector.num_layers != 2:
        raise UserError(f'export: LLaVA\'s projector has 2 layers, this one {vision.projector.num_layers}; take the layout '
                        '`own`.')
    if vision.projector.activation != 'gelu' or vision.projector.hidden_width not in (0, model.llm.width):
        raise UserError('export: LLaVA\'s projector is as wide as the language model, with GELU in between; take the layout '
                        '`own`.')
    tower = vit_to_config(vision.encoder, request.dtype)
    if tower['model_type'] not in ('clip_vision_model', 'siglip_vision_model'):
        raise UserError(f'export: stock LLaVA is written around CLIP or SigLIP, not {tower["model_type"]}; take the layout '
                        '`own`.')
    refuse_pictures(request.prompting, 'LLaVA\'s stock processor')
    what = with_equal_layers(request.what)
    vocab_size = what.model.llm.vocab_size
    rows = 0
    if request.image_token_id >= vocab_size:
        rows = -(-(request.image_token_id + 1) // MULTIPLE) * MULTIPLE - vocab_size
    what = _with_rows(what, rows)
    new = sorted({request.image_token_id, *range(vocab_size, vocab_size + rows)})
    embed = vision.encoder.patch_embed
    strategy = 'default' if embed.cls_token else 'full'
    layers = [tap if tap < 0 else tap - vision.encoder.num_layers for tap in vision.taps]
    text = llm_to_config(what.model.llm, request.dtype)
    config = request.token_ids | {
        'architectures': ['LlavaForConditionalGeneration'], 'model_type': 'llava', 'vision_config': tower,
        'text_config': text, 'image_token_index': request.image_token_id, 'projector_hidden_act': 'gelu',
        'multimodal_projector_bias': vision.projector.bias, 'vision_feature_select_strategy': strategy,
        'vision_feature_layer': layers[0] if len(layers) == 1 else layers,
        'image_seq_length': embed.table_rows * embed.table_cols, 'tie_word_embeddings': what.model.llm.tied_head,
        'torch_dtype': request.dtype}
    picture, notes = _preprocessor(request, embed)
    files = {'config.json': config, 'preprocessor_config.json': picture,
             'generation_config.json': generation(request, suppress_tokens=new),
             'processor_config.json': {
                 'processor_class': 'LlavaProcessor', 'image_token': '<image>', 'patch_size': embed.patch_size,
                 'vision_feature_select_strategy': strategy, 'num_additional_image_tokens': int(embed.cls_token)}}
    if rows:
        notes.append(f'`<image>` has the id {request.image_token_id}, for which the embedding had no row: it and the head '
                     f'have {rows} more rows, each the mean of the others, so that their logits are the mean of all logits, '
                     'which is never the largest; the logits of all other ids are unchanged. generation_config.json also '
                     'suppresses these ids.')
    part = Part(llava_table(vit_table(vision.encoder)), what.params, what.shapes, files)
    return Plan({'': part}, what.model, USAGE, tuple(notes))


def _with_rows(what: Exportable, rows: int) -> Exportable:
    """The same with a larger vocabulary."""
    llm = dataclasses.replace(what.model.llm, vocab_size=what.model.llm.vocab_size + rows)
    params, shapes = dict(what.params), dict(what.shapes)
    for path, axis in (('decoder/embedding', 0), ('decoder/lm_head', 1)):
        if path in params and rows:
            params[path] = extended(params[path], rows, axis)
            shapes[path] = params[path].shape
    return what._replace(model=what.model.clone(llm=llm), params=params, shapes=shapes)


def _preprocessor(request: Request, embed: PatchEmbed) -> tuple[dict[str, Any], list[str]]:
    """preprocessor_config.json, and what it does in another way than this model's own pictures were made."""
    prompting, config = request.prompting, preprocessor(embed)
    side = embed.table_rows * embed.patch_size
    config['processor_class'] = 'LlavaProcessor'
    if prompting.image_kind == 'square_pad' and prompting.side == side:
        config |= {'image_processor_type': 'LlavaImageProcessor', 'do_pad': True}
        stock = tuple(int(mean * 255) for mean in embed.mean)
        if tuple(prompting.color) == stock:
            return config, []
        return config, [f'Pictures are padded with the colour {stock}, as LLaVA does it; in training with '
                        f'{tuple(prompting.color)}.']
    if prompting.image_kind == 'square_stretch' and prompting.side == side:
        return preprocessor(embed, 'siglip_vision_model') | {'processor_class': 'LlavaProcessor'}, []
    if prompting.image_kind == 'square_crop' and prompting.side == side:
        return config, []
    kind = 'of their own shape' if prompting.image_kind == 'native' else f'of {prompting.side} pixels a side'
    return config, [f'The stock processor brings pictures to {side} x {side} pixels; this model was run on pictures {kind}.']
