"""What would this cluster, ratio, placement or preset give? Predicts throughput and bubbles before
anybody pays for them.

    python plan.py --gpus 8 --ratio 1:1 --preset full --rollout-s 1050 --actor-s 861
                                                two measured phases are enough
    python plan.py --from NAME --preset train-async  stage costs that runs/NAME measured
    python plan.py --rollout-s 1050 --actor-s 861 --sweep --plot sweep.png
                                                8 … 1024 GPUs, and what breaks first
    python plan.py --validate                  against the paper, each error
    python bench.py ladder --setting columns --json L.json && python plan.py --validate --ladder
    L.json

`planning/events.py` runs the real batcher, admission and streamer in virtual time; here its costs
are found. `--rollout-s` and `--actor-s` are what a synchronous run shows: seconds that one
iteration's two phases take alone, on the parts that --ratio gives them, the rollout in lockstep.
How the rollout divides (simulators' tail, inference's share) no synchronous run shows; the flags
have defaults, and the result depends on them: `--validate` prints by how much.

Communication: inside a node weights go to the rollout workers at --nvlink-gb-s, beside their work.
Across nodes only gradients go: a ring all-reduce over n nodes takes 2 (n−1)/n · bytes / bandwidth +
2 (n−1) · latency at every optimizer step, and every rank waits for the slowest. Actor time that was
given for --gpus contains its communication.

Not predicted: how fast anything learns, memory, cores or links that stages fight over, slower
simulators as policies change, persistently slow nodes, failures.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import tyro

from config import UserError, exit_on_user_error
from planning import STAGES, Costs, Node, Prediction
from planning.costs import all_reduce_s, calibrate, from_run, optimizer_steps
from planning.events import simulate
from planning.settings import PlanConfig, divisor, node_of, warmup
from planning.validate import validate

LARGEST = 1024  # GPUs of the sweep
BROKEN = 0.9  # share of linear scaling below which it counts as broken
NOISE = 0.02  # changes of throughput that random times may make


def predict(config: PlanConfig, node: Node, costs: Costs, nodes: int) -> Prediction:
    iterations = config.iterations
    seed = config.seed
    spread = config.node_spread
    return simulate(
        node, costs, nodes, config.simulated_nodes, iterations, warmup(config), seed, spread
    )


# ---------------------------------------------------------------- the sweep


def share_of(node: Node, nodes: int, base: int) -> Node | None:
    """One of `nodes` nodes when the batch stays that of `base` of them; None where it cannot be cut
    so far.
    """
    batch = node.batch * base // nodes
    minibatch = node.minibatch * base // nodes
    ranks = len(node.actor_devices)
    envs = node.lanes * node.lane_envs
    if (
        node.batch * base % nodes
        or node.minibatch * base % nodes
        or minibatch % ranks
        or minibatch < ranks
    ):
        return None
    if batch < envs:  # fewer envs than before
        if batch % (node.lane_envs * len(node.rollout_devices)):
            return None
        lanes = batch // node.lane_envs
        node = replace(node, lanes=lanes, env_devices=node.env_devices[:lanes])
    elif batch % envs:
        return None
    return replace(
        node,
        batch=batch,
        minibatch=minibatch,
        micro_batch=divisor(minibatch // ranks, node.micro_batch),
    )


def at_size(
    config: PlanConfig, node: Node, costs: Costs, nodes: int, base: int, batch: int
) -> Prediction:
    """With the all-reduce of `nodes` instead of `base` nodes. Less than `batch` trajectories, which
    scatter more, repeat.
    """
    costs = replace(
        costs,
        gradient_s=costs.gradient_s - all_reduce_s(config, base) + all_reduce_s(config, nodes),
    )
    return predict(
        replace(config, iterations=config.iterations * min(50, max(1, batch // node.batch))),
        node,
        costs,
        nodes,
    )


def sweep(config: PlanConfig, node: Node, costs: Costs, base: int) -> list[dict]:
    """From one node to 1024 GPUs: with a batch that grows with the nodes, and with one that stays
    that of `base` nodes.
    """
    per_node = config.gpus // base
    rows = []
    sizes = [n for n in (2**i for i in range(11)) if n * per_node <= LARGEST]
    for batch in ("grows", "fixed"):
        first = None
        for nodes in sizes if batch == "grows" else [n for n in sizes if n >= base]:
            mine = node if batch == "grows" else share_of(node, nodes, base)
            if mine is None:
                print(f"batch fixed: {nodes * per_node} GPUs cannot share its minibatches")
                break
            found = at_size(config, mine, costs, nodes, base, node.batch)
            first = first or found.env_steps_per_s / (nodes * per_node)
            row = {"batch": batch, "gpus": nodes * per_node, "nodes": nodes} | asdict(found)
            row["efficiency"] = found.env_steps_per_s / (nodes * per_node) / first
            row["gradient_share"] = (
                all_reduce_s(config, nodes) * optimizer_steps(mine) / found.step_s
            )
            rows.append(row)
            busy = " ".join(f"{stage} {1 - row[f'bubble_{stage}']:.0%}" for stage in STAGES)
            print(
                f"batch {batch}: {row['gpus']:5d} GPUs  step {found.step_s:8.2f} s  "
                f"{found.env_steps_per_s:9.0f} env steps/s  "
                f"efficiency {row['efficiency']:4.0%}  gradients {row['gradient_share']:5.1%} of "
                f"the time  busy: {busy}",
                flush=True,
            )
    return rows


def advise(config: PlanConfig, node: Node, costs: Costs, base: int, rows: list[dict]) -> list[dict]:
    """Where scaling breaks, and what each single change would give there."""
    per_node = config.gpus // base
    out = []
    for batch in ("grows", "fixed"):
        mine = [row for row in rows if row["batch"] == batch]
        broken = next((row for row in mine if row["efficiency"] < BROKEN), None)
        at = broken or mine[-1]
        if broken:
            print(
                f"\nbatch {batch}: scaling breaks at {at['gpus']} GPUs (efficiency "
                f"{at['efficiency']:.0%} < {BROKEN:.0%}); there"
            )
        else:
            print(
                f"\nbatch {batch}: efficiency stays above {BROKEN:.0%} up to {at['gpus']} GPUs "
                f"({at['efficiency']:.0%}); there"
            )
        here = node if batch == "grows" else share_of(node, at["nodes"], base)
        half_train = replace(
            costs, train_fixed_s=costs.train_fixed_s / 2, train_each_s=costs.train_each_s / 2
        )
        half_infer = replace(
            costs, infer_fixed_s=costs.infer_fixed_s / 2, infer_each_s=costs.infer_each_s / 2
        )
        changes = {
            "half the bytes of gradients, or twice the network": (
                replace(config, gradient_gb=config.gradient_gb / 2),
                here,
                costs,
            ),
            "network latency halved": (
                replace(config, network_latency_us=config.network_latency_us / 2),
                here,
                costs,
            ),
            "half as many optimizer steps": (
                config,
                replace(here, minibatch=min(here.batch, 2 * here.minibatch)),
                costs,
            ),
            "optimizer steps in no time": (config, here, replace(costs, optimizer_s=0.0)),
            "simulators with half the tail": (
                config,
                here,
                replace(costs, step_tail=costs.step_tail / 2),
            ),
            "simulators twice as fast": (config, here, replace(costs, step_s=costs.step_s / 2)),
            "inference twice as fast": (config, here, half_infer),
            "no fixed cost of an inference": (config, here, replace(costs, infer_fixed_s=0.0)),
            "training twice as fast": (config, here, half_train),
            "one more version of staleness": (
                config,
                replace(here, max_staleness=here.max_staleness + 1),
                costs,
            ),
            "dynamic batches": (
                config,
                replace(here, batch_max="auto", batch_wait_s="auto"),
                costs,
            ),
            "streaming": (config, replace(here, stream=True), costs),
            "nodes that differ in speed (σ 5 %)": (replace(config, node_spread=0.05), here, costs),
        }
        gains = []
        for what, (settings, changed, priced) in changes.items():
            if (changed, priced, settings) == (
                here,
                costs,
                config,
            ) or here.batch % changed.minibatch:
                continue
            found = at_size(settings, changed, priced, at["nodes"], base, node.batch)
            gains.append((found.env_steps_per_s / at["env_steps_per_s"] - 1, what))
        for gain, what in sorted(gains, reverse=True):
            out.append(
                {"batch": batch, "gpus": at["nodes"] * per_node, "change": what, "gain": gain}
            )
            if abs(gain) >= NOISE:
                print(f"  {gain:+4.0%}  {what}")
        print(
            f"  less than {NOISE:.0%}: "
            + "; ".join(what for gain, what in gains if abs(gain) < NOISE)
        )
    return out


def draw(rows: list[dict], path: Path) -> None:
    """Env steps/s and efficiency against GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, efficient) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for batch, colour in (("grows", "#3b7dd8"), ("fixed", "#d9822b")):
        mine = [row for row in rows if row["batch"] == batch]
        gpus = [row["gpus"] for row in mine]
        ideal = [mine[0]["env_steps_per_s"] * n / gpus[0] for n in gpus]
        speed.loglog(
            gpus,
            [row["env_steps_per_s"] for row in mine],
            "o-",
            color=colour,
            label=f"batch {batch}",
        )
        speed.loglog(gpus, ideal, ":", color=colour, linewidth=1)
        efficient.semilogx(
            gpus, [row["efficiency"] for row in mine], "o-", color=colour, label=f"batch {batch}"
        )
    efficient.axhline(BROKEN, color="#777777", linewidth=0.8)
    efficient.set_ylim(0, 1.1)
    ticks = sorted({row["gpus"] for row in rows})
    for axes, label in (
        (speed, "env steps/s (dotted: linear)"),
        (efficient, "share of linear scaling"),
    ):
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- the command


