"""Measures what films and reports cost a run: the same run with --no-film, as it is by default, and
with --watch, which take turns; and their parts by themselves.

    python -m benchmarks.filming --iterations 6 --repeats 2

CPU seconds of all processes of a run are compared, since they scatter less than its time where
other programs use the machine as well. Evaluations are more frequent than by default (a round per
three iterations instead of ten), and so are films. The parts, each in CPU seconds: `frame`, which
an env worker draws beside its work; `video`, the encoder's for one film; `live` and `last`, what
the launcher takes to write a report while a run goes on, and at its end.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import tyro

import envs
import films
import html_report
from config import ROOT
from errors import exit_on_user_error, require

WAYS = {"without": "--no-film", "by default": "", "watched": "--watch"}


@dataclass
class FilmingConfig:
    """What films and reports cost."""

    iterations: int = 6
    """of each run"""
    repeats: int = 2
    """runs of each way"""


def cpu_of(process: psutil.Process) -> dict[int, float]:
    """Returns the CPU seconds so far of a process and its descendants, by number."""
    found = {}
    for one in (process, *process.children(recursive=True)):
        try:
            times = one.cpu_times()
            found[one.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def run_once(flags: str, iterations: int, run: Path) -> dict[str, float]:
    """Runs the default training once. Returns its CPU seconds and seconds, in all and until there
    was a first picture of it."""
    words = f"--iterations {iterations} --eval-every 3 --run {run} {flags}".split()
    began = time.monotonic()
    started = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=sys.stderr)
    process = psutil.Process(started.pid)
    used: dict[int, float] = {}
    picture = None
    while started.poll() is None:
        try:
            used |= cpu_of(process)
        except psutil.NoSuchProcess:
            break
        if picture is None and (run / "curve.png").is_file():
            picture = time.monotonic() - began
        time.sleep(0.1)
    require(started.wait() == 0, f"train.py {' '.join(words)} ended with {started.returncode}")
    return {"cpu_s": sum(used.values()), "s": time.monotonic() - began, "picture_s": picture}


def parts_of(run: Path) -> dict[str, float]:
    """Measures CPU seconds of each part, on a run's folder."""
    simulator = envs.load("metaworld")
    spec = simulator.spec((), 64)
    player = simulator.make(spec)
    player.reset(0, 0)
    player.observe()
    film = partial(player.film, spec.image_size)
    camera = films.Camera(film, "bench", 0, spec.limit(0))
    began = time.process_time()
    for step in range(0, spec.limit(0), camera.every):
        camera.look(step)
    found = {"frame": (time.process_time() - began) / len(camera.frames)}
    with tempfile.TemporaryDirectory() as folder:
        camera.leave(Path(folder), True)
        before = children_s()
        films.make_videos(Path(folder), Path(folder))
        found["video"] = children_s() - before
    html_report.write(run)  # imports what it draws with
    for name, live in (("live", True), ("last", False)):
        began = time.process_time()
        html_report.write(run, live=live)
        found[name] = time.process_time() - began
    player.close()
    return found | {"file_kb": (run / "report.html").stat().st_size / 1e3}


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(config: FilmingConfig) -> None:
    """Prints the medians of all runs, and the parts."""
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for turn in range(config.repeats):
            # In another order each time: none is always the first.
            ways = list(WAYS)[turn % 3 :] + list(WAYS)[: turn % 3]
            for way in ways:
                run = Path(folder) / f"{turn} {way}".replace(" ", "-")
                runs[way].append(run_once(WAYS[way], config.iterations, run))
                print(way, json.dumps(runs[way][-1]), flush=True)
        middle = {way: statistics.median(one["cpu_s"] for one in runs[way]) for way in WAYS}
        for way, cpu_s in middle.items():
            print(f"{way}: {cpu_s:.1f} CPU s, {cpu_s / middle['without'] - 1:+.1%}", flush=True)
        print(json.dumps({k: round(v, 4) for k, v in parts_of(run).items()}))
    sys.stdout.flush()


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(FilmingConfig))
