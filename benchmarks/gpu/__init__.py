"""Measures in one run of at most 8 minutes what only a GPU can show; one is enough.

    python bench.py gpu --json gpu.json

Where there is no GPU, it runs to its end on a device that is not there (benchmarks/fake_gpu/), with
the small models: that shows that the command works, and its times mean nothing. Every row says so.

    section     what it measures                                                        its file
    machine     the yardsticks: large products, a copy on the device; what lies between    device.py
    copies      pinned and pageable copies, copies from slots, weights through CUDA IPC    device.py
    inference   of each family at full size: `act` alone, and served from slots          families.py
    actor       of each family at full size: micro-batches from slots, optimizer step    families.py
    precision   bf16 against fp32: speed, and what it does to log-probs                  families.py
    pipeline    train.py with π0.5 at full size and LIBERO's times, all on one GPU          runs.py
    maniskill   train.py with ManiSkill, simulated and drawn on the GPU                     runs.py
    tests       pytest -m gpu                                                               runs.py

Each section runs in a process of its own, so that a crash, an error of CUDA or a hang ends that
section alone. A section may take its share of the time that is left. Rows are written to the JSON
as they come: {"what", "machine", "device", "sections", "rows"}, where each row names its section,
and one that failed has "error". The exit status is 1 where anything failed.

Left out: several GPUs, several machines, learning.
"""

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from config import ROOT
from errors import UserError

SECONDS = 470.0  # of the whole command; it takes some more to end a section that hangs
FAKE_SECONDS = 1800.0  # where processors do the work: other programs may use them, too
FAKE_TAKES = "some 5 minutes on two cores"
ENDING_S = 4.0  # for a section that is told to end, before it is killed
LOG = 40  # lines of what a section said, which are kept where it failed
LOOK_S = 0.1  # how often a running section is looked at
PATH = (str(ROOT),)  # where sections are looked for
FAMILIES = ("pi05", "pi0", "gr00t", "oft")


@dataclass(frozen=True)
class Section:
    """A generator of rows: function(Where, *args)."""

    name: str
    function: str  # "module:function"
    args: tuple[str, ...] = ()
    share: float = 1.0  # of the time, beside those of the other sections


SECTIONS = (
    Section("machine", "benchmarks.gpu.device:machine", share=1.0),
    Section("copies", "benchmarks.gpu.device:copies", share=1.5),
    *(Section(f"inference {f}", "benchmarks.gpu.families:inference", (f,), 3) for f in FAMILIES),
    *(Section(f"actor {f}", "benchmarks.gpu.families:actor", (f,), 2.5) for f in FAMILIES),
    Section("precision", "benchmarks.gpu.families:precision", share=2.5),
    Section("pipeline", "benchmarks.gpu.runs:pipeline", share=8.0),
    Section("maniskill", "benchmarks.gpu.runs:maniskill", share=3.0),
    Section("tests", "benchmarks.gpu.runs:tests", share=3.0),
)


@dataclass(frozen=True)
class Where:
    """What a section measures on, and how long."""

    fake: bool = False  # whether the device is not there
    limit_s: float = 60.0  # the section's time
    seconds: float = 0.5  # of each median, at least three calls

    @property
    def device(self) -> str:
        return "cuda:0"

    @property
    def slots(self) -> int:
        return 4 if self.fake else 16

    @property
    def segment(self) -> int:
        """Chunk steps of a trajectory."""
        return 2 if self.fake else 8


