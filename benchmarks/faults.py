"""Kills, stops and crashes random processes of running trainings, and checks what is left.

    python -m benchmarks.faults --seconds 300                              5 minutes
    python -m benchmarks.faults --events 1000 --seconds 1e6 --json FILE    a campaign

A signal of SIGNALS goes to a random process of a run. Four kinds of run take turns (RUNS). A life
of a run goes through faults that it must survive (SURVIVED): of env workers, several at once, of
rollout workers, of the resource tracker, and SIGSTOP of everything for longer than --timeout-s.
Then comes a fault that ends it (FATAL), of an actor worker, of the launcher or of the fork server,
and in its next life the run goes on from its newest checkpoint. A launcher that is stopped is
either let go again, or killed after the actor has gone on without it.

Checked are: what survives trains on; what ends does so within END_S, without a traceback, and
leaves no process and no file in /dev/shm; both identities of the accounts hold in every line, of
which none is missing or doubled; survivors gain at most GROWTH_MB and no open file. Stages are
emulated ones, since faults are those of processes. Left out: full disks, lost networks, several
machines.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from benchmarks.measuring import end_on_sigterm
from config import ROOT
from errors import exit_on_user_error
from run_folder import newest_version, read_metrics

BASE = (
    "--model emulated --env-workers 4 --envs 8 --batch 8 --minibatch 8 --micro-batch 8 --segment 2 "
    "--update-epochs 1 --eval-envs 0 --eval-every 0 --no-trace --checkpoint-every 3 --keep 5 "
    "--ratio 1:1 --restarts 1000 --timeout-s 5 --iterations 1000000"
)
RUNS = {
    "PPO": "--env emulated --tasks 0",
    "GRPO": "--env emulated --tasks 0 --algorithm grpo --group-size 4 --segment 8",
    "vectorised": "--env vectorised --lanes 1",
    "colocated": "--env emulated --tasks 0 --placement colocated",
}
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGABRT")
# By how often they are hit.
SURVIVED = ("env",) * 6 + ("rollout",) * 3 + ("resource tracker", "everything")
FATAL = ("actor", "launcher", "fork server")
LIVES = 12  # faults that a run survives before the one that ends it
AT_ONCE = 4  # of env workers at most, as each one's later restarts are delayed more
AWAY_S = 7.0  # seconds: longer than --timeout-s
END_S = 25.0  # seconds, --timeout-s and the five for saying good-bye included
GOES_ON_S = 90.0  # seconds until a run trains again
GROWTH_MB = 64.0  # of a survivor's private memory within one life of a run


@dataclass(kw_only=True)
class FaultsConfig:
    """Kills, stops and crashes random processes of running trainings."""

    events: int = 1_000_000
    """faults to inject"""
    seconds: float = 300.0
    """time after which no new life of a run begins"""
    seed: int = 1
    """which processes, signals and moments"""
    runs: tuple[str, ...] = tuple(RUNS)
    """kinds of run"""
    json: Path | None = None
    """also write the table and the counts behind it to this file, after each life of a run"""


class Wrong(Exception):
    """Something that must hold after a fault did not."""


class Life:
    """One start of a run, with all of its processes."""

    def __init__(self, folder: Path, flags: str):
        self.folder = folder
        self.mark = uuid.uuid4().hex  # every descendant inherits it
        self.log = folder.with_suffix(".log")
        where = f"--run {folder}" if newest_version(folder) is None else f"--resume {folder}"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "train.py", *flags.split(), *where.split()],
                cwd=ROOT,
                env=os.environ | {"FAULTS_MARK": self.mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def living(self) -> dict[str, psutil.Process]:
        """Returns its processes by what they are: "env-0", "launcher", "fork server", others."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get("FAULTS_MARK") != self.mark:
                    continue
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                name = Path(f"/proc/{process.pid}/comm").read_text().strip()
                if process.pid == self.process.pid:
                    name = "launcher"
                elif name.partition("-")[0] not in ("env", "rollout", "actor"):
                    command = " ".join(process.cmdline())
                    name = f"other {process.pid}"
                    name = "fork server" if ".forkserver" in command else name
                    name = "resource tracker" if ".resource_tracker" in command else name
                found[name] = process
            except (psutil.Error, OSError):
                pass
        return found

    def trains(self, more: int) -> None:
        """Waits for more lines of metrics.jsonl than there are. Raises Wrong."""
        wanted = len(lines_of(self.folder)) + more
        deadline = time.monotonic() + GOES_ON_S
        while len(lines_of(self.folder)) < wanted:
            if self.process.poll() is not None:
                raise Wrong(f"it ended: {self.log.read_text()[-500:]}")
            if time.monotonic() > deadline:
                raise Wrong(f"it trained nothing for {GOES_ON_S:.0f} s")
            time.sleep(0.1)

    def ends(self) -> float:
        """Waits until nothing of it is left, and returns how long that took. Raises Wrong."""
        start = time.monotonic()
        self.process.poll()
        while left := self.living():
            if time.monotonic() - start > END_S:
                raise Wrong(f"still alive after {END_S:.0f} s: {', '.join(left)}")
            time.sleep(0.1)
            self.process.poll()
        if "Traceback" in (said := self.log.read_text()):
            raise Wrong(f"a traceback: {said[-1000:]}")
        return time.monotonic() - start

    def kill(self) -> None:
        for process in self.living().values():
            process.kill()
        self.process.wait()


