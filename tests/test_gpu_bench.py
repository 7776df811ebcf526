"""`bench.py gpu`: one section's end is nobody else's, and what was measured is in the file.

What the sections measure needs a GPU; here they run to their end on one that is not there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu
from benchmarks.fake_gpu import library
from benchmarks.gpu import SECTIONS, Section, runs
from config import ROOT
from errors import UserError

TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """Sections are looked for among the tests, too."""
    monkeypatch.setattr(gpu, "PATH", (*gpu.PATH, TESTS))


def toy(function: str, *args: str, share: float = 1.0, name: str = "") -> Section:
    return Section(name or function, f"sections:{function}", args, share)


def fake_gpus() -> None:
    try:
        library.library()
    except library.Unavailable as error:
        pytest.skip(str(error))


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_section_that_fails_ends_alone(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    sections = (
        toy("good", "a", "b"),
        toy("failing"),
        toy("silent"),
        toy("crashing"),
        toy("partly"),
        toy("hanging", share=0.05),
        toy("good", name="after"),
    )
    report = gpu.measure("a machine", False, file, sections, seconds=300.0)
    result = json.loads(file.read_text())
    assert result == report.result and result["what"] == "gpu"
    statuses = [entry["status"] for entry in result["sections"]]
    assert statuses == ["ran", "failed", "failed", "failed", "failed", "over time", "ran"]

    rows = {section.name: [] for section in sections}
    for row in result["rows"]:
        rows[row["section"]].append(row)
    assert [row["word"] for row in rows["good"]] == ["a", "b", "last"]
    assert rows["after"][-1]["nan"] == "nan"  # JSON has none
    assert rows["failing"][0]["word"] == "before"
    error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert rows["failing"][1]["error"] == error
    assert len(rows["silent"]) == 1 and "it said nothing" in rows["silent"][0]["error"]
    assert rows["crashing"][1]["error"] == "ended by SIGSEGV: about to crash"
    assert [row.get("word") for row in rows["partly"]] == ["one", None, "two"]
    assert rows["hanging"][-1]["error"].startswith("not done after ")
    assert all(is_gone(pid) for row in rows["hanging"] for pid in row.get("pids", ()))
    assert "Traceback" in "".join(result["sections"][1]["log"])

    failures = report.failures()
    assert len(failures) == 5 and failures[0] == f"failing: failed: {error}"
    said = capsys.readouterr().out
    assert "illegal memory access" in said and "hanging: over time" in said


def test_later_sections_have_what_earlier_ones_left():
    sections = (toy("good", "a"), toy("good", "b", share=3.0, name="later"))
    report = gpu.measure("a machine", False, None, sections, seconds=100.0)
    limits = [row["limit_s"] for row in report.result["rows"] if "limit_s" in row]
    assert limits[0] == pytest.approx((100.0 - gpu.ENDING_S) / 4, abs=1.0)
    spent = report.result["sections"][0]["seconds"]
    assert limits[1] == pytest.approx(100.0 - gpu.ENDING_S - spent, abs=1.0)


def test_a_command_that_is_killed_leaves_what_it_has(tmp_path):
    file = tmp_path / "gpu.json"
    code = (
        "from pathlib import Path\n"
        "from benchmarks import gpu\n"
        f"gpu.PATH = (*gpu.PATH, {TESTS!r})\n"
        "names = ('good', 'hanging')\n"
        "sections = [gpu.Section(name, f'sections:{name}') for name in names]\n"
        f"gpu.measure('a machine', False, Path({str(file)!r}), tuple(sections))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    try:
        until = time.monotonic() + 100.0
        result = {"rows": []}
        while "pids" not in (result["rows"] or [{}])[-1]:
            assert time.monotonic() < until
            time.sleep(0.1)
            if file.is_file():
                result = json.loads(file.read_text())  # whole at any moment
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    hung, helper = result["rows"][-1]["pids"]
    until = time.monotonic() + 20.0
    while not is_gone(hung):
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(helper, signal.SIGKILL)  # nobody else knows of it
    result = json.loads(file.read_text())
    assert [row.get("word") for row in result["rows"]] == ["last", None]
    assert [entry["status"] for entry in result["sections"]] == ["ran", "running"]


def test_a_file_that_cannot_be_written_is_named_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="cannot write .*; give another --json"):
        gpu.measure("a machine", False, tmp_path, (toy("good"),))


def test_the_time_that_spans_cover():
    spans = [(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (4.0, 5.0), (9.0, 12.0)]
    assert runs.covered(spans, (0.5, 10.0)) == pytest.approx(2.5 + 1.0 + 1.0)
    assert runs.covered([], (0.0, 1.0)) == 0.0


def test_a_family_is_measured_where_no_gpu_is(tmp_path):
    fake_gpus()
    names = ("machine", "actor pi05")
    sections = tuple(section for section in SECTIONS if section.name in names)
    report = gpu.measure("a machine", True, None, sections)
    assert not report.failures() and not any("error" in row for row in report.result["rows"])
    rows = [row for row in report.result["rows"] if row["section"] == "actor pi05"]
    assert {row["prefix"] for row in rows} == {"slots", "gpu", "off"}
    for row in rows:
        assert row["device"] == "not there: times mean nothing"
        assert min(row["train_ms"], row["step_ms"], row["share"], row["predicted_gb"]) > 0


@pytest.mark.slow
def test_the_whole_command_runs_to_its_end_where_no_gpu_is(tmp_path):
    fake_gpus()
    file = tmp_path / "gpu.json"
    command = [sys.executable, "bench.py", "gpu", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    result = json.loads(file.read_text())
    assert [entry["section"] for entry in result["sections"]] == [s.name for s in SECTIONS]
    assert all(entry["rows"] and entry["status"] == "ran" for entry in result["sections"])
    assert {row["device"] for row in result["rows"]} == {"not there: times mean nothing"}
