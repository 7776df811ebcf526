"""Kills, stops and crashes random processes of running trainings, and checks what is left.

    python -m benchmarks.faults --seconds 300                5 minutes
    python -m benchmarks.faults --events 1000 --seconds 1e6  a campaign

A signal of SIGNALS goes to a random process of a run: an env, rollout or actor worker, the
launcher, or the fork server. Four kinds of run take turns (RUNS). A run lives through up to LIVES
faults of env workers, and SIGSTOP of the whole run for longer than --timeout-s, which it must
survive; then comes a fault that ends it, after which it goes on from its newest checkpoint. Checked
are: what survives trains on; what ends does so within END_S, without a traceback, and leaves no
process and no file in /dev/shm; both identities of the accounts hold in every line, of which none
is missing or doubled; survivors gain at most GROWTH_MB and no open file. Stages are emulated ones,
since faults are those of processes. Left out: full disks, lost networks, several machines.
"""

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
from run_folder import has_checkpoint, read_metrics

BASE = (
    "--model emulated --env-workers 2 --envs 8 --batch 8 --minibatch 8 --micro-batch 4 --segment 2 "
    "--update-epochs 1 --eval-envs 0 --eval-every 0 --no-trace --checkpoint-every 3 "
    "--ratio 1:1 --restarts 1000 --timeout-s 4 --iterations 1000000"
)
RUNS = {
    "PPO": "--env emulated --tasks 0",
    "GRPO": "--env emulated --tasks 0 --algorithm grpo --group-size 4 --segment 8",
    "vectorised": "--env vectorised",
    "colocated": "--env emulated --tasks 0 --placement colocated",
}
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGABRT")
FATAL = ("rollout", "actor", "launcher", "fork server")
LIVES = 3  # faults that a run survives before the one that ends it; each delays the next restart
END_S = 20.0  # seconds, --timeout-s and the five for saying good-bye included
GOES_ON_S = 60.0  # seconds until a run trains again
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
    """also write the events to this file"""


class Wrong(Exception):
    """Something that must hold after a fault did not."""


class Life:
    """One start of a run, with all of its processes."""

    def __init__(self, folder: Path, flags: str):
        self.folder = folder
        self.mark = uuid.uuid4().hex  # every descendant inherits it
        self.log = folder.with_suffix(".log")
        where = f"--resume {folder}" if has_checkpoint(folder) else f"--run {folder}"
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
                    server = any("forkserver" in word for word in process.cmdline())
                    name = "fork server" if server else f"other {process.pid}"
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
    """Sends a signal to one process of a stage, and returns which process it was."""
    time.sleep(rng.uniform(0.0, 0.5))
    living = life.living()
    chosen = rng.choice(sorted(one for one in living if one.partition("-")[0] == stage))
    living[chosen].send_signal(signal.Signals[name])
    return chosen


def live(run: str, folder: Path, count: int, rng: random.Random) -> list[dict]:
    """Starts or resumes a run, injects `count` faults of which the last one ends it, and returns
    what came of each."""
    events = []
    life = Life(folder, f"{BASE} {RUNS[run]}")
    try:
        life.trains(2)
        before = {name: size_of(process) for name, process in life.living().items()}
        replaced = set()
        for n in range(count):
            last = n == count - 1
            stage = rng.choice(FATAL if last else ("env", "env", "everything"))
            name = "SIGSTOP" if stage == "everything" else rng.choice(SIGNALS)
            event = {"run": run, "process": stage, "signal": name, "seconds": 0.0, "wrong": ""}
            events.append(event)
            start = time.monotonic()
            if stage == "everything":
                os.killpg(life.process.pid, signal.SIGSTOP)
                time.sleep(6.0)  # longer than --timeout-s
                os.killpg(life.process.pid, signal.SIGCONT)
                life.trains(2)
            elif not last:
                replaced.add(hit(life, stage, name, rng))
                life.trains(4)  # more than a launcher that is late may have had in store
            elif stage == "launcher" and name == "SIGSTOP":
                # It must survive this one, and is ended as by a user.
                hit(life, stage, name, rng)
                time.sleep(6.0)
                life.process.send_signal(signal.SIGCONT)
                life.trains(2)
                check_size(life, before, replaced)
                life.process.send_signal(signal.SIGINT)
                life.ends()
            else:
                check_size(life, before, replaced)
                hit(life, stage, name, rng)
                if stage == "fork server" and name == "SIGSTOP":
                    life.trains(2)  # nobody misses it until a worker is to be replaced
                    life.process.send_signal(signal.SIGINT)
                life.ends()
            event["seconds"] = round(time.monotonic() - start, 2)
        check_accounts(folder)
        left = shared_memory()
        time.sleep(1.0)  # somebody else's may be just being made
        if left := left & shared_memory():
            raise Wrong(f"left in /dev/shm: {sorted(left)}")
    except Wrong as wrong:
        if not events:
            raise
        events[-1]["wrong"] = str(wrong)
    finally:
        life.kill()
    return events


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
            count = min(LIVES + 1, config.events - len(events))
            events += live(run, Path(folder) / run, count, rng)
            turn += 1
    return events


def table(events: list[dict]) -> str:
    """Writes a row per kind of process: events by signal, the slowest, and what went wrong."""
    heads = ("process", *SIGNALS, "slowest, s", "wrong")
    rows = [heads, ("---",) * len(heads)]
    for stage in ("env", *FATAL, "everything"):
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
    print(f"{len(events)} events, runs: {dict(Counter(event['run'] for event in events))}")
    print(table(events))
    wrong = [event for event in events if event["wrong"]]
    for event in wrong:
        print(f"{event['run']}, {event['process']}, {event['signal']}: {event['wrong']}")
    if config.json:
        config.json.write_text("".join(json.dumps(event) + "\n" for event in events))
    return int(bool(wrong))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(tyro.cli(FaultsConfig)))
