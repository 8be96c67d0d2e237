"""Puts what the launchers make before tools that know the formats."""

import json
import os
import pathlib
import subprocess
import sys

from launch import __main__ as command
from launch import steps
from launch.shell import join

# Spaces, quotes, and what shells and Kubernetes would take for their own.
ARGUMENTS = (
    'train',
    'configs/quickstart/lm.gin',
    '--workdir',
    'gs://bucket/my "first" run, it\'s $(id) $$ `id`; #',
    '--gin_bindings',
    'Train.steps = 3\nTrain.seed = 4',
    '',
)
TRAIN = ('run', '--', *ARGUMENTS)
LINES = {
    'tpu-vm': ('--zone=us-east5-a', '--topology=v5e:8x8', '--project=p', '--spot', '--service-account=a@b.c'),
    'queued-resource': ('--zone=us-east5-a', '--topology=v5p:4x4x4', '--slices=2', '--spot', '--valid-for=6h'),
    'xpk': ('--cluster=c', '--project=p', '--zone=us-east5-a', '--topology=v5e:8x8', '--slices=2', '--image=i:1'),
    'jobset': ('--topology=v6e:8x8', '--slices=2', '--image=i:1', '--service-account=trainer', '--spot'),
    'skypilot': ('--gpus=H100:8', '--nodes=2', '--infra=gcp/us-east5'),
    'slurm': ('--nodes=2', '--sbatch=--partition=gpu'),
}
JOBSET_FIELDS = {  # https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2
    '': {'apiVersion', 'kind', 'metadata', 'spec'},
    'spec': {
        'replicatedJobs',
        'network',
        'successPolicy',
        'failurePolicy',
        'suspend',
        'coordinator',
        'managedBy',
        'ttlSecondsAfterFinished',
    },
    'spec.network': {'enableDNSHostnames', 'subdomain', 'publishNotReadyAddresses'},
    'spec.failurePolicy': {'maxRestarts', 'rules', 'restartStrategy'},
    'spec.failurePolicy.rules': {'name', 'action', 'onJobFailureReasons', 'targetReplicatedJobs'},
    'spec.replicatedJobs': {'name', 'groupName', 'template', 'replicas', 'dependsOn'},
    'spec.replicatedJobs.template': {'metadata', 'spec'},
}


def planned(kind: str, action: str = 'run', *more: str) -> list[steps.Step]:
    """The steps of one action of a kind."""
    args = command.parser().parse_args([kind, action, '--name=a-run', *LINES[kind], *more])
    return command.plan(args, ARGUMENTS)


def files(kind: str, folder: pathlib.Path, *more: str) -> list[pathlib.Path]:
    """Writes the files of a kind's run below a folder."""
    found = [
        (folder / kind / step.path.name, step.text)
        for step in planned(kind, 'run', *more)
        if isinstance(step, steps.File)
    ]
    for path, text in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [path for path, _ in found]


def scripts(folder: pathlib.Path) -> None:
    """Writes all files, also those of the other ways to bring the code, for shellcheck."""
    for kind in LINES:
        files(kind, folder)
        files(kind, folder / 'git', '--code=git+https://host/repository@v1')
    import yaml

    for way in (folder, folder / 'git'):
        script, _ = yaml.safe_load_all((way / 'jobset' / 'jobset.yaml').read_text())
        (way / 'jobset' / 'worker.sh').write_text(script['data']['worker.sh'])
        task = yaml.safe_load((way / 'skypilot' / 'task.yaml').read_text())
        (way / 'skypilot' / 'run.sh').write_text(task['run'])


def gcloud() -> None:
    """gcloud's own parser, on every command of its two kinds."""
    lines = []
    for kind in ('tpu-vm', 'queued-resource'):
        for action in command.module(kind).ACTIONS:
            for step in planned(kind, action):
                for argv in (getattr(step, name, ()) for name in ('argv', 'ask', 'create', 'delete')):
                    lines += [join(argv)] if argv[:1] == ('gcloud',) else []
    wrong = lines[0].replace('--zone', '--zones')
    for line in [*sorted(set(lines)), wrong]:
        asked = ['gcloud', 'meta', 'lint-gcloud-commands', f'--command-string={line}']
        verdicts = json.loads(subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout)
        well = all(verdict['success'] for verdict in verdicts)
        require(well == (line != wrong), f'{line}: {[verdict["error_message"] for verdict in verdicts]}')
        print(f'  {"accepted" if well else "refused, as it should be"}: {line[:110]}')


