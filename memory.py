"""Says what fits where before anything starts: the memory of every process, GPU and host.

    python memory.py                            the run of `python train.py` on this machine
    python memory.py --recipe NAME --gpus 8     on another one, which need not be there
    python memory.py --recipe NAME --gpus 4 --gpu-gb 24 --ratio 1:1 --micro-batch 16
                                                with any flag of train.py

`allocations.py` says what the model's functions take for a moment. Slots, weight plane and copies
of weights have sizes that follow from shapes. What a process takes beside tensors cannot be
derived: `BARE` and `SIMULATORS` say it, measured without a GPU; `CONTEXT` and `DRIVER` are
estimates. `budgets` divides GPUs that several processes use.

Left out: fragmentation beyond `USABLE`, what a vectorised simulator has on a GPU beside the slots,
files that the system caches, NCCL's buffers.

GB are 10⁹ bytes.
"""

import bisect
import copy
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

import machine
import models
from allocations import Sketch, inference_peak, optimizer_bytes, trained_fields, training_peak
from channel import Spec, layout
from checks import AboveZero, Natural, check_ranges, check_writable, flag_of
from config import FLOW, Config, completed, expanded, setting
from errors import UserError, exit_on_user_error, require
from models import layers
from scheduler import Admission, Placement, most_samples

GB = 1e9
USABLE = 0.95  # share of a GPU that tensors can fill, for fragmentation
# Looking takes seconds. What fits even if each sample took this many times the bytes of all weights
# is not looked at: models of some million weights take 0.1 to 2 times.
ROUGH = 8

# Bytes of processes without tensors (Pss; Linux, Python 3.11, torch 2.13 without CUDA): the
# launcher, the server that forks the workers, a worker.
BARE = {"launcher": 250e6, "server": 125e6, "env": 40e6, "rollout": 120e6, "actor": 175e6}
# Bytes of a simulator, drawn in software: of each process, and of each env in it.
SIMULATORS = {
    "metaworld": (110e6, 55e6),
    "libero": (405e6, 50e6),
    **dict.fromkeys(("emulated", "emulated_gr00t", "vectorised"), (0.0, 1e5)),
    **dict.fromkeys(("emulated_metaworld", "vectorised_hybrid"), (0.0, 1e5)),
}
ANY_SIMULATOR = (300e6, 100e6)
# Estimates for a process that uses a GPU: bytes of its context there (a simulator's only draws),
# and bytes of the driver's on the host.
CONTEXT = {"launcher": 0.5e9, "env": 0.3e9, "rollout": 0.7e9, "actor": 0.7e9}
DRIVER = 1.5e9
DRAWS = 0.3e9  # of the driver's in a process that only draws
CORES = 16  # of a machine that is not here, for each GPU: they say how many env workers there are
SIMULATOR = 0.5  # share that a vectorised simulator has of the room that is left on a GPU


# ---------------------------------------------------------------- what a run puts where

PARTS = ("weights", "gradients", "optimizer", "activations", "slots", "weight_plane", "other")


@dataclass
class Row:
    """What a process has on a device, bytes."""

    process: str  # "all": the sum of the device's rows
    device: str  # "host" or "cuda:k"
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0  # the most that a pass or a step has for a moment
    slots: float = 0.0
    weight_plane: float = 0.0
    other: float = 0.0
    fits: bool = True

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    def to_json(self) -> dict:
        sizes = {f"{part}_gb": getattr(self, part) / GB for part in (*PARTS, "total")}
        return {"process": self.process, "device": self.device} | sizes | {"fits": self.fits}


class Room(NamedTuple):
    """What a machine has."""

    gpus: int
    gpu: float  # bytes of each
    host: float  # bytes
    cores: int

    @classmethod
    def here(cls) -> "Room":
        gpus = machine.gpus()
        return cls(gpus, machine.gpu_memory() if gpus else 0, machine.memory(), machine.cores())

    def on(self, device: str) -> float:
        """Bytes that a device has for tensors."""
        return self.host if device == "host" else USABLE * self.gpu


