"""Says what a run did, and in one sentence what to change: `python -m metrics NAME`.

Left out: comparing runs (`bench.py ladder`), and what another placement would give (`plan.py --from
NAME`).
"""

from collections import Counter
from dataclasses import dataclass
from itertools import compress, islice, pairwise
from statistics import fmean

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from config import Config
from errors import require
from metrics import REASONS, STAGES
from pictures import group_of

NAMES = {"env": "env workers", "rollout": "rollout workers", "actor": "actors"}
# What a worker waits for, by the cause of its wait.
FOR = {
    "action": "actions",
    "admission": "a newer version",
    "request": "requests",
    "weights": "weights",
    "trajectory": "trajectories",
    "gradient": "gradients of other ranks",
}
# Labels of the buckets of staleness, and of batch sizes, of which the last one has no end.
STALENESS = {"0": "0", "1": "1", "2": "2", "3_or_more": "3 or more"}
SIZES = {"1": "1", "2": "2"} | {str(2**i): f"{2**i // 2 + 1} to {2**i}" for i in range(2, 8)}
SIZES |= {"256": "129 or more"}
SLOW = 0.1  # of their time that actors of other nodes wait longer for gradients than a slow one's
LISTED = 8  # nodes in a summary


@dataclass
class Summary:
    """Holds a run's numbers, of all iterations but the first, in which the pipeline fills."""

    iterations: int
    minutes: float
    env_steps_per_s: float
    samples_per_s: float  # chunk steps, each counted once
    waits: dict[str, dict[str, float]]  # stage → cause → share of the workers' time
    # Kind of work → share of the critical stage's time. Empty without a trace.
    busy_with: dict[str, float]
    batch_sizes: Counter  # inferences by the largest size of their bucket: 1, 2, 4 … 256
    staleness: Counter  # chunk steps times epochs, by bucket
    # At the beginning and at the end: success of training episodes, each the mean of up to 10
    # iterations, and of evaluations, one each. Empty where there was none.
    success: list[float]
    held_out: list[float]
    totals: dict  # collected, discarded, discarded_by, restarts
    cpu: float  # share of the cores that was busy
    gpu: bool
    # Node → its figures (docs/metrics.md), restarts summed, the node that the others wait for
    # first. Empty where there is one node.
    nodes: dict[str, dict[str, float]]

    @property
    def bubble(self) -> dict[str, float]:
        """Stage → share of the workers' time that they waited."""
        return {stage: min(1.0, sum(causes.values())) for stage, causes in self.waits.items()}

    @property
    def critical(self) -> str:
        """The stage that waits least: the others wait for it."""
        return min(STAGES, key=lambda stage: self.bubble[stage])


