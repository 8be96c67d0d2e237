"""Safetensors: equal to the library's files both ways, every fault told, little memory."""
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from vora_jax.convert.files.safetensors_files import open_folder, write_shards
from vora_jax.types import UserError

DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64', 'I32': 'int32',
          'I16': 'int16', 'I8': 'int8', 'U8': 'uint8', 'BOOL': 'bool', 'F8_E4M3': 'float8_e4m3fn',
          'F8_E5M2': 'float8_e5m2'}
TORCH = {'float8_e4m3fn': torch.float8_e4m3fn, 'float8_e5m2': torch.float8_e5m2}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def random_array(rng, dtype, shape):
    if dtype == 'bool':
        return rng.random(shape) < 0.5
    return np.asarray(rng.normal(size=shape) * 50).astype(dtype_of(dtype))


def everything():
    rng = np.random.default_rng(0)
    return {f'{dtype}.{"x".join(map(str, shape))}': random_array(rng, dtype, shape)
            for dtype in DTYPES.values() for shape in [(3, 5), (7,), (), (0,), (2, 0, 3), (2, 3, 1, 2)]}


def infos(tensors):
    return [(name, array.dtype, array.shape) for name, array in tensors.items()]


def write(folder, tensors, max_shard_bytes=1 << 30, **more):
    return write_shards(folder, tensors.items(), infos(tensors), max_shard_bytes, **more)


def read_all(folder):
    with open_folder(folder) as opened:
        return {name: opened.read(name) for name in opened.tensors}


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for name, array in expected.items():
        assert (given[name].dtype, given[name].shape) == (array.dtype, array.shape), name
        assert given[name].tobytes() == array.tobytes(), name


def raw(file, header, data=b'', length=None):
    """A file with this header, sane or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, 'little') + text + data)
    return file


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards and an index."""
    tensors = {f'layer.{i}.weight': np.full((4, 8), i, np.float32) for i in range(6)}
    write(tmp_path, tensors, 256)
    assert len(list(tmp_path.glob('model-0000?-of-00003.safetensors'))) == 3
    return tmp_path


# Equal to the library's.


def test_the_library_reads_ours(tmp_path):
    tensors = everything()
    assert set(write(tmp_path, tensors).values()) == {'model.safetensors'}
    assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
    file = tmp_path / 'model.safetensors'
    plain = {name for name, x in tensors.items() if x.dtype.kind != 'V' and 'float8' not in x.dtype.name}
    with safetensors.safe_open(file, 'np') as opened:
        assert opened.metadata() == {'format': 'pt'} and set(opened.keys()) == tensors.keys()
        assert_same({name: opened.get_tensor(name) for name in plain}, {name: tensors[name] for name in plain})
    loaded = safetensors.torch.load_file(file)
    for name, array in tensors.items():
        expected = torch.from_numpy(np.atleast_1d(array).view(np.uint8).reshape(-1).copy())
        dtype = TORCH.get(array.dtype.name) or getattr(torch, array.dtype.name)
        assert loaded[name].dtype == dtype and tuple(loaded[name].shape) == array.shape, name
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), expected), name
    assert_same(read_all(tmp_path), tensors)


def test_we_read_the_librarys(tmp_path):
    tensors = {name: np.atleast_1d(x) if x.shape == () else x for name, x in everything().items()}
    safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    assert_same(read_all(tmp_path), tensors)
    assert_same(read_all(tmp_path / 'model.safetensors'), tensors)


def test_we_read_torchs(tmp_path):
    tensors = {f'{dtype}.{x.dim()}': x.to(dtype) for dtype in
               [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool] for x in [torch.randn(3, 4), torch.ones(())]}
    safetensors.torch.save_file(tensors, tmp_path / 'adapter_model.safetensors')
    found = read_all(tmp_path)
    for name, x in tensors.items():
        assert found[name].shape == tuple(x.shape) and found[name].dtype.name == str(x.dtype).removeprefix('torch.')
        assert found[name].tobytes() == x.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_our_file_equals_the_librarys_byte_for_byte(tmp_path):
    """For names in order, the library writes the same header."""
    rng = np.random.default_rng(0)
    tensors = {f'{place}.{dtype}': random_array(rng, dtype, (3, 3))
               for place, dtype in enumerate(['float64', 'float32', 'bfloat16', 'uint8'])}
    write(tmp_path, tensors)
    assert (tmp_path / 'model.safetensors').read_bytes() == safetensors.numpy.save(tensors, metadata={'format': 'pt'})