@dataclass(frozen=True)
class Demand:
    """A run as far as its memory depends on it."""

    config: Config  # complete
    placement: Placement
    model: torch.nn.Module  # on the meta device
    slots: Spec
    on_gpu: tuple[str, ...]  # fields of the slots that lie on the first env worker's GPU

    @property
    def slot_count(self) -> int:
        return Admission.of(self.config).slots + self.config.env.eval_envs

    @property
    def weights(self) -> Spec:
        """What the weight plane holds: as inference uses it."""
        acts_in = self.model.acts_in
        trainable = self.model.trainable().items()
        return {name: (tuple(p.shape), acts_in(name) or p.dtype) for name, p in trainable}

    @property
    def plane_device(self) -> str:
        """Where the weight plane lies: on a GPU only where all who copy from or to it are, since
        others would need a context there; else on the host, as do weights that actors share
        (--shard), for which one device would be too small."""
        devices = {*self.placement.rollout_devices, *self.placement.actor_devices}
        return "cpu" if len(devices) > 1 or self.config.actor.shard else devices.pop()

    @property
    def drawn_on(self) -> str:
        """The device of the slots that lie on a GPU, which every worker opens; without any: cpu."""
        return self.placement.env_devices[0] if self.on_gpu else "cpu"

    @property
    def pool_bytes(self) -> int:
        """Of the slots in the host's memory."""
        on_host = {name: kind for name, kind in self.slots.items() if name not in self.on_gpu}
        return layout(on_host, self.slot_count)[1]

    @property
    def emulated(self) -> bool:
        return models.load(self.config.train.model).FORMATS is None