def summarise(lines: list[dict], spans: dict[str, list]) -> Summary:
    """Returns a run's numbers. lines: of metrics.jsonl, not []; spans: of trace.json, or {}.

    Raises UserError where no line has what the launcher measures."""
    first = lines[0]
    last = lines[-1]
    # A line that was made up for on resuming has nothing that the launcher measures.
    known = [line for line in lines if "waits" in line]
    require(known, "nothing was measured: its launcher was killed before it wrote a line")
    measured = [line for line in known if line is not first] or known
    took = {after["iteration"]: after["time"] - before["time"] for before, after in pairwise(lines)}
    seconds = [took.get(line["iteration"], 1.0) for line in measured]
    rates = [line["success_rate"] for line in lines if line["success_rate"] is not None]
    ends = min(10, max(1, len(rates) // 2))
    held_out = [line["eval_success_rate"] for line in lines if "eval_success_rate" in line]

    # Rates are of totals and of the time that passed. So the starts of workers count too.
    per_second = {
        "env_steps": first.get("env_steps_per_s", 0.0),
        "trained_once": first["samples_per_s"],
    }
    if len(lines) > 1:
        elapsed = sum(took.values())
        per_second = {name: (last[name] - first[name]) / elapsed for name in per_second}

    # Shares are means over iterations, weighted by their time.
    waits: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for name in dict.fromkeys(name for line in measured for name in line["waits"]):
        stage, _, cause = name.partition(":")
        waits[stage][cause] = fmean([line["waits"].get(name, 0.0) for line in measured], seconds)

    totals = ("collected", "discarded", "discarded_by", "restarts")
    summary = Summary(
        iterations=last["iteration"],
        minutes=last["time"] / 60,
        env_steps_per_s=per_second["env_steps"],
        samples_per_s=per_second["trained_once"],
        waits=waits,
        busy_with={},
        batch_sizes=sum((Counter(line["batch_size_hist"]) for line in measured), Counter()),
        staleness=sum((Counter(line["staleness_hist"]) for line in measured), Counter()),
        success=[fmean(rates[:ends]), fmean(rates[-ends:])] if rates else [],
        held_out=[held_out[0], held_out[-1]] if held_out else [],
        totals={name: last[name] for name in totals},
        cpu=fmean([line["cpu_fraction"] for line in measured], seconds),
        gpu=measured[-1]["gpu_memory_gb"] > 0,
        nodes=nodes_of(measured, seconds),
    )
    summary.busy_with = work_of(summary.critical, 1.0 - summary.bubble[summary.critical], spans)
    return summary


def nodes_of(lines: list[dict], seconds: list[float]) -> dict[str, dict[str, float]]:
    """Returns the figures of `Summary.nodes`; seconds: that each line's iteration took."""
    found = {}
    for node, newest in lines[-1].get("nodes", {}).items():
        with_it = [node in line.get("nodes", {}) for line in lines]  # not yet, where it came later
        alone = [line["nodes"][node] for line in compress(lines, with_it)]
        weights = list(compress(seconds, with_it))
        found[node] = {name: fmean([one[name] for one in alone], weights) for name in newest}
        found[node]["restarts"] = sum(one["restarts"] for one in alone)
    return dict(sorted(found.items(), key=lambda entry: entry[1]["wait_gradient"]))


def work_of(stage: str, busy: float, spans: dict[str, list]) -> dict[str, float]:
    """Divides the share of time that a stage is busy among its kinds of work, the longest first."""
    worked = Counter()
    for name, row in spans.items():
        if group_of(name) == stage:
            for what, start, end, _ in row:
                if not what.startswith("wait: "):
                    worked[what] += end - start
    seconds = worked.total()
    return {what: busy * s / seconds for what, s in worked.most_common() if s}


def advice(summary: Summary, config: Config) -> str:
    """Returns one sentence: what should be changed, from the most certain finding to the least."""
    if found := slow_node(summary.nodes):
        return found
    bubble = summary.bubble
    most = max(STAGES, key=lambda stage: bubble[stage])
    least = bubble[summary.critical]
    actions = summary.waits["env"].get("action", 0.0)
    admission = summary.waits["env"].get("admission", 0.0)
    trajectories = summary.waits["actor"].get("trajectory", 0.0)
    cause = max(summary.waits[most], key=summary.waits[most].get, default="nothing")
    whom = FOR.get(cause, cause)
    waiting = f"{NAMES[most]} wait {bubble[most]:.0%} of their time, mostly for {whom}"
    if bubble[most] < 0.15:
        found = f"The stages are balanced, for none waits more than {bubble[most]:.0%} of its time"
        return f"{found}: there is nothing to change."

    # Settings that make somebody wait on purpose.
    staleness = config.actor.max_staleness
    if staleness == 0:
        found = f"Rollout and training take turns (--max-staleness 0), so {waiting}"
        return f"{found}: --preset full lets them overlap."
    if config.rollout.batch_max == "all" and actions >= 0.15:
        found = f"Env workers wait {actions:.0%} for actions, as every batch waits for the slowest"
        return f"{found} lane: give --batch-max auto."
    if not config.actor.stream and trajectories >= 0.15:
        found = f"Actors wait {trajectories:.0%} for whole batches"
        return f"{found}: --stream trains each micro-batch as soon as it is complete."

    # Nobody waits on purpose: is it the machine, too little to overlap, or the split?
    if not summary.gpu and summary.cpu >= 0.9:
        found = f"The cores are the limit ({summary.cpu:.0%} busy, with all that this machine runs)"
        return f"{found}, so another split would gain little: give the run more cores, or a GPU."
    if least >= 0.25:
        found = f"No stage is busy more than {1 - least:.0%} and {waiting}"
        if admission >= 0.1:
            return f"{found}: let rollouts run further ahead with --max-staleness {staleness + 1}."
        envs = config.env.envs
        batch = max(envs, config.actor.batch)
        return f"{found}: give each more to overlap with --envs {2 * envs} --batch {2 * batch}."
    rests = "never rest" if least < 0.05 else f"wait only {least:.0%} of their time"
    found = f"{NAMES[summary.critical].capitalize()} {rests} while {waiting}"
    return f"{found}: {more_for(summary.critical, config, summary.gpu)}."


def slow_node(nodes: dict[str, dict[str, float]]) -> str:
    """Names a node that the others wait for, and its workers that make them wait, or returns "".
    nodes: see `Summary.nodes`."""
    if not nodes:
        return ""
    slow, *others = nodes.values()
    wait = fmean(one["wait_gradient"] for one in others)
    if wait - slow["wait_gradient"] < SLOW:
        return ""
    trains = slow["bubble_actor"] - slow["wait_gradient"] < 0.15  # and has what it trains in time
    stages = ("actor",) if trains else ("env", "rollout")
    stage = min(stages, key=lambda stage: slow[f"bubble_{stage}"])
    found = f"Node {next(iter(nodes))} is slow, so actors of others wait {wait:.0%} for gradients"
    bubble = slow[f"bubble_{stage}"]
    return (
        f"{found}: compare its {NAMES[stage]}, which wait only {bubble:.0%}, with those of others."
    )


def more_for(stage: str, config: Config, gpu: bool) -> str:
    """Says which flag gives the critical stage more to work with."""
    rollout, actor = map(int, config.train.parts.split(":"))
    if gpu and config.train.placement == "colocated":
        return "give each stage devices of its own with --placement disaggregated"

    # Another ratio. There are no more GPUs than before: what one side gains the other one loses.
    if stage == "actor" and rollout > 1:
        return f"give training more with --ratio {rollout - 1}:{actor + 1 if gpu else actor}"
    if gpu and stage != "actor" and actor > 1:
        return f"give them more with --ratio {rollout + 1}:{actor - 1}"
    if gpu:
        return "try --placement colocated, where every GPU does both; else more GPUs"
    if stage == "actor":
        return f"give training more with --ratio {rollout}:{actor + 1}"

    # More processes, which share the cores.
    if stage == "rollout":
        workers = config.rollout.rollout_workers + 1
        return f"give --rollout-workers {workers}, or larger batches with --batch-max"
    envs = config.env.envs
    for workers in range(config.env.env_workers + 1, envs + 1):
        if envs % (workers * (config.env.lanes or 1)) == 0:
            return f"give --env-workers {workers}"
    return "give more --envs, and more --env-workers with them"


def show(console: Console, name: str, summary: Summary, config: Config) -> None:
    train = config.train
    auto = " (auto)" if train.ratio == "auto" else ""
    count = summary.iterations
    done = f"{count} iteration{'s' * (count != 1)} in {summary.minutes:.1f} min"
    console.print(
        f"[b]{escape(name)}[/]: {done}; {train.model} on {train.env}, preset {train.preset}, "
        f"ratio {train.parts}{auto}"
    )
    console.print(facts(summary), end="\n\n", soft_wrap=True)
    show_tables(console, summary)
    console.print(f"[b]advice:[/] {advice(summary, config)}", soft_wrap=True)


def show_tables(console: Console, summary: Summary) -> None:
    """Prints what each stage did, the nodes, and histograms."""
    console.print(stages(summary), "")
    if summary.nodes:
        console.print(table_of(summary.nodes), "")
    sizes = histogram("batch size", summary.batch_sizes, SIZES)
    ages = histogram("staleness", summary.staleness, STALENESS)
    console.print(Columns([sizes, ages], padding=(0, 6)), "")


def facts(summary: Summary) -> str:
    """Returns lines about throughput, success and accounts."""
    trained = first_and_last(summary.success) or "no episode ended"
    held_out = first_and_last(summary.held_out) or "not evaluated"
    totals = summary.totals
    reasons = totals["discarded_by"].items()
    why = ", ".join(f"{steps:,} {REASONS[reason]}" for reason, steps in reasons if steps)
    return (
        f"throughput  {summary.env_steps_per_s:,.0f} env steps/s, {summary.samples_per_s:,.1f} "
        "chunk steps trained/s\n"
        f"success     in training {trained}; on held-out seeds {held_out}\n"
        f"accounts    {totals['restarts']} restarts, {totals['discarded']:,} of "
        f"{totals['collected']:,} chunk steps discarded" + (f" ({why})" if why else "")
    )


def first_and_last(rates: list[float]) -> str:
    """Says what rates were and became, or only once what they are if that is the same."""
    return " to ".join(dict.fromkeys(f"{rate:.0%}" for rate in rates))


def stages(summary: Summary) -> Table:
    """Returns a table of how busy each stage was, and what it waited for."""
    table = Table("stage", "busy", "bubble", "by cause", "", box=None, header_style="bold")
    for stage in STAGES:
        bubble = summary.bubble[stage]
        causes = shares(summary.waits[stage]) or "nothing"
        role = ""
        if stage == summary.critical:
            doing = shares(summary.busy_with)
            role = f"critical: {doing}" if doing else "critical"
        table.add_row(stage, f"{1 - bubble:.0%}", f"{bubble:.0%}", causes, role)
    return table


def table_of(nodes: dict[str, dict[str, float]]) -> Table:
    """Returns a table of the nodes, or of those of many that the others wait for; nodes: see
    `Summary.nodes`."""
    busy = (f"{stage} busy" for stage in STAGES)
    titles = ("node", "env steps/s", *busy, "wait: gradient", "cores busy", "memory", "restarts")
    more = len(nodes) - LISTED
    caption = f"{more} more nodes, whose actors wait longer" if more > 0 else None
    style = {"box": None, "header_style": "bold", "caption_justify": "left"}
    table = Table(*titles, caption=caption, **style)
    for node, one in islice(nodes.items(), LISTED):
        shares = [1 - one[f"bubble_{stage}"] for stage in STAGES]
        shares += [one["wait_gradient"], one["cpu_fraction"]]
        shown = [f"{share:.0%}" for share in shares]
        memory = f"{one['rss_gb']:.1f} GB"
        table.add_row(node, f"{one['env_steps_per_s']:,.0f}", *shown, memory, f"{one['restarts']}")
    return table


def shares(parts: dict[str, float]) -> str:
    """Lists what is worth a word, the largest share first."""
    ordered = Counter(parts).most_common()
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005)


def histogram(title: str, counts: Counter, labels: dict[str, str]) -> Table:
    """Returns a table with a bar per bucket that is not empty; labels: of the buckets, in order."""
    table = Table(title, "share", "", box=None, header_style="bold")
    for key, label in labels.items():
        if counts[key]:
            share = counts[key] / counts.total()
            table.add_row(label, f"{share:.0%}", "█" * max(1, round(20 * share)))
    return table
