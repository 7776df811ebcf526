"""Asks whether asynchrony changes learning: the embedded default, several seeds of every arm, and a
test of equivalence.

    python -m benchmarks.equivalence run --seeds 5   hours; skips what results/equivalence.jsonl
                                                     holds already
    python -m benchmarks.equivalence analyse         the table and the plot, from that file
    python -m benchmarks.equivalence run --study default --first 6 --seeds 5
                                                     the default alone, on seeds of its own
    python -m benchmarks.equivalence run --study algorithms
                                                     PPO, PPO that bootstraps, and GRPO
    python -m benchmarks.equivalence run --study corrections [--results FOLDER]
                                                     each way of --behaviour-weight, when stale
    python -m benchmarks.equivalence run --study chunks_oft
                                                     a share of the chunk steps; and chunks_vlm

The arms are the synchronous algorithm (sync-colocated), and `full` at a staleness of at most 1, 2,
4 and 8, each with decoupled PPO's correction and without (`--proximal behaviour`: plain PPO on
stale samples), and at 4 and 8 also with the exact proximal policy in place of the interpolated one.
A bound alone is no treatment: rollouts are the slower stage here, so samples are seldom more than
one version old however large it is. Beyond 1, `--extra-staleness` holds the acting weights back;
the table has the staleness that came of it. Every arm trains the same number of batches of the same
size.

Stated beforehand: there are two measures. One is the success rate of the final weights on EPISODES
held-out episodes, the same ones in every arm. The other is the area under the learning curve:
success of the episodes that a version played, over the versions from 0 to LAST before the end, so
that lag by itself, which shifts the curve but not the learning, does not count. MARGIN points
either way count as no difference. An arm is equivalent when two one-sided Welch t-tests (TOST) both
reject, at 5 % after Holm's correction for the number of arms, that it differs by MARGIN or more.
Intervals, from FEWEST seeds on, are 95 % bootstrap-t intervals of the mean over seeds.

The eleven arms' five seeds were too few to tell (p of the default was 0.13 after correction). So
the study `default`, stated after that one and before its own runs, asks the one question that
matters most, with the same measures and margin: the default against the synchronous algorithm, one
comparison, on seeds 6 to 10.

The study `corrections` asks which correction suits which staleness. Stated before its runs but one
or two, with the same measures: at 4, 8 and 2 versions, in this order, each of `--behaviour-weight
truncate` (at verl's 2), `icepop`, `m2po` and `gipo`. The first three are on the exact proximal
policy, which is AReaL's form of them; GIPO is in its paper's form alone, against the policy that
acted. At 2, where it was never run, there is also the exact policy with AReaL's mask. Published
bounds are for tokens, and the default's ratio is of whole chunks, of 10 actions · 4 numbers. So
M2PO's bound of a second moment is 0.04 · 40 = 1.6: a sum of 40 independent drifts has 40 times the
second moment of one. IcePop keeps its [0.5, 5], for 5 is what the mask of the default has used on
chunks all along. Three have no arm: where a chunk is one unit, as here, `sequence` and `geometric`
have `icepop`'s form, with narrower bounds; and `kpop` is for probabilities, where the default's
actions have densities.

The reference of an arm is what `--proximal auto` takes at its staleness: at 4 and 8 the exact
policy, at 2 the interpolated one. The one primary measure is the area: a two-sided Welch t-test
against the reference, corrected by Holm's method for the new arms of that staleness. Final success
is secondary: it only must not be worse at 5 %, uncorrected, which is no proof that it is not. An
arm that is better in the area at 5 % and not worse in final success is a candidate, of several the
one with the largest area; and then it must hold, by the same tests, on five new seeds (6 to 10) of
that arm and its reference alone, in a folder of their own, before a default changes:

    python -m benchmarks.equivalence run --study equivalence --first 6 --results NEW
                                         --arms "staleness 4, exact"
    python -m benchmarks.equivalence run --study corrections --first 6 --results NEW
                                         --arms "staleness 4, gipo"

The references and the synchronous arm are the first study's runs, by an earlier version of this
code; and the exact ones are the very runs by which `auto` became exact, so chance may flatter them.
The least gain that would be seen is printed for each staleness. Each new arm is also compared with
the synchronous one by TOST, as above: that describes, and decides nothing.

The studies `chunks_oft` and `chunks_vlm` ask what --chunk-share costs in learning
(benchmarks/chunk_share.py: what it gains in time). Stated before their runs, with the same measures
and margin: GRPO of OpenVLA-OFT, all weights, and of π0.5 whose VLM is trained too, 20 batches each,
on all chunk steps, half of them and a fifth (the paper's 12 of 64).

Minutes, in the table and the plot, are those of an arm's quickest run, evaluation and start-up
apart: runs of one seed follow each other, but other programs used the machine beside many. What so
many seeds can see is printed below the table. Left out: other tasks and models.
"""

