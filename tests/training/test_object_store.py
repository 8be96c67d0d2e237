"""Workdirs at gs://, in a stand-in on this machine."""
import json
import os
import pathlib
import subprocess
import sys

import object_store
import pytest
import tiny_run
from local_pod import LocalPod

from vora_jax.training.checkpoints import storage, workdir
from vora_jax.types import UserError

pytest.importorskip('gcsfs')


@pytest.fixture
def store():
    with object_store.serve() as store:
        yield store


def python(store: object_store.Store, home: pathlib.Path, *words: str) -> str:
    """What a process of its own told; its clients know the stand-in only, and have no credentials."""
    environment = os.environ | store.environment | {'HOME': str(home), 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


SCRIPT = """
import jax.numpy as jnp, numpy as np, pathlib, sys
from vora_jax.training.checkpoints import checkpoint, checksum, storage, workdir
from vora_jax.training.checkpoints.writer import Writer
from vora_jax.training.checkpoints.record import Record
from vora_jax.types import UserError
folder, local, action = storage.to_path('gs://bucket/run'), pathlib.Path(sys.argv[1]), sys.argv[2]
if action == 'save':
    (local / 'tokenizer').mkdir()
    (local / 'tokenizer/tokenizer.model').write_text('pieces')
    writer = Writer(folder, 2)
    content = writer.save_frozen({'base': jnp.arange(12.0).reshape(3, 4)})
    workdir.write_config(folder, 'text')
    for _ in range(2):
        workdir.copy_tokenizer(str(local / 'tokenizer'), folder)
    (storage.local_side(folder) / 'quarantine.jsonl').write_text('{}')
    for step in (1, 2, 3):
        writer.save(Record(step, 'text', content), {'a': jnp.full((300,), step, jnp.float32)}, {'count': jnp.int32(step)})
    writer.close()
    assert workdir.step_numbers(folder, committed=False) == [2, 3]
opened = checkpoint.open_checkpoint('gs://bucket/run')
assert opened.params['base'][2, 3] == 11 and pathlib.Path(opened.tokenizer_dir, 'tokenizer.model').read_text() == 'pieces'
assert (opened.params['a'] == opened.step).all()
if action == 'save':
    checkpoint.write_checkpoint('gs://bucket/merged', opened.params, 'text', opened.tokenizer_dir)
    assert checkpoint.open_checkpoint('gs://bucket/merged/steps/0').metadata.origin == 'merge'
print('step', opened.step)
try:
    checkpoint.open_checkpoint('gs://private/run')
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_checkpoints_are_saved_checked_and_removed_there(store, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    told = python(store, tmp_path, str(tmp_path / 'script.py'), str(tmp_path), 'save')
    assert 'gs://private/run cannot be read: ' in told and 'check its name' in told
    assert 'step 3' in told and store.objects['bucket/run/quarantine.jsonl'] == b'{}'
    sidecar = json.loads(store.objects['bucket/run/steps/3/SHA256.json'])
    here = {key.removeprefix('bucket/run/steps/3/') for key in store.objects if key.startswith('bucket/run/steps/3/')}
    assert set(sidecar) == here - {'SHA256.json'}
    key = max((key for key in store.objects if '/steps/3/' in key), key=lambda key: len(store.objects[key]))
    store.put(key, store.objects[key][:-1] + bytes([store.objects[key][-1] ^ 1]))
    told = python(store, tmp_path, str(tmp_path / 'script.py'), str(tmp_path), 'open')
    assert 'DAMAGED CHECKPOINT: gs://bucket/run/steps/3' in told and 'step 2' in told


def test_another_kind_of_url_is_refused():
    with pytest.raises(UserError, match='cannot read ftp://; give a local folder or one of gs://, '):
        storage.to_path('ftp://host/run')


def test_both_kinds_of_folder_list_alike(tmp_path):
    for name in ('a/b/c.txt', 'a/d.txt', 'e.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(tmp_path / name, name)
    assert storage.files_below(tmp_path) == ['a/b/c.txt', 'a/d.txt', 'e.txt']
    assert storage.local_side(tmp_path) == tmp_path and workdir.send_logs(tmp_path) is None


@pytest.mark.slow
def test_a_run_is_made_and_resumed_there_like_a_local_one(store, tmp_path):
    gin_file = tiny_run.write_text_run(tmp_path)
    for folder in ('gs://bucket/run', str(tmp_path / 'local')):
        for steps in (10, 20):
            python(store, tmp_path, '-m', 'vora_jax.cli.main', 'train', str(gin_file), '--workdir', folder,
                   f'--gin.Train.steps={steps}')
    rows = [json.loads(line) for line in store.objects['bucket/run/metrics.jsonl'].splitlines()]
    local = [json.loads(line) for line in (tmp_path / 'local/metrics.jsonl').read_text().splitlines()]
    assert [(row['step'], row['loss']) for row in rows] == [(row['step'], row['loss']) for row in local]
    assert [row['step'] for row in rows] == [5, 10, 15, 20]
    names = {key.removeprefix('bucket/run/') for key in store.objects}
    expected = set(storage.files_below(tmp_path / 'local'))
    plain = {'config.gin', 'summary.json', 'metrics.jsonl', 'tokenizer/tokenizer.model', 'steps/15/SHA256.json'}
    assert plain <= names & expected
    assert not any(name.startswith('data/') for name in names)  # the index stays on this machine
    assert board_steps(store, tmp_path) == [5, 10, 15, 20]


def board_steps(store: object_store.Store, folder: pathlib.Path) -> list[int]:
    """The steps of the rows in the run's TensorBoard files, in order of the files."""
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_file_loader', reason='needs tensorboard')
    steps = []
    for key in sorted(key for key in store.objects if key.startswith('bucket/run/tensorboard/')):
        (folder / 'events').write_bytes(store.objects[key])
        events = reader.LegacyEventFileLoader(str(folder / 'events')).Load()
        steps += [event.step for event in events if event.summary.value]
    return steps


@pytest.mark.slow
def test_two_machines_run_there_and_change_places(store, tmp_path):
    """Each has a home of its own; the second start finds what the other process left in it."""
    gin_file = tiny_run.write_text_run(tmp_path, **{'Data.max_bad_fraction': '0.5'})
    rows = [json.loads(line) for line in (tmp_path / 'data.jsonl').read_text().splitlines()]
    for number in range(0, 60, 6):
        rows[number]['conversations'][0]['value'] = 7  # no text
    (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    homes, found = ['home-a', 'home-b'], []
    for steps in (10, 20):
        words = [str(gin_file), '--workdir', 'gs://bucket/run', f'--gin.Train.steps={steps}', '--gin.Mesh.data=2']
        environments = [store.environment | {'HOME': str(tmp_path / home)} for home in homes]
        before = f'import os; os.environ.update({environments!r}[number])'
        with LocalPod(tmp_path, [words] * 2, 2, before) as pod:
            assert pod.codes() == [0, 0], pod.told()
        assert not any('could not' in told for told in pod.told()), pod.told()
        found.append({key: set(content.splitlines()) for key, content in store.objects.items() if '/quarantine' in key})
        homes.reverse()
    assert not any('/shared-' in key for key in store.objects)
    assert found[0] and all(lines <= found[1][key] for key, lines in found[0].items())
    assert board_steps(store, tmp_path) == [5, 10, 15, 20]
    lines = [json.loads(line) for line in store.objects['bucket/run/metrics.jsonl'].splitlines()]
    assert [line['step'] for line in lines] == [5, 10, 15, 20]


@pytest.mark.slow
def test_two_machines_with_a_folder_each_are_told(tmp_path):
    gin_file = tiny_run.write_text_run(tmp_path)
    words = [[str(gin_file), '--workdir', str(tmp_path / name / 'run'), '--gin.Mesh.data=2'] for name in ('a', 'b')]
    with LocalPod(tmp_path, words, 2) as pod:
        assert pod.codes() == [2, 2], pod.told()
    assert all('is a folder of each host alone' in told for told in pod.told()), pod.told()
    assert not (tmp_path / 'a/run').exists() and not (tmp_path / 'b').exists()
