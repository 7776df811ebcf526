"""Trains a vision-language-action policy by asynchronous reinforcement learning.

    python train.py                                 the embedded default on this machine, GPU or not
    python train.py --model pi05 --ratio 3:1        the same, with parts named
    python train.py --preset sync-colocated         a baseline of the paper: same code
    python train.py --recipe NAME --checkpoint X    published settings, of full-size models
    python train.py --resume NAME                   continue runs/NAME from its newest checkpoint
    python train.py --resume-or-start NAME          the same, or begin it: what a cluster requeues

It reads the flags (`command_line`), decides what they mean here (`prepare`), makes the shared
memory, starts the workers, and then watches them (`follow.Follower`). With `--ratio auto` the run
may start again at another ratio, from a checkpoint that is saved for it (`start_again`). On several
machines torchrun starts one of these on each: nodes.py.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch.multiprocessing as mp

import actor_worker
import env_worker
import envs
import html_report
import machine
import memory
import metrics
import models
import processes
import recipes
import rollout_worker
import tuning
from channel import Channels, Counters
from checks import flag_of, read_json
from command_line import BEGINS_FROM, parse, without
from config import STAGE_OF, Config, from_json, run_path, setting
from errors import UserError, exit_on_user_error, require
from films import HURRY_S, make_videos
from follow import End, Follower
from joining import agree, bring_run, meet_the_others
from learner import schedule
from nodes import Nodes
from output import disk_trouble
from prepare import Setup, memory_report, prepare
from processes import START_UP, Crew, GpuPart, Job
from ranks import Meeting
from report import batch_line, mirror
from run_folder import RunFolder, newest_version
from weights import WeightPlane


def connect(setup: Setup) -> Channels:
    """Makes the shared memory and the queues that the workers meet in."""
    workers = sum(setup.placement.workers().values())
    plane = WeightPlane(setup.weights, setup.plane_device, setup.version)
    counters = Counters(workers, metrics.columns(setup.config.env.eval_episodes))
    return Channels.create(setup.config, setup.pool(), plane, counters)


def jobs(
    setup: Setup, channels: Channels, folder: RunFolder, meeting: Meeting, report: Connection
) -> list[Job]:
    """Lists what every worker is to do. A worker's place in the list is its row of the counters."""
    # List every worker: its stage, rank, function, arguments, threads and environment variables.
    placement = setup.placement
    spec = setup.spec
    budgets = memory.budgets(memory.table_of(setup, setup.room), setup.room)
    plans = []
    train = setup.config.train
    trace = folder.spans if train.trace else None
    films = folder.spans if train.film and train.node == 0 else None
    for rank, device in enumerate(placement.actor_devices):
        news = report if rank == 0 else None
        whose = channels.of_worker("actor", rank)
        args = (spec, device, whose, folder.path, meeting, setup.resume, news)
        plans.append(("actor", rank, actor_worker.run, args, placement.actor_threads, {}))
    for rank, device in enumerate(placement.rollout_devices):
        args = (spec, device, channels.of_worker("rollout", rank), setup.version)
        plans.append(("rollout", rank, rollout_worker.run, args, placement.rollout_threads, {}))
    for rank, device in enumerate(placement.env_devices):
        draws_on = {} if device == "cpu" else {"VLA3_DRAWS_ON": machine.address(device)}
        if draws_on:  # CUDA's number; `envs.drawing` finds EGL's
            draws_on["MUJOCO_EGL_DEVICE_ID"] = device.split(":")[1]
        args = (setup.header, device, channels.of_worker("env", rank), setup.version, films)
        plans.append(("env", rank, env_worker.run, args, 1, draws_on))

    # Make a job of each, with its meter, its share of a GPU's memory and the cores that it may use.
    cores = {stage: setup.cores(stage) for stage in metrics.STAGES}
    listed = []
    for stage, rank, target, args, threads, environment in plans:
        meter = metrics.Meter(f"{stage}-{rank}", len(listed), channels.counters, trace)
        part = None
        if stage != "env" and args[1] != "cpu":  # the device of a rollout worker or an actor
            budget = budgets.get(args[1], {}).get(meter.name, setup.room.gpu)
            part = GpuPart(args[1], min(1.0, budget / setup.room.gpu))
        args = (rank, setup.config, *args, meter)
        may_use = cores[stage][rank]
        replaceable = stage != "actor"  # only an actor holds what cannot be had again
        start_up = START_UP if stage == "rollout" else 1.0
        job = (meter.name, target, args, threads, meter, environment, replaceable, start_up)
        listed.append(Job(*job, part, may_use))
    return listed


