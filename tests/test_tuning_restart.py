"""A run that starts again at another ratio, and the settings that it goes on with."""

import json
import os
import re
import time
from dataclasses import asdict

import pytest
import torch
from test_tuning import METAWORLD, config_of

import start
import train
from config import ROOT, Config, from_json
from errors import UserError
from scheduler import divide
from tuning import Past


def test_auto_begins_where_it_is_told_to_or_at_three_to_one(tmp_path):
    config = config_of(ratio_from="")
    assert config.train.parts == "3:1" and config_of(ratio_from="1:2").train.parts == "1:2"
    assert config_of(ratio="2:1", ratio_from="1:2").train.parts == "2:1"
    with pytest.raises(UserError, match="R:A"):
        divide(config_of(ratio_from="x"), METAWORLD, 0, 2)
    (tmp_path / "config.json").write_text(
        json.dumps({"train": {"ratio": "auto", "ratio_from": "1:2"}})
    )
    assert from_json(tmp_path / "config.json").train.parts == "1:2"


def test_what_is_remembered_survives_a_start(tmp_path):
    """A run that goes on at another ratio is another process: nothing may be tried twice."""
    past = Past("3:1", {"3:1": 12.8, "1:1": 1 / 3}, {"1:2", "2:1"}, {"batch_wait_ms": "inf"})
    file = tmp_path / "tuning.json"
    other = f"{os.getpid()} since 1"  # of another container, which counts processes anew
    file.write_text(json.dumps(asdict(train.Handover(process=other, heard=3)), default=sorted))
    assert train.Handover.take(tmp_path) == train.Handover() and not file.exists()
    for left in (train.Handover(past=past, heard=3), train.Handover()):
        file.write_text(json.dumps(asdict(left), default=sorted))
        assert train.Handover.take(tmp_path) == left and not file.exists()
    assert past.go_back("1:1") == "3:1" and past.rejected == {"1:1", "1:2", "2:1"}
    for text in (
        "",
        "[]",
        '{"past": {"left": "", "more": 1}}',
        '{"past": {"rejected": 3}}',
        '{"past": {"measured": {"1:1": []}}}',
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="cannot read what the tuner remembered"):
            train.Handover.take(tmp_path)


# training takes nearly all of an iteration, so three parts of four for simulators are a waste
AUTO = (
    "--model emulated --env emulated --tasks 0.02 --envs 8 --batch 16 --minibatch 8 --micro-batch "
    "4 --update-epochs 1 "
    "--image-size 8 --eval-envs 0 --ratio auto --iterations 100000 --checkpoint-every 100000 "
    "--env-workers 2"
)


def parsed(*args: str) -> Config:
    """The settings of a small run."""
    flags = (
        "--model emulated --env emulated --tasks 0 --image-size 8 --envs 8 --batch 16 --minibatch 8"
    )
    return train.parse([*flags.split(), *args])


