"""What a run's folder shows and says: swimlane.png, curve.png, and a summary that ends in one
sentence of advice.

    python -m metrics NAME        of runs/NAME, or of a folder

Left out: comparing runs (`bench.py ladder`), and what another placement would give (`plan.py --from
NAME`).
"""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from config import Config, UserError, existing_run, exit_on_user_error, from_json
from metrics import GROUPS, REASONS, STAGES, read_metrics, read_trace

# ---------------------------------------------------------------- pictures


GREEN = "#4c9f70"
BLUE = "#3b7dd8"
PURPLE = "#8e5bb5"
ORANGE = "#d9822b"
WORK = {
    "step": GREEN,
    "render": "#8fc1a3",
    "reset": "#c5e0cf",
    "infer": BLUE,
    "fetch": PURPLE,
    "train": ORANGE,
    "optimizer": "#8a4b0f",
    "publish": PURPLE,
    "checkpoint": "#777777",
}
# Of waits: the colour of the stage that is waited for.
WAITS = {
    "action": BLUE,
    "admission": ORANGE,
    "request": GREEN,
    "weights": PURPLE,
    "trajectory": GREEN,
    "gradient": "#8a4b0f",
}
MARKED = (
    "fetch",
    "publish",
)  # too short to be seen, so they are drawn wider and with their version


def group_of(row: str) -> str:
    """The stage of a trace's row, or "weights"."""
    return next(group for group in GROUPS if row.startswith(group))


def window(spans: dict[str, list]) -> tuple[float, float]:
    """Where the swimlane looks, in seconds: at some 40 inferences around a publication a little
    after the middle of the run.
    """
    everything = [span for rows in spans.values() for span in rows]
    begin = min(start for _, start, _, _ in everything)
    end = max(end for _, _, end, _ in everything)
    inferences = [end - start for what, start, end, _ in everything if what == "infer"]
    seconds = min(max(40 * median(inferences or [0.1]), 0.5), 8.0, end - begin)
    published = [start for what, start, _, _ in everything if what == "publish"]
    middle = min(published or [end], key=lambda at: abs(at - 0.6 * end))
    first = max(begin, min(middle - seconds / 2, end - seconds))
    return first, first + seconds


