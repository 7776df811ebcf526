"""Seconds that work takes: from two phases (`calibrate`), or from a run's trace (`from_run`).

Left out: cores and links that stages fight over. What a trace shows contains the contention that
the run had.
"""

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from checks import flag_of
from config import Config, existing_run, from_json, parse_ratio
from errors import require, understood
from planning import STAGES, Costs, Node, scaled
from planning.events import simulate
from planning.settings import PlanConfig, node_of, overridden, planned
from planning.wire import Network, all_reduce_s, exposed_s, wire_gb
from run_folder import read_metrics, read_trace
from scheduler import place

Span = tuple[str, float, float, dict]  # what, start and end in seconds, what of
INSIDE_HOP_S = 3.4e-6  # from GPU to GPU of a node (NCCL's tuning.cc: ring, Simple)
BUCKETS = 8  # of a minibatch's gradients, at least
TOO_FEW = 7  # lines of metrics.jsonl below which a prediction may be far off


def reductions(plan: PlanConfig, node: Node, nodes: int) -> tuple[float, int]:
    """Returns the seconds of one bucket's all-reduce, and how many buckets a minibatch has."""
    buckets = max(BUCKETS, math.ceil(1e3 * plan.gradient_gb / plan.bucket_mb))
    network = Network(
        gb_s=plan.network_gb_s,
        hop_s=1e-6 * plan.network_latency_us,
        inside_gb_s=plan.nvlink_gb_s,
        inside_hop_s=INSIDE_HOP_S,
        trees=True,
    )
    ranks = len(node.actor_devices)
    return all_reduce_s(plan.gradient_gb / buckets, nodes, ranks, network), buckets


def gradient_s(plan: PlanConfig, node: Node, costs: Costs, nodes: int) -> float:
    """Returns the seconds of each minibatch that the sum over so many nodes takes and training does
    not hide."""
    micro_s = costs.train_fixed_s + node.micro_batch * node.segment * costs.train_each_s
    return exposed_s(*reductions(plan, node, nodes), plan.overlap * micro_s)


def summed(plan: PlanConfig, node: Node, costs: Costs, nodes: int, base: int) -> Costs:
    """Returns the costs with sums of gradients over `nodes` instead of `base` nodes."""
    more_s = gradient_s(plan, node, costs, nodes) - gradient_s(plan, node, costs, base)
    return replace(costs, gradient_s=max(0.0, costs.gradient_s + more_s))


def words(costs: Costs) -> str:
    """Says what one inference and one chunk's simulation cost."""
    spread = f" (σ {costs.step_tail:.0%})" if not costs.step_samples else ""
    return (
        f"an inference takes {1e3 * costs.infer_fixed_s:.3g} ms + {1e3 * costs.infer_each_s:.3g} "
        f"ms per sample, a chunk's simulation {1e3 * costs.step_s:.3g} ms{spread}"
    )


def all_words(costs: Costs) -> str:
    return (
        f"{words(costs)}, training {1e3 * costs.train_each_s:.3g} ms per chunk step, a weight sync "
        f"{1e3 * costs.fetch_s:.3g} ms"
    )


def lockstep(node: Node) -> Node:
    """Returns the same node in the synchronous baseline's rollout.

    There, each simulating device has one vectorised lane. Only rollouts are timed, so one actor
    rank will do."""
    lanes = min(node.lanes, len(set(node.env_devices)))
    if node.lane_envs > 1 and node.lanes % lanes == 0:
        node = replace(
            node,
            lanes=lanes,
            lane_envs=node.envs // lanes,
            env_devices=node.env_devices[:lanes],
            rollout_devices=node.rollout_devices[:lanes],
            actor_devices=node.actor_devices[:1],
        )
    waits = {"max_staleness": 0, "batch_max": "all", "batch_wait_s": math.inf, "stream": False}
    return replace(node, update_epochs=1, **waits)