def show(found: Prediction) -> None:
    bubbles = {stage: getattr(found, f"bubble_{stage}") for stage in STAGES}
    print(
        f"step_s {found.step_s:.4g}   env_steps_per_s {found.env_steps_per_s:.4g}   "
        f"batch_size_mean {found.batch_size_mean:.3g}"
    )
    print("   ".join(f"bubble_{stage} {share:.3f}" for stage, share in bubbles.items()))
    busy = ", ".join(
        f"{stage} {(1 - share) * found.step_s:.4g}" for stage, share in bubbles.items()
    )
    print(f"busy seconds of an iteration: {busy}; critical stage: {min(bubbles, key=bubbles.get)}")


def main(config: PlanConfig) -> None:
    if min(config.iterations, config.simulated_nodes) < 1 or config.rounds < 0:
        raise UserError(
            "--iterations and --simulated-nodes must be at least 1, and --rounds not negative"
        )
    for file in (config.json, config.plot):
        if file and not file.absolute().parent.is_dir():
            raise UserError(
                f"the folder {file.absolute().parent} does not exist: create it or name another "
                "file"
            )
    if config.validate:
        rows = validate(config.ladder)
        if config.json:
            config.json.write_text(json.dumps({"what": "validate", "rows": rows}, indent=1) + "\n")
        return
    if config.from_:
        node, nodes, costs, line = from_run(config)
    else:
        node, nodes, line = node_of(config)
        costs = calibrate(config)
    print(line)
    if config.sweep:
        rows = sweep(config, node, costs, nodes)
        result = {
            "what": "sweep",
            "rows": rows,
            "changes": advise(config, node, costs, nodes, rows),
        }
        if config.plot:
            draw(rows, config.plot)
    else:
        found = predict(config, node, costs, nodes)
        show(found)
        result = {
            "what": "plan",
            "preset": config.preset or ("" if config.from_ else "full"),
            "gpus": config.gpus,
            "nodes": nodes,
        } | asdict(found)
    if config.json:
        config.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(PlanConfig))
