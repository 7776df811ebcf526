"""Imitation: trains a model on demonstrations, by supervised learning.

`pretrain.py` decides on model, data and settings; this file trains, in processes that average
gradients. The loss is the family's own: flow matching, or cross-entropy of action tokens.

A piece is some neighbouring frames of an episode; a block is as many pieces as fit in 1 GB. Threads
read the next block while the present one is learned from, so a dataset may be larger than memory.
The frames of a block come in random order. Left out: weights that do not fit one GPU (train.py's
--shard); resuming (start from a checkpoint that was saved on the way).
"""

import contextlib
import itertools
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

import allocations
import machine
import models
import output
from config import Config
from demonstrations import Demonstrations
from errors import UserError, require
from files import alike, whole
from gradients import Gradients
from models import checkpoint, layers
from models.formats import pictures
from processes import (
    Interrupts,
    interrupts_heard,
    interrupts_wait,
    keep_freed_memory,
    leave_interrupts,
)
from ranks import Meeting, Ranks

# Constants, because the order of sums, and so every bit of a small checkpoint, depends on them.
PROCESSES = 2  # where there is no GPU; else one for each
WARMUP = 50  # optimizer steps
# Bytes of a block that a process learns from, and as many of the next one, which is being read.
BLOCK = 10**9
PIECE = 256  # frames of an episode that are read at once, at most
COUNTED = 20_000  # frames that statistics of actions are made from, about, or every H-th of all
SAID_EVERY = 10.0  # seconds between lines


@dataclass(kw_only=True)
class Lesson:
    """All that a process needs to know."""

    settings: Config  # of the model to begin with, as for train.py
    spec: object  # envs.EnvSpec
    header: checkpoint.Header  # of the model, with the statistics that go by
    data: Demonstrations | None  # None while experts have yet to act
    cameras: tuple[str, ...]  # one for each of the model's views
    every: int  # frames from one that is learned from to the next
    steps: int
    batch: int  # frames of an optimizer step, of all processes
    micro_batch: int  # frames of one forward and backward pass
    checkpointing: bool
    lr: float
    seed: int
    out: Path
    vocabulary: tuple[Path, Path]  # its file, and where it goes beside the weights
    save_every: int  # optimizer steps; 0: only at the end
    half: bool  # saves weights in half precision

    @property
    def horizon(self) -> int:
        """H, actions that the model predicts at once."""
        return self.header.shape.get("horizon", self.header.shape["chunk"])

    def preparation(self):
        settings = self.settings.train
        return models.preparation(settings.model, self.header, settings.tokenizer)


def partial_of(out: Path) -> Path:
    """Returns where weights are saved until all steps are done, and `out` stays as it was."""
    return out.with_suffix(".partial.safetensors")


def unfinished_of(out: Path) -> tuple[Path, Path]:
    """Names weights and vocabulary before all steps are done."""
    return partial_of(out), partial_of(out).with_suffix(".model")


def following(actions: np.ndarray, frame: int, horizon: int) -> np.ndarray:
    """Returns the actions [H, A] from a frame on. After an episode's end the last one is repeated,
    as LeRobot's reader does, and its π0 and openpi learn from that, too."""
    return actions[np.minimum(np.arange(frame, frame + horizon), len(actions) - 1)]


