"""A vision encoder as a whole model."""
from collections.abc import Callable

import flax.linen as nn

from vora_jax.batch import Batch
from vora_jax.ops.attention import attention
from vora_jax.vision.vit import Features, VisionTransformer, Vit


class ImageEncoder(nn.Module):
    """`Features` of a batch's pictures: the form in which an encoder is imported, exported and handed to other runs."""

    vit: Vit
    attend: Callable = attention

    def setup(self):
        self.encoder = VisionTransformer(self.vit, self.attend)

    def __call__(self, batch: Batch) -> Features:
        return self.encoder(batch.patches)
