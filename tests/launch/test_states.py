"""What is there already is used, waited for, or replaced, by its state; the printed bash does the same."""

import pytest
from fake_hosts import host, planned  # noqa: F401 (a fixture)

from launch import steps
from launch.steps import Ensure
from vora_jax.types import UserError

# Answers questions (describe, get) from the file `states`, one a call, an empty line for nothing; notes its other calls.
TOOL = """#!/bin/bash
case " $* " in
    *' describe '* | *' get '*)
        read -r state <"$HOME/states"
        sed -i 1d "$HOME/states"
        [[ -n $state ]] || exit 1
        echo "$state" ;;
    *' create '* | *' apply '*) echo create >>"$HOME/called" ;;
    *' delete '*) echo delete >>"$HOME/called" ;;
esac
"""



@pytest.fixture
def cloud(host, monkeypatch):  # noqa: F811
    for name in ('gcloud', 'kubectl', 'xpk'):
        host.program(name, TOOL)
    host.program('sleep', '#!/bin/bash\n')
    monkeypatch.setenv('PATH', host.environment['PATH'])
    monkeypatch.setenv('HOME', str(host.home))
    monkeypatch.setattr(steps.time, 'sleep', lambda seconds: None)
    return host


@pytest.mark.parametrize('kind, states, called', [
    ('tpu-vm', [''], ['create']),
    ('tpu-vm', ['READY'], []),
    ('tpu-vm', ['PREEMPTED'], ['delete', 'create']),
    ('tpu-vm', ['TERMINATED'], ['delete', 'create']),
    ('tpu-vm', ['CREATING', 'CREATING', 'READY'], []),
    ('tpu-vm', ['DELETING', ''], ['create']),
    ('tpu-vm', ['STOPPED'], None),
    ('queued-resource', [''], ['create']),
    ('queued-resource', ['WAITING_FOR_RESOURCES'], []),
    ('queued-resource', ['ACTIVE'], []),
    ('queued-resource', ['SUSPENDING', 'SUSPENDED'], ['delete', 'create']),
    ('queued-resource', ['FAILED'], ['delete', 'create']),
    *((kind, *case) for kind in ('jobset', 'xpk') for case in [
        ([''], ['create']),
        (['SAME'], []),
        (['StartupPolicyCompleted SAME'], []),
        (['Completed SAME'], ['delete', 'create']),
        (['StartupPolicyCompleted Failed other'], ['delete', 'create']),
        (['other'], None),
    ]),
])
def test_what_is_there_already(cloud, kind, states, called):
    topology = ['--topology=v5e:8x8'] if kind == 'tpu-vm' else []
    step, = (one for one in planned(kind, '--code=installed', *topology) if isinstance(one, Ensure))
    text = '\n'.join(states).replace('SAME', step.same) + '\n'

    def calls():
        path = cloud.home / 'called'
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    (cloud.home / 'states').write_text(text)
    if called is None:
        with pytest.raises(UserError, match='which only you can decide about|runs another command'):
            steps.run([step], '')
    else:
        assert steps.run([step], '') == 0
    assert calls() == (called or [])
    (cloud.home / 'states').write_text(text)
    _, out = cloud.run(['bash', '-c', steps.show([step])])
    assert calls() == (called or []), out
    assert (cloud.home / 'states').read_text() == ''


def test_other_arguments_are_another_command():
    for kind in ('jobset', 'xpk'):
        marks = []
        for more in ((), (), ('--gin.A.b=1',)):
            planned_steps = planned(kind, arguments=['train', 'c.gin', '--workdir=/w', *more])
            marks += [step.same for step in planned_steps if isinstance(step, Ensure)]
        assert marks[0] == marks[1] != marks[2]


def test_xpk_deletes_the_run_and_not_the_cluster():
    assert [step.argv[1:3] for step in planned('xpk', action='delete')] == [('workload', 'delete')]
    assert [step.argv[1:3] for step in planned('xpk', action='delete-cluster')] == [('cluster', 'delete')]
