"""Nothing that a program prints ends it, whatever becomes of the place that it prints to."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_processes import QUICK

from config import ROOT
from errors import exit_on_user_error
from run_folder import read_metrics

PRINTS = """
import sys
from errors import exit_on_user_error
with exit_on_user_error():
    for _ in range(3):
        print("π0.5 ▇ é" + "x" * 100_000, flush=True)
        print("π0.5 ▇ é", file=sys.stderr)
    sys.exit(7)
"""


@pytest.mark.parametrize("where", ["| true", "> /dev/full 2>&1", ">&- 2>&-", "> out 2>&1"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_printing_never_ends_a_program(tmp_path, where, encoding):
    (tmp_path / "prints.py").write_text(PRINTS)
    shell = f"set -o pipefail; {sys.executable} prints.py {where}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 7 and "Traceback" not in done.stderr, done.stderr
    if where == "> out 2>&1":
        said = (tmp_path / "out").read_text(encoding)
        assert said.count("0.5 ") == 6
        assert said.count("π0.5 ▇ é") == (6 if encoding == "utf-8" else 0)


def test_a_closed_stream_takes_every_character_in_every_locale(tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | locale | {"PYTHONPATH": str(ROOT)}
    shell = f"{sys.executable} prints.py >&-"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 7 and "Traceback" not in done.stderr, done.stderr


def test_every_entry_point_prints_so():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        text = (ROOT / name).read_text()
        if name.startswith("tests/") or name == "benchmarks/peers.py":  # which imports nothing
            continue
        if main := re.search(r'^if __name__ == "__main__":(.*)', text, re.DOTALL | re.MULTILINE):
            assert "with exit_on_user_error()" in main[1] or "html_report.main()" in main[1], name


def test_ctrl_c_is_one_word(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_is_one_sentence(capsys):
    with pytest.raises(SystemExit), exit_on_user_error():
        Path("/dev/full").write_text("x")
    assert "error: cannot write: No space left on device; make room" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), exit_on_user_error():  # a fault of ours keeps its trace
        Path("/none/x").write_text("x")


def test_a_run_whose_metrics_cannot_be_written_saves_and_stops(cli, tmp_path):
    """Also one that nobody reads any more."""
    run = tmp_path / "x"
    process = cli("train.py", f"{QUICK} --checkpoint-every 1000000 --run {run}")
    process.wait_for(run / "metrics.jsonl", 20)
    os.close(process.process.stdout.fileno())
    process.process.stdout = io.StringIO()
    before = len(read_metrics(run))
    process.wait_for(run / "metrics.jsonl", before + 20)
    (run / "metrics.jsonl").rename(tmp_path / "kept")
    (run / "metrics.jsonl").symlink_to("/dev/full")
    assert process.process.wait(timeout=30) == 1
    (saved,) = (run / "checkpoints").glob("[0-9]*")
    assert (saved / "state.json").is_file() and int(saved.name) > before
