"""Flags of `plan.py`, and the node that they describe.

    python plan.py --help

Left out: validation of what only a real run needs (files, devices, memory).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import PRESETS, UserError, parse_ratio
from planning import Node
from scheduler import place

AFFORDED = (
    400_000  # chunk steps of lanes to simulate for one prediction, where nothing else is said
)


@dataclass(kw_only=True)
class PlanConfig:
    """Predicts seconds per iteration, env steps/s and bubbles of a cluster that need not exist."""

    gpus: int = 8
    """GPUs of the whole cluster"""
    gpus_per_node: int = 8
    """a node is a closed unit: simulators, rollouts and actors exchange nothing but gradients with
    other nodes
    """
    ratio: str = ""
    """R:A within a node; empty means 1:1, or with --from the run's own"""
    preset: Literal[
        "", "sync-colocated", "sync-disaggregated", "train-async", "rollout-async", "full"
    ] = ""
    """as in train.py; empty means full, or with --from the run's own settings"""
    placement: Literal["", "colocated", "disaggregated", "hybrid"] = ""
    """instead of the preset's; colocated stages take turns on their devices"""
    max_staleness: int | None = None
    """instead of the preset's"""
    batch_max: int | Literal["auto", "all"] | None = None
    """instead of the preset's"""
    batch_wait_ms: float | Literal["auto"] | None = None
    """instead of the preset's"""
    stream: bool | None = None
    """instead of the preset's: True or False"""

    rollout_s: float | None = None
    """seconds that one iteration's rollout takes alone and in lockstep, on the R parts of --gpus"""
    actor_s: float | None = None
    """seconds that training on it takes alone, on the A parts of --gpus"""
    measured_ratio: str = ""
    """R:A that --rollout-s and --actor-s belong to, if it is not --ratio"""
    measured_placement: Literal["", "colocated", "disaggregated", "hybrid"] = ""
    """placement that they belong to, if it is not the one predicted"""
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """run whose trace.json and metrics.jsonl give the costs instead; it counts as one node"""

    envs: int = 64
    """envs of a node (RL-VLA³, setup C: 64)"""
    rollout_epochs: int = 8
    """episodes of every env in an iteration (RL-VLA³, setup C: 8)"""
    episode_steps: int = 480
    """control steps of an episode, which is one trajectory (RL-VLA³, LIBERO: 480)"""
    chunk: int = 10
    """C, control steps per inference (RL-VLA³, π0.5: 10)"""
    update_epochs: int = 1
    """passes over a batch (RL-VLA³, setup C: 1)"""
    minibatch: int = 0
    """trajectories of one optimizer step, of a node; 0 means one of every env"""
    micro_batch: int = 0
    """trajectories of one forward and backward pass of a rank; 0 means at most 4"""
    env_workers: int = 0
    """simulator processes of a node; 0 means one per env where simulators have a part in all GPUs,
    and fewer in proportion
    """
    lane_envs: int = 1
    """envs of one vectorised GPU simulator, which step together and share the GPU with inference; 1
    means CPU simulators
    """

    tail: float = 0.27
    """σ of the log-normal time of a chunk (envs/emulated.py, from RL-VLA³'s LIBERO rows)"""
    infer_share: float = 0.2
    """inference's share of the lockstep rollout (envs/emulated.py)"""
    infer_fixed: float = 0.2
    """share of a full batch's inference that does not depend on its size (envs/emulated.py)"""
    step_fixed: float = 0.0
    """vectorised simulators: share of a step's time that does not depend on the number of envs"""
    train_fixed: float = 0.0
    """share of a micro-batch's time that does not depend on its size"""
    optimizer_s: float = 0.1
    """clipping and optimizer step, of each minibatch"""
    gradient_gb: float = 1.73
    """gradients that nodes sum (π0.5's action expert and value head: 433 M parameters, fp32)"""
    weights_gb: float = 0.87
    """weights that rollout workers fetch (the same in bf16)"""
    network_gb_s: float = 50.0
    """GB/s of a node to the others, each way (one 400 Gb/s link)"""
    network_latency_us: float = 20.0
    """of one hop between nodes"""
    nvlink_gb_s: float = 300.0
    """GB/s between GPUs of a node"""

    iterations: int = 20
    """iterations that the means are over, after 4 to 20 that are not counted"""
    rounds: int = 0
    """most chunk steps of a lane in an iteration that are simulated, where one stands for several;
    0 means what a second or two allow, but at least four for each trajectory
    """
    node_spread: float = 0.0
    """σ of the lasting differences in speed between nodes, log-normal; of many nodes the slowest
    counts
    """
    simulated_nodes: int = 3
    """nodes followed event by event; see planning/events.py"""
    seed: int = 0
    """seed of the simulated times"""
    sweep: bool = False
    """predict every size from one node to 1024 GPUs; costs are those of --gpus"""
    plot: Path | None = None
    """picture of the sweep"""
    validate: bool = False
    """compare predictions with RL-VLA³'s tables, and with a measured ladder if there is one"""
    ladder: Path | None = None
    """--validate: what `python bench.py ladder --setting columns --json FILE` wrote"""
    json: Path | None = None
    """also write the result to this file"""


