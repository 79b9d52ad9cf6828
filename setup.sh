#!/bin/sh
# setup.sh VENV: make the virtual environment with Python 3.12 and everything in requirements.lock.
set -eu
venv=$1
began=$(date +%s)

find_python() {
    for candidate in python3.12 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            # Not the environment that is about to be replaced, should it be active.
            "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
            return
        fi
    done
    if command -v uv >/dev/null 2>&1; then
        uv python find 3.12 2>/dev/null && return
    fi
    return 1
}

if ! python=$(find_python); then
    echo "error: Python 3.12 is missing: install it with 'apt install python3.12 python3.12-venv'," \
        "'pyenv install 3.12' or 'uv python install 3.12', then type the same command again." >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python cannot make virtual environments: 'apt install python3.12-venv'," \
        "then type the same command again." >&2
    exit 2
fi

echo "setup: $("$python" --version) in $venv; this fetches about 3 GB once, PyTorch being most of it"
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off \
    -r requirements.lock -r requirements-dev.txt
touch "$venv/.complete"
echo "setup: done in $(($(date +%s) - began)) s"
