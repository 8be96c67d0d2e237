"""What a training run is, as data.

Frozen leaf dataclasses (bindable by name) and the root `Train`. Every field is either *identity* (part of
what makes two runs the same run: a resumed run must agree) or *free* (may change between restarts: logged).
"""
import dataclasses
from typing import Literal, get_args

from vora_jax.data.config import Data
from vora_jax.method import Method
from vora_jax.ops.attention import Implementation
from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with a schedule, clipping and per-path learning rates.

    learning_rate: peak learning rate.
    schedule: 'constant', or 'cosine' down to `learning_rate * end_fraction` at `decay_steps`.
    decay_steps: optimizer steps from the start to the end of the cosine; needed by 'cosine' only. It is a
        field of its own, so that `Train.steps` may change on resume without bending the schedule.
    end_fraction: what the cosine ends at, as a fraction of the peak.
    warmup_steps: optimizer steps of linear warm-up; the first has 1 / warmup_steps of the peak.
    warmup_from_zero: the first has rate 0 instead, step n of them n / warmup_steps (LaVIN's released code, and MAE's).
    b1, b2, eps, weight_decay: AdamW's. Leaves with fewer than two dimensions per layer (norms, biases) never
        decay.
    clip_norm: global gradient norm above which gradients are scaled down; 0 switches it off.
    lr_multipliers: (pattern, factor) pairs; the first pattern (`fnmatch` on `/`-joined paths) that matches a
        trainable parameter scales its learning rate.
    """

    learning_rate: float = 1e-4
    schedule: Literal['constant', 'cosine'] = 'constant'
    decay_steps: int = 0
    end_fraction: float = 0.0
    warmup_steps: int = 0
    warmup_from_zero: bool = False
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()


HowToGather = Literal['compiler', 'two_hop']


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices each mesh axis has; -1 (one axis at most) takes whatever is left.

    data: replicas of the parameters. fsdp: shards of parameters and rows. tensor: shards of heads, MLP,
        vocabulary. context: shards of a row's slots in attention, whose keys go round a ring.
    gather: who makes the collectives of cut parameters, see `training.mesh.gather`; with 'two_hop' they are cut over
        data x fsdp.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    gather: HowToGather = 'compiler'


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When steps are saved and how many stay.

    every_steps: optimizer steps between checkpoints; the last step is always saved.
    keep_last: committed steps that stay on disk.
    keep_every_steps: steps that are a multiple of it stay as well; 0 for none.
    """

    every_steps: int = 1000
    keep_last: int = 2
    keep_every_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Guard:
    """Which steps are skipped: their loss or gradient is not finite, or far above the steps before. Weights and optimizer
    stay as they are, and the data go on.

    max_sigmas: standard deviations that loss and gradient norm may be above their running means; 0 skips only what is not
        finite.
    max_skips: skipped steps in a row that end the run.
    """

    max_sigmas: float = 0.0
    max_skips: int = 10


@dataclasses.dataclass(frozen=True)
class Train:
    """One training stage of a method.

    method, stage: what is trained; `stage` names one of the method's stages.
    data: what it is trained on.
    steps: optimizer steps of the whole run.
    batch_rows: rows of one optimizer step, over all devices and micro-batches.
    accumulation: micro-batches an optimizer step is cut into.
    seed: of initialisation, data order and dropout.
    log_every: optimizer steps between rows of metrics.
    init_from: checkpoints the parameters start from (`training.init_from` has the two forms).
    workers: data processes; 0 reads in the training process.
    frozen_dtype: dtype frozen weights are held in; trainable ones are always float32.
    attention: what computes attention; `auto` takes what suits the devices and the shapes, and says which.
    profile_steps: (first, last) step of a profiler trace in WORKDIR/profile; empty for none.
    wandb: Weights & Biases project that rows of metrics go to as well; '' for none. Needs the extra `wandb`.
    guard: which steps are skipped.
    hang_seconds: without any progress for so long, the run ends and tells where it stood; the first step, with its
        compilation, may take four times as long. 0 waits for ever.
    """

    method: Method
    data: Data
    stage: str
    steps: int
    batch_rows: int
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    init_from: tuple[str, ...] = ()
    workers: int = 0
    frozen_dtype: Literal['float32', 'bfloat16'] = 'float32'
    attention: Implementation = 'auto'
    hang_seconds: int = 1800
    profile_steps: tuple[int, ...] = ()
    wandb: str = ''
    guard: Guard = Guard()


def validate(config: Train) -> None:
    """Raises UserError naming the first field whose value makes no sense."""
    for name in ('steps', 'batch_rows', 'accumulation', 'log_every'):
        _at_least(f'Train.{name}', getattr(config, name), 1)
    _at_least('Train.workers', config.workers, 0)
    _at_least('Train.hang_seconds', config.hang_seconds, 0)
    _at_least('Train.seed', config.seed, 0)
    _at_least('Checkpoint.every_steps', config.checkpoint.every_steps, 1)
    _at_least('Checkpoint.keep_last', config.checkpoint.keep_last, 1)
    _at_least('Checkpoint.keep_every_steps', config.checkpoint.keep_every_steps, 0)
    _at_least('Guard.max_sigmas', config.guard.max_sigmas, 0)
    _at_least('Guard.max_skips', config.guard.max_skips, 1)
    _check_profile(config.profile_steps)
    optimizer = config.optimizer
    for name in ('learning_rate', 'warmup_steps', 'weight_decay', 'clip_norm', 'end_fraction', 'decay_steps'):
        _at_least(f'Optimizer.{name}', getattr(optimizer, name), 0)
    if optimizer.schedule not in ('constant', 'cosine'):
        raise UserError(f"Optimizer.schedule is {optimizer.schedule!r}; it is 'constant' or 'cosine'.")
    if optimizer.schedule == 'cosine' and optimizer.decay_steps <= optimizer.warmup_steps:
        raise UserError(
            f'Optimizer.decay_steps is {optimizer.decay_steps}, but the cosine schedule needs more steps '
            'than its '
            f'{optimizer.warmup_steps} of warm-up; set it to the length of the run.'
        )
    if optimizer.warmup_from_zero and not optimizer.warmup_steps:
        raise UserError('Optimizer.warmup_from_zero is True, but Optimizer.warmup_steps is 0; give it some steps or leave '
                        'it out.')
    if config.frozen_dtype not in ('float32', 'bfloat16'):
        raise UserError(f"Train.frozen_dtype is {config.frozen_dtype!r}; it is 'float32' or 'bfloat16'.")
    if config.attention not in get_args(Implementation):
        raise UserError(f'Train.attention is {config.attention!r}; it is one of {", ".join(get_args(Implementation))}.')
    if config.batch_rows % config.accumulation:
        raise UserError(
            f'Train.batch_rows is {config.batch_rows}, which Train.accumulation = {config.accumulation} does '
            'not '
            'divide; choose a multiple.'
        )
    if config.stage not in config.method.stages:
        raise UserError(
            f'Train.stage is {config.stage!r}, but {config.method.name} has the stages '
            f'{", ".join(config.method.stages)}.'
        )
    if not config.method.stages[config.stage].trainable:
        raise UserError(f'Train.stage {config.stage!r} of {config.method.name} trains nothing; let another run start from '
                        'its weights, with --init-from.')
    if not config.data.sources:
        raise UserError('Data.sources is empty; give at least one Source.')


def _check_profile(steps: tuple[int, ...]) -> None:
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(f'Train.profile_steps is {steps}; give the first and the last step to trace, such as (10, 13).')


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise UserError(f'{name} is {value}; it must be at least {least}.')
