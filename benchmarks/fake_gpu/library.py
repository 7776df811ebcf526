"""Builds stub.cpp and loads it, which must happen before torch is imported: torch asks once which
devices there are.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "stub.cpp"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vla3" / "fake_gpu"
MOST = 8  # devices that stub.cpp has


class Unavailable(Exception):
    """There can be no such GPUs here; the message says why."""


def environment(gpus: int) -> dict[str, str]:
    """Returns what a process must find in its environment to have so many GPUs. Builds the library
    where that was not done before. Raises Unavailable."""
    assert 0 < gpus <= MOST
    library()
    path = [str(FOLDER / "shim"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "FAKE_GPUS": str(gpus)}


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def library() -> Path:
    """Builds stub.cpp, once for every version of it, of torch and of Python. Returns the file."""
    version = runpy.run_path(str(torch_folder() / "version.py"))
    if version["cuda"] or version["hip"]:
        raise Unavailable("this torch has GPUs of its own: a build for CPUs is needed")
    words = (SOURCE.read_text(), version["__version__"], version["git_version"], sys.version)
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    made = CACHE / f"{name}.so"
    if made.exists():
        return made
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        raise Unavailable("g++ is needed to build a GPU that is not there: bash setup.sh --dev")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait for it
        if not made.exists():
            partial = made.with_suffix(f".{os.getpid()}")
            build(compiler, partial)
            partial.replace(made)
    return made


def build(compiler: str, into: Path) -> None:
    torch = torch_folder()
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(into)]
    command += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{SOURCE.name} cannot be built: {done.stderr[-2000:]}")


def load() -> None:
    """Loads the library, and before it what it stands on, of torch."""
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library()))
