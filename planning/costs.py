"""Seconds that work takes: from the two phases of a synchronous iteration (`calibrate`), or from a
run's trace (`from_run`).

    python plan.py --rollout-s 1050 --actor-s 861
    python plan.py --from NAME

Left out: cores and links that stages fight over. What a trace shows contains the contention that
the run had.
"""

import math
from dataclasses import replace

import numpy as np

from config import Config, UserError, existing_run, from_json, parse_ratio
from planning import STAGES, Costs, Node
from planning.events import simulate
from planning.settings import PlanConfig, node_of, preset_of
from run_folder import read_metrics, read_trace


def all_reduce_s(config: PlanConfig, nodes: int) -> float:
    """A ring over the nodes: every byte crosses each link twice, in 2 (n − 1) hops."""
    transfer = 2 * (nodes - 1) / nodes * config.gradient_gb / config.network_gb_s
    return transfer + 2 * (nodes - 1) * config.network_latency_us * 1e-6


def optimizer_steps(node: Node) -> int:
    """Of one iteration."""
    return node.update_epochs * node.batch // node.minibatch


def lockstep(node: Node) -> Node:
    """The same node in the synchronous baseline's rollout, with one vectorised lane per simulating
    device.
    """
    alone = replace(
        node, max_staleness=0, batch_max="all", batch_wait_s=math.inf, stream=False, update_epochs=1
    )
    lanes = min(node.lanes, len(set(node.env_devices)))
    if node.lane_envs == 1 or node.lanes % lanes:
        return alone
    return replace(
        alone,
        lanes=lanes,
        lane_envs=node.lanes * node.lane_envs // lanes,
        env_devices=node.env_devices[:lanes],
        rollout_devices=node.rollout_devices[:lanes],
    )


def calibrate(config: PlanConfig) -> Costs:
    """Costs with which a synchronous iteration takes --rollout-s and then --actor-s, on the parts
    that those belong to.

    The rollout is simulated alone, twice: simulators without inference, to give them their share;
    then both, to meet --rollout-s exactly.
    """
    if config.rollout_s is None or config.actor_s is None:
        raise UserError(
            "give --rollout-s and --actor-s, the seconds of a synchronous iteration's two phases, "
            "or --from RUN"
        )
    if min(config.rollout_s, config.actor_s) < 0 or config.rollout_s == 0:
        raise UserError("--rollout-s must be more than 0 and --actor-s not negative")
    if not (
        0 <= config.infer_share <= 1
        and 0 <= config.infer_fixed <= 1
        and 0 <= config.step_fixed <= 1
        and config.tail >= 0
    ):
        raise UserError(
            "--infer-share, --infer-fixed and --step-fixed must lie between 0 and 1, and --tail "
            "not below 0"
        )
    measured = replace(
        config,
        ratio=config.measured_ratio or config.ratio,
        placement=config.measured_placement or config.placement,
    )
    node, nodes, _ = node_of(measured)
    base = lockstep(node)
    rounds = base.batch // (base.lanes * base.lane_envs) * base.segment
    most = (
        math.ceil(base.lanes / len(base.rollout_devices)) * base.lane_envs
    )  # samples of a full batch
    free = Costs(step_s=1.0, step_tail=config.tail, infer_each_s=0.0, train_each_s=0.0)

    def alone(costs: Costs) -> float:
        return simulate(base, costs, nodes, config.simulated_nodes, 12, 1, config.seed).step_s

    full = config.infer_share * config.rollout_s / rounds  # seconds of a full batch's inference
    costs = replace(
        free,
        step_s=(1 - config.infer_share) * config.rollout_s / alone(free),
        infer_fixed_s=config.infer_fixed * full,
        infer_each_s=(1 - config.infer_fixed) * full / most,
    )
    scale = config.rollout_s / alone(costs)
    step = costs.step_s * scale
    if node.lane_envs > 1:  # a smaller vectorised lane
        step *= config.step_fixed + (1 - config.step_fixed) * node.lane_envs / base.lane_envs
    steps = optimizer_steps(node)
    outside = steps * (config.optimizer_s + all_reduce_s(config, nodes))
    if config.actor_s and outside > config.actor_s:
        raise UserError(
            f"{steps} optimizer steps of {outside / steps:.2g} s each take longer than --actor-s "
            f"{config.actor_s:g}: "
            "lower --optimizer-s or --gradient-gb"
        )
    micro_s = max(0.0, config.actor_s - outside) / (
        steps * node.minibatch / len(node.actor_devices) / node.micro_batch
    )
    return replace(
        costs,
        step_s=step,
        infer_fixed_s=costs.infer_fixed_s * scale,
        infer_each_s=costs.infer_each_s * scale,
        train_fixed_s=config.train_fixed * micro_s,
        train_each_s=(1 - config.train_fixed) * micro_s / (node.micro_batch * node.segment),
        optimizer_s=config.optimizer_s * (config.actor_s > 0),
        gradient_s=all_reduce_s(config, nodes) * (config.actor_s > 0),
        fetch_s=config.weights_gb / config.nvlink_gb_s,
    )