def lines_of(folder: Path) -> list[dict]:
    return read_metrics(folder) if folder.is_dir() else []


def size_of(process: psutil.Process) -> tuple[float, int]:
    """Returns private memory in MB, and the number of open files."""
    memory = process.memory_info()
    return (memory.rss - memory.shared) / 1e6, process.num_fds()


def shared_memory() -> set[str]:
    """Returns the names in /dev/shm that no living process has mapped. Somebody else's may come and
    go meanwhile."""
    found = {entry.inode(): entry.name for entry in os.scandir("/dev/shm")}
    for process in psutil.process_iter() if found else ():
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:
            continue
        for line in maps:
            if "/dev/shm/" in line:
                found.pop(int(line.split()[4]), None)
    return set(found.values())


def check_accounts(folder: Path) -> None:
    """Raises Wrong unless every line follows on the one before and both identities hold."""
    lines = lines_of(folder)
    numbers = [line["iteration"] for line in lines]
    if numbers != list(range(1, len(lines) + 1)):
        raise Wrong(f"lines are missing or doubled: {numbers[-20:]}")
    epochs = json.loads((folder / "config.json").read_text())["actor"]["update_epochs"]
    samples = 0
    for line in lines:
        samples += line["trained"] + line["skipped"]
        known = line["trained_once"] + line["discarded"]
        if line["discarded"] != sum(line["discarded_by"].values()) or line["collected"] < known:
            raise Wrong(f"the first identity does not hold: {line}")
        if samples != epochs * line["trained_once"]:
            raise Wrong(f"the second identity does not hold: {line}")


def hit(life: Life, stage: str, name: str, rng: random.Random) -> str:
    """Sends a signal to one process of a stage, and returns which process it was, or ""."""
    time.sleep(rng.uniform(0.0, 0.3))
    if stage == "everything":
        os.killpg(life.process.pid, signal.SIGSTOP)
        time.sleep(AWAY_S)
        os.killpg(life.process.pid, signal.SIGCONT)
        return ""
    deadline = time.monotonic() + GOES_ON_S
    while time.monotonic() < deadline:
        if life.process.poll() is not None:
            raise Wrong(f"it ended: {life.log.read_text()[-500:]}")
        living = life.living()
        alike = sorted(one for one in living if one.partition("-")[0] == stage)
        with contextlib.suppress(psutil.NoSuchProcess):  # it died in this moment
            if alike:
                chosen = rng.choice(alike)
                living[chosen].send_signal(signal.Signals[name])
                return chosen
        time.sleep(0.1)  # every one may be just being replaced
    raise Wrong(f"there was no {stage} process for {GOES_ON_S:.0f} s")


