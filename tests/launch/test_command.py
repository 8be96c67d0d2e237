"""The command line: mistakes in one sentence, dry runs that run nothing, names and flags that are checked."""

import importlib.util
import os
import pathlib
import random
import re
import shlex
import subprocess

import pytest
import yaml
from fake_hosts import KINDS, planned

from launch import __main__ as command
from launch import flags, topology, yaml_text
from launch.job import Job
from launch.steps import run
from vora_jax.types import UserError

TRAIN = ['--', 'train', 'configs/quickstart/lm.gin', '--workdir', 'gs://b/r']


@pytest.mark.parametrize('kind', KINDS)
def test_a_dry_run_prints_all_and_runs_nothing(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', '')
    actions = command.module(kind).ACTIONS
    for action in actions:
        assert command.main([kind, action, '--name=a-1', *KINDS[kind], '--code=installed', '--dry-run', *TRAIN]) == 0
        out = capsys.readouterr().out
        assert out.strip(), action
        assert (tmp_path / 'runs').exists() is False
    command.main([kind, '--name=a-1', *KINDS[kind], '--code=installed', '--dry-run', *TRAIN])
    assert 'train configs/quickstart/lm.gin' in capsys.readouterr().out


@pytest.mark.parametrize('words, sentence', [
    (['tpu-vm', '--name=My Run', '--zone=z', *TRAIN], "--name 'My Run' would be refused"),
    (['tpu-vm', '--name=' + 'a' * 41, '--zone=z', *TRAIN], 'would be refused'),
    (['tpu-vm', '--name=a-', '--zone=z', *TRAIN], 'would be refused'),
    (['tpu-vm', '--name=a', '--zone=z'], 'what to run goes after --'),
    (['tpu-vm', '--name=a', '--zone=z', '--', 'trian', 'x'], 'a verb of vora first (prepare, train'),
    (['tpu-vm', '--name=a', '--zone=z', '--', 'train', 'no.gin', '--workdir=/w'], "no file 'no.gin' in this folder"),
    (['tpu-vm', '--name=a', '--zone=z', *TRAIN, '--gin_file', 'no.gin'], "no file 'no.gin' in this folder"),
    (['tpu-vm', '--name=a', '--zone=z', *TRAIN, '--gin_file=no.gin'], "no file 'no.gin' in this folder"),
    (['local', '--name=a', *TRAIN[:-2]], 'train needs --workdir'),
    (['local', '--name=a', '--', 'train', '--workdir=w'], 'train needs a configuration'),
    (['local', '--name=a', '--', 'train', '--gin_file', 'x.gin', '--workdir=w'], 'train needs a configuration'),
    (['local', '--name=a', *TRAIN[1:]], "-- is missing in front of 'train'"),
    (['tpu-vm', 'run', '--zone', 'z', '--name=a', '--dry-run', 'train'], "-- is missing in front of 'train'"),
    (['tpu-vm', 'logs', '--name=a', '--zone=z'], 'logs needs --topology'),
    (['queued-resource', 'logs', '--name=a', '--zone=z'], 'logs needs --topology'),
    (['tpu-vm', '--name=a', '--zone=z', '--topology=v5e:3x4', *TRAIN], 'there is no such slice of v5e'),
    (['jobset', '--name=a', '--topology=v5e:32x32', *TRAIN], 'there is no such slice of v5e'),
    (['jobset', '--name=a', '--topology=v5p:4x4x5', *TRAIN], 'there is no such slice of v5p'),
    (['jobset', '--name=a', '--topology=v5p:32x32x32', *TRAIN], 'there is no such slice of v5p'),
    (['slurm', '--name=a', '--nodes=2', '--cpus-per-task=0', *TRAIN], '--cpus-per-task must be 1 or more'),
    (['local', '--name=a', '--env=HF_TOKEN=x', *TRAIN], 'looks like a secret'),
    (['local', '--name=a', '--env=DB_PASSWORD=x', *TRAIN], 'looks like a secret'),
    (['tpu-vm', '--name=a', '--zone=z', '--code=git+https://gh-s3cret@h/r', *TRAIN], '--code: the URL names a user'),
    (['tpu-vm', '--name=a', '--zone=z', '--code=git+https://me:gh-s3cret@h/r@v1', *TRAIN], 'names a user or a token'),
    (['tpu-vm', '--name=a', '--zone=z', '--code=https://me:gh-s3cret@h/r@v1', *TRAIN], 'names a user or a token'),
    (['tpu-vm', '--name=a', '--zone=z', *TRAIN[:-1], 'runs/x'], "--workdir 'runs/x' would be a folder of each host alone"),
    (['tpu-vm', '--name=a', '--zone=z', *TRAIN[:-2], '--workdir=runs/x'], 'would be a folder of each host alone'),
    (['tpu-vm', 'create', '--name=a', '--zone=z'], 'create needs --topology'),
    (['tpu-vm', '--name=a', '--zone=z', '--topology=v9:8', *TRAIN], "--topology 'v9:8' is no TPU slice"),
    (['tpu-vm', '--name=a', '--zone=z', '--topology=v5p:8x8', *TRAIN], 'a v5p has 3 axes'),
    (['tpu-vm', '--name=a', '--zone=z', '--topology=v5p:2x4x8', *TRAIN], 'v5p-128 is built as v5p:4x4x4, not v5p:2x4x8'),
    (['jobset', '--name=a', '--topology=v5e:8x8', '--code=checkout', *TRAIN], 'containers do not see this folder'),
    (['jobset', '--name=a', '--topology=v5e:8x8', *TRAIN], '--image is missing'),
    (['jobset', '--name=a', '--topology=v5e:8x8', '--slices=0', *TRAIN], '--slices must be 1 or more'),
    (['skypilot', '--name=a', '--gpus=H100', *TRAIN], "--gpus 'H100' is not KIND:NUMBER"),
    (['skypilot', '--name=a', '--topology=v5e:8x8', '--nodes=2', *TRAIN], '--nodes is 1 or more'),
    (['slurm', '--name=a', '--nodes=2', '--sbatch=x; rm', *TRAIN], 'is no long option'),
    (['slurm', '--name=a', '--nodes=2', '--tpu-flags=overlap', *TRAIN], '--tpu-flags overlap is for TPUs'),
    (['local', '--name=a', '--env=A', *TRAIN], "--env 'A' is not NAME=VALUE"),
    (['local', '--name=a', '--env=JAX_PROCESS_ID=3', *TRAIN], 'the launcher or the cluster sets it'),
    (['local', '--name=a', '--env=WANDB_API_KEY=x', *TRAIN], 'looks like a secret'),
    (['tpu-vm', '--name=a', '--zone=z', '--env=LIBTPU_INIT_ARGS=-x', *TRAIN], "has '-x', which is not --name=value"),
    (['local', '--name=a', '--code=http://x', *TRAIN], "--code 'http://x' is not"),
    (['local', '--name=a', '--processes=0', *TRAIN], '--processes and --devices must be 1 or more'),
    (['local', '--name=a', '--setup=true', *TRAIN], '--setup: local starts on this machine'),
    (['local', '--name=a', '--max-restarts=-1', *TRAIN], '--max-restarts must be 0 or more'),
])
def test_a_mistake_is_told_in_one_sentence(words, sentence, capsys):
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count('\n') == 1 and error.startswith('launch: ')
    assert 's3cret' not in error


def test_a_missing_program_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert command.main(['tpu-vm', 'stop', '--name=a', '--zone=z']) == 2
    assert 'gcloud is not installed here' in capsys.readouterr().err


@pytest.mark.parametrize('text, gcloud, hosts, chips', [
    ('v5e:1x1', 'v5litepod-1', 1, 1), ('v5e:2x4', 'v5litepod-8', 1, 8), ('v5e:8x8', 'v5litepod-64', 16, 64),
    ('v5e:16x16', 'v5litepod-256', 64, 256), ('v6e:4x8', 'v6e-32', 8, 32), ('v5p:2x2x1', 'v5p-8', 1, 4),
    ('v5p:4x4x4', 'v5p-128', 16, 64), ('v5p:4x4x8', 'v5p-256', 32, 128), ('v5p:8x8x8', 'v5p-1024', 128, 512),
    ('v4:2x2x4', 'v4-32', 4, 16),
])
def test_topologies(text, gcloud, hosts, chips):
    tpus = topology.parse(text).by_count()
    assert (tpus.accelerator_type, tpus.hosts, tpus.chips) == (gcloud, hosts, chips)


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu (extra `plan`)')
def test_libtpu_knows_our_flags():
    known = [flag for group in flags.TPU_FLAGS.values() for flag in group]
    assert flags.libtpu_complaint(' '.join(known)) == ''
    with pytest.raises(UserError, match="libtpu refuses LIBTPU_INIT_ARGS .Unknown command line flag 'xla_tpu_colective'"):
        flags.environment('tpu', ['overlap'], ['LIBTPU_INIT_ARGS=--xla_tpu_colective=true'])


def test_flags_reach_the_hosts(monkeypatch):
    monkeypatch.setattr(flags, 'libtpu_complaint', lambda text: '')  # it takes a second
    variables = dict(flags.environment('tpu', ['overlap', 'slices'], ['A=b=c']))
    assert variables['A'] == 'b=c'
    assert variables['LIBTPU_INIT_ARGS'].split() == [*flags.TPU_FLAGS['overlap'], *flags.TPU_FLAGS['slices']]


def test_a_user_mistake_ends_a_jobset_and_a_crash_does_not():
    text = next(step.text for step in planned('jobset', '--max-restarts=7', '--grace-seconds=99') if hasattr(step, 'text'))
    spec = list(yaml.safe_load_all(text))[1]['spec']
    job = spec['replicatedJobs'][0]['template']['spec']
    assert spec['failurePolicy']['maxRestarts'] == 7
    assert spec['failurePolicy']['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
    assert job['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2, 130]
    assert job['backoffLimit'] == 0 and job['template']['spec']['restartPolicy'] == 'Never'  # what podFailurePolicy asks for
    assert job['template']['spec']['terminationGracePeriodSeconds'] == 99


def test_logs_of_every_worker_have_a_file():
    steps = planned('jobset', action='logs')
    assert len({step.output for step in steps if step.output}) == 2 * 16
    assert steps[0].argv == ('mkdir', '-p', 'runs/launch/my-run/logs')


@pytest.mark.parametrize('kind, hosts', [('tpu-vm', 16), ('queued-resource', 2 * 16)])
def test_logs_of_every_host_have_a_file(kind, hosts, monkeypatch, tmp_path, capfd):
    (tmp_path / 'gcloud').write_text('#!/bin/sh\nfor word; do case $word in --node=*|--worker=*) echo "$word";; esac; done\n'
                                     '[ "$word" != --command=cat ]\n')
    (tmp_path / 'gcloud').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    monkeypatch.chdir(tmp_path)
    assert run(planned(kind, action='logs'), '') == 0
    found = {path.name: path.read_text().split() for path in (tmp_path / 'runs/launch/my-run/logs').iterdir()}
    assert len(found) == hosts
    if kind == 'tpu-vm':
        assert found['15.log'] == ['--worker=15']
    else:
        assert found['1-15.log'] == ['--node=1', '--worker=15']


def test_words_that_are_no_secrets(capsys):
    assert command.main(['local', '--name=a', '--env=TOKENIZERS_PARALLELISM=0', '--dry-run', *TRAIN]) == 0
    assert 'TOKENIZERS_PARALLELISM=0' in capsys.readouterr().out
    for way in ('git+ssh://git@h/r@v1', 'git+git@h:me/r.git@v1', 'git+https://h/r@v1'):
        assert command.main(['tpu-vm', '--name=a', '--zone=z', f'--code={way}', '--dry-run', *TRAIN]) == 0
    assert Job('a', code='git+git@h:me/r.git@v1').git == ('git@h:me/r.git', 'v1')


def test_only_what_is_committed_is_sent(tmp_path, monkeypatch, capsys):
    def git(*words):
        subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words], check=True, stdout=subprocess.DEVNULL)

    def refused(*more):
        words = ['train', 'c/a.gin', '--workdir=/w', *more]
        assert command.main(['tpu-vm', '--name=a', '--zone=z', '--dry-run', '--', *words]) in (0, 2)
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'a.gin').write_text("include '../b.gin'\n")
    (tmp_path / 'b.gin').write_text('A.b = 1\n')
    (tmp_path / 'd.gin').write_text('A.b = 1\n')
    assert 'git finds none here' in refused()
    git('init', '-q')
    git('add', 'c')
    git('commit', '-q', '-m', 'a')
    assert 'b.gin is not in the last commit' in refused()
    git('add', 'b.gin')
    git('commit', '-q', '-m', 'b')
    assert refused() == ''
    assert 'd.gin is not in the last commit' in refused('--gin_file', 'd.gin')
    (tmp_path / 'b.gin').write_text('A.b = 2\n')
    assert 'b.gin is not what the last commit has' in refused()
    assert command.main(['slurm', '--name=a', '--nodes=1', '--dry-run', '--', 'train', 'c/a.gin', '--workdir=/w']) == 0


