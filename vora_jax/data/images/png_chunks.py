"""Checks PNG files and finds metadata."""
import struct
import zlib
from typing import BinaryIO, Iterator

_FIRST = 8  # bytes of the format's mark


def verify(file: BinaryIO) -> None:
    """Checks every checksum up to the end mark: Pillow is content once it has all pixels.

    Raises:
        ValueError: the file is damaged, or was cut.
    """
    for kind, length in _chunks(file):
        content = file.read(length)
        checksum = file.read(4)
        if len(content) < length or len(checksum) < 4:
            raise ValueError('truncated PNG file')
        if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(checksum, 'big'):
            raise ValueError(f'broken PNG file, wrong checksum of {kind!r}')


def find_exif(file: BinaryIO) -> bytes | None:
    """Content of the EXIF chunk, which may stand behind the pixels; the pixels are not read."""
    try:
        for kind, length in _chunks(file):
            if kind == b'eXIf':
                return file.read(length)
            file.seek(length + 4, 1)
    except ValueError:  # damaged; decoding tells
        pass
    return None


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(name, bytes) of each chunk up to the end mark; the caller reads each to its end."""
    file.seek(_FIRST)
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError('truncated PNG file')
        length, kind = struct.unpack('>I4s', head)
        yield kind, length
        if kind == b'IEND':
            return
