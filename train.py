"""Trains a vision-language-action policy by asynchronous reinforcement learning: reads the flags,
starts the workers, follows them.

    python train.py                                 the embedded default on this machine, GPU or not
    python train.py --model pi05 --ratio 3:1        the same, with parts named
    python train.py --preset sync-colocated         a baseline of the paper: same code
    python train.py --resume NAME                   continue runs/NAME from its newest checkpoint

It holds no tensor work of its own: flags → `prepare` → shared memory → spawn → `Follower` → run
folder. With `--ratio auto` the run may start again at another ratio, from a checkpoint saved for
the purpose (`start_again`). Left out: several machines.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch.multiprocessing as mp
import tyro

import actor_worker
import diagnostics
import env_worker
import metrics
import rollout_worker
import summary
import tuning
from channel import VERSION, Channels, Counters, IndexQueue, Record, WeightPlane
from config import (
    PRESETS,
    WORKERS,
    Config,
    UserError,
    completed,
    existing_run,
    exit_on_user_error,
    flag_of,
    from_json,
    from_preset,
    parse_ratio,
    require,
    run_path,
    to_json,
)
from prepare import Setup, memory_report, prepare
from processes import (
    Crew,
    Job,
    WorkerFailed,
    keep_interrupts,
    note_interrupts,
    replace_this_process,
    was_interrupted,
)

# ---------------------------------------------------------------- the command line


@dataclass
class FirstLook:
    """The two flags that decide what the others default to."""

    preset: str = "full"
    resume: str = ""


def parse(args: list[str]) -> Config:
    """Turns the command line into settings.

    A preset or a resumed run's config.json supplies the defaults, which flags override.
    """
    known = [word for word in args if word not in ("-h", "--help")]
    look, _ = tyro.cli(FirstLook, args=known, return_unknown_args=True)
    # A wrong preset is named by the second look.
    default = from_preset(look.preset if look.preset in PRESETS else "full")
    if look.resume:
        saved = existing_run(look.resume) / "config.json"
        require(
            not gives(args, "--run"),
            f"--run and --resume {look.resume} exclude each other: a resumed run goes on in its "
            "own folder",
        )
        default = from_json(saved)
        default = completed(default, ratio_from=default.train.parts)
        if default.train.ratio == "auto" or gives(args, "--ratio", "--placement"):
            # Worker counts follow from the ratio, as far as no flag gave them.
            given = default.train.workers_given
            default = completed(default, **dict(zip(WORKERS, given, strict=True)))
    config = tyro.cli(Config, args=args, default=default, config=(tyro.conf.OmitArgPrefixes,))
    ratio_from = config.train.ratio_from
    if ratio_from not in ("", default.train.ratio_from):
        parse_ratio(ratio_from, "--ratio-from")
        require(
            config.train.ratio == "auto",
            f"--ratio-from {ratio_from} is for --ratio auto: leave out one of them",
        )
    return config


def gives(args: list[str], *flags: str) -> bool:
    """Whether one of these flags is given. "--run=x" and "--ratio_from x" are ways to do so."""
    return any(word.partition("=")[0].replace("_", "-") in flags for word in args)


def without(args: list[str], *flags: str) -> list[str]:
    """Leaves out these flags, each of which takes one value."""
    kept = []
    words = iter(args)
    for word in words:
        if not gives([word], *flags):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


# ---------------------------------------------------------------- start


def connect(setup: Setup) -> Channels:
    """Makes the shared memory and the queues that the workers meet in."""
    env_workers, rollout_workers, actor_workers = setup.placement.workers().values()
    gpu = next((device for device in setup.placement.actor_devices if device != "cpu"), "cpu")
    columns = metrics.columns(setup.config.env.eval_episodes)
    return Channels(
        pool=setup.pool(),
        plane=WeightPlane(setup.weights, gpu, setup.version),
        counters=Counters(env_workers + rollout_workers + actor_workers, columns),
        requests=tuple(IndexQueue() for _ in range(rollout_workers)),
        replies=tuple(IndexQueue() for _ in range(env_workers)),
        finished=tuple(IndexQueue() for _ in range(actor_workers)),
    )


def jobs(
    setup: Setup, channels: Channels, folder: metrics.RunFolder, report: Connection
) -> list[Job]:
    """Lists what every worker is to do. A worker's place in the list is its row of the counters."""
    placement = setup.placement
    spec = setup.spec
    plans = []
    for rank, device in enumerate(placement.actor_devices):
        news = report if rank == 0 else None
        args = (spec, device, channels, folder.path, setup.resume, news)
        plans.append(("actor", rank, actor_worker.run, args, placement.actor_threads, {}))
    for rank, device in enumerate(placement.rollout_devices):
        args = (spec, device, channels)
        plans.append(("rollout", rank, rollout_worker.run, args, placement.rollout_threads, {}))
    for rank, device in enumerate(placement.env_devices):
        draws_on = {} if device == "cpu" else {"MUJOCO_EGL_DEVICE_ID": device.split(":")[1]}
        watching = channels._replace(plane=channels.plane.watch())
        args = (setup.header, device, watching, setup.version)
        plans.append(("env", rank, env_worker.run, args, 1, draws_on))

    trace = folder.spans if setup.config.train.trace else None
    listed = []
    for stage, rank, target, args, threads, environment in plans:
        meter = metrics.Meter(f"{stage}-{rank}", len(listed), channels.counters, trace)
        args = (rank, setup.config, *args, meter)
        replaceable = stage == "env"
        listed.append(Job(meter.name, target, args, threads, meter, environment, replaceable))
    return listed


