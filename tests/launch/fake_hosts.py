"""Runs generated scripts on this machine, with programs that are not what they seem."""

import json
import os
import pathlib
import subprocess

import pytest

from launch import __main__ as command
from launch.steps import Ensure

TAIL = ['--gin.Train.steps=3', '--gin_bindings', "Data.name = 'it''s; \"x\" $(touch /tmp/never) `id`'\nTrain.steps = 4"]
# Everything that a shell, YAML or Kubernetes might take for its own.
ARGUMENTS = [
    'train',
    'configs/quickstart/lm.gin',
    '--workdir',
    'gs://bucket/my "first" run, it\'s $HOME $$ $(HOME) $(id) ${PATH} %t # no; & | > < * ? ~ {a,b} !x \\ \\n',
    *TAIL,
    '',
    ' - leading: space\t',
    'é\u2028ü\r\nline\x1b\x7f',
    '--',
    '-',
    "'",
    '"',
    '\\',
]

KINDS = {
    'local': [],
    'tpu-vm': ['--zone=z', '--topology=v5e:8x8'],
    'queued-resource': ['--zone=z', '--topology=v5p:4x4x4', '--slices=2', '--spot'],
    'xpk': ['--cluster=c', '--project=p', '--zone=z', '--topology=v5e:4x4', '--image=i'],
    'jobset': ['--topology=v6e:8x8', '--slices=2', '--image=i'],
    'skypilot': ['--gpus=H100:8', '--nodes=2'],
    'slurm': ['--nodes=2', '--gpus=2', '--cpus-per-task=3'],
}

# Prints its arguments, and the processes that it was told of; `--version` apart.
VORA = """#!/usr/bin/env -S python3 -S
import json, os, sys
if sys.argv[1:] == ['--version']:
    print('vora 0')
else:
    variables = {name: value for name, value in os.environ.items() if name.startswith('JAX_')}
    print('RECEIVED ' + json.dumps([sys.argv[1:], variables]), flush=True)
"""


def planned(kind, *options, arguments=ARGUMENTS, action='run'):
    """The steps that a command line leads to."""
    words = [kind, action, '--name=my-run', *KINDS[kind], *options]
    args = command.parser().parse_args(words)
    return command.plan(args, tuple(arguments))


@pytest.fixture
def host(tmp_path):
    """A host: `host.run(script)` runs a bash script in its home, where `host.program(name, text)` puts programs."""
    return Host(tmp_path)


class Host:
    def __init__(self, root):
        self.home, self.bin = pathlib.Path(root, 'home'), pathlib.Path(root, 'bin')
        for folder in (self.home, self.bin):
            folder.mkdir()
        self.environment = {
            'HOME': str(self.home), 'PATH': f'{self.bin}:{os.environ["PATH"]}', 'LC_ALL': 'C.UTF-8', 'PYTHONUTF8': '1'
        }
        self.program('vora', VORA)

    def program(self, name, text):
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, argv, **variables):
        return subprocess.Popen(argv, cwd=self.home, env=self.environment | variables, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, argv, **variables):
        done = self.start(argv, **variables)
        out, _ = done.communicate(timeout=60)
        return done.returncode, out


def xpk_command(host):
    """What xpk runs in a container, with its script in the host's home: the tests share one /tmp."""
    create = next(step.create for step in planned('xpk') if isinstance(step, Ensure))
    line = next(word for word in create if word.startswith('--command=')).removeprefix('--command=')
    path = line.split()[-1]
    assert path.startswith('/tmp/')
    return line.replace(path, str(host.home / 'script.sh'))


def received(output):
    """What `vora` was given: its arguments and variables, of each call."""
    return [json.loads(line.removeprefix('RECEIVED ')) for line in output.splitlines() if line.startswith('RECEIVED ')]