import itertools
import json
import operator
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.measuring import end_on_sigterm
from benchmarks.seeds import FEWEST, MARGIN, MOST, bootstrap, holm, least_gain, power, tost, welch
from config import ROOT
from errors import exit_on_user_error, require

RESULTS = ROOT / "benchmarks" / "results"
EPISODES = 100  # held-out episodes of one evaluation of final weights
LAST = 8  # versions: the largest staleness of any arm


def arms_of_equivalence() -> dict[str, str]:
    """Writes the flags of every arm of the first study."""
    arms = {"synchronous": "--preset sync-colocated"}
    for name, proximal, bounds in (
        ("", "interpolated", (1, 2, 4, 8)),
        (", uncorrected", "behaviour", (1, 2, 4, 8)),
        (", exact", "exact", (4, 8)),
    ):
        for bound in bounds:
            lag = f"--max-staleness 1 --extra-staleness {bound - 1}"
            arms[f"staleness {bound}{name}"] = f"--preset full {lag} --proximal {proximal}"
    return arms


def arms_of_corrections() -> dict[str, str]:
    """Writes the flags of every new arm of the study of corrections."""
    exact = "--proximal exact --behaviour-weight"
    corrections = {
        "truncate": f"{exact} truncate --behaviour-weight-max 2",
        "icepop": f"{exact} icepop",
        "m2po": f"{exact} m2po --behaviour-trust 1.6",
        "gipo": "--behaviour-weight gipo",
    }
    arms = {}
    for bound in (4, 8, 2):
        new = corrections if bound > 2 else {"exact": f"{exact} mask"} | corrections
        for name, flags in new.items():
            lag = f"--max-staleness 1 --extra-staleness {bound - 1}"
            arms[f"staleness {bound}, {name}"] = f"--preset full {lag} {flags}"
    return arms


def arms_of_chunks(flags: str) -> dict[str, str]:
    """Writes the flags of every arm of a study of --chunk-share."""
    shares = {"all chunk steps": 1.0, "half of them": 0.5, "a fifth": 0.2}
    flags = f"--algorithm grpo {flags} --iterations 20"
    return {arm: f"{flags} --chunk-share {share}" for arm, share in shares.items()}


# Arms and the flags of train.py that make them. The others are compared with the first.
STUDIES = {
    "equivalence": arms_of_equivalence(),
    "default": {"synchronous": "--preset sync-colocated", "the default": ""},
    "algorithms": {
        "PPO": "",
        "PPO, bootstrapped": "--bootstrap-truncated",
        "GRPO": "--algorithm grpo",
    },
    "chunks_oft": arms_of_chunks("--model oft"),
    "chunks_vlm": arms_of_chunks("--train-vlm"),
    "corrections": arms_of_corrections(),
}
# Arms of the study `equivalence` that come before a study's own.
BASELINES = {
    "corrections": [arm for arm in STUDIES["equivalence"] if not arm.startswith("staleness 1")]
}
# What follows an arm's comma, and its line in the plot.
VARIANTS = {"": "-", "uncorrected": ":", "exact": "--", "bootstrapped": "--"}
# Of metrics.jsonl: what is kept of a run, a list with a number per iteration.
KEPT = (
    "success_rate",
    "env_steps",
    "time",
    "staleness_mean",
    "staleness_max",
    "approx_kl",
    "masked_fraction",
)
MEASURES = {"final": "final success", "area": "the area"}


