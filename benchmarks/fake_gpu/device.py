"""What torch.cuda says of the devices that stub.cpp makes: `install`, called by shim/ as soon as
torch is loaded.

Left out: compiling for them, graphs, a clock of their own, errors of work that overlaps.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing import reductions

MEMORY = 80 * 10**9  # bytes that each device says it has


# ---------------------------------------------------------------- streams and events


class Told:
    """Who is told when the host waits for a device, and who knows what is allocated there."""

    synchronised: Callable[[str], None] = staticmethod(lambda what: None)
    allocated: Callable[[int], tuple[int, int]] = staticmethod(lambda device: (0, 0))


def index_of(device: object) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return torch.ops.fake_gpu.current() if index is None else index


class Stream:
    """Work on it is done at once, in the order of the calls."""

    def __init__(self, device: object = None, priority: int = 0, **_):
        self.device_index = index_of(device)
        self.device = torch.device("cuda", self.device_index)
        self.priority = priority
        self.cuda_stream = id(self)

    def synchronize(self) -> None:
        Told.synchronised("stream")

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> "Stream":
        self.before = current_stream(self.device_index)
        streams()[self.device_index] = self
        return self

    def __exit__(self, *_) -> None:
        streams()[self.device_index] = self.before


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess=False):
        self.at = 0.0  # seconds

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Told.synchronised("event")

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds: of the CPU, which does the work."""
        return 1e3 * (end.at - self.at)


class Thread(threading.local):
    streams: dict[int, Stream] | None = None


THREAD = Thread()


def streams() -> dict[int, Stream]:
    """Those in use by this thread, of every device."""
    if THREAD.streams is None:
        THREAD.streams = {}
    return THREAD.streams


def current_stream(device: object = None) -> Stream:
    index = index_of(device)
    return streams().setdefault(index, default_stream(index))


DEFAULT: dict[int, Stream] = {}


def default_stream(device: object = None) -> Stream:
    index = index_of(device)
    return DEFAULT.setdefault(index, Stream(index))


@contextlib.contextmanager
def on_stream(stream: Stream | None):
    with stream or contextlib.nullcontext():
        yield


def exchange(index: int) -> int:
    """Goes over to a device. Returns the one before."""
    before = torch.ops.fake_gpu.current()
    if index >= 0:
        torch.ops.fake_gpu.use(index)
    return before


# ---------------------------------------------------------------- what torch.cuda says


def visible(count: int) -> int:
    """Of so many devices, those that CUDA_VISIBLE_DEVICES leaves."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return count
    listed = [name for name in names.split(",") if name.isdecimal() and int(name) < count]
    return len(listed)


def properties(device: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="fake GPU",
        total_memory=MEMORY,
        major=9,
        minor=0,
        multi_processor_count=132,
        pci_domain_id=0,
        pci_bus_id=index_of(device),
        pci_device_id=0,
        uuid=f"GPU-{index_of(device)}",
    )


def register(address: int, size: int, flags: int) -> int:
    torch.ops.fake_gpu.pin(address, size)
    return 0


def unregister(address: int) -> int:
    torch.ops.fake_gpu.unpin(address)
    return 0


RUNTIME = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)


def nothing(*_, **__) -> None:
    pass


def storage_to(storage: torch.UntypedStorage, *, device, non_blocking: bool = False):
    """Copies a storage to a device (torch.load)."""
    held = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return held.to(device, non_blocking=non_blocking).untyped_storage()


def on_host(collective: Callable) -> Callable:
    """Lets ranks meet on the CPU's view of tensors."""

    def seen(value: object) -> object:
        on_device = isinstance(value, torch.Tensor) and value.is_cuda
        return torch.ops.fake_gpu.alias(value.detach(), -1) if on_device else value

    def call(*arguments, **named):
        return collective(*map(seen, arguments), **{name: seen(x) for name, x in named.items()})

    return call


def install(count: int) -> None:
    """Makes torch see so many GPUs."""
    said = {
        "_lazy_init": nothing,
        "is_available": lambda: visible(count) > 0,
        "device_count": lambda: visible(count),
        "current_device": torch.ops.fake_gpu.current,
        "set_device": lambda device: torch.ops.fake_gpu.use(index_of(device)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": lambda stream: streams().update({stream.device_index: stream}),
        "synchronize": lambda device=None: Told.synchronised("device"),
        "cudart": lambda: RUNTIME,
        "mem_get_info": lambda device=None: (
            MEMORY - Told.allocated(index_of(device))[0],
            MEMORY,
        ),
        "memory_allocated": lambda device=None: Told.allocated(index_of(device))[0],
        "memory_reserved": lambda device=None: Told.allocated(index_of(device))[0],
        "max_memory_allocated": lambda device=None: Told.allocated(index_of(device))[1],
        "max_memory_reserved": lambda device=None: Told.allocated(index_of(device))[1],
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "set_per_process_memory_fraction": nothing,
    }
    for name, value in said.items():
        setattr(torch.cuda, name, value)

    torch.UntypedStorage.to = storage_to
    torch.Tensor.record_stream = nothing  # memory is never given out too early

    # NCCL is Gloo, which meets on the CPU's view of the tensors.
    begin = dist.init_process_group
    dist.init_process_group = lambda backend=None, **group: begin("gloo", **group)
    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, on_host(getattr(dist, name)))
    for kind in (torch.Tensor, torch.nn.Parameter):
        mp.reducer.ForkingPickler.register(kind, reduce_tensor)


# ---------------------------------------------------------------- memory of several processes

SHARED: dict[int, torch.Tensor] = {}  # address → bytes in shared memory


def reduce_tensor(tensor: torch.Tensor) -> tuple:
    """Pickles a tensor: one on a device goes over to shared memory first (CUDA IPC)."""
    if tensor.device.type != "cuda":
        return reductions.reduce_tensor(tensor)
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in SHARED:
        host = torch.empty(storage.nbytes(), dtype=torch.uint8).share_memory_()
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        host.copy_(whole.set_(storage, 0, host.shape, (1,)))
        torch.ops.fake_gpu.adopt(tensor.detach(), host)
        SHARED[host.data_ptr()] = host
    kept = SHARED[storage.data_ptr()]
    place = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return rebuild_tensor, (kept, tensor.device, tensor.dtype, place, tensor.requires_grad)


def rebuild_tensor(host, device, dtype, place, requires_grad) -> torch.Tensor:
    SHARED[host.data_ptr()] = host
    alias = torch.ops.fake_gpu.alias(host, device.index)
    empty = torch.empty(0, dtype=dtype, device=device)
    return empty.set_(alias.untyped_storage(), *place).requires_grad_(requires_grad)
