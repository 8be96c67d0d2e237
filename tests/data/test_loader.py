"""Batches: determinism, position, shards, bad samples."""

import json
import logging
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from vora_jax.batch import Batch, Patches
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.loader import batches
from vora_jax.data.text.tokenizer import load_tokenizer, train_sentencepiece
from vora_jax.method import VisionTokenRule
from vora_jax.types import TEXT, VISION, UserError

RULE = VisionTokenRule(8)
NUM = 30


def write_rows(file, records):
    file.write_text(
        '\n'.join(record if isinstance(record, str) else json.dumps(record) for record in records)
    )
    return str(file)


def sample(number, frame=None, question='what?', answer='blue'):
    record = {
        'id': str(number),
        'conversations': [
            {'from': 'human', 'value': ('<image>\n' if frame else '') + question},
            {'from': 'gpt', 'value': answer},
        ],
    }
    return record | ({'frames': [frame]} if frame else {})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Thirty pictures of one grey each (its number), two sizes, with questions; tokenizer; text-only rows."""
    path = tmp_path_factory.mktemp('data')
    (path / 'images').mkdir()
    for number in range(NUM):
        PIL.Image.new('L', (16, 16 if number % 2 else 24), number).save(path / f'images/{number}.png')
    write_rows(
        path / 'rows.jsonl',
        [sample(number, f'images/{number}.png', 'what?' * (1 + number % 3)) for number in range(NUM)],
    )
    write_rows(
        path / 'text.jsonl', [sample(number, answer='yes' if number % 2 else 'no') for number in range(NUM)]
    )
    train_sentencepiece(['what?', 'blue', 'yes', 'no', 'user', 'assistant'] * 9, str(path / 'tokenizer'), 300)
    return path


def data(folder, *files, **changes):
    sources = tuple(Source(str(folder / file)) for file in files or ('rows.jsonl',))
    options = {'max_slots': 96, 'max_patches': 16, 'max_images': 3, 'max_bad_fraction': 0.0} | changes
    return Data(sources, str(folder / 'tokenizer'), **options)


def take(loader, count):
    result = [next(loader) for _ in range(count)]
    loader.close()
    return result


def one_epoch(loader):
    """The rows up to the end of the epoch, of a loader whose batches have one row."""
    first, rows = int(loader.epoch(loader.get_state())), []
    while loader.epoch(loader.get_state()) < first + 1:
        rows.append(next(loader))
    return rows


def leaves(batch):
    return [leaf for leaf in (*batch._replace(patches=None), *(batch.patches or ())) if leaf is not None]


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        for a, b in zip(leaves(one), leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_an_epoch_holds_every_sample_once_and_is_reshuffled(folder):
    loader = batches(data(folder), RULE, 1, seed=0)
    assert loader.num_samples == NUM and loader.num_rows < NUM
    epochs = [[], []]
    for epoch in epochs:
        for batch in one_epoch(loader):
            assert (
                isinstance(batch, Batch)
                and isinstance(batch.patches, Patches)
                and isinstance(batch.tokens, np.ndarray)
            )
            used = batch.patches.image_id[0] >= 0
            numbers = batch.patches.pixels[0, used, 0].tolist()
            grids = batch.patches.grid[0].prod(-1)
            epoch += [numbers[place] for place in np.cumsum(grids[grids > 0]) - 1]
            assert (batch.modality == VISION).sum() == used.sum() and not batch.tally[..., 1:].any()
    loader.close()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM)) and epochs[0] != epochs[1]


def test_text_and_loss_are_those_of_the_sample(folder):
    tokenizer = load_tokenizer(str(folder / 'tokenizer'))
    (batch,) = take(batches(data(folder, pack=False), RULE, 4, seed=0), 1)
    for row in range(4):
        text = tokenizer.decode(batch.tokens[row][batch.modality[row] == TEXT])
        assert text.startswith('<|im_start|>user\n\nwhat?') and text.endswith(
            '<|im_start|>assistant\nblue<|im_end|>'
        )
        assert tokenizer.decode(batch.targets[row][batch.loss_mask[row] > 0]) == 'blue<|im_end|>'
        assert batch.segment_id[row].max() == 1


def test_two_runs_give_the_same_bytes_and_another_seed_does_not(folder):
    first, again, other = (take(batches(data(folder), RULE, 2, seed), 8) for seed in (3, 3, 4))
    assert_equal(first, again)
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other))


def test_position_can_be_saved_and_restored(folder):
    loader = batches(data(folder), RULE, 4, seed=0)
    take_some = [next(loader) for _ in range(3)]
    state = json.loads(json.dumps(loader.get_state()))
    rest = [next(loader) for _ in range(9)]
    loader.set_state(state)
    assert_equal(rest, take(loader, 9))
    fresh = batches(data(folder), RULE, 4, seed=0)
    fresh.set_state(state)
    assert_equal(rest, take(fresh, 9))
    assert len(take_some) == 3 and all(type(value) is int for value in state.values())


@pytest.mark.parametrize('count', [2, 4])
def test_shards_are_the_blocks_of_the_global_batch(folder, count):
    whole = batches(data(folder), RULE, 4, seed=0)
    parts = [batches(data(folder), RULE, 4, seed=0, shard=(index, count)) for index in range(count)]
    for step in range(7):
        batch, shards = next(whole), [next(part) for part in parts]
        for number, leaf in enumerate(leaves(batch)):
            np.testing.assert_array_equal(leaf, np.concatenate([leaves(shard)[number] for shard in shards]))
        if step == 3:  # a position saved by one shard continues the whole, and the other way round
            state = whole.get_state()
            assert all(part.get_state() == state for part in parts)
            whole.set_state(parts[-1].get_state())
            for part in parts:
                part.set_state(state)
    for loader in (whole, *parts):
        loader.close()
    with pytest.raises(UserError, match='batch_rows = 4 .* 3 processes'):
        batches(data(folder), RULE, 4, seed=0, shard=(0, 3))


def test_fewer_rows_than_a_batch_repeat(folder):
    loader = batches(data(folder, max_slots=1024, max_patches=256, max_images=64), RULE, 16, seed=0)
    (batch,) = take(loader, 1)
    assert loader.num_rows < 16 == batch.tokens.shape[0] and (batch.segment_id.max(1) > 0).all()


def test_text_only_runs_have_no_patches(folder):
    (batch,) = take(batches(data(folder, 'text.jsonl'), None, 2, seed=0), 1)
    assert batch.patches is None and batch.vision_slot.shape == (2, 0) and batch.loss_mask.any()
    (batch,) = take(batches(data(folder, 'text.jsonl'), RULE, 2, seed=0), 1)
    assert (
        not batch.patches.pixels.any()
        and (batch.patches.image_id == -1).all()
        and (batch.vision_slot == -1).all()
    )
    with pytest.raises(UserError, match='rows.jsonl row 1: the sample has frames'):
        batches(data(folder), None, 2, seed=0)


def test_turns_that_do_not_fit_are_dropped_and_a_first_turn_is_bad(folder, tmp_path):
    turns = [
        {'from': role, 'value': value}
        for role, value in (
            ('human', '<image>what?'),
            ('gpt', 'blue'),
            ('human', '<image>what?'),
            ('gpt', 'no'),
        )
    ]
    path = write_rows(
        tmp_path / 'long.jsonl',
        [{'id': 'a', 'frames': ['images/1.png', 'images/3.png'], 'conversations': turns}] + [sample(0)] * 9,
    )
    source = Source(path, image_root=str(folder))

    def only(max_patches, **changes):
        config = Data(
            (source,),
            str(folder / 'tokenizer'),
            max_slots=256,
            max_images=2,
            max_patches=max_patches,
            image=ImagePolicy(max_patches=4),
            max_bad_fraction=0.1,
            **changes,
        )
        loader = batches(config, RULE, 1, seed=0)
        return take(loader, 1)[0], loader.warnings

    batch, warnings = only(8)
    assert (batch.modality == VISION).sum() == 8 and not warnings
    batch, warnings = only(7)
    assert (batch.modality == VISION).sum() == 4 and batch.patches.pixels[0, 0, 0] == 1 and not warnings
    config = Data((source,), str(folder / 'tokenizer'), max_slots=6, max_patches=8, max_images=2)
    with pytest.raises(UserError, match=r'10 of 10 samples .*long.jsonl row 1: the first turn needs'):
        batches(config, RULE, 1, seed=0)


def bad_rows(folder, path):
    """Ten rows: 1 lacks its picture, 4's is cut off, 7 is not JSON, 9 has a frame without a placeholder."""
    rows = [sample(number, f'images/{number}.png') for number in range(10)]
    whole = (folder / 'images/4.png').read_bytes()
    (folder / 'images/cut.png').write_bytes(whole[: len(whole) - 20])
    rows[1]['frames'], rows[4]['frames'], rows[9]['frames'] = (
        ['images/no.png'],
        ['images/cut.png'],
        ['images/9.png'] * 2,
    )
    rows[7] = '{"id": '
    return write_rows(path / 'bad.jsonl', rows)


