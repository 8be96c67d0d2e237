#!/usr/bin/env bash
# Runs the tests in an environment of their own, as a newcomer's machine would.
#
#   bash launch/test.sh                              everything that is quick
#   bash launch/test.sh -k mask                      arguments go to pytest
#   VORA_TEST_VENV=~/.venvs/vora bash launch/test.sh keeps the environment for the next time
#   PYTHON=python3.12 bash launch/test.sh            chooses the interpreter (3.11 or later)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS

find_python() {
    local candidate candidates=${PYTHON:-python3 python3.13 python3.12 python3.11 python}
    local question='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
    for candidate in $candidates; do
        if "$candidate" -c "$question" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "test.sh: needs Python 3.11 or later with the venv module (tried: $candidates);" \
        "install one, or name it with PYTHON=/path/to/python." >&2
    return 1
}

python=$(find_python)
if [[ -n "${VORA_TEST_VENV:-}" ]]; then
    environment=$VORA_TEST_VENV
else
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
fi
[[ -x "$environment/bin/python" ]] || "$python" -m venv "$environment"

# Editable: the tests read the checkout, and nothing is built into it.
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable '.[test,torch,tensorboard]'
installed=$SECONDS
echo "test.sh: installed in $((installed - started)) s with $("$environment/bin/python" --version)"

status=0
"$environment/bin/python" -m pytest "$@" || status=$?
echo "test.sh: $((SECONDS - started)) s in all, $((SECONDS - installed)) s of it tests"
exit "$status"
