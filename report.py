"""Tells a person how a run goes: start-up lines, a line or a live panel per iteration, W&B.

Left out: what a finished run says of itself (summary.py), and warnings (diagnostics.py).
"""

import json
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from channel import Counters
from config import Config, to_json
from errors import UserError
from metrics import STAGES
from run_folder import RunFolder

SAY_S = 10.0  # seconds between two sentences while nothing is trained yet
RECENT = 10  # iterations that success and time left are averaged over


def batch_line(config: Config, segment: int) -> str:
    """Says what one iteration trains, on all nodes; segment: chunk steps of a trajectory."""
    actor = config.actor
    nodes = config.train.nodes
    batch = actor.batch * nodes
    trained = f"{batch} trajectories = {batch * segment} chunk steps"
    line = f"{trained}, {actor.steps} optimizer step{'s' * (actor.steps > 1)} per batch"
    if nodes > 1:
        envs = f"{config.env.envs * nodes} envs, {config.env.eval_envs * nodes} evaluation envs"
        line = f"{nodes} nodes in all: {envs}, minibatches of {actor.minibatch * nodes}; {line}"
    return line + ", computed in bfloat16" * (config.train.precision == "bfloat16")


def number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Beginning:
    """Says how far a run is until its first iteration is done, which may take minutes."""

    def __init__(self, counters: Counters, batch: int):
        self.counters = counters
        self.batch = batch  # chunk steps that the first iteration needs
        self.began = time.monotonic()
        self.said = self.began  # when the newest sentence was
        self.all_ready = False

    def news(self, collected: int) -> str:
        """Returns a sentence when all workers are ready and every SAY_S seconds, else "".

        collected: chunk steps since the workers started."""
        now = time.monotonic()
        ready = int(self.counters.table[:, self.counters.index["ready"]].sum())
        workers = len(self.counters.table)
        just_ready = ready == workers and not self.all_ready
        if not just_ready and now - self.said < SAY_S:
            return ""
        self.said = now
        self.all_ready |= just_ready
        after = f"after {duration(now - self.began)}"
        if just_ready:
            return f"all {workers} workers are ready {after}: they collect the first batch"
        if not self.all_ready:
            return f"{ready} of {workers} workers are ready {after}"
        if collected < self.batch:
            return f"first batch: {collected} of {self.batch} chunk steps are collected {after}"
        return f"first batch: all {self.batch} chunk steps are collected; in training {after}"


class Display:
    """Shows a run's progress. This one prints plain lines."""

    screen: AbstractContextManager = nullcontext()  # is to be entered while the run goes on

    def __init__(self, iterations: int):
        self.iterations = iterations  # of the whole run
        self.history: list[dict] = []  # lines of metrics.jsonl shown so far

    def say(self, text: str) -> None:
        """Shows a sentence about the time before the first iteration."""
        print(text, flush=True)

    def show(self, line: dict) -> None:
        self.history.append(line)
        busy = " ".join(f"{stage} {1 - line[f'bubble_{stage}']:4.0%}" for stage in STAGES)
        print(*self.facts(line["success_rate"]), f"busy: {busy}", sep="  ", flush=True)

    def facts(self, success: float | None) -> list[str]:
        """Returns what is told of the newest line; success: of training episodes."""
        line = self.history[-1]
        return [
            f"iteration {line['iteration']:4d}/{self.iterations}",
            f"{line['env_steps_per_s']:6.0f} env steps/s",
            f"success {number(success, '.1%'):>5s}",
            f"held-out {self.held_out()}",
            f"reward {number(line['reward'], '.3g')}",
            f"KL {number(line['approx_kl'], '.3g')}",
            f"staleness {line['staleness_mean']:.2f}",
            f"{duration(line['time'])}, {self.time_left()} left",
        ]

    def held_out(self) -> str:
        """Returns the newest evaluation's success rate and its version."""
        for line in reversed(self.history):
            if "eval_success_rate" in line:
                return f"{line['eval_success_rate']:.1%} at {line['eval_version']}"
        return "–"

    def time_left(self) -> str:
        """Says how long the rest of the run takes if it goes on as fast as of late. The first line
        does not tell: start-up is a part of its time."""
        since = self.history[-RECENT:][0]
        last = self.history[-1]
        if since is last:
            return "?"
        pace = (last["time"] - since["time"]) / (last["iteration"] - since["iteration"])
        return duration(pace * (self.iterations - last["iteration"]))


