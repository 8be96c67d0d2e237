"""Small tars, local or remote."""
import io
import tarfile
from typing import Iterable

import fsspec


def packed(members: Iterable[tuple[str, bytes | str]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, content) as tarfile writes it; a text is the type of a member without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w', format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content.encode(), 'somewhere' if content in '12' else ''
                tar.addfile(info)
    return file.getvalue()


def write(path: object, content: bytes) -> str:
    """The path, written."""
    with fsspec.open(str(path), 'wb') as file:
        file.write(content)
    return str(path)