@dataclass(kw_only=True)
class EquivalenceConfig:
    """Does asynchrony change learning?"""

    what: tyro.conf.Positional[Literal["run", "analyse"]]
    """run the arms that are missing, or analyse what there is"""
    study: Literal[
        "equivalence", "default", "algorithms", "corrections", "chunks_oft", "chunks_vlm"
    ] = "equivalence"
    """asynchronous against synchronous, the default alone against it, the algorithms against each
    other, the corrections for staleness, or a share of the chunk steps against all of them"""
    seeds: int = 5
    """seeds of every arm"""
    first: int = 1
    """the first of them"""
    arms: tuple[str, ...] = ()
    """which arms to run, by their names in the table; none means all of the study"""
    flags: str = ""
    """more flags of train.py, the same for every arm"""
    results: Path | None = None
    """folder of the study's results; none means benchmarks/results, where baselines are that this
    folder has not"""


def file(study: str, kind: str, folder: Path | None = None) -> Path:
    """Names a file of results: jsonl holds a line per run, md the table, png the plot."""
    return (folder or RESULTS) / f"{study}.{kind}"


def arms_of(study: str) -> list[str]:
    """Lists a study's arms, baselines first."""
    return [*BASELINES.get(study, ()), *STUDIES[study]]


def reference(arm: str) -> str:
    """Names what `--proximal auto` takes at the staleness of a correction's arm."""
    lag = staleness_of(arm)
    return lag if lag == "staleness 2" else f"{lag}, exact"


def staleness_of(arm: str) -> str:
    return arm.partition(", ")[0]


# ---------------------------------------------------------------- running


def one_run(study: str, arm: str, seed: int, flags: str) -> dict:
    """Trains and evaluates by the commands that a user gives. Returns what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = Path(folder) / "result.json"
        arm_flags = f"{STUDIES[study][arm]} --seed {seed} --eval-every 0 --no-trace"
        command(f"train.py {arm_flags} --run {run} {flags}")
        told = f"--json {result} --videos {folder}"
        command(f"evaluate.py --checkpoint {run} --episodes {EPISODES} {told}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        final = json.loads(result.read_text())["rows"][-1]["success_rate"]
    about = {"arm": arm, "seed": seed, "flags": flags, "final": final}
    return about | {name: [line.get(name) for line in lines] for name in KEPT}


def command(words: str) -> None:
    """Runs one of our commands without its output. Raises CalledProcessError where it fails."""
    full = [sys.executable, *words.split()]
    subprocess.run(full, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def rows(study: str, flags: str, folder: Path | None = None) -> list[dict]:
    """Reads the runs with these flags, and those of baselines.

    Raises UserError where an arm has a seed twice or runs differ in length."""
    raw = file(study, "jsonl", folder)
    found = [json.loads(line) for line in raw.read_text().splitlines()] if raw.is_file() else []
    found = [row for row in found if row["flags"] == flags]
    if baselines := BASELINES.get(study):
        first = folder if file("equivalence", "jsonl", folder).is_file() else None
        found += [row for row in rows("equivalence", flags, first) if row["arm"] in baselines]
    runs = {(row["arm"], row["seed"]) for row in found}
    lengths = {len(row["time"]) for row in found}
    require(
        len(runs) == len(found) and len(lengths) <= 1,
        f"{raw} has an arm's seed twice, or runs of different length: remove the lines that are "
        "wrong",
    )
    return found


def run(config: EquivalenceConfig) -> None:
    """Runs what is missing, seeds outermost, so that an interrupted study has all arms alike."""
    known = STUDIES[config.study]
    for arm in config.arms:
        names = ", ".join(map(repr, known))
        require(arm in known, f"unknown arm {arm!r}: choose among {names}")
    raw = file(config.study, "jsonl", config.results)
    raw.parent.mkdir(parents=True, exist_ok=True)
    seeds = range(config.first, config.first + config.seeds)
    for seed, arm in itertools.product(seeds, config.arms or known):
        there = rows(config.study, config.flags, config.results)
        if (arm, seed) in [(row["arm"], row["seed"]) for row in there]:
            continue
        began = time.monotonic()
        row = one_run(config.study, arm, seed, config.flags)
        with raw.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        minutes = (time.monotonic() - began) / 60
        print(f"{arm}, seed {seed}: {row['final']:.0%} in {minutes:.1f} min", flush=True)


# ---------------------------------------------------------------- statistics


def curve(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Finds the versions that acted, not decreasing, and the success rate of what they played."""
    acted = np.arange(len(row["time"])) - np.array(row["staleness_mean"])
    success = np.array(row["success_rate"], dtype=float)  # None, where no episode ended, is NaN
    known = ~np.isnan(success)
    return acted[known], success[known]