def announce(setup: Setup, folder: RunFolder, again: bool, nodes: Nodes) -> None:
    """Says what is about to run. again: it ran until now, at another ratio."""
    if again:
        print(where(setup), flush=True)
        return
    if not nodes.first:
        print(f"{nodes.name} of {nodes.count}: {where(setup)}")
        there = f"metrics, checkpoints and pictures are on {nodes.names[0]}: {nodes.run}"
        print(f"{setup.note}{there}; what follows is of this node alone", flush=True)
        return
    if setup.resume:
        print(f"continues from {setup.config.train.checkpoint}{played_again(setup, folder)}")
        before = from_json(folder.path / "config.json")
        if changed := differences(before, setup.config):
            print(f"other settings than this run had so far: {', '.join(changed)}")
        if before.train.nodes != setup.config.train.nodes:
            print(other_batches(before, setup.config))
        if jump := rate_jump(before, setup.config, setup.version):
            print(jump)
    print(f"{nodes.name} of {nodes.count}: {where(setup)}" if nodes.several else where(setup))
    print(batch_line(setup.config, setup.config.env.segment))
    print(f"{recipes.beside(setup.config)}{setup.note}run folder {folder.path}", flush=True)


def where(setup: Setup) -> str:
    """Says where everybody works, and what those who share a GPU may have of it."""
    # Workers with as many threads on the same cores are named together.
    placement = setup.placement
    threads = {"actor": placement.actor_threads, "rollout": placement.rollout_threads, "env": 1}
    alike: dict[tuple, list[str]] = {}
    for stage, count in threads.items():
        ranks: dict[frozenset[int], list[int]] = {}
        for rank, cores in enumerate(setup.cores(stage)):
            ranks.setdefault(cores, []).append(rank)
        for cores, these in ranks.items():
            names = f"{stage} {machine.ranges(these)}"
            alike.setdefault((cores, count), []).append(names)
    said = [
        f"{', '.join(names)}: {count} thread{'s' * (count > 1)} on {machine.where(cores)}"
        for (cores, count), names in alike.items()
    ]
    lines = [placement.line, "; ".join(said)]
    if shared := memory.pools(memory.table_of(setup, setup.room), setup.room):
        alone = "without MPS processes take turns on a GPU: start nvidia-cuda-mps-control -d"
        lines.append(f"{shared}; {'MPS runs' if machine.mps() else alone}")
    return "\n".join(lines)


def played_again(setup: Setup, folder: RunFolder) -> str:
    """Says which iterations a run had gone through after the checkpoint that it continues from."""
    newest = max((line["version"] for line in folder.lines()), default=0)
    if newest <= setup.version:
        return ""
    return f"; it ended at iteration {newest}, so those after {setup.version} come again"


def other_batches(before: Config, now: Config) -> str:
    """Says what another number of nodes makes of the batches."""
    was, is_now = (config.actor.batch * config.train.nodes for config in (before, now))
    size = f"a batch of all nodes has {is_now} trajectories now (was {was})"
    whose = "which one a trajectory belongs to follows from its env's number among all nodes' envs"
    return f"{size}: the same learning rates mean something else, and {whose}"


def rate_jump(before: Config, now: Config, version: int) -> str:
    """Says so where more --iterations lift the learning rate again, which had been annealed."""
    was = schedule(max(0, version - 1), before)
    becomes = schedule(version, now)
    if becomes <= 1.5 * was or version <= before.actor.warmup:
        return ""
    lift = f"learning rates rise from {was:.0%} to {becomes:.0%} of --lr and --value-lr"
    return f"{lift}, because the run is longer now: a lower --lr goes on more gently"


