"""Captions as conversations.

A caption is what an empty question about the pictures is answered with, as VoRA's pretraining reads recaptioned pictures.
"""
from typing import Any

from vora_jax.data.text.record_frames import KEYS as PICTURES
from vora_jax.data.text.special_tokens import IMAGE

TURNS = ('conversations', 'messages')
KEYS = ('caption', 'text')


def find_caption(record: dict[str, Any]) -> str | None:
    """The caption of a record without turns; None if it has turns, or no caption."""
    if any(record.get(key) is not None for key in TURNS):
        return None
    return next((record[key] for key in KEYS if isinstance(record.get(key), str)), None)


def with_turns(record: dict[str, Any], caption: str) -> dict[str, Any]:
    """The record with the turns of a caption of its pictures: one `<image>` a line for each, one for a video."""
    key = next((key for key in PICTURES if record.get(key)), None)
    pictures = record[key] if key else []
    count = len(pictures) if isinstance(pictures, list) and key != 'video' else 1
    question = '\n'.join([IMAGE] * count)
    return {**record, 'conversations': [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': caption}]}
