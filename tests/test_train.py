"""The command line end to end on the real simulator: every preset, several workers, resuming, and
every mistake.
"""

import itertools
import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LINE, SMALL, assert_balanced
from safetensors.torch import load_file
from test_html_report import read as read_page

import processes
import train
from config import PRESETS, ROOT, Config, completed, to_json
from errors import UserError, exit_on_user_error
from films import films_in
from models import checkpoint
from run_folder import RunFolder, read_trace

KEYS = {
    "iteration",
    "version",
    "time",
    "env_steps",
    "env_steps_per_s",
    "samples_per_s",
    "episodes",
    "success_rate",
    "reward",
    "loss_policy",
    "loss_value",
    "entropy_or_noise",
    "approx_kl",
    "clip_fraction",
    "ratio_max",
    "grad_norm",
    "lr",
    "staleness_mean",
    "staleness_max",
    "discarded",
    "reuse",
    "batch_size_mean",
    "batch_size_hist",
    "batch_wait_ms",
    "bubble_env",
    "bubble_rollout",
    "bubble_actor",
    "weight_sync_s",
    "weight_stall_s",
    "queue_depths",
    "restarts",
    "gpu_memory_gb",
    "rss_gb",
    "collected",
    "masked",
    "trained",
    "trained_once",
    "skipped",
    "filtered",
    "discarded_by",
    "staleness_hist",
    "cpu_fraction",
}
FRACTIONS = ("clip_fraction", "cpu_fraction", "bubble_env", "bubble_rollout", "bubble_actor")
CASES = {name: f"--preset {name} --ratio 2:1" for name in PRESETS}
# The synchronous algorithm on the asynchronous machinery: dynamic batches, streaming, two rollout
# and two actor workers.
CASES["staleness-0"] = (
    "--watch --preset full --max-staleness 0 --rollout-workers 2 --actor-workers 2 --ratio 1:2"
)


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(cli, folder, tiny_checkpoint):
    """The folder of a run of one of CASES, made by the first test that asks for it."""

    def get(case: str):
        run = folder / case
        if not run.exists():
            process = cli(
                "train.py",
                f"{SMALL} {CASES[case]} --checkpoint {tiny_checkpoint} --iterations 2 --run {run}",
            )
            status, output = process.finish()
            assert (
                status == 0
                and "2 iterations done; checkpoint in" in output
                and "Traceback" not in output
            ), output
        return run

    return get


