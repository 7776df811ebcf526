"""What a container gives is counted, and a GPU that torch does not see is no CPU."""

import os
import socket
import subprocess
import tempfile
from typing import NamedTuple

import pytest
import torch

import machine
from errors import UserError


def written(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files, cores",
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({}, 8),
    ],
)
def test_cores_are_counted_with_the_container_s_quota(monkeypatch, tmp_path, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.cores(written(tmp_path, files)) == cores


def test_memory_is_the_container_s(tmp_path):
    whole = machine.memory(tmp_path)
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000000\n"}
    assert machine.memory(written(tmp_path, files)) == 1_000_000 < whole
    assert machine.memory(written(tmp_path, {"sys/fs/cgroup/memory.max": "max\n"})) == whole


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n"}


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 5000 * 1024),
        (
            {  # the group above has less left; what keeps files at hand can be had
                "proc/self/cgroup": "0::/pod/a\n",
                "sys/fs/cgroup/pod/a/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": "4000000\n",
                "sys/fs/cgroup/pod/memory.current": "3000000\n",
                "sys/fs/cgroup/pod/memory.stat": "anon 1\nactive_file 5\ninactive_file 7\n",
            },
            1_000_012,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "2500000\n",
                "sys/fs/cgroup/memory/job/memory.stat": "active_file 9\ntotal_active_file 400\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            500_400,
        ),
        (
            {  # as seen in a container that has its own group at the top
                "proc/self/cgroup": "4:memory:/docker/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2500\n",
            },
            0,
        ),
    ],
)
def test_free_memory_is_what_is_left_here_and_in_every_group(tmp_path, files, free):
    assert machine.memory(written(tmp_path, MEMINFO | files)) == free


def test_cores_near_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: GPUS[device])
    every = set(range(8))
    assert machine.near("cuda:0", tmp_path) == every  # one node, or an unknown number
    files = {f"sys/devices/system/node/node{n}/cpulist": "" for n in (0, 1)}
    near = {"0000:1a:00.0": "ffff0000,00000013\n", "0001:81:00.0": "f0000000,00000000\n"}
    files |= {f"sys/bus/pci/devices/{name}/local_cpus": text for name, text in near.items()}
    written(tmp_path, files)
    assert machine.near("cuda:0", tmp_path) == {0, 1, 4}
    assert machine.near("cuda:1", tmp_path) == every  # this process may use none of those
    assert machine.near("cuda:2", tmp_path) == machine.near("cpu", tmp_path) == every


@pytest.mark.parametrize("given, share", [({}, 0.4), ({"PYTORCH_ALLOC_CONF": "x"}, 1.0)])
def test_a_worker_takes_its_part_of_a_gpu(monkeypatch, given, share):
    told = []
    monkeypatch.setattr(machine, "maps_memory", lambda gpu: gpu == 2)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    limit = "set_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, limit, lambda *part: told.append(part))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    machine.take_part("cuda:2", share)
    grows = [] if given else ["expandable_segments:True"]
    assert told == ["cuda:2", *grows, *([(share, "cuda:2")] if share < 1 else [])]
    told.clear()
    machine.take_part("cuda:1", share)  # where the driver cannot map memory
    assert "expandable_segments:True" not in told


@pytest.mark.skipif(torch.version.cuda is not None, reason="is for a machine without a driver")
def test_without_a_driver_no_memory_is_mapped():
    assert not machine.maps_memory(0)


def test_mps_is_found_where_it_listens(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not machine.mps()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.bind(str(tmp_path / "control"))
        daemon.listen()
        assert machine.mps()
    assert not machine.mps()  # it was killed, and its socket is left


class Gpu(NamedTuple):
    pci_domain_id: int
    pci_bus_id: int
    pci_device_id: int


GPUS = {"cuda:0": Gpu(0, 0x1A, 0), "cuda:1": Gpu(1, 0x81, 0), "cuda:2": Gpu(0, 0xFF, 0)}


def test_cores_are_named_with_their_nodes(tmp_path):
    assert machine.where(frozenset({5}), tmp_path) == "core 5"
    nodes = {0: "0-3,8-11", 1: "4-7,12-15", 10: "16"}
    files = {f"sys/devices/system/node/node{n}/cpulist": f"{x}\n" for n, x in nodes.items()}
    written(tmp_path, files)
    assert machine.where(frozenset({0, 1, 2, 9}), tmp_path) == "cores 0–2, 9 (NUMA 0)"
    assert machine.where(frozenset({3, 12, 16}), tmp_path) == "cores 3, 12, 16 (NUMA 0–1, 10)"


@pytest.fixture
def nvidia_smi(monkeypatch):
    """Answers as the tool would, where torch sees no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    listed = subprocess.CompletedProcess([], 0, "535.54\n535.54\n", "")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: listed)
    return listed


@pytest.mark.parametrize(
    "cuda, driver, words",
    [
        ("13.0", "535.54", "CUDA 13.0 needs NVIDIA driver 580 or newer, and 535.54 is installed"),
        ("12.8", "470.2", "CUDA 12.8 needs NVIDIA driver 525 or newer, and 470.2 is installed"),
        ("12.8", "570.86.15", r"\(driver 570.86.15, CUDA 12.8\): see that this process, .* /dev/"),
        (None, "535.54", "built without CUDA; remove .venv and run setup.sh"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch, nvidia_smi, cuda, driver, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    nvidia_smi.stdout = f"{driver}\n{driver}\n"
    with pytest.raises(UserError, match=f"sees none of this machine's 2 GPUs.*{words}"):
        machine.gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on purpose
    assert machine.gpus() == 0


def test_a_driver_that_is_new_enough_is_not_blamed(monkeypatch, nvidia_smi):
    nvidia_smi.stdout = "570.86.15\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="see that CUDA_VISIBLE_DEVICES=7 names some") as error:
        machine.gpus()
    assert "update" not in str(error.value)


@pytest.mark.parametrize("status, said", [(0, "No devices were found\n"), (9, "has failed\n")])
def test_a_tool_without_a_gpu_finds_none(nvidia_smi, status, said):
    nvidia_smi.returncode = status
    nvidia_smi.stdout = said
    assert machine.gpus() == 0


@pytest.mark.parametrize(
    "error", [OSError(8, "Exec format error"), subprocess.TimeoutExpired("nvidia-smi", 30.0)]
)
def test_a_tool_that_does_not_answer_is_no_cpu(monkeypatch, nvidia_smi, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(machine.subprocess, "run", run)
    with pytest.raises(UserError, match="nvidia-smi does not answer .*CUDA_VISIBLE_DEVICES= to"):
        machine.gpus()


def test_a_driver_that_is_half_updated_is_no_cpu(nvidia_smi):
    nvidia_smi.returncode = 18
    nvidia_smi.stdout = "Failed to initialize NVML: Driver/library version mismatch\n"
    with pytest.raises(UserError, match="driver was updated and not loaded: restart, or set CUDA"):
        machine.gpus()


def test_sockets_fit_where_tmpdir_is_long(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if len(str(tmp_path)) <= machine.LONGEST_TEMPORARY:
        machine.shorten_temporary()
        assert tempfile.gettempdir() == str(tmp_path)
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(long))
    machine.shorten_temporary()
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == "/tmp"
