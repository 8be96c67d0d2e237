"""Samples of WebDataset tars."""
import concurrent.futures
import json
import pickle
import random
import tarfile
import uuid

import pytest
import tiny_tars

from vora_jax.data.frame import Frame
from vora_jax.data.sources import tar_index, tar_rows
from vora_jax.data.sources.tar_rows import TarRows
from vora_jax.types import UserError


def turns(question, answer):
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


def seen(record):
    """The record with the bytes of its frames."""
    return {key: [frame.open().read() if isinstance(frame, Frame) else frame for frame in value]
            if key in ('frames', 'images', 'image', 'video') and isinstance(value, list) else value
            for key, value in record.items()}


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize('where', ['local', 'memory'])
def test_samples_of_many_tars(tmp_path, form, where, monkeypatch):
    monkeypatch.setattr(tar_rows, '_OPEN_FILES', 2)
    draw = random.Random(form)
    folder = tmp_path if where == 'local' else f'memory://{uuid.uuid4()}'
    expected, places = [], []
    for shard in range(5):
        members = []
        for n in range(20):
            long = 'x' * draw.choice((1, 60, 90)) if form == tarfile.USTAR_FORMAT else 'ü' * draw.choice((1, 99, 200))
            key = f'{"y" * draw.choice((3, 60))}/{n:03}-{long}'
            pictures = [draw.randbytes(draw.choice((0, 1, 511, 512, 513, 5000))) for _ in range(draw.randrange(3))]
            sample = [(f'{key}.{number}.jpg', picture) for number, picture in enumerate(pictures)]
            record = {'id': f'{shard}/{n}', 'conversations': turns('q', f'ä{n}')}
            sample.append((f'{key}.json', json.dumps(record).encode()))
            draw.shuffle(sample)
            members += [*sample, (f'{key}.cls', b'7')]
            expected.append({**record, 'frames': pictures} if pictures else record)
            places.append(f'{folder}/{shard}.tar sample {key}')
        tiny_tars.write(f'{folder}/{shard}.tar', tiny_tars.packed(members, form))
    source = TarRows(f'{folder}/{{0..4}}.tar')
    assert len(source) == 100 and [source.where(n) for n in range(100)] == places
    order = draw.choices(range(100), k=300)
    for one in (source, pickle.loads(pickle.dumps(source))):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda n, one=one: seen(one[n]), order)) == [expected[n] for n in order]
    names = [frame.name for n in range(100) for frame in source[n].get('frames', [])]
    assert len(set(names)) == len(names) and all('.tar/y' in name for name in names)
    assert seen(pickle.loads(pickle.dumps(source[1]))) == expected[1]


@pytest.mark.parametrize('members, record', [
    ({'k.jpg': b'1', 'k.txt': ' A dog.\n'}, {'frames': [b'1'], 'conversations': turns('<image>', 'A dog.')}),
    ({'k.PNG': b'1', 'k.caption': 'ä'}, {'frames': [b'1'], 'conversations': turns('<image>', 'ä')}),
    ({'k.jpg': b'1', 'k.json': {'caption': 'x', 'url': 'u'}},
     {'caption': 'x', 'url': 'u', 'frames': [b'1'], 'conversations': turns('<image>', 'x')}),
    ({'k.jpg': b'1', 'k.json': {'text': 'x', 'id': 5}},
     {'text': 'x', 'id': 5, 'frames': [b'1'], 'conversations': turns('<image>', 'x')}),
    ({'k.jpg': b'1', 'k.json': {'width': 3}, 'k.txt': 'x'},
     {'width': 3, 'frames': [b'1'], 'conversations': turns('<image>', 'x')}),
    ({'k.10.jpg': b'10', 'k.2.jpg': b'2', 'k.1.webp': b'1', 'k.txt': 'x'},
     {'frames': [b'1', b'2', b'10'], 'conversations': turns('<image>\n<image>\n<image>', 'x')}),
    ({'k.left.jpg': b'l', 'k.right.jpg': b'r', 'k.json': {'images': ['right.jpg', 'k.left.jpg'], 'messages': [1]}},
     {'images': [b'r', b'l'], 'messages': [1]}),
    ({'k.jpg': b'1', 'k.json': {'image': 'coco/other.jpg', 'conversations': turns('q', 'a')}},
     {'image': [b'1'], 'conversations': turns('q', 'a')}),
    ({'k.json': {'image': 'coco/other.jpg', 'conversations': turns('q', 'a')}},
     {'image': 'coco/other.jpg', 'conversations': turns('q', 'a')}),
    ({'k.jpg': b'1', 'k.json': {'image': None, 'conversations': turns('q', 'a')}},
     {'frames': [b'1'], 'conversations': turns('q', 'a')}),
    ({'k.json': {'conversations': turns('q', 'a')}, 'k.npy': b'1'}, {'conversations': turns('q', 'a')}),
    ({'./k.jpg': b'1', 'k.txt': 'x'}, {'frames': [b'1'], 'conversations': turns('<image>', 'x')}),
    ({'k.left.png': b'l', 'k.10.png': b'10', 'k.2.jpg': b'2', 'k.jpg': b'k', 'k.json': {'messages': [1]}},
     {'frames': [b'k', b'2', b'10', b'l'], 'messages': [1]}),
    ({'k.avif': b'1', 'k.txt': 'x'}, {'frames': [b'1'], 'conversations': turns('<image>', 'x')})])
