"""What this machine, or the container around this process, has: cores, memory, GPUs.

Left out: what other processes use of it.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errors import UserError, require

# The oldest NVIDIA driver for a CUDA of this major version (CUDA Toolkit release notes, table
# "minimum required driver version for CUDA minor version compatibility").
DRIVERS = {"11": 450, "12": 525, "13": 580}
LONGEST_TEMPORARY = 70  # bytes of 108 that a socket's path may have; multiprocessing adds 32


def limits(controller: str, name: str, root: Path) -> Iterator[list[str]]:
    """Yields the words of a limit's file in this process's control groups, and those above."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, group = line.split(":", 2)
        mounted = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
        if number == "0" or controller in controllers.split(","):
            folder = mounted / group.lstrip("/")
            for place in (folder, *folder.parents):
                if place.is_relative_to(mounted) and (place / name).is_file():
                    yield (place / name).read_text().split()


def cores(root: Path = Path("/")) -> int:
    """Counts the cores that this process may use: by affinity and by its container's quota, which
    control groups of version 2 and 1 write down differently."""
    allowed = [len(os.sched_getaffinity(0))]
    with contextlib.suppress(OSError, ValueError):  # no control groups, or unreadable ones
        quotas = list(limits("cpu", "cpu.max", root))  # "max 100000", or microseconds and period
        periods = limits("cpu", "cpu.cfs_period_us", root)
        for quota, period in zip(limits("cpu", "cpu.cfs_quota_us", root), periods, strict=True):
            quotas.append(quota + period)
        allowed += [int(q) // int(period) for q, period in quotas if q not in ("max", "-1")]
    return max(1, min(allowed))


def memory(root: Path = Path("/")) -> int:
    """Returns the bytes of memory that this process may use: the machine's, or its container's."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):
        for name in ("memory.max", "memory.limit_in_bytes"):
            found += [int(words[0]) for words in limits("memory", name, root) if words != ["max"]]
    return min(found)


def gpus() -> int:
    """Counts the GPUs that torch sees. Raises UserError where it sees none of those that are there:
    training on the CPU instead would be slow without a word."""
    import torch  # here, for setup.sh asks before it is sure that torch is there

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if count or hidden or not shutil.which("nvidia-smi"):
        return count
    instead = "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=30.0, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        silent = f"nvidia-smi does not answer ({error}): repair the NVIDIA driver"
        raise UserError(f"{silent}, {instead}") from None
    # Its exit status says nothing: without a GPU it is 0, with a driver half updated it is not.
    half = "version mismatch" in said.stdout + said.stderr
    require(not half, f"the NVIDIA driver was updated and not loaded: restart, {instead}")
    versions = re.findall(r"^\d+(?:\.\d+)+$", said.stdout, re.MULTILINE)
    if versions:
        raise UserError(f"{unseen(versions, torch.version.cuda)}, {instead}")
    return 0


def unseen(versions: list[str], cuda: str | None) -> str:
    """Says why torch of this CUDA sees no GPU, one driver version each, and what to do."""
    seen = f"torch sees none of this machine's {len(versions)} GPUs"
    if not cuda:
        return f"{seen}: it is built without CUDA; remove .venv and run setup.sh"
    needed = DRIVERS.get(cuda.partition(".")[0], 0)
    if int(versions[0].partition(".")[0]) < needed:
        driver = f"CUDA {cuda} needs NVIDIA driver {needed} or newer"
        return f"{seen}: {driver}, and {versions[0]} is installed; update it"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = f"CUDA_VISIBLE_DEVICES={chosen} names some of them, and that " if chosen else ""
    opens = "this process, or its container, may open /dev/nvidia*"
    return f"{seen} (driver {versions[0]}, CUDA {cuda}): see that {names}{opens}"


def shorten_temporary() -> None:
    """Goes over to /tmp where TMPDIR is too long for the sockets that processes meet at."""
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY:
        tempfile.tempdir = os.environ["TMPDIR"] = "/tmp"
