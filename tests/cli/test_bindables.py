"""The real bindable names, and the .gin files of the repository."""

import dataclasses
import pathlib

import pytest

from vora_jax.cli import signatures, typed_value
from vora_jax.cli.gin_config import bindables, load
from vora_jax.method import Method

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
STAGES = [path for path in sorted(CONFIGS.rglob('*.gin')) if 'Train.stage' in path.read_text()]
NAMES = bindables()
PARAMETERS = [
    (name, parameter, hint, default)
    for name, target in NAMES.items()
    for parameter, (hint, default, _) in signatures.parameters(target, NAMES).items()
]

TINY = """
Train.method = @vora()
Train.stage = 'pretrain'
Train.steps = 3
Train.batch_rows = 2
Data.sources = [@quarter/Source(), @all/Source()]
Data.tokenizer = 'tokenizer'
quarter/Source.path = 'a.jsonl'
quarter/Source.weight = 0.25
all/Source.path = 'b.jsonl'
LanguageModel:
    vocab_size = 64
    num_layers = 2
    width = 32
    mlp_width = 64
    num_heads = 2
    num_kv_heads = 1
    head_dim = 16
vora.num_adapted_layers = 1
PatchEmbed.patch_size = 8
PatchEmbed.width = 32
Vit.num_layers = 2
Vit.mlp_width = 32
Vit.num_heads = 2
"""


@pytest.mark.parametrize(
    'name, parameter, hint, default', PARAMETERS, ids=[f'{p[0]}.{p[1]}' for p in PARAMETERS]
)
def test_annotations_are_complete(name, parameter, hint, default):
    """A default fits its annotation, and every configuration class it mentions can be bound."""
    if default is not dataclasses.MISSING:
        assert typed_value.fits(default, hint), (
            f'{name}.{parameter} = {default!r} is not {typed_value.describe(hint)}'
        )
    needed = {c for c in typed_value.classes(hint) if dataclasses.is_dataclass(c)} - {Method}
    assert needed <= set(NAMES.values())


def test_a_tiny_method_is_built_and_its_text_gives_it_again():
    config, text = load('Train', bindings=['vora.rank=4'], texts=[TINY])
    assert config.method.vision_tokens.patch_size == 8
    assert [source.weight for source in config.data.sources] == [0.25, 1.0]
    again, same_text = load('Train', texts=[text])
    assert (again, same_text) == (config, text)
    assert hash(again.method.stage('pretrain').model) == hash(config.method.stage('pretrain').model)


@pytest.mark.parametrize('path', STAGES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_stage_file_loads_and_its_text_gives_it_again(path):
    config, text = load('Train', [str(path)])
    assert load('Train', texts=[text]) == (config, text)
    assert config.stage in config.method.stages
