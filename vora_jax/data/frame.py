"""A picture that was not read yet."""
from typing import BinaryIO, Callable, NamedTuple


class Frame(NamedTuple):
    """A picture of a row.

    name: for messages, and the key under which its patches are cached: two frames of one name are one picture.
    open: gives a new binary file of its encoded bytes; raises OSError or `types.UserError` where it cannot.
    size: (height, width) in pixels as it is to be seen, where that is known without opening it.
    """

    name: str
    open: Callable[[], BinaryIO]
    size: tuple[int, int] | None = None


def frame_name(frame: str | Frame) -> str:
    """The name of a frame, or of a picture that is given by its file name."""
    return frame.name if isinstance(frame, Frame) else frame
