"""The samples of a tar: which members belong together, and where they are."""
import array
import hashlib
import logging
import os
import pathlib
import re
from typing import Iterable, NamedTuple

import numpy as np

from vora_jax.data.sources.files import open_binary, status
from vora_jax.data.sources.remote import is_remote, reason
from vora_jax.data.sources.tar_members import Member, read_members
from vora_jax.data.whole_file import write_whole
from vora_jax.types import UserError

log = logging.getLogger(__name__)


class TarIndex(NamedTuple):
    """Arrays, because a tar may have a million members: about 20 bytes a member and 16 and its key a sample.

    digest: of the headers and the size of the tar.
    keys: u8[...] the keys of the samples, one after another, in UTF-8.    key_stops: i64[samples] where each ends.
    stops: i64[samples] the sample's members end there in the next three; they begin where those of the sample before end.
    endings: i32[members] number of what follows the key and a dot, in `names`.
    offsets, sizes: i64[members] of the contents, bytes.
    names: endings, a NumPy array of texts.
    """

    digest: np.ndarray
    keys: np.ndarray
    key_stops: np.ndarray
    stops: np.ndarray
    endings: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.stops)

    def key(self, sample: int) -> str:
        """Name of a sample: that of its members up to the first dot of the base name."""
        start = self.key_stops[sample - 1] if sample else 0
        return self.keys[start:self.key_stops[sample]].tobytes().decode(errors='surrogateescape')

    def members(self, sample: int) -> list[Member]:
        """The sample's members by their endings, which stand for their names: jpg, 2.jpg, 10.jpg, left.jpg."""
        start, stop = int(self.stops[sample - 1]) if sample else 0, int(self.stops[sample])
        found = [Member(str(self.names[self.endings[at]]), int(self.offsets[at]), int(self.sizes[at]))
                 for at in range(start, stop)]
        return sorted(found, key=lambda member: (_natural(member.name.rpartition('.')[0]), member.name))


def index_tar(path: str, cache: str = '') -> TarIndex:
    """The index of a tar; one pass over its headers, or what an earlier one left in the cache.

    Args:
        path: the tar, local or remote (where it is read as a whole, once).
        cache: local folder that keeps the index of this version of the tar; '' keeps nothing.
    Raises:
        UserError: see `tar_members.read_members`; or the tar does not exist.
    """
    file = _cache_file(path, cache)
    if file:
        kept = _load(file)
        if kept is not None:
            return kept
    try:
        size = status(path).size
        digest = hashlib.sha256(b'%d' % size)
        with open_binary(path) as content:
            index = group_members(read_members(content, path, size, digest), digest)
    except FileNotFoundError as error:
        raise UserError(f'{path} does not exist; correct the path.') from error
    except OSError as error:
        raise UserError(f'{path} cannot be read ({reason(error)}); name a file that can.') from error
    if file:
        try:
            os.makedirs(cache, exist_ok=True)
            write_whole(file, lambda content: np.savez(content, **index._asdict()))
        except OSError as error:
            log.warning('%s cannot be written (%s); the tar is indexed again next time.', file, reason(error))
    return index


def group_members(members: Iterable[Member], digest: 'hashlib._Hash') -> TarIndex:
    """The members by samples, in the order in which the samples begin.

    As in WebDataset, names without a dot and those that begin with one belong to no sample.

    Args:
        members: see `tar_members.read_members`.
        digest: of the headers, read when the members are.
    """
    samples_of, number_of = {}, {}  # by key, by ending
    samples, endings, offsets, sizes = array.array('q'), array.array('i'), array.array('q'), array.array('q')
    for name, offset, size in members:
        folder, slash, base = name.removeprefix('./').rpartition('/')
        stem, dot, ending = base.partition('.')
        if stem and dot:
            samples.append(samples_of.setdefault(folder + slash + stem, len(samples_of)))
            endings.append(number_of.setdefault(ending, len(number_of)))
            offsets.append(offset)
            sizes.append(size)
    encoded = [key.encode(errors='surrogateescape') for key in samples_of]
    owners = np.frombuffer(samples, np.int64)
    order = np.argsort(owners, kind='stable')
    return TarIndex(
        np.frombuffer(digest.digest(), np.uint8), np.frombuffer(b''.join(encoded), np.uint8),
        np.cumsum([len(key) for key in encoded], dtype=np.int64), np.cumsum(np.bincount(owners, minlength=len(encoded))),
        *(np.frombuffer(values, dtype)[order]
          for values, dtype in ((endings, np.int32), (offsets, np.int64), (sizes, np.int64))), np.array([*number_of], str))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r'(\d+)', name)]


def _cache_file(path: str, cache: str) -> pathlib.Path | None:
    if not cache:
        return None
    try:
        key = '\n'.join([path if is_remote(path) else os.path.abspath(path), status(path).version])
    except OSError:  # told when it is opened
        return None
    return pathlib.Path(cache, f'tar-{hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]}.npz')


def _load(file: pathlib.Path) -> TarIndex | None:
    try:
        with np.load(file) as arrays:
            return TarIndex(**{name: arrays[name] for name in arrays.files})
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever reading damaged files raises: the tar itself is still there to be indexed
        log.warning('%s cannot be used (%s); the tar is indexed again.', file, error)
        return None
