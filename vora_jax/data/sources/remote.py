"""Remote files, through fsspec.

The one place that imports it; it is an optional extra.
"""
import contextlib
import logging
from typing import Any, Iterator

from vora_jax.types import UserError

logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs a traceback of all that it raises


def is_remote(path: str) -> bool:
    """Whether the path is read through fsspec."""
    return '://' in path and not path.startswith('file://')


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path and the name there; fsspec keeps the systems, one for each process and thread."""
    try:
        import fsspec
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        needed = '' if error.name == 'fsspec' else f' and its own package ({error})'
        raise UserError(f"{path}: remote files need `pip install 'vora_jax[remote]'`{needed}.") from error
    except ValueError as error:
        raise UserError(f'{path}: {error}; fsspec reads gs://, s3://, https:// and others.') from error
    except Exception as error:  # credentials are looked for here
        raise UserError(f'{path} cannot be reached ({reason(error)}); check the address and the credentials.') from error


@contextlib.contextmanager
def as_os_error(path: str) -> Iterator[None]:
    """Stores raise exceptions of their own, which pass for programming mistakes; OSErrors stay as they are.

    But a file whose server gives no answer, which fsspec calls missing, is not: nobody knows.
    """
    try:
        yield
    except FileNotFoundError as error:
        if error.__cause__ is None or isinstance(error.__cause__, FileNotFoundError):
            raise
        raise OSError(f'{path}: {error.__cause__}') from error
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(f'{path}: {type(error).__name__}: {error}') from error


def reason(error: Exception) -> str:
    """Why a file could not be read, without its name."""
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def folder_of(path: str) -> str:
    """The folder of a file, of any kind of path; '' for a bare name, and `memory://` for `memory://rows.jsonl`."""
    store, mark, name = path.rpartition('://')
    folder, slash, _ = name.rpartition('/')
    return store + mark + (folder or slash)