def test_every_tensor_is_aligned(tmp_path):
    write(tmp_path, everything())
    with open_folder(tmp_path) as folder:
        assert all(info.start % info.dtype.itemsize == 0 for info in folder.tensors.values())


def test_random_slices(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    tensors = {f'{n}': random_array(rng, dtype, shape) for n, (dtype, shape) in enumerate(
        [('float32', (40, 9, 5)), ('bfloat16', (33, 64)), ('uint8', (3, 2, 4, 5)), ('float64', (6,)), ('int16', ())])}
    write(tmp_path, tensors, 1)
    # Small limits, so that all ways of reading are taken.
    for piece, run, call in [(8 << 20, 64 << 10, 1 << 30), (200, 64, 100), (64, 1 << 20, 7), (64, 16, 1 << 20)]:
        monkeypatch.setattr('vora_jax.convert.files.ranged_read._PIECE_BYTES', piece)
        monkeypatch.setattr('vora_jax.convert.files.ranged_read._LONG_RUN_BYTES', run)
        monkeypatch.setattr('vora_jax.convert.files.ranged_read._CALL_BYTES', call)
        with open_folder(tmp_path) as folder:
            for name, array in tensors.items():
                for _ in range(40):
                    index = tuple(slice(*rng.choice([None, *range(-size - 1, size + 2)], 2)) if rng.random() < 0.7
                                  else slice(None) for size in array.shape[:rng.integers(array.ndim + 1)])
                    found = folder.read(name, index)
                    assert found.flags.c_contiguous and found.flags.writeable
                    assert_same({name: found}, {name: array[index]})


def test_wrong_requests(shards):
    folder = open_folder(shards)
    with pytest.raises(ValueError, match='step 1'):
        folder.read('layer.0.weight', (slice(None, None, 2),))
    with pytest.raises(ValueError, match='3 slices for 2 dimensions'):
        folder.read('layer.0.weight', (slice(None),) * 3)
    with pytest.raises(KeyError):
        folder.read('layer.9.weight')
    folder.close()
    with pytest.raises(ValueError, match='closed'):
        folder.read('layer.0.weight')


def test_threads_share_a_folder_and_close_waits_for_them(shards, monkeypatch):
    preadv, gate, inside = os.preadv, threading.Event(), threading.Event()

    def slow(*args):
        inside.set()
        gate.wait(10)
        return preadv(*args)

    monkeypatch.setattr(os, 'preadv', slow)
    folder, found = open_folder(shards), {}
    readers = [threading.Thread(target=lambda name=name: found.update({name: folder.read(name)}))
               for name in folder.tensors]
    for reader in readers:
        reader.start()
    inside.wait(10)
    while folder._reads < len(readers):
        pass
    closer = threading.Thread(target=folder.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    gate.set()
    for thread in [*readers, closer]:
        thread.join(10)
    assert {name: int(x[0, 0]) for name, x in found.items()} == {f'layer.{i}.weight': i for i in range(6)}
    assert not folder._descriptors


# Which files a folder has.


def test_shards_with_and_without_an_index(shards):
    with_index = read_all(shards)
    index = json.loads((shards / 'model.safetensors.index.json').read_text())
    assert index['metadata'] == {'total_size': 6 * 128} and index['weight_map'].keys() == with_index.keys()
    (shards / 'model.safetensors.index.json').unlink()
    assert_same(read_all(shards), with_index)
    (shards / 'other-00001-of-00001.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='holds several sets of shards'):
        open_folder(shards)


@pytest.mark.parametrize('keep_index', [True, False])
def test_a_missing_shard(shards, keep_index):
    (shards / 'model-00002-of-00003.safetensors').unlink()
    if not keep_index:
        (shards / 'model.safetensors.index.json').unlink()
    with pytest.raises(UserError, match='misses 1 of 3 shards: model-00002-of-00003.safetensors; download it again'):
        open_folder(shards)


def test_a_truncated_or_too_long_shard(shards):
    file = shards / 'model-00003-of-00003.safetensors'
    whole = file.read_bytes()
    for damaged, message in [
            (whole[:-1], f'is truncated .expected {len(whole)} bytes, found {len(whole) - 1}.; download it again'),
            (whole[:100], 'is truncated .its header alone takes .* bytes, found 100.; download it again'),
            (whole[:5], 'has no header .5 bytes|is no safetensors file'), (b'', 'has no header .0 bytes'),
            (bytes(len(whole)), 'has no header'),
            (whole + b'\0', f'has bytes after its last tensor .expected {len(whole)} bytes, found {len(whole) + 1}'),
            (b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer .* `git lfs pull`'),
            (b'<!DOCTYPE html><html>', 'is no safetensors file')]:
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f'model-00003-of-00003.safetensors {message}'):
            open_folder(shards)


def test_a_file_that_shrinks_after_it_was_opened(shards):
    folder = open_folder(shards)
    os.truncate(shards / 'model-00003-of-00003.safetensors', 200)
    with pytest.raises(UserError, match='has become shorter'):
        folder.read('layer.5.weight')
    (shards / 'model-00001-of-00003.safetensors').unlink()
    with pytest.raises(UserError, match='cannot be read .No such file'):
        folder.read('layer.0.weight')


def entry(start, stop, shape=(2,), dtype='F32'):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, stop]}


@pytest.mark.parametrize('header, data, message', [
    (b'{"a": ', 0, 'has an unreadable header'), (b'[1, 2]', 0, 'no table of tensors'), (b'\xff\xff', 0, 'unreadable'),
    (b'{"a": {"dtype": "F32"}}', 0, 'tensor a lacks dtype, shape or offsets'), (b'{"a": 5}', 0, 'tensor a lacks'),
    (b'[' * 100_000, 0, 'unreadable'), (b'{"a": 1, "a": 2}', 0, 'a occurs twice'),
    ({'a': entry(0, 8), 'b': entry(4, 12)}, 12, 'tensor b overlaps the one before'),
    ({'a': entry(0, 8), 'b': entry(12, 20)}, 20, 'tensor b starts 4 bytes too late'),
    ({'a': entry(4, 12)}, 12, 'tensor a starts 4 bytes too late'),
    ({'a': entry(0, 8), 'b': entry(0, 8)}, 8, 'tensor b overlaps'),
    ({'a': entry(0, 8, (3,))}, 8, r'tensor a, F32 \[3\], takes 12 bytes, but has 8'),
    ({'a': entry(8, 0)}, 8, 'takes 8 bytes, but has -8'), ({'a': entry(-8, 0)}, 8, 'tensor a has shape'),
    ({'a': entry(0, 8, (-2,))}, 8, r'tensor a has shape \[-2\]'), ({'a': entry(0, 8, (True, 2))}, 8, 'tensor a has shape'),
    ({'a': entry(0, 8, (2.0,))}, 8, 'tensor a has shape'), ({'a': entry(0, 8, dtype=['F32'])}, 8, 'is not supported'),
    ({'a': entry(0, 8, dtype='F4')}, 8, "tensor a has dtype 'F4', which is not supported; convert it to one of F64"),
    ({'a': entry(0, 8)}, 12, 'has bytes after its last tensor'), ({'a': entry(0, 8)}, 4, 'is truncated'),
])
def test_a_damaged_header(tmp_path, header, data, message):
    with pytest.raises(UserError, match=message) as told:
        open_folder(raw(tmp_path / 'x.safetensors', header, bytes(data)))
    assert 'x.safetensors' in str(told.value) and '\n' not in str(told.value)


def test_random_damage_never_gives_anything_but_a_sentence(tmp_path):
    """Or the change was to a number, name or value: then it reads as what it says."""
    rng = np.random.default_rng(2)
    write(tmp_path, {'a': np.ones((3, 5), np.float32), 'b': np.ones(7, np.int8)})
    file = tmp_path / 'model.safetensors'
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(len(whole) - 67)] = rng.integers(256)
        file.write_bytes(damaged[:len(whole) - rng.integers(2)].tobytes())
        try:
            read_all(file)
        except UserError as error:
            assert 'model.safetensors' in str(error)


