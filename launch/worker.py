"""The bash script that every host runs."""

from collections.abc import Sequence

from launch.job import Job
from launch.shell import join, quote

# The trainer's exit codes: 0 complete, or saved after SIGTERM; 2 a user's mistake; 130 Ctrl-C; 75 trouble that may pass;
# 1 a bug; 134, 137, 139 ended by a signal. The last three kinds are tried again.
# This script's: 0 complete, 1 crash, 2 mistake, 130 Ctrl-C, 143 told to stop. A scheduler that stopped a run must not
# take it for complete, so 0 becomes 143 if this host was told to stop.
_RUN = """
child='' told=''
tell() { told=$1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true; }
trap 'tell 143' TERM
trap 'tell 130' INT
# The newest finished step in the workdir, -1 if none is seen.
saved() {
    local found
    case $workdir in
        gs://*) found=$(timeout 60 gcloud storage ls "$workdir/steps/*/SHA256.json" 2>/dev/null) || true ;;
        *) found=$(ls -d "$workdir"/steps/*/SHA256.json 2>/dev/null) || true ;;
    esac
    found=$(grep -o '[0-9]*/SHA256.json' <<<"$found" | sort -n | tail -n 1) || true
    echo "${found:--1/}" | cut -d / -f 1
}
# Runs the command until it is complete, was told to stop, made a mistake, or has crashed too often.
keep_running() {
    local restarts=$1 attempt=0 code started pause newest now
    shift
    newest=-1
    ((restarts == 0)) || newest=$(saved)
    while true; do
        [[ -z $told ]] || exit "$told"
        started=$SECONDS code=0
        "$@" &
        child=$!
        [[ -z $told ]] || tell "$told"  # told before the child had a number
        wait "$child" || code=$?
        # A trap ends `wait` early: the trainer is still saving.
        while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
        child=''
        say "exit code $code after $((SECONDS - started)) s"
        [[ $code != 2 ]] || exit 2
        [[ -z $told ]] || exit "$told"
        case $code in 0 | 130) exit "$code" ;; esac
        ((restarts > 0)) || exit 1
        # Who got further crashed for another reason. Time is no sign of it: a hang takes long to be noticed.
        now=$(saved)
        ((now <= newest)) || attempt=0 newest=$now
        ((attempt < restarts)) || exit 1
        attempt=$((attempt + 1))
        pause=$((30 << (attempt < 6 ? attempt - 1 : 5)))
        say "starts again in $pause s ($attempt of $restarts)"
        sleep "$pause" &
        child=$!
        wait "$child" || true
        child=''
    done
}
"""

SAY = 'say() { echo "launch: $(hostname): $*" >&2; }'

_PYTHON = """
# For what needs the network: five tries.
again() {
    local pause
    for pause in 5 15 45 135; do
        "$@" && return
        say "failed, tries again in $pause s: $1 ${2:-}"
        sleep "$pause"
    done
    "$@"
}

# Prints a Python of at least 3.11; hosts that have none (Ubuntu 22.04) get one from uv, without root.
find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    again python3 -m pip install --user --quiet uv >&2
    again python3 -m uv python install --quiet 3.12 >&2
    python3 -m uv python find 3.12
}
"""


# Extras of setup.cfg: the accelerator, and what reads gs:// and Parquet.
EXTRAS = {'tpu': 'tpu,remote,parquet', 'cuda': 'cuda,remote,parquet', 'cpu': 'remote,parquet'}


def script(job: Job, prelude: Sequence[str] = (), restarts: int = 0, install: Sequence[str] = ()) -> str:
    """The script: environment, code, what is there, then `vora` with the job's arguments until it is done.

    Args:
        job: Job
        prelude: Sequence[str] lines of bash before anything else: who this process is.
        restarts: how often this script itself starts a crashed trainer again; 0 where a scheduler does.
        install: Sequence[str] lines of bash that bring the code, see `install_lines`.
    """
    lines = [
        '#!/usr/bin/env bash',
        f'# What every host of the run {job.name} executes. Written by `python -m launch`.',
        'set -euo pipefail',
        '{  # read to the end before it starts, so that the file may be replaced meanwhile',
        *[f'export {name}={quote(value)}' for name, value in job.environment],
        *prelude,
        SAY,
        f'workdir={quote(job.workdir)}',
        *_RUN.splitlines(),
        *install,
        *(f'bash -euo pipefail -c {quote(line)} || {{ say "--setup failed, exit code $?"; exit 1; }}' for line in job.setup),
        '',
        'version=$(vora --version) || { say "vora does not start here; is it installed?"; exit 2; }',
        'say "$version, $(nproc) CPUs, $(df -h . | awk \'NR == 2 { print $4 }\') of disk left"',
        f'arguments=({join(job.arguments)})',
        f'keep_running {restarts} vora "${{arguments[@]}}"',
        'exit',
        '}',
    ]
    return '\n'.join(lines) + '\n'


def install_lines(job: Job, source: str, folder: str) -> list[str]:
    """Bash that installs the code into an environment of its own, once for each version of it, and enters its folder.

    Args:
        job: Job
        source: 'tar' (FOLDER/code.tar.gz is there), 'here' (the present folder is the checkout), 'git' or 'installed'.
        folder: of this run on the host, as bash writes it (may contain "$HOME").
    """
    if source == 'installed':
        return []
    url, ref = job.git
    extras = EXTRAS[job.accelerator]
    bring = {
        'tar': [
            f'code={folder}/code version=$(cksum <{folder}/code.tar.gz)',
            'unpack() { rm -rf "$code"; mkdir "$code"; tar -xzf "$code.tar.gz" -C "$code"; }',
        ],
        'git': [
            f'code={folder}/code version={quote(url + "@" + ref)}',
            'unpack() {',
            '    rm -rf "$code"',
            f'    again git clone --quiet {quote(url)} "$code"',
            f'    git -C "$code" checkout --quiet {quote(ref)}',
            '}',
        ],
        'here': ['code=$PWD version=$(cat setup.cfg pyproject.toml | cksum)', 'unpack() { :; }'],
    }[source]
    return [
        *_PYTHON.splitlines(),
        f'mkdir -p {folder}',
        *bring,
        f'venv={folder}/venv',
        'if [[ $(cat "$venv/version" 2>/dev/null) != "$version" ]]; then',
        '    say "installs $version"',
        '    unpack',
        '    python=$(find_python)',
        '    "$python" -m venv "$venv"',
        # Editable: `here` may change without being installed again.
        '    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)',
        f'    again "${{pip[@]}}" --editable "${{code}}[{extras}]"',
        '    echo "$version" >"$venv/version"',
        'fi',
        'export PATH=$venv/bin:$PATH',
        'cd "$code"',
    ]