def test_what_ratio_from_must_be():
    with pytest.raises(
        UserError,
        match="--ratio-from 'x' is not R:A with two whole numbers of at least 1, such as 3:1$",
    ):
        parsed("--ratio", "auto", "--ratio-from", "x")
    with pytest.raises(
        UserError, match="--ratio-from 1:2 is for --ratio auto: leave out one of them"
    ):
        parsed("--ratio", "3:1", "--ratio-from", "1:2")
    assert parsed("--ratio", "auto", "--ratio-from", "1:2").train.parts == "1:2"


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """The settings that a run of these flags is resumed with, by flags of now."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(start, "resume_from", lambda config: (None, {"version": 1}))

    def resume(before: list[str], *now: str) -> Config:
        (tmp_path / "config.json").write_text(train.prepare(parsed(*before)).saved)
        return train.parse(["--resume", str(tmp_path), *now])

    return resume


def test_a_micro_batch_is_cut_to_what_an_actor_worker_has(resumed):
    """One trajectory of two is the share of each of two actor workers, at whatever ratio."""
    small = ["--batch", "8", "--minibatch", "2"]
    chosen = train.prepare(parsed(*small, "--ratio", "auto"))
    whole = chosen.config.actor.micro_batch
    assert whole == 2 * chosen.config.env.segment
    assert chosen.choices["1:2"][0].actor.micro_batch == whole // 2
    for flags in (["--ratio", "1:2"], ["--actor-workers", "2"]):
        assert train.prepare(resumed(small, *flags)).config.actor.micro_batch == whole // 2
    assert train.prepare(resumed([*small, "--ratio", "auto"])).config.actor.micro_batch == whole


def test_a_resumed_run_begins_with_a_ratio_that_fits(resumed):
    config = resumed(["--ratio", "auto", "--ratio-from", "1:2"])
    config.actor.micro_batch = 4  # 24 ranks cannot share 8 trajectories
    config.train.ratio_from = "1:24"
    setup = train.prepare(config)
    assert (
        setup.config.train.parts == "1:1"
        and "ratio 1:24 does not fit here, so the run goes on at 1:1" in setup.note
    )
    assert train.prepare(resumed(["--ratio", "auto", "--ratio-from", "1:2"])).note == ""
    assert (
        resumed(["--ratio", "auto", "--ratio-from", "1:2"], "--ratio", "2:1").train.parts == "2:1"
    )


def test_a_resumed_run_keeps_the_worker_counts_that_flags_gave(resumed, tmp_path):
    def counts(config):
        return (
            config.env.env_workers,
            config.rollout.rollout_workers,
            config.actor.actor_workers,
        )

    before = ["--ratio", "auto", "--ratio-from", "1:2", "--env-workers", "4"]
    config = resumed(before)
    assert counts(from_json(tmp_path / "config.json")) == (4, 1, 2) and counts(config) == (4, 0, 0)
    complete = train.prepare(config).config
    assert counts(complete) == (4, 1, 2) and complete.train.workers_given == (4, 0, 0)
    assert counts(resumed(before, "--env-workers", "2", "--rollout-workers", "2")) == (2, 2, 0)


def test_a_run_goes_on_at_a_better_ratio(cli, tmp_path):
    """Nothing trained is lost."""
    run = tmp_path / "x"
    process = cli("train.py", f"{AUTO} --run {run}")
    process.wait_for(run / "metrics.jsonl", 4, timeout=180)
    deadline = time.monotonic() + 180
    while not list(run.glob("checkpoints/0*")):  # saved for the purpose
        assert process.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.wait_for(
        run / "metrics.jsonl",
        len((run / "metrics.jsonl").read_text().splitlines()) + 2,
        timeout=180,
    )
    process.interrupt_group()
    status, output = process.finish()
    assert status == 130 and "interrupted; saved" in output and "Traceback" not in output, output
    deadline = time.monotonic() + 180
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    times = [line["time"] for line in lines]
    steps = [line["env_steps"] for line in lines]
    assert times == sorted(times) and steps == sorted(steps)
    told = [line["tuning"] for line in lines]
    ratio = next(entry["ratio"] for entry in told if "ratio" in entry)
    assert (
        ratio != "3:1"
        and f"ratio {ratio} instead of 3:1: " in output
        and "rollout: batches of at most" in output
    )
    assert 1 <= next(entry["batch_max"] for entry in told if "batch_max" in entry) <= 8
    saved = json.loads((run / "config.json").read_text())
    assert (saved["train"]["ratio"], saved["train"]["ratio_from"]) == ("auto", ratio)
    assert saved["actor"]["actor_workers"] == int(ratio.split(":")[1])
    last = len(lines) + 2
    process = cli("train.py", f"--resume {run} --iterations {last}")
    while not process.has_fork_server():
        assert process.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # the fork server is importing
    process.interrupt_group()
    status, output = process.finish()
    assert (
        status == 130 and f"interrupted; continue with: python train.py --resume {run}" in output
    ), output
    status, output = cli("train.py", f"--resume {run} --iterations {last}").finish()
    assert status == 0 and f"{last} iterations done" in output and f" {ratio} on " in output, output


ONE_RATIO = """
import sys
import actor_worker
from errors import exit_on_user_error

