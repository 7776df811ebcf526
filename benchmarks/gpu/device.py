"""What the machine can do, and how near its copies come to that.

The section `machine` says what is there, and measures the yardsticks. In `copies`:

    gb_per_s      bytes that arrive in a second; each copy is waited for
    yardstick     what it is compared with; yardstick_gb_per_s of that, and the share reached
"""

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

import machine as host
import transfers
from benchmarks.gpu import Where
from benchmarks.measuring import context, matmul, seconds_of
from channel import SlotPool
from weights import WeightPlane

# Bytes/s of a lane of PCIe, each way, by generation (PCI-SIG: 8, 16, 32, 64 GT/s with their codes).
LANE = {"3": 0.985e9, "4": 1.969e9, "5": 3.938e9, "6": 7.563e9}
ASKED = ("name", "driver_version", "pcie.link.gen.max", "pcie.link.width.max", "compute_mode")
FETCHES = 8  # of weights, by another process


def side(where: Where) -> int:
    """Returns the side of the matrices of a large product."""
    return 256 if where.fake else 8192


# ---------------------------------------------------------------- the machine


def machine(where: Where) -> Iterator[dict]:
    """Says what is there, and measures the yardsticks."""
    for what, value in facts(where).items():
        yield {"what": what, "value": value, "unit": ""}
    for kind, rate in products(where, ("bfloat16", "tf32", "float32")).items():
        yield {"what": f"large product, {kind}", "value": rate / 1e12, "unit": "TFLOP/s"}
    yield {"what": "copy on the device", "value": device_copy(where) / 1e9, "unit": "GB/s"}


