"""Predicts what a cluster, ratio, placement or preset would give: throughput and bubbles, before
anybody pays for them.

    python plan.py --gpus 8 --ratio 1:1 --preset full --rollout-s 1050 --actor-s 861
                                            two measured phases are enough
    python plan.py --from NAME --preset train-async
                                            stage costs that runs/NAME measured
    python plan.py --rollout-s 1050 --actor-s 861 --sweep --plot sweep.png
                                            8 … 1024 GPUs, and what breaks first
    python plan.py --validate --ladder L.json
                                            against the paper and a measured ladder, each error

`planning/events.py` runs the real batcher, admission and streamer in virtual time; `costs.py` finds
what to charge there. How the rollout divides (simulators' tail, inference's share) no synchronous
run shows: `--validate` prints how much depends on those defaults.

Communication (`planning/wire.py`): inside a node weights go to the rollout workers beside their
work. Across nodes only gradients go. At every optimizer step all ranks wait for the slowest, and
sum them in buckets, of which its last backward pass hides what it can. Actor time that was given
for --gpus contains its communication; a run of several nodes (--from) gives its network's speed.

Not predicted: how fast anything learns, memory, cores or links that stages fight over, slower
simulators as policies change, persistently slow nodes, failures.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import tyro

from checks import check_ranges, check_writable
from config import expanded
from errors import exit_on_user_error, require
from planning import STAGES, Costs, Node, Prediction, scaled
from planning.costs import calibrate, from_run, summed
from planning.events import simulate
from planning.settings import PlanConfig, divisor, planned

LARGEST = 1024  # GPUs of the sweep
PICTURES = (".png", ".jpg", ".pdf", ".svg")  # what --plot may be
BROKEN = 0.9  # share of linear scaling below which it counts as broken
NOISE = 0.02  # changes of throughput that random times may make
# The batch of a sweep: grows with the number of nodes, or does not; and its colour.
BATCHES = {"grows": "#3b7dd8", "fixed": "#d9822b"}


def predict(plan: PlanConfig, node: Node, costs: Costs, nodes: int) -> Prediction:
    """Predicts what so many such nodes give."""
    runs = (plan.simulated_nodes, plan.iterations, plan.warmup, plan.seed, plan.node_spread)
    return simulate(node, costs, nodes, *runs)


def share_of(node: Node, nodes: int, base: int) -> Node | None:
    """Returns one of `nodes` that share the batch of `base` nodes, or None if they cannot."""
    batch = node.batch * base // nodes
    minibatch = node.minibatch * base // nodes
    if node.batch * base % nodes or node.minibatch * base % nodes or not node.can_share(minibatch):
        return None
    if batch < node.envs:  # fewer envs than before
        if batch % (node.lane_envs * len(node.rollout_devices)):
            return None
        lanes = batch // node.lane_envs
        node = replace(node, lanes=lanes, env_devices=node.env_devices[:lanes])
    elif batch % node.envs:
        return None
    micro_batch = divisor(minibatch // len(node.actor_devices), node.micro_batch)
    return replace(node, batch=batch, minibatch=minibatch, micro_batch=micro_batch)


def at_size(
    plan: PlanConfig, node: Node, costs: Costs, nodes: int, base: int, batch: int
) -> Prediction:
    """Predicts with the all-reduce of `nodes` instead of `base` nodes."""
    # Fewer trajectories than `batch` scatter more.
    iterations = plan.iterations * min(50, max(1, batch // node.batch))
    plan = replace(plan, iterations=iterations)
    return predict(plan, node, summed(plan, node, costs, nodes, base), nodes)


def sweep(plan: PlanConfig, node: Node, costs: Costs, base: int) -> list[dict]:
    """Predicts one node to 1024 GPUs, with a batch that grows and with that of `base` nodes."""
    per_node = min(plan.gpus, plan.gpus_per_node)
    large = f"--gpus-per-node {per_node} is more than the {LARGEST} GPUs that a sweep goes up to"
    require(per_node <= LARGEST, f"{large}: leave out --sweep")
    rows = []
    sizes = [n for n in (2**i for i in range(11)) if n * per_node <= LARGEST]
    for batch in BATCHES:
        first = None  # env steps/s of a GPU, at the smallest size
        for nodes in sizes:
            if batch == "fixed" and nodes < base:
                continue
            mine = node if batch == "grows" else share_of(node, nodes, base)
            gpus = nodes * per_node
            if mine is None:
                print(f"batch fixed: {gpus} GPUs cannot share its minibatches")
                break
            found = at_size(plan, mine, costs, nodes, base, node.batch)
            first = first or found.env_steps_per_s / gpus
            row = {"batch": batch, "gpus": gpus, "nodes": nodes} | asdict(found)
            row["efficiency"] = found.env_steps_per_s / gpus / first
            seconds = summed(plan, mine, costs, nodes, base).gradient_s * mine.optimizer_steps
            row["gradient_share"] = seconds / found.step_s
            rows.append(row)
            busy = " ".join(f"{stage} {share:.0%}" for stage, share in busy_shares(found).items())
            print(
                f"batch {batch}: {gpus:5d} GPUs  step {found.step_s:8.2f} s  "
                f"{found.env_steps_per_s:9.0f} env steps/s  efficiency {row['efficiency']:4.0%}  "
                f"gradients {row['gradient_share']:5.1%} of the time  busy: {busy}",
                flush=True,
            )
    return rows


def changes(plan: PlanConfig, node: Node, costs: Costs) -> dict[str, tuple]:
    """Returns what could be changed: words → plan, node and costs, of which one differs."""
    plans = {
        "half the bytes of gradients, or twice the network": {"gradient_gb": plan.gradient_gb / 2},
        "network latency halved": {"network_latency_us": plan.network_latency_us / 2},
        "nodes that differ in speed (σ 5 %)": {"node_spread": 0.05},
    }
    nodes = {
        "half as many optimizer steps": {"minibatch": min(node.batch, 2 * node.minibatch)},
        "one more version of staleness": {"max_staleness": node.max_staleness + 1},
        "dynamic batches": {"batch_max": "auto", "batch_wait_s": "auto"},
        "streaming": {"stream": True},
    }
    prices = {
        "optimizer steps in no time": replace(costs, optimizer_s=0.0),
        "simulators with half the tail": replace(costs, step_tail=costs.step_tail / 2),
        "simulators twice as fast": replace(costs, step_s=costs.step_s / 2),
        "inference twice as fast": scaled(costs, rollout=0.5),
        "no fixed cost of an inference": replace(costs, infer_fixed_s=0.0),
        "training twice as fast": scaled(costs, actor=0.5),
    }
    found = {what: (replace(plan, **flags), node, costs) for what, flags in plans.items()}
    found |= {what: (plan, replace(node, **fields), costs) for what, fields in nodes.items()}
    found |= {what: (plan, node, priced) for what, priced in prices.items()}
    return {
        what: change
        for what, change in found.items()
        if change != (plan, node, costs) and node.batch % change[1].minibatch == 0
    }


def advise(plan: PlanConfig, node: Node, costs: Costs, base: int, rows: list[dict]) -> list[dict]:
    """Says where scaling breaks, and what each single change would give there."""
    advice = []
    for batch in BATCHES:
        mine = [row for row in rows if row["batch"] == batch]
        if not mine:
            print(f"\nbatch {batch}: no size up to {LARGEST} GPUs can be compared")
            continue
        broken = next((row for row in mine if row["efficiency"] < BROKEN), None)
        at = broken or mine[-1]
        what = "scaling breaks at" if broken else f"efficiency stays above {BROKEN:.0%} up to"
        reached = f"{at['gpus']} GPUs (efficiency {at['efficiency']:.0%})"
        print(f"\nbatch {batch}: {what} {reached}; there")
        here = node if batch == "grows" else share_of(node, at["nodes"], base)
        gains = []
        for what, change in changes(plan, here, costs).items():
            found = at_size(*change, at["nodes"], base, node.batch)
            gains.append((found.env_steps_per_s / at["env_steps_per_s"] - 1, what))
        for gain, what in sorted(gains, reverse=True):
            advice.append({"batch": batch, "gpus": at["gpus"], "change": what, "gain": gain})
            if abs(gain) >= NOISE:
                print(f"  {gain:+4.0%}  {what}")
        small = [what for gain, what in gains if abs(gain) < NOISE]
        print(f"  less than {NOISE:.0%}: {'; '.join(small)}")
    return advice


def draw(rows: list[dict], path: Path) -> None:
    """Draws env steps/s and efficiency against GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, efficient = figure.subplots(1, 2)
    for batch, colour in BATCHES.items():
        mine = [row for row in rows if row["batch"] == batch]
        if not mine:
            continue
        gpus = [row["gpus"] for row in mine]
        rates = [row["env_steps_per_s"] for row in mine]
        style = {"color": colour, "label": f"batch {batch}"}
        speed.loglog(gpus, rates, "o-", **style)
        speed.loglog(gpus, [rates[0] * n / gpus[0] for n in gpus], ":", color=colour, linewidth=1)
        efficient.semilogx(gpus, [row["efficiency"] for row in mine], "o-", **style)
    speed.set(ylabel="env steps/s (dotted: linear)")
    efficient.set(ylabel="share of linear scaling", ylim=(0, 1.1))
    efficient.axhline(BROKEN, color="#777777", linewidth=0.8)
    ticks = sorted({row["gpus"] for row in rows})
    for axes in (speed, efficient):
        axes.set(xlabel="GPUs", xticks=ticks, xticklabels=ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def busy_shares(found: Prediction) -> dict[str, float]:
    return {stage: 1 - getattr(found, f"bubble_{stage}") for stage in STAGES}


def show(found: Prediction) -> None:
    busy = busy_shares(found)
    bubbles = [f"bubble_{stage} {1 - share:.3f}" for stage, share in busy.items()]
    seconds = [f"{stage} {share * found.step_s:.4g}" for stage, share in busy.items()]
    print(
        f"step_s {found.step_s:.4g}   env_steps_per_s {found.env_steps_per_s:.4g}   "
        f"batch_size_mean {found.batch_size_mean:.3g}\n{'   '.join(bubbles)}\n"
        f"busy seconds of an iteration: {', '.join(seconds)}; critical stage: "
        f"{max(busy, key=busy.get)}"
    )


def answer(plan: PlanConfig) -> dict:
    """Prints what was asked for, and returns it."""
    if plan.validate:
        from benchmarks.plan_against_paper import validate

        return {"what": "validate", "rows": validate(plan.ladder)}
    if plan.from_:
        node, nodes, costs, line, plan = from_run(plan)
    else:
        node, nodes, line = planned(plan)
        costs = calibrate(plan)
    print(line)
    if plan.sweep:
        rows = sweep(plan, node, costs, nodes)
        return {"what": "sweep", "rows": rows, "changes": advise(plan, node, costs, nodes, rows)}
    found = predict(plan, node, costs, nodes)
    show(found)
    preset = plan.preset or ("" if plan.from_ else "full")
    about = {"what": "plan", "preset": preset, "gpus": plan.gpus, "nodes": nodes}
    return about | asdict(found)


def main(plan: PlanConfig) -> None:
    check_ranges(plan)
    if plan.json:
        check_writable(plan.json, "the result", "--json FILE")
    if plan.plot:
        check_writable(plan.plot, "the picture", "--plot FILE")
        kinds = ", ".join(PICTURES)
        require(plan.plot.suffix in PICTURES, f"--plot {plan.plot} must end in one of {kinds}")
    result = answer(plan)
    if plan.json:
        plan.json.write_text(json.dumps(result, indent=1) + "\n")
    if plan.plot and plan.sweep:
        draw(result["rows"], plan.plot)


if __name__ == "__main__":
    with exit_on_user_error():
        main(expanded(tyro.cli(PlanConfig)))