def test_kinds_of_samples(tmp_path, members, record):
    contents = [(name, content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else
                 json.dumps(content).encode()) for name, content in members.items()]
    assert seen(TarRows(tiny_tars.write(tmp_path / 'a.tar', tiny_tars.packed(contents)))[0]) == {'id': 'k', **record}


@pytest.mark.parametrize('members, told', [
    ({'k.jpg': b'1'}, 'a.tar sample k has neither turns nor a caption: it has jpg; it needs a .txt'),
    ({'k.npy': b'1'}, 'neither turns nor a caption: it has npy'),
    ({'k.json': b'{"a": 1}'}, 'neither turns nor a caption: it has json'),
    ({'k.jxl': b'1', 'k.txt': b'x'}, 'a.tar sample k has a caption but no picture'),
    ({'k.json': b'{'}, 'a.tar sample k: not valid JSON'), ({'k.json': b'[]'}, 'its .json is not a JSON object'),
    ({'k.jpg': b'', 'k.txt': b'\xff'}, 'its .txt is not UTF-8'), ({'k.jpg': b'1', 'k.JPG': b'2'}, 'two files of one ending'),
    ({'k.a.jpg': b'', 'k.b.jpg': b'', 'k.json': b'{"image": "c.jpg"}'},
     r"image names 'c.jpg', but the pictures of the sample are k.a.jpg, k.b.jpg; name those"),
    ({'k.a.jpg': b'', 'k.b.jpg': b'', 'k.json': b'{"images": [{}]}'}, 'images names {}')])
def test_samples_that_cannot_be_used_are_told(tmp_path, members, told):
    source = TarRows(tiny_tars.write(tmp_path / 'a.tar', tiny_tars.packed(
        [*members.items(), ('l.png', b''), ('l.txt', b'fine')])))
    with pytest.raises(UserError, match=told):
        source[0]
    assert source[1]['conversations'] == turns('<image>', 'fine') and source[1]['id'] == 'l'


def test_members_of_a_sample_may_lie_apart(tmp_path):
    names = [f'{n}.{ending}' for ending in ('jpg', 'txt') for n in range(50)]
    source = TarRows(tiny_tars.write(tmp_path / 'a.tar', tiny_tars.packed([(name, name.encode()) for name in names])))
    assert [seen(source[n]) for n in range(50)] == [
        {'id': str(n), 'frames': [f'{n}.jpg'.encode()], 'conversations': turns('<image>', f'{n}.txt')} for n in range(50)]


def test_index_is_kept_and_follows_the_tar(tmp_path, monkeypatch):
    cache = tmp_path / 'deep/cache'
    pictures = [('a.jpg', b'a'), ('b.jpg', b'b')]
    path = tiny_tars.write(tmp_path / 'a.tar', tiny_tars.packed([*pictures, ('a.txt', b'a'), ('b.txt', b'c')]))
    first = TarRows(path, str(cache))
    (kept,) = cache.iterdir()
    scans = []
    monkeypatch.setattr(tar_index, 'read_members', lambda *args, read=tar_index.read_members: scans.append(1) or read(*args))
    again = TarRows(path, str(cache))
    assert not scans and again.sha256 == first.sha256 and [*map(seen, again)] == [*map(seen, first)]
    assert TarRows(path).sha256 == first.sha256 and len(scans) == 1, 'without a cache nothing is kept'
    good = kept.read_bytes()
    for damage in (b'', b'junk' * 100, good[:-30], good[:200] + b'\xff' * 9 + good[209:]):
        kept.write_bytes(damage)
        assert seen(TarRows(path, str(cache))[1]) == seen(first[1])
    assert len(scans) == 5
    tiny_tars.write(path, tiny_tars.packed([*pictures, ('a.txt', b'a'), ('b.txt', b'longer')]))
    changed = TarRows(path, str(cache))
    assert len(scans) == 6 and changed.sha256 != first.sha256 and changed[1]['conversations'] == turns('<image>', 'longer')
    (tmp_path / 'file').touch()
    assert len(TarRows(path, str(tmp_path / 'file'))) == 2, 'a cache that cannot be written costs time only'


def test_hash_follows_names_sizes_and_times(tmp_path):
    hashes = [TarRows(tiny_tars.write(tmp_path / 'a.tar', tiny_tars.packed(members))).sha256 for members in (
        [('a.txt', b'1')], [('a.txt', b'1')], [('b.txt', b'1')], [('a.txt', b'12')], [('a.txt', b'1'), ('README', b'')])]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4
