"""Predicts how nodes scale to 1,024 GPUs, for RL-VLA³'s columns and several networks.

    python -m benchmarks.scaling [--json FILE]        minutes; all in virtual time (`plan.py`)

Times are those of the emulated ladder (`benchmarks/emulated/`), which `python plan.py --validate`
compares with measured runs: lockstep rollout and training of one node of 8 GPUs at 1:1. Networks:

    25 Gbit/s     one Ethernet card (EC2 has up to 25 Gbit/s from instance to instance, with ENA
                  Express: its documentation of instance network bandwidth), hops of 50 µs
    400 Gbit/s    one InfiniBand port; a DGX H100 has eight (its user guide, network modules)

Rows are efficiency: env steps/s per GPU to those of one node. `gradient_share` is the part of the
time in which sums of gradients are waited for. The rest of what is lost is waiting for the slowest
node, and what a node has too little of where the total batch stays.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

import plan
from errors import exit_on_user_error
from planning.costs import calibrate, summed
from planning.settings import PlanConfig, planned

SIZES = tuple(8 * 2**i for i in range(8))  # GPUs
SLOW = {"network_gb_s": 25 / 8, "network_latency_us": 50.0}
FAST = {"network_gb_s": 400 / 8}
PI05 = {"rollout_s": 1070.0, "actor_s": 440.0, "infer_share": 0.23, "tail": 0.27}
GR00T = PI05 | {"rollout_s": 1009.0, "actor_s": 104.0, "tail": 0.322, "gradient_gb": 4.29}
MANISKILL = {"rollout_s": 676.0, "actor_s": 676.0, "envs": 256, "rollout_epochs": 4}
MANISKILL |= {"episode_steps": 80, "chunk": 5, "update_epochs": 4, "lane_envs": 32}
MANISKILL |= {"tail": 0.0, "step_fixed": 0.02, "gradient_gb": 1.26}
WHOLE = {"gradient_gb": 13.4}  # all of π0.5's 3.36 billion weights
LIMIT = {"ratio": "3:1", "measured_ratio": "1:1"}
SYNC = {"preset": "sync-disaggregated"}
CASES = {  # what of PlanConfig differs
    "LIBERO π0.5, 25 Gbit/s": PI05 | SLOW,
    "LIBERO π0.5, 400 Gbit/s": PI05 | FAST,
    "the same batch on all sizes, 25 Gbit/s": PI05 | SLOW,
    "the same batch on all sizes, 400 Gbit/s": PI05 | FAST,
    "all weights of π0.5, 25 Gbit/s": PI05 | SLOW | WHOLE,
    "the same, summed after training, 25 Gbit/s": PI05 | SLOW | WHOLE | {"overlap": 0.0},
    "all weights of π0.5, 400 Gbit/s": PI05 | FAST | WHOLE,
    "all weights at 3:1, where training is the limit, 25 Gbit/s": PI05 | SLOW | WHOLE | LIMIT,
    "the same at 3:1, summed after training": PI05 | SLOW | WHOLE | LIMIT | {"overlap": 0.0},
    "π0.5, nodes that differ (σ 5 %)": PI05 | SLOW | {"node_spread": 0.05},
    "π0.5, sync-disaggregated": PI05 | SLOW | SYNC,
    "LIBERO GR00T, 25 Gbit/s": GR00T | SLOW,
    "ManiSkill π0, 25 Gbit/s": MANISKILL | SLOW,
}
BENT = 0.97  # efficiency below which changes are tried
FIXED = "the same batch"  # how the names begin of cases whose batch does not grow


@dataclass(kw_only=True)
class ScalingConfig:
    """Predicts how nodes scale to 1,024 GPUs."""

    json: Path | None = None  # also write {"what", "rows"}
    only: str = ""  # predict cases that have this in their name


def case(name: str, flags: dict) -> list[dict]:
    """Predicts one case at every size, and what single changes would give at the last one."""
    config = PlanConfig(
        **{"ratio": "1:1", "preset": "full", "iterations": 10, "rounds": 32} | flags
    )
    # The measured phases are of one node, whatever its preset.
    node, _, _ = planned(config)
    costs = calibrate(replace(config, preset="full"))
    rows = []
    for gpus in SIZES:
        nodes = gpus // 8
        mine = plan.share_of(node, nodes, 1) if name.startswith(FIXED) else node
        if mine is None:
            break
        found = plan.at_size(config, mine, costs, nodes, 1, node.batch)
        row = {"case": name, "gpus": gpus} | asdict(found)
        row["efficiency"] = found.env_steps_per_s / gpus
        row["efficiency"] /= rows[0]["env_steps_per_s"] / 8 if rows else row["efficiency"]
        steps = mine.optimizer_steps
        row["gradient_share"] = steps * summed(config, mine, costs, nodes, 1).gradient_s
        row["gradient_share"] /= found.step_s
        rows.append(row)
        last = mine
    gains = []
    bends = rows[-1]["efficiency"] < BENT
    for what, change in plan.changes(config, last, costs).items() if bends else ():
        found = plan.at_size(*change, nodes := rows[-1]["gpus"] // 8, 1, node.batch)
        gains.append((found.env_steps_per_s / rows[-1]["env_steps_per_s"] - 1, what))
    rows[-1]["changes"] = dict((what, gain) for gain, what in sorted(gains, reverse=True))
    return rows


def show(name: str, rows: list[dict]) -> None:
    """Prints a row of the table, and what would move it."""
    shown = [f"{row['efficiency']:.1%} ({row['gradient_share']:.1%})" for row in rows]
    print(f"| {name} | " + " | ".join(shown) + " |", flush=True)
    gains = [f"{what} {gain:+.0%}" for what, gain in rows[-1]["changes"].items()]
    if gains:
        print(f"    at {rows[-1]['gpus']} GPUs: " + "; ".join(gains[:4] + gains[-1:]), flush=True)


def main(config: ScalingConfig) -> None:
    print("| efficiency (gradients) | " + " | ".join(map(str, SIZES)) + " |")
    found = []
    for name, flags in CASES.items():
        if config.only in name:
            rows = case(name, flags)
            show(name, rows)
            found += rows
    if config.json:
        config.json.write_text(json.dumps({"what": "scaling", "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ScalingConfig))
