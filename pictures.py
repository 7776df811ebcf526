"""Draws a run: swimlane.png (who worked and who waited, when), curve.png (success over time) and
staleness.png (how old the samples were).

Left out: the whole trace, for which there is Perfetto.
"""

from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import numpy as np

from metrics import wilson
from run_folder import GROUPS, Line, place_of, read_metrics, read_trace

GREEN = "#4c9f70"
BLUE = "#3b7dd8"
PURPLE = "#8e5bb5"
ORANGE = "#d9822b"
BROWN = "#8a4b0f"
WORK = {
    "step": GREEN,
    "render": "#8fc1a3",
    "reset": "#c5e0cf",
    "infer": BLUE,
    "fetch": PURPLE,
    "train": ORANGE,
    "optimizer": BROWN,
    "publish": PURPLE,
    "reduce": BROWN,
    "checkpoint": "#777777",
}
OTHER = "#bbbbbb"  # of work that has no colour of its own
# Colours of waits: that of the stage that is waited for.
WAITS = {
    "action": BLUE,
    "admission": ORANGE,
    "request": GREEN,
    "weights": PURPLE,
    "trajectory": GREEN,
    "gradient": BROWN,
}
TITLE = (
    "full bars are work, with batch sizes of inference; thin bars wait, in the colour of whom for"
)
# Buckets of staleness, as metrics.jsonl names them.
AGES = {"0": "#c6dbef", "1": BLUE, "2": ORANGE, "3_or_more": BROWN}
SIZE = (5.5, 3.6)  # inches of a chart: large letters, for it is also looked at on a phone
DPI = 150
ROWS = 40  # that can be told apart in one picture
# These are too short to be seen, so they are drawn last, and at least this share of the width.
MARKED = ("fetch", "publish")
LEAST = 0.003


def draw(run: Path, trace: bool = True) -> tuple[list[Line], dict[str, list]]:
    """Draws the pictures of a run, as far as it left behind what they show. Returns that: the lines
    of metrics.jsonl, and the spans of trace.json, if they are to be drawn."""
    spans = read_trace(run) if trace and (run / "trace.json").is_file() else {}
    lines = read_metrics(run)
    if spans:
        draw_swimlane(run / "swimlane.png", spans)
    if lines:
        draw_curve(run / "curve.png", lines)
        draw_staleness(run / "staleness.png", lines)
    return lines, spans


def group_of(row: str) -> str:
    """Returns the stage of a trace's row, or its transfers' group."""
    return next(group for group in GROUPS if place_of(row)[1].startswith(group))


