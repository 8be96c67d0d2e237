"""Ids and labels of the original VoRA data module."""
import json
import pathlib

import pytest

from vora_jax.data.config import Data, Source
from vora_jax.data.packing import Picture, Text
from vora_jax.data.samples import Samples
from vora_jax.data.text.conversation import Image, render, render_prompt, render_turns
from vora_jax.data.text.templates import find_template
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

FOLDER = pathlib.Path(__file__).parent / 'vora_golden'
GOLDEN = json.loads((FOLDER / 'golden.json').read_text(encoding='utf-8'))
DETAIL = 'Describe this image in detail.'
MULTI_TURN = ['<image>\nWhat?', 'A square.', 'Sure?', 'Yes.']
RECORDS = {
    'human_image_tag': (['<image>\n' + DETAIL, 'This image is a test pattern.'], 1, None),
    'no_image_tag': ([DETAIL, 'A tall one.'], 1, None),
    'multi_turn': (MULTI_TURN, 1, None),
    'system_turn': (['What?\n<image>', 'A square.'], 1, 'Be brief.'),
    'text_only': (['What is 2+2?', '4'], 0, None),
    # The original drops one of the two frames at random; here the record itself has one.
    'two_frames_seg1': (['<image>\nWhat?', 'x'], 1, None),
}


def record(values, num_frames, system=None):
    turns = [{'from': ('human', 'gpt')[number % 2], 'value': value} for number, value in enumerate(values)]
    lead = [{'from': 'system', 'value': system}] if system is not None else []
    frames = [f'frames/{number:08}.png' for number in range(num_frames)]
    return {'id': 'a', 'conversations': lead + turns} | ({'frames': frames} if frames else {})


def ids_and_labels(pieces):
    ids, labels = [], []
    for piece in pieces:
        some = list(piece.ids) if isinstance(piece, Text) else [-200]
        ids += some
        labels += some if isinstance(piece, Text) and piece.supervised else [-100] * len(some)
    return ids, labels


@pytest.fixture(scope='module')
def tokenizer():
    return load_tokenizer(str(FOLDER))


def test_special_ids(tokenizer):
    """The vocabulary is cut down to this file's texts, so its size is not compared."""
    special = GOLDEN['special']
    assert (tokenizer.pad_id, tokenizer.eos_id) == (special['pad_id'], special['eos_id'])
    assert find_template('vora').end_id(tokenizer) == special['eos_id']


@pytest.mark.parametrize('name', RECORDS)
def test_ids_and_labels_are_equal(tokenizer, name):
    template = find_template('vora')
    values, num_frames, system = RECORDS[name]
    expected = GOLDEN[name]
    assert ids_and_labels(render(record(*RECORDS[name]), tokenizer, template)) == (
        expected['input_ids'], expected['labels'])
    turns, frames = render_turns(record(*RECORDS[name]), tokenizer, template)
    assert len(frames) == expected['n_frames'] and len(turns) == len(values) // 2
    # A prompt for generation is what training saw before its first answer.
    asked = values[0] if '<image>' in values[0] or not num_frames else '<image>' + values[0]
    prompt, _ = ids_and_labels(render_prompt(asked, num_frames, tokenizer, template, system))
    assert prompt == expected['input_ids'][:len(prompt)] and expected['labels'][len(prompt)] != -100


def test_several_frames_are_written_out_in_the_record(tokenizer):
    """The original puts `1s: <image>; 2s: <image>; ` where a record of two frames has one `<image>`. Here a record has a
    place for each of its frames; written like this it gives the same prompt."""
    question = '1s: <image>; 2s: <image>; \n\nWhat?'
    expected = GOLDEN['two_frames_global']
    prompt = [(-200,) if isinstance(piece, Image) else piece.ids
              for piece in render_prompt(question, expected['n_frames'], tokenizer, find_template('vora'))]
    texts = ['<image>' if ids == (-200,) else tokenizer.decode(ids) for ids in prompt]
    assert ''.join(texts) == expected['prompt']
    with pytest.raises(UserError, match='1 <image> placeholders for 2 frames'):
        render(record(['<image>\nWhat?', 'x'], 2), tokenizer, find_template('vora'))


def test_a_tag_in_an_answer_is_refused(tokenizer):
    """On purpose: the original, fed with its README's own example, learns to say `<`, `image`, `>`."""
    assert GOLDEN['readme_gpt_tag']['labels'][-9:-6] == tokenizer.encode('<image>\n')
    with pytest.raises(UserError, match='outside a human turn'):
        render(record([DETAIL, '<image>\nThis image is a ...'], 1), tokenizer, find_template('vora'))


@pytest.fixture
def samples(tmp_path):
    """Samples of a file with two records, in rows of a given number of slots; a picture takes `image_slots`."""
    def make(slots, image_slots=1):
        file = tmp_path / 'train.jsonl'
        records = [record(MULTI_TURN, 1), record(*RECORDS['human_image_tag'][:2])]
        file.write_text(''.join(json.dumps(each) + '\n' for each in records))
        # The picture is one patch of this size, or a square of smaller ones.
        data = Data((Source(str(file), str(FOLDER)),), str(FOLDER), 'vora', max_slots=slots, max_patches=64)
        return Samples(data, VisionTokenRule(448))
    return make


def test_truncation_drops_whole_turns_as_the_original_does(samples):
    """trunc40_qa: of 41 ids the original keeps the first turn, as we do. It drops a turn as soon as the length reaches the
    limit minus one, so it would also drop one that fits exactly; and it counts a picture as one id, ours counts the slots
    that it takes (one, here)."""
    expected = GOLDEN['trunc40_qa']
    kept = [piece if isinstance(piece, Text) else Image(0) for piece in samples(40).segment(0)]
    assert ids_and_labels(kept) == (expected['input_ids'], expected['labels'])
    whole = [piece for piece in samples(41).segment(0)]
    assert sum(isinstance(piece, Picture) for piece in whole) == 1
    assert ids_and_labels([piece for piece in whole])[0] == GOLDEN['multi_turn']['input_ids']


def test_a_first_turn_that_does_not_fit_is_told(samples):
    """trunc25_text, where we differ on purpose: the original cuts inside the first turn and learns an end mark right
    behind the cut, here in the middle of the question; we count such a sample as bad and name it."""
    assert GOLDEN['trunc25_text']['labels'][:-1] == [-100] * 24
    with pytest.raises(UserError, match='row 2.*the first turn needs'):
        samples(25).segment(1)
