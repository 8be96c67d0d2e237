"""Commit, damage, opening, writing."""

import errno
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vora_jax.params import flatten
from vora_jax.training import checkpoint, checkpoint_writer, checksum
from vora_jax.training.checkpoint import Record
from vora_jax.training.fingerprint import content_hash
from vora_jax.types import UserError

FROZEN = {'base': {'kernel': jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4)}}


def weights(step):
    return {'adapter': {'a': jnp.full((300,), step, jnp.float32)}, 'norm': jnp.full((2,), step, jnp.float32)}


def save(workdir, *steps, keep_last=10):
    writer = checkpoint_writer.Writer(workdir, keep_last)
    content = writer.save_frozen(FROZEN)
    for step in steps:
        record = Record(step, f'text {step}', content, data={'position': step})
        writer.save(record, weights(step), {'count': jnp.int32(step)})
    writer.wait()


def flip_a_byte(folder):
    path = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_opens_the_latest_step_with_trainable_and_frozen_together(tmp_path):
    save(tmp_path, 1, 2)
    opened = checkpoint.open_checkpoint(tmp_path)
    assert (opened.step, opened.config_text, opened.metadata.data) == (2, 'text 2', {'position': 2})
    flat = flatten(opened.params)
    assert set(flat) == {'adapter/a', 'norm', 'base/kernel'}
    assert (
        flat['base/kernel'].dtype == jnp.bfloat16
        and (flat['base/kernel'] == np.asarray(FROZEN['base']['kernel'])).all()
    )
    assert (flat['adapter/a'] == 2).all()
    assert (checkpoint.open_checkpoint(tmp_path / 'steps' / '1').params['norm'] == 1).all()


def test_only_the_last_steps_stay(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert checkpoint.step_numbers(tmp_path, committed=False) == [3, 4]
    assert len(list((tmp_path / 'frozen').iterdir())) == 1


def test_a_flipped_byte_falls_back_to_the_previous_step(tmp_path, caplog):
    save(tmp_path, 1, 2)
    flip_a_byte(tmp_path / 'steps' / '2')
    with caplog.at_level(logging.WARNING):
        assert checkpoint.open_checkpoint(tmp_path).step == 1
    assert 'DAMAGED' in caplog.text and 'steps/2' in caplog.text
    with pytest.raises(UserError, match='steps/2 is damaged'):
        checkpoint.open_checkpoint(tmp_path / 'steps' / '2')
    flip_a_byte(tmp_path / 'steps' / '1')
    with pytest.raises(UserError, match='every checkpoint .* is damaged'):
        checkpoint.open_checkpoint(tmp_path)


def test_a_step_without_its_checksum_file_does_not_count(tmp_path, caplog):
    save(tmp_path, 1, 2)
    (tmp_path / 'steps' / '2' / checksum.SIDECAR).unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_step(tmp_path) == 1
    assert 'not finished' in caplog.text
    with pytest.raises(UserError, match='never finished'):
        checkpoint.open_checkpoint(tmp_path / 'steps' / '2')
    save(tmp_path, 2)  # what a killed process left does not stand in the way
    assert checkpoint.latest_step(tmp_path) == 2


def test_damaged_frozen_weights_are_told(tmp_path):
    save(tmp_path, 1)
    flip_a_byte(next((tmp_path / 'frozen').iterdir()))
    with pytest.raises(UserError, match='frozen/.* is damaged'):
        checkpoint.open_checkpoint(tmp_path)


def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(folder):
        raise OSError('no space left')

    writer = checkpoint_writer.Writer(tmp_path, 2)
    monkeypatch.setattr(checksum, 'commit', full)
    writer.save(Record(1, ''), weights(1), {'count': jnp.int32(1)})
    with pytest.raises(OSError, match='steps/1 could not be written: no space left'):
        writer.wait()
    writer.check()  # told once
    assert checkpoint.latest_step(tmp_path) is None


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    x = {'x': jnp.arange(3_000_000, dtype=jnp.float32)}
    overwrite = jax.jit(lambda tree: {'x': tree['x'] * 0 - 1}, donate_argnums=0)
    writer = checkpoint_writer.Writer(tmp_path, 2)
    writer.save(Record(1, ''), x, {'count': jnp.int32(1)})
    for _ in range(3):
        x = overwrite(x)
    writer.wait()
    assert (checkpoint.open_checkpoint(tmp_path).params['x'] == np.arange(3_000_000, dtype=np.float32)).all()


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda d: d / 'nowhere', 'does not exist'),
        (lambda d: d, 'an empty folder'),
        (lambda d: (d / 'x').write_text('') and d / 'x' or d / 'x', 'a file'),
        (lambda d: (d / 'config.json').write_text('{}') and d, 'a Hugging Face folder'),
        (lambda d: (d / 'steps').mkdir() or d, 'without a finished step'),
    ],
)
def test_a_path_that_is_no_checkpoint_is_described(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        checkpoint.open_checkpoint(make(tmp_path))


def test_written_checkpoint_opens_and_is_not_overwritten(tmp_path):
    (tmp_path / 'tokenizer').mkdir()
    (tmp_path / 'tokenizer' / 'tokenizer.model').write_text('t')
    params = {'a': {'b': np.arange(4.0, dtype=np.float32)}, 'c': jnp.ones((2,), jnp.bfloat16)}
    target = tmp_path / 'merged'
    checkpoint.write_checkpoint(target, params, 'text', str(tmp_path / 'tokenizer'), step=7)
    opened = checkpoint.open_checkpoint(target)
    assert (opened.step, opened.config_text, opened.metadata.origin) == (7, 'text', 'merge')
    assert (opened.params['a']['b'] == params['a']['b']).all() and opened.params['c'].dtype == jnp.bfloat16
    assert (
        opened.tokenizer_dir == str(target / 'tokenizer')
        and (target / 'tokenizer' / 'tokenizer.model').exists()
    )
    with pytest.raises(UserError, match='already holds a run'):
        checkpoint.write_checkpoint(target, params, 'text', str(tmp_path / 'tokenizer'))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / 'tokenizer').mkdir()
    (tmp_path / 'tokenizer/vocab.json').write_text('{}')
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(UserError, match='is not empty and no workdir .it is a Hugging Face folder'):
        checkpoint.write_checkpoint(tmp_path, {'a': np.zeros(1)}, 'text', '')
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['config.json', 'tokenizer', 'vocab.json']


def test_a_disk_that_is_full_before_the_weights(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, 'copy_tokenizer', full)
    with pytest.raises(UserError, match='the disk is full'):
        checkpoint.write_checkpoint(tmp_path / 'w', {'a': np.zeros(1)}, 'text', str(tmp_path))
    assert checkpoint.step_numbers(tmp_path / 'w', committed=False) == []


def test_content_hash_sees_contents_places_names_and_no_mesh():
    def tree(x, name='w'):
        return {name: jnp.asarray(x, jnp.float32)}

    values = np.arange(64.0).reshape(8, 8)
    base = content_hash(tree(values))
    assert base == content_hash(tree(values.copy())) and content_hash({}) == ''
    swapped = values.copy()
    swapped[0, :2] = swapped[0, 1::-1]
    others = [tree(values, 'v'), tree(swapped), tree(values.reshape(4, 16)), tree(values + 1e-6)]
    assert len({base, *map(content_hash, others)}) == 5
    mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.device_put(tree(values)['w'], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x')))
    assert content_hash({'w': cut}) == base
