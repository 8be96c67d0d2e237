"""The names of the families of checkpoints."""
from vora_jax.convert.names.tables.decoder import DECODER
from vora_jax.convert.names.tables.encoders import AIMV2, AIMV2_ORIGINAL, CLIP, DINOV2, DINOV2_GATED, SIGLIP
from vora_jax.convert.names.tables.whole_models import LLAVA, VORA, llava_table

__all__ = ['AIMV2', 'AIMV2_ORIGINAL', 'CLIP', 'DECODER', 'DINOV2', 'DINOV2_GATED', 'LLAVA', 'SIGLIP', 'VORA', 'llava_table']
