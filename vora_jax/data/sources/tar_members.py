"""The members of a tar file, from its headers alone."""
import hashlib
from typing import BinaryIO, Iterator, NamedTuple

from vora_jax.data.sources.compression import find_compression
from vora_jax.types import UserError

_BLOCK = 512
_MAX_NAMES = 1 << 20
_MAX_AFTER_END = 1 << 20  # tar fills its last record, 10 KiB or what was asked for, with zeros
_FILES = b'0\x007'
_WITHOUT_CONTENT = b'123456'  # links, devices, folders: whatever size they tell


class Member(NamedTuple):
    """A file in a tar.  offset, size: of its content, bytes."""

    name: str
    offset: int
    size: int


def read_members(file: BinaryIO, path: str, size: int, digest: 'hashlib._Hash') -> Iterator[Member]:
    """The files of a tar in order: ustar, GNU (long names, large files) and PAX; contents are not read.

    Links, folders, devices and sparse files are left out.

    Args:
        file: the tar, open for reading.
        path: its name, for messages.
        size: of the tar, bytes.
        digest: is updated with all headers, which hold names, sizes and times.
    Raises:
        UserError: it is no tar, compressed, damaged, or cut off, that is, without an end mark: none of it is used, because
            samples would be missing.
        OSError: reading failed.
    """
    at, told, last = 0, {}, 'its start'  # told: what the headers before a member say about it
    while True:
        header = _read(file, at, _BLOCK)
        if at == 0:
            _check_start(header, path)
        if len(header) < _BLOCK:
            raise UserError(f'{path} ends after {last} without an end mark: it was cut off; copy it again.')
        digest.update(header)
        if not any(header):
            break
        kind, length = header[156:157], _number(header[124:136])
        if length is None or not _is_whole(header):
            raise UserError(f'{path} is damaged after {last} (byte {at}); copy it again.')
        at += _BLOCK
        if kind in b'LKxgX':
            if length > _MAX_NAMES or len(content := _read(file, at, length)) < length:
                raise UserError(f'{path} is damaged or cut off after {last} (byte {at}); copy it again.')
            digest.update(content)
            if kind in b'xX':
                told |= _pax(content)
            elif kind == b'L':
                told['path'] = _text(content)
            at += _blocks(length)
            continue
        if kind == b'S':  # an old GNU sparse file: its map goes on in blocks of its own
            more = header[482]
            while more and len(block := _read(file, at, _BLOCK)) == _BLOCK:
                more, at = block[504], at + _BLOCK
        length = 0 if kind in _WITHOUT_CONTENT else int(told.get('size', length))
        name = told.get('path') or _name(header)
        if at + length > size:
            raise UserError(f'{path} is cut off inside {name}; copy it again.')
        is_sparse = any(key.startswith('GNU.sparse.') for key in told)
        if kind in _FILES and not is_sparse and not name.endswith('/'):  # old tars mark folders by their names
            yield Member(name, at, length)
        at, told, last = at + _blocks(length), {}, name
    if size - at > _MAX_AFTER_END:
        raise UserError(f'{path} goes on for {size - at} bytes after its end mark; if tars were joined, keep them apart.')


def _check_start(header: bytes, path: str) -> None:
    packed = find_compression(header)
    if packed:
        raise UserError(f'{path} is compressed with {packed}, which cannot be read at any place; unpack it to a plain .tar.')
    if len(header) < _BLOCK or any(header) and not _is_whole(header):
        raise UserError(f'{path} is no tar file; name other files.')


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _blocks(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _is_whole(header: bytes) -> bool:
    """Whether the checksum is right; its own place counts as spaces."""
    return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 0x20


def _number(field: bytes) -> int | None:
    """Octal text, or big-endian binary where the first bit is set; None if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7f]) + field[1:], 'big')
    try:
        return int(field.partition(b'\0')[0].strip() or b'0', 8)
    except ValueError:
        return None


def _text(field: bytes) -> str:
    return field.partition(b'\0')[0].decode(errors='surrogateescape')


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b'ustar\0' else ''  # GNU keeps times there
    return f'{prefix}/{_text(header[:100])}' if prefix else _text(header[:100])


def _pax(content: bytes) -> dict[str, str]:
    """The `length key=value\\n` records of a PAX header; what is malformed ends it."""
    found = {}
    while content:
        length, _, _ = content.partition(b' ')
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1:int(length) - 1].partition(b'=')
        if key != b'size' or value.isdigit():
            found[_text(key)] = value.decode(errors='surrogateescape')
        content = content[int(length):]
    return found
