"""Single records of ArrayRecord files."""
import collections
import os
import threading
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from vora_jax.types import UserError

MOST_OPEN = 256  # a reader holds a file descriptor and the places of all records of its file
_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'  # for random access


class RecordFiles:
    """Records of the files of one folder, by file name and number; the files used last stay open.

    Picklable (files are opened again) and safe to share between threads: a reader has no position of its own.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.__setstate__({'folder': folder})

    def count(self, name: str) -> int:
        """Records of a file; 0 for one that is no ArrayRecord file."""
        return self._reader(name).num_records()

    def read(self, name: str, number: int) -> bytes:
        """A record. Every byte of it is verified.

        Raises:
            UserError: it is damaged, or cannot be read; other records of the file may be well.
        """
        try:
            return self._reader(name).read([number])[0]
        except (OSError, RuntimeError) as error:
            reason = str(error).partition(';')[0]
            raise UserError(f'{os.path.join(self.folder, name)}: record {number} cannot be read ({reason}); copy the file '
                            'again, or prepare the folder again.') from error

    def _reader(self, name: str) -> ArrayRecordReader:
        with self._lock:
            if name not in self._readers:
                # The one that falls out is closed when the last thread that reads from it is done.
                while len(self._readers) >= MOST_OPEN:
                    self._readers.popitem(last=False)
                self._readers[name] = ArrayRecordReader(os.path.join(self.folder, name), _OPTIONS)
            self._readers.move_to_end(name)
            return self._readers[name]

    def __getstate__(self) -> dict[str, Any]:
        return {'folder': self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers: collections.OrderedDict[str, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()