def facts(where: Where) -> dict[str, object]:
    """Looks at the machine. What nobody says is None."""
    name, driver, generation, width, mode = ask_driver(ASKED)
    found = {"GPU": name, "GPUs": torch.cuda.device_count(), "driver": driver}
    if not where.fake:
        gpu = torch.cuda.get_device_properties(where.device)
        found |= {"GPU": gpu.name, "memory of the GPU in GB": gpu.total_memory / 1e9}
        found |= {"compute capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"multiprocessors": gpu.multi_processor_count}
        found |= {"cores near the GPU": len(host.near(where.device))}
    nodes = Path("/sys/devices/system/node").glob("node[0-9]*")
    return found | {
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "PCIe, at most": generation and f"generation {generation}, {width} lanes",
        "NVLink": nvlink(),
        "compute mode": mode,
        "MPS runs": says("pgrep", "-x", "nvidia-cuda-mps") != "",
        "cores": host.cores(),
        "NUMA nodes": len(list(nodes)),
        "memory of the host in GB": host.memory() / 1e9,
        "C compiler": shutil.which("gcc") or shutil.which("cc"),
    }


def ask_driver(names: tuple[str, ...]) -> list[str | None]:
    """Asks nvidia-smi about the first GPU; None for each where it does not answer."""
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    line = (says(*query).splitlines() or [""])[0].split(", ")
    return line if len(line) == len(names) else [None] * len(names)


def nvlink() -> str | None:
    """Counts the first GPU's NVLinks that are up, and says how fast each is."""
    lines = says("nvidia-smi", "nvlink", "--status", "-i", "0").splitlines()
    links = [line.split(": ")[1] for line in lines if "GB/s" in line]
    return f"{len(links)} × {links[0]}" if links else None


def says(*command: str) -> str:
    """Returns what a program prints; nothing where there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def products(where: Where, kinds: tuple[str, ...]) -> dict[str, float]:
    """Measures the FLOP/s of a large product: bfloat16, float32, or TF32 (fp32 in fewer bits)."""
    rates = {}
    before = torch.get_float32_matmul_precision()
    for kind in kinds:
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        product, flops = matmul(where.device, dtype, side(where))
        rates[kind] = flops / seconds_of([product], where.device, where.seconds)[0]
    torch.set_float32_matmul_precision(before)
    return rates


def peak(where: Where) -> float:
    """Returns the FLOP/s that a large product reaches in the type that models compute in."""
    kind = "float32" if where.fake else "bfloat16"
    return products(where, (kind,))[kind]


def device_copy(where: Where) -> float:
    """Measures the bytes/s that a copy on the device reads, and so many it writes besides."""
    source = torch.zeros(block(where), dtype=torch.uint8, device=where.device)
    target = torch.empty_like(source)
    seconds = seconds_of([lambda: target.copy_(source)], where.device, where.seconds)[0]
    return source.nbytes / seconds


# ---------------------------------------------------------------- copies


def block(where: Where) -> int:
    """Returns how many bytes a copy has."""
    return 2**20 if where.fake else 2**28


def copies(where: Where) -> Iterator[dict]:
    """Measures copies between host and device, and between two processes on the device."""
    _, _, generation, width, _ = ask_driver(ASKED[:5])
    link = LANE[generation] * int(width) if generation in LANE else None
    size = block(where)
    there = torch.zeros(size, dtype=torch.uint8, device=where.device)
    rates = {}
    for kind in ("pinned", "pageable"):
        here = torch.ones(size, dtype=torch.uint8, pin_memory=kind == "pinned")
        ways = {"to device": (there, here), "to host": (here, there)}
        for way, (target, source) in ways.items():
            rates[kind, way] = copy_rate(where, target, source)
            yield copied(f"{kind}, {way}", size, rates[kind, way], "PCIe", link)
    plain = rates["pinned", "to device"]
    yield copied("from slots, to device", size, slots_rate(where), "pinned, to device", plain)
    own = device_copy(where)
    published, fetched = plane_rates(where)
    yield copied("weights published", size, published, "copy on the device", own)
    yield copied("weights fetched by CUDA IPC", size, fetched, "copy on the device", own)


def copied(what: str, size: int, rate: float, yardstick: str, of: float | None) -> dict:
    return {
        "copy": what,
        "mb": size / 1e6,
        "ms": 1e3 * size / rate,
        "gb_per_s": rate / 1e9,
        "yardstick": yardstick,
        "yardstick_gb_per_s": of and of / 1e9,
        "share": of and rate / of,
    }


def copy_rate(where: Where, target: torch.Tensor, source: torch.Tensor) -> float:
    """Measures the bytes/s of a copy."""

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    return source.nbytes / seconds_of([copy], where.device, where.seconds)[0]


def slots_rate(where: Where) -> float:
    """Measures the bytes/s at which rows of slots come to the device as a rollout worker brings
    them."""
    rows = 16
    slots = 64
    spec = {"image": ((rows, block(where) // slots), torch.uint8)}
    pool = SlotPool(spec, slots)
    pool["image"].fill_(1)
    transfers.lock(pool, ("image",), where.device)
    every = np.arange(slots)

    def copy() -> None:
        transfers.read(pool, ("image",), every, every % rows, where.device)

    return block(where) / seconds_of([copy], where.device, where.seconds)[0]


def plane_rates(where: Where) -> tuple[float, float]:
    """Measures the bytes/s of publishing weights on the device, and of fetching them in another
    process."""
    spec = {f"layer_{i}": ((block(where) // 16,), torch.float32) for i in range(4)}
    source = {
        name: torch.full(shape, 3.0, dtype=dtype, device=where.device)
        for name, (shape, dtype) in spec.items()
    }
    plane = WeightPlane(spec, where.device)
    plane.publish(source, 0)
    times = []
    for version in range(1, FETCHES):
        start = time.perf_counter()
        plane.publish(source, version)
        times.append(time.perf_counter() - start)
    receive, send = mp.Pipe(duplex=False)
    process = context("benchmarks.gpu.device").Process(
        target=fetch, args=(plane, where.device, send), daemon=True
    )
    process.start()
    send.close()
    fetched = receive.recv()
    process.join()
    return plane.bytes / statistics.median(times), plane.bytes / fetched


def fetch(plane: WeightPlane, device: str, results) -> None:
    """Fetches weights again and again, and sends the median seconds of a fetch."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    block = torch.zeros(plane.bytes, dtype=torch.uint8, device=device)
    times = []
    for _ in range(FETCHES):
        start = time.perf_counter()
        plane.fetch(block)
        times.append(time.perf_counter() - start)
    if any(not bool((view == 3.0).all()) for view in plane.tensors(block).values()):
        raise ValueError("other weights arrived than were published")
    results.send(statistics.median(times))
