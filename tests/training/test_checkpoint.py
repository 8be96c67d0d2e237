"""Commit, damage, opening, writing."""

import errno
import logging
import math
import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vora_jax.params import flatten
from vora_jax.training.checkpoints import checkpoint, checksum
from vora_jax.training.checkpoints import writer as checkpoint_writer
from vora_jax.training.checkpoints.checkpoint import Record
from vora_jax.training.checkpoints.fingerprint import content_hash
from vora_jax.types import UserError

FROZEN = {'base': {'kernel': jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4)}}


def weights(step):
    return {'adapter': {'a': jnp.full((300,), step, jnp.float32)}, 'norm': jnp.full((2,), step, jnp.float32)}


def save(workdir, *steps, keep_last=10, keep_every=0):
    writer = checkpoint_writer.Writer(workdir, keep_last, keep_every)
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


def test_multiples_stay_beside_the_last_steps(tmp_path):
    save(tmp_path, *range(1, 9), keep_last=1, keep_every=3)
    assert checkpoint.step_numbers(tmp_path, committed=False) == [3, 6, 8]


def test_the_step_resumed_from_stays_until_a_newer_one_is_committed(tmp_path, monkeypatch):
    save(tmp_path, 5, 8)
    flip_a_byte(tmp_path / 'steps' / '8')
    commit, there = checksum.commit, []

    def committed(folder):
        there.append(checkpoint.step_numbers(tmp_path))
        commit(folder)

    monkeypatch.setattr(checksum, 'commit', committed)
    save(tmp_path, 6, 8, keep_last=1)  # resumed after step 5: the damaged step 8 does not count, and is replaced
    assert there == [[5, 8], [6]]
    assert checkpoint.step_numbers(tmp_path) == [8] and checkpoint.open_checkpoint(tmp_path).step == 8


@pytest.mark.parametrize('damage', ['truncated', 'missing', 'empty sidecar', 'cut sidecar', 'no dictionary'])
def test_other_damage_falls_back_too(tmp_path, caplog, damage):
    save(tmp_path, 1, 2)
    folder = tmp_path / 'steps' / '2'
    sidecar, files = folder / checksum.SIDECAR, sorted((folder / 'optimizer').rglob('d/*'))
    text = {'empty sidecar': '{}', 'cut sidecar': sidecar.read_text()[:-9], 'no dictionary': '[1]'}.get(damage)
    if text:
        sidecar.write_text(text)
    elif damage == 'truncated':
        files[0].write_bytes(files[0].read_bytes()[:-1])
    else:
        files[-1].unlink()
    (tmp_path / 'steps' / '3').mkdir()  # what a killed process left besides
    with caplog.at_level(logging.WARNING):
        assert checkpoint.open_checkpoint(tmp_path).step == 1
    assert 'DAMAGED' in caplog.text and 'steps/3 was not finished' in caplog.text


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


def test_damaged_frozen_weights_can_be_made_again(tmp_path):
    save(tmp_path / 'a', 1)
    folder = next((tmp_path / 'a/frozen').iterdir())
    flip_a_byte(folder)
    with pytest.raises(UserError, match='frozen/.* is damaged.*make it again: train one step of the same config'):
        checkpoint.open_checkpoint(tmp_path / 'a')
    shutil.rmtree(folder)
    with pytest.raises(UserError, match='frozen/.* are missing; copy .*another --workdir and copy it from there'):
        checkpoint.open_checkpoint(tmp_path / 'a')
    save(tmp_path / 'b', 1)
    shutil.copytree(tmp_path / 'b/frozen' / folder.name, folder)
    assert checkpoint.open_checkpoint(tmp_path / 'a').step == 1


def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(folder):
        raise OSError('no space left')

    writer = checkpoint_writer.Writer(tmp_path, 2)
    monkeypatch.setattr(checksum, 'commit', full)
    writer.save(Record(1, ''), weights(1), {'count': jnp.int32(1)})
    with pytest.raises(UserError, match='steps/1 could not be written: the disk is full; free some space and run'):
        writer.wait()
    writer.check()  # told once
    assert checkpoint.latest_step(tmp_path) is None


@pytest.mark.parametrize(
    'spoil, words', [
        (lambda folder: (folder / 'steps').rmdir() or (folder / 'steps').write_text(''), 'its folder vanished; bring it'),
        (lambda folder: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1)), 'the disk is full; free some space'),
    ]
)
def test_a_disk_that_fails_ends_the_run_with_a_sentence(tmp_path, spoil, words):
    writer, limit = checkpoint_writer.Writer(tmp_path, 2), resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {'x': jax.random.normal(jax.random.key(0), (100_000,))}
    try:
        spoil(tmp_path)
        with pytest.raises(UserError, match=f'steps/4 could not be written: {words}.* and run the same command'):
            writer.save(Record(4, ''), big, {'count': jnp.int32(1)})
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # as the loop does after each step
                writer.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoint.step_numbers(tmp_path) == []


@pytest.mark.parametrize('shape, axes', [((2, 4), ('x', 'y')), ((1, 1), ('x', 'y')), ((8, 1), (None, 'x'))])
def test_another_mesh_restores_the_same_bits(tmp_path, shape, axes):
    """From 8 shards of the first dimension, weights and optimizer alike."""
    def place(shape, axes):
        devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
        return jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ('x', 'y')), jax.sharding.PartitionSpec(*axes))

    rng = np.random.default_rng()
    values = {'kernel': rng.normal(size=(16, 24)).astype(np.float32),
              'half': rng.normal(size=(8, 8)).astype(jnp.bfloat16)}
    state = optax.adamw(1e-3).init(jax.tree.map(jnp.asarray, values))
    state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) if x.ndim else np.int32(7), state)

    def put(tree, sharding):
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda x: jax.device_put(x, sharding if x.ndim else whole), tree)

    before, after = place((8, 1), ('x', None)), place(shape, axes)
    writer = checkpoint_writer.Writer(tmp_path, 2)
    writer.save(Record(1, ''), put(values, before), put(state, before))
    writer.wait()
    target = put({'trainable': values, 'optimizer': state}, after)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
    loaded = checkpoint.restore(tmp_path / 'steps/1', shapes)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(target), strict=True):
        assert one.sharding == other.sharding and one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


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
