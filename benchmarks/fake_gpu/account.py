"""Counts what a program does with devices: kernels, floating-point operations, copies, waits, and
memory, at any size.

    with Account() as account:
        model = ...                         # on cuda:0
        account.reset()
        serve(...)
        account.launches, account.waits, account.copied

While it counts, tensors on devices have a shape and no numbers (torch's FakeTensor), so that there
is memory and time for billions of weights; those on the CPU stay what they are. What the host asks
of a device is therefore made up: `True` and 1 wherever nobody knows better. Numbers that came from
the host unchanged are known, and so is which rows `nonzero` finds: all.

Attention is counted as the kernel that CUDA would choose (`attention`). Left out: compiled models.
"""

import contextlib
import math
import sys
import weakref
from collections import Counter
from functools import cache, partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_gpu import device as fake_device

ROOT = str(Path(__file__).resolve().parents[2])
aten = torch.ops.aten
SMALL = 2**16  # elements of a tensor whose numbers are worth knowing
BLOCK = 512  # bytes: torch rounds what it allocates on a GPU up to so many
# Operators that launch nothing: their results are views, or not written yet.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
SILENT |= {"_unsafe_view", "lift_fresh"}
# Kernels of operators that are no single one on a GPU.
TOGETHER = (
    110  # tensors that one launch takes at most (aten/src/ATen/native/cuda/MultiTensorApply.cuh)
)
SEVERAL = {"nonzero": 3, "_unique2": 5, "sort": 2}


