"""The actor with and without the frozen prefix's cache in the slots, and when computing the prefix
again would be better.

    python bench.py prefix --model pi05

One micro-batch of SAMPLES chunk steps with the VLM frozen, random weights and pictures; medians.
Rows: `cached` (the slots hold keys and values, or GR00T's features) and `recomputed` (they do not,
and every pass over a sample runs the prefix on its picture).

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

import math

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring import flops_of, matmul, peak_bytes_of, random_model, seconds_of, where
from channel import SlotPool
from config import UserError
from models.compiled import random_noise, random_observations

SAMPLES = 32  # chunk steps of a micro-batch
POOL_BYTES = (
    256e6  # at least, so that reading is reading from memory and not from a cache of the processor
)


def bytes_of(fields: dict) -> int:
    """fields: name → (shape, dtype)."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in fields.values())


def actor_model(name: str, size: str, device: str, cached: bool) -> nn.Module:
    """As an actor holds it: the VLM frozen, what is trained in fp32."""
    changes = {"train_vlm": False, "cache_prefix": cached}
    half = device == "cuda"
    if half:
        changes["prefix_dtype"] = "bfloat16"
    model = random_model(name, size, device, torch.float32, **changes)
    trainable = model.trainable()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trainable)
        if half and key not in trainable:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def frozen_prefix(model: nn.Module, obs: dict[str, Tensor]) -> None:
    """What the cache saves: π's prefix, or GR00T's vision-language features."""
    with torch.no_grad():
        model.prefix(obs["image"], obs["tokens"]) if hasattr(model, "prefix") else model.features(
            obs
        )


def actor_row(model: nn.Module, device: str, seconds: float) -> dict:
    """What one way of training takes; see the top of this file."""
    fields = model.observation_fields() | model.slot_fields()
    obs = random_observations(model, SAMPLES, device)
    stored = obs | model.act(obs, random_noise(model, SAMPLES, device))
    pool = SlotPool(fields, max(2, math.ceil(POOL_BYTES / bytes_of(fields) / SAMPLES)) * SAMPLES)
    for name in fields:
        pool[name].unflatten(0, (-1, SAMPLES)).copy_(stored[name].to("cpu"))
    del stored
    if device == "cuda":
        pool.pin()
    names = model.training_fields()
    turn = 0

    def read() -> dict[str, Tensor]:
        nonlocal turn
        turn = (turn + 1) % (pool.slots // SAMPLES)
        slots = np.arange(turn * SAMPLES, (turn + 1) * SAMPLES)
        return {name: pool.gather(name, slots).to(device, non_blocking=True) for name in names}

    data = read()
    parameters = list(model.trainable().values())

    def train() -> None:
        out = model.evaluate(data)
        (out["logprob"].mean() + out["value"].mean()).backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()  # which keeps its memory, as the actor does

    held = [p for name, p in model.named_parameters() if not name.startswith(model.idle())]
    read_s, train_s = (taken / SAMPLES for taken in seconds_of([read, train], device, seconds))
    return {
        "s_per_sample": read_s + train_s,
        "read_s_per_sample": read_s,
        "train_s_per_sample": train_s,
        "slot_kb_per_sample": bytes_of(fields) / 1e3,
        "read_kb_per_sample": bytes_of({n: fields[n] for n in names}) / 1e3,
        "weights_mb": sum(p.numel() * p.element_size() for p in held) / 1e6,
        "peak_mb": peak_bytes_of(train, device) / 1e6,
        "gflop_per_sample": flops_of(train) / SAMPLES / 1e9,
    }


def prefix_rates(model: nn.Module, device: str, seconds: float) -> dict:
    """FLOP/s of the frozen part alone, and of a matrix product in its type."""
    obs = random_observations(model, SAMPLES, device)
    flops = flops_of(lambda: frozen_prefix(model, obs))
    product, product_flops = matmul(device, next(model.language.parameters()).dtype)
    prefix_s, product_s = seconds_of([lambda: frozen_prefix(model, obs), product], device, seconds)
    return {
        "prefix_gflop_per_s": flops / prefix_s / 1e9,
        "matmul_gflop_per_s": product_flops / product_s / 1e9,
    }


def rule(cached: dict, recomputed: dict) -> str:
    """Both sides of the rule at the top of this file, and the bandwidth at which they are equal."""
    mb = (cached["slot_kb_per_sample"] - recomputed["slot_kb_per_sample"]) / 1e3
    gflop = recomputed["gflop_per_sample"] - cached["gflop_per_sample"]
    bandwidth = cached["copy_gb_per_s"]
    rate = cached["prefix_gflop_per_s"]
    read_s = mb / 1e3 / bandwidth
    compute_s = gflop / rate
    return (
        f"Recomputing is better where bytes / bandwidth > FLOPs / rate. Here, per sample: {mb:.3g} "
        f"MB / {bandwidth:.3g} GB/s = "
        f"{1e3 * read_s:.3g} ms against {gflop:.3g} GFLOP / {rate:.4g} GFLOP/s = "
        f"{1e3 * compute_s:.3g} ms: "
        f"{'recompute' if read_s > compute_s else 'keep the cache'}. They are equal at "
        f"{mb / 1e3 / compute_s:.3g} GB/s. "
        f"The cache of 1000 samples takes {mb:.3g} GB."
    )


def measure(name: str, size: str, seconds: float) -> list[dict]:
    """The two rows. Raises UserError where there is no prefix or the size does not suit the
    machine."""
    if name == "oft":
        raise UserError(
            "oft has no prefix to cache, its attention goes both ways: give --model pi05, pi0 or "
            "gr00t"
        )
    device, size = where(size)
    rows = []
    rates = {}
    for cached in (True, False):
        model = actor_model(name, size, device, cached)
        row = {"model": name, "size": size, "prefix": "cached" if cached else "recomputed"}
        rows.append(row | actor_row(model, device, seconds))
        rates = rates or prefix_rates(model, device, seconds)
        model = None  # before the next one is made
    copied = {"copy_gb_per_s": rows[0]["read_kb_per_sample"] / 1e6 / rows[0]["read_s_per_sample"]}
    rows = [row | copied | rates for row in rows]
    print(rule(*rows))
    return rows
