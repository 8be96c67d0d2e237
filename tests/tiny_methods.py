"""Every method at test size, with batches that fit."""
import dataclasses

from tiny_model import LLM, PATCH, TEACHER, VOCAB, vora

from vora_jax import variants
from vora_jax.data.fake import fake_batch
from vora_jax.nn.adapters import DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.modality_mixture import ModalityMixture
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import Projector

CLS = dataclasses.replace(PATCH, cls_token=True)
ENCODER = dataclasses.replace(TEACHER, patch_embed=CLS, norm='layer', activation='gelu_quick')
PROJECTOR = Projector()
QKV = ('q_proj', 'k_proj', 'v_proj')

# {name: (method, stage whose model has everything the method adds)}
METHODS = {
    'llava': (variants.llava(LLM, ENCODER, PROJECTOR), 'finetune'),
    'llava_lora': (variants.llava(LLM, ENCODER, PROJECTOR, adapter=LowRank(3, 2.0, 0.05)), 'adapt'),
    'vora': (vora(), 'pretrain'),
    'vora_vision': (vora(scope='vision'), 'pretrain'),
    'llavit': (variants.llavit(LLM, ENCODER, PROJECTOR, taps=(0, 1)), 'pretrain'),
    'vce_dual_lora': (variants.vce_dual_lora(LLM, ENCODER, PROJECTOR, CueEnhancer(num_heads=3, num_points=2),
                                             DualLowRank(4), taps=(-1, -2)), 'finetune'),
    'lavin': (variants.lavin(LLM, ENCODER, Projector(activation='silu', hidden_width=6),
                             ModalityMixture(rank=4, dropout=0.0), taps=(0, 1)), 'finetune'),
    'kernels_on_patches': (vora(adapter=ModalityKernel(), targets=QKV), 'pretrain'),
    'dual_on_llava': (variants.llava(LLM, ENCODER, PROJECTOR, adapter=DualLowRank(4),
                                     targets=('q_proj', 'v_proj')), 'adapt'),
}


def method_batch(name: str, seed: int = 1, rows: int = 3, slots: int = 40, patches: int = 27):
    """A random packed batch for the method of this name."""
    rule = METHODS[name][0].vision_tokens
    return fake_batch(rows, slots, patches, PATCH.patch_size, VOCAB, 4, seed, rule=rule)
