"""Saves checkpoints in the background."""
import concurrent.futures
import dataclasses
import pathlib
import shutil
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from vora_jax.training import checkpoint, checksum
from vora_jax.training.fingerprint import content_hash
from vora_jax.types import Params


class Writer:
    """Saves steps; at most one save is under way.

    `save` returns when the arrays are copied to the host. A thread then waits for the files, writes the
    checksum file (now the step counts) and deletes the oldest steps. A failure is raised by the next call.
    """

    def __init__(self, workdir: pathlib.Path, keep_last: int):
        self._workdir, self._keep_last = workdir, keep_last
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
        self._pending: concurrent.futures.Future | None = None
        for parent in ('steps', 'frozen'):
            (workdir / parent).mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            checksum.remove_unfinished(workdir)

    def save_frozen(self, frozen: Params) -> str:
        """The hash of the frozen weights' content ('' for none); writes them unless they are there."""
        content = content_hash(frozen)
        folder = checkpoint.frozen_folder(self._workdir, content)
        if content and not checksum.is_committed(folder):
            with checkpoint.orbax_options():
                ocp.save_checkpointables(folder.absolute(), {'frozen': frozen}, overwrite=True)
            if jax.process_index() == 0:
                checksum.commit(folder)
        return content

    def save(self, record: checkpoint.Record, trainable: Params, opt_state: Any) -> None:
        """Starts to save a step, after the previous save has ended. The arrays may be donated afterwards."""
        self.wait()
        folder = checkpoint.step_folder(self._workdir, record.step)
        arrays = {'trainable': trainable, 'optimizer': opt_state}
        # Our own folders and deletion, not Orbax's Checkpointer: its default policy skips saves while one is
        # under way, and it deletes old steps before the new one is committed.
        with checkpoint.orbax_options():
            response = ocp.save_checkpointables_async(
                folder.absolute(), arrays, custom_metadata=dataclasses.asdict(record), overwrite=True
            )
        self._pending = self._thread.submit(self._finish, response, folder)

    def check(self) -> None:
        """Raises what made the last save fail, if it has failed by now; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed; raises what made it fail."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(self, response: Any, folder: pathlib.Path) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                checksum.commit(folder)
                # Later steps can only be damaged ones of an earlier attempt: they do not count as kept.
                steps = [step for step in checkpoint.step_numbers(self._workdir) if step <= int(folder.name)]
                for step in steps[: -self._keep_last]:
                    _remove(checkpoint.step_folder(self._workdir, step))
        except Exception as error:
            raise OSError(f'the checkpoint {folder} could not be written: {error}') from error


def _remove(folder: pathlib.Path) -> None:
    # The checksum file first: a process killed in between leaves an unfinished step, not a damaged one.
    (folder / checksum.SIDECAR).unlink(missing_ok=True)
    shutil.rmtree(folder)
