"""Measures what actors that infer while they wait give a run of train.py; `helping.py` predicts it.

    python -m benchmarks.helping_ladder [--json FILE]      a quarter of an hour on two quiet cores

Every setting runs without and with help in turns, all by `--preset full`, and is told by medians:

    emulated     the ladder's columns, RL-VLA³'s times (`emulated/helping.py`): as they are, where
                 simulators are the limit; GR00T with simulators three times as fast, where
                 inference is; the colocated row is what its users have today
    embedded     the default on this machine's cores, everything real. Its "help" is a second
                 rollout worker: an actor that infers for others would be one at times, no more

Env steps count when they are collected, after the warm-up. Nobody helps unless asked here: no
command of vla3 does.
"""

import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import tyro

from benchmarks.helping import as_json
from benchmarks.ladder import markdown, run_preset, warmup
from errors import exit_on_user_error
from metrics import STAGES


@dataclass(frozen=True)
class Case:
    """A setting of the ladder."""

    setting: str
    ratio: str
    iterations: int  # that are measured
    more: tuple[str, ...] = ()  # flags of train.py besides those of the ladder
    colocated: bool = False  # whether that is measured, too


FASTER = ("--tasks", "0.3")
CASES = {
    "LIBERO + π0.5": Case("emulated", "1:1", 6),
    "LIBERO + GR00T": Case("gr00t", "1:1", 8),
    "ManiSkill + π0": Case("vectorised", "1:1", 3),
    "LIBERO + GR00T, simulators × 0.3": Case("gr00t", "1:1", 12, FASTER, colocated=True),
    "LIBERO + GR00T, simulators × 0.3, 2:1": Case("gr00t", "2:1", 12, FASTER),
    "the default, all real": Case("embedded", "3:1", 8),
}


def arms_of(case: Case) -> tuple[str, ...]:
    return ("alone", "helped", *(("colocated",) if case.colocated else ()))


def measure(case: Case, arm: str) -> dict:
    """Runs an arm. Returns env steps/s and the share of time that every stage waits."""
    preset = "full-colocated" if arm == "colocated" else "full"
    more = case.more
    helped = arm == "helped"
    if case.setting == "embedded" and helped:
        more += ("--rollout-workers", "2")
    with patch.dict(os.environ, EMULATED_HELP=str(int(helped))):
        before = warmup(preset)
        total = before + case.iterations
        lines, _, _ = run_preset(case.setting, preset, case.ratio, total, None, more)
    window = lines[before:]
    steps = window[-1]["env_steps"] - lines[before - 1]["env_steps"]
    seconds = window[-1]["time"] - lines[before - 1]["time"]
    waits = {
        f"bubble_{stage}": statistics.mean(x[f"bubble_{stage}"] for x in window) for stage in STAGES
    }
    return {"env_steps_per_s": steps / seconds} | waits


# ---------------------------------------------------------------- what to tell


def table(rows: list[dict]) -> str:
    """Writes a line for every setting: the median of each arm, and what help gains over it."""
    head = [
        "setting",
        "alone",
        "helped",
        "gain, run by run",
        "colocated",
        "actor waits, alone",
    ]
    body = []
    for name in dict.fromkeys(row["case"] for row in rows):
        found = {}
        for arm in ("alone", "helped", "colocated"):
            mine = [row for row in rows if (row["case"], row["arm"]) == (name, arm)]
            found[arm] = sorted(mine, key=lambda row: row["round"])
        speeds = {arm: [row["env_steps_per_s"] for row in runs] for arm, runs in found.items()}
        medians = {arm: f"{statistics.median(of):.0f}" if of else "" for arm, of in speeds.items()}
        gains = [b / a - 1.0 for a, b in zip(speeds["alone"], speeds["helped"], strict=True)]
        waits = statistics.median(row["bubble_actor"] for row in found["alone"])
        body.append(
            [
                name,
                medians["alone"],
                medians["helped"],
                " · ".join(f"{gain:+.1%}" for gain in gains),
                medians["colocated"],
                f"{waits:.0%}",
            ]
        )
    return markdown(head, body)


@dataclass(kw_only=True)
class HelpingLadderConfig:
    """Measures what actors that help out give on the emulated ladder, and on this machine."""

    json: Path | None = None  # also write {"what", "rows"}
    only: str = ""  # measure settings that have this in their name
    rounds: int = 3  # runs of every arm, in turns


def main(config: HelpingLadderConfig) -> None:
    rows = []
    for name, case in CASES.items():
        if config.only not in name:
            continue
        for number in range(config.rounds):
            for arm in arms_of(case):
                row = {"case": name, "arm": arm, "round": number} | measure(case, arm)
                print(f"{name}, {arm}: {row['env_steps_per_s']:.0f} env steps/s", flush=True)
                rows.append(row)
                if config.json:
                    config.json.write_text(as_json(rows, "helping_ladder"))
    print(table(rows))


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(HelpingLadderConfig))
