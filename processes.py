"""Starts the processes of a run, sees that one is gone, and replaces it.

A simulator may raise, crash, hang, return NaN or be killed for want of memory, and so may a policy
on its GPU. That ends an env or a rollout worker and nothing else: the launcher starts another in
its place, 1, 2, 4 … seconds later and at most `--restarts` times each. It plays again what the dead
one had begun, or serves what that one left unanswered. Three things end the run instead: an error
that would only come again (`may_pass`, or the same one twice in a row), a worker that fails before
it was ever ready, and the end of an actor worker, which alone holds the weights being trained.
"""

import atexit
import contextlib
import ctypes
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.multiprocessing as mp

import machine
import metrics
import output
from channel import Counters
from config import ROOT
from errors import UserError, place_of

START_UP = 10  # times the time limit: reading billions of weights and compiling take their time
# Ctrl-C, a scheduler, its warning some time before, a terminal.
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# The launcher's word to a worker. A scheduler sends the others to every process.
LEAVE = signal.SIGUSR2
LONGEST_BACKOFF = 60.0  # seconds
RECENT_S = 3600.0  # restarts longer ago do not count: a run of days may meet many rare faults
# Errors of wrong code, which come again. LookupError is KeyError and IndexError; ValueError is a
# wrong shape.
WRONG_CODE = (SyntaxError, NameError, AttributeError, ImportError, NotImplementedError)
WRONG_CODE += (TypeError, ValueError, LookupError, AssertionError)
LESS_MEMORY = (
    "lower --micro-batch, --batch-max or --envs, or give --checkpointing on or --cache-prefix off"
)
# What torch says of shapes that do not go together, as a RuntimeError.
WRONG_SHAPES = r"must match|cannot be multiplied|size mismatch|[Ee]xpected .*size|invalid for input"


class WorkerFailed(Exception):
    """A worker is gone or hangs and is not to be replaced; the message names it."""


class GpuPart(NamedTuple):
    """What a worker may have of a GPU's memory."""

    device: str
    share: float  # 1.0: all


@dataclass
class Job:
    name: str  # of the worker: "env-0"
    target: Callable
    args: tuple  # the last one is `meter`
    threads: int
    meter: metrics.Meter
    environment: dict[str, str]
    replaceable: bool = False
    start_up: float = 1.0  # times the time limit that a successor may take until it is ready
    part: GpuPart | None = None  # of the GPU where torch allocates
    cores: frozenset[int] | None = None  # that it may use; None: all


class Failure(NamedTuple):
    name: str  # of the worker
    cause: str  # "died (SIGSEGV)"
    passes: bool  # whether another process may do better


def may_pass(error: BaseException) -> bool:
    """Decides, here alone, whether the same work may succeed in a new process.

    It may not after a user's mistake or where the code is wrong. Every other error depends on the
    moment or the state of a simulation: FloatingPointError of an unstable one, LinAlgError (a
    ValueError) of a singular one, RuntimeError, OSError, MemoryError."""
    if isinstance(error, RuntimeError) and re.search(WRONG_SHAPES, str(error)):
        return False
    singular = isinstance(error, np.linalg.LinAlgError)
    return singular or not isinstance(error, (UserError, *WRONG_CODE))


def describe(error: BaseException, part: GpuPart | None = None) -> str:
    """Says what went wrong. part: what the worker may have of a GPU."""
    if isinstance(error, UserError):
        return f"failed: {error}"
    if part and isinstance(error, torch.OutOfMemoryError):
        total = torch.cuda.get_device_properties(part.device).total_memory / 1e9
        budget = f"its budget is {part.share * total:.1f} of {total:.1f} GB of {part.device}"
        asked = re.search(r"allocate ([\d.]+ \w+).* of which ([\d.]+ \w+) is free", str(error))
        more = f", it asked for {asked[1]} more, and {asked[2]} are free there" if asked else ""
        return f"failed: out of GPU memory: {budget}{more}: {LESS_MEMORY}"
    said = f"failed: {type(error).__name__}: {error}"[:1000]
    return said if may_pass(error) else f"{said}, at {place_of(error)}"


def keep_freed_memory() -> None:
    """Keeps the memory of freed tensors: an inference on a CPU takes 17 % less (small π0.5)."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # of glibc; bytes
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: what is free at the heap's end stays
        # M_MMAP_THRESHOLD, or the other makes it 2¹⁷, and larger tensors are mapped anew each time.
        mallopt(-3, 2**25)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Lets processes that are started inside inherit that interrupts wait, until they
    `leave_interrupts`."""
    resource_tracker.ensure_running()  # which unblocks them, where `keep_interrupts` had not
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