def differences(before: Config, now: Config) -> list[str]:
    """Lists the settings that differ, as they are now."""
    # What every start says anew: the files, too, for a run may have been copied.
    own = ("checkpoint", "tokenizer", "resume", "run", "ratio_from", "workers_given", "node")
    said = []
    for name in STAGE_OF:
        pair = setting(now, name), setting(before, name)
        if pair[0] != pair[1] and name not in own:
            words = [" ".join(map(str, x)) if isinstance(x, tuple) else x for x in pair]
            said.append(f"{flag_of(name)[2:]} {words[0]} (was {words[1]})")
    return said


@dataclass
class Handover:
    """What a run passes on to its next start at another ratio, in tuning.json."""

    process: str = field(default_factory=processes.this_process)  # the new start is the same one
    past: tuning.Past = field(default_factory=tuning.Past)  # what the tuner knows
    appended: float | None = None  # monotonic seconds, when the newest line was written
    heard: int | None = None  # the pipe of `keep_interrupts`; None where the run has just begun

    @classmethod
    def take(cls, path: Path) -> "Handover":
        """Reads and removes the file. Returns an empty one if it is not ours, or missing."""
        file = path / "tuning.json"
        if not file.is_file():
            return cls()
        found = read_json(file, cls, f"what the tuner remembered ({file}; remove it)")
        file.unlink()
        return found if found.process == processes.this_process() else cls()


def start_again(
    ratio: str,
    folder: RunFolder,
    nodes: Nodes,
    past: tuning.Past,
    interrupts: processes.Interrupts,
    tracker,
) -> None:
    """Starts the run again in this process, from its checkpoint, with the flags that were given.

    It returns only if Ctrl-C came before. The new start hears what comes later; of several nodes,
    which all start again, also what came before."""
    heard = processes.keep_interrupts(bytes(interrupts) if nodes.several else b"")
    if interrupts and not nodes.several:
        return
    handover = Handover(past=past, appended=folder.appended, heard=heard)
    folder.write("tuning.json", json.dumps(asdict(handover), default=sorted))  # sets become lists
    if tracker:
        tracker.finish()
    own = (*BEGINS_FROM, "--run", "--resume", "--resume-or-start", "--ratio-from")
    flags = without(sys.argv[1:], *own)
    processes.replace_this_process([*flags, "--resume", nodes.run, "--ratio-from", ratio])


def unused_path() -> Path:
    """Makes runs/DATE-TIME and returns it. Of runs that start at once all but one wait."""
    while True:
        path = run_path(time.strftime("%Y%m%d-%H%M%S"))
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            require(not path.parent.exists() or path.parent.is_dir(), f"{path.parent} is no folder")
            time.sleep(0.2)
        except OSError as error:
            found = f"cannot write the run folder {path}: {error.strerror}"
            raise UserError(f"{found}; give --run PATH, where you may write") from None


def open_folder(setup: Setup, nodes: Nodes) -> RunFolder:
    """Opens the run's folder; on other nodes than the first, one for what workers need. Raises
    UserError."""
    agree(nodes, setup.config)
    train = setup.config.train
    if not nodes.first:
        return RunFolder(nodes.copied or nodes.folder(nodes.run), resume=True)
    path = run_path(train.resume or train.run) if train.resume or train.run else unused_path()
    folder = RunFolder(path, resume=bool(train.resume or not train.run))
    folder.made |= not (train.resume or train.run)  # by `unused_path`
    # Whoever held the lock before may have saved since `prepare` looked.
    moved = f"run {folder.name} was saved again a moment ago: start once more"
    require(not setup.resume or newest_version(path) == setup.version, moved)
    nodes.name_run(folder.name)
    return folder


def begin(args: list[str]) -> int:
    """Runs what the command line asks for, with the other nodes, if there are any. Returns the exit
    status."""
    nodes = Nodes.here()
    with nodes.together():
        args = meet_the_others(nodes, args)
        config = parse(args) if nodes.first else None
        args = bring_run(nodes, args, config)
        return main(nodes.placed(config or parse(args)), nodes)