def xpk(folder: pathlib.Path) -> None:
    """xpk's own dry run; its manifest is checked, and its container runs with a `vora` that prints its arguments."""
    import yaml

    argv = next(step.create for step in planned('xpk') if isinstance(step, steps.Ensure))
    manifest = folder / 'xpk.yaml'
    for words in (argv, next(step.argv for step in planned('xpk', 'create'))):
        output = [f'--output-manifest-file={manifest}'] * ('workload' in words)
        done = subprocess.run(
            [*words, '--dry-run', '--skip-validation', *output],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        require(done.returncode == 0, done.stdout[-2000:])
        print(f'  accepted: {join(words)[:100]}')
    (jobset,) = yaml.safe_load_all(manifest.read_text())
    spec = jobset['spec']['replicatedJobs'][0]['template']['spec']
    require(
        spec['template']['spec']['terminationGracePeriodSeconds'] == 300
        and jobset['spec']['failurePolicy']['maxRestarts'] == 10,
        'the policy did not arrive',
    )
    allowed = spec['podFailurePolicy']['rules'][0]['onExitCodes']
    require(
        allowed['operator'] == 'NotIn' and 1 in allowed['values'] and 2 not in allowed['values'],
        '2 would be tried again',
    )
    container = spec['template']['spec']['containers'][0]
    (folder / 'bin').mkdir(exist_ok=True)
    fake = folder / 'bin' / 'vora'
    fake.write_text('#!/usr/bin/env python3\nimport json, sys\nprint("RECEIVED", json.dumps(sys.argv[1:]))\n')
    fake.chmod(0o755)
    # Kubernetes turns `$$` into `$` before bash sees it.
    argv = [word.replace('$$', '$') for word in container['command']]
    found = {'PATH': f'{fake.parent}:{os.environ["PATH"]}'}
    done = subprocess.run(argv, env=os.environ | found, text=True, stdout=subprocess.PIPE)
    require(done.returncode == 0 and f'RECEIVED {json.dumps(ARGUMENTS)}' in done.stdout.splitlines(), done.stdout)
    print('  the arguments arrive in the container byte for byte')


def kubernetes(folder: pathlib.Path) -> None:
    """Kubernetes' own schemas on the ConfigMap and the inner Job; a list of fields on the JobSet, which has none there."""
    import kubernetes_validate
    import yaml

    script, jobset = yaml.safe_load_all((folder / 'jobset' / 'jobset.yaml').read_text())
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(script, version, strict=True)
    inner = jobset['spec']['replicatedJobs'][0]['template']['spec']
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'a'}, 'spec': inner}
    kubernetes_validate.validate(job, version, strict=True)
    print(f'  accepted by the schemas of Kubernetes {version}: ConfigMap, Job')
    inner['template']['spec']['terminationGracePeriodSecond'] = 1
    try:
        kubernetes_validate.validate(job, version, strict=True)
    except kubernetes_validate.ValidationError:
        print('  refused, as it should be: a Job with a misspelt field')
    else:
        raise SystemExit('kubernetes-validate accepts a misspelt field')
    for where, known in JOBSET_FIELDS.items():
        for value in at(jobset, where):
            require(set(value) <= known, f'{where} has unknown fields {set(value) - known}')
    pod = f'{jobset["metadata"]["name"]}-{jobset["spec"]["replicatedJobs"][0]["name"]}-1-15'
    require(len(pod) <= 63, f'{pod} is too long for a host name')
    print('  the fields of JobSet are known')


def at(value: object, path: str) -> list[dict]:
    """The dicts at a dotted path; lists are entered."""
    found = [value]
    for name in filter(None, path.split('.')):
        found = [item[name] for item in found if name in item]
        found = [one for item in found for one in (item if isinstance(item, list) else [item])]
    return found


def skypilot(folder: pathlib.Path) -> None:
    """SkyPilot's own parser."""
    import sky

    for options in ((), ('--spot',)):
        (path,) = files('skypilot', folder, *options)
        task = sky.Task.from_yaml(str(path))
        print(f'  accepted: {task.num_nodes} nodes of {task.resources}')
    LINES['skypilot'] = ('--topology=v5e:8x8', '--spot')
    (path,) = files('skypilot', folder)
    print(f'  accepted: {sky.Task.from_yaml(str(path)).resources}')
    path.write_text(path.read_text().replace('num_nodes:', 'num_node:'))
    try:
        sky.Task.from_yaml(str(path))
    except ValueError as error:
        print(f'  refused, as it should be: {str(error).strip().splitlines()[-1][:100]}')
    else:
        raise SystemExit('SkyPilot accepts a misspelt field')


def require(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f'check_formats: {message}')


if __name__ == '__main__':
    checks = {'scripts': scripts, 'xpk': xpk, 'kubernetes': kubernetes, 'skypilot': skypilot}
    gcloud() if sys.argv[1] == 'gcloud' else checks[sys.argv[1]](pathlib.Path(sys.argv[2]).resolve())
