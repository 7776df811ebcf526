"""Does asynchrony change learning? The embedded default, several seeds of every arm, and a test of equivalence.

    python -m benchmarks.equivalence run --seeds 5            hours; skips what benchmarks/results/equivalence.jsonl holds already
    python -m benchmarks.equivalence analyse                  the table and the plot, from that file
    python -m benchmarks.equivalence run --study algorithms   PPO against PPO that bootstraps at the time limit, and GRPO

Arms: the synchronous algorithm (sync-colocated); `full` with a staleness of at most 1, 2, 4 and 8, each with decoupled PPO's
correction and without (`--proximal behaviour`: plain PPO on stale samples). Every arm trains the same number of batches of the
same size, so they are compared at equal env steps, and by the clock as well.

Stated beforehand: the measures are the success rate of the final weights on EPISODES held-out episodes, and the mean over
iterations of training's success rate (area under the curve). MARGIN points either way count as no difference. An arm is equivalent
when two one-sided Welch t-tests (TOST) both reject, at 5 %, that it differs by MARGIN or more: then its 90 % interval lies within.
Intervals shown are 95 % bootstrap intervals of the mean over seeds.
Left out: other tasks and models; five seeds see differences of about 5 points, not smaller ones.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy import stats

from config import ROOT, UserError, exit_on_user_error

RESULTS = ROOT / "benchmarks" / "results"
MARGIN = 0.05  # success rate
EPISODES = 100  # held-out episodes of one evaluation of final weights
STUDIES = {  # arms and the flags of train.py that make them; the others are compared with the first
    "equivalence": {"synchronous": "--preset sync-colocated"} | {
        f"staleness {k}{name}": f"--preset full --max-staleness {k} {flags}"
        for name, flags in (("", "--proximal interpolated"), (", uncorrected", "--proximal behaviour"))
        for k in (1, 2, 4, 8)
    },
    "algorithms": {"PPO": "", "PPO, bootstrapped": "--bootstrap-truncated True", "GRPO": "--algorithm grpo"},
}  # fmt: skip


@dataclass(kw_only=True)
class EquivalenceConfig:
    """Does asynchrony change learning?"""

    what: tyro.conf.Positional[Literal["run", "analyse"]]
    """run the arms that are missing, or analyse what there is"""
    study: Literal["equivalence", "algorithms"] = "equivalence"
    """asynchronous against synchronous, or the algorithms against each other"""
    seeds: int = 5
    """seeds of every arm"""
    arms: tuple[str, ...] = ()
    """which arms to run; none means all of the study"""
    flags: str = ""
    """more flags of train.py, the same for every arm"""


def file(study: str, kind: str) -> Path:
    """Of its results: jsonl holds a line per run, md the table, png the plot."""
    return RESULTS / f"{study}.{kind}"


def one_run(study: str, arm: str, seed: int, flags: str) -> dict:
    """Trains and evaluates by the commands that a user gives. Returns what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        run, result = Path(folder) / "run", Path(folder) / "result.json"
        train = f"train.py {STUDIES[study][arm]} --seed {seed} --eval-envs 0 --no-trace --run {run} {flags}".split()
        subprocess.run([sys.executable, *train], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        evaluate = f"evaluate.py --checkpoint {run} --episodes {EPISODES} --json {result} --videos {folder}".split()
        subprocess.run([sys.executable, *evaluate], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        final = json.loads(result.read_text())["rows"][-1]["success_rate"]
    keep = ("success_rate", "env_steps", "time", "staleness_mean", "approx_kl", "masked_fraction")
    return {"arm": arm, "seed": seed, "flags": flags, "final": final, **{name: [line.get(name) for line in lines] for name in keep}}


def rows(study: str) -> list[dict]:
    raw = file(study, "jsonl")
    return [json.loads(line) for line in raw.read_text().splitlines()] if raw.is_file() else []


def run(config: EquivalenceConfig) -> None:
    """Seeds outermost, so that an interrupted study has all arms alike."""
    known = STUDIES[config.study]
    for arm in config.arms:
        if arm not in known:
            raise UserError(f"unknown arm {arm!r}: choose among {', '.join(known)}")
    RESULTS.mkdir(exist_ok=True)
    for seed in range(1, config.seeds + 1):
        for arm in config.arms or known:
            if any((row["arm"], row["seed"], row["flags"]) == (arm, seed, config.flags) for row in rows(config.study)):
                continue
            began = time.monotonic()
            row = one_run(config.study, arm, seed, config.flags)
            with file(config.study, "jsonl").open("a") as raw:
                raw.write(json.dumps(row) + "\n")
            print(f"{arm}, seed {seed}: {row['final']:.0%} in {(time.monotonic() - began) / 60:.1f} min", flush=True)


def area(row: dict) -> float:
    return float(np.mean([x for x in row["success_rate"] if x is not None]))


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean, by resampling seeds."""
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def tost(values: np.ndarray, base: np.ndarray, margin: float) -> float:
    """p of two one-sided Welch t-tests: the larger of those for "lower by the margin or more" and "higher by it or more"."""
    if len(values) < 2 or len(base) < 2:
        return 1.0
    if values.std() == base.std() == 0.0:  # nothing varies: certain either way
        return 0.0 if abs(values.mean() - base.mean()) < margin else 1.0
    lower = stats.ttest_ind(values + margin, base, equal_var=False, alternative="greater").pvalue
    upper = stats.ttest_ind(values - margin, base, equal_var=False, alternative="less").pvalue
    return float(max(lower, upper))


def summary(study: str, found: list[dict]) -> list[dict]:
    """One row per arm that has results, in the order of the study."""
    arms, base_arm = list(STUDIES[study]), next(iter(STUDIES[study]))
    measures = {"final": lambda row: row["final"], "area": area}
    values = {arm: {m: np.array([f(row) for row in found if row["arm"] == arm]) for m, f in measures.items()} for arm in arms}
    out = []
    for arm in (arm for arm in arms if len(values[arm]["final"])):
        row = {"arm": arm, "seeds": len(values[arm]["final"])}
        for m in measures:
            mine, base = values[arm][m], values[base_arm][m]
            row |= {m: float(mine.mean()), f"{m}_interval": bootstrap(mine)}
            if arm != base_arm and len(base):
                p = tost(mine, base, MARGIN)
                row |= {f"{m}_difference": float(mine.mean() - base.mean()), f"{m}_tost_p": p, f"{m}_equivalent": p < 0.05}
        row["minutes"] = float(np.mean([one["time"][-1] / 60 for one in found if one["arm"] == arm]))
        out.append(row)
    return out


def table(study: str, found: list[dict]) -> str:
    head = (
        "| arm | seeds | final success | difference, TOST p | area under the curve | difference, TOST p | minutes |\n"
        + 7 * "|---"
        + "|\n"
    )
    text = ""
    for row in summary(study, found):
        cells = [row["arm"], str(row["seeds"])]
        for m in ("final", "area"):
            low, high = row[f"{m}_interval"]
            cells.append(f"{row[m]:.1%} [{low:.1%}, {high:.1%}]")
            if f"{m}_difference" in row:
                verdict = "equivalent" if row[f"{m}_equivalent"] else "not shown"
                cells.append(f"{100 * row[f'{m}_difference']:+.1f} points, p = {row[f'{m}_tost_p']:.3f}: {verdict}")
            else:
                cells.append("")
        text += "| " + " | ".join([*cells, f"{row['minutes']:.1f}"]) + " |\n"
    return head + text


def plot(study: str, found: list[dict]) -> None:
    """Training's success against env steps and against minutes: five iterations smoothed, the mean over seeds and, thin, each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for i, arm in enumerate(STUDIES[study]):
        mine = [row for row in found if row["arm"] == arm]
        if not mine:
            continue
        length = min(len(row["time"]) for row in mine)
        curves = np.array([[np.nan if x is None else x for x in row["success_rate"][:length]] for row in mine])
        smooth = np.array([np.nanmean(curves[:, max(0, t - 4) : t + 1], axis=1) for t in range(length)])  # [length, seeds]
        style = {"color": "black" if i == 0 else f"C{(i - 1) % 4}", "linestyle": ":" if "uncorrected" in arm else "-"}
        for axis, key, scale in ((axes[0], "env_steps", 1e3), (axes[1], "time", 60.0)):
            x = np.mean([row[key][:length] for row in mine], axis=0) / scale
            axis.plot(x, 100 * smooth.mean(axis=1), **style, label=f"{arm}, {len(mine)} seeds")
            if len(STUDIES[study]) < 5:  # every seed, where there is room
                axis.plot(x, 100 * smooth, **style, linewidth=0.7, alpha=0.4)
    axes[0].set(xlabel="thousand env steps", ylabel="success of training, %")
    axes[1].set(xlabel="minutes")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file(study, "png"), dpi=110)


def main(config: EquivalenceConfig) -> None:
    if config.what == "run":
        run(config)
    found = rows(config.study)
    if not found:
        raise UserError(f"there are no results in {file(config.study, 'jsonl')}: begin with `python -m benchmarks.equivalence run`")
    text = table(config.study, found)
    file(config.study, "md").write_text(text)
    plot(config.study, found)
    print(text)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(EquivalenceConfig))
