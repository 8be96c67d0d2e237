"""The worker's policy: crashes are tried again, mistakes are not, and a stopped run is not taken for a complete one."""

import signal

import pytest
from fake_hosts import host, planned, xpk_command  # noqa: F401 (a fixture)

from launch import worker
from launch.job import Job
from launch.steps import File

# Ends with the codes of the file `codes`, one a call; 'wait' waits for SIGTERM and saves.
TRAINER = """#!/bin/bash
[[ $1 != --version ]] || { echo vora 0; exit; }
read -r code <"$HOME/codes"
sed -i 1d "$HOME/codes"
[[ $code != wait ]] || trap 'echo SAVED; exit 0' TERM
echo "CALLED $code"
if [[ $code == wait ]]; then
    for _ in {1..600}; do /bin/sleep 0.05; done
fi
exit "$code"
"""


@pytest.fixture
def trainer(host):  # noqa: F811
    host.program('vora', TRAINER)
    host.program('sleep', '#!/bin/bash\necho "PAUSE $1"\n')
    return host


def script(trainer, codes, restarts, *arguments):
    (trainer.home / 'codes').write_text('\n'.join(map(str, codes)) + '\n')
    path = trainer.home / 'worker.sh'
    path.write_text(worker.script(Job('a', ('train', *arguments), code='installed'), restarts=restarts))
    return ['bash', str(path)]


@pytest.mark.parametrize('codes, restarts, ends, calls', [
    ([0], 3, 0, 1),
    ([2], 3, 2, 1),  # a user's mistake
    ([130], 3, 130, 1),
    ([1, 134, 0], 3, 0, 3),
    ([75, 134, 137, 0], 3, 0, 4),  # trouble that may pass, and ended by signals
    ([1, 2], 3, 2, 2),
    ([1, 1, 1], 2, 1, 3),
    ([137], 0, 1, 1),  # a scheduler restarts it: 1 is the code that it knows
])
def test_exit_codes(trainer, codes, restarts, ends, calls):
    code, out = trainer.run(script(trainer, codes, restarts))
    assert (code, out.count('CALLED')) == (ends, calls), out


def test_pauses_grow(trainer):
    _, out = trainer.run(script(trainer, [1] * 8, 7))
    assert [line.split()[1] for line in out.splitlines() if line.startswith('PAUSE')] == \
        ['30', '60', '120', '240', '480', '960', '960']


@pytest.mark.parametrize('remote', [False, True])
def test_only_progress_resets_the_count(trainer, remote):
    """Whatever the time: a hang at the start is noticed after hours."""
    steps = trainer.home / 'a run' / 'steps'
    trainer.program('vora', TRAINER.replace('exit "$code"\n', '''
[[ $code != saves* ]] || { mkdir -p "$HOME/a run/steps/${code#saves}"; touch "$HOME/a run/steps/${code#saves}/SHA256.json"; }
exit 1
'''))
    trainer.program('gcloud', f'''#!/bin/bash
[[ "$*" == 'storage ls gs://b/a run/steps/*/SHA256.json' ]] || exit 1
cd '{steps}' && for file in */SHA256.json; do echo "gs://b/a run/steps/$file"; done
''')
    (steps / '99').mkdir(parents=True)  # not finished
    codes = ['1', 'saves8', '1', 'saves10', '1', 'saves9', '1']
    argv = script(trainer, codes, 2, '--workdir', 'gs://b/a run' if remote else str(steps.parent))
    code, out = trainer.run([argv[0], argv[1]])
    assert code == 1
    assert [line.split()[1] for line in out.splitlines() if line.startswith('CALLED')] == codes[:6], out


def test_setup_comes_first_and_its_failure_is_told(trainer):
    for line, ends in (('echo "a  b" >"$HOME/made"', 0), ('false; true', 1)):
        (trainer.home / 'codes').write_text('0\n')
        text = next(s.text for s in planned('tpu-vm', '--code=installed', f'--setup={line}') if isinstance(s, File))
        (trainer.home / 'my-run').mkdir(exist_ok=True)
        (trainer.home / 'my-run' / 'worker.sh').write_text(text)
        code, out = trainer.run(['bash', 'my-run/worker.sh'])
        assert code == ends and ('--setup failed, exit code 1' in out) == bool(ends), out
        assert ('CALLED 0' in out) == (not ends)
    assert (trainer.home / 'made').read_text() == 'a  b\n'


def test_the_worker_knows_a_finished_step():
    from vora_jax.training.checkpoints import checksum
    assert f'/steps/*/{checksum.SIDECAR}' in worker.script(Job('a'))


def test_ctrl_c_is_not_tried_again_by_xpk(trainer):
    for code, ends in (('130', 2), ('0', 0), ('75', 1)):
        (trainer.home / 'codes').write_text(code + '\n')
        assert trainer.run(['bash', '-c', xpk_command(trainer)])[0] == ends


def test_a_missing_trainer_is_a_mistake(trainer):
    (trainer.bin / 'vora').unlink()
    argv = script(trainer, [], 3)
    code, out = trainer.run(argv, PATH=f'{trainer.bin}:/usr/bin:/bin')
    assert code == 2 and 'vora does not start here' in out


