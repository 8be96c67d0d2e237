"""How Orbax saves, and what it says."""
import contextlib
import logging
from collections.abc import Iterator

from orbax.checkpoint.experimental import v1 as ocp


def orbax_options(one_file: bool = True) -> ocp.Context:
    """How this package saves.

    Args:
        one_file: gathers all arrays in few files: kind to remote disks, but writing 3 GB takes a local one two to five
            times as long as in a file for each array.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = one_file
    context.array.saving.use_compression = False  # eight times the time for 8 % of the size
    # A folder that cannot be made fails at once; otherwise Orbax's threads wait for it for minutes.
    context.asynchronous.create_directories_asynchronously = False
    return context


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs nothing: its threads log the traceback of every failure, which the caller tells in a sentence."""
    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
