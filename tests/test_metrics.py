"""Counters to metrics lines, spans to a Chrome trace, the run folder and its pictures."""

import json
import subprocess
import sys
import time

import pytest

import metrics
from channel import Counters
from config import ROOT, Config, UserError
from metrics import HISTOGRAM, Evaluations, Interval, Ledger, Meter, RunFolder, progress, read_metrics, write_trace

ROWS = {"actor": [0], "rollout": [1], "env": [2, 3]}
TASKS = ("push", "reach")


def counters() -> Counters:
    return Counters(4, metrics.columns(4))


def line(version: int, **more) -> dict:
    return {
        "iteration": version, "version": version, "time": 60.0 * version, "success_rate": 0.25, "env_steps_per_s": 100.0,
        "staleness_mean": 0.5, "staleness_max": 1, "bubble_env": 0.1, "bubble_rollout": 0.2, "bubble_actor": 0.3,
        "waits": {"env:action": 0.1, "actor:trajectory": 0.3},
    } | more  # fmt: skip


def test_every_moment_is_work_or_a_wait_with_a_cause(tmp_path):
    table = counters()
    meter = Meter("env-0", 2, table, tmp_path)
    with meter.work("step"):
        time.sleep(0.05)
    with meter.wait("action"):
        assert table.get(2, "waiting") == 1 + metrics.CAUSES.index("action")
        time.sleep(0.03)
    assert table.get(2, "waiting") == 0 and table.get(2, "work_s") >= 0.05 and table.get(2, "wait_action_s") >= 0.03
    assert time.monotonic() - table.get(2, "time") < 5.0
    meter.flush()
    spans = [json.loads(row) for row in (tmp_path / "env-0.jsonl").read_text().split("\n")[1:]]
    assert [name for name, _, _ in spans] == ["step", "wait: action"]
    assert all(end > start for _, start, end in spans) and spans[1][1] >= spans[0][2]


def test_without_trace_nothing_is_written(tmp_path):
    meter = Meter("env-0", 2, counters(), None)
    with meter.work("step"), meter.nothing:
        pass
    meter.flush()
    meter.ready()
    assert list(tmp_path.iterdir()) == [] and meter.counters.get(2, "ready") == 1