def of_device(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cuda"


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@cache
def is_composite(function: torch._ops.OpOverload) -> bool:
    """Whether an operator is made of others, whatever the device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), "CompositeImplicitAutograd"
    )


class Account(TorchDispatchMode):
    """The counts since `reset`, of all devices together; memory is of each."""

    def __init__(self):
        super().__init__()
        self.depth = 0  # how often it was entered: again for the parts of an operator
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.sizes: dict[int, int] = {}  # bytes of every storage
        self.allocated: Counter[int] = Counter()  # device → bytes
        self.peak: Counter[int] = Counter()
        self.known = weakref.WeakKeyDictionary()  # storage on a device → its numbers
        self.reset()

    def reset(self) -> None:
        """Begins to count anew. What is allocated stays allocated."""
        self.kernels: Counter[str] = Counter()  # operator → launches
        # Of every product: dtype, floating-point operations, bytes that it touches.
        self.products: list[tuple[str, int, int]] = []
        self.moved: Counter[str] = Counter()  # dtype → bytes that all other kernels touch
        self.copied: Counter[str] = Counter()  # "to pageable", … → bytes between host and device
        self.copies: Counter[str] = Counter()  # the same → how many
        self.hosted = 0  # bytes that the host copies within its own memory
        self.waits: Counter[str] = Counter()  # "item at learner.py:103" → how often the host waits
        self.attention: Counter[str] = Counter()  # kernel → calls
        self.peak = Counter(self.allocated)

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    @property
    def synchronisations(self) -> int:
        return sum(self.waits.values())

    @property
    def operations(self) -> dict[str, int]:
        """Floating-point operations of products, by dtype."""
        found = Counter()
        for kind, operations, _ in self.products:
            found[kind] += operations
        return dict(found)

    def to_json(self) -> dict:
        return {
            "launches": self.launches,
            "synchronisations": self.synchronisations,
            "waits": dict(self.waits.most_common()),
            "operations": self.operations,
            "moved": dict(self.moved),
            "copied": dict(self.copied),
            "copies": dict(self.copies),
            "hosted": self.hosted,
            "attention": dict(self.attention),
            "peak": {f"cuda:{index}": size for index, size in self.peak.items()},
        }

    # ------------------------------------------------------------ entering and leaving

    def __enter__(self) -> "Account":
        self.depth += 1
        if self.depth > 1:
            return super().__enter__()
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) is a copy that counts
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(patch.object(F, "scaled_dot_product_attention", self.attend))
        lists = partialmethod(listed, self)  # torch's own asks for one number after the other
        self.patches.enter_context(patch.object(FakeTensor, "tolist", lists))
        # torch takes one kernel for many tensors where all are of a type that it knows.
        types = [*_foreach_utils._foreach_supported_types, FakeTensor]
        self.patches.enter_context(patch.object(_foreach_utils, "_foreach_supported_types", types))
        told = fake_device.Told
        self.patches.enter_context(patch.object(told, "synchronised", self.wait))
        self.patches.enter_context(patch.object(told, "allocated", self.memory_of))
        super().__enter__()
        return self

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if self.depth:
            return
        self.patches.close()
        torch._C._set_only_lift_cpu_tensors(self.before)

    # ------------------------------------------------------------ every operator comes by here

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        place = kwargs.get("device")
        on_device = place is not None and torch.device(place).type == "cuda"
        if function.namespace == "prim":
            return function(*args, **kwargs)
        if not on_device and not any(map(of_device, given)):
            if function is aten.copy_.default:
                self.hosted += bytes_of(args[0])
            return function(*args, **kwargs)

        # In inference mode operators arrive that are made of others
        if is_composite(function):
            with self:
                return function.decompose(*args, **kwargs)

        # What the host must wait for
        name = function._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "item"):
            self.wait("item")
            return self.on_host(args[0]).item()
        if name in ("_to_copy", "copy_", "_copy_from"):
            source, target = (args[0], place) if name == "_to_copy" else (args[1], args[0].device)
            target = torch.device(target if target is not None else source.device)
            if source.device != target and "cpu" in (source.device.type, target.type):
                return self.transfer(name, source, target, args, kwargs)
        if name in ("nonzero", "_unique2", "unique_dim", "masked_select"):
            return self.of_unknown_size(name, args)
        if name == "index":
            args = (args[0], self.by_numbers(args[1]))

        # Everything else
        made = self.run(function, args, kwargs)
        self.count(function, name, args, kwargs, made)
        return made

    def run(self, function, args, kwargs):
        def faked(x: object) -> object:
            real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
            return self.fake.from_tensor(x, static_shapes=True) if real else x

        args, kwargs = tree_map(faked, (args, kwargs))
        with self.fake:
            made = function(*args, **kwargs)
        for tensor in tree_leaves(made):
            if of_device(tensor):
                self.enter(tensor)
        return made

    def count(self, function, name: str, args, kwargs, made) -> None:
        if name in SILENT or function.is_view:
            return
        results = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if of_device(x)]
        together = name.startswith(("_foreach_", "_fused_"))
        launches = -(-len(inputs) // TOGETHER) if together else SEVERAL.get(name, 1)
        self.kernels[name] += launches
        for tensor in results:
            self.known.pop(tensor.untyped_storage(), None)
        dtype = str((inputs or results)[0].dtype).removeprefix("torch.")
        touched = sum(map(bytes_of, inputs))
        touched += sum(bytes_of(x) for x in results if not any(x is y for y in inputs))
        packet = function.overloadpacket
        if packet in flop_registry:
            operations = flop_registry[packet](*args, **kwargs, out_val=made)
            lossy = dtype == "float32" and torch.get_float32_matmul_precision() != "highest"
            self.products.append(("tf32" if lossy else dtype, operations, touched))
        else:
            self.moved[dtype] += touched

    # ------------------------------------------------------------ between host and device

    def transfer(self, name: str, source: Tensor, target: torch.device, args, kwargs):
        """Copies a tensor from the host to a device, or back."""
        to_device = target.type == "cuda"
        non_blocking = kwargs.get("non_blocking", False) or name == "copy_" and any(args[2:])
        if to_device:
            made = self.run(getattr(aten, name).default, args, kwargs)
            if source.numel() <= SMALL and not isinstance(source, FakeTensor):
                self.known[made.untyped_storage()] = made, source.to(made.dtype).clone()
            host = source
        elif name == "copy_":
            made = args[0].copy_(self.on_host(source))
            host = made
        else:
            made = self.on_host(source).to(kwargs.get("dtype") or source.dtype)
            made = made.pin_memory() if non_blocking else made
            host = made
        pinned = host.is_pinned()
        way = f"{'to' if to_device else 'from'} {'pinned' if pinned else 'pageable'}"
        self.copied[way] += bytes_of(made)
        self.copies[way] += 1
        self.kernels["copy"] += 1
        if not pinned or not non_blocking:
            self.wait(f"copy {way}")
        return made

    def on_host(self, tensor: Tensor) -> Tensor:
        """Returns the numbers of a tensor on a device: those that are known, or made-up ones."""
        found, numbers = self.known.get(tensor.untyped_storage(), (None, None))
        if found is not None and found.shape == tensor.shape and found.dtype == tensor.dtype:
            return numbers.clone()
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def of_unknown_size(self, name: str, args):
        """Runs an operator the size of whose result only the device knows."""
        self.wait(name)
        self.kernels[name] += SEVERAL.get(name, 1)
        numbers = [self.on_host(x) if of_device(x) else x for x in args]
        made = getattr(aten, name)(*numbers)
        place = args[0].device
        several = isinstance(made, tuple)
        found = tuple(self.keep(x, place) for x in (made if several else (made,)))
        return found if several else found[0]

    def by_numbers(self, indices: list) -> list:
        """Returns indices without masks, which a GPU turns into numbers, too."""
        found = []
        for index in indices:
            if index is not None and index.dtype is torch.bool:
                found += self.of_unknown_size("nonzero", (index,)).unbind(1)
            else:
                found.append(index)
        return found

    def keep(self, numbers: Tensor, place: torch.device) -> Tensor:
        """Makes a tensor on a device, of numbers that are known."""
        with self.fake:
            made = torch.empty(numbers.shape, dtype=numbers.dtype, device=place)
        self.enter(made)
        self.known[made.untyped_storage()] = made, numbers
        return made

    def wait(self, what: str) -> None:
        """Notes that the host waits for a device, and where in the project."""
        place = "backward"
        frame = sys._getframe(1)
        while frame:
            file = frame.f_code.co_filename
            if file.startswith(ROOT) and ".venv" not in file and "fake_gpu" not in file:
                place = f"{file.removeprefix(ROOT + '/')}:{frame.f_lineno}"
                break
            frame = frame.f_back
        self.waits[f"{what} at {place}"] += 1

    # ------------------------------------------------------------ memory

    def memory_of(self, index: int) -> tuple[int, int]:
        """Returns the bytes that are allocated on a device, and their peak."""
        return self.allocated[index], self.peak[index]

    def enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        index = tensor.device.index or 0
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.sizes[key] = size
        self.allocated[index] += size
        self.peak[index] = max(self.peak[index], self.allocated[index])
        weakref.finalize(storage, self.leave, key, index)

    def leave(self, key: int, index: int) -> None:
        self.allocated[index] -= self.sizes.pop(key)

    # ------------------------------------------------------------ attention

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        """Calls the kernel that CUDA would choose."""
        if not of_device(q):
            return ATTENTION(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **more)
        kernel, out = attention_on_device(q, k, v, attn_mask, is_causal, scale, **more)
        self.attention[f"{kernel} {str(q.dtype).removeprefix('torch.')}"] += 1
        return out


def listed(tensor: FakeTensor, account: Account) -> list:
    """Stands for Tensor.tolist."""
    account.wait("tolist")
    account.kernels["copy"] += 1
    return account.on_host(tensor).tolist()


ATTENTION = F.scaled_dot_product_attention


def attention_on_device(q, k, v, mask, is_causal, scale, dropout_p=0.0, enable_gqa=False):
    """Returns the name of the kernel and what it gives.

    The choice is that of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, without cuDNN's:
    FlashAttention takes half precision without a mask and heads of at most 256; memory-efficient
    attention takes the rest, but no groups of heads; the plain one takes all."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    width = q.shape[-1]
    if half and mask is None and width <= 256:
        more = -width % 8
        padded = [F.pad(x, (0, more)) if more else x for x in (q, k, v)]
        scale = width**-0.5 if scale is None else scale
        out = aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal, scale=scale)[0]
        return "flash", out[..., :width]
    if enable_gqa and q.shape[1] != k.shape[1]:
        groups = {"scale": scale, "enable_gqa": True}
        plain = aten._scaled_dot_product_attention_math
        return "math", plain(q, k, v, mask, 0.0, is_causal, **groups)[0]
    if mask is not None:
        mask = aligned(mask, q.dtype).expand(*q.shape[:-1], k.shape[2])
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    efficient = aten._scaled_dot_product_efficient_attention
    return "efficient", efficient(q, k, v, mask, keeps, 0.0, is_causal, scale=scale)[0]


def aligned(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Prepares a mask as memory-efficient attention wants it: added, in rows of 16 bytes."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    more = -mask.shape[-1] % (16 // dtype.itemsize)
    return F.pad(mask, (0, more))[..., : mask.shape[-1]] if more else mask
