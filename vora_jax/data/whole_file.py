"""Files that are written whole or not at all."""
import contextlib
import os
import pathlib
import tempfile
from typing import Any, BinaryIO, Callable


def write_whole(path: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
    """Creates or replaces the file; readers, and writers at the same time, see one whole content or another.

    Args:
        path: in a folder that exists.
        write: writes the content to a binary file.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(descriptor, 'wb') as file:
            write(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # somebody removed the folder: tell what went wrong, not this
            os.unlink(temporary)
        raise