def mirror(setup: Setup, folder: metrics.RunFolder, run_id: str | None):
    """Returns the run of Weights & Biases that metrics are logged to, if any.

    run_id: of the one that goes on, where this run has started again.
    """
    train = setup.config.train
    if train.wandb == "off":
        return None
    import wandb

    try:
        return wandb.init(
            project="vla3",
            name=folder.path.name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=folder.path,
            mode=train.wandb,
            config=json.loads(to_json(setup.config)),
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        if not train.resume:  # made for this start, and the next one may have its name
            shutil.rmtree(folder.path, ignore_errors=True)  # it may still be writing
        raise UserError(f"Weights & Biases: {str(error).strip()} Or give --wandb offline") from None


def announce(setup: Setup, folder: metrics.RunFolder, again: bool) -> None:
    """Says what is about to run. again: it ran until now, at another ratio."""
    if again:
        print(setup.placement.line, flush=True)
        return
    if setup.resume:
        before = json.loads((folder.path / "config.json").read_text())
        if changed := differences(before, json.loads(setup.saved)):
            print(f"other settings than this run had so far: {', '.join(changed)}")
    print(setup.placement.line, f"{setup.note}run folder {folder.path}", sep="\n", flush=True)


def differences(before: dict, now: dict) -> list[str]:
    """Lists the settings that differ between two config.json, as they are now."""
    own = ("checkpoint", "resume", "run", "ratio_from", "workers_given")  # of every start
    return [
        f"{flag_of(name)[2:]} {in_words(value)} (was {in_words(before.get(stage, {}).get(name))})"
        for stage, values in now.items()
        for name, value in values.items()
        if value != before.get(stage, {}).get(name) and name not in own
    ]


def in_words(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------- follow


@dataclass(frozen=True)
class End:
    """How a run ended."""

    message: str  # what to tell the user
    status: int = 0  # of the process
    ratio: str = ""  # the ratio to start again at, unless the user wants it to stop


class Follower:
    """Follows a run to its end: writes metrics, watches workers, hears Ctrl-C.

    The workers are the crew's, decisions are the tuner's, and what lasts is in the run folder.
    """

    def __init__(
        self,
        setup: Setup,
        folder: metrics.RunFolder,
        crew: Crew,
        channels: Channels,
        reports: Connection,
        interrupts: list[float],
        tracker,
        tuner: tuning.Tuner,
    ):
        self.setup = setup
        self.config = setup.config
        self.folder = folder
        self.crew = crew
        self.channels = channels
        self.reports = reports  # lines and the last word of the first actor worker
        self.interrupts = interrupts  # monotonic seconds of every Ctrl-C
        self.tracker = tracker
        self.tuner = tuner
        self.began = folder.appended or time.monotonic()
        self.interval: metrics.Interval | None = None  # once every worker is ready
        self.warnings = diagnostics.Warnings()
        past = folder.lines()  # of a run that is resumed
        for line in past:
            self.warnings.of(line)  # said before
        self.earlier = past[-1] if past else {}
        self.ledger = metrics.Ledger(self.earlier)
        # Workers that come at another ratio keep the schedule, or each would be judged while it
        # evaluates as the one before did not.
        before = past if folder.appended else []
        self.evaluations = metrics.Evaluations(
            self.config, setup.spec.tasks, setup.version, channels.counters, before
        )
        iterations = self.config.train.iterations
        self.show, self.display = metrics.progress(iterations, sys.stdout.isatty())

    def follow(self) -> End:
        """Returns when the run is done, interrupted, or to start again. Raises WorkerFailed."""
        with self.display:
            while True:
                news = self.watch()
                self.tune()
                end = self.hear(self.reports.recv()) if news else None
                if end is None and self.interrupts:
                    end = self.interrupt()
                if end is not None:
                    return end

    def watch(self) -> bool:
        """Waits for the actor's news at most 0.25 s and returns whether there is some."""
        if self.evaluations.begins(self.channels.plane.version):
            # Env workers that wait for an action or for a version are to see it.
            for reply in self.channels.replies:
                reply.put([Record(0, 0, VERSION, 0)])
        return self.crew.watch(self.reports)

    def tune(self) -> None:
        """Begins to measure when every worker is ready, and follows the tuner's decisions."""
        counters = self.channels.counters
        if self.interval is None:
            if not counters.table[:, counters.index["ready"]].all():
                return
            self.interval = metrics.Interval(counters, self.tuner.rows)
        if said := self.tuner.watch():
            print(said, flush=True)
        if self.tuner.ratio != self.config.train.parts:
            self.ask_to_save()

    def ask_to_save(self) -> None:
        """The actor saves after the batch that it is training, and reports where."""
        self.channels.counters.set(0, "stop", 1.0)

    def hear(self, news: dict) -> End | None:
        """Takes in what the actor reports: a line of metrics.jsonl, or its last word."""
        if "done" in news:
            checkpoints = self.folder.path / "checkpoints"
            return End(f"{news['done']} iterations done; checkpoint in {checkpoints}")
        if "saved" in news:
            how = f"interrupted; saved {news['saved']}; {self.advice()}"
            ratio = self.tuner.ratio if self.tuner.ratio != self.config.train.parts else ""
            return End(how, 130, "" if self.interrupts else ratio)
        self.write(self.complete(news))
        return None

    def complete(self, line: dict) -> dict:
        """Adds to the actor's part of a line what the launcher knows."""
        self.interval = self.interval or metrics.Interval(self.channels.counters, self.tuner.rows)
        memory_gb, cpu_s = self.crew.used()
        line |= self.interval.measure()
        line["time"] = time.monotonic() - self.began
        line["rss_gb"] = memory_gb + self.setup.pool_gb()
        if line["iteration"] == self.config.train.iterations and self.config.env.evaluates:
            self.finish_evaluating()
        line |= self.evaluations.report() | self.interval.totals()
        for name in ("time", *metrics.TOTALS):
            line[name] += self.earlier.get(name, 0)
        line |= self.ledger.of(line, int(self.channels.pool["collected"].sum()))
        self.tuner.iteration(line["version"], cpu_s)
        line["tuning"] = self.tuner.report()
        return line

    def finish_evaluating(self) -> None:
        """Every run ends with an evaluation of the last weights. Nothing is left to hold up."""
        last = self.config.train.iterations
        while self.evaluations.news.get("eval_version") != last and not self.interrupts:
            self.watch()
            time.sleep(0.25)

    def write(self, line: dict) -> None:
        """Appends a line to metrics.jsonl and shows it."""
        self.folder.append(line)
        self.show(line)
        for text in self.warnings.of(line):
            print(text, file=sys.stderr, flush=True)
        if self.tracker:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
            self.tracker.log(numbers, step=line["iteration"])

    def interrupt(self) -> End | None:
        """Lets the actor save at the first Ctrl-C; stops at once at the second, or at start-up."""
        if self.channels.plane.version >= self.config.train.iterations:
            return None  # all is trained and saved
        if self.interval is None:
            if self.setup.resume:
                return End(f"interrupted; {self.advice()}", 130)
            return End("interrupted before anything was trained", 130)
        if len(self.interrupts) > 1 and not self.reports.poll():  # else "saved" may come first
            return End("interrupted twice: stopped without saving", 130)
        if not self.channels.counters.get(0, "stop"):
            print(
                "finishing the batch that is being trained, then saving; Ctrl-C again stops "
                "without saving",
                flush=True,
            )
        self.ask_to_save()
        return None

    def failed(self, failure: WorkerFailed) -> End:
        """Returns to the ratio before where this one never got going; else the run has failed."""
        past = self.tuner.past
        now = self.config.train.parts
        if not past.left or self.folder.lines()[-1]["version"] > self.setup.version:
            return End(f"error: {failure}", 1)
        print(
            f"ratio {past.left} again: at {now} the workers did not come to an iteration: "
            f"{failure}",
            flush=True,
        )
        return End(f"interrupted; {self.advice()}", 130, past.go_back(now))

    def advice(self) -> str:
        return f"continue with: python train.py --resume {self.folder.name}"


# ---------------------------------------------------------------- start again at another ratio


@dataclass
class Legacy:
    """What a run that starts again at another ratio leaves to itself, in tuning.json.

    `process` tells a file of an earlier start apart: the process keeps its number.
    """

    process: int = field(default_factory=os.getpid)
    past: tuning.Past = field(default_factory=tuning.Past)  # what the tuner knows
    appended: float | None = None  # monotonic seconds, when the newest line was written
    tracker: str | None = None  # id of the W&B run
    heard: int = -1  # the pipe of `keep_interrupts`

    def write(self, folder: metrics.RunFolder) -> None:
        known = asdict(self)
        known["past"]["rejected"] = sorted(self.past.rejected)
        folder.write("tuning.json", json.dumps(known))

    @classmethod
    def take(cls, path: Path) -> "Legacy | None":
        """Reads and removes the file, if the run in this folder has just started again."""
        file = path / "tuning.json"
        if not file.is_file():
            return None
        known = json.loads(file.read_text())
        file.unlink()
        past = known["past"] | {"rejected": set(known["past"]["rejected"])}
        found = cls(**known | {"past": tuning.Past(**past)})
        return found if found.process == os.getpid() else None


def start_again(
    ratio: str, folder: metrics.RunFolder, past: tuning.Past, interrupts: list[float], tracker
) -> None:
    """Starts the run again in this process, from its checkpoint, with the flags that were given.

    It returns only if Ctrl-C came before. The new start hears what comes later.
    """
    heard = keep_interrupts()
    if interrupts:
        return
    left = Legacy(past=past, appended=folder.appended, tracker=tracker and tracker.id, heard=heard)
    left.write(folder)
    if tracker:
        tracker.finish()
    flags = without(sys.argv[1:], "--run", "--resume", "--ratio-from")
    replace_this_process([*flags, "--resume", folder.name, "--ratio-from", ratio])


# ---------------------------------------------------------------- a whole run


def main(config: Config) -> int:
    """Runs to the end and returns the exit status."""
    setup = prepare(config)
    train = setup.config.train
    if train.memory_report:
        memory_report(setup)
        return 0
    path = run_path(train.resume or train.run or time.strftime("%Y%m%d-%H%M%S"))
    legacy = Legacy.take(path)
    folder = metrics.RunFolder(path, resume=bool(train.resume), keep_spans=legacy is not None)
    interrupts = note_interrupts()
    if legacy and was_interrupted(legacy.heard):
        interrupts.append(time.monotonic())
    tracker = mirror(setup, folder, legacy and legacy.tracker)
    folder.appended = legacy and legacy.appended
    past = legacy.past if legacy else tuning.Past()
    if setup.resume:
        folder.truncate(setup.version)
    announce(setup, folder, again=legacy is not None)
    folder.write("config.json", setup.saved)

    end = run_crew(setup, folder, interrupts, tracker, past)
    if end.ratio:
        start_again(end.ratio, folder, past, interrupts, tracker)
    folder.finish()
    summary.draw(path)
    print(end.message, file=sys.stderr if end.status == 1 else sys.stdout)
    return end.status


def run_crew(
    setup: Setup,
    folder: metrics.RunFolder,
    interrupts: list[float],
    tracker,
    past: tuning.Past,
) -> End:
    """Starts all workers, follows them, and ends them."""
    channels = connect(setup)
    reports, report = mp.Pipe(duplex=False)
    listed = jobs(setup, channels, folder, report)
    env, train = setup.config.env, setup.config.train
    crew = Crew(listed, channels.counters, folder.path, env.restarts, train.timeout_s)
    rows = {
        stage: [job.meter.row for job in listed if job.name.startswith(stage)]
        for stage in metrics.STAGES
    }
    cores = len(os.sched_getaffinity(0))
    tuner = tuning.Tuner(setup.choices, channels.counters, rows, past, cores, train.iterations)
    follower = Follower(setup, folder, crew, channels, reports, interrupts, tracker, tuner)
    try:
        crew.start_all()
        return follower.follow()
    except WorkerFailed as failure:
        return follower.failed(failure)
    finally:
        crew.stop()


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(parse(sys.argv[1:])))