def test_an_index_that_contradicts_its_shards(shards):
    file = shards / 'model.safetensors.index.json'
    index = json.loads(file.read_text())

    def told(change, message):
        weight_map = dict(index['weight_map'])
        change(weight_map)
        file.write_text(json.dumps({'weight_map': weight_map}))
        with pytest.raises(UserError, match=message):
            open_folder(shards)

    second, third = 'model-00002-of-00003.safetensors', 'model-00003-of-00003.safetensors'
    told(lambda m: m.update({'layer.0.weight': second}),
         'says that tensor layer.0.weight is in model-00002.*, but it is in model-00001')
    told(lambda m: m.update(renamed=m.pop('layer.0.weight')), 'tensor renamed is in .* but it is in no shard')
    told(lambda m: m.pop('layer.5.weight'), f'{third} holds tensor layer.5.weight, which .* does not name')
    told(lambda m: [m.pop('layer.5.weight'), m.pop('layer.4.weight')], f'holds {third}, which .* does not name')
    told(lambda m: m.update({'layer.0.weight': '../x.safetensors'}), 'names no files beside it')
    told(lambda m: m.clear(), 'names no files beside it')
    for text in ('{', '[]', '{"weight_map": 3}', '{}'):
        file.write_text(text)
        with pytest.raises(UserError, match='index.json .*download it again'):
            open_folder(shards)
    file.write_text(json.dumps(index))
    shutil.copy(shards / second, shards / 'model.safetensors')
    with pytest.raises(UserError, match='holds model.safetensors, which .* does not name; delete whichever'):
        open_folder(shards)


