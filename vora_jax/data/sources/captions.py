"""Captions as conversations.

A caption is what an empty question about the pictures is answered with, as VoRA's pretraining reads recaptioned pictures.
"""
from typing import Any

from vora_jax.data.text.record_frames import KEYS as PICTURES
from vora_jax.data.text.special_tokens import IMAGE
from vora_jax.types import UserError

TURNS = ('conversations', 'messages')
KEYS = ('caption', 'text')


def find_caption(record: dict[str, Any]) -> str | None:
    """The caption of a record without turns; None if it has turns, or no caption."""
    if any(record.get(key) is not None for key in TURNS):
        return None
    return next((record[key] for key in KEYS if isinstance(record.get(key), str)), None)


def with_turns(record: dict[str, Any], caption: str, where: str) -> dict[str, Any]:
    """The record with the turns of a caption of its pictures: one `<image>` a line for each, one for a video.

    Raises:
        UserError: it has none; it would be learned as what to say to an empty question.
    """
    key = next((key for key in PICTURES if record.get(key)), None)
    if key is None:
        raise UserError(f'{where} has a caption but no picture that is known as one; add it, remove the row, or write '
                        'conversations.')
    pictures = record[key]
    count = len(pictures) if isinstance(pictures, list) and key != 'video' else 1
    question = '\n'.join([IMAGE] * count)
    return {**record, 'conversations': [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': caption}]}
