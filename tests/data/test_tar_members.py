"""What stands in a tar: all formats, damaged and cut ones."""
import functools
import io
import os
import pathlib
import random
import tarfile
import tracemalloc

import pytest
import tiny_tars

from vora_jax.data.frame import Frame
from vora_jax.data.sources import tar_rows
from vora_jax.data.sources.tar_rows import TarRows
from vora_jax.types import UserError


def turns(question, answer):
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


@pytest.mark.parametrize('form', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_is_no_file_or_has_no_key_is_left_out(tmp_path, form):
    members = [('folder', '5'), ('folder/README', b'x' * 600), ('folder/.hidden.txt', b'x'), ('._a.txt', b'x'),
               ('a.txt', b'a'), ('b.txt', '2'), ('c.txt', '1'), ('d.txt', '6'), ('z' * 150 + '.txt', '2'),
               ('folder/e.txt', b'e'), ('f.dir/', b''), ('dotted.dir/g.x.txt', b'g'), ('g.txt', b'h'), ('g.jpg', b'p')]
    source = TarRows(tiny_tars.write(tmp_path / 'a.tar', tiny_tars.packed(members, form)))
    assert [source._indices[0].key(n) for n in range(len(source))] == ['a', 'folder/e', 'dotted.dir/g', 'g']
    assert source[3]['conversations'] == turns('<image>', 'h')


def test_sparse_and_huge_members(tmp_path):
    (tmp_path / 'sparse.txt').touch()
    os.truncate(tmp_path / 'sparse.txt', 1 << 20)
    with open(tmp_path / 'sparse.txt', 'r+b') as file:
        for offset in range(0, 1 << 20, 1 << 15):  # more pieces than one header holds
            file.seek(offset)
            file.write(b'x')
    tiny_tars.write(tmp_path / 'a.txt', b'a')
    tiny_tars.write(tmp_path / 'a.jpg', b'p')
    for form in ('gnu', 'pax'):
        tar = tmp_path / f'{form}.tar'
        command = f'cd {tmp_path} && tar --sparse --format={form} -cf {tar} sparse.txt a.txt a.jpg 2>/dev/null'
        if os.system(command):
            pytest.skip('no GNU tar here')
        source = TarRows(str(tar))
        assert source[len(source) - 1]['conversations'] == turns('<image>', 'a') and len(source) == 1
    huge = tmp_path / 'huge.tar'  # a hole of 9 GiB, which octal sizes cannot tell
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo('b.jpg')
        info.size = 9 << 30
        header = info.tobuf(form)
        with open(huge, 'wb') as file:
            file.write(header)
            file.seek(9 << 30, io.SEEK_CUR)
            file.write(tiny_tars.packed([('b.txt', b'c')], form))
        (member,) = [m for m in TarRows(str(huge))._indices[0].members(0) if m.name == 'jpg']
        assert member.size == 9 << 30 and TarRows(str(huge))[0]['conversations'] == turns('<image>', 'c')
        os.remove(huge)


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_that_is_cut_anywhere_is_told(tmp_path, form):
    whole = tiny_tars.packed([('a.jpg', bytes(700)), (f'{"f" * 90}/{"b" * 90}.txt', b'x' * 600), ('c.txt', b'c')], form)
    whole = whole[:len(whole.rstrip(b'\0')) // 512 * 512 + 1024]  # one block of the end mark
    for length in {*range(0, len(whole) - 511, 97), *range(0, len(whole) - 511, 512)}:
        with pytest.raises(UserError, match=r'a\.tar .*(cut off|is no tar file)'):
            TarRows(tiny_tars.write(tmp_path / 'a.tar', whole[:length]))
    assert len(TarRows(tiny_tars.write(tmp_path / 'a.tar', whole))) == 3


def test_damage_is_told(tmp_path):
    whole = tiny_tars.packed([('a.txt', bytes(700)), ('b.txt', b'x' * 600)])
    path = tmp_path / 'a.tar'
    for offset in (2, 130, 150, 200):
        damaged = bytearray(whole)
        damaged[512 * 3 + offset] ^= 0x55
        with pytest.raises(UserError, match='a.tar is damaged after a.txt .*; copy it again'):
            TarRows(tiny_tars.write(path, bytes(damaged)))
    with pytest.raises(UserError, match='goes on for .* bytes after its end mark; if tars were joined, keep them apart'):
        TarRows(tiny_tars.write(path, whole + tiny_tars.packed([('c.txt', bytes(2 << 20))])))
    with pytest.raises(UserError, match='a.tar holds no samples, which are files such as'):
        TarRows(tiny_tars.write(path, tiny_tars.packed([('README', b'x')])))
    with pytest.raises(UserError, match='a.tar holds no samples'):
        TarRows(tiny_tars.write(path, tiny_tars.packed([])))
    with pytest.raises(UserError, match='none.tar does not exist'):
        TarRows(str(tmp_path / 'none.tar'))
    source = TarRows(tiny_tars.write(path, whole))
    frame = Frame('x', functools.partial(tar_rows._open_member, source._open(0), source._indices[0].members(1)[0]))
    os.truncate(path, 1800)
    with pytest.raises(UserError, match='a.tar sample b: its .txt cannot be read .the tar has become shorter'):
        source[1]
    with pytest.raises(OSError, match='the tar has become shorter'):
        frame.open()


@pytest.mark.slow
def test_bytes_flipped_anywhere_are_told_or_harmless(tmp_path):
    draw, told = random.Random(5), 0
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = tiny_tars.packed([(f'{"é" * draw.randrange(40)}{n}.{ending}', draw.randbytes(draw.randrange(600)))
                        for n in range(4) for ending in ('jpg', 'txt')], form)[:12_000]
        whole += bytes(1024)
        for _ in range(700):
            changed = bytearray(whole)
            for _ in range(draw.choice((1, 1, 8))):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            try:
                source = TarRows(tiny_tars.write(tmp_path / 'a.tar', bytes(changed)))
            except UserError:
                told += 1
                continue
            for n in range(len(source)):
                try:
                    source[n]
                except UserError:
                    told += 1
    assert told > 100


@pytest.mark.slow
def test_many_members_are_little_memory(tmp_path):
    path = pathlib.Path(tmp_path / 'a.tar')
    with open(path, 'wb') as file:
        for n in range(50_000):
            for ending in ('jpg', 'txt'):
                info = tarfile.TarInfo(f'{n:09}.{ending}')
                info.size = 1
                file.write(info.tobuf(tarfile.GNU_FORMAT) + b'x' + bytes(511))
        file.write(bytes(1024))
    tracemalloc.start()
    source = TarRows(str(path), str(tmp_path / 'cache'))
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 50_000 and source[49_999]['id'] == '000049999'
    assert used < 5 << 20 and peak < 30 << 20, (used, peak)