def test_a_name_in_two_shards(shards):
    shutil.copy(shards / 'model-00001-of-00003.safetensors', shards / 'model-00002-of-00003.safetensors')
    with pytest.raises(UserError, match='holds tensor layer.0.weight twice, in model-00001.* and in model-00002'):
        open_folder(shards)


def test_an_index_of_one_plain_file(tmp_path):
    weight_map = write(tmp_path, {'a': np.ones(3)})
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    assert read_all(tmp_path).keys() == {'a'}


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(UserError, match='holds no model.safetensors, .*; give a Hugging Face folder'):
        open_folder(tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises(UserError, match='weights as pytorch_model.bin only; save it as safetensors first'):
        open_folder(tmp_path)
    with pytest.raises(UserError, match='none does not exist'):
        open_folder(tmp_path / 'none')


# Writing.


def test_shards_grow_to_the_limit_and_progress_is_told(tmp_path):
    tensors = {f't{i}': np.arange(size, dtype=np.uint8) for i, size in enumerate([10, 10, 10, 90, 1, 0, 24])}
    told = []
    weight_map = write(tmp_path, tensors, 25, file_stem='adapter_model', on_bytes=told.append)
    assert [name[18:19] for name in weight_map.values()] == list('1123444')
    assert weight_map['t6'] == 'adapter_model-00004-of-00004.safetensors' and sum(told) == 145
    assert_same(dict(read_all(tmp_path)), tensors)


def test_non_contiguous_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr('vora_jax.convert.files.safetensors_files._PIECE_BYTES', 100)
    monkeypatch.setattr('vora_jax.convert.files.safetensors_files._STEP_BYTES', 64)
    monkeypatch.setattr('vora_jax.convert.files.safetensors_files._CALL_BYTES', 50)
    x = np.arange(24 * 18, dtype=np.float32).reshape(24, 18)
    tensors = {'t': x.T, 's': x[::2, 3:], 'v': x[:, 0], 'c': x, 'b': np.broadcast_to(np.float32(3), (40, 2)),
               'p': x.reshape(2, 12, 18).transpose(2, 0, 1)}
    write(tmp_path, tensors)
    assert_same(read_all(tmp_path), tensors)


def test_what_was_not_announced(tmp_path):
    x = {'a': np.ones((2, 3), np.float32), 'b': np.ones(4, np.float32)}
    for number, (tensors, message) in enumerate([
            ({'a': x['a']}, 'b was announced, but nothing came'), ({'b': x['b'], 'a': x['a']}, 'a was announced, but b'),
            ({**x, 'c': x['a']}, 'c is one too many'), ({'a': x['a'].T, 'b': x['b']}, r'\[2, 3\], but came as'),
            ({'a': x['a'].astype('float64'), 'b': x['b']}, 'as float32 .* but came as float64')]):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ValueError, match=message):
            write_shards(tmp_path / str(number), tensors.items(), infos(x), 1 << 30)
    with pytest.raises(ValueError, match='must differ'):
        write_shards(tmp_path, [], infos(x) * 2, 1 << 30)
    with pytest.raises(ValueError, match='complex128, which safetensors cannot hold'):
        write(tmp_path, {'a': np.ones(3, np.complex128)})