def draw_swimlane(run: Path) -> None:
    """A row per worker, by stage: work is a full bar, a wait a thin one in the colour of whom it
    waits for.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    spans = read_trace(run)
    if not spans:
        return
    (first, last) = window(spans)
    names = list(spans)
    gaps = [0.0] + [0.35 * (group_of(one) != group_of(other)) for one, other in pairwise(names)]
    at = [-i - sum(gaps[: i + 1]) for i in range(len(names))]  # height of each row
    figure, axes = plt.subplots(
        figsize=(12, min(0.45 * (len(names) + sum(gaps)) + 1.5, 24)), layout="constrained"
    )
    seen: dict[tuple[bool, str], set[str]] = {}  # by whether it is a wait, and colour
    for name, y in zip(names, at, strict=True):
        here = [span for span in spans[name] if span[2] >= first and span[1] <= last]
        for what in sorted({span[0] for span in here}, key=lambda what: (what in MARKED, what)):
            cause = what.removeprefix("wait: ")
            waits = what != cause
            colour = WAITS[cause] if what != cause else WORK[what]
            height, least = (
                (0.16, 0.0) if waits else (0.8, 0.003 * (last - first) if what in MARKED else 0.0)
            )
            bars = [
                (start, max(end - start, least)) for kind, start, end, _ in here if kind == what
            ]
            edge = (
                {"edgecolor": "white", "linewidth": 0.5}
                if what in ("infer", "train")
                else {"linewidth": 0}
            )
            axes.broken_barh(
                bars,
                (y - height / 2, height),
                facecolor=colour,
                alpha=0.6 if waits else 1.0,
                **edge,
            )
            seen.setdefault((waits, colour), set()).add(cause)
        for what, start, end, args in here:
            start = max(start, first)
            end = min(end, last)
            if (
                what == "infer"
                and "batch" in args
                and end - start > 0.007 * (last - first) * len(str(args["batch"]))
            ):
                axes.text(
                    (start + end) / 2,
                    y,
                    args["batch"],
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white",
                    clip_on=True,
                )
            if what == "fetch" and "version" in args and end < last - 0.03 * (last - first):
                axes.text(
                    end + 0.005 * (last - first),
                    y,
                    f"v{args['version']}",
                    va="center",
                    fontsize=7,
                    color=PURPLE,
                )
    axes.set_yticks(at, names)
    axes.set_ylim(at[-1] - 0.6, 0.6)
    axes.set_xlim(first, last)
    axes.set_xlabel("seconds")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_title(
        "full bars are work, with the batch size of inferences; thin bars wait, in the colour of "
        "whom for",
        fontsize=9,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = []
    for waits, names_of in ((False, WORK), (True, WAITS)):
        for colour in dict.fromkeys(names_of.values()):
            if causes := [name for name in names_of if name in seen.get((waits, colour), ())]:
                handles.append(
                    Patch(
                        color=colour,
                        alpha=0.6 if waits else 1.0,
                        label="wait: " * waits + ", ".join(causes),
                    )
                )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncol=min(len(handles), 9),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(run / "swimlane.png", dpi=110)
    plt.close(figure)


def draw_curve(run: Path) -> None:
    """Success of training episodes and of evaluations against minutes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    lines = read_metrics(run)
    if not lines:
        return
    minutes = np.array([line["time"] for line in lines]) / 60
    success = np.array(
        [np.nan if line["success_rate"] is None else line["success_rate"] for line in lines]
    )
    evaluated = [
        (line["time"] / 60, line["eval_success_rate"])
        for line in lines
        if line.get("eval_success_rate") is not None
    ]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    window = min(10, len(lines))
    sums = np.convolve(np.nan_to_num(success), np.ones(window), "valid")
    counts = np.convolve(~np.isnan(success), np.ones(window), "valid")
    axes.plot(minutes, success, color=BLUE, alpha=0.25, linewidth=1)
    axes.plot(
        minutes[window - 1 :],
        sums / np.maximum(counts, 1),
        color=BLUE,
        label=f"training, mean of {window} iterations",
    )
    if evaluated:
        axes.plot(
            *zip(*evaluated, strict=True), "o-", color=ORANGE, label="evaluation, held-out seeds"
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel("minutes")
    axes.set_ylabel("success rate")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(run / "curve.png", dpi=110)
    plt.close(figure)


def draw(run: Path) -> None:
    """The pictures of a run, as far as it left behind what they show."""
    if (run / "trace.json").is_file():
        draw_swimlane(run)
    draw_curve(run)


# ---------------------------------------------------------------- summary


@dataclass
class Summary:
    """Of all iterations but the first, in which the pipeline fills."""

    iterations: int
    minutes: float
    env_steps_per_s: float
    samples_per_s: float  # chunk steps trained once
    waits: dict[str, dict[str, float]]  # stage → cause → share of the workers' time
    busy_with: dict[
        str, float
    ]  # kind of work → share of the critical stage's time; empty without a trace
    batch_sizes: Counter  # inferences by the largest size of their bucket: 1, 2, 4 … 256
    staleness: Counter  # samples by bucket: 0, 1, 2, 3_or_more
    success: list[float]
    # training episodes: at the beginning and at the end, means of up to 10 iterations; empty: none
    # ended
    held_out: list[float]  # the first and the last evaluation
    totals: dict  # collected, discarded, discarded_by, restarts
    cpu: float  # share of the cores that was busy
    gpu: bool

    @property
    def bubble(self) -> dict[str, float]:
        return {stage: min(1.0, sum(causes.values())) for stage, causes in self.waits.items()}

    @property
    def critical(self) -> str:
        """The stage that waits least: what the others wait for."""
        return min(STAGES, key=lambda stage: self.bubble[stage])


def summarise(lines: list[dict], spans: dict[str, list]) -> Summary:
    """lines: of metrics.jsonl, at least one; spans: of trace.json, or {}."""
    measured = lines[1:] or lines
    seconds = [after["time"] - before["time"] for before, after in pairwise(lines)] or [1.0]

    def rate(total: str, of_line: str) -> float:
        """Of a count so far, per second: of time that passed, of which workers that start again are
        a part too.
        """
        return (
            (lines[-1][total] - lines[0][total]) / sum(seconds)
            if len(lines) > 1
            else lines[0][of_line]
        )

    def mean(value) -> float:
        return sum(value(line) * s for line, s in zip(measured, seconds, strict=True)) / sum(
            seconds
        )

    waits: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for key in dict.fromkeys(key for line in measured for key in line["waits"]):
        stage, _, cause = key.partition(":")
        waits[stage][cause] = mean(lambda line, key=key: line["waits"].get(key, 0.0))
    rates = [line["success_rate"] for line in lines if line["success_rate"] is not None]
    ends = min(10, max(1, len(rates) // 2))
    held_out = [
        line["eval_success_rate"] for line in lines if line.get("eval_success_rate") is not None
    ]
    batch_sizes = Counter()
    staleness = Counter()
    for line in measured:
        batch_sizes.update(line["batch_size_hist"])
        staleness.update(line["staleness_hist"])
    out = Summary(
        iterations=lines[-1]["iteration"],
        minutes=lines[-1]["time"] / 60,
        env_steps_per_s=rate("env_steps", "env_steps_per_s"),
        samples_per_s=rate("trained_once", "samples_per_s"),
        waits=waits,
        busy_with={},
        batch_sizes=batch_sizes,
        staleness=staleness,
        success=[fmean(rates[:ends]), fmean(rates[-ends:])] if rates else [],
        held_out=[held_out[0], held_out[-1]] if held_out else [],
        totals={
            name: lines[-1][name] for name in ("collected", "discarded", "discarded_by", "restarts")
        },
        cpu=mean(lambda line: line["cpu_fraction"]),
        gpu=lines[-1]["gpu_memory_gb"] > 0,
    )
    worked = Counter()
    for name, rows in spans.items():
        if group_of(name) == out.critical:
            for what, start, end, _ in rows:
                worked[what] += 0.0 if what.startswith("wait: ") else end - start
    busy = 1.0 - out.bubble[out.critical]
    total = sum(worked.values())
    out.busy_with = (
        {what: busy * s / total for what, s in worked.most_common() if s} if total else {}
    )
    return out


NAMES = {"env": "env workers", "rollout": "rollout workers", "actor": "actors"}


def advice(summary: Summary, config: Config) -> str:
    """One sentence: what the numbers say should be changed, the most certain finding first."""
    bubble = summary.bubble
    critical = summary.critical
    waits = summary.waits
    most = max(STAGES, key=lambda stage: bubble[stage])
    cause = max(waits[most], key=lambda name: waits[most][name], default="nothing")
    waiting = (
        f"{NAMES[most]} wait {bubble[most]:.0%} of their time, mostly for {FOR.get(cause, cause)}"
    )
    envs = config.env.envs
    workers = config.env.env_workers
    batch_max = config.rollout.batch_max
    if bubble[most] < 0.15:
        return (
            f"The stages are balanced, for none waits more than {bubble[most]:.0%} of its time: "
            "there is nothing to change."
        )
    if config.actor.max_staleness == 0:
        return (
            f"Rollout and training take turns (--max-staleness 0), so {waiting}: --preset full "
            "lets them overlap."
        )
    if batch_max == "all" and waits["env"].get("action", 0.0) >= 0.15:
        share = waits["env"]["action"]
        return (
            f"Env workers wait {share:.0%} for actions, as every batch waits for the slowest lane: "
            "give --batch-max auto."
        )
    if not config.actor.stream and waits["actor"].get("trajectory", 0.0) >= 0.15:
        share = waits["actor"]["trajectory"]
        return (
            f"Actors wait {share:.0%} for whole batches: --stream trains each micro-batch as soon "
            "as it is complete."
        )
    if not summary.gpu and summary.cpu >= 0.9:
        return (
            f"The cores are the limit ({summary.cpu:.0%} busy, with all that this machine runs), "
            "so another split would gain "
            "little: give the run more cores, or a GPU."
        )
    if bubble[critical] >= 0.25:
        if waits["env"].get("admission", 0.0) >= 0.1:
            return (
                f"No stage is busy more than {1 - bubble[critical]:.0%} and {waiting}: "
                "let rollouts run further ahead with --max-staleness "
                f"{config.actor.max_staleness + 1}."
            )
        return (
            f"No stage is busy more than {1 - bubble[critical]:.0%} and {waiting}: "
            f"give each more to overlap with --envs {2 * envs} --batch "
            f"{2 * max(envs, config.actor.batch)}."
        )
    rests = (
        "never rest"
        if bubble[critical] < 0.05
        else f"wait only {bubble[critical]:.0%} of their time"
    )
    found = f"{NAMES[critical].capitalize()} {rests} while {waiting}"
    r, a = (int(part) for part in config.train.parts.split(":"))
    if config.train.placement == "colocated" and summary.gpu:
        return f"{found}: give each stage devices of its own with --placement disaggregated."
    if critical == "actor":
        if summary.gpu:  # as many GPUs as before
            return f"{found}: " + (
                f"give training more with --ratio {r - 1}:{a + 1}."
                if r > 1
                else "only more GPUs would help."
            )
        return (
            f"{found}: give training more with --ratio "
            f"{f'{r - 1}:{a}' if r > 1 else f'{r}:{a + 1}'}."
        )
    if summary.gpu:
        return f"{found}: " + (
            f"give them more with --ratio {r + 1}:{a - 1}."
            if a > 1
            else "only more GPUs would help."
        )
    if critical == "rollout":
        return (
            f"{found}: give --rollout-workers {config.rollout.rollout_workers + 1}, or larger "
            "batches with --batch-max."
        )
    more = next(
        (n for n in range(workers + 1, envs + 1) if envs % (n * (config.env.lanes or 1)) == 0), None
    )
    return f"{found}: " + (
        f"give --env-workers {more}."
        if more
        else "give more --envs, and more --env-workers with them."
    )


FOR = {
    "action": "actions",
    "admission": "a newer version",
    "request": "requests",
    "weights": "weights",
    "trajectory": "trajectories",
    "gradient": "gradients of other ranks",
}


def histogram(title: str, counts: Counter, labels: dict[str, str]):
    """A table with a bar per bucket; labels: key → what is printed, in order."""
    from rich.table import Table

    table = Table(title, "share", "", box=None, header_style="bold")
    total = max(sum(counts.values()), 1)
    for key, label in labels.items():
        if counts[key]:
            share = counts[key] / total
            table.add_row(label, f"{share:.0%}", "█" * max(1, round(20 * share)))
    return table


def sizes(largest: int) -> dict[str, str]:
    """Of the buckets of batch sizes up to the one of `largest`: "4" → "3 to 4"; the last bucket has
    no upper end.
    """
    out = {}
    for i in range(9):
        low = 2**i // 2 + 1
        high = 2**i
        out[str(high)] = (
            f"{low} or more" if i == 8 else str(high) if low >= high else f"{low} to {high}"
        )
    return {key: label for key, label in out.items() if int(key) <= largest}


def show(name: str, summary: Summary, config: Config) -> None:
    """Prints the summary."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    train = config.train
    totals = summary.totals

    def rate(ends):
        return " to ".join(f"{x:.0%}" for x in ends)

    console.print(
        f"[b]{name}[/]: {summary.iterations} iterations in {summary.minutes:.1f} min; "
        f"{train.model} on {train.env}, "
        f"preset {train.preset}, ratio {train.parts}" + " (auto)" * (train.ratio == "auto")
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "throughput",
        f"{summary.env_steps_per_s:,.0f} env steps/s, {summary.samples_per_s:,.1f} chunk steps "
        "trained/s",
    )
    trained = rate(summary.success) or "no episode ended"
    held_out = rate(summary.held_out) or "not evaluated"
    facts.add_row("success", f"in training {trained}; on held-out seeds {held_out}")
    why = ", ".join(
        f"{steps:,} {REASONS[reason]}" for reason, steps in totals["discarded_by"].items() if steps
    )
    discarded = (
        f"{totals['discarded']:,} of {totals['collected']:,} chunk steps discarded"
        + f" ({why})" * bool(why)
    )
    facts.add_row("accounts", f"{totals['restarts']} restarts, {discarded}")
    console.print(facts, "")
    stages = Table("stage", "busy", "bubble", "by cause", "", box=None, header_style="bold")
    for stage in STAGES:
        causes = sorted(summary.waits[stage].items(), key=lambda item: -item[1])
        why = (
            ", ".join(f"{cause} {share:.0%}" for cause, share in causes if share >= 0.005)
            or "nothing"
        )
        doing = ", ".join(
            f"{what} {share:.0%}" for what, share in summary.busy_with.items() if share >= 0.005
        )
        role = f"critical{': ' if doing else ''}{doing}" if stage == summary.critical else ""
        stages.add_row(
            stage, f"{1 - summary.bubble[stage]:.0%}", f"{summary.bubble[stage]:.0%}", why, role
        )
    console.print(stages, "")
    ages = {"0": "0", "1": "1", "2": "2", "3_or_more": "3 or more"}
    left = histogram(
        "batch size", summary.batch_sizes, sizes(max(map(int, summary.batch_sizes), default=1))
    )
    console.print(
        Columns([left, histogram("staleness", summary.staleness, ages)], padding=(0, 6)), ""
    )
    console.print(f"[b]advice:[/] {advice(summary, config)}", soft_wrap=True)


def main() -> None:
    """The command: draws, and prints the summary."""
    with exit_on_user_error():
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise UserError(
                "give one run to look at: python -m metrics NAME, of runs/NAME, or a path with a "
                "slash"
            )
        run = existing_run(sys.argv[1])
        if not (run / "metrics.jsonl").is_file():
            raise UserError(
                f"{run} is not the folder of a run that has trained: it holds no metrics.jsonl"
            )
        try:
            lines = read_metrics(run)
            if not lines:
                raise UserError(
                    f"{run / 'metrics.jsonl'} is empty: the run ended before its first iteration"
                )
            spans = read_trace(run) if (run / "trace.json").is_file() else {}
            summary = summarise(lines, spans)
            draw(run)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot read what run {run} left behind ({error!r}): it is of another version, or "
                "damaged"
            ) from None
        show(run.name, summary, from_json(run / "config.json"))
