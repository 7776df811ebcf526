"""Trains a vision-language-action policy by asynchronous reinforcement learning: reads the flags, starts the workers, watches.

    python train.py                                           the embedded default on this machine, GPU or not
    python train.py --model pi05 --ratio 3:1                  the same, with parts named
    python train.py --preset sync-colocated                   a baseline of the paper: same code, other settings
    python train.py --resume NAME                             continue runs/NAME from its newest checkpoint

It holds no tensor work of its own: placement → shared memory → spawn → supervise → run folder.
Left out: restarting a lost worker (it ends the run, named), several machines.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path

import psutil
import torch
import torch.multiprocessing as mp
import tyro

import actor_worker
import env_worker
import envs
import metrics
import models
import rollout_worker
from channel import Channels, Counters, IndexQueue, SlotPool, Spec, WeightPlane, layout
from config import PRESETS, ROOT, Config, UserError, embedded_files, exit_on_user_error, from_json, from_preset, to_json, validate
from models import checkpoint, untrained
from scheduler import Admission, Placement, place


@dataclass
class FirstLook:
    """The two flags that decide what the others default to."""

    preset: str = "full"
    resume: str = ""


def parse(args: list[str]) -> Config:
    """Command line → settings. A preset or a resumed run's config.json supplies the defaults, which flags override."""
    look, _ = tyro.cli(FirstLook, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True)
    default = from_preset(look.preset if look.preset in PRESETS else "full")  # tyro names a wrong one below
    if look.resume:
        if not run_path(look.resume).is_dir():
            have = sorted(path.name for path in (ROOT / "runs").glob("*/")) or ["none"]
            raise UserError(f"there is no run {run_path(look.resume)} to resume: runs/ holds {', '.join(have[-8:])}")
        default = from_json(run_path(look.resume) / "config.json")
        if any(a.partition("=")[0] in ("--ratio", "--placement") for a in args):  # worker counts follow anew
            default.env.env_workers = default.rollout.rollout_workers = default.actor.actor_workers = 0
    return tyro.cli(Config, args=args, default=default, config=(tyro.conf.OmitArgPrefixes,))


def run_path(name: str) -> Path:
    """runs/NAME, or the path itself when it is one."""
    return Path(name) if "/" in name else ROOT / "runs" / name


# ---------------------------------------------------------------- what the flags mean on this machine


@dataclass
class Setup:
    config: Config
    spec: envs.EnvSpec
    placement: Placement
    slots: Spec
    weights: Spec
    header: checkpoint.Header
    resume: dict | None  # state.json of the checkpoint that continues
    saved: str  # config.json, complete and as the user meant it


