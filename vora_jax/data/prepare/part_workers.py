"""Parts of a prepared folder, written by several processes."""
import concurrent.futures
import multiprocessing
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterator, Sequence

from vora_jax.data.child_process import serve_parent
from vora_jax.data.prepare.row_parts import Plan, Work, write_part
from vora_jax.data.sources.rows import Rows
from vora_jax.types import UserError

_POLL_SECONDS = 0.2
_TICKS = 16  # rows between two looks at what the processes share


def write_parts(rows: Rows, parts: Sequence[int], plan: Plan, work: Work, workers: int,
                advance: Callable[[int], Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(part, report) of each part, in any order. Closing the iterator stops the processes within a row.

    Args:
        rows, plan, work: see `row_parts.write_part`.
        parts: which.
        workers: processes; 0 writes in this one.
        advance: is told how many rows were done since it was called last.
    Raises:
        UserError: see `row_parts.write_part`; or a process was killed.
    """
    if not workers or not parts:
        for part in parts:
            yield part, write_part(rows, part, plan, work, lambda: advance(1))
        return
    context = multiprocessing.get_context('spawn')
    stop, done, told = context.Event(), context.Value('q', 0), 0
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(parts)), context, _start, (rows, plan, work, stop, done))
    try:
        waiting = {pool.submit(_write, part): part for part in parts}
        while waiting:
            ready, _ = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            advance(done.value - told)
            told = done.value
            for future in ready:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(f'{work.folder}: a process was killed, perhaps as the memory was full; give the same command with '
                        'fewer --workers: it goes on with the parts that are missing.') from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_job: list[Any] = []  # what this process was started with


def _start(*job: Any) -> None:
    _job[:] = job
    serve_parent()


def _write(part: int) -> dict[str, Any]:
    rows, plan, work, stop, done = _job
    counted = 0

    def tick() -> None:
        nonlocal counted
        counted += 1
        if counted % _TICKS == 0:
            with done.get_lock():
                done.value += _TICKS
        if stop.is_set():
            raise concurrent.futures.CancelledError

    report = write_part(rows, part, plan, work, tick)
    with done.get_lock():
        done.value += counted % _TICKS
    return report
