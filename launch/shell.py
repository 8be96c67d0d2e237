"""Quotes any text for bash."""

import shlex
from collections.abc import Iterable


def quote(text: str) -> str:
    """The text as one bash word that is printable ASCII on one line, so that no file format can bend it.

    Args:
        text: str anything but NUL; bytes that are no UTF-8 as surrogate escapes, as Python reads them from argv.
    """
    if text.isascii() and text.isprintable():
        return shlex.quote(text)
    plain = (
        chr(b) if 32 <= b < 127 and chr(b) not in "'\\" else f'\\x{b:02x}'
        for b in text.encode('utf-8', 'surrogateescape')
    )
    return f"$'{''.join(plain)}'"


def join(words: Iterable[str]) -> str:
    """A command line of quoted words."""
    return ' '.join(quote(word) for word in words)