def prepare(config: Config) -> Setup:
    """Checks everything that can be checked before a process starts. Raises UserError."""
    config.train.tasks = tuple(dict.fromkeys(filter(None, (config.train.suite, *config.train.tasks))))
    if config.train.checkpoint is None and config.train.model != "emulated" and config.train.env not in ("metaworld", "emulated"):
        simulator, chunk = envs.load(config.train.env), config.rollout.chunk
        spec = simulator.spec(config.train.tasks, config.env.image_size)
        config.train.checkpoint, config.train.tokenizer, config.rollout.tokens = untrained.start(
            ROOT / "runs", config.train.model, spec, simulator.STATE_RANGE, chunk, config.rollout.tokens
        )
    default, tokenizer = embedded_files(config.train.model)
    if config.train.checkpoint is None and config.train.model != "emulated" and not default.is_file():
        raise UserError(f"no checkpoint {default}: make it with `python pretrain.py --model {config.train.model}`")
    if config.train.model != "emulated":
        config.train.checkpoint = config.train.checkpoint or default
        given = config.train.tokenizer
        found = checkpoint.vocabulary(given, config.train.checkpoint, config.train.model, tokenizer)
        config.train.tokenizer = Path(found) if found else None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0))
    counts = config.env.env_workers, config.rollout.rollout_workers, config.actor.actor_workers
    placement = place(config.train.ratio, config.train.placement, gpus, cores, *counts)
    config.env.env_workers = len(placement.env_devices)
    config.rollout.rollout_workers = len(placement.rollout_devices)
    config.actor.actor_workers = len(placement.actor_devices)
    validate(config)

    spec = envs.load(config.train.env).spec(config.train.tasks, config.env.image_size)
    horizon = -(-spec.horizon // config.rollout.chunk)  # chunk steps
    if len(spec.tasks) > config.env.envs:
        raise UserError(f"{len(spec.tasks)} tasks need as many --envs at least, not {config.env.envs}: one lane plays one task")
    config.env.segment = config.env.segment or horizon
    if config.env.segment > horizon:
        raise UserError(
            f"--segment {config.env.segment} is longer than an episode of {horizon} chunk steps: choose at most {horizon}"
        )

    resume, saved = None, to_json(config)
    if config.train.resume:
        found = checkpoint.find(run_path(config.train.resume)).parent
        try:
            config.train.checkpoint, resume = found, json.loads((found / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {found / 'state.json'}: {error}; remove {found} to use an older one") from None
        for flag, before in resume.get("settings", {}).items():  # what is trained decides what the optimizer remembers
            now = getattr(config.rollout if flag == "noise" else config.actor, flag)
            if now != before:
                raise UserError(
                    f"--{flag.replace('_', '-')} was {before} when run {config.train.resume} began: it cannot change now"
                )
        if resume["version"] >= config.train.iterations:
            raise UserError(f"run {config.train.resume} already has {resume['version']} iterations: give more --iterations")
    model = models.load(config.train.model).build(config, spec, weights=False)
    models.files(config.train.model).preparation(model.header, str(config.train.tokenizer or ""))

    segment, f = config.env.segment, torch.float32
    slots: Spec = {
        "actions": ((segment, config.rollout.chunk, spec.action_dim), f),
        "logprob": ((segment,), f),
        "value": ((segment + 1,), f),
        "reward": ((segment,), f),
        "terminated": ((segment,), torch.bool),
        "truncated": ((segment,), torch.bool),
        "version": ((segment,), torch.int32),
        "asked": ((), torch.float64),  # monotonic seconds: when the newest request of this slot was sent
        "lane": ((), torch.int32),
        "trajectory": ((), torch.int32),
        "task": ((), torch.int32),
    }
    slots |= {name: ((segment + 1, *shape), dtype) for name, (shape, dtype) in model.observation_fields().items()}
    slots |= {name: ((segment, *shape), dtype) for name, (shape, dtype) in model.slot_fields().items()}
    weights = {name: (tuple(p.shape), p.dtype) for name, p in model.trainable().items()}
    return Setup(config, spec, placement, slots, weights, model.header, resume, saved)


def memory_report(setup: Setup, admission: Admission) -> None:
    slots = admission.slots + setup.config.env.eval_envs
    one = layout(setup.slots, 1)[1]
    print(f"slot pool: {slots} slots × {one / 1e6:.2f} MB = {slots * one / 1e6:.1f} MB of shared memory")
    print(f"weight plane: 2 × {layout(setup.weights, 1)[1] / 1e6:.2f} MB")
    for name in sorted(setup.slots, key=lambda n: -layout({n: setup.slots[n]}, 1)[1]):
        shape, dtype = setup.slots[name]
        print(f"  {name:16s} {str(list(shape)):26s} {str(dtype):14s} {layout({name: setup.slots[name]}, slots)[1] / 1e6:9.2f} MB")


# ---------------------------------------------------------------- processes


def child(name: str, target, args: tuple, threads: int, environment: dict[str, str], meter, errors) -> None:
    """Every worker's entry: dies with its parent, leaves Ctrl-C to the launcher, reports what went wrong by name."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; the fork server itself ends when the launcher does
    if os.getppid() == 1:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    os.close(forkserver._forkserver._forkserver_alive_fd)  # a copy: the fork server ends when the last of them is closed
    os.environ.update(environment)
    torch.set_num_threads(threads)
    status = 0
    try:
        target(*args)
    except SystemExit:  # SIGTERM; where it is not the launcher's, it is a death that the launcher must see
        status = 128 + signal.SIGTERM
    except UserError as error:
        errors.send((name, str(error), ""))
        status = 2
    except BaseException as error:
        errors.send((name, f"{type(error).__name__}: {error}"[:1000], traceback.format_exc()[-2500:]))
        status = 1
    meter.flush()
    os._exit(status)


def leave(*_) -> None:
    """A worker's answer to SIGTERM. What it was just building is dropped half-built, and is not to complain about that."""
    sys.unraisablehook = lambda _: None
    sys.exit()


def note_interrupts() -> list[float]:
    """From here on Ctrl-C and SIGTERM only leave their time here. Starts the fork server, which Ctrl-C in a terminal reaches too:
    it inherits that SIGINT is ignored while it starts."""
    # Threads that wait must sleep: where cores are shared, spinning at every barrier is several times slower than waking up.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The fork server looks for what it preloads here alone, and says nothing when it fails: then each worker imports torch itself.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.set_forkserver_preload(["actor_worker", "env_worker", "rollout_worker", "envs.metaworld", "models.pi"])
    forkserver.ensure_running()
    interrupts: list[float] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupts.append(time.monotonic()))
    return interrupts


def start(setup: Setup, channels: Channels, folder: metrics.RunFolder, report, errors) -> tuple[dict[str, mp.Process], dict]:
    """Starts every worker. Returns processes by name, and the rows of the counters by stage."""
    config, placement, trace = setup.config, setup.placement, folder.spans if setup.config.train.trace else None
    version = setup.resume["version"] if setup.resume else 0
    context = mp.get_context("forkserver")
    jobs, meters, rows = [], {}, {stage: [] for stage in metrics.STAGES}

    def meter(stage: str, rank: int) -> metrics.Meter:
        row = sum(map(len, rows.values()))
        rows[stage].append(row)
        meters[f"{stage}-{rank}"] = metrics.Meter(f"{stage}-{rank}", row, channels.counters, trace)
        return meters[f"{stage}-{rank}"]

    for rank, device in enumerate(placement.actor_devices):
        args = (rank, config, setup.spec, device, channels, meter("actor", rank), folder.path, setup.resume)
        jobs.append((f"actor-{rank}", actor_worker.run, (*args, report if rank == 0 else None), placement.actor_threads))
    for rank, device in enumerate(placement.rollout_devices):
        args = (rank, config, setup.spec, device, channels, meter("rollout", rank))
        jobs.append((f"rollout-{rank}", rollout_worker.run, args, placement.rollout_threads))
    for rank in range(len(placement.env_devices)):
        args = (rank, config, setup.header, channels._replace(plane=channels.plane.watch()), version, meter("env", rank))
        jobs.append((f"env-{rank}", env_worker.run, args, 1))
    devices = {f"env-{rank}": device for rank, device in enumerate(placement.env_devices) if device != "cpu"}
    workers = {}
    for name, target, args, threads in jobs:
        renders_on = {"MUJOCO_EGL_DEVICE_ID": devices[name].split(":")[1]} if name in devices else {}
        job = (name, target, args, threads, renders_on, meters[name], errors)
        workers[name] = context.Process(target=child, args=job, name=name, daemon=True)
        workers[name].start()
    return workers, rows


def stop(workers: dict[str, mp.Process]) -> None:
    """No worker outlives this call."""
    for worker in workers.values():
        worker.terminate()
    deadline = time.monotonic() + 5.0
    for worker in workers.values():
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()


class WorkerFailed(Exception):
    """A worker died or hangs; the message names it."""


def check_alive(workers, rows, counters: Counters, timeout: float, last_work: list) -> None:
    """Raises WorkerFailed when a worker is gone, shows no sign of life, or all of them wait for one another."""
    now, names = time.monotonic(), {}
    for stage, stage_rows in rows.items():
        names |= {row: f"{stage}-{rank}" for rank, row in enumerate(stage_rows)}
    for name, worker in workers.items():
        if worker.exitcode not in (None, 0):
            raise WorkerFailed(f"worker {name} died (exit code {worker.exitcode})")
    for row, name in names.items():
        if workers[name].exitcode is not None:
            continue
        at_barrier = counters.get(row, "waiting") == 1 + metrics.CAUSES.index("gradient")  # waits for other ranks, silently
        if counters.get(row, "ready") and not at_barrier and now - counters.get(row, "time") > timeout:
            raise WorkerFailed(f"worker {name} hangs: no sign of life for {timeout:.0f} s")
    work = counters.table[:, counters.index["work_s"]].sum() + counters.table[:, counters.index["ready"]].sum()
    if work != last_work[0]:
        last_work[:] = [work, now]
    elif now - last_work[1] > timeout:
        waiting = {n: int(counters.get(r, "waiting")) for r, n in names.items()}
        who = ", ".join(f"{n} for {metrics.CAUSES[w - 1]}" if w else f"{n} still starting" for n, w in waiting.items())
        raise WorkerFailed(f"nothing happened for {timeout:.0f} s: {who}")


def supervise(
    setup: Setup, folder: metrics.RunFolder, workers, rows, counters: Counters, reports, errors, interrupts: list[float]
) -> str:
    """Follows the run to its end: writes metrics, watches workers, handles Ctrl-C. Returns what to tell the user."""
    config, names = setup.config, setup.spec.tasks
    timeout, began = config.train.timeout_s, time.monotonic()
    earlier = folder.lines()
    offset = earlier[-1]["time"] if earlier else 0.0
    steps_before = earlier[-1]["env_steps"] if earlier else 0
    show, display = metrics.progress(config.train.iterations, sys.stdout.isatty())
    tracker = None
    if config.train.wandb != "off":
        import wandb

        tracker = wandb.init(project="vla3", name=folder.path.name, dir=folder.path, mode=config.train.wandb,
                             config=json.loads(to_json(config)), settings=wandb.Settings(silent=True))  # fmt: skip
    interval, last_work, pool_gb = None, [0.0, began], slot_pool_gb(setup)

    def watch() -> list:
        """Waits for news at most 0.25 s. Raises WorkerFailed when a worker failed, died or hangs."""
        ready = connection.wait([reports, errors, *(w.sentinel for w in workers.values() if w.exitcode is None)], timeout=0.25)
        if errors.poll():
            name, message, trace = errors.recv()
            if trace:
                (folder.path / "error.txt").write_text(f"{name}\n{trace}")
            details = f" (details in {folder.path / 'error.txt'})" if trace else ""
            raise WorkerFailed(f"worker {name} failed: {message}{details}")
        check_alive(workers, rows, counters, timeout, last_work)
        return ready

    def last_evaluation() -> dict:
        """Of the final weights, which every run ends with: nothing is left that waiting for it could hold up."""
        while not interrupts:
            result = interval.evaluation()
            if result.get("eval_version") == config.train.iterations:
                return result
            watch()
            time.sleep(0.25)
        return {}

    with display:
        while True:
            ready = watch()
            if interval is None and counters.table[:, counters.index["ready"]].all():
                interval = metrics.Interval(counters, rows, names)
            if reports in ready:
                line = reports.recv()
                if "done" in line:
                    return f"{line['done']} iterations done; checkpoint in {folder.path / 'checkpoints'}"
                if "saved" in line:
                    return f"interrupted; saved {line['saved']}; continue with: python train.py --resume {folder.name}"
                interval = interval or metrics.Interval(counters, rows, names)
                line |= interval.measure()
                line |= {"time": offset + time.monotonic() - began, "restarts": 0, "rss_gb": rss_gb(workers) + pool_gb}
                line["env_steps"] += steps_before
                line |= interval.evaluation()
                if line["iteration"] == config.train.iterations and config.env.evaluates:
                    line |= last_evaluation()
                folder.append(line)
                show(line)
                if tracker:
                    tracker.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=line["iteration"])
                continue
            if interrupts:
                if interval is None or len(interrupts) > 1:
                    why = "before anything was trained" if interval is None else "twice: stopped without saving"
                    return f"interrupted {why}"
                if not counters.get(0, "stop"):
                    print("finishing the batch that is being trained, then saving; Ctrl-C again stops without saving", flush=True)
                counters.set(0, "stop", 1.0)


def rss_gb(workers: dict[str, mp.Process]) -> float:
    """Private resident memory of all workers and this process."""
    total = 0
    for pid in (os.getpid(), *(w.pid for w in workers.values())):
        try:
            info = psutil.Process(pid).memory_info()
            total += info.rss - info.shared
        except psutil.NoSuchProcess:
            pass
    return total / 1e9


def slot_pool_gb(setup: Setup) -> float:
    admission = Admission(setup.config.actor.batch, setup.config.env.envs, setup.config.actor.max_staleness)
    return layout(setup.slots, admission.slots)[1] / 1e9


def main(config: Config) -> int:
    setup = prepare(config)
    admission = Admission(config.actor.batch, config.env.envs, config.actor.max_staleness)
    if config.train.memory_report:
        memory_report(setup, admission)
        return 0
    path = run_path(config.train.resume or config.train.run or time.strftime("%Y%m%d-%H%M%S"))
    folder = metrics.RunFolder(path, resume=bool(config.train.resume))
    interrupts = note_interrupts()
    if setup.resume:
        folder.truncate(setup.resume["version"])
    (path / "config.json").write_text(setup.saved)
    print(setup.placement.line, f"run folder {path}", sep="\n", flush=True)
    if str(config.train.checkpoint).startswith(str(ROOT / "runs" / "untrained_")):
        print(
            f"no checkpoint is given and none shipped for {config.train.env}: a small {config.train.model} of random weights starts"
        )

    gpu = next((d for d in setup.placement.actor_devices if d != "cpu"), None)
    workers_total = config.env.env_workers + config.rollout.rollout_workers + config.actor.actor_workers
    channels = Channels(
        pool=SlotPool(setup.slots, admission.slots + config.env.eval_envs),
        plane=WeightPlane(setup.weights, gpu or "cpu", setup.resume["version"] if setup.resume else 0),
        counters=Counters(workers_total, metrics.columns(len(setup.spec.tasks))),
        requests=tuple(IndexQueue() for _ in range(config.rollout.rollout_workers)),
        replies=tuple(IndexQueue() for _ in range(config.env.env_workers)),
        finished=tuple(IndexQueue() for _ in range(config.actor.actor_workers)),
    )
    reports, report = mp.Pipe(duplex=False)
    errors, error = mp.Pipe(duplex=False)
    workers: dict[str, mp.Process] = {}
    try:
        workers, rows = start(setup, channels, folder, report, error)
        message = supervise(setup, folder, workers, rows, channels.counters, reports, errors, interrupts)
        status = 130 if message.startswith("interrupted") else 0
    except WorkerFailed as failure:
        message, status = f"error: {failure}", 1
    finally:
        stop(workers)
    folder.finish()
    print(message, file=sys.stderr if status == 1 else sys.stdout)
    return status


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(parse(sys.argv[1:])))
