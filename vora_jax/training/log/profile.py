"""Profiler traces of chosen steps, on demand."""
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from vora_jax.training.checkpoints.storage import Path, is_remote, local_side
from vora_jax.training.checkpoints.trouble import first_line

log = logging.getLogger(__name__)

TRIGGER = 'profile_now'  # a file of this name in the workdir, looked for at each row of metrics
TRIGGERED_STEPS = 3
REMOTE_SECONDS = 30  # between two looks into an object store


class Profile:
    """Traces steps into workdir/profile, in the first process: those asked for, and the next three when someone
    touches workdir/profile_now.

        with profile.step(number, in_flight):
            ... dispatch step `number` ...
        profile.end(number, metrics)
    """

    def __init__(self, workdir: Path, steps: Sequence[int] = ()):
        """steps: the first and the last that are traced, counted from 1; empty for none."""
        self._workdir, self._folder = workdir, local_side(workdir) / 'profile'  # the profiler knows local folders only
        self._on = jax.process_index() == 0
        self._steps = (steps[0], steps[1]) if steps and self._on else (0, 0)
        self._since = 0  # first step of the trace under way
        self._next_look, self._failed = 0.0, False

    def step(self, number: int, in_flight: Iterable[Any]) -> contextlib.AbstractContextManager:
        """The context to dispatch a step in; starts the trace before its first step, when those
        in flight are complete."""
        first, last = self._steps
        if not self._since and first <= number <= last:
            jax.block_until_ready(list(in_flight))  # or the trace would hold the steps that still run
            jax.profiler.start_trace(str(self._folder))
            self._since = number
        return jax.profiler.StepTraceAnnotation('step', step_num=number) if self._since else contextlib.nullcontext()

    def end(self, number: int, metrics: Any) -> None:
        """Call after each step; waits for the last one of a trace and writes the trace."""
        if self._since and number >= self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop(number)

    def look(self, number: int) -> None:
        """Takes the trigger file, if it is there: the steps after `number` will be traced."""
        now = time.monotonic()
        if not self._on or self._since or now < self._next_look:
            return
        if is_remote(self._workdir):
            self._next_look = now + REMOTE_SECONDS
        trigger = self._workdir / TRIGGER
        try:
            if trigger.exists():
                trigger.unlink()
                self._steps = (number + 1, number + TRIGGERED_STEPS)
        except Exception as error:  # no reason to end a run
            if not self._failed:
                log.warning('cannot look for %s: %s', trigger, first_line(error))
            self._failed = True

    def close(self, number: int) -> None:
        """Ends a trace that the end of the run, after step `number`, cuts short."""
        if self._since:
            self._stop(number)

    def _stop(self, number: int) -> None:
        jax.profiler.stop_trace()
        log.info('profile of steps %d to %d in %s: see it with `pip install tensorboard xprof; tensorboard --logdir %s`, or '
                 'open its *.trace.json.gz at https://ui.perfetto.dev', self._since, number, self._folder, self._folder)
        self._since = 0
