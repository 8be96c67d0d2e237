"""A run's rows at Weights & Biases, optionally."""
import importlib.util
import logging
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from vora_jax.training.checkpoints.storage import Path, local_side
from vora_jax.training.log.rows import scalars
from vora_jax.types import UserError

log = logging.getLogger(__name__)

ID_FILE = 'wandb_id'


class WandbRun:
    """Rows of a W&B run. What is repeated after a crash lies over what it repeats: 'step' is the x axis of all."""

    def __init__(self, run: Any):
        self._run = run
        run.define_metric('*', step_metric='step')

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(row)))

    def close(self) -> None:
        self._run.finish()


def raise_if_missing(project: str) -> None:
    """Raises UserError if a project is given and the package is not installed."""
    if project and importlib.util.find_spec('wandb') is None:
        raise UserError(f'Train.wandb is {project!r}, but wandb is not installed; install the extra with '
                        "pip install 'vora_jax[wandb]', or leave Train.wandb empty.")


def open_run(project: str, workdir: Path, config_text: str) -> WandbRun | None:
    """The W&B run of a workdir, the same after each restart; None without a project.

    W&B itself reads its key, and its mode (offline needs no network), from its environment.

    Raises:
        UserError: not installed, or W&B does not let us in.
    """
    if not project:
        return None
    raise_if_missing(project)
    import wandb

    path = workdir / ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    settings = dict(line.split(' = ', 1) for line in config_text.splitlines() if ' = ' in line)
    try:
        run = wandb.init(project=project, id=path.read_text().strip(), name=workdir.name, resume='allow', config=settings,
                         settings=wandb.Settings(console='off', silent=True),
                         dir=str(local_side(workdir)))
    except wandb.Error as error:
        reason = str(error).splitlines()[0].rstrip('.')
        raise UserError(f'Train.wandb is {project!r}, but W&B does not start: {reason}; log in with `wandb '
                        'login`, or set WANDB_MODE=offline.') from error
    offline = f'offline; `wandb sync {pathlib.Path(run.dir).parent}` uploads it'
    log.info('Weights & Biases: %s', offline if run.offline else run.url)
    return WandbRun(run)
