"""Saves checkpoints in the background."""
import concurrent.futures
import dataclasses
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from vora_jax.training.checkpoints import agree, checksum, storage, workdir
from vora_jax.training.checkpoints.fingerprint import content_hash
from vora_jax.training.checkpoints.orbax_options import orbax_options, quiet
from vora_jax.training.checkpoints.record import Record
from vora_jax.training.checkpoints.storage import Path
from vora_jax.training.checkpoints.trouble import first_line, mistake
from vora_jax.types import Params, TryAgain, UserError


class Writer:
    """Saves steps; at most one save is under way.

    `save` returns when the arrays are copied to the host. A thread then waits for the files, writes the
    checksum file (now the step counts) and deletes the oldest steps. A failure is raised by the next call.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0):
        self._workdir, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
        self._pending: concurrent.futures.Future | None = None
        for parent in ('steps', 'frozen'):
            (folder / parent).mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            checksum.remove_unfinished(folder)

    def save_frozen(self, frozen: Params) -> str:
        """The hash of the frozen weights' content ('' for none); writes them unless they are there."""
        content = content_hash(frozen)
        folder = workdir.frozen_folder(self._workdir, content)
        if content and not agree.decide(f'committed {folder}', lambda: checksum.is_committed(folder)):
            try:
                with orbax_options(), quiet():
                    ocp.save_checkpointables(storage.absolute(folder), {'frozen': frozen}, overwrite=True)
                checksum.commit(folder)
            except Exception as error:
                raise _told(folder, error) from error
        return content

    def save(self, record: Record, trainable: Params, opt_state: Any) -> None:
        """Starts to save a step, after the previous save has ended. The arrays may be donated afterwards."""
        self.wait()
        folder = workdir.step_folder(self._workdir, record.step)
        arrays = {'trainable': trainable, 'optimizer': opt_state}
        # Our own folders and deletion, not Orbax's Checkpointer: its default policy skips saves while one is
        # under way, and it deletes old steps before the new one is committed.
        try:
            with orbax_options(), quiet():
                response = ocp.save_checkpointables_async(
                    storage.absolute(folder), arrays, custom_metadata=dataclasses.asdict(record), overwrite=True
                )
        except Exception as error:
            raise _told(folder, error) from error
        self._pending = self._thread.submit(self._finish, response, folder)

    def check(self) -> None:
        """Raises what made the last save fail, if it has failed by now; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed; raises UserError or TryAgain with what made it fail."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """As `wait`; also what the run logged since is then in the workdir."""
        self.wait()
        workdir.send_logs(self._workdir)

    def _finish(self, response: Any, folder: Path) -> None:
        try:
            with quiet():
                response.result()
            checksum.commit(folder)
            if jax.process_index() == 0:
                self._remove_old(int(folder.name))
        except Exception as error:
            raise _told(folder, error) from error
        workdir.send_logs(self._workdir)

    def _remove_old(self, newest: int) -> None:
        """Deletes what is not to be kept; `newest` is committed, so that the step a run was resumed from may go now."""
        # Later steps can only be damaged ones of an earlier attempt: they do not count as kept.
        steps = [step for step in workdir.step_numbers(self._workdir) if step <= newest]
        for step in steps[: -self._keep_last]:
            if self._keep_every and step % self._keep_every == 0:
                continue
            folder = workdir.step_folder(self._workdir, step)
            # The checksum file first: a process killed in between leaves an unfinished step, not a damaged one.
            (folder / checksum.SIDECAR).unlink(missing_ok=True)
            storage.remove_folder(folder)


def _told(folder: Path, error: Exception) -> UserError | TryAgain:
    """What went wrong, in one sentence; a user's mistake only where trying again would not help."""
    why = mistake(error)
    cause, advice = why or (first_line(error), 'mend that if it lasts')
    return (UserError if why else TryAgain)(f'the checkpoint {folder} could not be written: {cause}; {advice} and run the '
                                            'same command, which resumes at the last finished step.')
