"""Random access to the samples of WebDataset tars."""
import collections
import concurrent.futures
import copy
import functools
import hashlib
import io
import posixpath
import threading
from typing import Any, BinaryIO

import numpy as np

from vora_jax.data.frame import Frame
from vora_jax.data.sources import captions
from vora_jax.data.sources.files import RangedFile, expand
from vora_jax.data.sources.parse_json import parse_json
from vora_jax.data.sources.remote import reason
from vora_jax.data.sources.tar_index import index_tar
from vora_jax.data.sources.tar_members import Member
from vora_jax.types import UserError

ENDINGS = ('jpg', 'jpeg', 'jfif', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'ppm', 'avif', 'jp2',
           'heic')  # told as what cannot be read
CAPTIONS = ('txt', 'caption')
_MAX_TEXT = 1 << 28
_OPEN_FILES = 64
_READERS = 8


class TarRows:
    """The samples of tars by number, in the format of `records.check_record`.

    Members whose names are equal up to the first dot of the base name are a sample, wherever in the tar they are: `.json` is
    the record, and where it has no turns, or where there is none, `.txt` or `.caption`, else its key `caption` or `text`,
    is the caption of the pictures. Pictures are the members that end as one (`a.jpg`, `a.2.jpg`, `a.10.jpg`, `a.left.png`,
    in this order), or those that the record names; a record of a sample without pictures names files under the image root.
    Other members are left alone.

    Opening reads the headers once (see `tar_index`); a row then reads its texts, and a picture when it is opened. Picklable
    and safe to share between threads.

    Args:
        path: an uncompressed tar, or several by `*` and braces, see `files.expand`.
        cache: local folder that keeps the indices; '' keeps nothing.
    Attributes:
        path: as given.
        sha256: of all headers, which hold names, sizes and times, and of the files' sizes; not of all bytes.
    Raises:
        UserError: a tar is missing, damaged, cut off or compressed; or there are no samples.
    """

    def __init__(self, path: str, cache: str = ''):
        self._files = [RangedFile(name) for name in expand(path)]
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            self._indices = list(pool.map(lambda file: index_tar(file.path, cache), self._files))
        self._starts = np.cumsum([0, *map(len, self._indices)])  # first row of each tar, then the number of rows
        self.sha256 = hashlib.sha256(b''.join(index.digest.tobytes() for index in self._indices)).hexdigest()
        if not len(self):
            raise UserError(f'{path} holds no samples, which are files such as 0001.jpg and 0001.json; name other files.')
        self.__setstate__({'path': path})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, row: int) -> str:
        """Tar and key of the sample, for messages."""
        tar, sample = self._find(row)
        return f'{self._files[tar].path} sample {self._indices[tar].key(sample)}'

    def __getitem__(self, row: int) -> Any:
        """The row; UserError if it cannot be read, or has neither turns nor a caption."""
        tar, sample = self._find(row)
        where, key, members = self.where(row), self._indices[tar].key(sample), self._indices[tar].members(sample)
        by_ending = {member.name.lower(): member for member in members}
        if len(by_ending) < len(members):
            raise UserError(f'{where} has two files of one ending; keep one of them.')
        file = self._open(tar)
        record = parse_json(_read(file, by_ending['json'], where), where) if 'json' in by_ending else {}
        if not isinstance(record, dict):
            raise UserError(f'{where}: its .json is not a JSON object; write {{"conversations": [...]}} or a caption.')
        pictures = {f'{key}.{member.name}': member for ending, member in by_ending.items() if _ends_as_picture(ending)}
        if pictures:
            kind, names = _choose(record, list(pictures), key, where)
            frames = [Frame(f'{file.path}/{name}', functools.partial(_open_member, file, pictures[name])) for name in names]
            record = {**{name: value for name, value in record.items() if name not in captions.PICTURES}, kind: frames}
        if all(record.get(turns) is None for turns in captions.TURNS):
            record = captions.with_turns(record, _read_caption(file, record, by_ending, where), where)
        return {'id': key, **record}

    def _find(self, row: int) -> tuple[int, int]:
        tar = int(np.searchsorted(self._starts, row, side='right')) - 1
        return tar, row - int(self._starts[tar])

    def _open(self, tar: int) -> RangedFile:
        """The tar's file; only the last ones used stay open, because there may be more than a process may open."""
        with self._lock:
            if tar not in self._opened:
                self._opened[tar] = copy.copy(self._files[tar])  # not open yet
            self._opened.move_to_end(tar)
            while len(self._opened) > _OPEN_FILES:
                self._opened.popitem(last=False)  # is closed when the last reader lets go of it
            return self._opened[tar]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ('_opened', '_lock')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened: collections.OrderedDict[int, RangedFile] = collections.OrderedDict()
        self._lock = threading.Lock()


def _ends_as_picture(ending: str) -> bool:
    return ending.rpartition('.')[2] in ENDINGS


def _read_caption(file: RangedFile, record: dict[str, Any], by_ending: dict[str, Member], where: str) -> str:
    member = next((by_ending[ending] for ending in CAPTIONS if ending in by_ending), None)
    try:
        caption = captions.find_caption(record) if member is None else _read(file, member, where).decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: its .{member.name} is not UTF-8 ({error}); repair or remove it.') from error
    if caption is None:
        raise UserError(f'{where} has neither turns nor a caption: it has {", ".join(by_ending)}; it needs a .txt, or a '
                        '.json with conversations or a caption.')
    return caption


def _choose(record: dict[str, Any], pictures: list[str], key: str, where: str) -> tuple[str, list[str]]:
    """(key of the record, the pictures of the sample that it names there); all of them where it names none."""
    kind = next((kind for kind in captions.PICTURES if record.get(kind)), None)
    if kind is None:
        return 'frames', pictures
    named = record[kind] if isinstance(record[kind], list) else [record[kind]]
    if len(named) == len(pictures) == 1:
        return kind, pictures  # whatever it was called before it was packed
    known = {alias: name for name in pictures for alias in (name, posixpath.basename(name), name[len(key) + 1:])}
    for name in named:
        if not isinstance(name, str) or name not in known:
            raise UserError(f'{where}: {kind} names {name!r}, but the pictures of the sample are {", ".join(pictures)}; '
                            'name those, or none to use all.')
    return kind, [known[name] for name in named]


def _read(file: RangedFile, member: Member, where: str) -> bytes:
    if member.size > _MAX_TEXT:
        raise UserError(f'{where}: its .{member.name} has {member.size} bytes, more than {_MAX_TEXT}; repair or remove it.')
    try:
        with _open_member(file, member) as content:
            return content.read()
    except OSError as error:
        raise UserError(f'{where}: its .{member.name} cannot be read ({reason(error)}).') from error


def _open_member(file: RangedFile, member: Member) -> BinaryIO:
    content = file.read(member.offset, member.size)
    if len(content) < member.size:
        raise OSError('the tar has become shorter since it was indexed')
    return io.BytesIO(content)
