"""TensorBoard event files, without TensorFlow."""
import logging
import time
from collections.abc import Mapping
from typing import Any

from vora_jax.training.log.rows import scalars

log = logging.getLogger(__name__)


class Board:
    """Writes rows by TensorBoard's own writer."""

    def __init__(self, writer: Any, event_pb2: Any, summary_pb2: Any, start: int):
        self._writer, self._event, self._summary = writer, event_pb2.Event, summary_pb2.Summary
        # Tells TensorBoard to forget what an earlier process wrote for later steps.
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=start + 1, session_log=restart))

    def write(self, row: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        event = self._event(wall_time=time.time(), step=row['step'], summary=self._summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()  # a checkpoint may copy the file to an object store

    def close(self) -> None:
        self._writer.close()


def open_board(folder: str, start: int) -> Board | None:
    """None where the `tensorboard` extra is not installed, or cannot write to the folder (told)."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    try:
        return Board(EventFileWriter(folder), event_pb2, summary_pb2, start)
    except Exception as error:  # remote folders need packages of their own; metrics.jsonl holds the same rows
        log.warning('no TensorBoard files in %s: %s', folder, error)
        return None