def area(row: dict) -> float:
    """Computes the mean success of the versions up to LAST before the end."""
    versions = np.arange(max(1, len(row["time"]) - LAST))
    return float(np.interp(versions, *curve(row)).mean())


MEASURED = {"final": operator.itemgetter("final"), "area": area}


def summary(study: str, found: list[dict]) -> list[dict]:
    """Computes one row per arm that has results, in the order of the study."""
    arms = {arm: [row for row in found if row["arm"] == arm] for arm in arms_of(study)}
    first = next(iter(arms))
    out = {arm: {"arm": arm, "seeds": len(mine)} for arm, mine in arms.items() if mine}
    new = [arm for arm in out if arm in STUDIES[study] and arm != first]
    compared = new if first in out else []
    corrected = [arm for arm in new if study in BASELINES and reference(arm) in out]
    for name, measured in MEASURED.items():
        values = {arm: np.array([measured(row) for row in arms[arm]]) for arm in out}
        for arm, row in out.items():
            row[name] = float(values[arm].mean())
            row[f"{name}_interval"] = bootstrap(values[arm])
        found_p = holm([tost(values[arm], values[first], MARGIN) for arm in compared])
        for arm, p in zip(compared, found_p, strict=True):
            out[arm][f"{name}_difference"] = out[arm][name] - out[first][name]
            out[arm][f"{name}_tost_p"] = p
            out[arm][f"{name}_equivalent"] = p < 0.05
        for base, mine in compared_with(corrected).items():
            found_p = [welch(values[arm], values[base]) for arm in mine]
            for arm, p, among_all in zip(mine, found_p, holm(found_p), strict=True):
                out[arm]["gain_seeds"] = min(len(values[arm]), len(values[base]))
                out[arm][f"{name}_gain"] = out[arm][name] - out[base][name]
                out[arm][f"{name}_gain_p"] = p
                out[arm][f"{name}_gain_holm_p"] = among_all
    for arm, row in out.items():
        row["minutes"] = min(one["time"][-1] for one in arms[arm]) / 60
        row["staleness_mean"] = float(np.mean([one["staleness_mean"] for one in arms[arm]]))
        row["staleness_max"] = max(max(one["staleness_max"]) for one in arms[arm])
        row["masked"] = float(np.mean([one["masked_fraction"] for one in arms[arm]]))
    return list(out.values())


def compared_with(arms: list[str]) -> dict[str, list[str]]:
    """Groups arms of corrections by their reference."""
    out = {}
    for arm in arms:
        out.setdefault(reference(arm), []).append(arm)
    return out


# ---------------------------------------------------------------- what to tell