# ---------------------------------------------------------------- costs that a run measured


def chunk_times(rows: list) -> list[float]:
    """Of an env worker: seconds of each chunk, its steps and the rendering and resetting that
    follow them.
    """
    times: list[float] = []
    for what, start, end, _ in rows:
        if what == "step":
            times.append(end - start)
        elif times and what in ("render", "reset"):
            times[-1] += end - start
    return times


def overhead(rows: list, units: int) -> float:
    """Seconds between a worker's spans, neither work nor waiting, for each unit of its work."""
    return max(0.0, rows[-1][2] - rows[0][1] - sum(end - start for _, start, end, _ in rows)) / max(
        units, 1
    )


def inference_cost(infers: list, mean_size: float, most: int, fixed: float) -> tuple[float, float]:
    """Seconds of an inference that do not depend on its size, and those per sample.

    A line through the spans where the trace says how large each batch was and sizes differ; else
    `fixed` is believed.
    """
    seconds = np.array([end - start for _, start, end, _ in infers])
    sizes = np.array([args.get("batch", math.nan) for *_, args in infers], float)
    if np.isfinite(sizes).all() and np.ptp(sizes) > 0:
        slope, base = np.polyfit(sizes, seconds, 1)
        if slope > 0 and base > 0:
            return float(base), float(slope)
    each = float(seconds.mean()) / (mean_size + most * fixed / (1 - fixed))
    return fixed / (1 - fixed) * each * most, each


def node_of_run(
    config: PlanConfig, settings: Config, env_steps: float
) -> tuple[Node, float, float]:
    """The run's node as --preset and other flags change it, and how much faster rollouts and actors
    are on their new parts.

    env_steps: of a chunk step, on average (episodes may end within a chunk).
    """
    env = settings.env
    rollout = settings.rollout
    actor = settings.actor
    ratio = settings.train.parts
    placement, staleness, batch_max, wait, stream = preset_of(config)

    def chosen(flag, planned, own):
        return planned if config.preset or flag not in (None, "") else own

    def parts(ratio: str, placement: str) -> tuple[float, float]:
        r, a = parse_ratio(ratio)
        return (1.0, 1.0) if placement == "colocated" else (r / (r + a), a / (r + a))

    old = parts(ratio, settings.train.placement)
    new = parts(
        config.ratio or ratio, chosen(config.placement, placement, settings.train.placement)
    )
    faster = new[0] / old[0]
    trains_faster = new[1] / old[1]
    own_wait = (
        rollout.batch_wait_ms if rollout.batch_wait_ms == "auto" else rollout.batch_wait_ms / 1e3
    )
    node = Node(
        lanes=env.envs,
        env_devices=("cpu",) * max(1, min(env.envs, round(env.env_workers * faster))),
        rollout_devices=("cpu",) * rollout.rollout_workers,
        actor_devices=("cpu",) * actor.actor_workers,
        segment=env.segment,
        chunk=env_steps,
        batch=actor.batch,
        minibatch=actor.minibatch,
        micro_batch=actor.micro_batch,
        update_epochs=actor.update_epochs,
        max_staleness=chosen(config.max_staleness, staleness, actor.max_staleness),
        batch_max=chosen(config.batch_max, batch_max, rollout.batch_max),
        batch_wait_s=chosen(config.batch_wait_ms, wait, own_wait),
        stream=chosen(config.stream, stream, actor.stream),
    )
    return node, faster, trains_faster


