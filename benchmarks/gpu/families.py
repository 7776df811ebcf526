"""Measures every family at full size: inference, actor step, precision.

Shares are of a large product's FLOP/s in bf16, measured in the same process. FLOPs are those of the
matrix products of one call, without what checkpointing computes again. peak_gb is the memory that
one call takes beyond the weights (training: and gradients and optimizer), and predicted_gb is what
memory.py says of it.

    inference   act_ms         `model.act` alone: its observations lie on the device
                served_ms      `rollout_worker.serve`: from slots, and back into them
                compile_s      what a rollout worker compiles before it is ready
                first_call_s   the first call of a size
    actor       prefix         where what a frozen VLM made of a frame lies: in the slots, on the
                               GPU from an earlier epoch on, or nowhere, so that it runs again
                read_ms        bringing a micro-batch from the slots to the device
                train_ms       `Learner.train`: forward and backward
                step_ms        `Learner.step`: clipping and optimizer
    precision   gap            of a chunk's log-prob: what training computes against what acted, at
                               the same weights: the mean and the most

Left out: several ranks, processes that share the device.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

import models
from actor_worker import Inbox
from allocations import Sketch, empty, inference_peak, training_peak
from benchmarks.gpu import FAMILIES, Where, in_one_line
from benchmarks.gpu.device import peak
from benchmarks.gpu.subjects import (
    LIBERO,
    Peak,
    Subject,
    filled_slots,
    requests_of,
    room_for,
    subject,
    with_weights,
)
from benchmarks.measuring import flops_of, seconds_of
from config import FLOW, completed
from learner import Learner
from models import compiled, layers
from ranks import Meeting, Ranks
from rollout_worker import compile_where_asked, serve
from streamer import MicroBatch
from transfers import Carrier

Size = Callable[[int], int]  # of a batch of n samples, once it is padded
SAMPLES = (16, 1, 64, 4)  # of an inference, the most telling first
MICRO_BATCHES = (32, 96, 128)  # chunk steps
PLACES = ("slots", "gpu", "off")  # of a frozen prefix


# ---------------------------------------------------------------- inference


def inference(where: Where, name: str) -> Iterator[dict]:
    """Measures inference of so many samples, eager and compiled."""
    peak_rate = peak(where)
    one = subject(where, name)
    models.acting(one.sketch)
    flops = act_flops(one.sketch)
    model = models.acting(with_weights(where, one))
    channels = filled_slots(where, one, model)
    size = int
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            start = time.perf_counter()
            size = compile_as_a_worker(where, one, model)
            yield {"family": name, "mode": mode, "compile_s": time.perf_counter() - start}
        for n in (4,) if where.fake else SAMPLES:
            about = {"family": name, "mode": mode, "samples": n}
            try:
                row = inference_row(where, one, model, channels.pool, n, size)
            except torch.cuda.OutOfMemoryError as error:
                yield about | {"error": in_one_line(error)}
                continue
            row["share"] = n * flops / (row["act_ms"] / 1e3) / peak_rate
            yield about | row | {"tflop_per_sample": flops / 1e12}


@torch.inference_mode()
def inference_row(where: Where, one: Subject, model: nn.Module, pool, n: int, size: Size) -> dict:
    """Measures one number of samples. size: what n samples are padded to."""
    memory = Peak(where)
    obs = compiled.random_observations(model, size(n), where.device)
    noise = compiled.random_noise(model, size(n), where.device)
    start = time.perf_counter()
    model.act(obs, noise)
    if not where.fake:
        torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    peak_gb = memory.gb()
    act = functools.partial(model.act, obs, noise)
    answer = functools.partial(
        serve, model, requests_of(where, n), pool, one.config.train.seed, 0, where.device, size
    )
    act_s, served_s = seconds_of([act, answer], where.device, where.seconds)
    return {
        "act_ms": 1e3 * act_s,
        "samples_per_s": n / act_s,
        "served_ms": 1e3 * served_s,
        "served_per_s": n / served_s,
        "first_call_s": first_s,
        "peak_gb": peak_gb,
        "predicted_gb": inference_peak(Sketch.of(one.sketch), size(n)) / 1e9,
    }


def compile_as_a_worker(where: Where, one: Subject, model: nn.Module) -> Size:
    """Compiles inference as a rollout worker does. Returns what n samples are padded to. For a
    device that is not there nobody can compile."""
    config = completed(one.config, compile=not where.fake)
    lanes = SimpleNamespace(count=max(SAMPLES) // 2)  # each asks for last values, too
    meter = SimpleNamespace(alive=lambda: None)
    return compile_where_asked(model, config, lanes, where.device, meter)


def act_flops(sketch: nn.Module) -> int:
    """Counts the FLOPs of one sample's inference."""
    drawn = sketch.draw([(0, 0, 0, 0)], [True])
    noise = {name: (x.shape[1:], x.dtype) for name, x in drawn.items()}
    obs = empty(sketch.observation_fields(), 1)
    with torch.no_grad():
        return flops_of(functools.partial(sketch.act, obs, empty(noise, 1)))