def main(config: Config, nodes: Nodes | None = None) -> int:
    """Runs to the end and returns the exit status. nodes: None where this one is alone."""
    # Prepare, and open the run's folder.
    nodes = nodes or Nodes()
    setup = prepare(config)
    train = setup.config.train
    if train.memory_report:
        memory_report(setup)
        return 0
    folder = open_folder(setup, nodes)

    # Go on from what a start at another ratio has passed on, if this is the next one.
    handover = Handover.take(folder.path)
    again = handover.heard is not None
    videos = folder.path / "videos"
    if setup.resume and nodes.first and not again:  # frames are left if its launcher was killed
        make_videos(folder.spans, videos)
    folder.clear(keep_trace=again)

    # Note interrupts from here on, and those that came during the handover.
    simulator = envs.SIMULATORS[train.env][0]
    model = models.files(train.model).__name__
    interrupts = processes.note_interrupts("train", simulator, model)
    for number in processes.kept_interrupts(handover.heard) if again else b"":
        interrupts.note(number)

    # Say what begins, and write what repeats it.
    tracker = mirror(setup.config, folder) if nodes.first else None
    folder.appended = handover.appended
    announce(setup, folder, again, nodes)
    if not setup.resume:
        folder.write("config.json", setup.saved)
    folder.keep(setup.config.train.tokenizer)
    if nodes.first and not again:
        started = html_report.command(nodes.count, sys.argv[1:])
        html_report.begin(folder, started, setup.placement.line, bool(setup.resume))

    # Run until it ends. A new ratio replaces this process: it returns only where Ctrl-C came first.
    try:
        end = run_crew(setup, folder, interrupts, tracker, handover.past, nodes)
    except Exception as error:
        if nodes.first:
            html_report.end(folder, f"error: {error}", 1)
        raise
    if end.ratio:
        nodes.close()
        start_again(end.ratio, folder, nodes, handover.past, interrupts, tracker)

    # Put videos, trace and report together. Of an interrupted run the trace is last: it may take
    # longer than a scheduler waits.
    print(end.message, file=sys.stderr if end.status == 1 else sys.stdout, flush=True)
    hurry = end.status == 130
    try:
        if nodes.first:
            make_videos(folder.spans, videos, HURRY_S if hurry else math.inf)
        if nodes.first and hurry:
            html_report.end(folder, end.message, end.status)
        nodes.gather_spans(folder.spans)
        if not nodes.first:
            folder.remove(failed=end.status == 1)
            return nodes.status(end.status)
        folder.finish()
    except OSError as error:
        print(f"warning: {disk_trouble(error)}: without the trace", file=sys.stderr)
    if nodes.first and not hurry:
        html_report.end(folder, end.message, end.status)
    return nodes.status(end.status)


def run_crew(
    setup: Setup,
    folder: RunFolder,
    interrupts: processes.Interrupts,
    tracker,
    past: tuning.Past,
    nodes: Nodes,
) -> End:
    """Starts all workers, follows them, and ends them."""
    channels = connect(setup)
    reports, report = mp.Pipe(duplex=False)
    meeting = nodes.meeting(folder.spans / f"rendezvous-{setup.version}")
    listed = jobs(setup, channels, folder, meeting, report)
    env, train = setup.config.env, setup.config.train
    crew = Crew(listed, channels.counters, folder.path, env.restarts, train.timeout_s)
    rows = {stage: [] for stage in metrics.STAGES}
    for job in listed:
        rows[job.name.partition("-")[0]].append(job.meter.row)
    cores = machine.cores()
    tuner = tuning.Tuner(setup.choices, channels.counters, rows, past, cores, train.iterations)
    follower = Follower(setup, folder, crew, channels, reports, interrupts, tracker, tuner, nodes)
    try:
        crew.start_all()
        return follower.follow()
    finally:
        crew.stop(interrupts)


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(begin(sys.argv[1:]))