def calibrate(plan: PlanConfig) -> Costs:
    """Returns the costs with which a synchronous iteration takes --rollout-s and then --actor-s, on
    the parts that those belong to.

    The rollout is simulated alone, twice: simulators without inference, to give them their share;
    then both, to meet --rollout-s exactly. Raises UserError."""
    # Find the node that was measured.
    give = "give --rollout-s and --actor-s, the seconds of a synchronous iteration's two phases"
    require(None not in (plan.rollout_s, plan.actor_s), f"{give}, or --from RUN")
    ratio = plan.measured_ratio or plan.ratio
    placement = plan.measured_placement or plan.placement
    node, nodes, _ = planned(replace(plan, ratio=ratio, placement=placement))
    base = lockstep(node)
    runs = (nodes, plan.simulated_nodes, 12, 1, plan.seed)

    # Share the rollout out between simulators and inference.
    drawn = {"step_tail": plan.tail, "draw_share": plan.draw_share}
    free = Costs(step_s=1.0, infer_each_s=0.0, train_each_s=0.0, **drawn)
    rounds = base.batch // base.envs * base.segment
    full = plan.infer_share * plan.rollout_s / rounds  # seconds of a full batch's inference
    costs = replace(
        free,
        step_s=(1 - plan.infer_share) * plan.rollout_s / simulate(base, free, *runs).step_s,
        infer_fixed_s=plan.infer_fixed * full,
        infer_each_s=(1 - plan.infer_fixed) * full / (base.served * base.lane_envs),
    )
    scale = plan.rollout_s / simulate(base, costs, *runs).step_s
    step_s = costs.step_s * scale
    if node.lane_envs > 1:  # a narrower vectorised lane than in lockstep
        step_s *= plan.step_fixed + (1 - plan.step_fixed) * node.lane_envs / base.lane_envs

    # What the actor takes besides optimizer steps and communication, micro-batches take. The last
    # one of a minibatch hides so much of its own time of reductions, and the last of them never.
    steps = node.optimizer_steps
    bucket_s, buckets = reductions(plan, node, nodes)
    outside = plan.optimizer_s + buckets * bucket_s
    longer = f"{steps} optimizer steps of {outside:.2g} s each take longer than --actor-s"
    fits = not plan.actor_s or steps * outside <= plan.actor_s
    require(fits, f"{longer} {plan.actor_s:g}: lower --optimizer-s or --gradient-gb")
    micro_batches = node.minibatch / len(node.actor_devices) / node.micro_batch
    hides = plan.overlap * (1 - 1 / buckets)
    left = max(outside, plan.actor_s / steps) - plan.optimizer_s
    micro_s = (left - buckets * bucket_s) / (micro_batches - hides)
    micro_s = min(micro_s, (left - bucket_s) / micro_batches)
    costs = replace(
        scaled(costs, rollout=scale),
        step_s=step_s,
        train_fixed_s=plan.train_fixed * micro_s,
        train_each_s=(1 - plan.train_fixed) * micro_s / (node.micro_batch * node.segment),
        optimizer_s=plan.optimizer_s * (plan.actor_s > 0),
        fetch_s=plan.weights_gb / plan.nvlink_gb_s,
    )
    return replace(costs, gradient_s=gradient_s(plan, node, costs, nodes) * (plan.actor_s > 0))


def chunk_times(rows: list[Span]) -> list[float]:
    """Returns the seconds of each chunk of an env worker: steps, and what renders and resets."""
    times: list[float] = []
    for what, start, end, _ in rows:
        if what == "step":
            times.append(end - start)
        elif times and what in ("render", "reset"):
            times[-1] += end - start
    return times


def overhead(rows: list[Span], what: str) -> float:
    """Returns the seconds that no span of a worker covers, for each span of this work."""
    covered = sum(end - start for _, start, end, _ in rows)
    units = sum(name == what for name, *_ in rows)
    return max(0.0, rows[-1][2] - rows[0][1] - covered) / max(units, 1)


def inference_cost(
    infers: list[Span], mean_size: float, most: int, fixed: float
) -> tuple[float, float]:
    """Returns the seconds of an inference that do not depend on its size, and those per sample.

    They are a line through the spans where the trace says how large each batch was and sizes
    differ; else `fixed`, the share of a batch of `most` samples, is believed."""
    seconds = np.array([end - start for _, start, end, _ in infers])
    sizes = np.array([args.get("batch", math.nan) for *_, args in infers], float)
    if np.isfinite(sizes).all() and np.ptp(sizes) > 0:
        slope, base = np.polyfit(sizes, seconds, 1)
        if slope > 0 and base > 0:
            return float(base), float(slope)
    each = float(seconds.mean()) / (mean_size + most * fixed / (1 - fixed))
    return fixed / (1 - fixed) * each * most, each


