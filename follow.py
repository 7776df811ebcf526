"""Follows a run to its end. Read `Follower.follow` first."""

import contextlib
import re
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
from films import forget
from html_report import Watcher
from metrics import Interval, Measured, figures
from nodes import Ended, NodeLost, Nodes
from output import disk_trouble
from prepare import Setup
from processes import Crew, Interrupts, WorkerFailed
from run_folder import RunFolder, newest_version
from tuning import Tuner

EXPLAIN_S = 6.0  # that a lost connection may wait for its cause
# What Gloo and NCCL say where another rank is gone, and a launcher where all wait for one.
LOST = r"closed by peer|reset by peer|Broken pipe|pair closure|remote process exited|NCCL"
LOST += r"|nothing happened for .* for gradient"


@dataclass(frozen=True)
class End:
    """How a run ended."""

    message: str  # what to tell the user
    status: int = 0  # of the process
    ratio: str = ""  # the ratio to start again at, unless the user wants it to stop


@dataclass(eq=False)
class Follower:
    """Writes metrics, watches workers, begins evaluations, hears Ctrl-C.

    The workers are the crew's, decisions are the tuner's, and what lasts is in the run folder. Of
    several nodes the first one decides and writes, and the others follow its words."""

    setup: Setup
    folder: RunFolder
    crew: Crew
    channels: Channels
    reports: Connection  # lines and the last word of the first actor worker
    interrupts: Interrupts
    tracker: Any  # the W&B run, or None
    tuner: Tuner
    nodes: Nodes

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
        first = "" if self.nodes.first else self.nodes.names[0]
        self.display = report.progress(self.config.train.iterations, sys.stdout.isatty(), first)
        watched = self.config.train.watch and self.nodes.first
        self.watcher = Watcher(self.folder) if watched else None
        # What other nodes have measured, by version and node.
        self.elsewhere: dict[int, dict[int, Measured]] = {}
        batch = self.config.actor.batch * self.config.env.segment  # chunk steps
        self.beginning = report.Beginning(self.channels.counters, batch)
        self.asked_elsewhere = False  # whether another node was interrupted
        # What a user is told to type, on this node, or of several on each.
        command = f"train.py --resume {self.folder.name}"
        everywhere = f"torchrun … -- {command}, on all nodes (it is on {self.nodes.names[0]})"
        self.advice = f"continue with: {everywhere if self.nodes.several else f'python {command}'}"
        self.trouble = ""  # why metrics.jsonl or a checkpoint could not be written

    def follow(self) -> End:
        """Returns when the run is done, interrupted, failed, or to start again. Other nodes hear
        how it has ended."""
        try:
            end = self.go_on()
        except (WorkerFailed, NodeLost) as failure:
            end = self.failed(failure)
        except Ended as elsewhere:
            end = self.ended(elsewhere)
        self.nodes.end(end.message, end.status, end.ratio)
        return end

    def go_on(self) -> End:
        """Follows a run that goes well. Raises WorkerFailed, Ended, NodeLost."""
        end = None
        with self.display.screen:
            while end is None:
                news = self.watch()
                self.say_how_it_begins()
                if self.watcher:
                    self.watcher.look()
                self.tune()
                end = self.hear(self.reports.recv()) if news else None
                if end is None and self.is_interrupted:
                    end = self.interrupt()
        return end

    def watch(self) -> bool:
        """Waits for the actor's news at most 0.25 s and returns whether there is some. Raises
        WorkerFailed, Ended, NodeLost."""
        for node, word in self.nodes.news():
            self.take(node, word)
        self.evaluate()
        self.crew.elsewhere = self.nodes.work_elsewhere
        self.nodes.work = self.crew.done
        return self.crew.watch(self.reports)

    def evaluate(self) -> None:
        """Begins a round of evaluation where one is due. The first node tells the others, which
        hand over their shares."""
        if not self.nodes.first:
            ended = self.evaluations.hand_over()
            if ended is not None:
                self.nodes.tell({"kind": "evaluated", "outcomes": ended})
        version = self.channels.plane.version
        if self.evaluations.begins(version):
            if self.nodes.first:
                self.nodes.tell({"kind": "evaluates", "version": version})
            # Env workers that wait for an action or for a version are to see it.
            for reply in self.channels.replies:
                reply.put([Record(0, 0, WAKE, 0, 0)])

    def say_how_it_begins(self) -> None:
        """Says how far the run is, until its first iteration is done."""
        if not self.display.history:
            collected = int(self.channels.pool["collected"].sum())
            if said := self.beginning.news(collected):
                self.display.say(said)
                if self.watcher:
                    self.watcher.write(said)

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
            forget(self.folder.path / "videos", self.setup.version)
            self.channels.counters.set(0, "written", self.setup.version)
            self.folder.write("config.json", self.setup.saved)

    def take(self, node: int, word: dict) -> None:
        """Takes in what another node says."""
        if word["kind"] == "stop" and self.nodes.first:
            self.asked_elsewhere = True
            print(f"{self.nodes.names[node]} was told to stop", flush=True)
        elif word["kind"] == "stop":
            self.channels.counters.set(0, "stop", word["how"])
        elif word["kind"] == "measured":
            self.elsewhere.setdefault(word["version"], {})[node] = word["measured"]
        elif word["kind"] == "evaluates":
            self.evaluations.due = word["version"]
        elif word["kind"] == "evaluated":
            self.evaluations.hear(word["outcomes"])

    @property
    def new_ratio(self) -> str:
        """What the tuner wants instead of the ratio in use, or "". It is decided once."""
        if not self.nodes.first:
            return ""
        return self.tuner.ratio if self.tuner.ratio != self.config.train.parts else ""

    def ask_to_save(self, how: float) -> None:
        """Lets the actor save and report where: after the batch that it is training (1), or at once
        what was published last (2)."""
        if how > self.channels.counters.get(0, "stop"):
            self.channels.counters.set(0, "stop", how)
            self.nodes.tell({"kind": "stop", "how": how})

    def hear(self, news: dict) -> End | None:
        """Takes in what the actor reports: a line of metrics.jsonl, or its last word."""
        self.trouble = self.trouble or news.get("trouble", "")
        if not self.nodes.first:
            if "iteration" in news:
                self.hand_over(news)
            return None  # the first node says when it is the end
        if "done" in news:
            count = news["done"]
            done = f"{count} iteration{'s' * (count != 1)} done; checkpoint in"
            done = f"{done} {self.folder.path / 'checkpoints'}"
            done += f" on {self.nodes.name}" if self.nodes.several else ""
            return End(f"error: {self.trouble}; {done}", 1) if self.trouble else End(done)
        if "saved" in news and self.trouble:
            return End(f"error: {self.trouble}; saved {news['saved']}; {self.advice}", 1)
        if "saved" in news:
            how = f"interrupted; saved {news['saved']}; {self.advice}"
            if "dropped" in news:
                count = news["dropped"]
                what = f"{count} update{'s' * (count != 1)} of an unfinished batch"
                how = f"{what} {'is' if count == 1 else 'are'} dropped; {how}"
            return End(how, 130, "" if self.is_interrupted else self.new_ratio)
        mine = self.measured(news)
        try:
            self.wait_for_others(news["version"])
            if news["iteration"] == self.config.train.iterations and self.config.env.evaluates:
                self.finish_evaluating()
        finally:  # the line counts, whatever becomes of others and of the evaluation
            others = self.elsewhere.pop(news["version"], {})
            news |= figures({0: mine} | others)
            self.write(self.complete(news))
        return None

    def hand_over(self, line: dict) -> None:
        """Tells the first node what this one has measured."""
        mine = {"kind": "measured", "version": line["version"], "measured": self.measured(line)}
        self.nodes.tell(mine)
        self.display.show(line)

    def wait_for_others(self, version: int) -> None:
        """Waits until all other nodes have measured an iteration."""
        while len(self.elsewhere.get(version, {})) < self.nodes.count - 1:
            self.watch()
            time.sleep(0.01)

    def measured(self, line: dict) -> Measured:
        """Returns what this node's launcher measured until a line came, since the last one."""
        if self.interval is None:
            self.begin()
        memory_gb, cpu_s = self.crew.used()
        self.tuner.iteration(line["version"], cpu_s)
        return self.interval.measure(memory_gb + self.setup.pool_bytes / 1e9, cpu_s)

    def complete(self, line: dict) -> dict:
        """Adds what evaluations and the tuner have found until now."""
        return line | self.evaluations.report() | {"tuning": self.tuner.report()}

    def finish_evaluating(self) -> None:
        """Every run ends with an evaluation of the last weights. Nothing is left to hold up."""
        last = self.config.train.iterations
        while self.evaluations.news.get("eval_version") != last and not self.is_interrupted:
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
        if self.watcher:
            self.watcher.news = True
        for text in self.warnings.of(line):
            print(text, file=sys.stderr, flush=True)
        if self.tracker:
            try:
                self.tracker.log(report.flatten(line), step=line["iteration"])
            except Exception as error:  # whatever the mirror of a run ends with, the run goes on
                print(f"warning: Weights & Biases stops: {error}", file=sys.stderr, flush=True)
                self.tracker = None

    @property
    def is_interrupted(self) -> bool:
        return bool(self.interrupts or self.asked_elsewhere)

    def interrupt(self) -> End | None:
        """Lets the actor save at the first interrupt; stops at once at a second Ctrl-C, or at
        start-up."""
        if self.interrupts.twice and not self.reports.poll():  # else "saved" may come first
            return End(f"{self.where}interrupted twice: stopped without saving", 130)
        if self.channels.plane.version >= self.config.train.iterations:
            return None  # all is trained, and being saved
        if not self.nodes.first:
            if self.channels.counters.get(0, "stop") < 2:
                print(f"{self.nodes.names[0]} saves what was published last", flush=True)
            self.ask_to_save(2.0)
            return None
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

    @property
    def where(self) -> str:
        """Names this node in a sentence, where there are others."""
        return f"{self.nodes.name}: " if self.nodes.several else ""

    def ended(self, elsewhere: Ended) -> End:
        """Returns how the run ends where another node has said that it does."""
        said = str(elsewhere)
        if self.nodes.first and elsewhere.status == 1:
            return self.failed(said.removeprefix("error: "))
        return End(said, elsewhere.status, elsewhere.ratio)

    def sentence(self, failure: Exception | str) -> str:
        """Names this node where a worker of it has failed; other sentences name theirs."""
        return f"{self.where if isinstance(failure, WorkerFailed) else ''}{failure}"

    def cause(self, failure: Exception | str) -> str:
        """Returns why a run has failed; the first node asks. Where one rank is gone, those of
        other nodes may be the first to say something: that they have lost it."""
        mine = isinstance(failure, WorkerFailed)
        said = self.sentence(failure)
        late = time.monotonic() + EXPLAIN_S
        while self.nodes.several and re.search(LOST, said) and time.monotonic() < late:
            try:
                if not mine:
                    self.crew.watch(self.reports)
                for _ in self.nodes.news():
                    pass
                time.sleep(0.1)
            except WorkerFailed as failed:
                mine = True
                said = self.sentence(failed)
            except Ended as elsewhere:
                said = str(elsewhere).removeprefix("error: ")
            except NodeLost as lost:
                return str(lost)
        lost = re.search(LOST, said)
        return lost and self.nodes.silent() or said

    def end_with(self, failure: str) -> End:
        """Returns the end of a run that failed. Of several nodes all say where it can go on, and
        error.txt has the cause beside what workers wrote there."""
        if not self.nodes.several:
            return End(f"error: {failure}", 1)
        with contextlib.suppress(OSError), open(self.folder.path / "error.txt", "a") as file:
            file.write(f"{failure}\n")
        saved = newest_version(self.folder.path)
        where = f"; newest checkpoint {saved:06d}; {self.advice}" if saved is not None else ""
        return End(f"error: {failure}{where}", 1)

    def failed(self, failure: Exception | str) -> End:
        """Returns to the ratio before where this one never got going; else the run has failed.

        Where it is not the first node's affair, that one says what comes of it."""
        if not self.nodes.first:
            said = self.sentence(failure)
            self.nodes.end(f"error: {said}", 1)
            try:
                self.nodes.wait_for("end", 2 * EXPLAIN_S)
            except Ended as end:
                return self.ended(end)
            except NodeLost as lost:
                known = isinstance(failure, WorkerFailed) and not re.search(LOST, said)
                return End(f"error: {said if known else self.nodes.silent() or lost}", 1)
        failure = self.cause(failure)
        past = self.tuner.past
        now = self.config.train.parts
        if not past.left or self.folder.lines()[-1]["version"] > self.setup.version:
            return self.end_with(failure)
        found = f"at {now} the workers did not come to an iteration: {failure}"
        print(f"ratio {past.left} again: {found}", flush=True)
        return End(f"interrupted; {self.advice}", 130, past.go_back(now))
