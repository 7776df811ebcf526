"""What the flags mean on this machine: flags → `Setup`, before any process starts.

    settings → where training starts → which workers there are → what slots and weights hold

`prepare` goes straight down and checks on the way all that can be checked. Each step returns
completed copies of the settings it is given. Left out: tensors and processes, which train.py makes
from a `Setup`.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

import envs
import machine
import memory
import models
import recipes
import tuning
from channel import SlotPool, Spec, layout
from config import WORKERS, Config, completed, group_of, loss_of, setting, to_json
from envs.states import read_states, repeats, say_states, split, states_met
from errors import UserError, require
from models import checkpoint, contract
from scheduler import Admission, Placement, divide
from start import State, check_memory_of, find_start, lineage, met_by
from validation import check_by_themselves, check_shares, validate


@dataclass(frozen=True)
class Setup(memory.Demand):
    spec: envs.EnvSpec
    note: str
    resume: State | None
    saved: str  # config.json, complete and as the user meant it
    choices: tuning.Choices  # the ratio in use, then others for --ratio auto
    room: memory.Room

    @property
    def header(self) -> checkpoint.Header:
        return self.model.header

    @property
    def version(self) -> int:
        """What training starts or continues from."""
        return self.resume["version"] if self.resume else 0

    def cores(self, stage: str) -> list[frozenset[int]]:
        """Lists the cores of every worker of a stage: those near its GPU. Simulators need cores
        more than nearness, so those whose GPUs leave some cores out may use them all."""
        devices = getattr(self.placement, f"{stage}_devices")
        near = {device: machine.near(device) for device in set(devices)}
        every = machine.near("cpu")
        if stage == "env" and frozenset().union(*near.values()) < every:
            return [every] * len(devices)
        return [near[device] for device in devices]

    def pool(self) -> SlotPool:
        """Makes the slots, each on the NUMA node of the GPU whose rollout worker serves it."""
        nodes = [machine.near(rollout) for rollout in self.placement.rollout_devices]
        lanes = np.arange(self.slot_count) % self.config.env.envs // self.config.env.width
        near = [nodes[lane % len(nodes)] for lane in lanes]
        return SlotPool(self.slots, self.slot_count, self.drawn_on, self.on_gpu, near)


def prepare(config: Config) -> Setup:
    """Checks everything that can be checked before a process starts. Raises UserError."""
    recipes.check(config)
    check_by_themselves(config)
    simulator = envs.load(config.train.env)
    config, given, resume, note = find_start(config, simulator)
    config, meets = with_states(config, simulator)
    room = memory.Room.here()
    config, placement, options, fits = find_workers(config, simulator, room)
    config, share, lay_out, rounded = with_sizes(config, simulator, placement)

    # Pictures, states or prompts that do not suit the model are better named now than by a worker.
    model = lay_out(config).model
    note += models.assumptions(config, lay_out.spec)
    spec = lay_out.spec.seen_by(model.header)
    preparation = models.preparation(config.train.model, model.header, config.train.tokenizer)
    shape = (spec.views, spec.image_size, spec.image_size, 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for prompt in spec.prompts:
        observed = preparation.observe(picture, np.zeros(spec.state_dim, np.float32), prompt)
        contract.check_observed(model, observed)

    # Choose what is left to memory. What a vectorised simulator draws on a GPU stays there if the
    # model takes it as it is.
    demand = memory.choose(config, share, room, lay_out)
    config = demand.config
    taken = np.array_equal(observed.get("image"), picture)
    demand = replace(demand, on_gpu=demand.on_gpu if taken else ())
    choices = {config.train.parts: (config, placement)}
    for ratio, (chosen, divided) in options.items():
        chosen = completed(chosen, **{name: setting(config, name) for name in memory.CHOSEN})
        chosen = completed(chosen, segment=config.env.segment, micro_batch="auto")
        most = min(share_of(chosen)[0], config.actor.micro_batch)
        choices[ratio] = completed(chosen, micro_batch=most), divided
    if resume and config.train.checkpoint:
        checkpoint.check_finite(config.train.checkpoint)
        check_memory_of(config, spec, demand.model, resume)
    if not config.train.memory_report:
        memory.check(demand, room, lay_out)
    return Setup(
        **vars(demand),
        spec=spec,
        note=note + meets + fits + rounded,
        resume=resume,
        saved=to_json(completed(config, checkpoint=given)),
        choices=choices,
        room=room,
    )


def demand_of(config: Config, room: memory.Room) -> tuple[memory.Demand, "LayOut"]:
    """Lays out a run that is not to start. A recipe needs neither its checkpoint nor its simulator
    for that; tasks whose assets are not here are as large as others. Raises UserError."""
    check_by_themselves(config)
    bare = config.train.recipe and not config.train.checkpoint
    simulator = envs.load(config.train.env, installed=not bare)
    if not bare:
        config = find_start(config, simulator)[0]
    else:
        try:
            simulator.spec(config.train.tasks, 0)
        except UserError:
            config = completed(config, tasks=())
    config, placement, _, _ = find_workers(config, simulator, room)
    config, share, lay_out, _ = with_sizes(config, simulator, placement)
    return memory.choose(config, share, room, lay_out), lay_out


@dataclass(frozen=True)
class LayOut:
    """Lays out the memory of a run whose settings may still change."""

    simulator: envs.Simulator
    spec: envs.EnvSpec
    placement: Placement

    def __call__(self, config: Config) -> memory.Demand:
        """Raises UserError where settings exclude each other."""
        validate(config)
        model = models.build(config, self.spec, weights="none")
        place = config.actor.cache_prefix
        moves = place in ("slots", "gpu") and model.header.shape.get("train_vlm")
        instead = "leave it out, for the VLM has adapters"
        require(not moves, f"--cache-prefix keeps what a frozen VLM made: {instead}")
        if place == "gpu":
            contract.check(model, f"--cache-prefix gpu: {config.train.model}", contract.KEEPS)
        slots = slot_spec(config, self.spec.seen_by(model.header), model)
        # Pictures that a simulator draws on a GPU stay there.
        drawn = self.simulator.vectorised and self.placement.env_devices[0] != "cpu"
        on_gpu = ("image", *model.slot_fields()) if drawn else ()
        return memory.Demand(config, self.placement, model, slots, on_gpu)


def with_states(config: Config, simulator: envs.Simulator) -> tuple[Config, str]:
    """Decides at which initial states training and evaluation begin, and returns what to say."""
    spec = simulator.spec(config.train.tasks, 0)
    given = (config.env.train_states, config.env.eval_states)
    train, evaluation, note = split(config.train.env, spec, *given)

    # What the checkpoint has met before is not held out, either.
    begins = config.train.checkpoint
    if evaluation and begins:
        adapter = None if config.train.resume else config.train.adapter
        met, unknown = met_by(lineage(begins, adapter), simulator)
        before = set(states_met(met or {}, spec)) - set(read_states(train))
        both = tuple(state for state in read_states(evaluation) if state in before)
        note += unknown
        if both:
            note += f"not held out: checkpoint {begins} has met initial states {say_states(both)}\n"
    if config.env.evaluates:
        note += repeats(config.env.eval_episodes, spec, evaluation)
    return completed(config, train_states=train, eval_states=evaluation), spec.note + note


def with_sizes(
    config: Config, simulator: envs.Simulator, placement: Placement
) -> tuple[Config, int, LayOut, str]:
    """Fills in the size of trajectories. Returns the settings, how many chunk steps a pass may have
    at most, what lays out the run, and what to say about sizes."""
    validate(config)
    spec = simulator.spec(config.train.tasks, config.env.image_size)
    config, turns = with_segment(config, spec)
    share, rounded = share_of(config)
    return config, share, LayOut(simulator, spec, placement), turns + rounded


def find_workers(
    config: Config, simulator: envs.Simulator, room: memory.Room
) -> tuple[Config, Placement, tuning.Choices, str]:
    """Divides the machine by the ratio, and says what networks compute in there. With --ratio auto
    the ratio is one that fits here.

    Returns the settings with numbers of workers and lanes, the placement, what else can run here
    with --ratio auto, and what the user should know."""
    if config.train.precision == "auto":
        config = completed(config, precision="bfloat16" if room.gpus else "float32")
    lanes = config.env.lanes
    alone = f"for vectorised simulators: {config.train.env} steps every env by itself"
    require(simulator.vectorised or not lanes, f"--lanes {lanes} is {alone}")
    if simulator.vectorised:
        config = completed(config, lanes=lanes or 2)
    choices = {}
    note = ""
    if config.train.ratio == "auto":
        # It begins with the ratio that is asked for, or 3:1, if that fits, else with the first that
        # does; so too where a run is resumed on another machine.
        counts = tuple(setting(config, name) for name in WORKERS)
        config = completed(config, workers_given=counts)
        choices = tuning.options(config, counts, simulator, room.gpus, room.cores)
        before = config.train.ratio_from
        if not before or config.train.resume and before not in choices:
            config = completed(config, ratio_from=next(iter(choices), before))
        now = config.train.ratio_from
        if before not in ("", now):
            note = f"ratio {before} does not fit here, so the run goes on at {now}\n"
    config, placement, rounded = shared_out(config, simulator, room.gpus, room.cores)
    return config, placement, choices, note + rounded


def shared_out(
    config: Config, simulator: envs.Simulator, gpus: int, cores: int
) -> tuple[Config, Placement, str]:
    """Divides this machine, and on GPUs takes the largest numbers of workers, of those that no flag
    gives, and the smallest minibatch from --minibatch on with which all have their share.

    Returns the settings with them, the placement, and what the user should know."""
    placement = divide(config, simulator, gpus, cores)
    counts = placement.workers()
    group = group_of(config)
    if (
        gpus == 0 or config.actor.batch % config.env.envs or config.env.envs % group
    ):  # which `validate` refuses
        return completed(config, **counts), placement, ""
    fixed = {name for name in WORKERS if setting(config, name)}
    if config.train.placement != "colocated":
        fixed.add("actor_workers")
    if not simulator.vectorised:  # its env workers share nothing that must divide
        fixed.add("env_workers")
    tried = [[count] if n in fixed else range(count, 0, -1) for n, count in counts.items()]
    actor = config.actor
    before = actor.minibatch
    parts = range(actor.minibatches - 1, 0, -1)
    larger = dict.fromkeys(-(-actor.batch // count) for count in parts)
    for ranks, rollouts, env_workers, size in product(*reversed(tried), [before, *larger]):
        workers = dict(zip(WORKERS, (env_workers, rollouts, ranks), strict=True))
        changed = completed(config, **workers, minibatch=size)
        with suppress(UserError):
            check_shares(changed)
            said = f"--minibatch {before} is {size} here, so that {ranks} actor workers share it\n"
            return changed, divide(changed, simulator, gpus, cores), said if size > before else ""
    return completed(config, **counts), placement, ""  # `validate` says what is wrong


def with_segment(config: Config, spec: envs.EnvSpec) -> tuple[Config, str]:
    """Fills in T, the chunk steps of a trajectory, and returns what to say about it."""
    horizon = -(-spec.horizon // config.rollout.chunk)  # chunk steps
    segment = config.env.segment or horizon
    tasks = len(spec.tasks)
    long = f"--segment {segment} is longer than an episode of {horizon} chunk steps"
    require(segment <= horizon, f"{long}: choose at most {horizon}")
    whole = f"{config.train.algorithm.upper()} compares whole"
    cut = f"--segment {segment} cuts episodes of {horizon} chunk steps, which {whole}"
    require(not loss_of(config).groups or segment == horizon, cut)
    config = completed(config, segment=segment)
    nodes = config.train.nodes
    total = config.env.envs * nodes
    if total % tasks == 0 or segment == horizon:
        return config, ""
    return config, (
        f"{total} envs take turns at {tasks} tasks, so episodes end after --segment "
        f"{segment} of {horizon} chunk steps: to see their ends, leave it out, or give a multiple "
        f"of {tasks // math.gcd(tasks, nodes)} as --envs\n"
    )


def share_of(config: Config) -> tuple[int, str]:
    """Returns how many chunk steps of a minibatch an actor worker trains at most, and what to say
    about the size of minibatches."""
    actor = config.actor
    nodes = config.train.nodes
    admission = Admission.of(config)
    sizes = np.bincount(admission.minibatch_of(actor.minibatches, actor.actor_workers))
    share = -(-int(sizes.max()) // (actor.actor_workers * nodes)) * config.most_drawn
    most = share if actor.micro_batch == "auto" or config.train.resume else actor.micro_batch
    large = f"--micro-batch {most} is larger than the {share} chunk steps of a minibatch"
    require(most <= share, f"{large} that an actor worker trains: give at most {share}")
    if set(sizes) == {actor.minibatch * nodes}:
        return share, ""
    of = " or ".join(map(str, sorted(set(sizes))))
    made = f"{len(sizes)} minibatches of {of} trajectories, in place of {actor.minibatch * nodes}"
    return share, f"a batch of {actor.batch * nodes} trajectories makes {made}\n"


def common_fields(segment: int, chunk: int, action_dim: int) -> Spec:
    """Lists the fields of every slot, whatever the model and the loss.

    Rows are the T chunk steps of a trajectory, or T + 1 where the end of the last one counts
    too."""
    action = (segment, chunk, action_dim)
    return {
        "actions": (action, torch.float32),
        "logprob": (action, torch.float32),
        "value": ((segment + 1,), torch.float32),
        "reward": ((segment,), torch.float32),
        "success": ((segment,), torch.bool),
        "terminated": ((segment,), torch.bool),  # the episode ended by itself, with success or not
        "truncated": ((segment,), torch.bool),
        "version": ((segment,), torch.int32),
        # Monotonic seconds: when the newest request of this slot was sent.
        "asked": ((), torch.float64),
        # Chunk steps that were ever stepped in this slot, also by workers that died.
        "collected": ((), torch.int64),
        # Chunk steps of a complete trajectory, which a success may have ended early (GRPO).
        "length": ((), torch.int32),
        # In a lane's first slot: the last trajectory that was completed there + 1; 0 for none.
        "done": ((), torch.int64),
        "env": ((), torch.int32),  # whose trajectory it is, by the env's number on this node
        "trajectory": ((), torch.int64),
        "task": ((), torch.int32),
    }


def slot_spec(config: Config, spec: envs.EnvSpec, model) -> Spec:
    """Lists the fields of a slot: the common ones, then what the loss and the model add.

    Raises UserError where two fields have one name, or the model trains on one that is missing."""
    segment = config.env.segment
    slots = common_fields(segment, config.rollout.chunk, spec.action_dim)
    for owner, rows, fields in (
        (f"loss {config.train.algorithm}", segment, loss_of(config).slot_fields(config)),
        (f"model {config.train.model}", segment + 1, model.observation_fields()),
        (f"model {config.train.model}", segment, model.slot_fields()),
    ):
        for name, (shape, dtype) in fields.items():
            taken = f"the {owner} calls a slot field {name!r}, which is taken: rename it"
            require(name not in slots, f"{taken}; slots already have {', '.join(slots)}")
            slots[name] = ((rows, *shape), dtype)
    for name in model.training_fields():
        unknown = f"the model {config.train.model} trains on {name!r}, which is no field of a slot"
        require(name in slots, unknown)
    return slots


def memory_report(setup: Setup) -> None:
    """Prints what every process takes, and the slots in detail (--memory-report)."""
    memory.show(memory.Table(setup, setup.room), setup.room)
    count = setup.slot_count
    one = layout(setup.slots, 1)[1] / 1e6
    where = "shared memory"
    if setup.on_gpu:
        where += f", but {', '.join(setup.on_gpu)} on {setup.drawn_on}"
    print(f"slot pool: {count} slots × {one:.2f} MB = {count * one:.1f} MB of {where}")
    size = {name: layout({name: kind}, count)[1] for name, kind in setup.slots.items()}
    for name in sorted(size, key=size.get, reverse=True):
        shape, dtype = setup.slots[name]
        print(f"  {name:16s} {str(list(shape)):26s} {str(dtype):14s} {size[name] / 1e6:9.2f} MB")
