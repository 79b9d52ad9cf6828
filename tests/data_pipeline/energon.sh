#!/bin/sh
# energon.sh [ENVIRONMENT]: what the Energon test needs, in an environment of its own (100 MB).
# Energon wants an older tzdata than requirements.lock has. What else it needs is taken from the
# environment that is active, where it is there. Run it with .venv/bin on PATH.
set -eu
environment=${1:-cache/energon}
[ ! -x "$environment/bin/energon" ] || exit 0
python -m venv "$environment"
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check megatron-energon==7.4.1
