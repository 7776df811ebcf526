#!/usr/bin/env bash
# Makes this folder ready to run: system GL libraries and, for a GPU or the tests, a compiler (where
# they are missing and you may install them), .venv, Python packages.
#
#   bash setup.sh              what training needs
#   bash setup.sh --dev        and what the tests need
#   bash setup.sh --maniskill  and ManiSkill, with software Vulkan where there is no GPU; goes with
#                              --dev
#
# Done before, it takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Read the flags, and look for a Python that will do.
requirements=requirements.txt
maniskill=
for flag in "$@"; do
    case $flag in
        --dev) requirements=requirements-dev.txt ;;
        --maniskill) maniskill=requirements-maniskill.txt ;;
        *)
            echo "error: unknown flag $flag: there are --dev and --maniskill" >&2
            exit 1
            ;;
    esac
done
python=${PYTHON:-python3}
is_supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
if ! "$python" -c "$is_supported"; then
    echo "error: Python 3.11 or 3.12 is needed: set PYTHON=/path/to/python3.12" >&2
    exit 1
fi

# Stop where there are GPUs that this torch cannot use: its driver is too old, for one.
check_gpus() {
    command -v nvidia-smi >/dev/null || return 0
    .venv/bin/python -c 'import errors, machine
with errors.exit_on_user_error():
    machine.gpus()'
}

# Stop where the same files were set up before.
files=(requirements.txt "$requirements" ${maniskill:+"$maniskill"} setup.sh)
stamp=".venv/.$(cat "${files[@]}" | sha256sum | cut -c1-16)"
if [ -e "$stamp" ]; then
    check_gpus
    exit 0
fi

# Whether shared libraries can be loaded.
loads() {
    "$python" -c 'import ctypes, sys; [ctypes.CDLL(name) for name in sys.argv[1:]]' "$@" \
        >/dev/null 2>&1
}

# Whether MuJoCo can draw: with Mesa, or with an NVIDIA driver.
have_gl() {
    loads libEGL.so.1 libGL.so.1 libEGL_mesa.so.0 ||
        { command -v nvidia-smi >/dev/null && loads libEGL.so.1; }
}

may_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

install_packages() {
    as_root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq --no-install-recommends "$@" \
        >/dev/null
}

# Install what MuJoCo draws with and what makes a .venv, or say what is missing.
gl_packages=(libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri libglib2.0-0 python3-venv)
if ! have_gl || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if may_install; then
        echo "installing system libraries for headless rendering"
        install_packages "${gl_packages[@]}"
    else
        echo "note: rendering needs libEGL and Mesa; ask an administrator for:" \
            "apt-get install ${gl_packages[*]}" >&2
    fi
fi

# Whether torch.compile can build what it makes: with g++ for a CPU, for a GPU with gcc and Python's
# headers (Triton).
can_compile() {
    command -v gcc >/dev/null && command -v g++ >/dev/null &&
        "$python" -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")' \
            2>/dev/null
}

# Install a compiler where inference is compiled: on a GPU and in the tests. Or say what is missing.
headers=$("$python" -c 'import sys; print("python{}.{}-dev".format(*sys.version_info))')
compiler_packages=(gcc g++ "$headers")
if { command -v nvidia-smi >/dev/null || [ "$requirements" = requirements-dev.txt ]; } &&
    ! can_compile; then
    echo "installing a compiler for torch.compile"
    if ! may_install || ! install_packages "${compiler_packages[@]}"; then
        echo "note: torch.compile needs a compiler and Python headers; ask an administrator for:" \
            "apt-get install ${compiler_packages[*]}; until then give --compile False" >&2
    fi
fi

# Make .venv.
if [ ! -x .venv/bin/python ]; then
    echo "making .venv: some minutes and 3.8 GB the first time" >&2
    "$python" -m venv .venv
fi
pip() {
    .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"
}

# Install torch. Without a GPU the CPU build will do; it is a fifth of the size of the CUDA build.
torch=$(grep '^torch==' requirements.txt)
cpu=https://download.pytorch.org/whl/cpu
can_reach="import urllib.request as u; u.urlopen('$cpu/torch/', timeout=5)"
echo "installing $torch" >&2
if ! command -v nvidia-smi >/dev/null && .venv/bin/python -c "$can_reach" 2>/dev/null; then
    pip "$torch" --index-url "$cpu"
else
    pip "$torch"
fi

# Install everything else.
echo "installing what ${requirements}${maniskill:+ and $maniskill} asks for;" \
    "simulators with their scenes take longest" >&2
pip -r "$requirements" ${maniskill:+-r "$maniskill"}

# Whether SAPIEN, which draws with Vulkan, can draw. $1: the driver's description, if not the
# system's.
draws() {
    env ${1:+VK_ICD_FILENAMES="$1"} .venv/bin/python -c \
        'import cv2, sapien; sapien.render.RenderSystem(sapien.Device("cpu"))' >/dev/null 2>&1
}

# Without a GPU Vulkan is Mesa's lavapipe, from version 24.3 on. Debian 12 has a new one in its
# backports: put that into .venv. The system's Mesa stays what it is.
fetch_lavapipe() {
    local mirror apt options keyring
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -n 1)
    [ -n "$mirror" ] || return 0
    apt=$(mktemp -d)
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" .venv/lavapipe
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$keyring] $mirror bookworm-backports main" >"$apt/sources.list"
    options=(
        -qq
        -o Dir::Etc::sourcelist="$apt/sources.list"
        -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::lists="$apt/lists"
        -o Dir::Cache="$apt/cache"
        -o APT::Sandbox::User=
    )
    (
        cd "$apt"
        apt-get "${options[@]}" update &&
            apt-get "${options[@]}" download mesa-vulkan-drivers/bookworm-backports &&
            dpkg -x mesa-vulkan-drivers_*.deb .
    ) && cp "$apt"/usr/lib/*/libvulkan_lvp.so .venv/lavapipe/
    rm -rf "$apt"
    cat >.venv/lavapipe/icd.json <<'JSON'
{"file_format_version": "1.0.0",
 "ICD": {"library_path": "./libvulkan_lvp.so", "api_version": "1.3.0"}}
JSON
}

# Install what ManiSkill draws with, from the system's packages or else from the backports.
if [ -n "$maniskill" ] && ! draws; then
    echo "installing what ManiSkill draws with"
    if may_install; then
        install_packages libvulkan1 mesa-vulkan-drivers libgl1 libglib2.0-0 libx11-6
    fi
    draws || ! command -v apt-get >/dev/null || fetch_lavapipe
    draws || draws "$PWD/.venv/lavapipe/icd.json" ||
        echo "note: ManiSkill cannot draw here: it needs a GPU's Vulkan driver, or libvulkan1" \
            "and mesa-vulkan-drivers of version 24.3 or newer" >&2
fi

check_gpus
touch "$stamp"
echo "ready" >&2