def in_one_line(error: Exception) -> str:
    """Says what went wrong. An error of CUDA has several lines, of which the first one counts."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class Report:
    """What was measured so far, in a file that is whole at any moment."""

    def __init__(self, machine: str, fake: bool, file: Path | None):
        device = "not there: times mean nothing" if fake else "cuda:0"
        self.file = file
        self.result = {"what": "gpu", "machine": machine, "device": device}
        self.result |= {"seconds": 0.0, "sections": [], "rows": []}
        self.began = time.monotonic()
        self.write()

    def begin(self, section: Section) -> None:
        entry = {"section": section.name, "status": "running", "seconds": 0.0, "rows": 0}
        self.result["sections"].append(entry)
        self.write()

    def add(self, row: dict) -> None:
        entry = self.result["sections"][-1]
        entry["rows"] += 1
        fixed = {"section": entry["section"], "device": self.result["device"]}
        odd = {key: str(x) for key, x in row.items() if x != x or x in (math.inf, -math.inf)}
        self.result["rows"].append(fixed | row | odd)  # JSON has neither NaN nor infinity
        self.write()

    def end(self, status: str, seconds: float, error: str | None) -> None:
        if error:
            self.add({"error": error})
        failed = any("error" in row for row in self.rows())
        status = "failed" if failed and status == "ran" else status
        self.result["sections"][-1] |= {"status": status, "seconds": seconds}
        self.write()

    def keep_log(self, lines: list[str]) -> None:
        self.result["sections"][-1]["log"] = lines

    def rows(self) -> list[dict]:
        """Returns those of the newest section."""
        name = self.result["sections"][-1]["section"]
        return [row for row in self.result["rows"] if row["section"] == name]

    def failures(self) -> list[str]:
        """Says of each section that did not run to its end without an error what went wrong."""
        found = []
        for entry in self.result["sections"]:
            errors = [
                row["error"]
                for row in self.result["rows"]
                if row["section"] == entry["section"] and "error" in row
            ]
            if entry["status"] != "ran":
                found.append(f"{entry['section']}: {entry['status']}: {'; '.join(errors)}")
        return found

    def write(self) -> None:
        """Replaces the file at once, so that a command that is killed leaves what it has."""
        self.result["seconds"] = time.monotonic() - self.began
        if self.file is None:
            return
        partial = self.file.with_name(f".{self.file.name}.partial")
        try:
            partial.write_text(json.dumps(self.result, indent=1) + "\n")
            os.replace(partial, self.file)
        except OSError as error:
            said = f"cannot write {self.file}: {error.strerror}"
            raise UserError(f"{said}; give another --json") from None


def main(machine: str, fake: bool, file: Path | None) -> int:
    """Measures all, and says what failed. Returns the exit status."""
    report = measure(machine, fake, file)
    failures = report.failures()
    for failure in failures:
        print(failure)
    print(f"{len(failures)} of {len(report.result['sections'])} sections failed")
    return 1 if failures else 0


def measure(
    machine: str,
    fake: bool,
    file: Path | None = None,
    sections: tuple[Section, ...] = SECTIONS,
    seconds: float = 0.0,
) -> Report:
    """Runs the sections one after the other, and prints what they say.

    machine: in words; seconds: for all of them, 0 means `SECONDS`. Raises UserError where nothing
    can be measured, or the file cannot be written."""
    if fake:
        from benchmarks.fake_gpu import library

        try:
            library.library()
        except library.Unavailable as error:
            raise UserError(
                f"no GPU was found, nor can the device be made that stands for one: {error}"
            ) from None
    report = Report(machine, fake, file)
    if fake:
        print(
            "no GPU: small models run on a device that is not there, to show that all of this "
            "works; times mean nothing, and nothing is compiled"
        )
    takes = FAKE_TAKES if fake else f"{math.ceil(SECONDS / 60)} minutes at most"
    print(f"{len(sections)} sections, {takes}; each prints its table at its end", flush=True)
    end = time.monotonic() + (seconds or (FAKE_SECONDS if fake else SECONDS))
    for number, section in enumerate(sections):
        # What earlier sections left of their time, later ones have.
        shares = sum(later.share for later in sections[number:])
        limit_s = max(0.0, end - time.monotonic() - ENDING_S) * section.share / shares
        report.begin(section)
        began = time.monotonic()
        status, error = run(section, fake, limit_s, report)
        report.end(status, time.monotonic() - began, error)
        show(report)
    return report


# ---------------------------------------------------------------- one section


def run(section: Section, fake: bool, limit_s: float, report: Report) -> tuple[str, str | None]:
    """Runs a section in a process of its own. Returns how it ended, and what went wrong."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        rows = Path(folder) / "rows"
        log = Path(folder) / "log"
        rows.touch()
        command = [sys.executable, "-m", "benchmarks.gpu", section.function, str(rows)]
        command += [str(int(fake)), str(limit_s), *section.args]
        with log.open("wb") as said:
            process = start(command, fake, Path(folder), said)
        with rows.open() as lines:
            try:
                in_time = follow(process.pid, lines, time.monotonic() + limit_s, report)
            finally:
                status = end(process)
            take(lines, report)  # what came last
        words = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    if status != 0 or not in_time:
        report.keep_log(words[-LOG:])
    if not in_time:
        return "over time", f"not done after {limit_s:.0f} s"
    if status < 0:
        return "failed", f"ended by {signal.Signals(-status).name}: {words[-1]}"
    told = any("error" in row for row in report.rows())
    return ("failed" if status else "ran"), (words[-1] if status and not told else None)


def start(command: list[str], fake: bool, folder: Path, said) -> subprocess.Popen:
    """Starts the process of a section as the first of a group, which ends with this one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATH), "TMPDIR": str(folder)}
    if fake:
        from benchmarks.fake_gpu import library

        # Threads that wait for one another fight over the cores, which do all the work here.
        environment |= library.environment(1) | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def die_with_parent() -> None:
    """Lets the kernel kill this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def has_ended(pid: int) -> bool:
    """Whether a process has, without forgetting its number: its group is still to be ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def follow(pid: int, lines, deadline: float, report: Report) -> bool:
    """Takes in rows until a process has ended. Returns whether it did in time."""
    while not has_ended(pid):
        take(lines, report)
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def take(lines, report: Report) -> None:
    """Takes in the rows that were written since the last look; only whole lines."""
    while True:
        place = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(place)
            return
        report.add(json.loads(line))


def end(process: subprocess.Popen) -> int:
    """Ends a process, if it has not, and all that it started. Returns its exit status."""
    if not has_ended(process.pid):
        os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + ENDING_S
        while time.monotonic() < until and not has_ended(process.pid):
            time.sleep(LOOK_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


# ---------------------------------------------------------------- the tables


def show(report: Report) -> None:
    """Prints the newest section's rows."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.measuring import cell

    entry = report.result["sections"][-1]
    rows = report.rows()
    hidden = ("section", "device", "error")
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    note = "" if report.result["device"] == "cuda:0" else " (times mean nothing)"
    title = f"{entry['section']}: {entry['status']}, {entry['seconds']:.0f} s{note}"
    table = Table()
    for key in keys:
        table.add_column(key.replace("_", " "))
    for row in rows:
        if row.keys() & set(keys):
            table.add_row(*(cell(row.get(key)) for key in keys))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(title, markup=False)
    if keys:
        console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"  {row['error']}", markup=False)
