#!/usr/bin/env bash
# Runs the tests in an environment of their own, as a newcomer's machine would.
#
#   bash launch/test.sh                              everything that is quick
#   bash launch/test.sh -k mask                      arguments go to pytest
#   VORA_TEST_VENV=~/.venvs/vora bash launch/test.sh keeps the environment for the next time
#   PYTHON=python3.12 bash launch/test.sh            chooses the interpreter (3.11 or later)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
started=$SECONDS

environment=${VORA_TEST_VENV:-}
if [[ -z "$environment" ]]; then
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
fi
make_environment "$environment" test,torch,tensorboard,plan
installed=$SECONDS

status=0
"$python" -m ruff check --quiet --line-length 125 --select E,F,I,W vora_jax tests launch || status=$?
# Each worker starts with files in a row, whose tests share what they compile; one that is done takes some from the end of
# another's, so none waits for a long file.
"$python" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@" || status=$?
echo "test.sh: $((SECONDS - started)) s in all, $((SECONDS - installed)) s of it tests"
exit "$status"
