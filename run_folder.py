"""Keeps what a run leaves behind, and reads it again.

The launcher alone writes here, but for checkpoints (the first actor), videos (evaluate.py) and, in
.spans/ while the run goes on, the workers' spans. Left out: what the lines say (docs/metrics.md).
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from checks import FromZero, Natural, Share, Total, parse_json, read_json
from config import ROOT, from_json
from errors import UserError, require
from files import alike, locked, whole, write_whole

# A trace's rows are grouped: "weights" and "gradients" are transfers beside what a worker does.
GROUPS = ("env", "rollout", "weights", "actor", "gradients")
# The spans of such transfers, their group, and the beginning of their rows' names.
BESIDE = {"fetch": ("weights", "weights to"), "reduce": ("gradients", "gradients of")}
# What was done, its start and end in monotonic seconds, and perhaps numbers that belong to it.
Span = tuple[str, float, float] | tuple[str, float, float, dict]
# What rows of a trace are sorted by: group, node, number there; and a row's name.
Row = tuple[int, int, int, str]
SENT = 400_000  # spans that the first node takes of all others together: more would take minutes
PIECE = 4 * 2**20  # bytes; torchrun's store takes 8 MiB at once

Number = int | float
Numbers = NotRequired[dict[str, Number]]


class Line(TypedDict, extra_items=Number | None):
    """A line of metrics.jsonl: what must be there for a run to go on, and what is no number."""

    version: Natural
    iteration: Natural
    time: FromZero
    success_rate: Share | None
    env_steps: Total
    restarts: Total
    collected: Total
    trained_once: Total
    discarded_by: dict[str, Total]
    eval_version: NotRequired[Natural]
    eval_episodes: NotRequired[Natural]
    eval_success_rate: NotRequired[Share]
    eval_per_task: NotRequired[dict[str, Share]]
    trajectories_per_task: Numbers
    episodes_per_task: NotRequired[dict[str, Total]]
    staleness_hist: Numbers
    batch_size_hist: Numbers
    queue_depths: Numbers
    waits: Numbers
    nodes: NotRequired[dict[str, dict[str, Number]]]  # by the node's number
    tuning: NotRequired[dict[str, Number | str]]


def name_of(run: Path) -> str:
    """Returns what --resume takes."""
    return run.name if run.parent == ROOT / "runs" else str(run.absolute())


class RunFolder:
    """Owns runs/NAME."""

    def __init__(self, path: Path, resume: bool):
        """Creates or opens the folder and locks it. Raises UserError."""
        self.path = path
        self.spans = path / ".spans"
        self.name = name_of(path)
        # When this launcher wrote its newest line, in monotonic seconds.
        self.appended: float | None = None
        self.made = not path.exists()
        saved = newest_version(path) is not None
        instead = f"continue it with --resume {self.name} or" if saved else "it is not a run's:"
        exists = f"the run folder {path} exists: {instead} choose another --run"
        require(resume or self.made or may_begin(path), exists)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.spans.mkdir(exist_ok=True)
        except OSError as error:
            found = f"cannot write the run folder {path}: {error.strerror}"
            raise UserError(f"{found}; choose another --run") from None
        taken = f"run {self.name} is being trained by another process: end that one first, or wait"
        self.lock = locked(path, taken)
        for left in path.glob(".trace.json.*.partial"):  # of a run that was killed as it wrote it
            left.unlink()
        if not resume:
            for name in ("metrics.jsonl", "error.txt", "wandb.id", "trace.json", "report.html"):
                if (path / name).exists():
                    os.replace(path / name, path / f"{name}.old")

    def clear(self, keep_trace: bool) -> None:
        """Removes what earlier workers left. keep_trace: the run goes on at another ratio."""
        kept = (".jsonl", ".npy") if keep_trace else ()
        for old in self.spans.iterdir():
            if old.suffix not in kept:  # actor workers must meet anew
                old.unlink()

    def append(self, line: dict) -> None:
        """Adds a line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.appended = time.monotonic()

    def lines(self) -> list[Line]:
        return read_metrics(self.path)

    def go_on_from(self, lines: list[dict]) -> None:
        """Makes these lines (`lines_until`) the whole metrics.jsonl."""
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def keep(self, vocabulary: Path | None) -> None:
        """Copies the vocabulary in use, so that the folder alone can go to another machine."""
        if not (vocabulary and vocabulary.is_file()):
            return
        kept = self.path / vocabulary.name
        if not alike(vocabulary, kept):
            with whole(kept) as partial:
                shutil.copyfile(vocabulary, partial)

    def write(self, name: str, text: str) -> None:
        """As `files.write_whole`, a file of this run."""
        write_whole(self.path / name, text)

    def finish(self) -> None:
        """Writes trace.json from the workers' spans, whole or not at all, and removes what only
        workers needed."""
        if spans := read_spans(self.spans):
            with whole(self.path / "trace.json") as partial:
                write_trace(partial, spans)
        shutil.rmtree(self.spans)

    def remove(self, failed: bool) -> None:
        """Removes what another node than the first one needed for its workers, but of a run that
        has failed not what an error says."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif not (failed and path.name == "error.txt"):
                path.unlink()
        with contextlib.suppress(OSError):  # there was an error
            self.path.rmdir()


def checkpoints(run: Path) -> list[Path]:
    """Returns the folders of a run's checkpoints, the newest last. Each is named by its version: a
    folder of another name, such as the copy 000003-best, is the user's."""
    found = [path for path in run.glob("checkpoints/*/") if re.fullmatch("[0-9]{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name))


def may_begin(path: Path) -> bool:
    """Whether a folder is empty, or of a run of ours that was stopped before its first checkpoint.
    Other projects have checkpoints/ and config.json, too."""
    left = {file.name for file in path.iterdir()} if path.is_dir() else {"a file"}
    with contextlib.suppress(UserError):
        if "config.json" in left:
            from_json(path / "config.json")
        saved = any(not one.name.startswith(".") for one in path.glob("checkpoints/*"))
        return not left or "checkpoints" in left and not saved
    return False


def newest_version(run: Path) -> int | None:
    """Returns that of a run's newest checkpoint, or None where there is none."""
    return max((int(path.name) for path in checkpoints(run)), default=None)


def read_metrics(run: Path) -> list[Line]:
    """Returns the whole lines of metrics.jsonl. The last one may be torn: it is being written just
    now, or its writer was killed. Raises UserError for what is no line of a run."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            odd = "damaged, or of another kind or version: remove that line"
            found.append(parse_json(line, Line, f"line {number} of {file} ({odd})", None))
    return found


def lines_until(run: Path, version: int, saved: list[dict]) -> list[dict]:
    """Returns the lines of metrics.jsonl that a checkpoint's follow on: none is newer.

    saved: those of its state.json. What is missing is added: the launcher was killed, or its disk
    full, before it wrote them. They lack what only the launcher measures."""
    lines = {line["version"]: line for line in read_metrics(run) if line["version"] <= version}
    for line in saved:
        # A line of an earlier life, which came at another time, gives way.
        if lines.get(line["version"], {}).get("time") != line["time"]:
            lines[line["version"]] = line
    return [lines[number] for number in sorted(lines)]


def read_spans(folder: Path) -> dict[str, list[Span]]:
    """Returns what workers have recorded in .spans/, by their names."""
    spans: dict[str, list[Span]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        spans[file.stem] = []
        for row in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # an empty line, or one torn by a kill
                spans[file.stem] += json.loads(row)
    return spans


def pack_spans(folder: Path, nodes: int) -> list[bytes]:
    """Returns what the workers of a node have recorded, for the first of `nodes`, in pieces of at
    most PIECE bytes. Of more than its part of SENT spans, the newest are packed."""
    spans = read_spans(folder)
    ends = sorted(span[2] for row in spans.values() for span in row)
    most = SENT // (nodes - 1)
    since = ends[-most] if len(ends) > most else -math.inf  # what ended before is left out
    kept = {name: [span for span in row if span[2] >= since] for name, row in spans.items()}
    left_out = len(ends) - sum(map(len, kept.values()))
    packed = zlib.compress(json.dumps([kept, left_out]).encode())
    return [packed[start : start + PIECE] for start in range(0, len(packed), PIECE)]


def take_spans(folder: Path, node: int, pieces: list[bytes], ahead_s: float) -> str:
    """Puts another node's spans beside the first node's own, and returns what to say of them.

    ahead_s: what is to be added to that node's monotonic seconds to have those of the first."""
    kept, left_out = json.loads(zlib.decompress(b"".join(pieces)))
    for name, row in kept.items():
        moved = [[what, start + ahead_s, end + ahead_s, *args] for what, start, end, *args in row]
        (folder / f"node {node} {name}.jsonl").write_text(json.dumps(moved))
    return f"trace.json lacks the {left_out:,} oldest spans of node {node}" if left_out else ""


def place_of(row: str) -> tuple[int, str]:
    """Returns the node of a trace's row, and the row's name there: of "node 3 env-0" 3 and "env-0".
    Rows of the first node, or of a run on one, are named without it."""
    found = re.match("node ([0-9]+) ", row)
    return (int(found[1]), row[found.end() :]) if found else (0, row)


def write_trace(path: Path, spans: dict[str, list[Span]]) -> None:
    """Writes the workers' spans in Chrome's trace format: a process per stage, a thread per worker,
    those of one node after those of another.

    A side thread fetches weights while its worker infers, and sums of gradients go on while one
    trains: both get rows of their own."""
    rows: dict[Row, list[Span]] = {}
    for worker, mixed in spans.items():
        node, name = place_of(worker)
        stage, _, number = name.partition("-")
        place = (node, int(number))
        rows[GROUPS.index(stage), *place, worker] = [s for s in mixed if s[0] not in BESIDE]
        for what, (group, title) in BESIDE.items():
            if transfers := [span for span in mixed if span[0] == what]:
                beside = f"{worker.removesuffix(name)}{title} {name}"
                rows[GROUPS.index(group), *place, beside] = transfers
    with open(path, "w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for n, event in enumerate(trace_events(rows)):
            file.write((",\n" if n else "\n") + json.dumps(event))
        file.write("\n]}\n")


def trace_events(rows: dict[Row, list[Span]]) -> Iterator[dict]:
    """Yields names and order ("M"), then one complete event ("X") per span, in microseconds since
    the first one. Perfetto takes process 0 and thread 0 for the kernel's, so numbers begin at 1."""
    begin = min((span[1] for row in rows.values() for span in row), default=0.0)
    for group in sorted({group for group, *_ in rows}):
        process = {"ph": "M", "pid": group + 1}
        yield process | {"name": "process_name", "args": {"name": GROUPS[group]}}
        yield process | {"name": "process_sort_index", "args": {"sort_index": group}}
    for thread, row in enumerate(sorted(rows), 1):
        group, *_, name = row
        where = {"pid": group + 1, "tid": thread}
        yield {"ph": "M", "name": "thread_name", **where, "args": {"name": name}}
        for what, start, end, *args in rows[row]:
            event = {"ph": "X", "name": what, **where}
            event["ts"] = round((start - begin) * 1e6, 1)
            event["dur"] = round((end - start) * 1e6, 1)
            if args:
                event["args"] = args[0]
            yield event


def read_trace(run: Path) -> dict[str, list[tuple[str, float, float, dict]]]:
    """Returns the rows of a run's trace.json by name: spans (what, start, end, args) in order, in
    seconds. Rows without spans are left out."""
    events = read_json(run / "trace.json")["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans: dict[str, list] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            start = event["ts"] / 1e6
            end = (event["ts"] + event["dur"]) / 1e6
            span = (event["name"], start, end, event.get("args", {}))
            spans[names[event["tid"]]].append(span)
    return {name: sorted(row, key=lambda span: span[1]) for name, row in spans.items() if row}