class Table:
    """The rows of a run, one for every process and device."""

    def __init__(self, demand: Demand, room: Room, guess: float | None = None):
        """guess: activations are not looked at, but taken for so many times the weights, each
        sample's."""
        self.demand = demand
        self.config = demand.config
        self.model = demand.model
        self.guess = guess
        self.acting = models.acting(copy.deepcopy(self.model))  # as rollout workers have it
        self.whole = sum(p.nbytes for p in self.model.parameters())
        self.plane = layout(demand.weights, 1)[1]  # bytes of what is published of them
        trained = self.model.trainable().items()
        self.trained = layout({name: (tuple(p.shape), p.dtype) for name, p in trained}, 1)[1]
        self.rows: dict[tuple[str, str], Row] = {}
        self.add_shared()
        for stage in ("env", "rollout", "actor"):
            for rank, device in enumerate(getattr(demand.placement, f"{stage}_devices")):
                getattr(self, f"add_{stage}")(rank, f"{stage}-{rank}", place_of(device))
        for device in sorted({row.device for row in self.rows.values()}, reverse=True):
            mine = [row for row in self.rows.values() if row.device == device]
            sums = {part: sum(getattr(row, part) for row in mine) for part in PARTS}
            self.add("all", device, **sums)
        for row in self.rows.values():
            row.fits = row.total <= room.on(row.device)

    def sums(self) -> list[Row]:
        return [row for row in self.rows.values() if row.process == "all"]

    def add(self, process: str, device: str, **sizes: float) -> None:
        """Adds bytes to what a process has on a device."""
        row = self.rows.setdefault((process, device), Row(process, device))
        for part, size in sizes.items():
            setattr(row, part, getattr(row, part) + size)

    def add_process(self, kind: str, process: str, *devices: str) -> None:
        """Adds what a process takes without tensors: a context on every GPU that it touches."""
        gpus = {*devices, place_of(self.demand.drawn_on)} - {"host"}
        driver = DRAWS if kind == "env" and not self.config.env.lanes else DRIVER
        self.add(process, "host", other=BARE[kind] + driver * bool(gpus))
        for gpu in gpus:
            self.add(process, gpu, other=CONTEXT[kind])

    def add_shared(self) -> None:
        """Adds the launcher, the server of the other processes, and what all of them share, which
        is the launcher's: it has a context where that lies on a GPU, and only there."""
        demand = self.demand
        plane = place_of(demand.plane_device)
        self.add_process("launcher", "launcher", plane)
        self.add("server", "host", other=BARE["server"])
        self.add("shared", "host", slots=demand.pool_bytes)
        if demand.on_gpu:
            drawn = {name: demand.slots[name] for name in demand.on_gpu}
            self.add("shared", place_of(demand.drawn_on), slots=layout(drawn, demand.slot_count)[1])
        self.add("shared", plane, weight_plane=2 * self.plane)

    def add_env(self, rank: int, process: str, device: str) -> None:
        env = self.config.env
        self.add_process("env", process, device)
        alone, each = SIMULATORS.get(self.config.train.env, ANY_SIMULATOR)
        envs = len(range(rank, env.envs, env.env_workers))
        envs += len(range(rank, env.eval_envs if env.evaluates else 0, env.env_workers))
        self.add(process, "host", other=alone + each * envs)

    def add_rollout(self, rank: int, process: str, device: str) -> None:
        """Adds all weights, and a second set of those that are trained, for the next version."""
        self.add_process("rollout", process, device)
        env = self.config.env
        lanes = range(rank, env.envs // env.width, self.config.rollout.rollout_workers)
        samples = most_samples(self.config, len(lanes))
        acting = self.acting
        weights = sum(p.nbytes for p in acting.parameters())
        peak = self.activations(acting, samples, inference_peak, samples)
        if device != "host" and self.config.rollout.compile is not False and layers.blocks(acting):
            # Graphs have memory of their own, which one that is warmed up takes again, and read and
            # write the same tensors.
            fields = acting.observation_fields() | acting.slot_fields()
            peak = 2 * peak + layout(fields, samples)[1]
        self.add(process, device, weights=weights, weight_plane=self.plane, activations=peak)

    def add_actor(self, rank: int, process: str, device: str) -> None:
        """Adds what training has, and what a rank that saves has on the host."""
        config = self.config
        actor = config.actor
        segment = config.env.segment
        self.add_process("actor", process, device)
        kept, step = optimizer_bytes(self.model.trainable(), device != "host")

        # The most of a pass or the step.
        keeps = actor.cache_prefix == "gpu" and actor.update_epochs > 1
        copied = max(1, actor.micro_batch // segment) * (segment + 1)
        passing = copied, actor.checkpointing == "on", keeps
        rows = actor.micro_batch
        peak = self.activations(self.model, rows, training_peak, rows, *passing)

        # Weights of before: those that the exact proximal policy has, and those that still act.
        parameters = dict(self.model.named_parameters())
        idle = {name for name in parameters if name.startswith(self.model.idle())}
        unused = sum(parameters[name].nbytes for name in idle)
        used = self.whole - unused
        copies = config.exact_proximal + (actor.extra_staleness and actor.extra_staleness + 1)
        weights = used + copies * self.trained
        ranks = 1
        if actor.shard:  # each rank has a part, and while it computes some weights whole
            ranks = actor.actor_workers
            step /= ranks
            weights = weights / ranks + whole_at_once(self.model, parameters.keys() - idle)
            peak += whole_at_once(self.model, self.model.trainable().keys())
        self.add(
            process,
            device,
            weights=weights,
            gradients=self.trained / ranks,
            optimizer=kept / ranks,
            activations=max(peak, step),
            slots=(self.prefixes() if keeps else 0) + self.coming(device, copied),
        )

        # As they were when the batch began, if it has several steps, and in a checkpoint.
        saved = (actor.steps > 1) / ranks * (rank == 0 or actor.shard) + (rank == 0)
        if device != "host":
            # Page-locked blocks have powers of two as sizes (torch's CachingHostAllocator.h).
            trained = self.model.trainable().values()
            saved *= sum(1 << (p.nbytes - 1).bit_length() for p in trained) / self.trained
        first = unused if rank == 0 else 0
        loading = used if actor.shard else 0  # the model is on the host until it is spread
        copied = first + saved * self.trained
        optimizer = saved * kept
        more = max(0.0, loading - copied - optimizer)
        self.add(process, "host", weights=copied, optimizer=optimizer, activations=more)

    def coming(self, device: str, rows: int) -> int:
        """Returns the bytes of the trajectories, of so many rows, that come to a GPU while others
        are trained there, and of those whose memory is given back late (`transfers.Carrier`)."""
        if device == "host":
            return 0
        return 2 * layout(trained_fields(self.model), rows)[1]

    def prefixes(self) -> int:
        """Returns the bytes of what a frozen VLM made of a rank's share of a batch."""
        actor = self.config.actor
        rows = -(-actor.batch // actor.actor_workers) * self.config.most_drawn
        return layout(self.model.cache_fields(), rows)[1]

    def activations(self, model, samples: int, look: Callable[..., int], *sizes: int) -> int:
        if self.demand.emulated:
            return 0
        if self.guess is not None:
            return self.guess * self.whole * samples
        return look(Sketch.of(model), *sizes)


def whole_at_once(model: torch.nn.Module, names: Iterable[str]) -> int:
    """Returns the bytes of these parameters that a rank has whole while it computes (--shard):
    those in no block, and of two blocks, for the next one is on its way."""
    left = {name: p.nbytes for name, p in model.named_parameters() if name in set(names)}
    blocks = []
    for block in layers.blocks(model):
        inside = [name for name in left if name.startswith(f"{block}.")]
        blocks.append(sum(left.pop(name) for name in inside))
    return sum(left.values()) + sum(sorted(blocks)[-2:])


def place_of(device: str) -> str:
    """Names where the tensors of a device lie."""
    return "host" if device == "cpu" else device


# ---------------------------------------------------------------- what fits

LayOut = Callable[[Config], Demand]  # it checks settings, too, and may raise UserError

ENOUGH = 16  # chunk steps of a pass with which checkpointing is not worth its time
LARGEST = 128  # chunk steps of a pass: the most that the papers have
SLOTS = 0.5  # share of a device's memory that slots may have before a prefix is kept elsewhere
# What takes less memory, in the order in which it is tried; each costs time or changes learning.
REMEDIES = (
    {"cache_prefix": "off"},
    {"micro_batch": ENOUGH},
    {"checkpointing": "on"},
    {"compile": False},
    {"micro_batch": 1},
    {"shard": True},
    {"oft_train": "lora"},
    {"lora_rank": 32},
    {"batch_max": 8},
    {"envs": 16},
    {"prefix_dtype": "bfloat16"},
    {"max_staleness": 1},
    {"max_staleness": 0},
)


def table_of(demand: Demand, room: Room) -> Table:
    """Returns the rows of a run: by a guess where it fits even then, for looking takes seconds."""
    rough = Table(demand, room, ROUGH)
    return rough if all(row.fits for row in rough.sums()) else Table(demand, room)


def short(demand: Demand, room: Room) -> list[Row]:
    """Returns the sums of the devices that are too small."""
    return [row for row in table_of(demand, room).sums() if not row.fits]


# Settings that `choose` may fill in.
CHOSEN = ("micro_batch", "checkpointing", "cache_prefix")


def choose(config: Config, share: int, room: Room, lay_out: LayOut) -> Demand:
    """Fills in what is auto: where a frozen prefix is kept, checkpointing, and the largest
    micro-batch that fits.

    share: chunk steps of a minibatch that an actor worker trains. Without a GPU more than two
    trajectories at once are no faster."""
    actor = config.actor
    if actor.micro_batch != "auto":
        sizes = [min(actor.micro_batch, share)]
    else:
        most = min(share, LARGEST if room.gpus else 2 * config.env.segment)
        sizes = [*(2**i for i in range(7) if 2**i < most), most]
    places = [actor.cache_prefix]
    model = lay_out(completed(config, micro_batch=sizes[0])).model
    if places == ["auto"] and config.train.model in FLOW and not model.config.train_vlm:
        places = ["slots", "gpu", "off"] if actor.update_epochs > 1 else ["slots", "off"]
    ways = ["off", "on"] if actor.checkpointing == "auto" else [actor.checkpointing]

    best = None
    for place in places:
        demand = lay_out(completed(config, cache_prefix=place, micro_batch=sizes[0]))
        shared = [row for row in Table(demand, room, 0.0).rows.values() if row.process == "shared"]
        large = any(row.slots > SLOTS * room.on(row.device) for row in shared)
        if place == "slots" and len(places) > 1 and large:
            continue
        for way in ways:
            demand = replace(demand, config=completed(demand.config, checkpointing=way))
            found = with_largest(demand, sizes, room)
            if found and passes(found) >= min(ENOUGH, sizes[-1]):
                return found
            if found and (not best or passes(found) > passes(best)):
                best = found
    return best or demand


def passes(demand: Demand) -> int:
    """Chunk steps of a micro-batch."""
    return demand.config.actor.micro_batch


def with_largest(demand: Demand, sizes: list[int], room: Room) -> Demand | None:
    """Returns it with the largest of these micro-batches, in ascending order, that fits the actors'
    devices, if any does."""
    devices = [place_of(device) for device in demand.placement.actor_devices]

    def fits(one: Demand) -> bool:
        return not any(row.device in devices for row in short(one, room))

    every = [replace(demand, config=completed(demand.config, micro_batch=n)) for n in sizes]
    # Looking takes seconds: first at what no micro-batch changes, then at the largest one.
    fixed = [row for row in Table(demand, room, 0.0).sums() if row.device in devices]
    if not all(row.fits for row in fixed):
        return None
    if fits(every[-1]):
        return every[-1]
    smaller = bisect.bisect_left(every[:-1], True, key=lambda one: not fits(one))
    return every[smaller - 1] if smaller else None


def check(demand: Demand, room: Room, lay_out: LayOut) -> None:
    """Raises UserError where a device is too small. It says what would make the run fit."""
    too_small = short(demand, room)
    if not too_small:
        return
    flags, left = remedies(demand, room, lay_out)
    named = ((flag_of(name), "" if value is True else f" {value}") for name, value in flags.items())
    given = " ".join(flag + value for flag, value in named)
    worst = max(left or too_small, key=lambda row: row.total - room.on(row.device))
    parts = sorted(PARTS, key=lambda part: -getattr(worst, part))
    listed = [f"{part.replace('_', ' ')} {getattr(worst, part) / GB:.1f}" for part in parts[:3]]
    needs = f"{worst.device} needs {worst.total / GB:.1f} GB ({', '.join(listed)}, …)"
    has = f"and has {room.on(worst.device) / GB:.1f} GB"
    require(left, f"{needs} {has}: give {given}")
    less = "larger or more GPUs, fewer --envs, or a smaller model"
    if worst.other > room.on(worst.device):  # nothing else can be done about it
        flags = {}
        less = "a larger GPU, for processes take that without a model"
    if worst.device == "host":
        less = "more memory, or lower --envs, --eval-envs, --batch or --segment"
    even = f"even with {given} " if flags else ""
    raise UserError(f"{even}{needs} {has}: it takes {less}")


def remedies(demand: Demand, room: Room, lay_out: LayOut) -> tuple[dict, list[Row]]:
    """Returns settings that lessen the shortage, one after the other until the run fits, and the
    sums that are too large even then."""
    flags: dict[str, object] = {}
    left = short(demand, room)
    for change in REMEDIES:
        now = {name: setting(demand.config, name) for name in change}
        if now == change or now.get("micro_batch", math.inf) < change.get("micro_batch", 0):
            continue
        try:
            changed = lay_out(completed(demand.config, **change))
        except UserError:  # it means nothing to this run
            continue
        still = short(changed, room)
        if excess(still, room) < 0.98 * excess(left, room):
            demand = changed
            left = still
            flags |= change
        if not left:
            break
    return flags, left


def excess(sums: list[Row], room: Room) -> float:
    return sum(row.total - room.on(row.device) for row in sums)


# ---------------------------------------------------------------- sharing a GPU


def budgets(table: Table, room: Room) -> dict[str, dict[str, float]]:
    """Divides every GPU that several processes use: returns the bytes of tensors that each rollout
    and actor worker there may have, by device and name.

    It is what a worker needs, with its own share of fragmentation (torch counts what it has taken
    of the GPU, used or not), and of the room that is left a part in proportion. Contexts, what the
    launcher shares and simulators come first; a vectorised simulator, whose need nobody knows, has
    SIMULATOR of the room, too. These are D-VLA's two pools: ours, and the simulators'."""
    found = {}
    for whole in table.sums():
        rows = [row for row in table.rows.values() if row.device == whole.device != "host"]
        ours = [row for row in rows if row.process.startswith(("rollout", "actor")) and row.weights]
        env = whole.device in table.demand.placement.env_devices
        if not ours or len(ours) + env < 2:
            continue
        spare = max(0.0, room.on(whole.device) - whole.total)
        spare *= SIMULATOR if env and table.config.env.lanes else 1.0
        need = sum(row.total for row in ours)
        found[whole.device] = {
            row.process: (row.total - row.other) / USABLE + spare * row.total / need for row in ours
        }
    return found


def pools(table: Table, room: Room) -> str:
    """Says in a line what processes may have of GPUs that they share, and what is left there."""
    alike: dict[str, list[str]] = {}
    for device, mine in sorted(budgets(table, room).items()):
        rows = [row for row in table.rows.values() if row.device == device]
        left = room.gpu
        for row in rows:
            if not row.process.startswith(("all", "env")):
                left -= mine[row.process] + row.other if row.process in mine else row.total
        parts = [f"{process.partition('-')[0]} {size / GB:.1f}" for process, size in mine.items()]
        whose = " to simulators" if device in table.demand.placement.env_devices else ""
        said = f"{', '.join(parts)}, left{whose} {left / GB:.1f}"
        alike.setdefault(said, []).append(device)
    listed = (f"{', '.join(devices)}: {said}" for said, devices in alike.items())
    return f"GPU memory, GB: {'; '.join(listed)}" if alike else ""


# ---------------------------------------------------------------- the command


def show(table: Table, room: Room) -> None:
    """Prints the rows; processes that are alike share one."""
    print(f"{'GB':33s}" + "".join(f"{part.replace('_', ' '):>13s}" for part in (*PARTS, "total")))
    alike: dict[tuple, list[Row]] = {}
    for row in table.rows.values():
        stage = row.process.partition("-")[0]
        sizes = tuple(getattr(row, part) for part in (*PARTS, "total"))
        kind = row.device if row.process in ("all", "shared") else row.device.partition(":")[0]
        alike.setdefault((stage, kind, sizes), []).append(row)
    for (_, _, sizes), rows in alike.items():
        name = rows[0].process if len(rows) == 1 else f"{rows[0].process} … {rows[-1].process}"
        where = rows[0].device if len(rows) == 1 else f"{rows[0].device} …"
        listed = "".join(f"{size / GB:13.3g}" if size else f"{'–':>13s}" for size in sizes)
        room_gb = f"  of {room.on(rows[0].device) / GB:.1f}" if rows[0].process == "all" else ""
        print(f"{name:24s}{where:9s}{listed}{room_gb}{'' if rows[0].fits else '  TOO MUCH'}")
    if shared := pools(table, room):
        print(shared)


@dataclass(kw_only=True)
class MemoryConfig:
    """Says what fits where. Beside these flags it takes those of train.py."""

    gpus: Natural | None = None  # GPUs of the machine; none: this machine as it is
    gpu_gb: AboveZero | None = None  # 10⁹ bytes of each, with --gpus; none: 80
    host_gb: AboveZero | None = None  # 10⁹ bytes of the host's memory, with --gpus; none: 1000
    json: Path | None = None  # also write the rows to this file

    def room(self) -> Room:
        if self.gpus is None:
            alone = "--gpu-gb and --host-gb are of another machine: give its number of --gpus, too"
            require(self.gpu_gb is None and self.host_gb is None, alone)
            return Room.here()
        gpu_gb = self.gpu_gb or 80.0
        host_gb = self.host_gb or 1000.0
        return Room(self.gpus, gpu_gb * GB, host_gb * GB, CORES * self.gpus)


def main(ours: MemoryConfig, flags: list[str]) -> None:
    import command_line  # here, for they import this file
    import prepare

    check_ranges(ours)
    if ours.json:
        check_writable(ours.json, "the rows", "--json FILE")
    room = ours.room()
    config = command_line.parse(flags)
    print("looking at what inference and training take, for up to a minute", flush=True)
    demand, lay_out = prepare.demand_of(config, room)
    table = Table(demand, room)
    show(table, room)
    actor = demand.config.actor
    print(
        f"this is with --precision {demand.config.train.precision} --micro-batch "
        f"{actor.micro_batch} --checkpointing {actor.checkpointing} --cache-prefix "
        f"{actor.cache_prefix}"
    )
    if ours.json:
        rows = [row.to_json() for row in table.rows.values()]
        ours.json.write_text(json.dumps({"what": "memory", "rows": rows}, indent=1) + "\n")
    check(demand, room, lay_out)


if __name__ == "__main__":
    with exit_on_user_error():
        known, rest = tyro.cli(MemoryConfig, return_unknown_args=True)
        main(expanded(known), rest)
