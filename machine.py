"""What this machine, or the container around this process, has: cores, free memory, GPUs.

Left out: what other processes use of cores and GPUs.
"""

import contextlib
import ctypes
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from errors import UserError, require

# The oldest NVIDIA driver for a CUDA of this major version (CUDA Toolkit release notes, table
# "minimum required driver version for CUDA minor version compatibility").
DRIVERS = {"11": 450, "12": 525, "13": 580}
LONGEST_TEMPORARY = 70  # bytes of 108 that a socket's path may have; multiprocessing adds 32


def groups(controller: str, root: Path) -> Iterator[Path]:
    """Yields the folders of this process's control groups, and of those above."""
    with contextlib.suppress(OSError, ValueError):  # no control groups, or unreadable ones
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            mounted = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
            if number == "0" or controller in controllers.split(","):
                folder = mounted / group.lstrip("/")
                yield from (f for f in (folder, *folder.parents) if f.is_relative_to(mounted))


def words(*files: Path) -> list[str]:
    """Returns the words of those of these files that can be read."""
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            found += file.read_text().split()
    return found


def cores(root: Path = Path("/")) -> int:
    """Counts the cores that this process may use: by affinity and by its container's quota, which
    control groups of version 2 and 1 write down differently."""
    allowed = [len(os.sched_getaffinity(0))]
    for group in groups("cpu", root):
        # "max 100000", or microseconds and period.
        quota = words(group / "cpu.max", group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
        if quota and quota[0] not in ("max", "-1"):
            allowed.append(int(quota[0]) // int(quota[1]))
    return max(1, min(allowed))


def memory(root: Path = Path("/")) -> int:
    """Returns the bytes of memory that this process may still take: what the machine has free, or
    its container. What only keeps files at hand counts as free: the kernel drops it first."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    said = words(root / "proc/meminfo")
    if "MemAvailable:" in said:
        found.append(1024 * int(said[said.index("MemAvailable:") + 1]))
    for group in groups("memory", root):
        limit = words(group / "memory.max", group / "memory.limit_in_bytes")
        used = words(group / "memory.current", group / "memory.usage_in_bytes") or ["0"]
        stat = words(group / "memory.stat")
        if limit and limit != ["max"]:
            kept = dict(zip(stat[::2], stat[1::2], strict=True))
            of_files = ("inactive_file", "active_file")
            # Version 1 counts groups below under names of their own.
            files = sum(int(kept.get(f"total_{name}", kept.get(name, 0))) for name in of_files)
            found.append(int(limit[0]) - max(0, int(used[0]) - files))
    return max(0, min(found))


def near(device: str, root: Path = Path("/")) -> frozenset[int]:
    """Returns the cores that this process may use, and of those only the ones on the NUMA node of a
    GPU, where a machine has several nodes and says which."""
    every = frozenset(os.sched_getaffinity(0))
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    if device == "cpu" or len(nodes) < 2:
        return every
    # "ffff,00000000": a bit for each core, core 0 last.
    folder = root / "sys/bus/pci/devices" / address(device)
    mask = "".join(words(folder / "local_cpus")).replace(",", "")
    return frozenset(core for core in every if int(mask or "0", 16) >> core & 1) or every


def address(device: str) -> str:
    """Names a GPU as the PCI bus does, whatever CUDA_VISIBLE_DEVICES calls it."""
    import torch

    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def ranges(numbers: Iterable[int]) -> str:
    """Writes numbers shortly: "0–3, 8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def where(cores: frozenset[int], root: Path = Path("/")) -> str:
    """Names cores, and their NUMA nodes where the system tells them."""
    nodes = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        # "0-3,8": first and last of each run.
        runs = [run.split("-") for run in ",".join(words(folder / "cpulist")).split(",") if run]
        if any(int(run[0]) <= core <= int(run[-1]) for run in runs for core in cores):
            nodes.append(int(folder.name[4:]))
    of = f" (NUMA {ranges(nodes)})" if nodes else ""
    return f"core{'s' * (len(cores) > 1)} {ranges(cores)}{of}"


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


def gpu_memory() -> int:
    """Returns the bytes of the smallest GPU. Asking torch makes no context (pytorch's
    test/test_cuda_primary_ctx.py: its lazy start asks every GPU's properties, too)."""
    import torch

    count = torch.cuda.device_count()
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(count))


def take_part(device: str, share: float) -> None:
    """Gives this process a GPU, and of its memory a share at most (1.0: all), in segments that grow
    where the driver can map memory: they lose less to fragmentation.

    What others map by CUDA IPC must not lie in such segments, which some containers forbid to share
    (pytorch issue 165685); workers share nothing that they allocate. torch reads its variables when
    it is imported, which the fork server did, so it is told."""
    import torch

    torch.cuda.set_device(device)
    own = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not own and maps_memory(int(device.partition(":")[2])):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    if share < 1.0:
        torch.cuda.set_per_process_memory_fraction(share, device)


def maps_memory(gpu: int) -> bool:
    """Whether the driver can map memory of a GPU (cuda.h,
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)."""
    found = ctypes.c_int(0)
    with contextlib.suppress(OSError):  # no such library
        ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(found), 102, gpu)
    return bool(found.value)


def mps() -> bool:
    """Whether NVIDIA's Multi-Process Service runs: it listens where the driver looks for it, on a
    SEQPACKET socket (lsof says so). Every process started here then uses it."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(OSError), control:
        control.settimeout(1.0)
        control.connect(f"{folder}/control")
        return True
    return False


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
