"""The record format: what a row holds.

    {"id": "7", "frames": ["a.jpg", "b.jpg"],
     "conversations": [{"from": "system", "value": "Be brief."},
                       {"from": "human", "value": "What changed from <image> to <image>?"},
                       {"from": "gpt", "value": "The light."}]}

Turns: under `conversations` or `messages`, as {"from", "value"} or {"role", "content"}; roles are human or user, gpt or
    assistant. A system turn, if any, comes first; then questions and answers alternate, and an answer is the last.
Content: a text, or a list of parts {"type": "text", "text"}, {"type": "image"} and {"type": "image_url"}, put together
    without anything between them. An image part is an `<image>`; it may carry the picture itself (under its type, `path` or
    `url`), and then all of them do and the row has no other pictures.
Pictures: under `frames`, `images` or `image`, one or a list, in the order of the `<image>` of all questions: file names
    under the image root, data URLs, {"path": name}, or, where a format can hold them, bytes and {"bytes": ...}. Without
    any `<image>`, one for each picture is put in front of the first question. Null and [] are no pictures.
Videos: more than one picture with at most one `<image>`, or a list of frames under `video` (`<video>` is a place, too).
    They are read with `Data.video_frames` = N > 0: at most N frames, the middle ones of N equal parts, take that place as
    `1s: <image>; 2s: <image>; \\n`, with the seconds of `timestamps` (a number for each frame), else of frames that are a
    second apart. A single frame is a picture.
All other keys are left alone.
"""
from typing import Any

from vora_jax.data.text.record_frames import Named, as_frame, is_text, kind, pick, read_frames, seconds, short
from vora_jax.data.text.special_tokens import IMAGE
from vora_jax.types import UserError

ROLES = {'human': 'human', 'user': 'human', 'gpt': 'gpt', 'assistant': 'gpt', 'system': 'system'}
VIDEO = '<video>'
Exchanges = list[tuple[str, str]]


def check_record(record: Any, where: str, video_frames: int = 0) -> tuple[str | None, Exchanges, list[Named]]:
    """(system message or None, [(question, answer), ...], pictures) of a well-formed record, an `<image>` for each picture.

    Args:
        record: the row, see above.
        where: file and row, for the message and for naming pictures that have no name.
        video_frames: most frames taken of a video; 0 refuses videos.
    Raises:
        UserError: one sentence that says what is wrong with which row. Nothing else, whatever the row holds.
    """
    try:
        if not isinstance(record, dict):
            raise UserError('the row is not a JSON object; write {"id": ..., "frames": [...], "conversations": [...]}.')
        system, exchanges, carried = _read_turns(record, where)
        key, frames = read_frames(record, where)
        if carried and key:
            raise UserError(f'pictures stand in the turns and under {key}; keep one of them.')
        return (system, *_match(exchanges, carried or frames, key, record.get('timestamps'), video_frames))
    except UserError as error:
        raise UserError(f'{where}: {error}') from error


def _match(exchanges: Exchanges, frames: list[Named], key: str, timestamps: Any,
           video_frames: int) -> tuple[Exchanges, list[Named]]:
    """(exchanges, frames) with as many `<image>` in the questions as there are frames."""
    if key == 'video':
        exchanges = [(question.replace(VIDEO, IMAGE), answer) for question, answer in exchanges]
    placeholders = sum(question.count(IMAGE) for question, _ in exchanges)
    is_video = key == 'video' or len(frames) > 1 and placeholders <= 1
    if is_video and video_frames > 0:
        if placeholders > 1:
            raise UserError(f'{placeholders} {IMAGE} placeholders for one video; write one.')
        times, kept = seconds(timestamps, len(frames)), pick(len(frames), video_frames)
        place = ''.join(f'{times[number]}s: {IMAGE}; ' for number in kept) + '\n' if len(kept) > 1 else IMAGE
        exchanges = exchanges if placeholders else _in_front(IMAGE, exchanges)
        return [(question.replace(IMAGE, place), answer) for question, answer in exchanges], [frames[n] for n in kept]
    if key == 'video':
        raise UserError('the row is a video; set Data.video_frames to the most frames to take of one, or remove the row.')
    if not placeholders:
        return _in_front(IMAGE * len(frames), exchanges), frames
    if placeholders != len(frames):
        hint = '; if they are a video, set Data.video_frames' * is_video
        raise UserError(f'{placeholders} {IMAGE} placeholders for {len(frames)} frames; the counts must be equal{hint}.')
    return exchanges, frames


def _in_front(place: str, exchanges: Exchanges) -> Exchanges:
    (question, answer), *more = exchanges
    return [(place + question, answer), *more]


def _read_turns(record: dict[str, Any], where: str) -> tuple[str | None, Exchanges, list[Named]]:
    """(system message, exchanges, pictures that the turns carry)."""
    found = [key for key in ('conversations', 'messages') if record.get(key) is not None]
    if len(found) > 1:
        raise UserError('the row has conversations and messages; keep one of them.')
    key = found[0] if found else 'conversations'
    turns = record.get(key)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise UserError(f'{key} is missing or empty; it needs a human and a gpt turn.')
    roles, texts, carried = [], [], []
    for turn in turns:
        role, text = _read_turn(turn, key, where, carried)
        roles.append(role)
        texts.append(text)
    system = None
    if roles[0] == 'system':
        system, roles, texts = texts[0], roles[1:], texts[1:]
    if not roles or roles != ['human', 'gpt'] * (len(roles) // 2):
        told = ', '.join(roles[:8]) + ', ...' * (len(roles) > 8)
        raise UserError(f'the roles of {key} are {told or "system alone"}; they must be human, gpt, human, gpt and so on.')
    if any(IMAGE in text for text in (*texts[1::2], system or '')):
        raise UserError(f'{IMAGE} stands outside a human turn; move it into the question.')
    if any(picture is None for picture in carried):
        if any(picture is not None for picture in carried):
            raise UserError(f'some image parts of {key} carry a picture and some do not; write all pictures the same way.')
        carried = []
    return system, list(zip(texts[::2], texts[1::2])), carried


def _read_turn(turn: Any, key: str, where: str, carried: list[Named | None]) -> tuple[str, str]:
    """(role, text) of a turn; appends what each of its image parts carries."""
    form = f'a turn of {key} is not {{"from": ..., "value": text}}'
    if not isinstance(turn, dict):
        raise UserError(f'{form} but {kind(turn)}.')
    role, content = (next((turn[name] for name in names if turn.get(name) is not None), None)
                     for names in (('from', 'role'), ('value', 'content')))
    if not isinstance(role, str) or role not in ROLES:
        name = short(role) if isinstance(role, str) else kind(role)
        raise UserError(f'the roles of {key} are human, gpt and system, or user, assistant and system; one is {name}.')
    parts = content if isinstance(content, (list, tuple)) else [{'type': 'text', 'text': content}]
    text = ''
    for part in parts:
        part = part if isinstance(part, dict) else {}
        sort, value = part.get('type'), part.get('text')
        if sort in ('image', 'image_url'):
            text += IMAGE
            held = next((part[name] for name in (sort, 'path', 'url') if part.get(name) is not None), None)
            carried.append(None if held is None else as_frame(held, f'{where} picture {len(carried) + 1}', 'an image part'))
        elif sort == 'text' and isinstance(value, str):
            text += value
        else:
            raise UserError(f'{form}, nor is its value a list of parts of type text and image.')
    if not is_text(text):
        raise UserError(f'a turn of {key} holds half a surrogate pair, which is no character; repair the text.')
    return ROLES[role], text
