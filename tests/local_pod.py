"""A pod of processes on this machine, with fake devices."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from vora_jax.training.checkpoints import checkpoint, workdir

MAIN = 'import sys\nfrom vora_jax.cli.main import main\nsys.exit(main())'


class LocalPod:
    """`vora train` in several processes. What each tells is in its file of `folder`."""

    def __init__(self, folder: pathlib.Path, arguments: list[list[str]], devices: int, before: str = ''):
        """Starts a process for each list of arguments, together with `devices` devices; `before` is Python for each of
        them to run before, with its `number`."""
        count = len(arguments)
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if 'proxy' not in name.lower()}
        # Bits are compared: the usual code, not that of quick compilations.
        environment |= {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // count}', 'JAX_PLATFORMS': 'cpu'}
        self.processes, self._files = [], []
        for number, words in enumerate(arguments):
            where = ['--coordinator', f'127.0.0.1:{port}', '--num-processes', str(count), '--process-id', str(number)]
            self._files.append(folder / f'told-{time.monotonic_ns()}')
            with open(self._files[-1], 'w') as file:
                self.processes.append(subprocess.Popen(
                    [sys.executable, '-c', f'number = {number}\n{before}\n{MAIN}', 'train', *words, *where],
                    stdout=file, stderr=subprocess.STDOUT, env=environment))

    def __enter__(self) -> 'LocalPod':
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def told(self) -> list[str]:
        """What each process has told so far."""
        return [file.read_text() for file in self._files]

    def wait_for(self, path: pathlib.Path, seconds: float = 240) -> None:
        """Returns when `path` exists; no process may end before."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert all(process.poll() is None for process in self.processes), self.told()
            assert time.monotonic() < deadline, (f'{path} never came', self.told())
            time.sleep(0.01)

    def codes(self, seconds: float = 240) -> list[int]:
        """The exit codes, once all processes have ended."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(('still running', self.told())) from None


def last_arrays(folder: pathlib.Path) -> tuple[int, dict[str, np.ndarray]]:
    """The last step and every array of it, trainable and optimizer."""
    number = workdir.latest_step(folder)
    step = workdir.step_folder(folder, number)
    parts = {part: checkpoint.load_as_numpy(step, part) for part in ('trainable', 'optimizer')}
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(parts)}
    assert len(arrays) > 20
    return number, arrays
