"""Prompts as rows of one static size."""
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import tiny_pictures

from vora_jax.data.config import ImagePolicy, Source
from vora_jax.data.packing import layout
from vora_jax.data.samples import Samples
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.method import VisionTokenRule
from vora_jax.types import PAD, ROUTE, TEXT, VISION, UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_pictures.make(tmp_path_factory.mktemp('pictures'))


@pytest.fixture(scope='module')
def make_rows(folder):
    config, _ = tiny_pictures.config(folder)
    tokenizer = load_tokenizer(config.data.tokenizer)

    def make(*prompts, rule=config.method.vision_tokens):
        return PromptRows(prompts, config.data, rule, tokenizer)
    return make


def test_rows_have_one_size_and_end_with_the_assistant_marker(make_rows, folder):
    picture = str(folder / 'images/1.png')  # 16 x 24 pixels: 3 x 2 patches
    with_picture = Prompt('<image>\nis it red?', (picture,))
    rows = make_rows(Prompt('what color?'), with_picture, Prompt('red?', (picture,)))
    first, second = rows.batches(2)
    assert first.tokens.shape == second.tokens.shape and first.tokens.shape[1] % 8 == 0
    assert first.patches.pixels.shape[1] == 8
    np.testing.assert_array_equal((first.modality == VISION).sum(1), [0, 6])
    np.testing.assert_array_equal(second.tokens[0], second.tokens[1])  # the last prompt fills the last batch
    tokenizer = load_tokenizer(str(folder / 'tokenizer'))
    length = (first.modality != PAD).sum(1)
    for row in range(2):
        assert (first.modality[row, length[row]:] == PAD).all()
        text = first.tokens[row][first.modality[row] == TEXT]
        assert tokenizer.decode(text).endswith('<|im_start|>assistant\n')


def test_pictures_take_their_places_in_the_question(make_rows, folder):
    red, green = (str(folder / f'images/{number}.png') for number in (0, 1))  # 2 x 2 and 3 x 2 patches
    batch, = make_rows(Prompt('is <image> like <image>?', (green, red))).batches(1)
    assert batch.patches.grid[0].tolist() == [[3, 2], [2, 2]]
    is_vision = (batch.modality[0] == VISION).astype(int)
    runs = np.flatnonzero(np.diff(is_vision, prepend=0, append=0)).reshape(-1, 2)
    assert np.diff(runs).ravel().tolist() == [6, 4] and runs[1, 0] > runs[0, 1]  # with text between
    for image, channel in ((0, 1), (1, 0)):
        pixels = batch.patches.pixels[0, batch.patches.image_id[0] == image]
        assert pixels.reshape(-1, 3).mean(0).argmax() == channel


def test_a_model_without_pictures_gets_rows_without_patches(make_rows):
    batch, = make_rows(Prompt('what color?'), rule=None).batches(1)
    assert batch.patches is None


def test_a_text_only_model_refuses_pictures(make_rows, folder):
    with pytest.raises(UserError, match='text-only language model, but it is asked about the image .*0.png'):
        make_rows(Prompt('what?', (str(folder / 'images/0.png'),)), rule=None)


def test_mistakes_name_the_row(make_rows, folder):
    with pytest.raises(UserError, match='^row 7: image gone.png does not exist'):
        make_rows(Prompt('what?', ('gone.png',), where='row 7'))
    with pytest.raises(UserError, match='^row 7: the question has 2 <image> placeholders for 1 images'):
        make_rows(Prompt('<image><image>?', (str(folder / 'images/0.png'),), where='row 7'))
    broken = folder / 'broken.png'
    broken.write_bytes((folder / 'images/0.png').read_bytes()[:-20])
    rows = make_rows(Prompt('what?', (str(broken),), where='row 7'))
    with pytest.raises(UserError, match='^row 7: image .*broken.png cannot be read'):
        list(rows.batches(1))