def message_time(env_rows: list[list[Span]], infers: list[Span]) -> float:
    """Returns the median seconds from the end of an inference to the end of the wait for it."""
    ends = np.array([end for _, _, end, _ in infers])
    found = []
    for rows in env_rows:
        for what, start, end, _ in rows:
            if what == "wait: action":
                before = np.searchsorted(ends, end, side="right") - 1
                if start < ends[before] <= end:
                    found.append(end - ends[before])
    return float(np.median(found)) if found else 0.0


def costs_of_run(spans: dict[str, list[Span]], node: Node, batch_size: float, fixed: float):
    """Returns the Costs that the workers' spans show, for the node that ran.

    Time between two spans, which no span covers, belongs to the unit of work before it.
    batch_size: mean samples of an inference. fixed: see `inference_cost`."""
    envs, rollouts, actors = (
        [rows for name, rows in spans.items() if name.startswith(stage + "-")] for stage in STAGES
    )
    trained: dict[str, list[float]] = {}  # seconds of each span of the actors
    for what, start, end, _ in chain(*actors):
        trained.setdefault(what, []).append(end - start)
    mean = {what: float(np.mean(seconds)) for what, seconds in trained.items()}

    # Simulators, whose times are kept one by one.
    chunks = []
    for rows in envs:
        between = overhead(rows, "step")
        chunks += [seconds + between for seconds in chunk_times(rows)]

    # Inference and training, by their size.
    infers = [span for span in chain(*rollouts) if span[0] == "infer"]
    infers.sort(key=lambda span: span[2])
    most = node.served * node.lane_envs
    infer_fixed, infer_each = inference_cost(infers, batch_size, most, fixed)
    micro_s = mean["train"] + np.mean([overhead(rows, "train") for rows in actors])
    return Costs(
        step_s=float(np.mean(chunks)),
        step_samples=tuple(chunks),
        infer_fixed_s=infer_fixed + float(np.mean([overhead(rows, "infer") for rows in rollouts])),
        infer_each_s=infer_each,
        train_each_s=float(micro_s) / (node.micro_batch * node.segment),
        optimizer_s=mean.get("optimizer", 0.0),
        # The last rank to arrive waits for the sum alone.
        gradient_s=float(np.percentile(trained.get("wait: gradient", [0.0]), 5)),
        publish_s=mean.get("publish", 0.0),
        message_s=message_time(envs, infers),
    )


# What --from finds in the run, and a flag would have no effect on.
OF_THE_RUN = ("rollout_s", "actor_s", "measured_ratio", "measured_placement", "envs", "chunk")
OF_THE_RUN += ("rollout_epochs", "episode_steps", "update_epochs", "minibatch", "micro_batch")
OF_THE_RUN += ("env_workers", "lane_envs", "tail", "infer_share", "step_fixed", "train_fixed")
OF_THE_RUN += ("optimizer_s", "draw_share")


def read_run(name: str) -> tuple[Path, Config, list[dict], dict[str, list[Span]]]:
    """Returns a run's folder, settings, lines of metrics that count, and spans."""
    run = existing_run(name)
    missing = f"{run} has no trace.json and metrics.jsonl"
    traced = (run / "trace.json").is_file() and (run / "metrics.jsonl").is_file()
    require(traced, f"{missing}: --from takes a finished run that was traced")
    settings = from_json(run / "config.json")
    with understood(f"what run {run} left behind"):
        lines = [line for line in read_metrics(run) if "batch_size_mean" in line]  # measured
        nodes = settings.train.nodes  # before it was resumed there may have been others
        lines = [line for line in lines if len(line.get("nodes", {0: {}})) == nodes]
        spans = read_trace(run)
    parts = settings.train.parts
    changed = any("ratio" in line.get("tuning", {}) for line in lines)
    both = f"{run} came to ratio {parts} on its way, and its trace has both"
    alone = settings.train.ratio != "auto" or not changed
    require(alone, f"{both}: resume it with --ratio {parts} first")
    if len(lines) > 4:  # the first iterations warm up, the last one stops
        lines = lines[2:-1]
    worked = {(worker.split("-")[0], what) for worker, rows in spans.items() for what, *_ in rows}
    long = len(lines) >= 2 and {("env", "step"), ("rollout", "infer"), ("actor", "train")} <= worked
    require(long, f"{run} is too short: it takes two iterations in which every stage has worked")
    return run, settings, lines, spans