def test_an_interval_is_what_was_gained_since_the_last(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    table = counters()
    table.add(2, "env_steps", 50.0)
    interval = Interval(table, ROWS)
    now[0] = 110.0
    table.add(2, "env_steps", 100.0), table.add(3, "env_steps", 300.0)
    table.add(1, "requests", 12.0), table.add(1, "batches", 4.0), table.add(1, "batch_wait_s", 0.02)
    table.add(1, HISTOGRAM[1], 3.0), table.add(1, HISTOGRAM[3], 1.0)
    table.set(1, "weight_sync_s", 0.5), table.set(1, "fetches", 2.0), table.add(1, "weight_stall_s", 0.25)
    table.add(2, "wait_action_s", 1.0), table.add(3, "wait_action_s", 3.0), table.add(3, "wait_admission_s", 2.0)
    table.add(0, "wait_trajectory_s", 12.0)  # a wait that began before the interval
    out = interval.measure()
    assert interval.totals()["env_steps"] == 450 and out["env_steps_per_s"] == 40.0
    assert out["batch_size_mean"] == 3.0 and out["batch_size_hist"] == {"2": 3, "8": 1} and out["batch_wait_ms"] == 5.0
    assert out["weight_sync_s"] == 0.25 and out["weight_stall_s"] == 0.25
    assert out["bubble_env"] == pytest.approx(0.3) and out["bubble_rollout"] == 0.0 and out["bubble_actor"] == 1.0
    assert out["waits"] == {"env:action": 0.2, "env:admission": 0.1, "actor:trajectory": 1.2}
    now[0] = 111.0
    again = interval.measure()
    assert again["env_steps_per_s"] == 0.0 and again["bubble_env"] == 0.0


def test_the_ledger_goes_on_where_a_resumed_run_stopped():
    of_batch = {"trained_once": 10, "discarded_by": {"restart": 2, "filtered": 3, "after_end": 1}}
    none = {"restart": 0, "filtered": 0, "after_end": 0, "resume": 0}
    ledger = Ledger({})
    first = ledger.of(of_batch, 20)
    assert first == {"collected": 20, "trained_once": 10, "discarded": 6, "discarded_by": none | of_batch["discarded_by"]}
    second = ledger.of({"trained_once": 4, "discarded_by": {"restart": 0, "filtered": 8, "after_end": 0}}, 35)
    by = {"restart": 2, "filtered": 11, "after_end": 1, "resume": 0}
    assert second == {"collected": 35, "trained_once": 14, "discarded": 14, "discarded_by": by}
    assert first["discarded_by"]["filtered"] == 3  # a line of its own
    resumed = Ledger(second).of(of_batch, 16)  # 7 were in flight, of which nothing is left
    by = {"restart": 4, "filtered": 14, "after_end": 2, "resume": 7}
    assert resumed == {"collected": 51, "trained_once": 24, "discarded": 27, "discarded_by": by}


def test_rounds_of_evaluation_never_mix_and_are_reported_once():
    config, table = Config(), counters()
    config.env.eval_every, config.env.eval_episodes, config.train.iterations = 2, 4, 5
    evaluations = Evaluations(config, TASKS, 0, table)

    def play(round: int, outcomes: dict[int, bool]) -> None:
        for episode, success in outcomes.items():
            table.set(2 + episode % 2, f"outcome_{episode}", 2 * round + success)

    assert not evaluations.begins(-1) and evaluations.begins(0) and not evaluations.begins(0) and table.get(0, "eval_round") == 1
    play(1, {0: True, 1: False, 2: False})
    assert not evaluations.begins(4) and evaluations.report() == {}  # one episode is still played
    play(1, {3: False})
    assert evaluations.begins(4) and table.get(0, "eval_round") == 2
    expected = {"eval_success_rate": 0.25, "eval_episodes": 4, "eval_per_task": {"push": 0.5, "reach": 0.0}, "eval_version": 0}
    assert evaluations.report() == expected and evaluations.report() == {}
    play(2, dict.fromkeys(range(4), True))
    assert evaluations.begins(5)  # the last version, whatever `eval_every` says
    assert evaluations.report() == expected | {
        "eval_success_rate": 1.0, "eval_per_task": {"push": 1.0, "reach": 1.0}, "eval_version": 4
    }  # fmt: skip
    play(3, dict.fromkeys(range(4), False))
    assert not evaluations.begins(5) and not evaluations.begins(5) and evaluations.report()["eval_version"] == 5
    config.env.eval_envs = 0
    assert not Evaluations(config, TASKS, 0, table).begins(0)


def test_the_trace_is_in_chrome_s_format(tmp_path):
    spans = {"env-0": [["step", 10.5, 11.0], ["wait: action", 11.0, 11.25]], "actor-0": [["train", 10.0, 12.0]], "rollout-0": []}
    write_trace(tmp_path / "trace.json", spans)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert list(names.values()) == ["env-0", "rollout-0", "actor-0"]
    work = [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert ("env-0", "step", pytest.approx(500_000.0), pytest.approx(500_000.0)) in work  # microseconds
    assert ("env-0", "wait: action", pytest.approx(1_000_000.0), pytest.approx(250_000.0)) in work
    assert ("actor-0", "train", pytest.approx(0.0), pytest.approx(2_000_000.0)) in work and len(work) == 3


def test_a_run_folder_from_begin_to_end(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "one", resume=False)
    for version in (1, 2, 3):
        folder.append(
            line(version, **{"eval_success_rate": 0.5} if version == 2 else {}, success_rate=None if version == 1 else 0.5)
        )
    torn = '\n["step",1.0,2.0]\n["step",2.0,2.5]\n["step",3.'  # killed while it wrote; its successor goes on below
    (folder.spans / "env-0.jsonl").write_text(torn + '\n["step",4.0,4.5]')
    (folder.spans / "rendezvous").write_bytes(b"left by actor workers that were killed")
    folder.finish()
    assert {p.name for p in folder.path.iterdir()} == {"checkpoints", "metrics.jsonl", "trace.json", "swimlane.png", "curve.png"}
    events = json.loads((folder.path / "trace.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == 3
    for picture in ("swimlane.png", "curve.png"):
        assert (folder.path / picture).read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match=f"exists: continue it with --resume {folder.path} "):
        RunFolder(folder.path, resume=False)
    again = RunFolder(folder.path, resume=True)
    again.truncate(2)
    assert [one["version"] for one in again.lines()] == [1, 2] == [one["version"] for one in read_metrics(folder.path)]
    again.finish(draw=False)


def test_a_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="choose another --run"):
            RunFolder(path, resume=False)


def test_pictures_are_drawn_again_on_request(tmp_path):
    command = [sys.executable, "-m", "metrics", str(tmp_path)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and "usage" in failed.stderr and "Traceback" not in failed.stderr
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    write_trace(tmp_path / "trace.json", {"env-0": [["step", 1.0, 2.0]]})
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "curve.png").stat().st_size > 1000 and (tmp_path / "swimlane.png").stat().st_size > 1000


@pytest.mark.parametrize("interactive", [False, True])
def test_progress_shows_each_iteration(capsys, interactive):
    show, display = progress(7, interactive)
    with display:
        show(line(1, success_rate=None))
        show(line(2, eval_success_rate=0.75))
    text = capsys.readouterr().out
    assert "2/7" in text and "75.0%" in text and "25.0%" in text


def test_warnings_come_once_a_sign_lasts_and_say_what_to_change():
    healthy = {"approx_kl": 0.01, "clip_fraction": 0.1, "masked_fraction": 0.0, "explained_variance": 0.5, "grad_norm": 1.0}
    warnings = metrics.Warnings()
    assert all(not warnings.of(healthy) for _ in range(40))
    for key, value, words in (
        ("approx_kl", 0.5, "--lr"), ("clip_fraction", 0.9, "90% of samples"), ("masked_fraction", 0.2, "--max-staleness"),
        ("kl_at_3_or_more", 1.0, "3 and more versions"), ("explained_variance", -2.0, "--value-lr"),
        ("grad_norm", 1e3, "norm is 1000"), ("filtered_fraction", 0.95, "--tasks"),
    ):  # fmt: skip
        warnings, said = metrics.Warnings(), []
        for i in range(3 + 30):
            said += [(i, text) for text in warnings.of(healthy | {key: value})]
        assert [i for i, _ in said] == [2, 32] and all(words in text and text.startswith("warning: ") for _, text in said), said
        assert not warnings.of(healthy) and not warnings.of(healthy | {key: value})  # one good iteration starts the count anew