def table(study: str, found: list[dict]) -> str:
    """Writes the table in Markdown, and below it what so many seeds can see."""
    corrections = study in BASELINES
    head = ["arm", "seeds", "staleness: mean, most", *(["masked"] if corrections else [])]
    head += ["final success", "difference, p"]
    head += ["from the reference, p"] if corrections else []
    head += ["area under the curve", "difference, p"]
    head += ["from the reference, p, corrected p"] if corrections else []
    head += ["minutes of the quickest run"]
    lines = [f"| {' | '.join(head)} |", len(head) * "|---" + "|"]
    arms = summary(study, found)
    for row in arms:
        stale = f"{row['staleness_mean']:.1f}, {row['staleness_max']}"
        cells = [row["arm"], str(row["seeds"]), stale]
        cells += [f"{row['masked']:.1%}"] if corrections else []
        for name in MEASURES:
            cells += measure_cells(row, name)
            cells += [gain_cell(row, name)] if corrections else []
        cells.append(f"{row['minutes']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    first = [one for one in found if one["arm"] == arms_of(study)[0]]
    compared = sum("final_difference" in row for row in arms)
    if len(first) > 1 and compared:
        for name in MEASURES:
            text += what_can_be_seen(name, first, compared)
    new = [row["arm"] for row in arms if "area_gain" in row]
    for base, mine in compared_with(new).items():
        areas = [area(row) for row in found if row["arm"] == base]
        text += gain_that_can_be_seen(base, areas, len(mine)) if len(areas) > 1 else ""
    return text


def gain_cell(row: dict, name: str) -> str:
    """Writes how a correction's arm differs from its reference.

    The area, which decides, is better or worse by the corrected p; final success, which only must
    not be worse, is so by the uncorrected one. Fewer than FEWEST seeds get no verdict."""
    if f"{name}_gain" not in row:
        return ""
    gain = row[f"{name}_gain"]
    p = row[f"{name}_gain_p"]
    cell = f"{100 * gain:+.1f} points, {p:.3f}"
    verdict = "worse" if gain < 0 and p < 0.05 else "not shown to be worse"
    if name == "area":
        corrected = row["area_gain_holm_p"]
        cell += f", {corrected:.3f}"
        verdict = ("better" if gain > 0 else "worse") if corrected < 0.05 else "not shown"
    return f"{cell}: {verdict}" if row["gain_seeds"] >= FEWEST else cell


def measure_cells(row: dict, name: str) -> list[str]:
    """Writes the two cells of one measure: the mean, and how it differs from the first arm's."""
    low, high = row[f"{name}_interval"]
    mean = f"{row[name]:.1%}"
    if row["seeds"] >= FEWEST:
        mean += f" [{low:.1%}, {high:.1%}]"
    if f"{name}_difference" not in row:
        return [mean, ""]
    points = 100 * row[f"{name}_difference"]
    verdict = "equivalent" if row[f"{name}_equivalent"] else "not shown"
    return [mean, f"{points:+.1f} points, {row[f'{name}_tost_p']:.3f}: {verdict}"]


def what_can_be_seen(name: str, first: list[dict], arms: int) -> str:
    """Tells how often an arm that is truly equal is found so. first: runs of the first arm."""
    deviation = float(np.std([MEASURED[name](one) for one in first], ddof=1))
    seen = power(deviation, len(first), arms)
    wanted = (n for n in range(len(first), MOST + 1) if power(deviation, n, arms) >= 0.8)
    seeds = next(wanted, f"more than {MOST}")
    return (
        f"\nSeeds of the first arm differ by {100 * deviation:.1f} points in {MEASURES[name]} "
        f"(standard deviation). An arm truly equal to it is found so in {seen:.0%} of studies with "
        f"{len(first)} seeds, and in 80% with {seeds}.\n"
    )


def gain_that_can_be_seen(base: str, areas: list[float], arms: int) -> str:
    """Tells the least gain in the area that so many seeds would show. areas: of the reference."""
    deviation = float(np.std(areas, ddof=1))
    least = least_gain(deviation, len(areas), arms)
    return (
        f"\n{staleness_of(base).capitalize()}: seeds of the reference, {base!r}, differ by "
        f"{100 * deviation:.1f} points in the area (standard deviation). A true gain of "
        f"{100 * least:.1f} points would be seen in 80% of studies with {len(areas)} seeds and "
        f"{arms} arms, p corrected for them.\n"
    )


def plot_corrections(found: list[dict], image: Path) -> None:
    """Plots the success of a version's episodes, five batches smoothed, against the env steps
    trained until it: a panel per staleness, the mean over seeds of every arm there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(17, 6), sharey=True)
    variants = ["", "uncorrected", "exact", "truncate", "icepop", "m2po", "gipo"]
    for axis, bound in zip(axes, (2, 4, 8), strict=True):
        lag = f"staleness {bound}"
        names = {"synchronous": "black"}
        names |= {f"{lag}, {v}" if v else lag: f"C{i}" for i, v in enumerate(variants)}
        for arm, colour in names.items():
            if mine := [row for row in found if row["arm"] == arm]:
                steps, _, smooth = smoothed(mine)
                label = f"{arm.partition(', ')[2] or arm}, {len(mine)} seeds"
                axis.plot(steps, 100 * smooth.mean(axis=1), color=colour, label=label)
        axis.set(title=lag, xlabel="thousand env steps trained")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3, fontsize=8)
    axes[0].set(ylabel="success of the version's episodes, %")
    figure.tight_layout()
    figure.savefig(image, dpi=110)
    plt.close(figure)


def plot(study: str, found: list[dict], folder: Path | None = None) -> None:
    """Plots the success of a version's episodes, five batches smoothed.

    Against the env steps trained until it (in proportion to versions), and against the minutes
    until it was published. The mean over seeds and, thin, where there are few arms, each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 5), sharey=True)
    names = list(dict.fromkeys(arm.partition(", ")[0] for arm in STUDIES[study]))
    for arm in STUDIES[study]:
        mine = [row for row in found if row["arm"] == arm]
        if not mine:
            continue
        steps, minutes, smooth = smoothed(mine)
        name, _, variant = arm.partition(", ")
        number = names.index(name)  # each name has a colour
        colour = f"C{number - 1}" if number else "black"
        style = {"color": colour, "linestyle": VARIANTS[variant]}
        for axis, x in zip(axes, (steps, minutes), strict=True):
            axis.plot(x, 100 * smooth.mean(axis=1), **style, label=f"{arm}, {len(mine)} seeds")
            if len(STUDIES[study]) < 5:
                axis.plot(x, 100 * smooth, **style, linewidth=0.7, alpha=0.4)
    axes[0].set(xlabel="thousand env steps trained", ylabel="success of the version's episodes, %")
    axes[1].set(xlabel="minutes until it was published")
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.tight_layout()
    figure.savefig(file(study, "png", folder), dpi=110)
    plt.close(figure)


