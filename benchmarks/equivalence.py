"""Does asynchrony change learning? The embedded default, several seeds of every arm, and a test of
equivalence.

    python -m benchmarks.equivalence run --seeds 5   hours; skips what
                                                     results/equivalence.jsonl holds already
    python -m benchmarks.equivalence analyse                  the table and the plot, from that file
    python -m benchmarks.equivalence run --study default --first 6 --seeds 5
                                                     the default alone, on seeds of its own
    python -m benchmarks.equivalence run --study algorithms
                                                     PPO, PPO that bootstraps, and GRPO

Arms: the synchronous algorithm (sync-colocated); `full` at a staleness of at most 1, 2, 4 and 8,
each with decoupled PPO's correction and without (`--proximal behaviour`: plain PPO on stale
samples); at 4 and 8 also with the exact proximal policy in place of the interpolated one. A bound
alone is no treatment: rollouts are the slower stage here, so that samples are seldom more than one
version old however large it is. Beyond 1, `--extra-staleness` holds the acting weights back; the
table has the staleness that came of it. Every arm trains the same number of batches of the same
size.

Stated beforehand: the measures are the success rate of the final weights on EPISODES held-out
episodes (the same ones in every arm), and the area under the learning curve: success of the
episodes that a version played, over the versions from 0 to LAST before the end, so that lag by
itself, which shifts the curve but not the learning, does not count. MARGIN points either way count
as no difference. An arm is equivalent when two one-sided Welch t-tests (TOST) both reject, at 5 %
after Holm's correction for the number of arms, that it differs by MARGIN or more. Intervals shown,
from FEWEST seeds on, are 95 % bootstrap-t intervals of the mean over seeds.

The eleven arms' five seeds were too few to tell (p of the default 0.13 after correction). So the
study `default`, stated after that one and before its own runs, asks the one question that matters
most, with the same measures and margin: the default against the synchronous algorithm, one
comparison, on seeds 6 to 10.

Minutes, in the table and the plot, are those of an arm's quickest run, evaluation and start-up
apart: runs of one seed follow each other, but other programs used the machine beside many. Left
out: other tasks and models. What so many seeds can see is printed below the table.
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

from benchmarks.measuring import end_on_sigterm
from config import ROOT, UserError, exit_on_user_error

RESULTS = ROOT / "benchmarks" / "results"
MARGIN = 0.05  # success rate
EPISODES = 100  # held-out episodes of one evaluation of final weights
LAST = 8  # versions: the largest staleness of any arm
FEWEST = 5  # seeds of an interval: with four it covers 88 %, with three 61 %
STUDIES = {  # arms and the flags of train.py that make them; the others are compared with the first
    "equivalence": {"synchronous": "--preset sync-colocated"}
    | {
        f"staleness {k}{name}": f"--preset full --max-staleness 1 --extra-staleness {k - 1} {flags}"
        for name, flags, lags in (
            ("", "--proximal interpolated", (1, 2, 4, 8)),
            (", uncorrected", "--proximal behaviour", (1, 2, 4, 8)),
            (", exact", "--proximal exact", (4, 8)),
        )
        for k in lags
    },
    "default": {"synchronous": "--preset sync-colocated", "the default": ""},
    "algorithms": {
        "PPO": "",
        "PPO, bootstrapped": "--bootstrap-truncated",
        "GRPO": "--algorithm grpo",
    },
}
VARIANTS = {
    "": "-",
    "uncorrected": ":",
    "exact": "--",
    "bootstrapped": "--",
}  # what follows an arm's comma, and its line


@dataclass(kw_only=True)
class EquivalenceConfig:
    """Does asynchrony change learning?"""

    what: tyro.conf.Positional[Literal["run", "analyse"]]
    """run the arms that are missing, or analyse what there is"""
    study: Literal["equivalence", "default", "algorithms"] = "equivalence"
    """asynchronous against synchronous, the default alone against it, or the algorithms against
    each other
    """
    seeds: int = 5
    """seeds of every arm"""
    first: int = 1
    """the first of them"""
    arms: tuple[str, ...] = ()
    """which arms to run, by their names in the table; none means all of the study"""
    flags: str = ""
    """more flags of train.py, the same for every arm"""


def file(study: str, kind: str) -> Path:
    """Of its results: jsonl holds a line per run, md the table, png the plot."""
    return RESULTS / f"{study}.{kind}"


def one_run(study: str, arm: str, seed: int, flags: str) -> dict:
    """Trains and evaluates by the commands that a user gives. Returns what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = Path(folder) / "result.json"
        train = f"train.py {STUDIES[study][arm]} --seed {seed} --eval-every 0 --no-trace"
        train = f"{train} --run {run} {flags}".split()
        subprocess.run([sys.executable, *train], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        evaluate = f"evaluate.py --checkpoint {run} --episodes {EPISODES} --json {result}"
        evaluate = f"{evaluate} --videos {folder}".split()
        subprocess.run([sys.executable, *evaluate], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        final = json.loads(result.read_text())["rows"][-1]["success_rate"]
    keep = (
        "success_rate",
        "env_steps",
        "time",
        "staleness_mean",
        "staleness_max",
        "approx_kl",
        "masked_fraction",
    )
    return {
        "arm": arm,
        "seed": seed,
        "flags": flags,
        "final": final,
        **{name: [line.get(name) for line in lines] for name in keep},
    }


def rows(study: str, flags: str) -> list[dict]:
    """Of the runs with these flags. Raises UserError where an arm has a seed twice or runs differ
    in length.
    """
    raw = file(study, "jsonl")
    found = [json.loads(line) for line in raw.read_text().splitlines()] if raw.is_file() else []
    found = [row for row in found if row["flags"] == flags]
    if (
        len({(row["arm"], row["seed"]) for row in found}) < len(found)
        or len({len(row["time"]) for row in found}) > 1
    ):
        raise UserError(
            f"{raw} has an arm's seed twice, or runs of different length: remove the lines that "
            "are wrong"
        )
    return found


def run(config: EquivalenceConfig) -> None:
    """Seeds outermost, so that an interrupted study has all arms alike."""
    known = STUDIES[config.study]
    for arm in config.arms:
        if arm not in known:
            raise UserError(f"unknown arm {arm!r}: choose among {', '.join(map(repr, known))}")
    RESULTS.mkdir(exist_ok=True)
    for seed in range(config.first, config.first + config.seeds):
        for arm in config.arms or known:
            if any(
                (row["arm"], row["seed"]) == (arm, seed) for row in rows(config.study, config.flags)
            ):
                continue
            began = time.monotonic()
            row = one_run(config.study, arm, seed, config.flags)
            with file(config.study, "jsonl").open("a") as raw:
                raw.write(json.dumps(row) + "\n")
            print(
                f"{arm}, seed {seed}: {row['final']:.0%} in {(time.monotonic() - began) / 60:.1f} "
                "min",
                flush=True,
            )


def curve(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Versions that acted, not decreasing, and the success rate of what they played."""
    acted = np.arange(len(row["time"])) - np.array(row["staleness_mean"])
    success = np.array(
        [np.nan if x is None else x for x in row["success_rate"]]
    )  # None: no episode ended
    return acted[~np.isnan(success)], success[~np.isnan(success)]


def area(row: dict) -> float:
    versions = np.arange(max(1, len(row["time"]) - LAST))
    return float(np.interp(versions, *curve(row)).mean())


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap-t interval of the mean of shares in [0, 1], by resampling seeds (percentiles
    alone cover 85 % at five seeds). NaN below FEWEST.
    """
    n = len(values)
    if n < FEWEST:
        return np.nan, np.nan
    spread = values.std(ddof=1) / n**0.5
    drawn = np.random.default_rng(0).choice(values, (draws, n))
    spreads = drawn.std(axis=1, ddof=1) / n**0.5
    varied = spreads > 1e-9  # not the same seed n times, up to rounding
    t = (drawn.mean(axis=1) - values.mean())[varied] / spreads[varied]
    low, high = np.quantile(t, (0.975, 0.025)) if len(t) else (0.0, 0.0)
    return tuple(float(np.clip(values.mean() - end * spread, 0.0, 1.0)) for end in (low, high))


def tost(values: np.ndarray, base: np.ndarray, margin: float) -> float:
    """p of two one-sided Welch t-tests: the larger of those for "lower by the margin or more" and
    "higher by it or more".
    """
    if (
        len(values) < 2 or len(base) < 2 or values.std() == base.std() == 0.0
    ):  # too few to know how much seeds vary
        return 1.0
    lower = stats.ttest_ind(values + margin, base, equal_var=False, alternative="greater").pvalue
    upper = stats.ttest_ind(values - margin, base, equal_var=False, alternative="less").pvalue
    return float(max(lower, upper))


def holm(p: list[float]) -> list[float]:
    """p values corrected for their number (Holm 1979)."""
    order = np.argsort(p)
    corrected = [0.0] * len(p)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


def power(deviation: float, seeds: int, arms: int, studies: int = 400) -> float:
    """How often an arm that is truly equal is found equivalent at the strictest step of Holm's
    correction, p · arms < 0.05.
    """
    drawn = np.random.default_rng(0).normal(0.0, deviation, (studies, 2, seeds))
    return float(np.mean([tost(a, b, MARGIN) * arms < 0.05 for a, b in drawn]))


def summary(study: str, found: list[dict]) -> list[dict]:
    """One row per arm that has results, in the order of the study."""
    arms = {arm: [row for row in found if row["arm"] == arm] for arm in STUDIES[study]}
    base, *others = arms
    values = {
        arm: {
            "final": np.array([row["final"] for row in mine]),
            "area": np.array([area(row) for row in mine]),
        }
        for arm, mine in arms.items()
    }
    out = {arm: {"arm": arm, "seeds": len(mine)} for arm, mine in arms.items() if mine}
    for m in ("final", "area"):
        for arm, row in out.items():
            mine = values[arm][m]
            row |= {m: float(mine.mean()), f"{m}_interval": bootstrap(mine)}
        compared = [arm for arm in others if arm in out and base in out]
        for arm, p in zip(
            compared,
            holm([tost(values[arm][m], values[base][m], MARGIN) for arm in compared]),
            strict=True,
        ):
            difference = out[arm][m] - out[base][m]
            out[arm] |= {
                f"{m}_difference": difference,
                f"{m}_tost_p": p,
                f"{m}_equivalent": p < 0.05,
            }
    for arm, row in out.items():
        row["minutes"] = min(one["time"][-1] for one in arms[arm]) / 60
        row["staleness_mean"] = float(np.mean([one["staleness_mean"] for one in arms[arm]]))
        row["staleness_max"] = max(max(one["staleness_max"]) for one in arms[arm])
    return list(out.values())


def table(study: str, found: list[dict]) -> str:
    text = (
        "| arm | seeds | staleness: mean, most | final success | difference, p | area under the "
        "curve | difference, p "
        "| minutes of the quickest run |\n"
    )
    text += 8 * "|---" + "|\n"
    arms = summary(study, found)
    for row in arms:
        cells = [
            row["arm"],
            str(row["seeds"]),
            f"{row['staleness_mean']:.1f}, {row['staleness_max']}",
        ]
        for m in ("final", "area"):
            low, high = row[f"{m}_interval"]
            cells.append(
                f"{row[m]:.1%}" + (f" [{low:.1%}, {high:.1%}]" if row["seeds"] >= FEWEST else "")
            )
            cells.append("")
            if f"{m}_difference" in row:
                verdict = "equivalent" if row[f"{m}_equivalent"] else "not shown"
                cells[-1] = (
                    f"{100 * row[f'{m}_difference']:+.1f} points, {row[f'{m}_tost_p']:.3f}: "
                    f"{verdict}"
                )
        text += "| " + " | ".join([*cells, f"{row['minutes']:.1f}"]) + " |\n"
    first = [one for one in found if one["arm"] == next(iter(STUDIES[study]))]
    for m, words in (("final", "final success"), ("area", "the area")):
        if len(first) > 1 and len(arms) > 1:
            deviation = float(
                np.std([one["final"] if m == "final" else area(one) for one in first], ddof=1)
            )
            seen = power(deviation, len(first), len(arms) - 1)
            seeds = len(first)
            while seeds < 40 and power(deviation, seeds, len(arms) - 1) < 0.8:
                seeds += 1
            text += (
                f"\nSeeds of the first arm differ by {100 * deviation:.1f} points in {words} "
                "(standard deviation). An arm truly"
            )
            text += (
                f" equal to it is found so in {seen:.0%} of studies with {len(first)} seeds, and "
                f"in 80% with {seeds}.\n"
            )
    return text


def plot(study: str, found: list[dict]) -> None:
    """Success of a version's episodes, five batches smoothed: against the env steps trained until
    it (in proportion to versions) and the minutes until it was published. The mean over seeds and,
    thin, where there are few arms, each.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 5), sharey=True)
    names = list(
        dict.fromkeys(arm.partition(", ")[0] for arm in STUDIES[study])
    )  # each has a colour
    for arm in STUDIES[study]:
        mine = [row for row in found if row["arm"] == arm]
        if not mine:
            continue
        length = len(mine[0]["time"])
        versions = np.arange(max(1, length - LAST))
        curves = np.array([np.interp(versions, *curve(row)) for row in mine])  # [seeds, versions]
        smooth = np.array(
            [curves[:, max(0, v - 4) : v + 1].mean(axis=1) for v in versions]
        )  # [versions, seeds]
        steps = versions / length * np.mean([row["env_steps"][-1] for row in mine]) / 1e3
        minutes = (
            np.array([0.0, *min((row["time"] for row in mine), key=lambda time: time[-1])])[
                versions
            ]
            / 60
        )
        name, _, variant = arm.partition(", ")
        colour = names.index(name)
        style = {"color": f"C{colour - 1}" if colour else "black", "linestyle": VARIANTS[variant]}
        for axis, x in zip(axes, (steps, minutes), strict=True):
            axis.plot(x, 100 * smooth.mean(axis=1), **style, label=f"{arm}, {len(mine)} seeds")
            if len(STUDIES[study]) < 5:
                axis.plot(x, 100 * smooth, **style, linewidth=0.7, alpha=0.4)
    axes[0].set(xlabel="thousand env steps trained", ylabel="success of the version's episodes, %")
    axes[1].set(xlabel="minutes until it was published")
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.tight_layout()
    figure.savefig(file(study, "png"), dpi=110)
    plt.close(figure)


def main(config: EquivalenceConfig) -> None:
    end_on_sigterm()
    if config.what == "run":
        run(config)
    found = rows(config.study, config.flags)
    if not found:
        raise UserError(
            f"there are no results in {file(config.study, 'jsonl')}: begin with `python -m "
            "benchmarks.equivalence run`"
        )
    text = table(config.study, found)
    if not config.flags:  # which make another study
        file(config.study, "md").write_text(text)
        plot(config.study, found)
    print(text)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(EquivalenceConfig))
