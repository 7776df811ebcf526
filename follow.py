"""Follows a run to its end. Read `Follower.follow` first."""

import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import report
from channel import WAKE, Channels, Record
from diagnostics import Warnings
from evaluation import Evaluations
from metrics import Interval, Measured, figures
from output import disk_trouble
from prepare import Setup
from processes import Crew, Interrupts, WorkerFailed
from run_folder import RunFolder
from tuning import Tuner


@dataclass(frozen=True)
class End:
    """How a run ended."""

    message: str  # what to tell the user
    status: int = 0  # of the process
    ratio: str = ""  # the ratio to start again at, unless the user wants it to stop


@dataclass(eq=False)
class Follower:
    """Writes metrics, watches workers, begins evaluations, hears Ctrl-C.

    The workers are the crew's, decisions are the tuner's, and what lasts is in the run folder."""

    setup: Setup
    folder: RunFolder
    crew: Crew
    channels: Channels
    reports: Connection  # lines and the last word of the first actor worker
    interrupts: Interrupts
    tracker: Any  # the W&B run, or None
    tuner: Tuner

    def __post_init__(self):
        self.config = self.setup.config
        self.interval: Interval | None = None  # once every worker is ready
        self.warnings = Warnings()
        # Of a run that is resumed, with warnings that were said.
        past = self.setup.resume["lines"] if self.setup.resume else []
        for line in past:
            self.warnings.of(line)
        # Time goes on from the run's last line, or where the ratio changes, from when that came.
        began = self.folder.appended or time.monotonic()
        began -= past[-1].get("time", 0.0) if past else 0.0
        self.channels.counters.set(0, "began", began)
        # Workers that come at another ratio keep the schedule, or each would be judged while it
        # evaluates as the one before did not.
        before = past if self.folder.appended else []
        run = (self.config, self.setup.spec.tasks, self.setup.version, self.channels.counters)
        self.evaluations = Evaluations(*run, before)
        self.display = report.progress(self.config.train.iterations, sys.stdout.isatty())
        batch = self.config.actor.batch * self.config.env.segment  # chunk steps
        self.beginning = report.Beginning(self.channels.counters, batch)
        self.advice = f"continue with: python train.py --resume {self.folder.name}"
        self.trouble = ""  # why metrics.jsonl or a checkpoint could not be written

    def follow(self) -> End:
        """Returns when the run is done, interrupted, or to start again. Raises WorkerFailed."""
        end = None
        with self.display.screen:
            while end is None:
                news = self.watch()
                self.say_how_it_begins()
                self.tune()
                end = self.hear(self.reports.recv()) if news else None
                if end is None and self.interrupts:
                    end = self.interrupt()
        return end

    def watch(self) -> bool:
        """Waits for the actor's news at most 0.25 s and returns whether there is some."""
        if self.evaluations.begins(self.channels.plane.version):
            # Env workers that wait for an action or for a version are to see it.
            for reply in self.channels.replies:
                reply.put([Record(0, 0, WAKE, 0, 0)])
        return self.crew.watch(self.reports)

    def say_how_it_begins(self) -> None:
        """Says how far the run is, until its first iteration is done."""
        if not self.display.history:
            collected = int(self.channels.pool["collected"].sum())
            if said := self.beginning.news(collected):
                self.display.say(said)

    def tune(self) -> None:
        """Begins to measure when every worker is ready, and follows the tuner's decisions."""
        counters = self.channels.counters
        if self.interval is None:
            if not counters.table[:, counters.index["ready"]].all():
                return
            self.begin()
        if said := self.tuner.watch():
            print(said, flush=True)
        if self.new_ratio:
            self.ask_to_save(1.0)

    def begin(self) -> None:
        """Begins to measure. A resumed run is changed only now: a start that fails leaves it."""
        self.interval = Interval(self.channels.counters, self.tuner.rows)
        if self.setup.resume:
            self.folder.go_on_from(self.setup.resume["lines"])
            self.channels.counters.set(0, "written", self.setup.version)
            self.folder.write("config.json", self.setup.saved)

    @property
    def new_ratio(self) -> str:
        """What the tuner wants instead of the ratio in use, or ""."""
        return self.tuner.ratio if self.tuner.ratio != self.config.train.parts else ""

    def ask_to_save(self, how: float) -> None:
        """Lets the actor save and report where: after the batch that it is training (1), or at once
        what was published last (2)."""
        self.channels.counters.set(0, "stop", max(how, self.channels.counters.get(0, "stop")))

    def hear(self, news: dict) -> End | None:
        """Takes in what the actor reports: a line of metrics.jsonl, or its last word."""
        self.trouble = self.trouble or news.get("trouble", "")
        if "done" in news:
            done = f"{news['done']} iterations done; checkpoint in"
            done = f"{done} {self.folder.path / 'checkpoints'}"
            return End(f"error: {self.trouble}; {done}", 1) if self.trouble else End(done)
        if "saved" in news and self.trouble:
            return End(f"error: {self.trouble}; saved {news['saved']}; {self.advice}", 1)
        if "saved" in news:
            how = f"interrupted; saved {news['saved']}; {self.advice}"
            if "dropped" in news:
                how = f"{news['dropped']} updates of an unfinished batch are dropped; {how}"
            return End(how, 130, "" if self.interrupts else self.new_ratio)
        self.measure(news)
        try:
            if news["iteration"] == self.config.train.iterations and self.config.env.evaluates:
                self.finish_evaluating()
        finally:  # the line counts, whatever becomes of the evaluation
            self.write(self.complete(news))
        return None

    def measure(self, line: dict) -> None:
        """Adds to the actor's part of a line what the launcher measures."""
        mine = self.measured()
        line |= figures([mine])
        self.tuner.iteration(line["version"], mine["cpu_s"])

    def measured(self) -> Measured:
        """Returns what this node's launcher measured since it was last asked."""
        if self.interval is None:
            self.begin()
        memory_gb, cpu_s = self.crew.used()
        return self.interval.measure(memory_gb + self.setup.pool_bytes / 1e9, cpu_s)

    def complete(self, line: dict) -> dict:
        """Adds what evaluations and the tuner have found until now."""
        return line | self.evaluations.report() | {"tuning": self.tuner.report()}

    def finish_evaluating(self) -> None:
        """Every run ends with an evaluation of the last weights. Nothing is left to hold up."""
        last = self.config.train.iterations
        while self.evaluations.news.get("eval_version") != last and not self.interrupts:
            self.watch()
            time.sleep(0.25)

    def write(self, line: dict) -> None:
        """Appends a line to metrics.jsonl and shows it.

        If that cannot be written, the run saves and stops, and no later line is tried: none may be
        missing between two others."""
        try:
            if not self.trouble:
                self.folder.append(line)
                self.channels.counters.set(0, "written", line["version"])
        except OSError as error:
            self.trouble = disk_trouble(error, self.folder.path / "metrics.jsonl")
            print(f"{self.trouble}: the run saves and stops", file=sys.stderr, flush=True)
            self.ask_to_save(1.0)
        self.display.show(line)
        for text in self.warnings.of(line):
            print(text, file=sys.stderr, flush=True)
        if self.tracker:
            try:
                self.tracker.log(report.flatten(line), step=line["iteration"])
            except Exception as error:  # whatever the mirror of a run ends with, the run goes on
                print(f"warning: Weights & Biases stops: {error}", file=sys.stderr, flush=True)
                self.tracker = None

    def interrupt(self) -> End | None:
        """Lets the actor save at the first interrupt; stops at once at a second Ctrl-C, or at
        start-up."""
        if self.interrupts.twice and not self.reports.poll():  # else "saved" may come first
            return End("interrupted twice: stopped without saving", 130)
        if self.channels.plane.version >= self.config.train.iterations:
            return None  # all is trained, and being saved
        if self.interval is None:
            if self.setup.resume:
                return End(f"interrupted; {self.advice}", 130)
            return End("interrupted before anything was trained", 130)
        if self.channels.counters.get(0, "stop") < 2:
            often = "again" if signal.SIGINT in self.interrupts else "twice"
            then = f"Ctrl-C {often} stops without saving"
            print(f"saving what was published last; {then}", flush=True)
        self.ask_to_save(2.0)
        return None

    def failed(self, failure: WorkerFailed) -> End:
        """Returns to the ratio before where this one never got going; else the run has failed."""
        past = self.tuner.past
        now = self.config.train.parts
        if not past.left or self.folder.lines()[-1]["version"] > self.setup.version:
            return End(f"error: {failure}", 1)
        found = f"at {now} the workers did not come to an iteration: {failure}"
        print(f"ratio {past.left} again: {found}", flush=True)
        return End(f"interrupted; {self.advice}", 130, past.go_back(now))