def leave_interrupts(parent: int = 0) -> None:
    """Makes this process die with its parent, and leave Ctrl-C to it.

    parent: its number, of a launcher, which is 1 in a container; the fork server never is."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    gone = os.getppid() != parent if parent else os.getppid() == 1
    if gone:
        os._exit(1)
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


def child(job: Job, errors: connection.Connection) -> None:
    """Runs a worker, and reports errors. Its parent is the fork server, which ends when the
    launcher does."""
    leave_interrupts()
    ctypes.CDLL(None).prctl(15, job.name.encode())  # PR_SET_NAME: what `top` calls it
    signal.signal(LEAVE, leave)
    # A copy; the fork server ends when the last of them is closed.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    os.environ.update(job.environment)
    output.never_fail()
    torch.set_num_threads(job.threads)
    os.sched_setaffinity(0, job.cores or os.sched_getaffinity(0))
    keep_freed_memory()
    status = 0
    try:
        if job.part:
            machine.take_part(*job.part)
        job.target(*job.args)
        signal.signal(LEAVE, signal.SIG_IGN)  # it ends by itself
    except SystemExit:  # LEAVE; if the launcher did not send it, it must see a death
        status = 128 + LEAVE
    except BaseException as error:
        trace = "" if isinstance(error, UserError) else traceback.format_exc()[-2500:]
        with contextlib.suppress(OSError):  # a launcher that is gone asks for nothing
            errors.send((Failure(job.name, describe(error, job.part), may_pass(error)), trace))
        status = 1
    job.meter.flush()
    os._exit(status)


def leave(*_) -> None:
    """Answers LEAVE, once. What the worker was just building is dropped, and must not complain."""
    signal.signal(LEAVE, signal.SIG_IGN)
    sys.unraisablehook = lambda _: None
    sys.exit()


class Interrupts(list[int]):
    """The signals that told a run to save and end. A scheduler has several words for it, and says
    them again; only a second Ctrl-C says more than the first."""

    by_hand_at = -math.inf  # monotonic seconds of the newest Ctrl-C

    def note(self, number: int, *_) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self.by_hand_at <= 0.5:  # `timeout` and terminals may send it twice
                return
            self.by_hand_at = now
        self.append(number)

    @property
    def twice(self) -> bool:
        return self.count(signal.SIGINT) > 1


def interrupts_heard() -> list[int]:
    """Lists INTERRUPTS, without SIGHUP where `nohup` has this program ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in INTERRUPTS if number != signal.SIGHUP or not ignored]


def note_interrupts(*modules: str) -> Interrupts:
    """Lets INTERRUPTS only be noted in what is returned, from here on.

    Starts the fork server too, which imports `modules` for all workers (preload.py). Interrupts may
    reach it before it has handlers, so it inherits that they are blocked."""
    # Threads that wait must sleep: on shared cores, spinning at barriers is several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The launcher has five descriptors for each worker, and the usual limit is 1024.
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # The fork server looks for what it preloads here alone, and does not say when it fails.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *paths]))
    machine.shorten_temporary()
    interrupts = Interrupts()
    for number in interrupts_heard():
        signal.signal(number, interrupts.note)
    with interrupts_wait():
        os.environ["VLA3_PRELOAD"] = " ".join(modules)
        forkserver.set_forkserver_preload(["preload"])
        forkserver.ensure_running()
    return interrupts


def keep_interrupts(before: bytes = b"") -> int:
    """Lets a pipe note interrupts, also for the program that replaces this one. Returns its end to
    read from. The mask of a thread is not enough: other threads are interrupted.

    before: the numbers of signals that came already."""
    heard, noted = os.pipe()
    os.write(noted, before)
    os.set_blocking(heard, False)
    os.set_blocking(noted, False)
    os.set_inheritable(heard, True)
    signal.set_wakeup_fd(noted)
    # Until the next program comes to `note_interrupts`.
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    return heard


def kept_interrupts(heard: int) -> bytes:
    """Reads and closes what `keep_interrupts` has returned to the program before this one. Returns
    the signals that came."""
    noted = os.read(heard, 100)
    os.close(heard)
    return noted


def this_process() -> str:
    """Names this process among all that this machine, or container, ever has: by its number and
    when it began, in the kernel's ticks. A program that replaces another in it has the same name.
    """
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return f"{os.getpid()} since {after_name[19]}"


def replace_this_process(flags: list[str]) -> None:
    """Starts this process's program anew, with other flags. It keeps its number."""
    # Do what Python does at its end. Open files close by themselves.
    forkserver._forkserver._stop()
    atexit._run_exitfuncs()
    resource_tracker._resource_tracker._stop()
    sys.stdout.flush()
    sys.stderr.flush()
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]  # "-u", "train.py"
    os.execv(sys.executable, [sys.executable, *program, *flags])


