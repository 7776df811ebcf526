"""The processes of a run: how a worker starts, how the launcher sees that one is gone, and how it
replaces one.

A simulator may raise, crash, hang, return NaN or be killed for want of memory. That ends its env
worker and nothing else: the launcher starts another in its place, 1, 2, 4 … seconds later and at
most `--restarts` times each, which plays again what the dead one had begun
(`env_worker.take_over`). A worker that fails before it was ever ready has another problem, so that
ends the run, and so does the end of a rollout or an actor worker.

Left out: replacing rollout and actor workers.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path

import psutil
import torch
import torch.multiprocessing as mp

import metrics
from channel import Counters
from config import ROOT, UserError

START_UP = 10  # times the time limit: reading billions of weights and compiling take their time
INTERRUPTS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
)  # Ctrl-C, a scheduler, a closed terminal
# the launcher's word to a worker; SIGTERM is the launcher's, though a scheduler sends it to
# everybody
LEAVE = signal.SIGUSR1
LONGEST_BACKOFF = 60.0  # seconds
# restarts longer ago do not count: a rare fault may come again and again in a run of days
RECENT_S = 3600.0


class WorkerFailed(Exception):
    """A worker is gone or hangs and is not to be replaced; the message names it."""


@dataclass
class Job:
    """What a worker runs, and where."""

    name: str  # "env-0"
    target: Callable
    args: tuple  # the last one is `meter`
    threads: int
    meter: metrics.Meter
    environment: dict[str, str]
    replaceable: bool = False


def keep_freed_memory() -> None:
    """For this process: what a tensor leaves is there for the next one. An inference on a CPU,
    which would get its memory anew from the kernel, takes 17 % less (small π0.5, 12 samples).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # of glibc; bytes
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: what is free at the heap's end stays
        mallopt(-3, 2**25)
        # M_MMAP_THRESHOLD, else 2¹⁷ for ever once the other is set: larger ones would be mapped
        # each time


def child(job: Job, errors: connection.Connection) -> None:
    """Every worker's entry: dies with its parent, leaves Ctrl-C to the launcher, reports what went
    wrong by name.
    """
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG; the fork server itself ends when the launcher does
    ctypes.CDLL(None).prctl(15, job.name.encode())  # PR_SET_NAME: what `top` calls it
    if os.getppid() == 1:
        os._exit(1)
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(LEAVE, leave)
    os.close(
        forkserver._forkserver._forkserver_alive_fd
    )  # a copy: the fork server ends when the last of them is closed
    os.environ.update(job.environment)
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    status = 0
    try:
        job.target(*job.args)
    except (
        SystemExit
    ):  # LEAVE; where it is not the launcher's, it is a death that the launcher must see
        status = 128 + LEAVE
    except UserError as error:
        errors.send((job.name, str(error), ""))
        status = 2
    except BaseException as error:
        errors.send(
            (job.name, f"{type(error).__name__}: {error}"[:1000], traceback.format_exc()[-2500:])
        )
        status = 1
    job.meter.flush()
    os._exit(status)


def leave(*_) -> None:
    """A worker's answer to LEAVE. What it was just building is dropped half-built, and is not to
    complain about that.
    """
    sys.unraisablehook = lambda _: None
    sys.exit()


def note_interrupts() -> list[float]:
    """From here on Ctrl-C and SIGTERM only leave their time here. Starts the fork server, which
    they may reach too (Ctrl-C in a terminal, a scheduler's SIGTERM): it inherits that they are
    ignored while it starts.
    """
    # Threads that wait must sleep: where cores are shared, spinning at every barrier is several
    # times slower than waking up.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The fork server looks for what it preloads here alone, and says nothing when it fails: then
    # each worker imports torch itself.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    forkserver.set_forkserver_preload(
        ["actor_worker", "env_worker", "rollout_worker", "envs.metaworld", "models.pi"]
    )
    forkserver.ensure_running()
    interrupts: list[float] = []

    def note(*_) -> None:
        if (
            not interrupts or time.monotonic() - interrupts[-1] > 0.5
        ):  # `timeout` and terminals may send one word twice
            interrupts.append(time.monotonic())

    for number in INTERRUPTS:
        signal.signal(number, note)
    return interrupts