def preset_of(config: PlanConfig) -> tuple[str, int, int | str, float | str, bool]:
    """Placement, staleness, B_max, T_max in seconds and streaming: the preset's, as far as flags
    say nothing else.
    """
    placement, staleness, batch_max, wait, stream = PRESETS[config.preset or "full"]
    wait = wait if config.batch_wait_ms is None else config.batch_wait_ms
    batch_max = config.batch_max or batch_max
    if wait == math.inf and batch_max not in ("all", 1):
        raise UserError(
            f"--batch-wait-ms inf with --batch-max {batch_max} may wait for ever: give --batch-max "
            "all"
        )
    return (
        config.placement or placement,
        staleness if config.max_staleness is None else config.max_staleness,
        batch_max,
        wait if wait == "auto" else wait / 1e3,
        stream if config.stream is None else config.stream,
    )


def warmup(config: PlanConfig) -> int:
    """Iterations before those that count."""
    return max(4, min(20, config.iterations // 5))


def divisor(whole: int, most: int) -> int:
    """The largest divisor of `whole` that is not above `most`."""
    return max(d for d in range(1, min(whole, most) + 1) if whole % d == 0)


def node_of(config: PlanConfig) -> tuple[Node, int, str]:
    """The settings of one node, how many nodes there are, and what was decided. Raises
    UserError.
    """
    for name in (
        "gpus",
        "gpus_per_node",
        "envs",
        "rollout_epochs",
        "episode_steps",
        "chunk",
        "update_epochs",
        "lane_envs",
    ):
        if getattr(config, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1"
            )
    placement, staleness, batch_max, wait, stream = preset_of(config)
    per_node = min(config.gpus, config.gpus_per_node)
    nodes, rest = divmod(config.gpus, per_node)
    if rest:
        raise UserError(
            f"--gpus {config.gpus} is no multiple of --gpus-per-node {per_node}: every node must "
            "be whole"
        )
    r, a = parse_ratio(config.ratio or "1:1")
    if r + a > per_node:  # 16:16 of several nodes is 1:1 of each
        r, a = r // math.gcd(r, a), a // math.gcd(r, a)
    if config.envs % config.lane_envs:
        raise UserError(
            f"--envs {config.envs} is not divisible by --lane-envs {config.lane_envs}: choose "
            "--envs as a multiple of it"
        )
    placed = place(f"{r}:{a}", placement, per_node, per_node, 0, 0, 0)
    lanes = config.envs // config.lane_envs
    vectorised = config.lane_envs > 1
    rollouts = placed.rollout_devices[:lanes]
    actors = placed.actor_devices
    workers = config.env_workers or round(config.envs * len(placed.env_devices) / per_node)
    if vectorised and config.envs % (config.lane_envs * len(placed.env_devices)):
        raise UserError(
            f"{lanes} lanes cannot be spread evenly over {len(placed.env_devices)} GPUs: change "
            "--lane-envs or --envs"
        )
    if vectorised:
        envs = tuple(
            placed.env_devices[i % len(placed.env_devices)]
            for i in range(config.env_workers or lanes)
        )
    else:
        envs = ("cpu",) * max(1, min(workers, lanes))
    batch = config.envs * config.rollout_epochs
    ranks = len(actors)
    fitting = [m for m in range(ranks, batch + 1, ranks) if batch % m == 0]
    if not fitting:
        raise UserError(
            f"{batch} trajectories cannot be shared by {ranks} actor workers: choose --envs as a "
            f"multiple of {ranks}"
        )
    minibatch = config.minibatch or min(fitting, key=lambda m: abs(m - config.envs))
    if minibatch not in fitting:
        raise UserError(
            f"--minibatch {minibatch} must divide {batch} trajectories and be a multiple of "
            f"{ranks} actor workers"
        )
    micro = config.micro_batch or divisor(minibatch // ranks, 4)
    if micro < 1 or minibatch % (ranks * micro):
        raise UserError(
            f"--minibatch {minibatch} is not divisible by --micro-batch {micro} × {ranks} actor "
            "workers"
        )
    segment = -(-config.episode_steps // config.chunk)  # chunk steps of a trajectory
    if config.rounds:
        simulated = config.rounds // config.rollout_epochs
    else:
        followed = (
            config.simulated_nodes * 3 if config.sweep else min(nodes, config.simulated_nodes)
        )
        iterations = config.iterations + warmup(config)
        simulated = max(4, AFFORDED // (lanes * config.rollout_epochs * followed * iterations))
    simulated = max(1, min(segment, simulated))
    node = Node(
        lanes=lanes,
        lane_envs=config.lane_envs,
        env_devices=envs,
        rollout_devices=rollouts,
        actor_devices=actors,
        segment=simulated,
        chunk=config.episode_steps / simulated,
        coarse=segment / simulated,
        batch=batch,
        minibatch=minibatch,
        micro_batch=micro,
        update_epochs=config.update_epochs,
        max_staleness=staleness,
        batch_max=batch_max,
        batch_wait_s=wait,
        stream=stream,
    )
    line = (
        f"{nodes} node{'s' * (nodes > 1)} of {placed.line}; {len(envs)} env workers for "
        f"{config.envs} envs on each"
    )
    return node, nodes, line