def lives(pid: int) -> bool:
    """Whether a process still holds what it held. A zombie does not, and may never be buried."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Crew:
    """The workers of a run. The launcher calls `watch` again and again, and `stop` at the end."""

    def __init__(
        self, jobs: list[Job], counters: Counters, folder: Path, restarts: int, timeout: float
    ):
        self.jobs = {job.name: job for job in jobs}
        self.counters = counters
        self.folder = folder
        self.restarts = restarts  # of each worker, within RECENT_S
        self.timeout = timeout  # seconds
        self.errors, self.error = mp.Pipe(duplex=False)
        self.processes: dict[str, mp.Process] = {}
        self.started: dict[str, float] = {}  # when its present process was started
        self.due: dict[str, float] = {}  # when those who have none are started again
        self.lost: dict[str, list[float]] = {}  # when each failed, of late
        # How each last failed, and its seconds of work by then.
        self.ends: dict[str, tuple[str, float]] = {}
        self.done = 0.0  # sum of everybody's work here
        self.work = 0.0  # the same, with that of other nodes
        self.elsewhere = 0.0  # that of other nodes, in any measure that grows
        self.last_work = time.monotonic()  # when it last changed
        self.looked = self.last_work  # when the launcher last looked after its workers
        self.back = 0.0  # when it last came back after it had been away

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

    def counter(self, name: str, column: str) -> float:
        return self.counters.get(self.jobs[name].meter.row, column)

    def was_ready(self, name: str) -> bool:
        """Whether a worker has come to work, in this process or an earlier one."""
        return bool(self.counter(name, "ready") or self.counter(name, "restarts"))

    def waits_for(self, name: str) -> str:
        """Returns what a worker waits for, or "" while it works."""
        waiting = int(self.counter(name, "waiting"))
        return metrics.CAUSES[waiting - 1] if waiting else ""

    def watch(self, news: connection.Connection) -> bool:
        """Waits at most 0.25 s for news, and returns whether there is some. Replaces workers that
        failed, or raises WorkerFailed."""
        for name in [name for name, due in self.due.items() if due <= time.monotonic()]:
            del self.due[name]
            self.start(name)
        alive = [p.sentinel for p in self.processes.values() if p.exitcode is None]
        ready = connection.wait([news, self.errors, *alive], timeout=0.25)
        self.notice_absence()
        while failure := self.failure():
            self.replace(failure)
        self.check_progress()
        return news in ready

    def notice_absence(self) -> None:
        """Starts all clocks again if the launcher itself was away: suspended by Ctrl-Z, with its
        container or by a cluster. Then workers may have been, too, and silence says nothing."""
        now = time.monotonic()
        # It looks four times a second. Half a second more is what a busy machine may take.
        if now - self.looked > 0.75 + self.timeout / 4:
            self.back = now
            self.last_work = now
        self.looked = now

    def failure(self) -> Failure | None:
        """Returns the first failure that is found: an error, a death, or a worker that hangs."""
        processes = {name: p for name, p in self.processes.items() if name not in self.due}
        # Look who is dead before reading the errors: what a worker had to say, it said before.
        dead = {name: p.exitcode for name, p in processes.items() if p.exitcode is not None}
        # Who lost an actor that was killed says so, and it is not the cause.
        killed = {name: code for name, code in dead.items() if code < 0}
        while not killed and self.errors.poll():
            failure, trace = self.errors.recv()
            if failure.name not in processes:  # it was killed while it wrote this
                continue
            if not trace:
                return failure
            file = self.folder / "error.txt"
            try:
                with open(file, "a") as stream:
                    stream.write(f"{failure.name}\n{trace}\n")
            except OSError as refused:
                details = f"without details: {output.disk_trouble(refused, file)}"
            else:
                details = f"details in {file}"
            return failure._replace(cause=f"{failure.cause} ({details})")
        for name, code in (killed or dead).items():
            if code or self.jobs[name].replaceable:  # actors end by themselves
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                why = ": out of memory?" if code == -signal.SIGKILL else ""
                return Failure(name, f"died ({how}{why})", True)
        for name, process in processes.items():
            if process.exitcode is None and self.hangs(name):
                return Failure(name, f"hangs: no sign of life for {self.limit(name):.0f} s", True)
        return None

    def hangs(self, name: str) -> bool:
        """Whether a worker that was ready, or its successor that has just been started, has given
        no sign of life for too long."""
        if not self.was_ready(name):
            return False
        alive = max(self.counter(name, "time"), self.started[name])
        return time.monotonic() - max(alive, self.back) > self.limit(name)

    def limit(self, name: str) -> float:
        """Returns how many seconds a worker may be silent, or a successor take to be ready."""
        ready = self.counter(name, "ready")
        return self.timeout * (1.0 if ready else self.jobs[name].start_up)

    def replace(self, failure: Failure) -> None:
        """Ends what is left of a worker and plans its successor, or raises WorkerFailed."""
        name = failure.name
        said = f"worker {name} {failure.cause}"
        if not (failure.passes and self.jobs[name].replaceable and self.was_ready(name)):
            raise WorkerFailed(said)
        # The window is longer where hanging takes long to tell.
        window = max(RECENT_S, 2 * self.restarts * self.timeout * self.jobs[name].start_up)
        now = time.monotonic()
        lost = self.lost[name] = [when for when in self.lost.get(name, []) if when > now - window]
        before = len(lost)
        minutes = f"{window / 60:.0f} min"
        if before >= self.restarts:
            count = f"{before} restarts in {minutes}"
            raise WorkerFailed(f"{said}, after {count}: --restarts allows no more")
        # An error that comes again before any work is done will not pass; a kill might.
        end = failure.cause, self.counter(name, "work_s")
        if failure.cause.startswith("failed") and end == self.ends.get(name):
            raise WorkerFailed(f"{said}, twice in a row before it had done anything")
        self.ends[name] = end
        self.processes[name].kill()
        self.processes[name].join(10.0)
        if self.processes[name].is_alive():
            raise WorkerFailed(f"{said}, and cannot be killed")

        # End the wait that it was in. Nobody else writes its row now.
        row = self.jobs[name].meter.row
        metrics.count_wait(self.counters.table[row], self.counters.index, time.monotonic())
        self.counters.set(row, "waiting", 0.0)
        self.counters.set(row, "ready", 0.0)
        self.counters.add(row, "restarts", 1.0)
        lost.append(now)
        backoff = min(2.0 ** min(before, 10), LONGEST_BACKOFF)  # 2.0**1024 is too large a number
        self.due[name] = time.monotonic() + backoff
        count = f"{before + 1} of {self.restarts} in {minutes}"
        print(f"{said}; starting it again in {backoff:.0f} s ({count})", flush=True)

    def check_progress(self) -> None:
        """Raises WorkerFailed when all wait for somebody else and nobody is being replaced. On
        other nodes, too."""
        now = time.monotonic()
        starting = [name for name in self.jobs if not self.counter(name, "ready")]
        replacing = any(self.counter(name, "restarts") for name in starting)
        done = self.counters.table[:, self.counters.index["work_s"]].sum()
        # Who is being replaced counts as work, on other nodes as well.
        self.done = done + len(self.jobs) - len(starting) + now * replacing
        work = self.done + self.elsewhere
        if work != self.work or replacing:
            self.work = work
            self.last_work = now
        elif now - self.last_work > self.timeout * (START_UP if starting else 1):
            causes = [(name, self.waits_for(name)) for name in self.jobs]
            who = [f"{name} {'for ' + on if on else 'still starting'}" for name, on in causes]
            silence = f"nothing happened for {now - self.last_work:.0f} s"
            raise WorkerFailed(f"{silence}: {', '.join(who)}")

    def saves(self) -> bool:
        """Whether a worker writes a checkpoint, and is not suspended."""
        alive = [name for name, process in self.processes.items() if process.is_alive()]
        lately = time.monotonic() - self.timeout
        return any(self.counter(n, "saving") and self.counter(n, "time") > lately for n in alive)

    def stop(self, interrupts: Interrupts) -> None:
        """Ends all workers. None outlives this call. Who writes a checkpoint has the time for it,
        until somebody presses Ctrl-C twice."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):  # dead, and the fork server yet to say so
                if process.is_alive():
                    os.kill(process.pid, LEAVE)
        if self.saves():
            print("a checkpoint is being written; Ctrl-C twice stops without it", flush=True)
        while self.saves() and not interrupts.twice:
            time.sleep(0.1)
        deadline = time.monotonic() + 5.0
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        # Who is left dies with the fork server. That may itself be suspended, and tell of no end,
        # and its own end says nothing of those whom it has started.
        left = [process.pid for process in self.processes.values() if process.is_alive()]
        if left:
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
            for process in self.processes.values():
                process.join()
        deadline = time.monotonic() + 30.0  # a large memory takes its time to be given back
        while any(map(lives, left)) and time.monotonic() < deadline:
            time.sleep(0.02)

    def used(self) -> tuple[float, float]:
        """Returns private resident memory in GB, and CPU seconds so far, of all processes."""
        memory = 0.0
        seconds = 0.0
        for pid in (os.getpid(), *(process.pid for process in self.processes.values())):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                info = process.memory_info()
                times = process.cpu_times()
                memory += info.rss - info.shared
                seconds += times.user + times.system
        return memory / 1e9, seconds
