"""The names and shapes of VoRA's 7B checkpoints, without their memory.

`vora_7b/*.txt` are what the original code gives at Qwen2.5-7B's sizes on the meta device: unmerged (rank 1024) and merged;
`{0..23}` stands for these numbers.
"""
import json
import math
import pathlib
import re

import pytest

from vora_jax import variants
from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.names.name_map import entries, foreign_shapes
from vora_jax.convert.names.tables import VORA
from vora_jax.llm.decoder import LanguageModel
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

QWEN_7B = LanguageModel(152064, num_layers=28, width=3584, mlp_width=18944, num_heads=28, num_kv_heads=4, head_dim=128,
                        rope_theta=1e6, biases=('q_proj', 'k_proj', 'v_proj'), max_positions=32768)
EMBED = PatchEmbed(positions='first_rows')
CONFIG = {
    'model_type': 'vora', 'hidden_size': 3584, 'intermediate_size': 18944, 'num_hidden_layers': 28,
    'num_attention_heads': 28, 'num_key_value_heads': 4, 'vocab_size': 152064, 'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0, 'hidden_act': 'silu', 'max_position_embeddings': 32768, 'tie_word_embeddings': False,
    'image_size': 448, 'patch_size': 14, 'vision_attention_mask': 'bidirectional', 'lora': {'layers': 24, 'r': -1}}


def expected(name):
    found = {}
    for line in (pathlib.Path(__file__).parent / 'vora_7b' / f'{name}.txt').read_text().splitlines():
        pattern, shape = line.split('\t')
        numbers = re.search(r'\{(\d+)\.\.(\d+)\}', pattern)
        for layer in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else [None]:
            found[re.sub(r'\{.*\}', str(layer), pattern)] = tuple(json.loads(shape))
    return found


@pytest.mark.parametrize('name, stage, count', [('unmerged', 'pretrain', 776), ('merged', 'finetune', 440)])
def test_the_7b_lists(name, stage, count):
    wanted = expected(name)
    assert len(wanted) == count
    method = variants.vora(QWEN_7B, EMBED, Vit(), extra_biases=True, distill_weight=0.0)
    shapes = parameter_shapes(method.stage(stage).model)
    assert foreign_shapes(entries(shapes, VORA)) == wanted
    found = recognise(CONFIG, wanted)
    assert (found.stage, found.arguments['llm'], found.arguments['patch_embed']) == (stage, QWEN_7B, EMBED)
    model = getattr(variants, found.method)(**found.arguments).stage(stage).model
    assert parameter_shapes(model) == shapes


def test_the_whole_training_state_at_7b():
    method = variants.vora(QWEN_7B, EMBED, Vit(), extra_biases=True)
    shapes = parameter_shapes(method.stage('pretrain').model)
    theirs = foreign_shapes(entries(shapes, VORA))

    def count(part):
        return sum(math.prod(shape) for name, shape in theirs.items() if part in name)

    # The original's own counts.
    assert count('lora_') == 2_214_592_512 and count('vision_embedding.') == 7_984_128
    assert count('aux_vision.aux_layer_') == 132_206_592
    assert theirs['aux_vision.aux_layer_23.1.weight'] == (1536, 3584)
    assert theirs['aux_vision.aux_model.trunk.blocks.23.attn.qkv.weight'] == (4608, 1536)
    assert len(theirs) == 776 + 48 + 24 * 7 + 5
    found = recognise(CONFIG, theirs)
    assert found.arguments['teacher'] == Vit(PatchEmbed(norm_eps=1e-5, positions='first_rows'))
    assert 'distill_weight' not in found.arguments
    model = variants.vora(**found.arguments).stage('pretrain').model
    assert parameter_shapes(model) == shapes