def test_bad_samples_are_left_out_counted_and_named_once(folder, tmp_path, caplog):
    config = Data(
        (Source(bad_rows(folder, tmp_path), str(folder)),),
        str(folder / 'tokenizer'),
        max_slots=64,
        max_patches=16,
        max_images=3,
        max_bad_fraction=0.5,
    )
    with caplog.at_level(logging.WARNING):
        loader = batches(config, RULE, 1, seed=0)
        epoch, second = one_epoch(loader), one_epoch(loader)
    loader.close()
    for rows in (epoch, second):
        assert sum(int(batch.tally[0, 0, 1]) for batch in rows) == 4
        assert sum(int(batch.segment_id.max()) for batch in rows) == 6
        shown = {
            int(batch.patches.pixels[0, place, 0])
            for batch in rows
            for place in range(16)
            if batch.patches.image_id[0, place] >= 0
        }
        assert shown == {0, 2, 3, 5, 6, 8}
    messages = sorted(record.getMessage() for record in caplog.records if record.name.startswith('vora_jax'))
    assert len(messages) == len(loader.warnings) == 4
    for row, reason in (
        (2, 'no.png does not exist'),
        (5, 'cut.png cannot be read (truncated'),
        (8, 'not valid JSON'),
        (10, '1 <image> placeholders for 2 frames'),
    ):
        assert any(f'bad.jsonl row {row}: ' in message and reason in message for message in messages), (
            messages
        )


