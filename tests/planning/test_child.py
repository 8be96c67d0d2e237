"""Child processes that stand for the compiler."""
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from vora_jax.planning import child
from vora_jax.types import UserError

DUMPS = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / 'dump').mkdir()
def dump(ending, text):
    (folder / 'dump' / f'module_0000.jit_step.after_optimizations-{ending}').write_text(text)
"""


def run(tmp_path, script, quick=False, timeout=20.0, **options):
    script = textwrap.dedent(script)
    return child.run([sys.executable, '-c', script, str(tmp_path)], dict(os.environ), tmp_path, quick, timeout, **options)


def test_it_is_killed_once_the_reports_are_written(tmp_path):
    seen = []
    done = run(tmp_path, DUMPS + """
dump('memory-usage-report.txt', 'x')
time.sleep(0.5)
dump('live-range.txt', 'y' * 100)
time.sleep(60)
""", quick=True, progress=seen.append)
    assert not done.complete and 0.5 < done.seconds < 15 and seen == sorted(seen) and seen
    assert done.cpu_seconds > 0 and done.rss_bytes > 2**20


def test_it_runs_to_its_end(tmp_path):
    done = run(tmp_path, DUMPS + """
dump('memory-usage-report.txt', 'x')
dump('live-range.txt', 'y')
time.sleep(1)
(folder / 'result.json').write_text('{"peak_bytes": 5}')
""")
    assert done.complete and child.read_json(tmp_path / 'result.json') == {'peak_bytes': 5}
    assert child.read_json(tmp_path / 'other.json') == {}


def test_mistakes_crashes_and_time(tmp_path):
    with pytest.raises(UserError, match='^Mesh: too large.$'):
        run(tmp_path, "import sys; print('warning', file=sys.stderr); sys.exit('vora: Mesh: too large.' if 0 else "
                      "(print('vora: Mesh: too large.', file=sys.stderr), 2)[1])")
    with pytest.raises(RuntimeError, match='code -11.*?\n.*last words'):
        run(tmp_path, "import os, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)")
    begun = time.monotonic()
    with pytest.raises(UserError, match='within 1 s; give it more with --timeout'):
        run(tmp_path, 'import time; time.sleep(60)', timeout=1.0)
    assert time.monotonic() - begun < 15


def test_ctrl_c_takes_the_child_along(tmp_path):
    def interrupt(seconds):
        if (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); "
                      'time.sleep(60)', progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'pid').read_text()), 0)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_being_ended_takes_the_child_along(number, tmp_path):
    """The caller gets the code of its signal, and its handler back."""
    before = signal.getsignal(number)

    def end(seconds):
        if (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text():
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); "
                      'time.sleep(60)', progress=end)
    assert ended.value.code == 128 + number and signal.getsignal(number) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'pid').read_text()), 0)


def test_a_killed_parent_takes_the_child_along(tmp_path):
    beats = tmp_path / 'beats'
    script = ("import os, time; from vora_jax.planning.child import end_with_parent; end_with_parent(); "
              "out = open('beats', 'ab', 0)\nfor _ in range(1200):\n    out.write(b'.'); time.sleep(0.05)")
    parent = subprocess.Popen([sys.executable, '-c', 'import os, pathlib, sys; from vora_jax.planning import child; '
                               'child.run([sys.executable, "-c", sys.argv[1]], dict(os.environ), '
                               'pathlib.Path(sys.argv[2]), False, 60.0)', script, str(tmp_path)])
    deadline = time.monotonic() + 50
    while not beats.exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    before = -1
    while beats.stat().st_size > before:  # not by its number: without an `init` a dead orphan keeps that
        assert time.monotonic() < deadline
        before = beats.stat().st_size
        time.sleep(2)


def test_xla_writes_into_a_folder_with_a_space(tmp_path):
    """The child runs there; the user's own flags stay."""
    folder = tmp_path / 'a b'
    folder.mkdir()
    flags = child.dump_flags('--xla_force_host_platform_device_count=3')
    script = ("import jax\ndef step(x):\n    return x + 1\njax.config.update('jax_enable_compilation_cache', False)\n"
              'jax.jit(step)(1.0)\nopen("result.json", "w").write(str(jax.device_count()))')
    child.run([sys.executable, '-c', script], os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}, folder, False, 60.0)
    assert (folder / 'result.json').read_text() == '3' and list((folder / child.DUMP).glob('*jit_step*'))
