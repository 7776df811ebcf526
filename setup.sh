#!/usr/bin/env bash
# Makes this folder ready to run: system GL libraries (if missing and you may install them), .venv, Python packages.
#   bash setup.sh          what training needs
#   bash setup.sh --dev    and what the tests need
#   bash setup.sh --maniskill  and ManiSkill, with software Vulkan where there is no GPU; goes with --dev
# Done before, it takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

requirements=requirements.txt maniskill=
for flag in "$@"; do
    case $flag in
        --dev) requirements=requirements-dev.txt ;;
        --maniskill) maniskill=requirements-maniskill.txt ;;
        *) echo "error: unknown flag $flag: there are --dev and --maniskill" >&2; exit 1 ;;
    esac
done
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "error: Python 3.11 or 3.12 is needed: set PYTHON=/path/to/python3.12" >&2; exit 1; }

stamp=".venv/.$(cat requirements.txt "$requirements" ${maniskill:+"$maniskill"} setup.sh | sha256sum | cut -c1-16)"
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

echo "making .venv: some minutes and 3.5 GB the first time" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }
torch=$(grep '^torch==' requirements.txt)
echo "installing $torch" >&2
cpu=https://download.pytorch.org/whl/cpu
if ! command -v nvidia-smi >/dev/null && .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu/torch/', timeout=5)" 2>/dev/null; then
    pip "$torch" --index-url "$cpu"  # a fifth of the size of the CUDA build
else
    pip "$torch"
fi
echo "installing what ${requirements}${maniskill:+ and $maniskill} asks for; simulators with their scenes take longest" >&2
pip -r "$requirements" ${maniskill:+-r "$maniskill"}

# SAPIEN draws with Vulkan. Without a GPU that is Mesa's lavapipe, from version 24.3 on; Debian 12 has a new one in its backports.
draws() { env ${1:+VK_ICD_FILENAMES="$1"} .venv/bin/python -c 'import cv2, sapien; sapien.render.RenderSystem(sapien.Device("cpu"))' >/dev/null 2>&1; }
fetch_lavapipe() {  # into .venv; the system's Mesa stays what it is
    local mirror apt
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -n 1)
    [ -n "$mirror" ] || return 0
    apt=$(mktemp -d) && mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" .venv/lavapipe
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm-backports main" >"$apt/sources.list"
    (
        cd "$apt"
        options=(-qq -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=)
        apt-get "${options[@]}" update && apt-get "${options[@]}" download mesa-vulkan-drivers/bookworm-backports && dpkg -x mesa-vulkan-drivers_*.deb .
    ) && cp "$apt"/usr/lib/*/libvulkan_lvp.so .venv/lavapipe/
    rm -rf "$apt"
    echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "./libvulkan_lvp.so", "api_version": "1.3.0"}}' >.venv/lavapipe/icd.json
}
if [ -n "$maniskill" ] && ! draws; then
    echo "installing what ManiSkill draws with"
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        as_root apt-get update -qq
        DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq --no-install-recommends \
            libvulkan1 mesa-vulkan-drivers libgl1 libglib2.0-0 libx11-6 >/dev/null
    fi
    draws || ! command -v apt-get >/dev/null || fetch_lavapipe
    draws || draws "$PWD/.venv/lavapipe/icd.json" ||
        echo "note: ManiSkill cannot draw here: it needs a GPU's Vulkan driver, or libvulkan1 and mesa-vulkan-drivers of version 24.3 or newer" >&2
fi
touch "$stamp"
echo "ready" >&2
