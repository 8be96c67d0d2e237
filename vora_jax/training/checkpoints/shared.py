"""Whether the processes of a run share their workdir."""
import contextlib
import json
import logging
import secrets
import time

import jax

from vora_jax.training.checkpoints import agree, storage
from vora_jax.training.checkpoints.storage import Path
from vora_jax.training.checkpoints.trouble import first_line
from vora_jax.training.checkpoints.workdir import cannot_write
from vora_jax.types import UserError

log = logging.getLogger(__name__)

LOOKS = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds before each look for what another host wrote: network disks are slow


def raise_if_not_shared(workdir: Path) -> None:
    """UserError unless the processes of a run see one folder. Called by all; leaves the folder as it was.

    Raises:
        UserError: they do not, or it cannot be written.
        TryAgain: writing to it fails for now.
    """
    if jax.process_count() == 1:
        return
    new, name = not workdir.exists(), f'shared-{secrets.token_hex(8)}.tmp'
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / name).write_text(name)
        except Exception as error:
            raise cannot_write(workdir, error) from error
    # No topic with the folder in it: it may have another name at each process.
    name = agree.announce('a file in the workdir', name)
    seen = agree.collect('whether it sees the workdir', json.dumps(_comes(workdir / name)))
    blind = [number for number, one in enumerate(seen) if not json.loads(one)]
    if jax.process_index() == 0:
        (workdir / name).unlink(missing_ok=True)
        if new and not storage.is_remote(workdir):
            with contextlib.suppress(OSError):
                workdir.rmdir()
    blind = json.loads(agree.announce('who does not see the workdir', json.dumps(blind)))
    if blind:
        raise UserError(f'{workdir} is a folder of each host alone (process {blind[0]} does not see what process 0 writes '
                        'there); use gs:// or a shared disk, and give all processes the same --workdir.')


def _comes(path: Path) -> bool:
    for wait in LOOKS:
        time.sleep(wait)
        try:
            return bool(path.read_bytes())
        except FileNotFoundError:
            pass
        except Exception as error:  # as absent; the next look may succeed
            log.warning('%s cannot be read: %s', path, first_line(error))
    return False
