"""What every test runs under: eight fake CPU devices, quick compilations kept between runs.

Set before JAX is first imported; subprocesses that tests start inherit all of it.
"""

import gc
import hashlib
import importlib.metadata
import os
import pathlib
import re
import sys
import time

_ROOT = pathlib.Path(__file__).parent.parent
_KEEP_SECONDS = 7 * 24 * 3600


def _compilation_cache() -> pathlib.Path:
    """A folder for this kind of processor, without entries that are a week old.

    Safe on one machine: an entry is the compiled program itself, so results are equal bit for bit. JAX skips
    one that a killed test left half written, with a warning. Programs for another processor might crash,
    hence the hash.
    """
    information = pathlib.Path('/proc/cpuinfo')
    text = information.read_text() if information.exists() else ''
    processor = '\n'.join(
        sorted(set(re.findall(r'^(?:model name|flags|Features)\s*:.*', text, re.MULTILINE)))
    )
    folder = _ROOT / '.pytest_cache' / f'jax_{hashlib.sha256(processor.encode()).hexdigest()[:12]}'
    for entry in folder.glob('*'):
        if entry.stat().st_mtime < time.time() - _KEEP_SECONDS:
            entry.unlink(missing_ok=True)
    return folder


def _older_code_generator() -> list[str]:
    """The CPU code generator that takes a third of the time to compile. Newer releases have no such flag, and an unknown
    one is fatal."""
    old = importlib.metadata.version('jaxlib').startswith('0.10.')
    return ['--xla_cpu_use_fusion_emitters=false'] if old else []


def _set_environment() -> None:
    sys.path.insert(0, str(_ROOT))  # the checkout comes before an installed copy, here and in subprocesses
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get('PYTHONPATH')]))
    os.environ['JAX_PLATFORMS'] = 'cpu'
    flags = os.environ.get('XLA_FLAGS', '')
    for flag in (
        '--xla_force_host_platform_device_count=8',
        # Tests compile much and run little. What is about bits asks for the usual code itself (`full_jit`).
        '--xla_backend_optimization_level=0',
        *_older_code_generator(),
    ):
        if flag.partition('=')[0] not in flags:
            flags = f'{flags} {flag}'.strip()
    os.environ['XLA_FLAGS'] = flags
    for name, value in {
        'JAX_COMPILATION_CACHE_DIR': str(_compilation_cache()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
        'OMP_NUM_THREADS': '1',  # arrays are tiny, and workers share the cores: waiting threads would take half the time
        'OPENBLAS_NUM_THREADS': '1',
        'TOKENIZERS_PARALLELISM': 'false',
        'HF_HUB_OFFLINE': '1',  # no test reaches for the network
    }.items():
        os.environ.setdefault(name, value)


_set_environment()


def pytest_collection_finish(session):
    """What is imported by now stays, so the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
