"""Trouble that may pass is told apart from mistakes; a run outlives that of its logs."""
import concurrent.futures
import dataclasses
import errno
import logging
import os
import types

import jax
import jax.numpy as jnp
import pytest

from vora_jax.cli import main
from vora_jax.training import resume
from vora_jax.training.checkpoints import checkpoint, checksum, record, shared, storage, trouble, workdir
from vora_jax.training.checkpoints.writer import Writer
from vora_jax.training.log import json_lines, profile
from vora_jax.types import TryAgain, UserError


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    for module in (trouble, json_lines):
        monkeypatch.setattr(module, 'WAITS', (0.0, 0.0))


def oserror(number):
    return OSError(number, os.strerror(number))


def raises(error):
    def act(*_, **__):
        raise error

    return act


def save(folder, **more):
    writer = Writer(folder, 2)
    writer.save(record.Record(1, 'text', **more), {'x': jnp.arange(300.0)}, {'count': jnp.int32(1)})
    writer.wait()


@pytest.mark.parametrize('error, kind', [
    (oserror(errno.ENOSPC), UserError), (oserror(errno.EDQUOT), UserError), (oserror(errno.EACCES), UserError),
    (OSError('Forbidden: https://storage/b/o'), UserError), (ValueError('NOT_FOUND: The bucket does not exist'), UserError),
    (oserror(errno.EIO), TryAgain), (oserror(errno.ESTALE), TryAgain), (TimeoutError('process 1 told nothing'), TryAgain),
    (ValueError('UNAVAILABLE: HTTP 503'), TryAgain), (Exception('Service Unavailable, 503'), TryAgain),
    (OSError('Forbidden: userRateLimitExceeded'), TryAgain), (ConnectionResetError(), TryAgain),
])
def test_a_failed_save_is_a_mistake_or_may_be_tried_again(tmp_path, monkeypatch, error, kind):
    monkeypatch.setattr(checksum, 'commit', raises(error))
    with pytest.raises(kind, match=r'steps/1 could not be written: .* and run the same command') as told:
        save(tmp_path)
    assert type(told.value) is kind


def test_arrays_that_do_not_fit_are_a_mistake_and_a_failing_disk_is_none(tmp_path, monkeypatch):
    save(tmp_path)
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def ask(**shapes):
        leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for name, shape in shapes.items()}
        return checkpoint.restore(tmp_path / 'steps/1', {'trainable': leaves})

    assert float(ask(x=(300,))['trainable']['x'][7]) == 7
    for shapes, words in (({'x': (301,)}, r'\(301,\)'), ({'y': (300,)}, 'do not match'), ({}, 'do not match')):
        with pytest.raises(UserError, match=f'does not hold what this configuration needs: .*{words}'):
            ask(**shapes)
    for cause, kind in ((ValueError('UNAVAILABLE: Error reading x'), TryAgain), (oserror(errno.EIO), TryAgain),
                        (oserror(errno.EACCES), UserError), (MemoryError(), KeyError)):
        wrapped = KeyError('no handler')
        wrapped.__cause__ = cause  # as Orbax does
        monkeypatch.setattr(checkpoint.ocp, 'load_checkpointables', raises(wrapped))
        with pytest.raises(kind):
            ask(x=(300,))


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    save(tmp_path)
    read, failures = checksum.hashlib.file_digest, []

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        return read(*arguments)

    monkeypatch.setattr(checksum.hashlib, 'file_digest', flaky)
    failures += [oserror(errno.EIO)] * 2
    assert workdir.latest_step(tmp_path) == 1 and not failures
    failures += [Exception('503')] * 99
    with pytest.raises(TryAgain, match='steps/1/.* cannot be read: 503; run the same command again'):
        workdir.latest_step(tmp_path)
    failures[:] = [oserror(errno.EACCES)] * 99
    with pytest.raises(UserError, match='cannot be read: that is not allowed'):
        workdir.latest_step(tmp_path)
    failures[:] = []
    assert workdir.latest_step(tmp_path) == 1


def test_places_that_cannot_be_reached_now(tmp_path, monkeypatch):
    for error, kind in ((ConnectionError('reset'), TryAgain), (OSError('Forbidden: x'), UserError)):
        monkeypatch.setattr(storage.epath, 'Path', lambda text, error=error: types.SimpleNamespace(exists=raises(error)))
        monkeypatch.setattr(storage.importlib.util, 'find_spec', lambda name: name)
        with pytest.raises(kind, match='gs://bucket/run cannot be read: '):
            storage.to_path('gs://bucket/run')
        path = types.SimpleNamespace(mkdir=raises(error))
        with pytest.raises(kind, match='cannot write to the workdir '):
            workdir.write_config(path, '')
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot write to the workdir .*: Not a directory; give another folder'):
        workdir.write_config(tmp_path / 'file/run', '')