def test_a_ref_of_git():
    assert Job('a', code='git+https://h/r.git@v1.2').git == ('https://h/r.git', 'v1.2')
    assert Job('a', code='git+https://h/r').git == ('https://h/r', 'HEAD')
    with pytest.raises(UserError, match='is not'):
        Job('a', code='git+https://h/r@$(id)')


def test_yaml_is_read_back():
    source = random.Random()
    characters = ' \n\t:#-{}[]&*!|>\'"%@`$\\abcé\u2028\r0~'

    def value(depth):
        kind = source.randrange(8 if depth else 5)
        text = ''.join(source.choices(characters, k=source.randrange(12)))
        if kind > 5:
            return {f'{text}{i}': value(depth - 1) for i in range(source.randrange(4))}
        if kind == 5:
            return [value(depth - 1) for _ in range(source.randrange(4))]
        words = source.choice(['no', 'a-b', 'on', '1e3'])
        return [text, text + '\nx\n', source.randrange(-9, 9), source.choice([True, False]), words][kind]

    for _ in range(300):
        wanted = value(4)
        assert yaml.safe_load(yaml_text.dump(wanted)) == wanted


def test_the_readme_is_of_this_version():
    """Every command line of launch/README.md is understood, and every kind and action is named."""
    text = (pathlib.Path(command.__file__).parent / 'README.md').read_text()
    lines = re.findall(r'^ {4}(python -m launch (?:.*\\\n)*.*)', text, re.M)
    seen = set()
    for line in lines:
        words = shlex.split(line.replace('\\\n', ' '))[3:]
        args = command.parser().parse_args(words[:words.index('--')] if '--' in words else words)
        seen.add(args.kind)
    assert seen == set(command.KINDS)
