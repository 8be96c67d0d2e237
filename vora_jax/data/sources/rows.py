"""What a source of samples offers."""
from typing import Any, Protocol


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