@pytest.mark.parametrize('template', ['image_first', 'image_first_instruction'])
def test_a_prompt_is_the_training_row_up_to_its_answer(folder, tmp_path, template):
    """With a slot that routes, [cls] tokens of three taps, and the pictures in front; with and without a picture."""
    rule = VisionTokenRule(8, cls=True, bidirectional=False, select='cls', tokens_per_place=3, route_token=True)
    picture, question = str(folder / 'images/1.png'), 'Question: what?\nOptions: (A) x (B) y\nResponse:'
    rows = [{'frames': [picture], 'conversations': [{'from': 'human', 'value': f'<image>\n{question}'},
                                                    {'from': 'gpt', 'value': 'The answer is A.'}]},
            {'conversations': [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': 'The answer is A.'}]}]
    file = tmp_path / 'rows.jsonl'
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config, _ = tiny_pictures.config(folder)
    data = dataclasses.replace(config.data, template=template, sources=(Source(str(file)),), max_slots=192)
    samples, tokenizer = Samples(data, rule), load_tokenizer(data.tokenizer)
    prompts = PromptRows([Prompt(question, (picture,)), Prompt(question)], data, rule, tokenizer)
    asked, = prompts.batches(2)
    for number in range(2):
        trained = layout([samples.segment(number, 1)[0]], samples.budgets, rule=rule)
        length = int((asked.modality[number] != PAD).sum())
        assert length == int(trained.loss_mask.argmax()) + 1  # the last slot of the prompt predicts the answer
        for name in ('tokens', 'modality', 'positions', 'key_start', 'key_stop', 'route_slot'):
            np.testing.assert_array_equal(getattr(asked, name)[number, :length], getattr(trained, name)[:length], name)
        assert (trained.modality[0], trained.tokens[0]) == (ROUTE, 1 - number)
        assert (trained.modality == VISION).sum() == 3 * (1 - number)
        text = tokenizer.decode(trained.tokens[trained.modality == TEXT])
        assert text.startswith('Image:  ' if number == 0 else 'Image: N/A ')
        assert text.endswith('Response:The answer is A.<|im_end|>')
        learned = trained.targets[trained.loss_mask > 0]
        assert tokenizer.decode(learned) == 'The answer is A.<|im_end|>' and learned[-1] == prompts.end_id


@pytest.mark.parametrize('rule', [VisionTokenRule(8), VisionTokenRule(8, cls=True, pool=2, bidirectional=False)])
def test_a_prompt_of_tiles_is_the_training_row_up_to_its_answer(folder, tmp_path, rule):
    """Each picture becomes the squares of its own shape, where its mark stands; the same slots, patches and pixels."""
    rng, files = np.random.default_rng(2), []
    for number, (height, width) in enumerate(((20, 61), (33, 30), (9, 5))):
        files.append(str(tmp_path / f'{number}.png'))
        PIL.Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8)).save(files[-1])
    asked = [('is <image> like <image>?', files[:2]), ('<image>\nwhat color?', files[2:]), ('<image><image>?', files[1:])]
    file = tmp_path / 'rows.jsonl'
    file.write_text(''.join(json.dumps({'frames': images, 'conversations': [
        {'from': 'human', 'value': question}, {'from': 'gpt', 'value': 'yes'}]}) + '\n' for question, images in asked))
    policy = ImagePolicy(24, kind='tiles', side=16, tiles=((1, 2), (2, 1), (2, 2), (1, 3)), background=(9, 90, 200))
    config, _ = tiny_pictures.config(folder)
    data = dataclasses.replace(config.data, sources=(Source(str(file)),), max_slots=192, max_patches=60, max_images=12,
                               image=policy)
    samples, tokenizer = Samples(data, rule), load_tokenizer(data.tokenizer)
    prompts, = PromptRows([Prompt(question, tuple(images)) for question, images in asked], data, rule, tokenizer).batches(3)
    for number, squares in enumerate([(1 + 3) + (1 + 4), 1 + 2, (1 + 4) + (1 + 2)]):
        trained = layout([samples.segment(number, 1)[0]], samples.budgets, rule=rule)
        length = int((prompts.modality[number] != PAD).sum())
        assert length == int(trained.loss_mask.argmax()) + 1
        slots = squares * (1 if rule.cls else 4)  # a [cls] place is no slot, and windows of 2 x 2 are one
        assert (trained.modality == VISION).sum() == slots
        for name in ('tokens', 'modality', 'positions', 'key_start', 'key_stop', 'vision_slot', 'vision_source'):
            size = slots if name.startswith('vision') else length
            np.testing.assert_array_equal(getattr(prompts, name)[number, :size], getattr(trained, name)[:size], name)
        is_real = trained.patches.row >= 0
        count = int((trained.patches.image_id >= 0).sum())
        assert is_real.sum() == 4 * squares and count == squares * (4 + rule.cls)
        np.testing.assert_array_equal(trained.patches.grid[:squares], [[2, 2]] * squares)
        for name, theirs in trained.patches._asdict().items():
            size = squares if name == 'grid' else count
            np.testing.assert_array_equal(getattr(prompts.patches, name)[number, :size], theirs[:size], name)
