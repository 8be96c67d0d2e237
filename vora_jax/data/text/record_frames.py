"""The pictures that a record names."""
import base64
import binascii
import functools
import io
from typing import Any

from vora_jax.data.frame import Frame
from vora_jax.types import UserError

KEYS = ('frames', 'images', 'image', 'video')
FILMS = ('.mp4', '.webm', '.mkv', '.mov', '.avi', '.m4v', '.gifv')
MAX_SECONDS = 1e7

Named = str | Frame


def read_frames(record: dict[str, Any], where: str) -> tuple[str, list[Named]]:
    """(key, pictures) of the one of `KEYS` that the record has; ('', []) where it has none, or only empty ones.

    Raises:
        UserError: it has several, or a picture is malformed; without `where`.
    """
    found = [key for key in KEYS if not _is_empty(record.get(key))]
    if not found:
        return '', []
    if len(found) > 1:
        raise UserError(f'the row has {" and ".join(found)}; keep one of them.')
    key, value = found[0], record[found[0]]
    if key == 'video' and isinstance(value, str):
        raise _is_film(value)
    one_or_more = value if isinstance(value, (list, tuple)) and not isinstance(value, Frame) else [value]
    return key, [as_frame(each, f'{where} picture {number}', key) for number, each in enumerate(one_or_more, 1)]


def as_frame(value: Any, name: str, key: str) -> Named:
    """The picture as a file name, or as a `Frame` where the record holds its bytes.

    Args:
        value: a file name, `Frame`, bytes, data URL, or {'path': ..., 'bytes': ...} with one of them (bytes come first).
        name: of the frame that is made of bytes.
        key: where the value stands in the record, for messages.
    Raises:
        UserError: it is something else.
    """
    if isinstance(value, Frame):
        return value
    if isinstance(value, dict):
        value = next((value[part] for part in ('bytes', 'path', 'url') if value.get(part) is not None), None)
    if isinstance(value, bytes) and value:
        return Frame(name, functools.partial(io.BytesIO, value))
    if not isinstance(value, str) or not value:
        raise UserError(f'{key} is not a list of file names (picture {name.rpartition(" ")[2]} is {kind(value)}); write '
                        'names relative to the image root.')
    if value.startswith('data:'):
        return Frame(name, functools.partial(io.BytesIO, _data_url(value, key)))
    if '\0' in value or not is_text(value):
        raise UserError(f'the file name {short(value)} in {key} holds characters that no file name can have; repair it.')
    if value.lower().startswith(('http://', 'https://')):
        raise UserError(f'the picture {short(value)} in {key} is on the web; download it and write its file name.')
    if value.lower().endswith(FILMS):
        raise _is_film(value)
    return value.removeprefix('file://')


def pick(num_frames: int, most: int) -> list[int]:
    """The frames taken of a video: the middle ones of `most` equal parts, or all where it has no more.

    Example: 10 frames, 3 taken: 1, 5, 8.
    """
    if num_frames <= most:
        return list(range(num_frames))
    return [(2 * part + 1) * num_frames // (2 * most) for part in range(most)]


def seconds(timestamps: Any, num_frames: int) -> list[str]:
    """When each frame of a video was taken, as text: 1, 2, 3, ... where the record does not tell.

    Raises:
        UserError: the timestamps are not one number for each frame.
    """
    if timestamps is None:
        return [str(number + 1) for number in range(num_frames)]
    if not isinstance(timestamps, (list, tuple)) or len(timestamps) != num_frames:
        raise UserError(f'timestamps is not a list of {num_frames} numbers, one for each frame; repair or remove it.')
    for each in timestamps:  # not a number is in no range
        if type(each) not in (int, float) or not 0 <= each <= MAX_SECONDS:
            raise UserError(f'timestamps holds {kind(each)} that is no number from 0 to {MAX_SECONDS:.0f}; repair or remove '
                            'it.')
    return [f'{each:.2f}'.rstrip('0').rstrip('.') for each in timestamps]


def is_text(value: str) -> bool:
    """False for what no file and no tokenizer can hold: half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(text: str) -> str:
    """The text in quotes, on one line, cut to what a message can hold."""
    return repr(text if len(text) <= 80 else f'{text[:60]}...')


def kind(value: Any) -> str:
    """What a JSON value is, in words; never its content, which may be huge."""
    names = {type(None): 'nothing', bool: 'true or false', int: 'a number', float: 'a number', str: 'a text', list: 'a list',
             dict: 'an object', bytes: 'bytes'}
    if isinstance(value, (str, bytes)) and not value:
        return 'empty'
    return names.get(type(value), type(value).__name__)


def _is_empty(value: Any) -> bool:
    # A table has every column in every row: what a row lacks is null there, field by field.
    if isinstance(value, dict):
        return all(part is None for part in value.values())
    return value is None or isinstance(value, (str, list, tuple)) and not value


def _is_film(name: str) -> UserError:
    return UserError(f'{short(name)} is no list of frames, and video files are not read; extract frames (ffmpeg -i FILE -vf '
                     'fps=1 FRAME-%04d.jpg) and list their names under video.')


def _data_url(url: str, key: str) -> bytes:
    head, _, content = url.partition(',')
    try:
        data = base64.b64decode(content, validate=True) if head.endswith(';base64') else b''
    except (binascii.Error, ValueError):
        data = b''
    if not data:
        raise UserError(f'the picture {short(head)} in {key} is a data URL without base64 content; write a file name.')
    return data