def test_too_many_bad_samples_stop_the_run(folder, tmp_path):
    path = bad_rows(folder, tmp_path)
    config = Data(
        (Source(path, str(folder)),),
        str(folder / 'tokenizer'),
        max_slots=64,
        max_patches=16,
        max_images=3,
        max_bad_fraction=0.2,
    )
    with pytest.raises(
        UserError, match=r'3 of 10 samples cannot be used, .*bad.jsonl row 2: image .*no.png does not'
    ):
        batches(config, RULE, 1, seed=0)
    loader = batches(
        Data(
            config.sources, config.tokenizer, max_slots=64, max_patches=16, max_images=3, max_bad_fraction=0.3
        ),
        RULE,
        1,
        seed=0,
    )
    with pytest.raises(
        UserError, match='4 of 10 samples cannot be used'
    ):  # the cut file is found while reading
        take(loader, 30)


def test_user_mistakes_name_the_file(folder, tmp_path):
    (tmp_path / 'empty.jsonl').write_text('')
    with pytest.raises(UserError, match='empty.jsonl is empty'):
        batches(Data((Source(str(tmp_path / 'empty.jsonl')),), str(folder / 'tokenizer')), RULE, 1, seed=0)
    with pytest.raises(UserError, match='nothing.jsonl does not exist'):
        batches(data(folder, 'nothing.jsonl'), RULE, 1, seed=0)
    with pytest.raises(UserError, match='no tokenizer.model'):
        batches(Data((Source(str(folder / 'rows.jsonl')),), str(tmp_path)), RULE, 1, seed=0)
    with pytest.raises(UserError, match='weight'):
        batches(
            Data((Source(str(folder / 'rows.jsonl'), weight=0.0),), str(folder / 'tokenizer')),
            RULE,
            1,
            seed=0,
        )
    with pytest.raises(UserError, match='template'):
        batches(data(folder, template='x'), RULE, 1, seed=0)


def test_the_manifest_follows_content_and_tokenizer(folder, tmp_path):
    first = batches(data(folder), RULE, 1, seed=0).manifest
    assert first == batches(data(folder), RULE, 1, seed=9).manifest
    rows = (folder / 'rows.jsonl').read_text()
    (tmp_path / 'rows.jsonl').write_text(rows.replace('blue', 'Blue', 1))
    source = Source(str(tmp_path / 'rows.jsonl'), str(folder))
    assert first != batches(Data((source,), str(folder / 'tokenizer')), RULE, 1, seed=0).manifest


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(folder):
    program = """
if __name__ == '__main__':
    import sys, hashlib
    from vora_jax.data.config import Data, Source
    from vora_jax.data.loader import batches
    from vora_jax.method import VisionTokenRule
    source, tokenizer = Source(sys.argv[1] + '/rows.jsonl'), sys.argv[1] + '/tokenizer'
    data = Data((source,), tokenizer, max_slots=96, max_patches=16, max_images=3)
    digests = []
    for workers in (0, 2):
        loader = batches(data, VisionTokenRule(8), 2, seed=0, workers=workers)
        for step in range(6):
            batch = next(loader)
            if step == 3:
                loader.set_state(loader.get_state())
            content = batch.tokens.tobytes() + batch.patches.pixels.tobytes()
            digests.append(hashlib.sha256(content).hexdigest())
    assert digests[:6] == digests[6:] and len(set(digests)) > 3
    print('equal')
"""
    result = subprocess.run(
        [sys.executable, '-c', program, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert (result.stdout.strip(), result.stderr) == ('equal', ''), result.stderr