def costs_of_run(
    spans: dict[str, list], settings: Config, batch_size: float, infer_fixed: float
) -> Costs:
    """What the workers' spans show. Time between two spans, which no span covers, belongs to the
    unit of work before it.
    """
    envs, rollouts, actors = (
        [rows for name, rows in spans.items() if name.startswith(stage + "-")] for stage in STAGES
    )
    chunks = []
    for rows in envs:
        times = chunk_times(rows)
        chunks += [seconds + overhead(rows, len(times)) for seconds in times]

    infers = sorted(
        (row for rows in rollouts for row in rows if row[0] == "infer"), key=lambda row: row[2]
    )
    most = math.ceil(settings.env.envs / settings.rollout.rollout_workers)
    fixed, each = inference_cost(infers, batch_size, most, infer_fixed)
    fixed += float(
        np.mean([overhead(rows, sum(what == "infer" for what, *_ in rows)) for rows in rollouts])
    )

    def mean(what: str) -> float:
        return float(
            np.mean(
                [end - start for rows in actors for name, start, end, _ in rows if name == what]
                or [0.0]
            )
        )

    micro_s = mean("train") + np.mean(
        [overhead(rows, sum(what == "train" for what, *_ in rows)) for rows in actors]
    )
    sums = [
        end - start for rows in actors for what, start, end, _ in rows if what == "wait: gradient"
    ]
    # A message takes from the end of an inference to the end of the wait that it ends.
    ends = np.array([end for _, _, end, _ in infers])
    wakes = []
    for rows in envs:
        for what, start, end, _ in rows:
            answered = (
                ends[np.searchsorted(ends, end, side="right") - 1]
                if what == "wait: action"
                else -math.inf
            )
            if start < answered <= end:
                wakes.append(end - answered)
    return Costs(
        step_s=float(np.mean(chunks)),
        step_samples=tuple(chunks),
        infer_fixed_s=fixed,
        infer_each_s=each,
        train_each_s=float(micro_s) / (settings.actor.micro_batch * settings.env.segment),
        optimizer_s=mean("optimizer"),
        gradient_s=float(np.percentile(sums, 5))
        if sums
        else 0.0,  # the last rank to arrive waits for the sum alone
        publish_s=mean("publish"),
        message_s=float(np.median(wakes)) if wakes else 0.0,
    )


def from_run(config: PlanConfig) -> tuple[Node, int, Costs, str]:
    """Node, number of nodes and costs of a run, changed as flags say; and what the run itself
    reached. Raises UserError.
    """
    if config.rollout_s is not None or config.actor_s is not None:
        raise UserError("--from takes the costs from the run: leave out --rollout-s and --actor-s")
    run = existing_run(config.from_)
    if not (run / "trace.json").is_file() or not (run / "metrics.jsonl").is_file():
        raise UserError(
            f"{run} has no trace.json and metrics.jsonl: --from takes a finished run that was "
            "traced"
        )
    if not 0 <= config.infer_fixed < 1:
        raise UserError(f"--infer-fixed {config.infer_fixed} must be at least 0 and less than 1")
    settings = from_json(run / "config.json")
    try:
        lines = read_metrics(run)
        spans = read_trace(run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read what run {run} left behind: {error!r}") from None
    if settings.train.ratio == "auto" and any("ratio" in line.get("tuning", {}) for line in lines):
        parts = settings.train.parts
        raise UserError(
            f"{run} came to ratio {parts} on its way, and its trace has both: resume it with "
            f"--ratio {parts} first"
        )
    lines = (
        lines[2:-1] if len(lines) > 4 else lines
    )  # the first iterations warm up, the last one stops
    worked = {(name.split("-")[0], what) for name, rows in spans.items() for what, *_ in rows}
    if len(lines) < 2 or not {("env", "step"), ("rollout", "infer"), ("actor", "train")} <= worked:
        raise UserError(
            f"{run} is too short: it takes two iterations in which every stage has worked"
        )

    env_steps = lines[-1]["env_steps"] - lines[0]["env_steps"]
    seconds = lines[-1]["time"] - lines[0]["time"]
    chunk_steps = (len(lines) - 1) * settings.actor.batch * settings.env.segment
    node, faster, trains_faster = node_of_run(config, settings, env_steps / chunk_steps)
    costs = costs_of_run(
        spans,
        settings,
        float(np.mean([line["batch_size_mean"] for line in lines])),
        config.infer_fixed,
    )
    line = (
        f"{run}: a chunk takes {costs.step_s * 1e3:.3g} ms, an inference "
        f"{costs.infer_fixed_s * 1e3:.3g} + "
        f"{costs.infer_each_s * 1e3:.3g} ms per sample, a chunk step's training "
        f"{costs.train_each_s * 1e3:.3g} ms; "
        f"the run reached {env_steps / seconds:.0f} env steps/s"
        + (
            "; of so few iterations predictions may be far off: ten and more are within 3 %"
            if len(lines) < 7
            else ""
        )
    )
    nodes = max(1, config.gpus // config.gpus_per_node)
    costs = replace(
        costs,
        infer_fixed_s=costs.infer_fixed_s / faster,
        infer_each_s=costs.infer_each_s / faster,
        train_each_s=costs.train_each_s / trains_faster,
        fetch_s=lines[-1]["weight_sync_s"],
        gradient_s=costs.gradient_s + all_reduce_s(config, nodes),
    )
    return node, nodes, costs, line
