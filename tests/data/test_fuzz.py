"""Damaged pictures and rows on their way into batches: every sample is laid out or named in the quarantine, exactly once."""
import collections
import contextlib
import copy
import dataclasses
import io
import json
import signal
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from generated_set import RULE, made_up_rows, write_pictures, write_rows, write_tokenizer

from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.loader import batches
from vora_jax.data.samples import Samples
from vora_jax.types import UserError

FORMATS = {'png': ('PNG', 'RGB'), 'jpg': ('JPEG', 'RGB'), 'webp': ('WEBP', 'RGB'), 'gif': ('GIF', 'P'),
           'bmp': ('BMP', 'RGB'), 'tif': ('TIFF', 'RGB')}
POLICIES = (ImagePolicy(max_patches=30), ImagePolicy(max_patches=45, kind='tiles', side=24, tiles=((1, 2), (2, 1), (2, 2))),
            ImagePolicy(max_patches=30, kind='square_pad', side=40, decoder='simplejpeg'))


@contextlib.contextmanager
def at_most(seconds):
    """TimeoutError if the body hangs."""
    def stop(*_):
        raise TimeoutError(f'longer than {seconds} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def encoded(ending, height, width, rng):
    form, mode = FORMATS[ending]
    image = PIL.Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize((width, height)).convert(mode)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def truncated(content, rng):
    return content[:int(rng.integers(1, len(content)))]


def zeroed(content, rng):
    first = int(rng.integers(0, len(content)))
    count = min(int(rng.integers(1, 300)), len(content) - first)
    return content[:first] + bytes(count) + content[first + count:]


def flipped(content, rng):
    damaged = bytearray(content)
    for place in rng.integers(0, len(content) if rng.random() < 0.5 else min(len(content), 120), int(rng.integers(1, 6))):
        damaged[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(damaged)


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def bomb(rng):
    """A file of a few kilobytes that says, mostly truly, that it is a huge picture."""
    height, width = (int(side) for side in rng.integers(12_000, 60_000, 2))
    kind = int(rng.integers(0, 4))
    if kind == 0:  # one bit a pixel, all of it there
        rows = zlib.compressobj()
        packed = b''.join(rows.compress(bytes(1 + 12_000 // 8)) for _ in range(12_000)) + rows.flush()
        return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 12_000, 12_000, 1, 0, 0, 0, 0)) + chunk(
            b'IDAT', packed) + chunk(b'IEND', b'')
    if kind == 1:
        return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(
            b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')
    if kind == 2:
        content = encoded('gif', 9, 9, rng)
        return content[:6] + struct.pack('<HH', width, height) + content[10:]
    content = encoded('bmp', 9, 9, rng)
    return content[:18] + struct.pack('<ii', width, height) + content[26:]


def special(number, ending, rng):
    """One of the pictures that are odd rather than damaged."""
    form = ending if ending != 'webp' else 'png'  # which has no such strips
    kinds = [lambda: b'', lambda: encoded(ending, 1, 1, rng), lambda: encoded(form, 1, 20_000, rng),
             lambda: encoded(form, 20_000, 1, rng), lambda: bomb(rng),
             lambda: encoded('png', 30, 40, rng), lambda: b'<html>404</html>', lambda: rng.bytes(500), lambda: b'\0' * 900]
    return kinds[number % len(kinds)]()


def write_damaged_pictures(folder, count, seed):
    folder.mkdir(exist_ok=True)
    names = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        ending = list(FORMATS)[number % len(FORMATS)]
        if number % 5 == 4:
            content = special(number // 5, ending, rng)
        else:
            content = encoded(ending, *(int(side) for side in rng.integers(1, 90, 2)), rng)
            content = (truncated, zeroed, flipped, flipped)[number % 5](content, rng)
        names.append(f'damaged-{number}.{ending}')
        (folder / names[-1]).write_bytes(content)
    return names


VALUES = (None, 1, 1e300, True, '', '<image>', '<image><image>', [], {}, [[]], 'no.png', '\ud800', 'x' * 9000, ['images'],
          '../..',
          '\0')
SPLICED = (b'NaN', b'1e999', b'null', b'[' * 3000, b'"\\ud800"', b'\xff\xfe', b'{}', b'"', b'\xe2\x80\xa8', b'\r')


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def damaged_line(row, rng):
    """A row as a line of the file, with a value replaced or removed, or its bytes damaged."""
    if rng.random() < 0.6:
        path = list(paths(row))[int(rng.integers(1, len(list(paths(row)))))]
        row = copy.deepcopy(row)
        holder = row
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.3:
            del holder[path[-1]]
        else:
            holder[path[-1]] = VALUES[int(rng.integers(len(VALUES)))]
        return json.dumps(row).encode()
    line = json.dumps(row).encode()
    place, kind = int(rng.integers(1, len(line))), int(rng.integers(0, 4))
    line = (line[:place], line[:place] + rng.bytes(4) + line[place + 4:], line[:place] + bytes(9) + line[place + 9:],
            line[:place] + SPLICED[int(rng.integers(len(SPLICED)))] + line[place:])[kind]
    return line.replace(b'\n', b' ')


def make(folder, num_pictures, num_rows, policy, seed):
    """Three sources: damaged pictures, some beside a good one; damaged rows; good rows."""
    names = write_pictures(folder / 'images', 10, 60)
    rows = made_up_rows(num_pictures, names, (1, 1, 2), seed)
    for row, name in zip(rows, write_damaged_pictures(folder / 'images', num_pictures, seed)):
        row['frames'][-1] = name
    sources = [write_rows(folder / 'pictures.jsonl', rows)]
    rng = np.random.default_rng(seed)
    good, *rows = made_up_rows(num_rows, names, (1, 0, 3), seed + 1)  # the first tells what kind of file it is
    lines = [json.dumps(good).encode(), *(damaged_line(row, rng) for row in rows)]
    (folder / 'rows.jsonl').write_bytes(b''.join(line + b'\n' for line in lines))
    sources += [str(folder / 'rows.jsonl'), write_rows(folder / 'good.jsonl', made_up_rows(20, names, (1, 0), seed + 2))]
    return Data(tuple(Source(path, str(folder / 'images')) for path in sources), write_tokenizer(folder), max_slots=400,
                max_patches=180, max_images=16, image=policy, max_bad_fraction=1.0)


def read_each(data):
    """{(name of the source, row)} of the samples that cannot be used, found without plans, index and threads."""
    samples, bad = Samples(data, RULE), set()
    for number in range(len(samples)):
        at = samples.find(number)
        try:
            turns = [size for size in samples.measure(number) if (np.array(size) <= samples.budgets[:3]).all()]
            if not turns or samples.segment(number, len(turns))[1] != turns[-1]:
                bad.add((samples.names[at.source], at.row))
        except UserError as error:
            assert str(error).startswith(at.where) and str(error).endswith('.') and '\n' not in str(error), repr(str(error))
            bad.add((samples.names[at.source], at.row))
    return bad, samples.sizes


def check(folder, num_pictures, num_rows, policy, seed, seconds):
    data = make(folder, num_pictures, num_rows, policy, seed)
    with at_most(seconds):
        expected, sizes = read_each(data)
        assert sizes == [num_pictures, num_rows, 20]
        for pack in (True, False):
            path = folder / f'quarantine-{pack}.jsonl'
            loader = batches(dataclasses.replace(data, pack=pack), RULE, 1, seed, quarantine=str(path))
            tallies = []
            for epoch in range(2):
                rows = []
                while loader.epoch(loader.get_state()) < epoch + 1:
                    rows.append(next(loader))
                tallies.append(sum(row.tally[0] for row in rows))
                assert sum(int(row.segment_id.max()) for row in rows) == tallies[-1][:, 0].sum()
                assert sum(len(set(row.segment_id[0].tolist()) - {0}) for row in rows) == tallies[-1][:, 0].sum()
            warnings, names = loader.warnings, loader.source_names
            loader.close()
            lines = [json.loads(line) for line in path.read_text(encoding='utf-8').split('\n')[:-1]]
            found = collections.Counter((line['source'], line['row']) for line in lines)
            assert found.keys() == expected and set(found.values()) == {1} and len(warnings) == len(lines)
            for tally in tallies:  # of every epoch
                assert tally[:, :2].sum(1).tolist() == sizes
                assert tally[:, 1].tolist() == [sum(source == name for source, _ in expected) for name in names]
            assert tallies[0].tolist() == tallies[1].tolist()
    bad = tallies[0][:, 1].tolist()
    assert bad[2] == 0 and 0.2 * num_pictures < bad[0] < num_pictures and 0.2 * num_rows < bad[1] < num_rows
    return dict(zip(names, bad))


def test_some_damaged_pictures_and_rows(tmp_path):
    check(tmp_path, 60, 40, POLICIES[0], 0, 60)


@pytest.mark.slow
@pytest.mark.parametrize('number', range(3))
def test_500_damaged_pictures_and_200_damaged_rows(tmp_path, number):
    if POLICIES[number].decoder == 'simplejpeg':
        pytest.importorskip('simplejpeg')
    print(f'left out: {check(tmp_path, 500, 200, POLICIES[number], number + 1, 200)} of 500, 200 and 20')
