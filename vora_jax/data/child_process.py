"""What a process that was started to help owes its parent."""
import multiprocessing
import os
import signal
import threading


def serve_parent(through_sigterm: bool = False) -> None:
    """Leaves Ctrl-C, which reaches all processes, to the parent, and ends with it; call it in the main thread.

    Does nothing in a process without parent.

    Args:
        through_sigterm: leaves a scheduler's SIGTERM to the parent, too, which then finishes its step and needs the others
            for it. Not for processes of an executor: it ends them by SIGTERM, and waits.
    """
    if multiprocessing.parent_process() is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if through_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # it was killed: nobody waits for this one any more
