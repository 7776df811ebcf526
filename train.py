"""Trains a vision-language-action policy by asynchronous reinforcement learning: reads the flags,
starts the workers, watches.

    python train.py                                 the embedded default on this machine, GPU or not
    python train.py --model pi05 --ratio 3:1        the same, with parts named
    python train.py --preset sync-colocated         a baseline of the paper: same code
    python train.py --resume NAME                   continue runs/NAME from its newest checkpoint

It holds no tensor work of its own: placement → shared memory → spawn → supervise → run folder. With
`--ratio auto` all but the run folder may come again, at another ratio (tuning.py). Left out:
several machines.
"""

import copy
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import tyro

import actor_worker
import diagnostics
import env_worker
import envs
import metrics
import models
import rollout_worker
import summary
import tuning
from channel import (
    VERSION,
    Channels,
    Counters,
    IndexQueue,
    Record,
    SlotPool,
    Spec,
    WeightPlane,
    layout,
)
from config import (
    PRESETS,
    ROOT,
    Config,
    UserError,
    embedded_files,
    existing_run,
    exit_on_user_error,
    from_json,
    from_preset,
    parse_ratio,
    run_path,
    to_json,
    validate,
)
from models import checkpoint, contract, untrained
from processes import Crew, Job, WorkerFailed, note_interrupts
from scheduler import Admission, Placement, divide


@dataclass
class FirstLook:
    """The two flags that decide what the others default to."""

    preset: str = "full"
    resume: str = ""


def parse(args: list[str]) -> Config:
    """Command line → settings. A preset or a resumed run's config.json supplies the defaults, which
    flags override.
    """
    look, _ = tyro.cli(
        FirstLook, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True
    )
    default = from_preset(
        look.preset if look.preset in PRESETS else "full"
    )  # tyro names a wrong one below
    if look.resume:
        saved = existing_run(look.resume) / "config.json"
        if any(a.partition("=")[0] == "--run" for a in args):
            raise UserError(
                f"--run and --resume {look.resume} exclude each other: a resumed run goes on in "
                "its own folder"
            )
        default = from_json(saved)
        anew = default.train.ratio == "auto" or any(
            a.partition("=")[0] in ("--ratio", "--placement") for a in args
        )
        default.train.ratio_from = default.train.parts
        if anew:  # worker counts follow from the ratio, as far as no flag gave them
            counts = default.train.workers_given
            (
                default.env.env_workers,
                default.rollout.rollout_workers,
                default.actor.actor_workers,
            ) = counts
    config = tyro.cli(Config, args=args, default=default, config=(tyro.conf.OmitArgPrefixes,))
    if config.train.ratio_from not in ("", default.train.ratio_from):
        parse_ratio(config.train.ratio_from, "--ratio-from")
        if config.train.ratio != "auto":
            raise UserError(
                f"--ratio-from {config.train.ratio_from} is for --ratio auto: leave out one of them"
            )
    return config


# ---------------------------------------------------------------- what the flags mean on this
# machine


@dataclass
class Setup:
    config: Config
    spec: envs.EnvSpec
    placement: Placement
    note: str  # what the user should know about the settings
    slots: Spec
    on_gpu: tuple[str, ...]  # fields of the slots that lie on the first env worker's GPU
    weights: Spec
    header: checkpoint.Header
    resume: dict | None  # state.json of the checkpoint that continues
    saved: str  # config.json, complete and as the user meant it
    choices: dict[
        str, tuple[Config, Placement]
    ]  # ratios that can run here, the first one in use; more than that one with auto

    @property
    def version(self) -> int:
        """What training starts or continues from."""
        return self.resume["version"] if self.resume else 0

    def pool(self) -> SlotPool:
        device = self.placement.env_devices[0] if self.on_gpu else "cpu"
        return SlotPool(
            self.slots,
            Admission.of(self.config).slots + self.config.env.eval_envs,
            device,
            self.on_gpu,
        )


