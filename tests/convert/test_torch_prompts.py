"""The exported code makes the ids of our prompts."""
import dataclasses
import types

import pytest
import tiny_tokenizers as tiny
from tiny_models import tokenizer_folders

from vora_jax.convert.export.tokenizer_files import write_tokenizer_files
from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.patches import fit_grids
from vora_jax.data.text.conversation import Image, render_prompt
from vora_jax.data.text.templates import TEMPLATES, find_template, jinja
from vora_jax.data.text.tokenizer import load_tokenizer

PIL = pytest.importorskip('PIL.Image')
pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")

PICTURES = {(8, 12): 6, (4, 8): 2}  # (height, width): patches of 4 pixels
CHATML = ('chatml', 'chatml_system', 'vora', 'qwen2.5', 'smollm2')
BARE = ('plain', 'image_first', 'image_first_instruction')
KINDS = {'qwen': (*CHATML, *BARE), 'qwen_pair': ('vora', 'qwen2.5', 'image_first'), 'llama3': ('llama3', *BARE[1:]),
         'own': (*CHATML, *BARE)} | {
    kind: ('vicuna_v1', 'llama2', 'chatml', *BARE) for kind in ('llama2', 'llama2_legacy', 'llama2_model')}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return tokenizer_folders(tmp_path_factory)


def questions():
    """(question, number of its pictures): pictures where no mark is, in front, inside, behind, and side by side."""
    for text in ('is it red?', '  two\n\nlines ', '\u6771\u4eac', *tiny.random_texts(3)):
        yield from ((text, 0), (text, 1), (text, 2), (f'<image>\n{text}', 1), (f'{text}<image>', 1),
                    (f'<image>{text}<image> {text}', 2), (f'a <image><image>{text}', 2))


@pytest.mark.parametrize('kind, name', [(kind, name) for kind, names in KINDS.items() for name in names])
def test_ids_are_those_of_our_prompts(kind, name, folders, tmp_path):
    from vora_jax.convert.torch_model.processing_vora_jax import make_inputs
    ours, template = load_tokenizer(folders[kind]), find_template(name)
    image = write_tokenizer_files(folders[kind], tmp_path, jinja(template, ours), template.end_id(ours))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    config = types.SimpleNamespace(
        vision={'patch_embed': {'patch_size': 4}}, image_token_id=image, route_token_id=None,
        image_policy={'kind': 'native', 'min_patches': 1, 'max_patches': 16},
        vision_tokens={'pool': 1, 'tokens_per_place': 1, 'select': 'patch'})
    pictures = [PIL.new('RGB', (width, height)) for height, width in PICTURES]
    slots = list(PICTURES.values())
    asked = list(questions())
    inputs = make_inputs(config, theirs, [text for text, _ in asked], [pictures[:count] for _, count in asked])
    for row, mask, (text, count) in zip(inputs['input_ids'], inputs['attention_mask'].bool(), asked):
        expected = [token for piece in render_prompt(text, count, ours, template)
                    for token in ([image] * slots[piece.index] if isinstance(piece, Image) else piece.ids)]
        assert row[mask].tolist() == expected, (text, count)


@pytest.mark.parametrize('kind, name', [('qwen', 'vora'), ('llama2', 'chatml'), ('own', 'image_first')])
def test_a_picture_takes_the_slots_of_all_its_tiles(kind, name, folders, tmp_path):
    from vora_jax.convert.torch_model.processing_vora_jax import make_inputs
    ours, template = load_tokenizer(folders[kind]), find_template(name)
    image = write_tokenizer_files(folders[kind], tmp_path, jinja(template, ours), template.end_id(ours))
    policy = ImagePolicy(kind='tiles', side=8, tiles=((1, 2), (2, 2), (3, 1)))
    config = types.SimpleNamespace(
        vision={'patch_embed': {'patch_size': 4}}, image_token_id=image, route_token_id=None,
        image_policy=dataclasses.asdict(policy), vision_tokens={'pool': 1, 'tokens_per_place': 2, 'select': 'patch'})
    sizes = [(9, 20), (50, 11), (30, 33)]
    squares = [len(fit_grids(*size, 4, policy)) for size in sizes]
    assert squares == [1 + 2, 1 + 3, 1 + 4]
    asked = [(text, count) for text, count in questions() if count]
    pictures = [[PIL.new('RGB', (width, height)) for height, width in sizes[-count:]] for _, count in asked]
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    inputs = make_inputs(config, theirs, [text for text, _ in asked], pictures)
    for row, (text, count) in enumerate(asked):
        shown = squares[-count:]
        expected = [token for piece in render_prompt(text, count, ours, template)
                    for token in ([image] * (8 * shown[piece.index]) if isinstance(piece, Image) else piece.ids)]
        assert inputs['input_ids'][row][inputs['attention_mask'][row].bool()].tolist() == expected, (text, count)
        assert inputs['image_grid'][row].tolist() == [[2, 2]] * sum(shown) + [[0, 0]] * (9 - sum(shown))


def test_every_template_is_asked():
    assert {name for names in KINDS.values() for name in names} == set(TEMPLATES)
