"""A run's settings → `Node`; and the flags of `plan.py`, which describe a run that need not exist.

What `plan.py` predicts, what `tuning.py` chooses between and what is put beside the measured ladder
all come through `node_of`. Left out: validation of what only a real run needs (files, memory).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from checks import AboveZero, FromZero, Limit, Natural, Positive, Share
from config import PRESET_SETTINGS, PRESETS, Config, Preset, completed, parse_ratio, setting
from errors import require
from planning import Node
from scheduler import Admission, Placement, place

# Settings of a run that a Node has under the same name.
SAME = "segment chunk batch minibatch update_epochs max_staleness batch_max stream"
Where = Literal["", "colocated", "disaggregated", "hybrid"]  # what --placement takes
AFFORDED = 400_000  # chunk steps of lanes to simulate for one prediction, if --rounds says nothing


@dataclass(kw_only=True)
class PlanConfig:
    """Predicts seconds per iteration, env steps/s and bubbles of a cluster that need not exist."""

    gpus: Positive | None = None  # GPUs of the whole cluster; none: 8, or with --from the run's
    gpus_per_node: Positive = 8  # a node is closed: nothing but gradients goes to other nodes
    ratio: str = ""  # R:A within a node; empty means 1:1, or with --from the run's own
    preset: Literal["", Preset] = ""  # as in train.py; empty: full, or with --from the run's own
    placement: Where = ""  # instead of the preset's; colocated stages take turns on their devices
    max_staleness: Natural | None = None  # instead of the preset's
    batch_max: Positive | Literal["auto", "all"] | None = None  # instead of the preset's
    batch_wait_ms: Limit | Literal["auto"] | None = None  # instead of the preset's
    stream: bool | None = None  # instead of the preset's: True or False

    rollout_s: AboveZero | None = None
    """seconds that one iteration's rollout takes alone and in lockstep, on the R parts of --gpus"""
    actor_s: FromZero | None = None  # seconds that training on it takes alone, on the A parts
    measured_ratio: str = ""  # R:A that --rollout-s and --actor-s belong to, if it is not --ratio
    measured_placement: Where = ""  # placement that they belong to, if it is not the one predicted
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """run whose trace.json and metrics.jsonl give the costs, and its nodes where --gpus does not"""

    envs: Positive = 64  # envs of a node (RL-VLA³, setup C: 64)
    rollout_epochs: Positive = 8  # episodes of every env in an iteration (RL-VLA³, setup C: 8)
    episode_steps: Positive = 480  # control steps of a trajectory (RL-VLA³, LIBERO: 480)
    chunk: Positive = 10  # C, control steps per inference (RL-VLA³, π0.5: 10)
    update_epochs: Positive = 1  # passes over a batch (RL-VLA³, setup C: 1)
    minibatch: Natural = 0  # trajectories of a node's optimizer step; 0 means one of every env
    micro_batch: Natural = 0
    """chunk steps of a rank's forward and backward, in whole trajectories; 0 means those of 4"""
    env_workers: Natural = 0
    """simulator processes of a node; 0 means one per env, times the share of GPUs that simulate"""
    lane_envs: Positive = 1  # envs of a vectorised simulator, on inference's GPU; 1: CPU simulators

    tail: FromZero = 0.27
    """σ of the log-normal time of a chunk (the emulated simulator's, from RL-VLA³'s LIBERO rows)"""
    draw_share: Share = 0.0  # of a CPU simulator's time, that it draws on inference's GPU
    infer_share: Share = 0.2  # inference's share of the lockstep rollout (as emulated)
    infer_fixed: Share = 0.2  # share of a full inference that does not depend on size (as emulated)
    step_fixed: Share = 0.0
    """vectorised simulators: share of a step's time that does not depend on the number of envs"""
    train_fixed: Share = 0.0  # share of a micro-batch's time that does not depend on its size
    optimizer_s: FromZero = 0.1  # clipping and optimizer step, of each minibatch
    gradient_gb: FromZero | None = None
    """gradients that nodes sum; none: with --from those of the run, else 1.73 (π0.5's action expert
    and value head: 433 M parameters, fp32)"""
    network_gb_s: AboveZero | None = None
    """GB/s of a node to the others, each way; none: with --from the speed of a run of several
    nodes, else 50 (one 400 Gb/s link)"""
    network_latency_us: FromZero = 20.0  # of one hop between nodes
    bucket_mb: AboveZero = 33.6
    """megabytes of gradients that are summed at once, where there are eight times as many"""
    overlap: Share = 0.67
    """share of a minibatch's last micro-batch that hides their sum: its backward pass"""
    weights_gb: FromZero = 0.87  # weights that rollout workers fetch (bf16, those of the gradients)
    nvlink_gb_s: AboveZero = 300.0  # GB/s between GPUs of a node

    iterations: Positive = 20  # that the means are over, after 4 to 20 that are not counted
    rounds: Natural = 0
    """most chunk steps of a lane and iteration that are simulated, where one stands for several; 0
    means what a second or two allow, but at least four for each trajectory"""
    node_spread: FromZero = 0.0  # σ of the nodes' lasting slowness, log-normal; the slowest counts
    simulated_nodes: Positive = 3  # nodes followed event by event; see planning/events.py
    seed: Natural = 0  # seed of the simulated times
    sweep: bool = False  # predict every size from one node to 1024 GPUs; costs are those of --gpus
    plot: Path | None = None  # picture of the sweep
    validate: bool = False  # compare with RL-VLA³'s tables, and with --ladder if there is one
    ladder: Path | None = None  # what `python bench.py ladder --setting columns --json FILE` wrote
    json: Path | None = None  # also write the result to this file

    def __post_init__(self):
        if not self.from_:
            self.fill({})

    def fill(self, found: dict[str, float]) -> None:
        """Fills what no flag gives with what was found of a run, or with the usual value."""
        usual = {"gpus": 8, "gradient_gb": 1.73, "network_gb_s": 50.0}
        for name, value in (usual | found).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def whole_nodes(self) -> tuple[int, int]:
        """Returns the GPUs of a node, and how many nodes there are. Raises UserError."""
        per_node = min(self.gpus, self.gpus_per_node)
        nodes, rest = divmod(self.gpus, per_node)
        odd = f"--gpus {self.gpus} is no multiple of --gpus-per-node {per_node}"
        require(rest == 0, f"{odd}: every node must be whole")
        return per_node, nodes

    @property
    def warmup(self) -> int:
        """Iterations before those that count."""
        return max(4, min(20, self.iterations // 5))


def node_of(config: Config, placement: Placement) -> Node:
    """Translates a run's settings into what is simulated, chunk step by chunk step.

    Simulators on CPUs run beside each other; vectorised ones share their GPUs with inference."""
    wait = config.rollout.batch_wait_ms
    workers = placement.env_devices
    micro = config.actor.micro_batch
    return Node(
        lanes=config.env.envs // config.env.width,
        lane_envs=config.env.width,
        group=Admission.of(config).group,
        env_devices=workers if config.env.lanes else ("cpu",) * len(workers),
        rollout_devices=placement.rollout_devices,
        actor_devices=placement.actor_devices,
        batch_wait_s=wait if wait == "auto" else wait / 1e3,
        micro_batch=2 if micro == "auto" else max(1, micro // config.env.segment),
        **{name: setting(config, name) for name in SAME.split()},
    )


def overridden(config: Config, preset: str, plan: PlanConfig) -> Config:
    """Returns a copy with a preset, if one is named, and with the flags that replace its parts."""
    parts = dict(zip(PRESET_SETTINGS, PRESETS[preset], strict=True)) if preset else {}
    flags = {name: getattr(plan, name) for name in PRESET_SETTINGS}
    given = {name: value for name, value in flags.items() if value not in (None, "")}
    return completed(config, **parts | given)


def divisor(whole: int, most: int) -> int:
    """Returns the largest divisor of `whole` that is not above `most`."""
    return max(d for d in range(1, min(whole, most) + 1) if whole % d == 0)


def planned(plan: PlanConfig) -> tuple[Node, int, str]:
    """Returns one node of the cluster, how many nodes there are, and what was decided, in words.

    Raises UserError."""
    # Cut a node's GPUs into parts.
    config = overridden(Config(), plan.preset or "full", plan)
    per_node, nodes = plan.whole_nodes
    r, a = parse_ratio(plan.ratio or "1:1")
    common = math.gcd(r, a) if r + a > per_node else 1  # 16:16 of several nodes is 1:1 of each
    ratio = f"{r // common}:{a // common}"
    placed = place(ratio, config.train.placement, per_node, per_node, 0, 0, 0)

    # Divide the envs among simulator processes.
    lanes, rest = divmod(plan.envs, plan.lane_envs)
    odd = f"--envs {plan.envs} is not divisible by --lane-envs {plan.lane_envs}"
    require(rest == 0, f"{odd}: choose --envs as a multiple of it")
    gpus = placed.env_devices
    if plan.lane_envs > 1:
        workers = plan.env_workers or lanes
        over = f"over {len(gpus)} GPUs and {workers} env workers: change --lane-envs or --envs"
        even = lanes % len(gpus) == 0 and lanes % workers == 0
        require(even, f"{lanes} lanes cannot be spread evenly {over}")
    else:
        workers = plan.env_workers or round(plan.envs * len(gpus) / per_node)
        workers = max(1, min(workers, lanes))
    placed = replace(
        placed,
        env_devices=tuple(gpus[i % len(gpus)] for i in range(workers)),
        rollout_devices=placed.rollout_devices[:lanes],
    )

    # Complete the settings, and translate them.
    segment = -(-plan.episode_steps // plan.chunk)
    config = completed(
        config,
        envs=plan.envs,
        env_workers=workers,
        lanes=lanes // workers if plan.lane_envs > 1 else 0,
        segment=segment,
        micro_batch=plan.micro_batch or 4 * segment,
        chunk=plan.chunk,
        batch=plan.envs * plan.rollout_epochs,
        update_epochs=plan.update_epochs,
    )
    node = share_batch(node_of(config, placed), plan)
    line = f"{nodes} node{'s' * (nodes > 1)} of {placed.line}"
    line += f"; {workers} env workers for {plan.envs} envs on each"
    return coarsened(node, plan, nodes), nodes, line


def share_batch(node: Node, plan: PlanConfig) -> Node:
    """Cuts the batch into minibatches and micro-batches that the actor ranks share evenly."""
    ranks = len(node.actor_devices)
    fitting = [m for m in range(1, node.batch + 1) if node.batch % m == 0 and node.can_share(m)]
    unit = f"{ranks} actor workers" + f" × {node.whole} envs of a lane" * (node.whole > 1)
    odd = f"{node.batch} trajectories cannot be shared by {unit}"
    require(fitting, f"{odd}: choose --envs as a multiple of {ranks * node.whole}")
    minibatch = plan.minibatch or min(fitting, key=lambda size: abs(size - node.envs))
    must = f"must divide {node.batch} trajectories and be a multiple of {unit}"
    require(minibatch in fitting, f"--minibatch {minibatch} {must}")
    micro_batch = divisor(minibatch // ranks, node.micro_batch)
    return replace(node, minibatch=minibatch, micro_batch=micro_batch)


def coarsened(node: Node, plan: PlanConfig, nodes: int) -> Node:
    """Lets one chunk step stand for several, so that a prediction takes no longer than is said."""
    if plan.rounds:
        steps = plan.rounds // plan.rollout_epochs
    else:
        followed = plan.simulated_nodes * 3 if plan.sweep else min(nodes, plan.simulated_nodes)
        iterations = plan.iterations + plan.warmup
        lanes = node.lanes * plan.rollout_epochs * followed * iterations
        steps = max(4, AFFORDED // lanes)
    steps = max(1, min(node.segment, steps))
    coarse = node.segment / steps
    return replace(node, segment=steps, chunk=plan.episode_steps / steps, coarse=coarse)
