"""Opens a source by what its path is."""
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.sources.rows import Rows


def open_rows(path: str, cache: str = '') -> Rows:
    """The rows of a path.

    Args:
        path: a file.
        cache: folder that keeps what is slow to find out about a file; '' keeps nothing.
    Raises:
        UserError: the path does not exist, holds no rows, or is of an unknown kind.
    """
    return JsonLines(path)
