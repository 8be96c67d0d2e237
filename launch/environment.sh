# Sourced by test.sh and quickstart.sh: an environment of its own, built once.
#
#   make_environment DIR EXTRAS     creates DIR if it is not there, installs `.[EXTRAS]`, sets $python
#
# PYTHON=python3.12 chooses the interpreter (3.11 or later).

find_python() {
    local candidate candidates=${PYTHON:-python3 python3.13 python3.12 python3.11 python}
    local question='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
    for candidate in $candidates; do
        if "$candidate" -c "$question" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "needs Python 3.11 or later with the venv module (tried: $candidates);" \
        "install one, or name it with PYTHON=/path/to/python." >&2
    return 1
}

make_environment() {
    local directory=$1 extras=$2 interpreter started=$SECONDS
    interpreter=$(find_python)
    [[ -x "$directory/bin/python" ]] || "$interpreter" -m venv "$directory"
    python=$directory/bin/python
    # Editable: what runs is the checkout, and nothing is built into it.
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    echo "installed in $((SECONDS - started)) s with $("$python" --version)"
}