def plan_of(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Returns processes and signals of one life of a run. Only the last one ends it."""
    plan = []
    for n in range(count):
        stage = rng.choice(FATAL if n == count - 1 else SURVIVED)
        if stage in ("resource tracker", "everything") and stage in dict(plan):
            stage = "env"  # there is one resource tracker, and everything takes long
        plan.append((stage, "SIGSTOP" if stage == "everything" else rng.choice(SIGNALS)))
    return plan


def live(run: str, folder: Path, plan: list[tuple[str, str]], rng: random.Random) -> list[dict]:
    """Starts or resumes a run, injects the faults of a plan, and returns what came of each."""
    events = []
    life = Life(folder, f"{BASE} {RUNS[run]}")
    try:
        life.trains(2)
        before = {name: size_of(process) for name, process in life.living().items()}
        replaced = set()
        at_once = 0
        for n, (stage, name) in enumerate(plan):
            start = time.monotonic()
            event = {"run": run, "process": stage, "signal": name, "seconds": 0.0, "wrong": ""}
            events.append(event)
            if n == len(plan) - 1:
                check_size(life, before, replaced)
                end(life, stage, name, rng)
            else:
                replaced.add(hit(life, stage, name, rng))
                # Env workers are hit several at once.
                at_once += 1
                if at_once < AT_ONCE and stage == plan[n + 1][0] == "env" and rng.random() < 0.8:
                    continue
                at_once = 0
                life.trains(4)  # more than a launcher that is late may have had in store
            event["seconds"] = round(time.monotonic() - start, 2)
        check_accounts(folder)
        check_left()
    except Wrong as wrong:
        if not events:
            raise
        events[-1]["wrong"] = str(wrong)
    finally:
        life.kill()
    return events


def end(life: Life, stage: str, name: str, rng: random.Random) -> None:
    """Injects the fault that ends a life. SIGSTOP of the launcher or of the fork server does not: a
    killing or an interrupt follows it. Raises Wrong."""
    if tracker := life.living().get("resource tracker"):
        tracker.resume()  # who was stopped cannot see that all others have ended
    hit(life, stage, name, rng)
    if name == "SIGSTOP" and stage == "launcher":
        time.sleep(AWAY_S)  # the actor goes on and saves until its reports fill a pipe
        if rng.random() < 0.5:
            life.process.kill()
        else:
            life.process.send_signal(signal.SIGCONT)
            life.trains(2)
            life.process.send_signal(signal.SIGINT)
    elif name == "SIGSTOP" and stage == "fork server":
        life.trains(2)  # nobody misses it until a worker is to be replaced
        life.process.send_signal(signal.SIGINT)
    life.ends()


def check_left() -> None:
    """Raises Wrong where something stays in /dev/shm. Somebody else's may be just being made."""
    left = shared_memory()
    for _ in range(10):
        if not left:
            return
        time.sleep(0.5)
        left &= shared_memory()
    raise Wrong(f"left in /dev/shm: {sorted(left)}")


def check_size(life: Life, before: dict[str, tuple[float, int]], replaced: set[str]) -> None:
    """Raises Wrong where a process that was never hit has grown, or left files open."""
    for name, process in life.living().items():
        if name not in before or name in replaced:
            continue
        memory, files = size_of(process)
        if memory - before[name][0] > GROWTH_MB or files - before[name][1] > 4:
            raise Wrong(f"{name} grew from {before[name]} to {(memory, files)} (MB, files)")


def campaign(config: FaultsConfig) -> list[dict]:
    """Returns every event; the runs take turns until the events or the time are used up."""
    rng = random.Random(config.seed)
    events = []
    end = time.monotonic() + config.seconds
    with tempfile.TemporaryDirectory() as folder:
        turn = 0
        while len(events) < config.events and time.monotonic() < end:
            run = config.runs[turn % len(config.runs)]
            plan = plan_of(min(LIVES + 1, config.events - len(events)), rng)
            events += live(run, Path(folder) / run, plan, rng)
            turn += 1
            if config.json:
                config.json.write_text(json.dumps(report(events, config.seed), indent=1) + "\n")
    return events


def report(events: list[dict], seed: int) -> dict:
    """Returns what --json holds: counts of runs and of processes with their signals, what was
    wrong, and the table, in Markdown."""
    return {
        "what": "faults",
        "machine": f"{os.cpu_count()} cores",
        "seed": seed,
        "events": len(events),
        "runs": dict(Counter(event["run"] for event in events)),
        "wrong": [event for event in events if event["wrong"]],
        "table": table(events).splitlines(),
    }


def table(events: list[dict]) -> str:
    """Writes a row per kind of process: events by signal, the slowest, and what went wrong."""
    heads = ("process", *SIGNALS, "slowest, s", "wrong")
    rows = [heads, ("---",) * len(heads)]
    for stage in (*dict.fromkeys(SURVIVED), *FATAL):
        mine = [event for event in events if event["process"] == stage]
        if mine:
            count = Counter(event["signal"] for event in mine)
            slowest = max(event["seconds"] for event in mine)
            wrong = sum(bool(event["wrong"]) for event in mine)
            rows.append((stage, *(count[name] for name in SIGNALS), f"{slowest:.1f}", wrong))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main(config: FaultsConfig) -> int:
    """Returns the exit status: 1 where something was wrong."""
    end_on_sigterm()
    events = campaign(config)
    found = report(events, config.seed)
    print(f"{found['events']} events, runs: {found['runs']}", *found["table"], sep="\n")
    for event in found["wrong"]:
        print(f"{event['run']}, {event['process']}, {event['signal']}: {event['wrong']}")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(tyro.cli(FaultsConfig)))