def test_the_command_line_tells_it_and_ends_with_75(monkeypatch, capsys):
    monkeypatch.setattr(main, '_dispatch', raises(TryAgain('the store sleeps; run the same command again.')))
    assert main.main([]) == 75 and capsys.readouterr().err == 'vora: the store sleeps; run the same command again.\n'


def test_an_older_layout_is_told(tmp_path):
    save(tmp_path, format=1)
    with pytest.raises(UserError, match=r'written by an older version of vora \(layout 1, this one reads 2\); go on with'):
        resume.find_last(tmp_path)
    save(tmp_path / 'new', by_source=[[1, 2]], data={'row': 3})
    assert dataclasses.asdict(resume.find_last(tmp_path / 'new'))['by_source'] == [[1, 2]]


def test_rows_and_the_trigger_outlive_a_store_that_fails(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, 'vora_jax')
    for module in (json_lines, profile):
        monkeypatch.setattr(module, 'is_remote', lambda path: True)
    now, path, failing = [1000.0], tmp_path / 'rows.jsonl', [True] * 3
    for module in (json_lines, profile):
        monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])

    def write(text):
        if failing:
            raise OSError('503')
        path.write_text(text)

    lines = json_lines.JsonLines(path)
    lines._path = types.SimpleNamespace(write_text=write)
    for step in (1, 2, 3):
        lines.write({'step': step})
        failing.pop()
        now[0] += 61
    assert len(caplog.records) == 1 and not path.exists()
    failing.append(True)
    monkeypatch.setattr(json_lines.time, 'sleep', lambda seconds: failing.clear())
    lines.close()
    assert [row['step'] for row in json_lines.read_rows(path)] == [1, 2, 3]

    looks, one = [], profile.Profile(tmp_path)
    one._workdir = _Folder(lambda: looks.append(now[0]) or raises(OSError('503'))())
    for _ in range(6):
        one.look(1)
        now[0] += 10
    assert len(looks) == 2 and len(caplog.records) == 2


class _Folder:
    def __init__(self, exists):
        self.exists = exists

    def __truediv__(self, name):
        return self


@pytest.mark.parametrize('index, sent', [(0, {'quarantine.jsonl', 'tensorboard/events'}), (2, {'quarantine-00002.jsonl'})])
def test_each_process_sends_and_fetches_its_own(tmp_path, monkeypatch, index, sent, caplog):
    here, there = tmp_path / 'here', tmp_path / 'there'
    monkeypatch.setattr(storage, 'local_side', lambda folder: here)
    monkeypatch.setattr(workdir.jax, 'process_index', lambda: index)
    (here / 'tensorboard').mkdir(parents=True)
    (there).mkdir()
    names = ('quarantine.jsonl', 'quarantine-00001.jsonl', 'quarantine-00002.jsonl', 'tensorboard/events')
    for name in names:
        (here / name).write_text('old')
    workdir.send_logs(there)
    assert set(storage.files_below(there)) == sent
    for name in names[:3]:
        (there / name).write_text('new')
    workdir.fetch_quarantine(there)
    assert {name for name in names if (here / name).read_text() == 'new'} == {name for name in sent if 'q' in name}
    monkeypatch.setattr(storage, 'copy_files', raises(OSError('503')))
    workdir.send_logs(there)
    assert 'the logs could not be copied' in caplog.text


def test_processes_of_a_host_may_copy_a_tokenizer_at_once(tmp_path):
    source = tmp_path / 'source'
    source.mkdir()
    for name in ('a.json', 'b.model'):
        (source / name).write_text(name * 1000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        folder, = set(pool.map(lambda _: workdir._local_copy(source, tmp_path / 'side'), range(24)))
    name = folder.rpartition('/')[2]
    assert storage.files_below(tmp_path / 'side') == [f'{name}/a.json', f'{name}/b.model']
    (source / 'a.json').write_text('other')
    assert workdir._local_copy(source, tmp_path / 'side') != folder


@pytest.mark.parametrize('shares', [True, False])
def test_a_workdir_of_each_host_alone_is_seen(tmp_path, monkeypatch, shares):
    """At the first process, which the second one answers."""
    monkeypatch.setattr(shared, 'LOOKS', (0.0, 0.0))
    monkeypatch.setattr(shared.jax, 'process_count', lambda: 2)
    other = tmp_path / ('run' if shares else 'other')
    files = []
    monkeypatch.setattr(shared.agree, 'announce', lambda topic, text: files.append(text) or text)
    monkeypatch.setattr(shared.agree, 'collect',
                        lambda topic, text: [text, 'true' if shared._comes(other / files[0]) else 'false'])
    if shares:
        shared.raise_if_not_shared(tmp_path / 'run')
    else:
        with pytest.raises(UserError, match='run is a folder of each host alone .process 1 does.*; use gs:// or a shared'):
            shared.raise_if_not_shared(tmp_path / 'run')
    assert not list(tmp_path.iterdir())