@pytest.mark.parametrize("case", CASES)
def test_a_run_from_end_to_end(finished, case, tiny_checkpoint):
    run = finished(case)
    first, second = lines = lines_of(run)
    for iteration, line in enumerate(lines, 1):
        assert line.keys() >= KEYS, KEYS - line.keys()
        assert line["iteration"] == line["version"] == iteration
        assert all(0.0 <= line[name] <= 1.0 for name in FRACTIONS)
        assert all(math.isfinite(x) for x in line.values() if isinstance(x, float))
        assert (
            line["grad_norm"] > 0
            and line["restarts"] == 0
            and line["rss_gb"] > 0
            and line["discarded"] == 0
        )
        assert line["samples_per_s"] > 0
    assert (
        second["eval_episodes"] % 2 == 0 and 0.0 <= second["eval_success_rate"] <= 1.0
    )  # of the last weights, in every run
    assert (
        second["collected"] == 2 * 4 * 3
    )  # chunk steps: what is not going to be trained is never begun
    assert assert_balanced(run)["trained_once"] == 2 * 4 * 3
    assert (
        second["env_steps"] >= first["env_steps"] >= 4 * 3 * 10 and second["time"] > first["time"]
    )

    synchronous = case in ("sync-colocated", "sync-disaggregated", "staleness-0")
    assert first["staleness_max"] == 0 and second["staleness_max"] <= (0 if synchronous else 1)
    for line in (
        lines if synchronous else lines[:1]
    ):  # with staleness all of the second batch may have been played before line 1
        assert line["env_steps_per_s"] > 0 and sum(line["batch_size_hist"].values()) > 0
        # One minibatch is the whole batch, so its weights are the ones that acted.
        assert line["ratio_max"] == pytest.approx(1.0, abs=1e-4) and line["clip_fraction"] == 0.0
        assert line["approx_kl"] == pytest.approx(0.0, abs=1e-6)

    config = json.loads((run / "config.json").read_text())
    assert (config["env"]["envs"], config["train"]["iterations"]) == (4, 2)
    assert config["train"]["checkpoint"] == str(tiny_checkpoint)
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    rows = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    workers = (
        config["env"]["env_workers"],
        config["rollout"]["rollout_workers"],
        config["actor"]["actor_workers"],
    )
    assert workers == ((2, 2, 2) if case == "staleness-0" else (2, 1, 1))
    stages = {
        "env": 2,
        "rollout": workers[1],
        "weights to rollout": workers[1],
        "actor": workers[2],
    }
    if case == "staleness-0":
        stages["gradients of actor"] = 2
    assert rows == {f"{stage}-{i}" for stage, count in stages.items() for i in range(count)}
    for picture in ("swimlane.png", "curve.png", "staleness.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    page = read_page(run)
    assert "2 iterations done; checkpoint in" in page.text and not page.refreshes
    assert len(page.all("img")) == 3
    filmed = films_in(run / "videos").values()
    assert [films[-1].version for films in filmed] == [2, 2]
    assert len(page.all("video")) == sum(map(len, filmed)) >= 2

    saved = run / "checkpoints" / "000002"
    assert {file.name for file in saved.iterdir()} == {
        "model.safetensors",
        "optimizer.pt",
        "state.json",
    }
    assert json.loads((saved / "state.json").read_text())["version"] == 2
    before = load_file(tiny_checkpoint)
    after = load_file(saved / "model.safetensors")
    frozen = ("vision.", "embed_tokens.", "language.", "language_norm.")
    assert all(torch.equal(before[name], after[name]) == name.startswith(frozen) for name in before)
    torch.load(saved / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("case", ["full", "staleness-0"])
def test_the_trace_has_a_span_per_unit_of_work(finished, case):
    events = json.loads((finished(case) / "trace.json").read_text())["traceEvents"]
    spans = [event["name"] for event in events if event["ph"] == "X"]
    ranks = 2 if case == "staleness-0" else 1
    assert spans.count("train") == 2 * 2  # two iterations of two micro-batches, over all ranks
    assert spans.count("optimizer") == 2 * ranks and spans.count("publish") == 3 * ranks
    assert set(spans) >= {
        "step",
        "render",
        "reset",
        "infer",
        "checkpoint",
        "wait: action",
        "wait: request",
        "wait: trajectory",
    }
    args = {
        what: [e["args"] for e in events if e["name"] == what]
        for what in ("infer", "train", "fetch", "publish")
    }
    assert {a["version"] for a in args["infer"]} <= {0, 1, 2} and all(
        1 <= a["batch"] <= 6 for a in args["infer"]
    )
    slots = (
        [0, 1, 2, 3, 4, 5, 6, 7] if case == "full" else [0, 0, 1, 1, 2, 2, 3, 3]
    )  # without staleness, batches share slots
    assert sorted(slot for a in args["train"] for slot in a["slots"]) == slots
    assert all(a["epoch"] == a["minibatch"] == 0 for a in args["train"])
    assert [a["version"] for a in args["publish"] if a["bytes"]] == [0, 1, 2]
    assert {a["version"] for a in args["fetch"]} >= ({0, 1} if case == "staleness-0" else {0})
    assert {a["bytes"] for a in args["fetch"]} == {a["bytes"] for a in args["publish"]} - {0}


def test_every_reduction_of_gradients_has_its_bytes_and_seconds(finished):
    run = finished("staleness-0")
    lines = lines_of(run)
    sums = {name: row for name, row in read_trace(run).items() if name.startswith("gradients of")}
    assert set(sums) == {"gradients of actor-0", "gradients of actor-1"}
    for row in sums.values():
        assert {what for what, *_ in row} == {"reduce"}
        assert [args["bucket"] for *_, args in row].count(0) == len(lines)  # one minibatch each
        size = sum(args["bytes"] for *_, args in row)
        assert size == sum(line["reduce_bytes"] for line in lines) > 0
        assert sum(line["reduce_s"] for line in lines) <= sum(b - a for _, a, b, _ in row) + 1e-3
    for line in lines:
        assert line["reduce_wait_s"] >= 0 and 0 < line["reduce_s"] < line["time"]
    assert not any("reduce" in name for line in lines_of(finished("full")) for name in line)


# What a batch holds and what is learned from it. fp32 sums in other orders; success and entropy are
# the same to the last bit.
LEARNED = (
    "entropy_or_noise",
    "reward",
    "episodes",
    "success_rate",
    "loss_policy",
    "loss_value",
    "grad_norm",
    "lr",
)


def learned(run, iteration: int) -> list[float]:
    return [
        math.inf if line[name] is None else line[name]
        for line in lines_of(run)[iteration - 1 : iteration]
        for name in LEARNED
    ]


@pytest.mark.parametrize("case", [name for name in CASES if name != "sync-colocated"])
def test_no_setting_changes_the_first_batch(finished, case):
    assert learned(finished(case), 1) == pytest.approx(
        learned(finished("sync-colocated"), 1), rel=1e-3, abs=1e-6
    )


@pytest.mark.parametrize("case", ["sync-disaggregated", "staleness-0"])
def test_at_staleness_zero_no_setting_changes_learning(finished, case):
    assert learned(finished(case), 2) == pytest.approx(
        learned(finished("sync-colocated"), 2), rel=1e-2, abs=1e-5
    )


def test_only_the_critic_learns_while_it_warms_up(cli, tmp_path, tiny_checkpoint):
    run = tmp_path / "x"
    flags = (
        f"{SMALL} --eval-envs 0 --critic-warmup 1 --checkpoint-every 1 --checkpoint "
        f"{tiny_checkpoint} --iterations 2 --run {run}"
    )
    status, output = cli("train.py", flags).finish()
    assert status == 0, output
    weights = [
        load_file(tiny_checkpoint),
        *(load_file(run / f"checkpoints/00000{v}/model.safetensors") for v in (1, 2)),
    ]
    learnt = [
        {name for name in a if not torch.equal(a[name], b[name])}
        for a, b in itertools.pairwise(weights)
    ]
    assert learnt[0] and all(name.startswith("value_head.") for name in learnt[0])
    assert any(name.startswith("expert.") for name in learnt[1])
    assert [line["grad_norm_policy"] > 0 for line in lines_of(run)] == [False, True]


def test_staleness_on_purpose(cli, tmp_path, tiny_checkpoint):
    run = tmp_path / "x"
    flags = (
        f"{SMALL} --eval-every 0 --max-staleness 0 --extra-staleness 2 --checkpoint "
        f"{tiny_checkpoint} --iterations 4 --run {run}"
    )
    status, output = cli("train.py", flags).finish()
    assert status == 0, output
    lines = lines_of(run)
    assert [line["staleness_mean"] for line in lines] == [
        0.0,
        1.0,
        2.0,
        2.0,
    ]  # versions 0, 0, 0, 1 acted
    assert lines[0]["ratio_max"] == pytest.approx(1.0, abs=1e-4) and lines[2]["ratio_max"] > 1.001


EXACT = (
    "--model emulated --env emulated --image-size 8 --envs 4 --batch 8 --minibatch 4 "
    "--segment 4 --update-epochs 2 "
    "--lr 0.02 --eval-envs 0 --iterations 4 --ratio 1:1 --checkpoint-every 2"
)


@pytest.mark.parametrize(
    "algorithm",
    [
        "--algorithm ppo --value-lr 0.02 --micro-batch 16",
        "--algorithm grpo --group-size 2 --segment 6 --micro-batch 24",
    ],
)
def test_synchronous_and_asynchronous_runs_learn_the_same_bits(cli, tmp_path, algorithm):
    """On simulators of random speed. Where a micro-batch is a minibatch, sums have one order;
    smaller ones differ by rounding. A run of GRPO that is resumed learns the same bits, too."""
    settings = {
        "sync": "--preset sync-colocated --env-workers 1",
        "async": (
            "--preset full --max-staleness 0 --env-workers 2 --rollout-workers 2 --batch-max 1"
        ),
        "streamed": "--preset full --max-staleness 0 --env-workers 2 --micro-batch 2",
    }
    weights = {}

    def learn(name: str, flags: str) -> None:
        file = Path(__file__).with_name("exact.py")
        status, output = cli(file, flags, PYTHONPATH=str(ROOT)).finish(timeout=240)
        assert status == 0, output
        weights[name] = load_file(tmp_path / name / "checkpoints" / "000004" / "model.safetensors")

    for name, flags in settings.items():
        learn(name, f"{EXACT} {algorithm} {flags} --run {tmp_path / name}")
    if "grpo" in algorithm:
        shutil.copytree(tmp_path / "async", tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "000004")
        learn("resumed", f"--resume {tmp_path / 'resumed'}")
        assert learned(tmp_path / "resumed", 4) == learned(tmp_path / "async", 4)
        for name, tensor in weights["async"].items():
            assert torch.equal(weights["resumed"][name], tensor), (name, weights)
    for name, tensor in weights["sync"].items():
        assert torch.equal(weights["async"][name], tensor), (name, weights)
        torch.testing.assert_close(weights["streamed"][name], tensor, rtol=1e-3, atol=1e-5)
    assert weights["sync"]["gain"].any() and weights["sync"]["bias"].abs().max() > 0.02
    for iteration in (1, 2, 3, 4):
        sync, other, streamed = (learned(tmp_path / name, iteration) for name in settings)
        assert other == sync and streamed == pytest.approx(sync, rel=1e-3, abs=1e-6)
    assert any(
        line["episodes"] and 0 < line["success_rate"] < 1 for line in lines_of(tmp_path / "sync")
    )


def test_resume_goes_on_where_the_run_stopped(finished, cli, tmp_path):
    run = shutil.copytree(finished("full"), tmp_path / "copy")
    fixed = json.loads((run / "checkpoints/000002/state.json").read_text())["settings"]
    began = json.loads((run / "config.json").read_text())["train"]
    assert (fixed["env"], fixed["tasks"]) == (began["env"], began["tasks"])
    assert fixed["train_states"] == fixed["eval_states"] == ""
    before = lines_of(run)
    with open(
        run / "metrics.jsonl", "a"
    ) as file:  # a line after the last checkpoint is not part of what is continued
        file.write(json.dumps(before[1] | {"iteration": 3, "version": 3}) + "\n")
    # Its launcher was killed before it made a video; another one is of what comes again.
    (run / ".spans").mkdir()
    np.save(run / ".spans" / "a task_000001_success.npy", np.zeros((4, 8, 8, 3), np.uint8))
    (run / "videos").mkdir(exist_ok=True)
    (run / "videos" / "a task_000003_success.mp4").touch()
    status, output = cli("train.py", f"--resume {run} --iterations 3").finish()
    assert status == 0 and "3 iterations done" in output and "Traceback" not in output, output
    assert "other settings than this run had so far: iterations 3 (was 2)\n" in output
    assert [film.version for film in films_in(run / "videos")["a task"]] == [1]
    again = "it ended at iteration 3, so those after 2 come again"
    assert f"continues from {run}/checkpoints/000002; {again}\n" in output
    lines = lines_of(run)
    assert lines[:2] == before and [line["iteration"] for line in lines] == [1, 2, 3]
    assert lines[2]["collected"] == 3 * 4 * 3 == assert_balanced(run)["trained_once"]
    assert (
        lines[2]["env_steps"] >= before[1]["env_steps"] + 4 * 3 * 10
        and lines[2]["time"] > before[1]["time"]
    )
    assert lines[2]["staleness_max"] == 0 and lines[2]["ratio_max"] == pytest.approx(
        1.0, abs=1e-4
    )  # it acts with what was saved
    assert (run / "checkpoints/000003/model.safetensors").is_file() and (
        run / "checkpoints/000002"
    ).is_dir()
    saved = json.loads((run / "config.json").read_text())
    assert (saved["env"]["envs"], saved["env"]["segment"], saved["train"]["seed"]) == (
        4,
        3,
        3,
    )  # not the defaults


def test_the_default_checkpoint_on_whole_episodes(cli, tmp_path):
    """As users start it, only smaller; and Weights & Biases mirrors it offline."""
    flags = (
        "--envs 2 --env-workers 2 --batch 2 --minibatch 1 --update-epochs 2 "
        "--iterations 1 --eval-envs 0"
    )
    flags += " --tasks faucet-open handle-press"
    status, output = cli(
        "train.py", f"{flags} --run {tmp_path / 'x'} --checkpoint-every 1 --wandb offline"
    ).finish()
    assert status == 0, output
    (line,) = lines_of(tmp_path / "x")
    assert line["episodes"] >= 2 and 0.0 <= line["success_rate"] <= 1.0 and line["reuse"] == 2.0
    assert line["reward"] == pytest.approx(line["success_rate"] * line["episodes"] / 2)
    (mirrored,) = (tmp_path / "x").glob("wandb/offline-run-*")
    assert f"run wandb sync {mirrored}" in output
    status, output = cli("train.py", f"--resume {tmp_path / 'x'} --iterations 2").finish()
    assert status == 0, output
    mirrors = list((tmp_path / "x").glob("wandb/offline-run-*"))
    assert len(mirrors) == 2 and len({str(path)[-8:] for path in mirrors}) == 1  # one id


def test_a_folder_that_was_made_for_a_run_is_known_as_such(tmp_path, monkeypatch):
    """So that it goes away with a run that cannot begin."""
    monkeypatch.setattr(train, "unused_path", lambda: tmp_path)
    alone = SimpleNamespace(first=True, name_run=lambda name: None)
    monkeypatch.setattr(train, "agree", lambda *_: None)
    for run, made in (("", True), (tmp_path / "there", False)):
        if run:
            run.mkdir()
        config = completed(Config(), run=str(run))
        setup = SimpleNamespace(config=config, resume=None)
        folder = train.open_folder(setup, alone)
        assert folder.made is made
        os.close(folder.lock)


def test_without_a_login_weights_and_biases_is_refused_in_a_sentence(cli, tmp_path):
    flags = f"--wandb online --run {tmp_path / 'x'}"
    status, output = cli(
        "train.py", flags, WANDB_API_KEY="", WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(tmp_path)
    ).finish()
    assert (
        status == 2
        and "error: Weights & Biases: " in output
        and "--wandb offline" in output
        and "Traceback" not in output
    ), output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("preset", ["full", "sync-disaggregated"])
def test_grpo_from_end_to_end(cli, tmp_path, preset):
    flags = (
        "--algorithm grpo --group-size 2 --tasks faucet-open handle-press --envs 4 --env-workers 2 "
        "--batch 4 --minibatch 4"
    )
    flags += f" --update-epochs 1 --eval-envs 0 --iterations 3 --preset {preset} --max-staleness 0"
    status, output = cli("train.py", f"{flags} --run {tmp_path / 'x'}").finish()
    assert status == 0, output
    lines = lines_of(tmp_path / "x")
    for line in lines:
        assert (
            line["trajectories_per_task"] == {"faucet-open": 2, "handle-press": 2}
            and line["episodes"] == 4
        )
        assert line["loss_value"] == 0.0 and "explained_variance" not in line
        assert not line["trained"] or line["ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert (line["trained"] > 0) == (line["grad_norm"] > 0)
    assert any(line["trained"] for line in lines)  # a group of which one succeeds
    last = assert_balanced(tmp_path / "x")
    assert (
        last["discarded"]
        == last["discarded_by"]["filtered"]
        == sum(line["filtered"] for line in lines)
    )


def test_what_kl_stop_spares_is_counted(cli, tmp_path, tiny_checkpoint):
    """A KL that any update exceeds, so that two of three epochs are left out."""
    flags = SMALL.replace("--minibatch 4", "--minibatch 2").replace(
        "--update-epochs 1", "--update-epochs 3"
    )
    flags += (
        f" --checkpoint {tiny_checkpoint} --kl-stop 1e-12 --iterations 2 --run {tmp_path / 'x'} "
        "--lr 1e-3 --warmup 0"
    )
    status, output = cli("train.py", flags).finish()
    assert status == 0, output
    assert_balanced(tmp_path / "x")
    for line in lines_of(tmp_path / "x"):
        assert line["skipped"] == 2 * 4 * 3 and line["trained"] == 4 * 3 and line["reuse"] == 1.0


def test_tasks_of_very_different_speeds_are_trained_equally_often(cli, tmp_path):
    """Three tasks, the slowest thirty times as slow as the fastest, on five envs in two workers:
    nothing divides anything."""
    flags = (
        "--model emulated --env emulated --tasks 0.02 0.1 0.6 --envs 5 --env-workers 2 --batch 10 "
        "--minibatch 10 --micro-batch 20"
    )
    flags += (
        " --update-epochs 1 --image-size 8 --iterations 4 --eval-envs 0 --segment 4 --ratio 1:1"
    )
    status, output = cli("train.py", f"{flags} --run {tmp_path / 'x'}").finish()
    assert (
        status == 0
        and "5 envs take turns at 3 tasks, so episodes end after --segment 4 of 8 chunk steps"
        in output
    ), output
    counts = [line["trajectories_per_task"] for line in lines_of(tmp_path / "x")]
    assert [sorted(one.values()) for one in counts] == [[3, 3, 4]] * 4
    assert sorted(sum(one[task] for one in counts) for task in counts[0]) == [13, 13, 14]


def test_a_vectorised_simulator_runs_in_whole_lanes(cli, tmp_path):
    """Four lanes of two envs, two per env worker; two actor ranks, which each train whole lanes;
    evaluation in lanes of its own."""
    flags = (
        "--model emulated --env vectorised --envs 8 --env-workers 2 --batch 16 --minibatch 8 "
        "--micro-batch 8 --actor-workers 2"
    )
    flags += (
        " --update-epochs 2 --image-size 8 --segment 4 --chunk 5 --iterations 3 --eval-envs 2 "
        "--eval-episodes 5 --ratio 1:1"
    )
    status, output = cli("train.py", f"{flags} --run {tmp_path / 'x'}").finish()
    assert status == 0 and "3 iterations done" in output and "Traceback" not in output, output
    lines = lines_of(tmp_path / "x")
    assert (
        lines[-1]["collected"] == 3 * 16 * 4
        and lines[-1]["env_steps"] == 3 * 16 * 4 * 5
        and lines[-1]["discarded"] == 0
    )
    assert [line["trajectories_per_task"] for line in lines] == [{"vectorised": 16}] * 3
    assert assert_balanced(tmp_path / "x")["trained_once"] == 3 * 16 * 4
    assert (lines[-1]["eval_version"], lines[-1]["eval_episodes"]) == (3, 5)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["env"]["lanes"] == 2
    films = films_in(tmp_path / "x" / "videos")["vectorised"]
    assert [film.version for film in films] == [0, 3]


@pytest.mark.parametrize("status", [0, 130])
def test_the_trace_comes_last_where_a_scheduler_may_not_wait_for_it(tmp_path, monkeypatch, status):
    run = tmp_path / "run"
    monkeypatch.setattr(train, "run_crew", lambda *_: train.End("that was all", status))
    monkeypatch.setattr(processes, "note_interrupts", lambda *_: processes.Interrupts())
    finish = RunFolder.finish
    there = []

    def finished(folder):
        there.append((run / "report.html").is_file())
        finish(folder)

    monkeypatch.setattr(RunFolder, "finish", finished)
    assert train.main(train.parse(["--run", str(run)])) == status
    assert there == [status == 130] and "that was all" in read_page(run).text


def test_memory_report_starts_nothing(capsys, tiny_checkpoint, tmp_path):
    flags = f"{SMALL} --checkpoint {tiny_checkpoint} --run {tmp_path / 'x'} --memory-report"
    assert train.main(train.parse(flags.split())) == 0
    text = capsys.readouterr().out
    assert (
        "slot pool: 9 slots" in text
        and "weight plane" in text
        and "prefix_cache" in text
        and not (tmp_path / "x").exists()
    )


# ---------------------------------------------------------------- mistakes


def refused(flags: str) -> None:
    """Runs main with a user's mistake in it."""
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        train.main(train.parse(flags.split()))
    assert stop.value.code == 2 and time.monotonic() - begun < 10.0


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--no-such-flag 1", "no-such-flag"),
        ("--model llama", "llama"),
        ("--env atari", "atari"),
        ("--preset best", "best"),
        ("--algorithm dqn", "dqn"),
        ("--placement anywhere", "anywhere"),
        ("--envs many", "many"),
        ("--batch-max several", "several"),
        ("--ratio 0:1", "'0:1' is not R:A"),
        ("--ratio 3", "'3' is not R:A"),
        ("--ratio a:b", "'a:b' is not R:A"),
        ("--env-workers -1", "-1"),
        ("--rollout-workers -1", "-1"),
        ("--actor-workers -1", "-1"),
        (
            "--envs 240 --env-workers 240 --batch 240 --minibatch 240",
            "workers",
        ),  # more than the fork server can be given
        ("--batch 50", "not divisible by --envs"),
        ("--minibatch 49", "--minibatch 49 is larger than --batch 48"),
        ("--micro-batch 1000", "--micro-batch 1000 is larger than"),
        ("--iterations 0", "--iterations 0 must be at least 1"),
        ("--lanes 2", "--lanes 2 is for vectorised simulators"),
        (
            "--env vectorised --model emulated --env-workers 5",
            "--envs 24 cannot be split evenly into 2 lanes of each of 5",
        ),
        ("--segment 11", "longer than an episode of 9 chunk steps"),
        ("--chunk 5", "chunk = 10 and the run asks for 5"),
        ("--image-size 32", "image_size = 64 and the run asks for 32"),
        ("--tasks juggle", "unknown Meta-World task 'juggle'"),
        ("--tokenizer {tmp}/none.model", "no SentencePiece file"),
        ("--tokenizer {tmp}/file", "not a SentencePiece model"),
        ("--checkpoint {tmp}/none", "no checkpoint at"),
        ("--checkpoint {tmp}/file", "not a safetensors file"),
        ("--checkpoint {tmp}/truncated.safetensors", "truncated"),
        ("--checkpoint {tmp}/other.safetensors", "no tensor"),
        ("--run {tmp}/file/x", "cannot write the run folder"),
        ("--run {tmp}/old", "exists: it is not a run's: choose another --run"),
        ("--resume {tmp}/old --run {tmp}/new", "exclude each other"),
        ("--resume-or-start {tmp}/old --run {tmp}/new", "leave out --run and --resume"),
        (
            "--resume {tmp}/half --checkpoint {tmp}/x --adapter={tmp}/y",
            "goes on from its own newest checkpoint: leave out --checkpoint and --adapter",
        ),
        ("--resume {tmp}/none", "there is no run {tmp}/none: runs/ holds"),
        ("--resume no-such-run", "runs/no-such-run: runs/ holds"),
        ("--resume {tmp}", "cannot read the settings of the run"),
        ("--resume {tmp}/half/checkpoints/000003", "name the run, {tmp}/half"),
        ("--resume {tmp}/old", "no checkpoint at"),
        ("--resume {tmp}/begun", "was stopped before it saved anything: start it with --run"),
        ("--resume {tmp}/half", "cannot read {tmp}/half/checkpoints/000003/state.json"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, tiny_checkpoint, capsys, flags, words):
    (tmp_path / "file").write_text("text")
    (tmp_path / "truncated.safetensors").write_bytes(tiny_checkpoint.read_bytes()[:-100])
    checkpoint.save(
        tmp_path / "other.safetensors",
        checkpoint.read_header(tiny_checkpoint),
        {"x": torch.zeros(1)},
    )
    (tmp_path / "half" / "checkpoints" / "000003").mkdir(parents=True)
    (tmp_path / "old").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "half" / "checkpoints" / "000003" / "model.safetensors").symlink_to(tiny_checkpoint)
    (tmp_path / "half" / "checkpoints" / "000003" / "state.json").write_text('{"version": 3, "se')
    for run in ("old", "half", "begun"):
        (tmp_path / run / "config.json").write_text(to_json(Config()))
    given = flags.format(tmp=tmp_path)
    for flag, value in (
        ("--checkpoint", tiny_checkpoint),
        ("--run", tmp_path / "new"),
        ("--iterations", 1),
        ("--timeout-s", 5),
    ):
        begins = flag in ("--checkpoint", "--run") and "--resume" in given
        given += "" if flag in given or begins else f" {flag} {value}"
    refused(given)
    printed = capsys.readouterr()
    assert (
        printed.out == ""
        and words.format(tmp=tmp_path) in printed.err
        and "Traceback" not in printed.err
    )
    assert (
        printed.err.startswith("error: ")
        and printed.err.count("\n") == 1
        or "--help" in printed.err
    )  # ours, or tyro's
    assert not (tmp_path / "new").exists()


def test_a_job_that_is_queued_again_resumes_or_starts(tmp_path, capsys):
    """A run that was stopped before its first checkpoint starts over; what is no run's stays. Where
    nothing is left to do, the job has done it."""
    path = tmp_path / "x"
    flags = ["--resume-or-start", str(path), "--iterations", "7", "--checkpoint", "x"]
    begun = train.parse(flags).train
    assert (begun.run, begun.checkpoint) == (str(path), Path("x"))
    for _ in range(2):
        folder = RunFolder(path, resume=False)
        assert folder.lines() == []
        folder.append({"version": 1})
        os.close(folder.lock)
    assert (path / "metrics.jsonl.old").read_text() == '{"version": 1}\n'
    (path / "checkpoints" / "000001").mkdir()
    (path / "config.json").write_text(to_json(Config()))
    train_config = train.parse(flags).train
    assert train_config.resume == str(path) and train_config.run == ""
    assert train_config.checkpoint is None  # as in its config.json
    assert train_config.iterations == 7
    # Its launcher was killed before it wrote the last line.
    state = {"version": 1, "seed": 1, "scale": {}, "lines": [LINE]}
    (path / "checkpoints" / "000001" / "state.json").write_text(json.dumps(state))
    (path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit) as ended:
        train.parse([*flags[:2], "--iterations", "1"])
    assert ended.value.code == 0
    assert json.loads((path / "metrics.jsonl").read_text()) == LINE
    assert capsys.readouterr().out.endswith("has 1 iterations: nothing is left to do\n")
    with pytest.raises(UserError, match="continue it with --resume"):
        RunFolder(path, resume=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="it is not a run's: choose another --run"):
        RunFolder(tmp_path / "mine", resume=False)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"lr": 1}', "checkpoints/latest-checkpoint.pt": "", "metrics.jsonl": ""},
        {"config.json": '{"lr": 1}', "checkpoints/.gitkeep": ""},
        {"checkpoints/latest-checkpoint.pt": ""},
        {"config.json": to_json(Config()), "checkpoints/000001-best/model.safetensors": ""},
    ],
    ids=str,
)
def test_a_folder_of_another_project_is_left_alone(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="it is not a run's: choose another --run"):
        RunFolder(tmp_path, resume=False)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == set(files)