def test_one_tensor_is_alive_at_a_time(tmp_path):
    alive, most = [], []

    class Tracked(np.ndarray):
        def __del__(self):
            alive.remove(self.nbytes)

    def stream():
        for size in (100, 101, 102):
            alive.append(size)
            most.append(len(alive))
            yield f't{size}', np.ndarray.__new__(Tracked, size, np.uint8)

    write_shards(tmp_path, stream(), [(f't{n}', np.uint8, (n,)) for n in (100, 101, 102)], 1 << 30)
    assert most == [1, 1, 1]


def test_an_unfinished_shard_is_no_safetensors_file(tmp_path):
    def stream():
        yield 'wide', np.ones(8)
        yield 'narrow', np.ones(8, np.int8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, stream(), [('wide', np.float64, (8,)), ('narrow', np.int8, (8,)), ('last', 'int8', (1,))],
                     1 << 30)
    with pytest.raises(UserError, match='model.safetensors has no header'):
        open_folder(tmp_path)


def test_the_disk_is_full_while_writing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    for name in ('pwrite', 'fsync'):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            (tmp_path / name).mkdir()
            with pytest.raises(UserError, match='model.safetensors cannot be written .No space left on device.: the '
                                                'weights need [0-9,]+ bytes, [0-9,]+ are free; free some space'):
                write(tmp_path / name, {'a': np.ones(1000)})


def test_the_disk_is_too_small_to_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10000, 2000, 8000))
    with pytest.raises(UserError, match='the weights need 8,[0-9]{3} bytes, 8,000 are free'):
        write(tmp_path, {'a': np.ones(1000)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path):
    write(tmp_path, {'a': np.ones(3)})
    with pytest.raises(UserError, match='model.safetensors cannot be written .File exists; .*; choose another folder'):
        write(tmp_path, {'a': np.ones(3)})


# Writes an endless folder; argv: folder, whether to believe the disk is large.
WRITER = """
import collections, shutil, sys
import numpy as np
from vora_jax.convert.files.new_folder import new_folder
from vora_jax.convert.files.safetensors_files import write_shards
from vora_jax.types import UserError
if sys.argv[2] == 'large':
    usage = collections.namedtuple('usage', 'total used free')
    shutil.disk_usage = lambda _: usage(1 << 50, 0, 1 << 50)
names = [f't{i}' for i in range(100_000)]
def stream():
    for i, name in enumerate(names):
        if i == 20:
            print('writing', flush=True)
        yield name, np.ones(1 << 18, np.float32)
try:
    with new_folder(sys.argv[1], False, lambda _: False) as folder:
        write_shards(folder, stream(), [(name, np.float32, (1 << 18,)) for name in names], 8 << 20)
except UserError as error:
    print(error)
"""


def test_a_kill_while_writing_leaves_nothing_that_looks_complete(tmp_path):
    with subprocess.Popen([sys.executable, '-c', WRITER, tmp_path / 'out', 'large'], stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.readline() == 'writing\n'
        process.kill()
    left, = tmp_path.iterdir()
    assert left.name.startswith('.out.') and not (tmp_path / 'out').exists()
    with pytest.raises(UserError):
        open_folder(left)
    with pytest.raises(UserError, match='shards'):
        open_folder(left / 'new')


@pytest.mark.parametrize('believed', ['large', 'honest'])
def test_a_full_tmpfs(tmp_path, believed):
    """A real one of 32 MiB, in a mount namespace of its own."""
    script = 'mount -t tmpfs -o size=32m none "$1" || exit 77; "$2" -c "$3" "$1/out" "$4"; ls -A "$1"'
    unshare = shutil.which('unshare')
    if unshare is None:
        pytest.skip('needs the program unshare')
    done = subprocess.run([unshare, '-rm', 'sh', '-c', script, 'sh', tmp_path, sys.executable, WRITER, believed],
                          capture_output=True, text=True)
    if done.returncode == 77 or 'unshare' in done.stderr:
        pytest.skip(f'mounting is not permitted here: {done.stderr.strip()}')
    *_, sentence = done.stdout.splitlines()
    assert 'cannot be written' in sentence and 'the weights need 104,' in sentence and done.stderr == ''
    assert pathlib.Path(tmp_path, 'out').exists() is False
