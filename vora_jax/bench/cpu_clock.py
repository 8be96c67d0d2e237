"""CPU seconds of a program and its workers."""
import ctypes
import multiprocessing
import time

# A program that is at rest still looks after its threads now and then.
BUSY_SHARE, LOOK_SECONDS, MAX_WAIT_SECONDS = 0.1, 0.1, 30.0


def cpu_seconds() -> float:
    """CPU time used so far by this process and the processes it has started with `multiprocessing` that live, all threads.

    Differences are of use as long as none of them ends in between.

    Raises:
        OSError: it has such processes, and this is not Linux.
    """
    return time.process_time() + sum(_of_process(child.pid) for child in multiprocessing.active_children())


def settle() -> None:
    """Waits until this process and its workers rest: what reads ahead has filled its buffers."""
    end, before = time.monotonic() + MAX_WAIT_SECONDS, cpu_seconds()
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        now = cpu_seconds()
        if now - before < BUSY_SHARE * LOOK_SECONDS:
            return
        before = now


def _of_process(pid: int) -> float:
    clock = ctypes.c_int()
    find = getattr(ctypes.CDLL(None), 'clock_getcpuclockid', None)
    if find is None or find(pid, ctypes.byref(clock)):
        raise OSError(f'the CPU time of process {pid} is not known')
    return time.clock_gettime(clock.value)