def test_a_run_that_starts_over_is_another_one_to_weights_and_biases(tmp_path):
    (tmp_path / "checkpoints/.000001.partial").mkdir(parents=True)
    (tmp_path / "config.json").write_text(to_json(Config()))
    (tmp_path / "wandb.id").write_text("first")
    RunFolder(tmp_path, resume=False)
    assert not (tmp_path / "wandb.id").exists()
    assert (tmp_path / "wandb.id.old").read_text() == "first"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--no-such-flag", "no-such-flag"),
        ("--checkpoint nowhere", "error: no checkpoint at nowhere"),
    ],
)
def test_a_mistake_on_the_real_command_line(cli, tmp_path, flags, words):
    status, output = cli("train.py", f"{flags} --run {tmp_path / 'x'}").finish(timeout=10)
    assert status == 2 and words in output and "Traceback" not in output


def test_a_missing_simulator_says_how_to_install_it(cli, tmp_path):
    script = tmp_path / "without.py"
    script.write_text(f"""
import runpy, sys
sys.modules['metaworld'] = None  # importing it fails as if it were not installed
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["train.py", "--run", {str(tmp_path / "x")!r}]
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    status, output = cli(script).finish(timeout=10)
    assert (
        status == 2
        and "pip install -r requirements.txt" in output
        and "Traceback" not in output
        and output.count("\n") == 1
    )


def test_a_simulator_that_cannot_draw_is_one_sentence_too(cli, tmp_path):
    status, output = cli("train.py", f"--run {tmp_path / 'x'}", MUJOCO_GL="no-such-backend").finish(
        timeout=10
    )
    assert status == 2 and "error: " in output and "Traceback" not in output, output
    assert "MUJOCO_GL=no-such-backend in the environment: unset MUJOCO_GL" in output
    # This backend is one, but fails when it is to draw: in a worker, before that is ready.
    process = cli("train.py", f"{SMALL} --run {tmp_path / 'y'}", MUJOCO_GL="glx", DISPLAY="")
    status, output = process.finish(timeout=60)
    assert status == 1 and "starting it again" not in output and "Traceback" not in output, output
    assert "does not start" in output and output.endswith(" unset MUJOCO_GL\n"), output
