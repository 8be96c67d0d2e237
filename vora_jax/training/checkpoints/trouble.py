"""What makes files fail: mistakes, or trouble that may pass."""
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from vora_jax.types import TryAgain, UserError

# What a failure says, in the words of the operating system, of Orbax or of an object store's library; why; what helps.
CAUSES = (
    (('no space left', 'quota exceeded', 'resource_exhausted', 'file too large'), 'the disk is full', 'free some space'),
    (('permission denied', 'permission_denied', 'not permitted', 'forbidden', 'read-only', 'unauthorized', 'unauthenticated',
      'invalid credentials', 'does not have storage', 'access denied', 'accessdenied'), 'that is not allowed', 'allow it'),
    (('bucket does not exist', 'nosuchbucket', 'invalid bucket'), 'there is no such bucket', 'make it'),
    (('no such file', 'not_found', 'not a directory'), 'its folder vanished', 'bring it back'),
)
PASSING = re.compile(r'rate.?limit|out of memory', re.IGNORECASE)  # though they say RESOURCE_EXHAUSTED or Forbidden
# Codes with which TensorStore begins its ValueErrors, where another attempt may go well.
CODES = re.compile(r'\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|UNKNOWN|CANCELLED|DATA_LOSS|RESOURCE_EXHAUSTED)\b')
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
WAITS = (0.5, 3.0)  # seconds before a read that failed is tried again

T = TypeVar('T')


def mistake(error: BaseException) -> tuple[str, str] | None:
    """(cause, advice) of a failure that does not pass by itself: a full disk, missing permission, a vanished folder."""
    text = ' '.join(map(str, _chain(error))).lower()
    if PASSING.search(text):
        return None
    return next(((cause, advice) for words, cause, advice in CAUSES if any(word in text for word in words)), None)


def first_line(error: BaseException) -> str:
    """What an error says in short; its type if it says nothing."""
    return str(getattr(error, 'strerror', None) or error).strip().partition('\n')[0].rstrip('.') or type(error).__name__


def mismatch(error: BaseException) -> str:
    """What does not fit, where an error tells of arrays unlike those asked for; '' for all other trouble."""
    found = list(_chain(error))
    unlike = all(isinstance(one, ValueError | LookupError | TypeError) for one in found)
    if not unlike or any(CODES.search(str(one)) for one in found):
        return ''
    return str(error.__cause__ or error).strip().partition('\n')[0] or type(error).__name__


def patiently(read: Callable[[], T], what: object) -> T:
    """What `read` gives; it is tried again where that may help.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: as `read`, at once.
        UserError: reading is not allowed.
        TryAgain: it failed each time.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except GONE:
            raise
        except Exception as error:  # an OSError, or one of an object store's library
            why = mistake(error)
            if why:
                raise UserError(f'{what} cannot be read: {why[0]}; {why[1]}.') from error
            if wait is None:
                raise TryAgain(f'{what} cannot be read: {first_line(error)}; run the same command again.') from error
        time.sleep(wait)
    raise AssertionError('not reached')


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