class Crew:
    """The workers of a run. The launcher calls `watch` again and again, and `stop` at the end."""

    def __init__(
        self, jobs: list[Job], counters: Counters, folder: Path, restarts: int, timeout: float
    ):
        self.jobs = {job.name: job for job in jobs}
        self.counters = counters
        self.folder = folder
        self.restarts = restarts
        self.timeout = timeout
        self.errors, self.error = mp.Pipe(duplex=False)
        self.processes: dict[str, mp.Process] = {}
        self.started: dict[str, float] = {}  # when its present process was started
        self.due: dict[str, float] = {}  # when those who have none are started again
        self.lost: dict[str, list[float]] = {}  # when each failed, of late
        # sum of everybody's work, and when it last changed
        self.work = 0.0
        self.last_work = time.monotonic()

    def start(self, name: str) -> None:
        process = mp.get_context("forkserver").Process(
            target=child, args=(self.jobs[name], self.error), name=name, daemon=True
        )
        process.start()
        self.processes[name] = process
        self.started[name] = time.monotonic()

    def start_all(self) -> None:
        for name in self.jobs:
            self.start(name)

    def watch(self, news: connection.Connection) -> bool:
        """Waits at most 0.25 s, and returns whether there is news. Replaces who may be; raises
        WorkerFailed for the others.
        """
        for name in [name for name, due in self.due.items() if due <= time.monotonic()]:
            del self.due[name]
            self.start(name)
        alive = [
            process.sentinel for process in self.processes.values() if process.exitcode is None
        ]
        ready = connection.wait([news, self.errors, *alive], timeout=0.25)
        while failure := self.failure():
            self.replace(*failure)
        self.check_progress()
        return news in ready

    def failure(self) -> tuple[str, str, bool] | None:
        """Who has failed, in which way, and whether it is the user's mistake."""
        now = time.monotonic()
        processes = {name: p for name, p in self.processes.items() if name not in self.due}
        dead = {name: p.exitcode for name, p in processes.items() if p.exitcode is not None}
        dead = {
            name: code for name, code in dead.items() if code or self.jobs[name].replaceable
        }  # actors end by themselves
        while (
            self.errors.poll()
        ):  # after looking who is dead: what a worker had to say, it said before
            name, message, trace = self.errors.recv()
            if name not in processes:
                continue  # it was killed while it wrote this
            if trace:
                with open(self.folder / "error.txt", "a") as file:
                    file.write(f"{name}\n{trace}\n")
                message += f" (details in {self.folder / 'error.txt'})"
            return name, f"failed: {message}", not trace
        for name, code in dead.items():
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            return (
                name,
                f"died ({how}{': out of memory?' if code == -signal.SIGKILL else ''})",
                False,
            )
        for name, process in processes.items():
            row = self.jobs[name].meter.row
            get = self.counters.get
            at_barrier = get(row, "waiting") == 1 + metrics.CAUSES.index(
                "gradient"
            )  # waits for other ranks, silently
            if (
                process.exitcode is not None
                or at_barrier
                or not (get(row, "ready") or get(row, "restarts"))
            ):
                continue  # while a run starts up, `check_progress` alone counts the time
            if now - (get(row, "time") if get(row, "ready") else self.started[name]) > self.timeout:
                return name, f"hangs: no sign of life for {self.timeout:.0f} s", False
        return None

    def replace(self, name: str, cause: str, mistake: bool) -> None:
        """Ends what is left of a worker and says when its successor starts. Raises WorkerFailed
        where there is to be none.
        """
        job = self.jobs[name]
        row = self.jobs[name].meter.row
        if (
            mistake
            or not job.replaceable
            or not (self.counters.get(row, "restarts") or self.counters.get(row, "ready"))
        ):
            raise WorkerFailed(f"worker {name} {cause}")
        # longer where hanging takes long to tell
        window = max(RECENT_S, 2 * self.restarts * self.timeout)
        now = time.monotonic()
        lost = self.lost[name] = [when for when in self.lost.get(name, []) if when > now - window]
        if (before := len(lost)) >= self.restarts:
            raise WorkerFailed(
                f"worker {name} {cause}, after {before} restarts in {window / 60:.0f} min: "
                "--restarts allows no more"
            )
        self.processes[name].kill()
        self.processes[name].join(10.0)
        if self.processes[name].is_alive():
            raise WorkerFailed(f"worker {name} {cause}, and cannot be killed")
        backoff = min(2.0**before, LONGEST_BACKOFF)
        lost.append(now)
        metrics.count_wait(
            self.counters.table[row], self.counters.index, time.monotonic()
        )  # nobody else writes this row now
        self.counters.set(row, "waiting", 0.0)
        self.counters.set(row, "ready", 0.0)
        self.counters.add(row, "restarts", 1.0)
        self.due[name] = time.monotonic() + backoff
        count = f"{before + 1} of {self.restarts} in {window / 60:.0f} min"
        print(f"worker {name} {cause}; starting it again in {backoff:.0f} s ({count})", flush=True)

    def check_progress(self) -> None:
        """Raises WorkerFailed when everybody waits for somebody else, and nobody is just being
        replaced.
        """
        now = time.monotonic()
        column = self.counters.index
        starting = [
            name for name, job in self.jobs.items() if not self.counters.get(job.meter.row, "ready")
        ]
        replacing = [
            name for name in starting if self.counters.get(self.jobs[name].meter.row, "restarts")
        ]
        work = self.counters.table[:, column["work_s"]].sum() + len(self.jobs) - len(starting)
        if work != self.work or replacing:
            self.work = work
            self.last_work = now
        elif now - self.last_work > self.timeout * (START_UP if starting else 1):
            waiting = {
                name: int(self.counters.get(job.meter.row, "waiting"))
                for name, job in self.jobs.items()
            }
            who = ", ".join(
                f"{n} for {metrics.CAUSES[w - 1]}" if w else f"{n} still starting"
                for n, w in waiting.items()
            )
            raise WorkerFailed(f"nothing happened for {now - self.last_work:.0f} s: {who}")

    def stop(self) -> None:
        """No worker outlives this call."""
        for process in self.processes.values():
            if process.is_alive():
                os.kill(process.pid, LEAVE)
        deadline = time.monotonic() + 5.0
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def used(self) -> tuple[float, float]:
        """Private resident memory in GB, and CPU seconds so far, of all workers and this
        process.
        """
        memory = seconds = 0.0
        for pid in (os.getpid(), *(process.pid for process in self.processes.values())):
            try:
                process = psutil.Process(pid)
                info = process.memory_info()
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            memory = memory + info.rss - info.shared
            seconds = seconds + times.user + times.system
        return memory / 1e9, seconds
