#!/usr/bin/env bash
# Makes this folder ready to run: system GL libraries (if missing and you may install them), .venv, Python packages.
#   bash setup.sh          what training needs
#   bash setup.sh --dev    and what the tests need
# Done before, it takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

requirements=requirements.txt
[ "${1:-}" = "--dev" ] && requirements=requirements-dev.txt
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "error: Python 3.11 or 3.12 is needed: set PYTHON=/path/to/python3.12" >&2; exit 1; }

stamp=".venv/.$(cat requirements.txt "$requirements" setup.sh | sha256sum | cut -c1-16)"
if [ -e "$stamp" ]; then exit 0; fi

have_gl() { "$python" -c 'import ctypes; ctypes.CDLL("libEGL.so.1"); ctypes.CDLL("libGL.so.1"); ctypes.CDLL("libEGL_mesa.so.0")' 2>/dev/null || { command -v nvidia-smi && "$python" -c 'import ctypes; ctypes.CDLL("libEGL.so.1")'; } >/dev/null 2>&1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
if ! have_gl || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        echo "installing system libraries for headless rendering"
        as_root apt-get update -qq
        DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq --no-install-recommends \
            libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri libglib2.0-0 python3-venv >/dev/null
    else
        echo "note: rendering needs libEGL and Mesa; ask an administrator for: apt-get install libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri libglib2.0-0 python3-venv" >&2
    fi
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }
torch=$(grep '^torch==' requirements.txt)
cpu=https://download.pytorch.org/whl/cpu
if ! command -v nvidia-smi >/dev/null && .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu/torch/', timeout=5)" 2>/dev/null; then
    pip "$torch" --index-url "$cpu"  # a fifth of the size of the CUDA build
else
    pip "$torch"
fi
pip -r "$requirements"
touch "$stamp"
