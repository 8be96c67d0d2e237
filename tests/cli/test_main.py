"""The console command: verbs, mistakes, exit codes."""

import subprocess
import sys
import time
import types

import pytest

from vora_jax.cli import main as cli
from vora_jax.types import UserError


def verb(run):
    """A verb module that takes one optional argument."""
    return types.SimpleNamespace(
        HELP='does things',
        EXAMPLE='vora train x.gin',
        run=run,
        add_arguments=lambda parser: parser.add_argument('config', nargs='?'),
    )


@pytest.fixture
def install(monkeypatch):
    """Puts a verb module in the place of `train`."""

    def put(module):
        monkeypatch.setitem(sys.modules, 'vora_jax.cli.train', module)

    return put


def failing(error):
    def run(args):
        raise error

    return run


def test_help_is_quick_and_imports_no_heavy_module():
    script = (
        "import sys; from vora_jax.cli.main import main; code = main(['--help']);"
        "sys.exit(code or any(m in sys.modules for m in ('jax', 'gin', 'numpy', 'torch')))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.VERBS)
    assert min(seconds) < 0.3, seconds


def test_no_verb_shows_the_overview(capsys):
    assert cli.main([]) == 2
    assert 'verbs:' in capsys.readouterr().out


def test_an_unknown_verb_is_one_sentence(capsys):
    assert cli.main(['trian']) == 2
    assert capsys.readouterr().err == "vora: there is no verb 'trian'; did you mean 'train'?\n"
    assert cli.main(['xyz']) == 2
    assert 'there are prepare, train' in capsys.readouterr().err


def test_gin_arguments_reach_the_verb_wherever_they_stand(install):
    seen = []
    install(verb(lambda args: seen.append(args)))
    assert cli.main(['train', '--gin.vora.rank=64', 'x.gin', '--gin_file', 'y.gin']) == 0
    assert (seen[0].config, seen[0].gin_files, seen[0].gin_bindings) == ('x.gin', ['y.gin'], ['vora.rank=64'])


def test_every_verb_gets_empty_lists_without_gin_arguments(install):
    seen = []
    install(verb(lambda args: seen.append(args)))
    assert cli.main(['train']) == 0
    assert (seen[0].gin_files, seen[0].gin_bindings) == ([], [])


def test_a_verb_without_gin_refuses_gin_arguments(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'vora_jax.cli.merge', verb(lambda args: 0))
    assert cli.main(['merge', '--gin.vora.rank=64']) == 2
    assert 'merge takes no --gin arguments' in capsys.readouterr().err


def test_exit_codes(install, capsys):
    install(verb(lambda args: 3))
    assert cli.main(['train']) == 3
    install(verb(failing(UserError('x.gin:1: no.'))))
    assert cli.main(['train']) == 2
    assert capsys.readouterr().err == 'vora: x.gin:1: no.\n'
    install(verb(failing(KeyboardInterrupt())))
    assert cli.main(['train']) == 130
    assert capsys.readouterr().err == 'vora: interrupted.\n'


def test_other_errors_keep_their_traceback(install):
    install(verb(failing(ZeroDivisionError())))
    with pytest.raises(ZeroDivisionError):
        cli.main(['train'])


def test_a_closed_pipe_is_quiet():
    script = (
        "import sys, types; m = types.SimpleNamespace(HELP='', EXAMPLE='', add_arguments=lambda p: None,"
        "run=lambda a: [print('x' * 80) for _ in range(20000)] and 0); sys.modules['vora_jax.cli.train'] = m;"
        "from vora_jax.cli.main import main; sys.exit(main(['train']))"
    )
    with subprocess.Popen(
        [sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 141


def test_a_verb_that_is_not_there_yet(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, 'nothing', 'is not there')
    assert cli.main(['nothing']) == 2
    assert "no 'nothing' yet" in capsys.readouterr().err


def test_help_of_a_verb_shows_an_example(install, capsys):
    install(verb(lambda args: 0))
    with pytest.raises(SystemExit) as stop:
        cli.main(['train', '--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert 'example:\n  vora train x.gin' in out and '--gin.NAME=VALUE' in out


@pytest.mark.parametrize('name', cli.VERBS)
def test_help_of_every_verb_shows_an_example(name, capsys):
    try:
        cli._import(name)
    except UserError as error:
        pytest.skip(str(error))
    with pytest.raises(SystemExit) as stop:
        cli.main([name, '--help'])
    assert stop.value.code == 0
    assert f'\n  vora {name} ' in capsys.readouterr().out
