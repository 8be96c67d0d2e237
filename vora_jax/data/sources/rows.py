"""What a source of samples offers."""
from typing import Any, BinaryIO, Callable, NamedTuple, Protocol


class Frame(NamedTuple):
    """A picture of a row that was not read yet.

    name: for messages, and the key under which its patches are cached: two frames of one name are one picture.
    open: gives a new binary file of its encoded bytes; raises OSError or `types.UserError` where it cannot.
    size: (height, width) in pixels as it is to be seen, where that is known without opening it.
    """

    name: str
    open: Callable[[], BinaryIO]
    size: tuple[int, int] | None = None


class Rows(Protocol):
    """Numbered rows of conversations. Picklable (files are opened again), and safe to share between threads.

    path: what the user named.
    sha256: changes whenever the rows may have changed.
    """

    path: str
    sha256: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any:
        """The row in the format of `records.check_record`; its frames are `Frame`s, or file names under the image root.

        What is malformed stays so, for `check_record` to tell. UserError where the row cannot be read at all.
        """
        ...

    def where(self, row: int) -> str:
        """File and row, for messages."""
        ...