def smoothed(rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smooths an arm's curves over five versions.

    Returns thousand env steps [versions], minutes of the quickest run [versions], and success
    [versions, seeds]."""
    length = len(rows[0]["time"])
    versions = np.arange(max(1, length - LAST))
    curves = np.array([np.interp(versions, *curve(row)) for row in rows])
    means = [curves[:, max(0, v - 4) : v + 1].mean(axis=1) for v in versions]
    steps = versions / length * np.mean([row["env_steps"][-1] for row in rows]) / 1e3
    quickest = min((row["time"] for row in rows), key=operator.itemgetter(-1))
    minutes = np.array([0.0, *quickest])[versions] / 60
    return steps, minutes, np.array(means)


def main(config: EquivalenceConfig) -> None:
    end_on_sigterm()
    if config.what == "run":
        run(config)
    found = rows(config.study, config.flags, config.results)
    none = f"there are no results in {file(config.study, 'jsonl', config.results)}"
    mine = [row for row in found if row["arm"] in STUDIES[config.study]]
    require(mine, f"{none}: begin with `python -m benchmarks.equivalence run`")
    text = table(config.study, found)
    if not config.flags:  # they make another study
        file(config.study, "md", config.results).write_text(text)
        if config.study in BASELINES:
            plot_corrections(found, file(config.study, "png", config.results))
        else:
            plot(config.study, found, config.results)
    print(text)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(EquivalenceConfig))
