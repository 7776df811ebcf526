"""Counts what a model's own functions allocate, on tensors without memory (torch's "meta" device):
`act` on a batch, `evaluate` and backward on a micro-batch.

Nothing is read and no GPU is needed, and no number of a model stands here. Assumed: attention keeps
its output and one number of the softmax per query, as CUDA's kernels do, and inference is not
compiled, which would take less. The meta device's first use imports half a compiler: a second.
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import layers


class Account(TorchDispatchMode):
    """Counts the bytes of the tensors that live on the meta device, and their peak.

    It counts storages, of which views have none of their own. Those of `known` tensors were there
    before, and count nothing."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = 0  # bytes
        self.peak = 0  # bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.enter(tensor.untyped_storage())
        return made

    def enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.leave, key)

    def leave(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Attention(torch.autograd.Function):
    """Allocates what memory-efficient attention does (arXiv 2112.05682)."""

    @staticmethod
    def forward(context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        softmax = q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, out, softmax)
        return out

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in context.saved_tensors[:3])


def attention(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
    """Stands for torch's, which would choose a kernel for the meta device: one that keeps a row of
    the softmax for every query. Keys and values are repeated for the heads of a group."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return Attention.apply(q, k, v)


def peak_of(model: torch.nn.Module, run: Callable[[torch.nn.Module], None]) -> int:
    """Returns the most bytes that run(model) allocates at once, beside the weights of a model on
    the meta device and their gradients."""
    trained = model.trainable()
    copied = copy.deepcopy(model)
    known = list(copied.buffers())
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name in trained)
        known.append(parameter)
        if name in trained:
            parameter.grad = torch.empty_like(parameter)
            known.append(parameter.grad)
    account = Account(known)
    with account, patch.object(F, "scaled_dot_product_attention", attention):
        run(copied)
    return account.peak


@dataclass(frozen=True)
class Sketch:
    """A model on the meta device. Two are equal if functions allocate the same for them."""

    config: object
    weights: tuple[tuple, ...]  # name, dtype, dtype in which it is used, shape
    model: torch.nn.Module = field(compare=False)

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Sketch":
        every = model.named_parameters()
        weights = tuple((n, p.dtype, model.acts_in(n), p.shape) for n, p in every)
        return cls(model.config, weights, model)


@lru_cache
def inference_peak(sketch: Sketch, samples: int) -> int:
    """Returns the bytes of one inference, with its observations and what it returns."""

    def run(copied: torch.nn.Module) -> None:
        drawn = copied.draw([(0, 0, 0, 0)], [True])
        noise = {name: (tensor.shape[1:], tensor.dtype) for name, tensor in drawn.items()}
        copied.act(empty(copied.observation_fields(), samples), empty(noise, samples))

    return peak_of(sketch.model, run)


@lru_cache
def training_peak(
    sketch: Sketch, rows: int, copied_rows: int, checkpointing: bool, keeps: bool
) -> int:
    """Returns the bytes of one forward and backward pass over so many chunk steps.

    copied_rows: of the slots, which the actor copies for it; keeps: what a frozen VLM makes of
    frames is kept on the device."""

    def run(copied: torch.nn.Module) -> None:
        fields = trained_fields(copied)
        if checkpointing:
            layers.recompute_blocks(copied)
        data = empty(fields, copied_rows)
        # What is trained on is taken from them, behind what was left over.
        fields |= {"actions": (copied.config.played, torch.float32)}
        chosen = empty(fields, copied_rows + rows)
        stored = {name: x[:rows] for name, x in chosen.items()}
        stored |= copied.look_once(stored) if keeps else {}
        out = copied.evaluate(stored)
        (out["logprob"].sum() + out["value"].sum()).backward()
        data.clear()  # it lives until here

    return peak_of(sketch.model, run)


def trained_fields(model: torch.nn.Module) -> dict:
    """Returns the fields that `evaluate` reads, of those that the model itself has."""
    fields = model.observation_fields() | model.slot_fields()
    return {name: fields[name] for name in model.training_fields() if name in fields}


def empty(fields: dict, rows: int) -> dict[str, Tensor]:
    """Makes fields [rows, …] on the meta device."""
    return {
        name: torch.empty(rows, *shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in fields.items()
    }


def optimizer_bytes(trained: dict[str, Tensor], fused: bool) -> tuple[int, int]:
    """Returns the bytes that AdamW keeps of weights, two moments, and those that a step has beside
    them: none if it is fused, as on a GPU, else three of the largest. Asking AdamW itself would
    import a compiler."""
    sizes = [parameter.nbytes for parameter in trained.values()]
    return 2 * sum(sizes), 0 if fused else 3 * max(sizes)
