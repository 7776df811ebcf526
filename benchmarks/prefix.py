"""Measures the actor with and without the frozen prefix's cache in the slots, and finds when
computing the prefix again would be better.

    python bench.py prefix --model pi05

It takes one micro-batch of SAMPLES chunk steps with the VLM frozen, random weights and pictures.
Figures are medians. There are two rows: `cached` (the slots hold keys and values, or GR00T's
features) and `recomputed` (they do not, and every pass over a sample runs the prefix on its
picture).

    s_per_sample               the actor's work: read_s_per_sample + train_s_per_sample
    read_s_per_sample          `SlotPool.gather` of what `evaluate` reads, and its copy to the GPU
                               where there is one
    train_s_per_sample         evaluate + backward
    slot_kb_per_sample         observation and the policy's own fields
    read_kb_per_sample         those of them that `evaluate` reads
    weights_mb                 weights that the actor's device holds: with the cache, the VLM's are
                               not among them
    peak_mb                    memory of evaluate + backward beyond weights, gradients and inputs
    gflop_per_sample           of evaluate + backward
    copy_gb_per_s              what the cached row reads over the time that it takes
    prefix_gflop_per_s         FLOPs of the prefix over the time of the prefix alone
    matmul_gflop_per_s         of a large matrix product in the type of the prefix, for comparison

The rule: recomputing is better where (bytes that the cache adds to a sample) / (bytes/s at which
they are read) is more than (FLOPs that recomputing adds) / (FLOP/s), or where slots of that size do
not fit the memory. A GPU runs the full model, its prefix in bf16; a CPU the embedded one in fp32.
Left out: slots on the GPU, gradients summed over ranks, the optimizer, writing the cache (the
rollout worker computes it anyway).
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

import transfers
from benchmarks.measuring import flops_of, matmul, peak_bytes_of, random_model, seconds_of, where
from channel import SlotPool
from errors import require
from models.compiled import random_noise, random_observations

SAMPLES = 32  # chunk steps of a micro-batch
POOL_BYTES = 256e6  # at least, so that reading is from memory and not from a processor's cache


def bytes_of(fields: dict) -> int:
    """Adds up the bytes of fields: name → (shape, dtype)."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in fields.values())


def actor_model(name: str, size: str, device: str, cached: bool) -> nn.Module:
    """Makes a model as an actor holds it: the VLM frozen, what is trained in fp32, and on a GPU
    computed in bf16."""
    changes = {"train_vlm": False, "cache_prefix": cached}
    half = device == "cuda"
    if half:
        changes["prefix_dtype"] = "bfloat16"
    model = random_model(name, size, device, torch.float32, **changes)
    model.compute = torch.bfloat16 if half else None
    trainable = model.trainable()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trainable)
        if half and key not in trainable:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def frozen_prefix(name: str, model: nn.Module, obs: dict[str, Tensor]) -> None:
    """Runs what the cache saves: π's prefix, or GR00T's vision-language features."""
    with torch.no_grad():
        if name == "gr00t":
            model.features(obs)
        else:
            model.prefix(obs["image"], obs["tokens"])


class MicroBatches:
    """A pool of slots, read one micro-batch after another."""

    def __init__(self, model: nn.Module, device: str):
        self.fields = model.observation_fields() | model.slot_fields()
        self.names = model.training_fields()
        self.device = device
        self.count = max(2, math.ceil(POOL_BYTES / bytes_of(self.fields) / SAMPLES))
        self.turn = 0  # which micro-batch was read last
        steps = {name: ((1, *shape), dtype) for name, (shape, dtype) in self.fields.items()}
        self.pool = SlotPool(steps, self.count * SAMPLES)
        obs = random_observations(model, SAMPLES, device)
        stored = obs | model.act(obs, random_noise(model, SAMPLES, device))
        for name in self.fields:
            self.pool[name][:, 0].unflatten(0, (-1, SAMPLES)).copy_(stored[name].to("cpu"))
        transfers.lock(self.pool, self.names, device)

    def read(self) -> dict[str, Tensor]:
        """Reads the next micro-batch: what `evaluate` needs, on the device."""
        self.turn = (self.turn + 1) % self.count
        slots = np.arange(self.turn * SAMPLES, (self.turn + 1) * SAMPLES)
        return transfers.read(self.pool, self.names, slots, 0 * slots, self.device)


