"""Whatever the arguments of `vora` hold, each kind's script hands them over byte for byte, on every host."""

import base64
import os
import random
import shlex
import subprocess
import sys

import pytest
import yaml
from fake_hosts import ARGUMENTS, host, planned, received, xpk_command  # noqa: F401 (a fixture)

from launch import shell
from launch.steps import Command, Ensure, File, Here, show


def file_of(steps, name):
    return next(step.text for step in steps if isinstance(step, File) and step.path.name == name)


def kubernetes(text, variables):
    """What Kubernetes makes of `$$` and `$(NAME)` in a command."""
    out, position = '', 0
    while position < len(text):
        rest = text[position:]
        name = rest[2:].partition(')')[0]
        if rest.startswith('$$'):
            out, position = out + '$', position + 2
        elif rest.startswith('$(') and name in variables:
            out, position = out + variables[name], position + len(name) + 3
        else:
            out, position = out + rest[0], position + 1
    return out


def check(code, output, count=1):
    calls = received(output)
    assert (code, len(calls)) == (0, count), output
    assert all(arguments == ARGUMENTS for arguments, _ in calls), output
    assert not os.path.exists('/tmp/never')
    return [variables for _, variables in calls]


@pytest.mark.parametrize('kind, options', [('tpu-vm', ()), ('queued-resource', ()), ('tpu-vm', ('--env=A=a "b" $(c)\nd',))])
def test_on_tpu_vms(host, kind, options):  # noqa: F811
    steps = planned(kind, '--code=installed', *options)
    folder = host.home / 'my-run'
    folder.mkdir()
    for name in ('worker.sh', 'start.sh', 'follow.sh'):
        (folder / name).write_text(file_of(steps, name))
    group = ('gcloud', 'compute', 'tpus', 'tpu-vm' if kind == 'tpu-vm' else 'queued-resources')
    ssh = [step.argv for step in steps if isinstance(step, Command) and step.argv[:5] == (*group, 'ssh')]
    remote = [word.removeprefix('--command=') for argv in ssh for word in argv if word.startswith('--command=')]
    assert remote == ['mkdir -p my-run', 'bash my-run/start.sh', 'bash my-run/follow.sh']
    code, out = host.run(['bash', '-c', remote[1]])  # returns: gcloud starts a queued resource's hosts 64 at a time
    assert (code, out) == (0, '')
    variables, = check(*host.run(['bash', '-c', remote[2]]))
    assert variables['JAX_PLATFORMS'] == 'tpu,cpu'
    assert (folder / 'status').read_text() == '0\n'


def test_through_xpk_and_kubernetes(host):  # noqa: F811
    argv = next(step.create for step in planned('xpk') if isinstance(step, Ensure))
    assert argv[:3] == ('xpk', 'workload', 'create')
    line = xpk_command(host)
    assert line.isprintable() and '$' not in line  # xpk cuts at line ends, Kubernetes rewrites `$`
    check(*host.run(['bash', '-c', f'({line}) & wait $!']))
    assert base64.b64decode(line.split()[1]).decode() == file_of(planned('xpk'), 'worker.sh')


@pytest.mark.parametrize('index, worker', [(0, 0), (1, 3)])
def test_in_a_jobset(host, index, worker):  # noqa: F811
    documents = list(yaml.safe_load_all(file_of(planned('jobset'), 'jobset.yaml')))
    script, jobset = documents
    pod = jobset['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    container = pod['containers'][0]
    mounted = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
    assert [v['configMap']['name'] for v in pod['volumes'] if v['name'] == 'launch'] == [script['metadata']['name']]
    for name, text in script['data'].items():
        (host.home / name).write_text(text)
    expanded = [kubernetes(word, {'HOME': 'expanded'}) for word in container['command']]
    argv = [word.replace(mounted['launch'], str(host.home)) for word in expanded]
    variables, = check(*host.run(argv, SLICE_INDEX=str(index), JOB_COMPLETION_INDEX=str(worker)))
    assert variables['JAX_PROCESS_ID'] == str(16 * index + worker)
    assert variables['JAX_NUM_PROCESSES'] == '32'
    assert variables['JAX_COORDINATOR_ADDRESS'] == 'my-run-workers-0-0.my-run:8482'


def test_through_skypilot(host):  # noqa: F811
    task = yaml.safe_load(file_of(planned('skypilot', '--code=installed'), 'task.yaml'))
    told = {'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NODE_RANK': '1'}
    variables, = check(*host.run(['bash', '-c', task['run']], **told))
    assert variables['JAX_COORDINATOR_ADDRESS'] == '10.0.0.1:8476'
    assert (variables['JAX_NUM_PROCESSES'], variables['JAX_PROCESS_ID']) == ('2', '1')


def test_through_slurm(host):  # noqa: F811
    steps = planned('slurm', '--code=installed')
    for step in steps:
        if isinstance(step, File):
            path = host.home / step.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text)
    host.program('srun', '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"$@"; "$@"\n')
    batch = str(host.home / 'runs' / 'launch' / 'my-run' / 'job.sbatch')
    check(*host.run(['bash', batch], SLURM_JOB_ID='7'), count=2)


def test_on_this_machine(host, monkeypatch):  # noqa: F811
    monkeypatch.chdir(host.home)
    step, = planned('local')
    assert isinstance(step, Here)
    # As printed, with a program in the place of Python.
    host.program('fake', '#!/bin/bash\nshift 2\nexec vora "$@"\n')
    line = step.text.replace(shlex.quote(sys.executable), 'fake')
    code, _ = host.run(['bash', '-c', line])
    logs = [(host.home / f'runs/launch/my-run/logs/{number}.log').read_text() for number in range(2)]
    assert [v['JAX_PROCESS_ID'] for v in check(code, '\n'.join(logs), count=2)] == ['0', '1']
    # As run.
    monkeypatch.setenv('PATH', host.environment['PATH'])
    (host.bin / 'python').write_text('#!/bin/bash\nshift 2\nexec vora "$@"\n')
    (host.bin / 'python').chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(host.bin / 'python'))
    monkeypatch.setenv('PYTHONUTF8', '1')
    step, = planned('local')
    assert step.run() == 0
    logs = [(host.home / f'runs/launch/my-run/logs/{number}.log').read_text() for number in range(2)]
    check(0, '\n'.join(logs), count=2)


def test_any_text_survives_bash_and_stays_on_one_line():
    source = random.Random()
    characters = [chr(c) for c in range(1, 256)] + ['\u2028', '\ufeff', '日', '\U0001f600', '\udcff', '\udc80']
    words = [''.join(source.choices(characters, k=source.randrange(12))) for _ in range(400)]
    line = shell.join(words)
    assert line.isascii() and line.isprintable()
    out = subprocess.run(['bash', '-c', 'printf "%s\\0" ' + line], stdout=subprocess.PIPE, check=True).stdout
    assert out.split(b'\0')[:-1] == [word.encode('utf-8', 'surrogateescape') for word in words]


def test_what_is_printed_is_what_is_run(host, tmp_path):  # noqa: F811
    """The commands that --dry-run prints, typed into bash, are the lists that would be run."""
    words = ['gcloud', 'a b', "it's", '$(id)', '', 'line\nend', '--x="y"']
    host.program('gcloud', '#!/bin/bash\nprintf "%s\\0" gcloud "$@"\n')
    printed = show([Command(tuple(words))])
    code, out = host.run(['bash', '-c', printed])
    assert (code, out.split('\0')[:-1]) == (0, words)
