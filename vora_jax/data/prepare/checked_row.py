"""A row of a source, checked and ready to be stored."""
import datetime
import decimal
import io
import json
from typing import Any, NamedTuple

from vora_jax.data.frame import Frame, frame_name
from vora_jax.data.images.decode import decode, read_size
from vora_jax.data.images.open_picture import MAX_BYTES
from vora_jax.data.sources.files import locate, open_binary
from vora_jax.data.sources.remote import is_remote
from vora_jax.data.text.record_frames import KEYS
from vora_jax.data.text.records import check_record
from vora_jax.types import UserError

ALL_FRAMES = 1 << 30  # of a video; those that training sees are chosen then
_IMAGE_PARTS = ('image', 'image_url')
StoredPicture = dict[str, int]  # picture (number in the part), height, width, bytes


class CheckedRow(NamedTuple):
    """line: the row as it is stored, JSON.    texts: of its turns.    exchanges: questions with an answer.

    pictures: of the row, in order.    new: (name, content, picture) of those that the part does not hold yet.
    """

    line: bytes
    texts: list[str]
    exchanges: int
    pictures: list[StoredPicture]
    new: list[tuple[str, bytes, StoredPicture]]


class Pictures(NamedTuple):
    """Pictures that were met in a part, by name.    held: those it holds.    bad: why others cannot be used."""

    held: dict[str, StoredPicture]
    bad: dict[str, str]


def check_row(row: Any, where: str, image_root: str, met: Pictures, decoded: bool) -> CheckedRow:
    """The row with numbers in place of its pictures; all its other keys are kept.

    Args:
        row: in the format of `records.check_record`.
        where: file and row, for messages.
        image_root: folder that file names are relative to.
        met: pictures of the part so far; only `bad` is added to.
        decoded: decode pictures to their last byte; otherwise only their headers are read.
    Raises:
        UserError: the row is bad, and why.
        OSError: a remote store does not answer.
    """
    system, exchanges, frames = check_record(row, where, ALL_FRAMES)
    pictures, new = [], {}
    for frame in (locate(each, image_root) for each in frames):
        name = frame_name(frame)
        if name in met.bad:
            raise UserError(f'{where}: {met.bad[name]}')
        picture = met.held.get(name) or (new[name][2] if name in new else None)
        if picture is None:
            try:
                content, (height, width) = _read(frame, decoded)
            except UserError as error:
                met.bad[name] = str(error)
                raise UserError(f'{where}: {error}') from error
            picture = {'picture': len(met.held) + len(new), 'height': height, 'width': width, 'bytes': len(content)}
            new[name] = name, content, picture
        pictures.append(picture)
    texts = [*filter(None, [system]), *(text for exchange in exchanges for text in exchange)]
    return CheckedRow(_line(row, pictures, where), texts, len(exchanges), pictures, list(new.values()))


def _read(frame: str | Frame, decoded: bool) -> tuple[bytes, tuple[int, int]]:
    """(bytes of the picture's file, its height and width as it is to be seen)."""
    name = frame_name(frame)
    try:
        with frame.open() if isinstance(frame, Frame) else open_binary(frame) as file:
            content = file.read(MAX_BYTES + 1)  # one more is too many: told below
    except FileNotFoundError as error:
        raise UserError(f'image {name} does not exist; check the frames and the image root.') from error
    except OSError as error:
        if is_remote(name):  # a store that does not answer makes no row bad
            raise
        raise UserError(f'image {name} cannot be read ({error.strerror or error}); replace or remove it.') from error
    held = io.BytesIO(content)
    held.name = name  # for messages
    if not decoded:
        return content, read_size(held)
    image = decode(held)
    return content, (image.height, image.width)


def _line(row: dict[str, Any], pictures: list[StoredPicture], where: str) -> bytes:
    stored = {key: value for key, value in row.items() if key not in KEYS}
    if pictures:
        stored['video' if row.get('video') else 'frames'] = pictures
        for key in ('conversations', 'messages'):
            if stored.get(key):
                stored[key] = [{name: _place(value) for name, value in turn.items()} for turn in stored[key]]
    try:
        return json.dumps(stored, ensure_ascii=False, default=_as_text).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f'{where}: the row holds what JSON cannot ({error}); remove or convert it.') from error


def _as_text(value: Any) -> str:
    """Times and exact numbers, which tables hold."""
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise TypeError(f'a value of type {type(value).__name__}')


def _place(content: Any) -> Any:
    """A turn's content; its image parts are places for pictures, and hold none any more."""
    if not isinstance(content, (list, tuple)):
        return content
    sorts = [part.get('type') if isinstance(part, dict) else None for part in content]
    return [{'type': sort} if sort in _IMAGE_PARTS else part for part, sort in zip(content, sorts)]