# ---------------------------------------------------------------- the actor


def actor(where: Where, name: str) -> Iterator[dict]:
    """Measures micro-batches and optimizer steps, wherever what a frozen prefix made is kept."""
    peak_rate = peak(where)
    for place in PLACES if name in FLOW else ("off",):
        epochs = 2 if place == "gpu" else 1
        one = subject(where, name, cache_prefix=place, update_epochs=epochs)
        flops = train_flops(one.sketch, keeps=place == "gpu")
        training = Training(where, one)
        for chunk_steps in (4,) if where.fake else MICRO_BATCHES:
            about = {"family": name, "prefix": place, "chunk_steps": chunk_steps}
            try:
                row = training.row(chunk_steps)
            except torch.cuda.OutOfMemoryError as error:
                yield about | {"error": in_one_line(error)}
                continue
            if "train_ms" in row:
                row["share"] = chunk_steps * flops / (row["train_ms"] / 1e3) / peak_rate
            yield about | row
        del training


class NoMore:
    """Stands for a streamer that has no micro-batch after the one that is measured."""

    def next(self) -> None:
        return None


class Training:
    """A learner, and slots of trajectories for it."""

    def __init__(self, where: Where, one: Subject):
        self.where = where
        self.one = one
        config = one.config
        self.keeps = config.actor.cache_prefix == "gpu"
        model = with_weights(where, one)
        channels = filled_slots(where, one, model)
        ranks = Ranks(0, 1, where.device, Meeting(Path()))

        def build(config, spec, device="cpu", weights="all") -> nn.Module:
            """Gives the learner the model; what training has no use for is saved, which it is not
            here."""
            return nn.Module() if weights == "idle" else model

        with patch.object(models, "build", build):
            self.learner = Learner(config, LIBERO, where.device, ranks, None)
        carrier = Carrier(
            channels.pool, self.learner.device_fields, config.env.segment, where.device
        )
        self.inbox = Inbox(0, config, LIBERO, channels, NoMore(), self.learner.host_fields, carrier)
        self.recomputes = False
        # Bytes of gradients and moments, which the first step makes.
        self.pending = 3 * sum(p.nbytes for p in self.learner.parameters)

    def row(self, chunk_steps: int) -> dict:
        """Measures a micro-batch of so many chunk steps, or says that it does not fit."""
        predicted = self.fitted(chunk_steps)
        says = {"checkpointing": self.recomputes, "predicted_gb": predicted / 1e9}
        if not room_for(self.where, predicted + self.pending):
            return says | {"note": "does not fit"}
        self.one.config.actor.micro_batch = chunk_steps
        if self.learner.prefixes:
            self.learner.prefixes.begin_batch()  # the first pass keeps what the others use
        slots = tuple(range(chunk_steps // self.where.segment))
        micro = MicroBatch(slots, 0, 0, True, len(slots))
        read = functools.partial(self.inbox.read, micro)
        data = read()

        def train() -> None:
            self.learner.train(dict(data), micro)  # which empties what it is given

        # The first pass makes gradients, and the first step what the optimizer remembers.
        if self.pending:
            train()
            self.learner.step()
            self.pending = 0
        memory = Peak(self.where)
        self.learner.train(read(), micro)
        peak_gb = memory.gb()
        device = self.where.device
        calls = [read, train, self.learner.step]
        read_s, train_s, step_s = seconds_of(calls, device, self.where.seconds, least=1)
        return {
            "read_ms": 1e3 * read_s,
            "train_ms": 1e3 * train_s,
            "step_ms": 1e3 * step_s,
            "chunk_steps_per_s": chunk_steps / (read_s + train_s),
            "peak_gb": peak_gb,
        } | says

    def fitted(self, chunk_steps: int) -> int:
        """Returns the bytes that memory.py predicts. Where they do not fit, blocks are recomputed
        from here on."""
        model = Sketch.of(self.one.sketch)
        segment = self.where.segment
        copied = chunk_steps // segment * (segment + 1)
        sizes = (model, chunk_steps, copied)
        predicted = training_peak(*sizes, self.recomputes, self.keeps)
        if not self.recomputes and not room_for(self.where, predicted + self.pending):
            layers.recompute_blocks(self.learner.model)
            self.recomputes = True
            predicted = training_peak(*sizes, True, self.keeps)
        return predicted


def train_flops(sketch: nn.Module, keeps: bool) -> int:
    """Counts the FLOPs of one chunk step's forward and backward pass. keeps: what a frozen VLM made
    is there already."""
    fields = sketch.observation_fields() | sketch.slot_fields()
    fields = {name: fields[name] for name in sketch.training_fields() if name in fields}
    stored = empty(fields | {"actions": (sketch.config.played, torch.float32)}, 1)
    trained = sketch.trainable()
    for name, parameter in sketch.named_parameters():
        parameter.requires_grad_(name in trained)
    if keeps:
        stored |= sketch.look_once(stored)

    def pass_both_ways() -> None:
        out = sketch.evaluate(stored)
        (out["logprob"].sum() + out["value"].sum()).backward()

    return flops_of(pass_both_ways)


# ---------------------------------------------------------------- precision


def precision(where: Where) -> Iterator[dict]:
    """Measures what bf16 gains over fp32, and what it does to log-probs."""
    for name in FAMILIES:
        for kind in ("bfloat16", "float32"):
            about = {"family": name, "precision": kind}
            try:
                yield about | precision_row(where, name, kind)
            except torch.cuda.OutOfMemoryError as error:
                yield about | {"error": in_one_line(error)}


def precision_row(where: Where, name: str, kind: str) -> dict:
    """Measures an inference of all slots at once, and how far from what it says of its own actions
    training is, which computes them in other batches."""
    changes = {"prefix_dtype": kind, "cache_prefix": "off"} if name in FLOW else {}
    one = subject(where, name, segment=1, precision=kind, **changes)
    model = with_weights(where, one, wide=kind == "float32")
    acting = models.acting(with_weights(where, one, wide=kind == "float32"))  # the same again
    channels = filled_slots(where, one, acting)
    fields = ("logprob", *model.training_fields())
    carrier = Carrier(channels.pool, fields, 1, where.device)
    data = carrier.take(tuple(range(where.slots)))
    gaps = []
    with torch.no_grad():
        for some in torch.arange(where.slots).chunk(4):
            stored = {name: x[some[0] : some[-1] + 1, 0] for name, x in data.items()}
            gap = model.evaluate(stored)["logprob"] - stored["logprob"]
            gaps.append(gap.flatten(1).sum(1).abs())
    gaps = torch.cat(gaps)
    noise = compiled.random_noise(model, where.slots, where.device)
    obs = compiled.random_observations(model, where.slots, where.device)
    with torch.inference_mode():
        act = functools.partial(acting.act, obs, noise)
        act_s = seconds_of([act], where.device, where.seconds, least=1)[0]
    return {
        "computed_in": one.config.train.precision,
        "samples": where.slots,
        "act_ms": 1e3 * act_s,
        "samples_per_s": where.slots / act_s,
        "gap_mean": float(gaps.mean()),
        "gap_max": float(gaps.max()),
    }