def prepare(config: Config) -> Setup:
    """Checks everything that can be checked before a process starts. Raises UserError."""
    name = config.train.model
    simulator = envs.load(config.train.env)
    resume = None
    config.train.tasks = tuple(
        dict.fromkeys(filter(None, (config.train.suite, *config.train.tasks)))
    )
    default, tokenizer = embedded_files(name)
    if config.train.checkpoint is None and name != "emulated" and hasattr(simulator, "STATE_RANGE"):
        config.env.image_size = config.env.image_size or 64
        spec = simulator.spec(config.train.tasks, config.env.image_size)
        usual = tuple(bound[: spec.state_dim] for bound in simulator.STATE_RANGE)
        found = untrained.start(
            ROOT / "runs", name, spec, usual, config.rollout.chunk, config.rollout.tokens or 0
        )
        config.train.checkpoint, config.train.tokenizer = found
    if config.train.checkpoint is None and name != "emulated" and not default.is_file():
        raise UserError(
            f"no checkpoint {default}: make it with `python pretrain.py --model {name}`"
        )
    saved_checkpoint = config.train.checkpoint = config.train.checkpoint or default
    if config.train.resume:
        config.train.checkpoint, resume = resume_from(config)
    if name != "emulated":
        models.check_family(name, config.train.checkpoint)
        found = checkpoint.vocabulary(
            config.train.tokenizer, config.train.checkpoint, name, tokenizer
        )
        config.train.tokenizer = Path(found) if found else None
    config.env.image_size = config.env.image_size or (
        64 if name == "emulated" else checkpoint.frame_size(config.train.checkpoint)
    )
    if vectorised := hasattr(simulator, "Envs"):
        config.env.lanes = config.env.lanes or 2
    elif config.env.lanes:
        raise UserError(
            f"--lanes {config.env.lanes} is for vectorised simulators: {config.train.env} steps "
            "every env by itself"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0))
    auto = config.train.ratio == "auto"
    counts = config.env.env_workers, config.rollout.rollout_workers, config.actor.actor_workers
    note = ""
    if auto:
        config.train.workers_given = counts
        # It begins with 3:1 if that fits, else the first ratio that does; so too where a run is
        # resumed on another machine
        before = config.train.ratio_from
        fitting = tuning.options(config, counts, simulator, gpus, cores)
        if not before or config.train.resume and before not in fitting:
            config.train.ratio_from = next(iter(fitting), before)
        if before not in ("", config.train.ratio_from):
            note = (
                f"ratio {before} does not fit here, so the run goes on at "
                f"{config.train.ratio_from}\n"
            )
    placement = divide(config, simulator, gpus, cores)
    validate(config)

    spec = simulator.spec(config.train.tasks, config.env.image_size)
    horizon = -(-spec.horizon // config.rollout.chunk)  # chunk steps
    config.env.segment = config.env.segment or horizon
    if config.env.segment > horizon:
        raise UserError(
            f"--segment {config.env.segment} is longer than an episode of {horizon} chunk steps: "
            f"choose at most {horizon}"
        )
    if config.train.algorithm == "grpo" and config.env.segment != horizon:
        raise UserError(
            f"--segment {config.env.segment} cuts episodes of {horizon} chunk steps, which GRPO "
            "compares whole"
        )
    if config.env.envs % len(spec.tasks) and config.env.segment < horizon:
        note += (
            f"{config.env.envs} envs take turns at {len(spec.tasks)} tasks, so episodes end after "
            "--segment "
        )
        note += (
            f"{config.env.segment} of {horizon} chunk steps: to see their ends, leave it out, or "
            "give a multiple of "
        )
        note += f"{len(spec.tasks)} as --envs\n"

    now = config.train.checkpoint
    config.train.checkpoint = saved_checkpoint
    saved = to_json(config)
    config.train.checkpoint = now
    model = models.build(config, spec, weights="none")
    preparation = models.preparation(name, model.header, str(config.train.tokenizer or ""))
    nothing = (
        np.zeros((spec.views, spec.image_size, spec.image_size, 3), np.uint8),
        np.zeros(spec.state_dim, np.float32),
    )
    # pictures, states or prompts that do not suit the model are better named now than by a worker
    for prompt in spec.prompts:
        contract.check_observed(model, preparation.observe(*nothing, prompt))
    on_gpu: tuple[str, ...] = ()
    # what a vectorised simulator draws on a GPU stays there, if the model takes pictures as they
    # are
    if vectorised and placement.env_devices[0] != "cpu":
        picture = np.random.default_rng(0).integers(
            0, 256, (spec.views, spec.image_size, spec.image_size, 3), np.uint8
        )
        if np.array_equal(
            preparation.observe(picture, np.zeros(spec.state_dim, np.float32), spec.prompts[0])[
                "image"
            ],
            picture,
        ):
            on_gpu = ("image", *model.slot_fields())

    segment = config.env.segment
    f = torch.float32
    slots: Spec = {
        "actions": ((segment, config.rollout.chunk, spec.action_dim), f),
        "logprob": ((segment, config.rollout.chunk, spec.action_dim), f),
        "value": ((segment + 1,), f),
        "reward": ((segment,), f),
        "terminated": ((segment,), torch.bool),
        "truncated": ((segment,), torch.bool),
        "version": ((segment,), torch.int32),
        "asked": (
            (),
            torch.float64,
        ),  # monotonic seconds: when the newest request of this slot was sent
        "collected": (
            (),
            torch.int64,
        ),  # chunk steps that were ever stepped in this slot, also by workers that died
        "received": ((), torch.int32),  # by its actor: the trajectory and one, 0 for none
        "lane": ((), torch.int32),
        "trajectory": ((), torch.int32),
        "task": ((), torch.int32),
    }
    if config.algorithm.bootstrap_truncated:
        slots["final"] = (
            (segment,),
            f,
        )  # V of an episode's last observation, where the time limit ended it in this step
    slots |= {
        name: ((segment + 1, *shape), dtype)
        for name, (shape, dtype) in model.observation_fields().items()
    }
    slots |= {
        name: ((segment, *shape), dtype) for name, (shape, dtype) in model.slot_fields().items()
    }
    weights = {name: (tuple(p.shape), p.dtype) for name, p in model.trainable().items()}
    choices = {config.train.parts: (config, placement)}
    if auto:
        choices |= tuning.options(config, counts, simulator, gpus, cores)
    return Setup(
        config, spec, placement, note, slots, on_gpu, weights, model.header, resume, saved, choices
    )


def resume_from(config: Config) -> tuple[Path, dict]:
    """The newest checkpoint of the run that is resumed, and its state.json. Raises UserError."""
    found = checkpoint.find(run_path(config.train.resume)).parent
    try:
        resume = json.loads((found / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {found / 'state.json'}: {error}; remove {found} to use an older one"
        ) from None
    for flag, before in resume.get(
        "settings", {}
    ).items():  # what is trained decides what the optimizer remembers
        now = getattr(config.rollout if flag == "noise" else config.actor, flag)
        if now != before:
            raise UserError(
                f"--{flag.replace('_', '-')} was {before} when run {config.train.resume} began: it "
                "cannot change now"
            )
    if resume["version"] >= config.train.iterations:
        raise UserError(
            f"run {config.train.resume} already has {resume['version']} iterations: give more "
            "--iterations"
        )
    return found, resume


def memory_report(setup: Setup) -> None:
    slots = Admission.of(setup.config).slots + setup.config.env.eval_envs
    one = layout(setup.slots, 1)[1]
    where = "shared memory" + (
        f", but {', '.join(setup.on_gpu)} on {setup.placement.env_devices[0]}"
        if setup.on_gpu
        else ""
    )
    print(f"slot pool: {slots} slots × {one / 1e6:.2f} MB = {slots * one / 1e6:.1f} MB of {where}")
    print(f"weight plane: 2 × {layout(setup.weights, 1)[1] / 1e6:.2f} MB")
    for name in sorted(setup.slots, key=lambda n: -layout({n: setup.slots[n]}, 1)[1]):
        shape, dtype = setup.slots[name]
        print(
            f"  {name:16s} {str(list(shape)):26s} {str(dtype):14s} "
            f"{layout({name: setup.slots[name]}, slots)[1] / 1e6:9.2f} MB"
        )


# ---------------------------------------------------------------- start, follow, report


def jobs(setup: Setup, channels: Channels, folder: metrics.RunFolder, report) -> list[Job]:
    """What every worker is to do; a worker's place in this list is its row of the counters."""
    config = setup.config
    placement = setup.placement
    trace = folder.spans if setup.config.train.trace else None
    out: list[Job] = []

    def add(
        stage: str,
        rank: int,
        target,
        *args,
        threads: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        meter = metrics.Meter(f"{stage}-{rank}", len(out), channels.counters, trace)
        out.append(
            Job(
                meter.name,
                target,
                (rank, config, *args, meter),
                threads,
                meter,
                environment or {},
                stage == "env",
            )
        )

    for rank, device in enumerate(placement.actor_devices):
        news = report if rank == 0 else None
        args = (setup.spec, device, channels, folder.path, setup.resume, news)
        add("actor", rank, actor_worker.run, *args, threads=placement.actor_threads)
    for rank, device in enumerate(placement.rollout_devices):
        add(
            "rollout",
            rank,
            rollout_worker.run,
            setup.spec,
            device,
            channels,
            threads=placement.rollout_threads,
        )
    for rank, device in enumerate(placement.env_devices):
        renders_on = {} if device == "cpu" else {"MUJOCO_EGL_DEVICE_ID": device.split(":")[1]}
        watching = channels._replace(plane=channels.plane.watch())
        add(
            "env",
            rank,
            env_worker.run,
            setup.header,
            device,
            watching,
            setup.version,
            environment=renders_on,
        )
    return out


def differences(before: dict, now: dict) -> list[str]:
    """The settings that differ between two config.json, as they are now."""
    own = ("checkpoint", "resume", "run", "ratio_from", "workers_given")  # of every start
    pairs = [
        (name, value, before.get(stage, {}).get(name))
        for stage, values in now.items()
        for name, value in values.items()
    ]

    def text(value):
        return " ".join(map(str, value)) if isinstance(value, list) else value

    return [
        f"{name.replace('_', '-')} {text(a)} (was {text(b)})"
        for name, a, b in pairs
        if a != b and name not in own
    ]


def mirror(config: Config, folder: metrics.RunFolder):
    """The run of Weights & Biases that metrics are logged to, if any."""
    if config.train.wandb == "off":
        return None
    import wandb

    try:
        return wandb.init(
            project="vla3",
            name=folder.path.name,
            dir=folder.path,
            mode=config.train.wandb,
            config=json.loads(to_json(config)),
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        if not config.train.resume:  # made for this start, and the next one may have its name
            shutil.rmtree(folder.path, ignore_errors=True)  # it may still be writing
        raise UserError(f"Weights & Biases: {str(error).strip()} Or give --wandb offline") from None


def supervise(
    setup: Setup,
    folder: metrics.RunFolder,
    crew: Crew,
    channels: Channels,
    reports,
    interrupts: list[float],
    tracker,
    tuner: tuning.Tuner,
) -> str:
    """Follows the run to its end: writes metrics, watches workers, handles Ctrl-C. Returns what to
    tell the user; "" if it is to go on at `tuner.ratio`, from a checkpoint just saved.
    """
    config = setup.config
    counters = channels.counters
    began = folder.appended or time.monotonic()
    rows = tuner.rows
    past = folder.lines()  # of a run that is resumed
    earlier = (past or [{}])[-1]
    ledger = metrics.Ledger(earlier)
    warnings = diagnostics.Warnings()
    for line in past:
        warnings.of(line)  # said before
    show, display = metrics.progress(config.train.iterations, sys.stdout.isatty())
    interval = None
    pool_gb = slot_pool_gb(setup)
    # Workers that come at another ratio keep the schedule, or each would be judged while it
    # evaluates as the one before did not.
    before = past if folder.appended else []
    evaluations = metrics.Evaluations(config, setup.spec.tasks, setup.version, counters, before)

    def watch() -> bool:
        """Waits for the actor's news at most 0.25 s and returns whether there is some; begins
        evaluations.
        """
        if evaluations.begins(channels.plane.version):
            for reply in (
                channels.replies
            ):  # env workers that wait for an action or for a version are to see it
                reply.put([Record(0, 0, VERSION, 0)])
        return crew.watch(reports)

    with display:
        while True:
            news = watch()
            if interval is None and counters.table[:, counters.index["ready"]].all():
                interval = metrics.Interval(counters, rows)
            if interval and (said := tuner.watch()):
                print(said, flush=True)
            if tuner.ratio != config.train.parts:  # the actor saves, and everybody starts again
                counters.set(0, "stop", 1.0)
            if news:
                line = reports.recv()
                if "done" in line:
                    return (
                        f"{line['done']} iterations done; checkpoint in "
                        f"{folder.path / 'checkpoints'}"
                    )
                if "saved" in line and not interrupts:
                    return ""
                if "saved" in line:
                    return (
                        f"interrupted; saved {line['saved']}; continue with: python train.py "
                        f"--resume {folder.name}"
                    )
                interval = interval or metrics.Interval(counters, rows)
                memory_gb, cpu_s = crew.used()
                line |= interval.measure() | {
                    "time": time.monotonic() - began,
                    "rss_gb": memory_gb + pool_gb,
                }
                if line["iteration"] == config.train.iterations and config.env.evaluates:
                    # Every run ends with an evaluation of the final weights: nothing is left that
                    # waiting for it could hold up.
                    while (
                        evaluations.news.get("eval_version") != config.train.iterations
                        and not interrupts
                    ):
                        watch()
                        time.sleep(0.25)
                line |= evaluations.report() | interval.totals()
                line |= {
                    name: line[name] + earlier.get(name, 0) for name in ("time", *metrics.TOTALS)
                }
                line |= ledger.of(line, int(channels.pool["collected"].sum()))
                tuner.iteration(line["version"], cpu_s)
                line["tuning"] = tuner.report()
                folder.append(line)
                show(line)
                for text in warnings.of(line):
                    print(text, file=sys.stderr, flush=True)
                if tracker:
                    tracker.log(
                        {k: v for k, v in line.items() if isinstance(v, int | float)},
                        step=line["iteration"],
                    )
            if (
                interrupts and channels.plane.version < config.train.iterations
            ):  # else all is trained and saved
                if (
                    interval is None or len(interrupts) > 1 and not reports.poll()
                ):  # what is reported, perhaps "saved", comes first
                    if interval is None and setup.resume:
                        return f"interrupted; continue with: python train.py --resume {folder.name}"
                    why = (
                        "before anything was trained"
                        if interval is None
                        else "twice: stopped without saving"
                    )
                    return f"interrupted {why}"
                if not counters.get(0, "stop"):
                    print(
                        "finishing the batch that is being trained, then saving; Ctrl-C again "
                        "stops without saving",
                        flush=True,
                    )
                counters.set(0, "stop", 1.0)


def slot_pool_gb(setup: Setup) -> float:
    on_host = {name: kind for name, kind in setup.slots.items() if name not in setup.on_gpu}
    return layout(on_host, Admission.of(setup.config).slots)[1] / 1e9


def run_crew(
    setup: Setup, folder: metrics.RunFolder, interrupts: list[float], tracker, past: tuning.Past
) -> tuple[str, int, str]:
    """Starts all workers and follows them. Returns what to tell the user, the exit status, and at
    which ratio to go on, or "".
    """
    config = setup.config
    gpu = next((d for d in setup.placement.actor_devices if d != "cpu"), None)
    workers_total = (
        config.env.env_workers + config.rollout.rollout_workers + config.actor.actor_workers
    )
    channels = Channels(
        pool=setup.pool(),
        plane=WeightPlane(setup.weights, gpu or "cpu", setup.version),
        counters=Counters(workers_total, metrics.columns(config.env.eval_episodes)),
        requests=tuple(IndexQueue() for _ in range(config.rollout.rollout_workers)),
        replies=tuple(IndexQueue() for _ in range(config.env.env_workers)),
        finished=tuple(IndexQueue() for _ in range(config.actor.actor_workers)),
    )
    reports, report = mp.Pipe(duplex=False)
    crew = Crew(
        jobs(setup, channels, folder, report),
        channels.counters,
        folder.path,
        config.env.restarts,
        config.train.timeout_s,
    )
    rows = {
        stage: [job.meter.row for job in crew.jobs.values() if job.name.startswith(stage)]
        for stage in metrics.STAGES
    }
    cores = len(os.sched_getaffinity(0))
    tuner = tuning.Tuner(
        setup.choices, channels.counters, rows, past, cores, config.train.iterations
    )
    try:
        crew.start_all()
        message = supervise(setup, folder, crew, channels, reports, interrupts, tracker, tuner)
    except WorkerFailed as failure:
        return f"error: {failure}", 1, ""
    finally:
        crew.stop()
    return message, 130 if message.startswith("interrupted") else 0, "" if message else tuner.ratio


def main(config: Config) -> int:
    given = copy.deepcopy(config)  # what `prepare` derives, it derives anew for another ratio
    setup = prepare(config)
    if config.train.memory_report:
        memory_report(setup)
        return 0
    path = run_path(config.train.resume or config.train.run or time.strftime("%Y%m%d-%H%M%S"))
    folder = metrics.RunFolder(path, resume=bool(config.train.resume))
    interrupts = note_interrupts()
    tracker = mirror(config, folder)
    past = tuning.Past()
    if setup.resume:
        folder.truncate(setup.version)
        if changed := differences(
            json.loads((path / "config.json").read_text()), json.loads(setup.saved)
        ):
            print(f"other settings than this run had so far: {', '.join(changed)}")
    print(setup.placement.line, f"{setup.note}run folder {path}", sep="\n", flush=True)
    if str(config.train.checkpoint).startswith(str(ROOT / "runs" / "untrained_")):
        print(
            f"no checkpoint is given and none shipped for {config.train.env}: a small "
            f"{config.train.model} of random weights starts"
        )

    while True:
        folder.write("config.json", setup.saved)
        message, status, ratio = run_crew(setup, folder, interrupts, tracker, past)
        if (
            status == 1 and past.left and folder.lines()[-1]["version"] <= setup.version
        ):  # it never got going at this ratio
            why = message.removeprefix("error: ")
            print(
                f"ratio {past.left} again: at {config.train.parts} the workers did not come to an "
                f"iteration: {why}",
                flush=True,
            )
            ratio = past.go_back(config.train.parts)
        if not ratio:
            break
        given.train.ratio_from = ratio
        given.train.resume = folder.name
        config = copy.deepcopy(given)
        setup = prepare(config)
        print(setup.placement.line, flush=True)
    folder.finish()
    summary.draw(path)
    print(message, file=sys.stderr if status == 1 else sys.stdout)
    return status


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(parse(sys.argv[1:])))