run = actor_worker.run

def fails(rank, config, *others):
    if config.train.parts != "3:1":
        raise MemoryError("a GPU is full")
    run(rank, config, *others)

actor_worker.run = fails
if __name__ == "__main__":
    import train

    with exit_on_user_error():
        sys.exit(train.main(train.parse(sys.argv[1:])))
"""


def test_a_run_goes_on_at_the_ratio_before_where_the_new_one_cannot_start(cli, tmp_path):
    run = tmp_path / "x"
    script = tmp_path / "one_ratio.py"
    script.write_text(ONE_RATIO)
    process = cli(script, f"{AUTO} --run {run}", PYTHONPATH=str(ROOT))
    process.wait_for(run / "error.txt", timeout=180)
    process.wait_for(
        run / "metrics.jsonl",
        len((run / "metrics.jsonl").read_text().splitlines()) + 1,
        timeout=180,
    )
    process.interrupt_group()
    status, output = process.finish()
    assert status == 130 and "interrupted; saved" in output and "Traceback" not in output, output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    words = (
        r"ratio 3:1 again: at \d:\d the workers did not come to an iteration: "
        r"worker actor-\d failed: MemoryError: a GPU is full"
    )
    assert re.search(words, output), output
    assert [line["tuning"]["ratio"] for line in lines if "ratio" in line["tuning"]][-1] == "3:1"


CHANGES = """
import os
import signal
import sys
import processes
import train
import tuning
from errors import exit_on_user_error

iteration = tuning.Tuner.iteration
replace = processes.replace_this_process
connect = train.connect

def decides(self, version, cpu_s):
    iteration(self, version, cpu_s)
    if version >= 3 and self.ratio == "3:1":
        self.past.left = self.ratio
        self.past.measured["3:1"] = 1.0
        self.past.rejected.add("2:2")
        self.ratio = self.past.news["ratio"] = "1:1"

def interrupted(flags):
    if "CTRL_C" in os.environ:
        os.kill(os.getpid(), signal.SIGINT)
    replace(flags)

def counts(setup):
    print("connects with", len(os.listdir("/proc/self/fd")), "files")
    return connect(setup)

tuning.Tuner.iteration = decides
train.connect = counts
processes.replace_this_process = interrupted
if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(train.main(train.parse(sys.argv[1:])))
"""


def test_ctrl_c_while_a_run_starts_again_is_heard(cli, tmp_path):
    run = tmp_path / "x"
    (tmp_path / "changes.py").write_text(CHANGES)
    process = cli(tmp_path / "changes.py", f"{AUTO} --run {run}", PYTHONPATH=str(ROOT), CTRL_C="")
    status, output = process.finish(timeout=240)
    process.assert_nothing_left()
    advice = f"interrupted; continue with: python train.py --resume {run}"
    assert status == 130 and output.count(advice) == 1 and "Traceback" not in output, output


def test_a_run_that_starts_again_keeps_what_it_knew_and_no_open_file(cli, tmp_path):
    """Also its trace, its clock and its W&B run."""
    run = tmp_path / "x"
    (tmp_path / "changes.py").write_text(CHANGES)
    flags = AUTO.replace("--iterations 100000", "--iterations 9")
    process = cli(
        tmp_path / "changes.py", f"{flags} --run {run} --wandb offline", PYTHONPATH=str(ROOT)
    )
    status, output = process.finish(timeout=240)
    process.assert_nothing_left()
    assert status == 0 and "9 iterations done" in output and "Traceback" not in output, output
    assert "other settings" not in output and output.count("run folder") == 1
    before, after = re.findall(r"connects with (\d+) files", output)
    assert before == after
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 10))
    assert [line["tuning"]["ratio"] for line in lines if "ratio" in line["tuning"]] == ["1:1"]
    assert not (run / "tuning.json").exists()
    rows = (run / "trace.json").read_text()
    assert rows.count('"name": "publish"') == 9 + 2  # of both starts
    ids = {folder.name.rpartition("-")[2] for folder in run.glob("wandb/offline-run-*")}
    assert len(ids) == 1
