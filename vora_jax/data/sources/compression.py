"""Names the compression of a file."""

_STARTS = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd', b'PK\x03\x04': 'zip'}


def find_compression(start: bytes) -> str | None:
    """What a file that begins with these bytes is compressed with; None if it is not, as far as we know."""
    return next((name for lead, name in _STARTS.items() if start.startswith(lead)), None)