def draw_swimlane(file: Path, spans: dict[str, list]) -> None:
    """Draws a row per worker, by stage. spans: of `read_trace`."""
    from matplotlib.figure import Figure

    first, last = window(spans)
    nodes, left_out = shown(spans, first, last)
    spans = {name: row for name, row in spans.items() if place_of(name)[0] in nodes}

    # Place the rows from above to below, with a gap between two stages.
    heights = [0.0]
    for above, below in pairwise(spans):
        heights.append(heights[-1] - (1.0 if group_of(above) == group_of(below) else 1.35))
    size = (12, min(0.45 * (1 - heights[-1]) + 1.5, 24))  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()

    # Draw what each row did in the window.
    seen = set()
    for row, height in zip(spans.values(), heights, strict=True):
        visible = [span for span in row if span[2] >= first and span[1] <= last]
        seen |= {span[0] for span in visible}
        draw_bars(axes, visible, height, last - first)
        draw_numbers(axes, visible, height, first, last)

    # Label the axes and the colours.
    axes.set_yticks(heights, list(spans))
    axes.set(xlim=(first, last), ylim=(heights[-1] - 0.6, 0.6), xlabel="seconds")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_title(TITLE + left_out, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = legend(seen, WORK, "", 1.0) + legend(seen, WAITS, "wait: ", 0.6)
    style = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
    figure.legend(handles=handles, ncol=min(len(handles), 9), **style)
    figure.savefig(file, dpi=110)


def shown(spans: dict[str, list], first: float, last: float) -> tuple[list[int], str]:
    """Returns the nodes that are drawn, and what the title says of the others: all as long as there
    are at most ROWS rows; else the first node, and those whose actors wait least for gradients
    between these two times, one at least, for the others wait for them."""
    rows = Counter(place_of(name)[0] for name in spans)
    waits = Counter()
    for name, row in spans.items():
        for what, start, end, _ in row:
            if what == "wait: gradient":
                waits[place_of(name)[0]] += max(0.0, min(end, last) - max(start, first))
    order = [0, *sorted(rows.keys() - {0}, key=lambda node: (waits[node], node))]
    room = sum(total <= ROWS for total in accumulate(rows[node] for node in order))
    drawn = order[: max(room, 2)]
    if len(drawn) == len(order):
        return drawn, ""
    names = ", ".join(map(str, drawn[1:]))
    which = f"node 0, and of {len(order) - 1} others those that wait least for gradients: {names}"
    return drawn, f"\n{which}; trace.json has all"


def window(spans: dict[str, list]) -> tuple[float, float]:
    """Returns where the swimlane looks, in seconds: at some 40 inferences around a publication a
    little after the middle of the run, where every node has spans."""
    everything = [span for rows in spans.values() for span in rows]
    starts: dict[int, list[float]] = {}  # of each node's spans
    for name, row in spans.items():
        starts.setdefault(place_of(name)[0], []).extend(start for _, start, _, _ in row)
    begin = max(map(min, starts.values()))
    end = max(end for _, _, end, _ in everything)
    inferences = [end - start for what, start, end, _ in everything if what == "infer"]
    seconds = min(max(40 * median(inferences or [0.1]), 0.5), 8.0, end - begin)
    published = [start for what, start, _, _ in everything if what == "publish"]
    middle = min(published or [end], key=lambda at: abs(at - 0.6 * end))
    first = max(begin, min(middle - seconds / 2, end - seconds))
    return first, first + seconds


def draw_bars(axes, spans: list, height: float, width: float) -> None:
    """Draws one row's spans, a kind at a time; width: seconds that the picture shows."""
    kinds = sorted({span[0] for span in spans}, key=lambda what: (what in MARKED, what))
    for kind in kinds:
        least = LEAST * width if kind in MARKED else 0.0
        bars = [(start, max(end - start, least)) for what, start, end, _ in spans if what == kind]
        if kind.startswith("wait: "):
            colour = WAITS[kind.removeprefix("wait: ")]
            axes.broken_barh(bars, (height - 0.08, 0.16), facecolor=colour, alpha=0.6, linewidth=0)
        else:  # one inference follows another: a white edge parts them
            edge = 0.5 if kind in ("infer", "train") else 0.0
            style = {"facecolor": WORK.get(kind, OTHER), "edgecolor": "white", "linewidth": edge}
            axes.broken_barh(bars, (height - 0.4, 0.8), **style)


def draw_numbers(axes, spans: list, height: float, first: float, last: float) -> None:
    """Writes batch sizes into inferences and versions beside fetches, where there is room."""
    width = last - first
    style = {"va": "center", "fontsize": 7, "clip_on": True}
    for what, begun, ended, args in spans:
        start = max(begun, first)
        end = min(ended, last)
        if what == "infer" and "batch" in args:
            if end - start > 0.007 * width * len(str(args["batch"])):
                middle = (start + end) / 2
                axes.text(middle, height, args["batch"], ha="center", color="white", **style)
        elif what == "fetch" and "version" in args and end < last - 0.03 * width:
            axes.text(end + 0.005 * width, height, f"v{args['version']}", color=PURPLE, **style)


def legend(seen: set[str], colours: dict[str, str], kind: str, alpha: float) -> list:
    """Returns a patch per colour that was drawn, named after all that has it."""
    from matplotlib.patches import Patch

    patches = []
    for colour in dict.fromkeys(colours.values()):
        if names := [n for n in colours if colours[n] == colour and kind + n in seen]:
            patches.append(Patch(color=colour, alpha=alpha, label=kind + ", ".join(names)))
    return patches


def draw_curve(file: Path, lines: list[dict]) -> None:
    """Draws success of training episodes and of evaluations against minutes."""
    from matplotlib.figure import Figure

    minutes = np.array([line["time"] for line in lines]) / 60
    rates = [line["success_rate"] for line in lines]
    success = np.array([np.nan if rate is None else rate for rate in rates])
    axes = Figure(figsize=SIZE, layout="constrained").subplots()
    axes.plot(minutes, success, ".-", color=BLUE, alpha=0.25, linewidth=1, markersize=3)

    # Average over a window, of the iterations in which an episode ended.
    window = min(10, max(1, len(lines) // 2))
    sums = np.convolve(np.nan_to_num(success), np.ones(window), "valid")
    counts = np.convolve(~np.isnan(success), np.ones(window), "valid")
    label = f"training, mean of {window} iteration{'s' * (window > 1)}"
    axes.plot(minutes[window - 1 :], sums / np.maximum(counts, 1), color=BLUE, label=label)

    evaluated = [line for line in lines if "eval_success_rate" in line]
    if evaluated:
        at = [line["time"] / 60 for line in evaluated]
        rates = np.array([line["eval_success_rate"] for line in evaluated])
        counts = [line.get("eval_episodes", 0) for line in evaluated]
        bounds = [
            wilson(round(rate * n), n) if n else (rate, rate)
            for rate, n in zip(rates, counts, strict=True)
        ]
        reach = np.abs(np.transpose(bounds) - rates)
        style = {"color": ORANGE, "ecolor": "#eac296", "capsize": 2}
        label = "evaluation, held-out seeds, with 95 % intervals"
        axes.errorbar(at, rates, reach, fmt="o-", label=label, **style)
    axes.set(xlabel="minutes", ylabel="success rate", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.figure.savefig(file, dpi=DPI)


def draw_staleness(file: Path, lines: list[dict]) -> None:
    """Draws how the samples of each iteration spread over buckets of staleness, and their mean."""
    from matplotlib.figure import Figure

    found = [line.get("staleness_hist", {}) for line in lines]
    counts = np.array([[ages.get(age, 0.0) for age in AGES] for ages in found])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # An iteration is as wide as it is long, so that a single one shows, too.
    numbers = np.array([line["iteration"] for line in lines])
    edges = np.stack([numbers - 0.5, numbers + 0.5], axis=1).flatten()
    axes = Figure(figsize=SIZE, layout="constrained").subplots()
    labels = [f"{age.replace('_', ' ')} versions old" for age in AGES]
    bands = np.repeat(shares, 2, axis=0).T
    axes.stackplot(edges, bands, labels=labels, colors=AGES.values())
    axes.set(xlabel="iteration", ylabel="share of the samples", xlim=(edges[0], edges[-1]))
    axes.set_ylim(0, 1)
    versions = axes.twinx()
    for key, style in (("staleness_mean", "-"), ("staleness_max", ":")):
        ages = [line.get(key, np.nan) for line in lines]
        versions.step(edges, np.repeat(ages, 2), style, color="black", linewidth=1)
        axes.plot([], [], style, color="black", linewidth=1, label=key.removeprefix("staleness_"))
    versions.set(ylabel="mean and max, versions", ylim=(0, max(1.0, versions.get_ylim()[1])))
    axes.figure.legend(loc="outside upper center", ncol=3, frameon=False, fontsize=8)
    axes.figure.savefig(file, dpi=DPI)