@pytest.mark.parametrize('number, ends', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_and_is_not_complete(trainer, number, ends):
    process = trainer.start(script(trainer, ['wait', 0], 3))
    lines = iter(process.stdout.readline, '')
    assert any('CALLED wait' in line for line in lines)
    process.send_signal(number)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == ends and 'SAVED' in out and 'CALLED' not in out


def test_a_worker_goes_on_without_its_launcher_and_is_followed_again(trainer):
    folder = trainer.home / 'my-run'
    folder.mkdir()
    for step in planned('tpu-vm', '--code=installed'):
        if isinstance(step, File):
            (folder / step.path.name).write_text(step.text)
    (trainer.home / 'codes').write_text('wait\n')
    assert trainer.run(['bash', 'my-run/start.sh']) == (0, '')
    first = trainer.start(['bash', 'my-run/follow.sh'])
    assert any('CALLED wait' in line for line in iter(first.stdout.readline, ''))
    first.kill()  # the connection breaks
    first.wait()
    assert trainer.run(['bash', 'my-run/start.sh']) == (0, '')
    second = trainer.start(['bash', 'my-run/follow.sh'])
    assert any('CALLED wait' in line for line in iter(second.stdout.readline, ''))  # the same one: codes has one line
    kept = (folder / 'worker.sh').read_text()
    (folder / 'worker.sh').write_text(kept + '# another command\n')
    code, out = trainer.run(['bash', 'my-run/start.sh'])
    assert code == 2 and 'still runs another command; stop it first' in out
    assert trainer.run(['bash', '-c', 'kill -TERM "$(cat my-run/pid)"'])[0] == 0
    out = second.communicate(timeout=30)[0]
    assert second.returncode == 143 and 'SAVED' in out


@pytest.mark.parametrize('code, restarts, stopped, ends, queued', [
    (0, 0, False, 0, False), (2, 0, False, 2, False), (1, 0, False, 1, True), (143, 3, False, 143, True),
    (1, 10, False, 1, False), (143, 0, True, 0, False),
    (75, 0, False, 75, True), (134, 0, False, 134, True), (137, 0, False, 137, True), (130, 0, False, 130, False),
])
def test_slurm_queues_again(trainer, code, restarts, stopped, ends, queued):
    for step in planned('slurm', '--code=installed'):
        if isinstance(step, File):
            path = trainer.home / step.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text)
    folder = trainer.home / 'runs' / 'launch' / 'my-run'
    stop = f'touch {folder}/stop' if stopped else ''
    trainer.program('srun', f'#!/bin/bash\necho "SRUN $1"\n{stop}\nexit {code}\n')
    trainer.program('scontrol', '#!/bin/bash\necho "QUEUED $*"\n')
    variables = {'SLURM_JOB_ID': '7'} | ({'SLURM_RESTART_COUNT': str(restarts)} if restarts else {})
    ended, out = trainer.run(['bash', str(folder / 'job.sbatch')], **variables)
    assert (ended, 'QUEUED requeue 7' in out) == (ends, queued), out
    assert 'SRUN --cpus-per-task=3' in out
    (folder / 'stop').write_text('')
    ended, out = trainer.run(['bash', str(folder / 'job.sbatch')], **variables)
    assert ended == 0 and 'SRUN' not in out and 'QUEUED' not in out  # it was stopped while it waited in the queue


def test_slurm_stops_what_waits_and_what_runs():
    mark, *cancels = planned('slurm', action='stop')
    assert mark.path.name == 'stop'  # before anything is cancelled, so that nothing starts again
    assert [step.argv[3:] for step in cancels] == [('--state=PENDING',), ('--state=RUNNING', '--signal=TERM')]


def test_the_code_is_installed_once_for_each_version(trainer):
    """With a Python that only makes folders: no network."""
    trainer.program('python3.13', '#!/bin/bash\n[[ $1 == -c ]] && exit\n[[ "$1 $2" == "-m venv" ]] && mkdir -p "$3/bin" && '
                                  'cp "$0" "$3/bin/python" && exit\necho "INSTALLS $*"\n')
    folder = trainer.home / 'my-run'
    folder.mkdir()
    (trainer.home / 'setup.cfg').write_text('[metadata]\n')
    text = next(step.text for step in planned('tpu-vm') if isinstance(step, File) and step.path.name == 'worker.sh')
    (folder / 'worker.sh').write_text(text)
    (trainer.home / 'codes').write_text('0\n0\n0\n')
    seen = []
    for version in ('a', 'a', 'b'):
        (trainer.home / 'setup.cfg').write_text(version)
        pack = ['tar', '--mtime=2026-01-01', '--owner=0', '-czf', 'my-run/code.tar.gz', 'setup.cfg']
        assert trainer.run(pack, GZIP='-n')[0] == 0
        code, out = trainer.run(['bash', 'my-run/worker.sh'])
        assert code == 0, out
        seen.append(out.count('INSTALLS'))
    assert seen == [1, 0, 1]
    # On SLURM's login node, in this very folder.
    steps = planned('slurm')
    names = [step.path.name if isinstance(step, File) else step.argv[0] for step in steps]
    assert names.index('install.sh') < names.index('bash') < names.index('sbatch')
    install, = (step for step in steps if isinstance(step, File) and step.path.name == 'install.sh')
    (trainer.home / 'pyproject.toml').write_text('')
    (trainer.home / install.path).parent.mkdir(parents=True)
    (trainer.home / install.path).write_text(install.text)
    assert ['INSTALLS' in trainer.run(['bash', str(install.path)])[1] for _ in range(2)] == [True, False]
    assert 'code[tpu,remote,parquet]' in out
