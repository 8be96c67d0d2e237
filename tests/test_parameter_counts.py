"""Trainable parameters of the configurations, to the unit."""
import math
import pathlib

import jax
import pytest

from vora_jax.cli import gin_config
from vora_jax.data.packing import Budgets, layout, stack
from vora_jax.params import flatten, matches
from vora_jax.training import state as state_lib
from vora_jax.training.config import Mesh
from vora_jax.training.mesh import sharding

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
IN_LLM, IN_VIT = 'decoder/*/adapter_*', 'frontend/encoder/*/adapter_*'
VICUNA, LLAMA_13B, QWEN = 6_738_415_616, 13_015_864_320, 7_615_616_512
CLIP_MLP = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
LLAVIT_MLP = 3 * 1024 * 3584 + 3584 + 3584 * 3584 + 3584
MODALITY = 'modality_embedding'

# {file: ({patterns of a part: trainable parameters}, all trainable, the language model's own, trained or not)}. Sums over
# a linear of i inputs and o outputs: LoRA of rank r is r (i + o), Dual-LoRA r (2 i + o) + 2 r, a vision kernel i o + o.
COUNTS = {
    # 24 layers of rank 1024; patch embedding and its linear; heads, which are dropped after pretraining
    'vora/pretrain_7b.gin': ({IN_LLM: 2_214_592_512, 'frontend/*': 7_984_128, '*/side/*': 132_206_592},
                             2_354_783_232, QWEN),
    'vora/finetune_7b.gin': ({'decoder/*': QWEN, 'frontend/*': 7_984_128}, 7_623_600_640, QWEN),
    'llava/pretrain_7b.gin': ({'frontend/projector_*': CLIP_MLP}, 20_979_712, VICUNA),
    'llava/finetune_7b.gin': ({'frontend/projector_*': CLIP_MLP, 'decoder/*': VICUNA}, 6_759_395_328, VICUNA),
    'llava/lora_7b.gin': ({'frontend/projector_*': CLIP_MLP, IN_LLM: 319_815_680}, 340_795_392, VICUNA),
    'lavin/science_qa_7b.gin': ({IN_LLM: 2_621_760, IN_VIT: 491_760, 'frontend/projector_*': 659_584, MODALITY: 8_192},
                                3_781_296, VICUNA),
    'lavin/science_qa_13b.gin': ({IN_LLM: 4_096_400, IN_VIT: 491_760, 'frontend/projector_*': 791_680, MODALITY: 10_240},
                                 5_390_080, LLAMA_13B),
    'llavit/pretrain_7b.gin': ({IN_LLM: 462_551_040, 'frontend/projector_*': LLAVIT_MLP}, 486_413_312, QWEN),
    'llavit/finetune_7b.gin': ({IN_LLM: 462_551_040, 'frontend/projector_*': LLAVIT_MLP, 'decoder/*': QWEN},
                               486_413_312 + QWEN, QWEN),
    'vce_dual_lora/pretrain_7b.gin': ({'frontend/enhancer/*': 2_892_544, 'frontend/projector_*': CLIP_MLP}, 23_872_256,
                                      VICUNA + 2 * 64 * 4096),  # 64 rows of padding in vocabulary and head
    'vce_dual_lora/finetune_7b.gin': ({'frontend/enhancer/*': 2_892_544, 'frontend/projector_*': CLIP_MLP,
                                       IN_LLM: 25_169_920}, 49_042_176, VICUNA + 2 * 64 * 4096),
    'hybrids/kernels_on_patches_7b.gin': ({IN_LLM: 462_551_040 // 28 * 24, 'frontend/*': 7_984_128,
                                           '*/side/*': 132_206_592}, 536_663_040, QWEN),
    'hybrids/kernels_on_patches_finetune_7b.gin': ({IN_LLM: 462_551_040 // 28 * 24, 'decoder/*': QWEN,
                                                    'frontend/*': 7_984_128}, 8_020_072_960, QWEN),
    'hybrids/dual_lora_on_llava_7b.gin': ({'frontend/projector_*': CLIP_MLP, IN_LLM: 25_169_920}, 46_149_632, VICUNA),
}
COUNTS['lavin/chat_13b.gin'] = COUNTS['lavin/science_qa_13b.gin']


def planned(name):
    """The plan of a file as it stands: every shape, and no array."""
    config, _ = gin_config.load('Train', [str(CONFIGS / name)])
    data, rule = config.data, config.method.vision_tokens
    row = layout([], Budgets(data.max_slots, data.max_patches, data.max_images, rule.patch_size**2 * 3), rule=rule)
    mesh = sharding.make_mesh(Mesh(), devices=jax.devices()[:1])
    with sharding.use(mesh):
        return state_lib.plan(config.method.stage(config.stage), config.optimizer, stack([row]), mesh, config.frozen_dtype)


@pytest.mark.parametrize('name', [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob('*_*[0-9]b.gin'))
                                  if path.parent.name != 'models' and not path.name.startswith('model_')])
def test_counts(name):
    parts, total, language_model = COUNTS[name]
    plan = planned(name)
    trainable = {path: math.prod(leaf.shape) for path, leaf in flatten(plan.state.trainable).items()}
    found = dict.fromkeys(parts, 0)
    for path, size in trainable.items():  # a part is what no part before it has
        found[next(part for part in parts if matches(path, (part,)))] += size
    assert found == parts
    assert sum(trainable.values()) == total
    own = {path: math.prod(leaf.shape) for path, leaf in plan.params.items()
           if matches(path, ('decoder/*',)) and not matches(path, ('*/adapter_*', '*/side/*'))}
    assert sum(own.values()) == language_model
    frozen = {leaf.dtype.name for leaf in jax.tree.leaves(plan.frozen)}
    assert frozen <= {'bfloat16'} and {leaf.dtype.name for leaf in jax.tree.leaves(plan.state.trainable)} == {'float32'}