class Panel(Display):
    """Shows a live panel on a terminal instead."""

    def __init__(self, iterations: int):
        super().__init__(iterations)
        self.screen = Live("starting workers …", refresh_per_second=4)

    def say(self, text: str) -> None:
        self.screen.update(text)

    def show(self, line: dict) -> None:
        self.history.append(line)
        rates = [line["success_rate"] for line in self.history[-RECENT:]]
        rates = [rate for rate in rates if rate is not None]
        facts = self.facts(sum(rates) / len(rates) if rates else None)
        head = Table.grid(padding=(0, 3))
        head.add_row(*facts[:4])
        head.add_row(*facts[4:])
        bars = Table.grid(padding=(0, 2))
        for stage in STAGES:
            busy = 1.0 - line[f"bubble_{stage}"]
            bar = ProgressBar(1.0, busy, width=40)
            bars.add_row(f"{stage:7s}", bar, f"busy {busy:4.0%}", reasons(line["waits"], stage))
        self.screen.update(Group(head, bars, ProgressBar(self.iterations, line["iteration"], 60)))


def reasons(waits: dict[str, float], stage: str) -> str:
    """Says what a stage waits for, the longest wait first; waits: as in a line of metrics.jsonl."""
    shares = [(share, name.split(":")) for name, share in waits.items() if share >= 0.01]
    said = [f"{cause} {share:.0%}" for share, (who, cause) in sorted(shares)[::-1] if who == stage]
    return f"waits for {', '.join(said)}" if said else ""


class Elsewhere(Display):
    """Says on another node than the first how its workers begin, and then once where to look."""

    def __init__(self, iterations: int, first: str):
        super().__init__(iterations)
        self.first = first  # names the first node's machine

    def show(self, line: dict) -> None:
        if not self.history:
            what = "progress, warnings of training, metrics and checkpoints are on the first node"
            print(f"this node's first iteration is done: {what}, {self.first}", flush=True)
        self.history = [line]


def progress(iterations: int, interactive: bool, first: str = "") -> Display:
    """Returns what shows a run's progress: a live panel, or plain lines off a terminal. first: on
    another node than the first one, the name of that one's machine."""
    if first:
        return Elsewhere(iterations, first)
    return Panel(iterations) if interactive else Display(iterations)


def mirror(config: Config, folder: RunFolder):
    """Returns the run of Weights & Biases that metrics are logged to, or None. Raises UserError.

    A run that goes on, resumed or at another ratio, goes on there too: wandb.id has its id."""
    if config.train.wandb == "off":
        return None
    import wandb

    remembered = folder.path / "wandb.id"
    run_id = remembered.read_text() if remembered.is_file() else None
    try:
        tracker = wandb.init(
            project="vla3",
            name=folder.path.name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=folder.path,
            mode=config.train.wandb,
            config=json.loads(to_json(config)),
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        # The next start may have the name of this folder. W&B may still be writing there.
        if folder.made:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise UserError(f"Weights & Biases: {str(error).strip()} Or give --wandb offline") from None
    folder.write("wandb.id", tracker.id)
    if config.train.wandb == "offline":
        print(f"Weights & Biases is offline: later, run wandb sync {Path(tracker.dir).parent}")
    return tracker


def flatten(line: dict, above: str = "") -> dict[str, float]:
    """Returns every number of a nested line by its path, such as `waits/env:action`."""
    out = {}
    for name, value in line.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{above}{name}/")
        elif isinstance(value, int | float):
            out[above + name] = value
    return out