def shares_of(config: Config) -> tuple[float, float]:
    """Returns which part of all devices rollouts have, and which part actors have."""
    if config.train.placement == "colocated":
        return 1.0, 1.0
    r, a = parse_ratio(config.train.parts)
    return r / (r + a), a / (r + a)


def as_summed(node: Node, nodes: int, lines: list[dict]) -> dict[str, float]:
    """Returns settings of a plan: the gradients that a run's ranks summed, and, if it had several
    nodes, the speed at which they did."""
    gb = 1e-9 * float(np.mean([line["reduce_bytes"] for line in lines]))
    found = {"gradient_gb": gb / node.optimizer_steps}
    if nodes > 1:
        seconds = float(np.mean([line["reduce_s"] for line in lines]))
        found["network_gb_s"] = wire_gb(gb, nodes * len(node.actor_devices)) / seconds
    return found


def from_run(plan: PlanConfig) -> tuple[Node, int, Costs, str, PlanConfig]:
    """Returns node, number of nodes and costs of a run, changed as flags say; in words, what the
    run itself reached; and the plan with its gradients and network. Raises UserError.

    Lanes stay as wide as they were: other parts mean other numbers of env workers, and faster or
    slower rollouts and actors."""
    default = PlanConfig()
    given = [name for name in OF_THE_RUN if getattr(plan, name) != getattr(default, name)]
    takes = "--from takes costs and sizes from the run"
    require(not given, f"{takes}: leave out {', '.join(map(flag_of, given))}")
    require(plan.infer_fixed < 1, "--infer-fixed 1 must be less than 1 with --from")
    run, settings, lines, spans = read_run(plan.from_)

    # Translate the run, and the run as flags change it.
    placement = place(
        *(settings.train.parts, settings.train.placement, 0, 1),  # on "cpu": nobody takes turns
        *(settings.env.env_workers, settings.rollout.rollout_workers, settings.actor.actor_workers),
    )
    ran = node_of(settings, placement)
    changed = overridden(settings, plan.preset, plan)
    changed.train.ratio = plan.ratio or settings.train.parts
    node = node_of(changed, placement)
    env_steps = lines[-1]["env_steps"] - lines[0]["env_steps"]
    seconds = lines[-1]["time"] - lines[0]["time"]
    chunk_steps = (len(lines) - 1) * node.batch * node.segment * settings.train.nodes
    rollout, actor = (
        now / then for now, then in zip(shares_of(changed), shares_of(settings), strict=True)
    )
    envs = max(1, min(node.lanes, round(settings.env.env_workers * rollout)))
    # Episodes may end within a chunk, so a chunk step has fewer env steps than C.
    node = replace(node, chunk=env_steps / chunk_steps, env_devices=("cpu",) * envs)
    if changed.train.placement == "colocated":  # each rank has a part of the machine, in turns
        stages = {"rollout_devices": node.rollout_devices, "actor_devices": node.actor_devices}
        ranks = {stage: tuple(map(str, range(len(those)))) for stage, those in stages.items()}
        node = replace(node, **ranks)

    # Measure what the run paid, and scale it to the new parts.
    batch_size = float(np.mean([line["batch_size_mean"] for line in lines]))
    costs = costs_of_run(spans, ran, batch_size, plan.infer_fixed)
    costs = replace(costs, fetch_s=lines[-1]["weight_sync_s"])
    line = f"{run}: {all_words(costs)}; the run reached {env_steps / seconds:.0f} env steps/s"
    if len(lines) < TOO_FEW:
        line += "; of so few iterations predictions may be far off: ten and more are within 3 %"
    costs = scaled(costs, rollout=1 / rollout, actor=1 / actor)

    # Sum gradients over as many nodes as are asked for, instead of those that ran.
    base = settings.train.nodes
    found = {"gpus": base * plan.gpus_per_node}
    if "reduce_s" in lines[-1]:
        found |= as_summed(ran, base, lines)
        waited = float(np.mean([line["reduce_wait_s"] for line in lines]))
        costs = replace(costs, gradient_s=waited / ran.optimizer_steps)
    plan = replace(plan)
    plan.fill(found)
    per_node, nodes = plan.whole_nodes
    if (base, nodes) != (1, 1):
        line += f"; it had {base} nodes, and {nodes} of {per_node} GPUs are predicted"
    return node, nodes, summed(plan, node, costs, nodes, base), line, plan