def actor_row(model: nn.Module, device: str, seconds: float) -> dict:
    """Measures what one way of training takes; see the top of this file."""
    batches = MicroBatches(model, device)
    data = batches.read()
    parameters = list(model.trainable().values())

    def train() -> None:
        out = model.evaluate(data)
        (out["logprob"].mean() + out["value"].mean()).backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()  # which keeps its memory, as the actor does

    read_s, train_s = seconds_of([batches.read, train], device, seconds)
    fields = batches.fields
    held = [p for name, p in model.named_parameters() if not name.startswith(model.idle())]
    return {
        "s_per_sample": read_s / SAMPLES + train_s / SAMPLES,
        "read_s_per_sample": read_s / SAMPLES,
        "train_s_per_sample": train_s / SAMPLES,
        "slot_kb_per_sample": bytes_of(fields) / 1e3,
        "read_kb_per_sample": bytes_of({name: fields[name] for name in batches.names}) / 1e3,
        "weights_mb": sum(p.numel() * p.element_size() for p in held) / 1e6,
        "peak_mb": peak_bytes_of(train, device) / 1e6,
        "gflop_per_sample": flops_of(train) / SAMPLES / 1e9,
    }


def prefix_rates(name: str, model: nn.Module, device: str, seconds: float) -> dict:
    """Measures the FLOP/s of the frozen part alone, and of a matrix product in its type."""
    obs = random_observations(model, SAMPLES, device)
    prefix = functools.partial(frozen_prefix, name, model, obs)
    flops = flops_of(prefix)
    product, product_flops = matmul(device, next(model.language.parameters()).dtype)
    prefix_s, product_s = seconds_of([prefix, product], device, seconds)
    return {
        "prefix_gflop_per_s": flops / prefix_s / 1e9,
        "matmul_gflop_per_s": product_flops / product_s / 1e9,
    }


def rule(cached: dict, recomputed: dict) -> str:
    """Writes both sides of the rule at the top of this file, and where they are equal."""
    mb = (cached["slot_kb_per_sample"] - recomputed["slot_kb_per_sample"]) / 1e3
    gflop = recomputed["gflop_per_sample"] - cached["gflop_per_sample"]
    bandwidth = cached["copy_gb_per_s"]
    rate = cached["prefix_gflop_per_s"]
    read_s = mb / 1e3 / bandwidth
    compute_s = gflop / rate
    advice = "recompute" if read_s > compute_s else "keep the cache"
    return (
        "Recomputing is better where bytes / bandwidth > FLOPs / rate. Here, per sample: "
        f"{mb:.3g} MB / {bandwidth:.3g} GB/s = {1e3 * read_s:.3g} ms against "
        f"{gflop:.3g} GFLOP / {rate:.4g} GFLOP/s = {1e3 * compute_s:.3g} ms: {advice}. "
        f"They are equal at {mb / 1e3 / compute_s:.3g} GB/s. "
        f"The cache of 1000 samples takes {mb:.3g} GB."
    )


def measure(name: str, size: str, seconds: float) -> list[dict]:
    """Measures both ways. Returns their rows.

    Raises UserError where there is no prefix or the size does not suit the machine.
    """
    require(
        name != "oft",
        "oft has no prefix to cache, its attention goes both ways: give --model pi05, pi0 or gr00t",
    )
    device, size = where(size)
    rows = []
    rates = {}
    for cached in (True, False):
        model = actor_model(name, size, device, cached)
        row = {"model": name, "size": size, "prefix": "cached" if cached else "recomputed"}
        rows.append(row | actor_row(model, device, seconds))
        rates = rates or prefix_rates(name, model, device, seconds)
        model = None  # before the next one is made
    copied = {"copy_gb_per_s": rows[0]["read_kb_per_sample"] / 1e6 / rows[0]["read_s_per_sample"]}
    rows = [row | copied | rates for row in rows]
    print(rule(*rows))
    return rows
