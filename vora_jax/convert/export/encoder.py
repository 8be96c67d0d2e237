"""A vision encoder as a stock one."""
from typing import Any

from vora_jax.convert.export.plan import Part, Plan, Request
from vora_jax.convert.families.own_layout import Prompting
from vora_jax.convert.families.vit_config import vit_table, vit_to_config
from vora_jax.convert.names.name_map import prefixed
from vora_jax.types import UserError
from vora_jax.vision.image_encoder import ImageEncoder
from vora_jax.vision.patch_embed import PatchEmbed

BICUBIC = 3
WHITE = (255, 255, 255)
PROCESSORS = {'clip_vision_model': 'CLIPImageProcessor', 'siglip_vision_model': 'SiglipImageProcessor',
              'aimv2_vision_model': 'CLIPImageProcessor', 'dinov2': 'BitImageProcessor'}

USAGE = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model, processor = AutoModel.from_pretrained('.'), AutoImageProcessor.from_pretrained('.')
print(model(**processor(Image.open('picture.png'), return_tensors='pt'), output_hidden_states=True).hidden_states[-1].shape)
"""


def plan(request: Request) -> Plan:
    """CLIP, SigLIP, AIMv2 or DINOv2.

    Raises:
        UserError: the model is no encoder, or no stock one.
    """
    what = request.what
    if not isinstance(what.model, ImageEncoder):
        raise UserError('export: the layout `encoder` is for vision encoders, and this is a language model; choose another '
                        'layout.')
    config = vit_to_config(what.model.vit, request.dtype)
    picture = preprocessor(what.model.vit.patch_embed, config['model_type'])
    files = {'config.json': config, 'preprocessor_config.json': picture}
    part = Part(prefixed(vit_table(what.model.vit), 'encoder/', ''), what.params, what.shapes, files)
    return Plan({'': part}, what.model, USAGE)


def refuse_pictures(prompting: Prompting, processor: str) -> None:
    """UserError for pictures that a stock processor cannot make; what it makes a little differently is told in notes."""
    if prompting.image_kind == 'tiles':
        raise UserError(f'export: this model sees a picture as several tiles, and {processor} makes one square of it; take '
                        'the layout `own`.')
    if tuple(prompting.background) != WHITE:
        raise UserError(f'export: this model sees transparent pixels over the colour {tuple(prompting.background)}, and '
                        f'{processor} puts them over white or drops their transparency; take the layout `own`.')


def preprocessor(embed: PatchEmbed, model_type: str = 'clip_vision_model') -> dict[str, Any]:
    """preprocessor_config.json for pictures of the position table's size."""
    side = embed.table_rows * embed.patch_size
    config = {'image_processor_type': PROCESSORS[model_type], 'do_resize': True, 'do_rescale': True,
              'rescale_factor': 1 / 255, 'do_normalize': True, 'image_mean': embed.mean, 'image_std': embed.std,
              'resample': BICUBIC, 'do_convert_rgb': True}
    if model_type == 'siglip_vision_model':
        return config | {'size': {'height': side, 'width': side}}
    return config | {'do_center_crop': True, 'size': {'shortest_edge': side}, 'crop_size': {'height': side, 'width': side}}
