"""Pictures of rows, by name or as they are."""
from vora_jax.data.sources.files import join
from vora_jax.data.sources.rows import Frame


def locate(frame: str | Frame, root: str) -> str | Frame:
    """The frame of a row; a file name is completed with the image root."""
    return frame if isinstance(frame, Frame) else join(root, frame)


def frame_name(frame: str | Frame) -> str:
    """Its name: equal for equal pictures."""
    return frame.name if isinstance(frame, Frame) else frame