def counted(data: Demonstrations, preparation, horizon: int) -> dict:
    """Computes a header's statistics of a dataset: of states, and of actions as they are to be
    predicted. "counted" says that they are not those of another project's files."""
    total = sum(len(episode.times) for episode in data.episodes)
    stride = max(1, min(horizon, total // COUNTED))
    actions = [
        preparation.in_data(following(one.actions, frame, horizon), one.states[frame])
        for one in data.episodes
        for frame in range(0, len(one.times), stride)
    ]
    states = np.concatenate([episode.states for episode in data.episodes])
    actions = np.concatenate(actions, dtype=np.float64)
    return preparation.counted(states.astype(np.float64), actions) | {"counted": True}


class Piece(NamedTuple):
    """Frames of an episode that are learned from, neighbours, and so few that they fit memory."""

    episode: int  # its place in the dataset
    frames: range


def check_first_frames(lesson: Lesson) -> None:
    """Raises UserError where pictures cannot be read, or the model cannot take them or a task."""
    reader = Reader(lesson)
    tasks = {episode.task: place for place, episode in enumerate(lesson.data.episodes)}
    for place in tasks.values():
        reader.read(Piece(place, range(1)))


class Reader:
    """Batches of one process, without end. The seed says in which order frames come.

    In each epoch all processes share the pieces out anew, and so learn from all frames equally
    often, however unequal episodes are."""

    def __init__(self, lesson: Lesson, rank: int = 0, ranks: int = 1):
        self.lesson = lesson
        self.preparation = lesson.preparation()
        self.rank = rank
        self.ranks = ranks
        self.pieces = []
        for place, episode in enumerate(lesson.data.episodes):
            frames = range(0, len(episode.times), lesson.every)
            for first in range(0, len(frames), PIECE):
                self.pieces.append(Piece(place, frames[first : first + PIECE]))
        size = lesson.header.shape["image_size"]
        bytes_of_all = sum(len(piece.frames) for piece in self.pieces) * len(lesson.cameras)
        bytes_of_all *= 3 * size * size
        self.at_once = max(1, BLOCK * len(self.pieces) // bytes_of_all)  # pieces
        self.threads = max(1, min(8, len(os.sched_getaffinity(0)) // ranks))

    def blocks(self) -> Iterator[tuple[list[Piece], list[tuple[Piece, int]]]]:
        """Yields the pieces of a block, and their frames in the order in which they come."""
        for epoch in itertools.count():
            shared = np.random.default_rng([self.lesson.seed, epoch]).permutation(len(self.pieces))
            # Where there are fewer pieces than processes, begin at another process in each epoch.
            first = (self.rank - epoch * len(self.pieces)) % self.ranks
            mine = [self.pieces[i] for i in shared[first :: self.ranks]]
            random = np.random.default_rng([self.lesson.seed, epoch, self.rank])
            for first in range(0, len(mine), self.at_once):
                block = mine[first : first + self.at_once]
                frames = [(piece, i) for piece in block for i in range(len(piece.frames))]
                yield block, [frames[i] for i in random.permutation(len(frames))]

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        """Reads a piece of n frames as the model sees them: fields [n, …]. Raises UserError."""
        lesson = self.lesson
        episode = lesson.data.episodes[piece.episode]
        size = lesson.header.shape["image_size"]
        rows = []
        seen = lesson.data.pictures(episode, lesson.cameras, piece.frames)
        for frame, images in zip(piece.frames, seen, strict=True):
            if not lesson.header.published and images.shape[1:3] != (size, size):
                images = pictures.resize_bicubic(torch.from_numpy(images), size).numpy()
            state = episode.states[frame]
            row = dict(self.preparation.observe(images, state, episode.task))
            actions = following(episode.actions, frame, lesson.horizon)
            rows.append(row | {"actions": self.preparation.targets(actions, state)})
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def frames(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Future, int]]:
        """Yields one frame after the other, while those of the next block are read."""
        reading: dict[Piece, Future] = {}
        for (block, frames), (later, _) in itertools.pairwise(self.blocks()):
            wanted = dict.fromkeys((*block, *later))
            reading = {one: reading.get(one) or pool.submit(self.read, one) for one in wanted}
            for piece, i in frames:
                yield reading[piece], i

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yields fields [size, …] on the host."""
        pool = ThreadPoolExecutor(self.threads)
        try:
            frames = self.frames(pool)
            while True:
                rows = [(future.result(), i) for future, i in itertools.islice(frames, size)]
                names = rows[0][0]
                stacked = {name: np.stack([read[name][i] for read, i in rows]) for name in names}
                yield {name: torch.from_numpy(x) for name, x in stacked.items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


LESS_MEMORY = "give a smaller --micro-batch, --checkpointing on, or --lora-rank"


def learn(lesson: Lesson) -> bool:
    """Learns in processes of its own, until all steps are done, or an interrupt ends that early.
    Either way what was learned is saved. Returns whether all steps were done. Raises UserError."""
    count = machine.gpus() or PROCESSES
    context = mp.get_context("spawn")
    stop = context.Event()
    errors = context.SimpleQueue()
    workers = []
    codes: list[int | None] = [None]
    interrupts = Interrupts()
    with tempfile.TemporaryDirectory() as folder:
        before = {}
        try:
            with interrupts_wait():
                for number in interrupts_heard():
                    before[number] = signal.signal(number, interrupts.note)
                for rank in range(count):
                    args = (rank, count, lesson, Path(folder) / "meeting", stop, errors)
                    workers.append(context.Process(target=work, args=args))
                    workers[-1].start()
            while errors.empty() and not interrupts.twice:
                codes = [worker.exitcode for worker in workers]
                if any(codes) or None not in codes:
                    break
                if interrupts:
                    stop.set()
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
            for number, handler in before.items():
                signal.signal(number, handler)
    if not errors.empty():
        raise UserError(errors.get())
    killed = -min(code or 0 for code in codes)
    require(not killed, f"signal {killed} ended a process: is the host out of memory?")
    if any(codes):
        raise SystemExit(1)  # its traceback is on the screen
    if None in codes:
        raise KeyboardInterrupt
    return not partial_of(lesson.out).exists()


def work(rank: int, count: int, lesson: Lesson, meeting: Path, stop, errors) -> None:
    """Runs one process, which is ended from outside where it has an error.

    stop: an event that ends all processes after the running step; errors: a queue of sentences."""
    leave_interrupts(mp.parent_process().pid)
    try:
        fit(rank, count, lesson, meeting, stop)
        return
    except UserError as error:
        errors.put(str(error))
    except torch.OutOfMemoryError:
        errors.put(f"out of GPU memory: {LESS_MEMORY}")
    time.sleep(60.0)  # else the others would complain that it is gone


def fit(rank: int, count: int, lesson: Lesson, meeting: Path, stop) -> None:
    """Trains with AdamW. Every process draws the same noise, and takes its own part of it.

    On a CPU one thread in each of two processes is nearly twice as fast as two threads in one."""
    # Build the model, and choose this process's part of every batch.
    device = f"cuda:{rank}" if machine.gpus() else "cpu"
    keep_freed_memory()
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    ranks = Ranks(rank, count, device, Meeting(meeting))
    model = built(lesson, device)
    parameters = list(model.trainable().values())
    fused = device != "cpu"
    rates = {"lr": lesson.lr, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": fused}
    optimizer = torch.optim.AdamW(parameters, **rates)
    gradients = Gradients(parameters, ranks)
    mine = slice(rank * lesson.batch // count, (rank + 1) * lesson.batch // count)
    size = mine.stop - mine.start
    parts = [slice(i, i + lesson.micro_batch) for i in range(0, size, lesson.micro_batch)]
    batches = Reader(lesson, rank, count).batches(size)
    torch.manual_seed(lesson.seed)
    said = started = time.monotonic()
    for step in range(1, lesson.steps + 1):
        # Forward and backward, in parts that fit.
        batch = next(batches)
        draw = {name: x[mine] for name, x in model.imitation_draw(lesson.batch).items()}
        loss = 0.0
        for part in parts:
            obs, drawn = (
                {name: x[part].to(device) for name, x in fields.items()} for fields in (batch, draw)
            )
            share = len(obs["actions"]) / lesson.batch
            one = model.imitate(obs, obs["actions"], drawn) * share
            one.backward()
            loss += one.item()

        # Step, unless the loss has broken.
        for _ in gradients.sum() if ranks.several else ():
            pass
        loss, stopped = ranks.sum([loss, float(stop.is_set())])
        if rank == 0:  # one process says it, and `learn` then ends all of them
            require(math.isfinite(loss), f"the loss of step {step} is {loss}: lower --lr")
        optimizer.param_groups[0]["lr"] = lesson.lr * schedule(step - 1, lesson.steps)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        # Say how it goes, and save.
        last = step == lesson.steps or stopped
        now = time.monotonic()
        if rank == 0 and (last or step == 1 or now - said > SAID_EVERY):
            said = now
            spent = f"{now - started:.0f} s"
            print(f"step {step}/{lesson.steps}  loss {loss:.4f}  {spent}", flush=True)
        due = last or lesson.save_every and step % lesson.save_every == 0
        if rank == 0 and due:
            save(model, lesson, step == lesson.steps, last)
        if last:
            break
    batches.close()
    ranks.leave()


def built(lesson: Lesson, device: str) -> torch.nn.Module:
    """Returns the model to begin with, of which only what is learned has gradients."""
    models.use_tf32(device, lesson.settings.train.precision)
    model = models.build(lesson.settings, lesson.spec, device)
    model.header = model.header._replace(stats=lesson.header.stats)
    if lesson.checkpointing:
        layers.recompute_blocks(model)
    trainable = model.trainable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return model


def schedule(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: linear warm-up, then cosine to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1.0 + math.cos(math.pi * (step / steps)))


def save(model: torch.nn.Module, lesson: Lesson, done: bool, last: bool) -> None:
    """Writes weights and vocabulary; before all steps are done, to files of their own. A disk that
    refuses a save is a warning, unless it is the last one. Raises UserError."""
    broken = checkpoint.not_finite(dict(model.named_parameters()))
    require(not broken, f"tensor {broken!r} holds NaN or infinity: lower --lr")
    tensors = model.state_dict()
    if lesson.half:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    source, beside = lesson.vocabulary
    unfinished = unfinished_of(lesson.out)
    weights, words = (lesson.out, beside) if done else unfinished
    try:
        with contextlib.ExitStack() as stack:
            if source.is_file() and not alike(source, words):
                # It takes its place after the weights: until then the old ones have their own.
                shutil.copyfile(source, stack.enter_context(whole(words)))
            checkpoint.save(weights, model.header, tensors)
    except OSError as error:
        said = output.disk_trouble(error, weights)
        require(not last, said)
        print(f"warning: {said}; the next save tries again", file=sys.stderr, flush=True)
    if done:
        for file in unfinished:
            file.unlink(missing_ok=True)


def check_memory(lesson: Lesson) -> None:
    """Raises UserError where a GPU has no room for weights, gradients, optimizer and one pass."""
    gpus = machine.gpus()
    if not gpus:
        return
    needed = memory_of(lesson)
    room = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
    says = f"learning takes {needed / 1e9:.1f} GB of a GPU, and there are {room / 1e9:.1f}"
    require(needed < 0.95 * room, f"{says}: {LESS_MEMORY}")


def memory_of(lesson: Lesson) -> int:
    """Returns the bytes that a GPU needs, counted on tensors without memory."""
    model = models.build(lesson.settings, lesson.spec, "meta", "none").to("meta")
    trained = model.trainable()
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    learned = sum(sizes[name] for name in trained)
    kept, beside = allocations.optimizer_bytes(trained, fused=True)
    peak = allocations.peak_of(model, partial(one_pass, lesson))
    return sum(sizes.values()) + learned + kept + beside + peak


def one_pass(lesson: Lesson, model: torch.nn.Module) -> None:
    """Learns from one part of a batch, on the meta device."""
    if lesson.checkpointing:
        layers.recompute_blocks(model)
    obs = allocations.empty(model.observation_fields(), lesson.micro_batch)
    _, dims = model.config.played
    actions = torch.empty(lesson.micro_batch, lesson.horizon, dims, device="meta")
    drawn = model.imitation_draw(lesson.micro_batch)
    model.imitate(obs, actions, {n: x.to("meta") for n, x in drawn.items()}).backward()
