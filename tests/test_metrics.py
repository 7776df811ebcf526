"""Counters to metrics lines, spans to a Chrome trace and back, the run folder, what a person is
told, and the page that explains every key.
"""

import errno
import itertools
import json
import os
import re
import time
from pathlib import Path

import pytest
from conftest import LINE

import files
import metrics
import run_folder
from channel import Counters
from config import ROOT, Config
from errors import UserError
from metrics import HISTOGRAM, Interval, Ledger, Meter, figures
from report import Beginning, batch_line, flatten, progress
from run_folder import (
    RunFolder,
    lines_until,
    pack_spans,
    place_of,
    read_metrics,
    read_spans,
    read_trace,
    take_spans,
    write_trace,
)
from tally import Tally

ROWS = {"actor": [0], "rollout": [1], "env": [2, 3]}


def counters() -> Counters:
    return Counters(4, metrics.columns(4))


def ended(interval: Interval) -> dict:
    """What a launcher that is alone makes of an interval."""
    return figures({0: interval.measure(rss_gb=2.0, cpu_s=3.0)})


def line(version: int, **more) -> dict:
    return (
        LINE
        | {
            "iteration": version,
            "version": version,
            "time": 60.0 * version,
            "success_rate": 0.25,
            "reward": 1.5,
            "approx_kl": 0.0125,
            "env_steps_per_s": 100.0,
            "staleness_mean": 0.5,
            "staleness_max": 1,
            "bubble_env": 0.1,
            "bubble_rollout": 0.2,
            "bubble_actor": 0.3,
            "waits": {"env:action": 0.1, "actor:trajectory": 0.3},
        }
        | more
    )


def test_every_moment_is_work_or_a_wait_with_a_cause(tmp_path):
    table = counters()
    meter = Meter("env-0", 2, table, tmp_path)
    with meter.work("step", batch=3):
        time.sleep(0.05)
    with meter.wait("action"):
        assert table.get(2, "waiting") == 1 + metrics.CAUSES.index("action")
        time.sleep(0.03)
    assert (
        table.get(2, "waiting") == 0
        and table.get(2, "work_s") >= 0.05
        and table.get(2, "wait_action_s") >= 0.03
    )
    assert time.monotonic() - table.get(2, "time") < 5.0
    busy = table.get(2, "work_s")
    meter.record("fetch", 1.0, 2.0, {"version": 7})
    assert (
        table.get(2, "work_s") == busy
    )  # what a side thread does is neither work nor a wait of this worker
    meter.flush()
    step, wait, fetch = json.loads((tmp_path / "env-0.jsonl").read_text())
    assert (step[0], step[3], wait[0], len(wait)) == ("step", {"batch": 3}, "wait: action", 3)
    assert fetch == ["fetch", 1.0, 2.0, {"version": 7}]
    assert step[2] > step[1] and wait[2] > wait[1] >= step[2]


def test_without_trace_nothing_is_written(tmp_path):
    meter = Meter("env-0", 2, counters(), None)
    with meter.work("step", batch=3):
        pass
    meter.record("fetch", 1.0, 2.0)
    meter.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_gives_signs_of_life_and_knows_how_often_it_was_replaced(monkeypatch):
    monkeypatch.setattr(metrics.time, "monotonic", lambda: 7.0)
    table = counters()
    meter = Meter("env-0", 2, table, None)
    meter.alive()
    assert (table.get(2, "time"), table.get(2, "ready"), meter.restarts()) == (7.0, 0.0, 0)
    table.add(2, "restarts", 3)
    meter.ready()
    assert table.get(2, "ready") == 1 and meter.restarts() == 3


def test_an_interval_is_what_was_gained_since_the_last(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    table = counters()
    table.add(2, "env_steps", 50.0)
    interval = Interval(table, ROWS)
    now[0] = 110.0
    table.add(2, "env_steps", 100.0)
    table.add(3, "env_steps", 300.0)
    table.add(1, "requests", 12.0)
    table.add(1, "batches", 4.0)
    table.add(1, "batch_wait_s", 0.02)
    table.add(1, HISTOGRAM[1], 3.0)
    table.add(1, HISTOGRAM[3], 1.0)
    table.set(1, "weight_sync_s", 0.5)
    table.set(1, "fetches", 2.0)
    table.add(1, "weight_stall_s", 0.25)
    table.add(2, "wait_action_s", 1.0)
    table.add(3, "wait_action_s", 3.0)
    table.add(3, "wait_admission_s", 2.0)
    table.add(0, "wait_trajectory_s", 10.0)
    out = ended(interval)
    entered = of_batch(10, 2, 3, 1)
    entered |= {"collected": 16, "env_steps": 450, "restarts": 0}
    Ledger([], epochs=2).enter(entered, table)
    assert entered["env_steps"] == 450 and out["env_steps_per_s"] == 40.0
    assert (
        out["batch_size_mean"] == 3.0
        and out["batch_size_hist"] == {"2": 3, "8": 1}
        and out["batch_wait_ms"] == 5.0
    )
    assert (
        out["weight_sync_s"] == 0.25
        and out["weight_stall_s"] == 0.25
        and 0.0 <= out["cpu_fraction"] <= 1.0
    )
    assert (
        out["bubble_env"] == pytest.approx(0.3)
        and out["bubble_rollout"] == 0.0
        and out["bubble_actor"] == 1.0
    )
    assert out["waits"] == {"env:action": 0.2, "env:admission": 0.1, "actor:trajectory": 1.0}
    now[0] = 111.0
    again = ended(interval)
    assert again["env_steps_per_s"] == 0.0 and again["bubble_env"] == 0.0


def measured(number: int, seconds: float, envs: int, **changes) -> dict:
    """What the launcher of a node measured whose workers did the more, the higher its number."""
    gained = {stage: dict.fromkeys(metrics.COLUMNS, 0.0) for stage in metrics.STAGES}
    gained["env"] |= {"env_steps": 100.0 * number, "wait_action_s": 2.0, "restarts": number - 1.0}
    batches = {"batches": 4.0 * number, "requests": 8.0 * number**2, "batch_wait_s": 0.02}
    gained["rollout"] |= batches | {"fetches": 1.0, "weight_sync_s": 0.5 * number}
    gained["rollout"] |= {"weight_stall_s": 0.25, HISTOGRAM[number]: 4.0 * number}
    gained["actor"] |= {"wait_gradient_s": 3.0 * (2 - number), "wait_trajectory_s": 1.0}
    return {
        "elapsed": seconds,
        "workers": {"env": envs, "rollout": 1, "actor": 1},
        "gained": gained,
        "gpu_memory_gb": 1.5,
        "cpu_fraction": 0.25 * number,
        "rss_gb": 3.0 + number,
        "cpu_s": 100.0,
    } | changes


def test_a_line_is_of_all_nodes_with_each_one_s_figures_beside_it():
    """Means are over all inferences and fetches, and bubbles over the time of all workers: neither
    is the mean of the nodes' own."""
    both = [measured(1, 10.0, envs=2), measured(2, 8.0, envs=5)]
    out = json.loads(json.dumps(figures(dict(enumerate(both)))))
    assert out["env_steps_per_s"] == 100 / 10 + 200 / 8
    assert out["batch_size_mean"] == (8 + 32) / 12 and out["batch_wait_ms"] == 1e3 * 0.04 / 12
    assert out["batch_size_hist"] == {"2": 4, "4": 8}
    assert (out["weight_sync_s"], out["weight_stall_s"]) == (0.75, 0.5)
    assert (out["gpu_memory_gb"], out["cpu_fraction"], out["rss_gb"]) == (3.0, 0.375, 9.0)
    assert out["bubble_env"] == 4 / (2 * 10 + 5 * 8)
    assert out["bubble_actor"] == pytest.approx((1 + 3 + 1) / 18)
    assert out["waits"] == {
        "env:action": round(4 / 60, 4),
        "actor:trajectory": round(2 / 18, 4),
        "actor:gradient": round(3 / 18, 4),
    }
    assert out["nodes"]["0"] == {
        "env_steps_per_s": 10.0,
        "bubble_env": 0.1,
        "bubble_rollout": 0.0,
        "bubble_actor": 0.4,
        "wait_gradient": 0.3,
        "restarts": 0,
        "cpu_fraction": 0.25,
        "rss_gb": 4.0,
        "gpu_memory_gb": 1.5,
    }
    slow = out["nodes"]["1"]
    assert (slow["wait_gradient"], slow["bubble_env"], slow["restarts"]) == (0.0, 0.05, 1)
    assert list(out["nodes"]) == ["0", "1"] and "nodes" not in figures({0: both[0]})


def test_every_figure_of_a_node_is_documented():
    found = paths({"nodes": figures({0: measured(1, 10.0, 2), 1: measured(2, 8.0, 5)})["nodes"]})
    rows = {entry: keys for entry, keys in documented().items() if "NODE" in entry}
    assert set().union(*rows.values()) == found


def test_a_line_with_nodes_is_read_again_and_mirrored(tmp_path):
    nodes = figures({0: measured(1, 10.0, 2), 1: measured(2, 8.0, 5)})["nodes"]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE | {"nodes": nodes}) + "\n")
    assert read_metrics(tmp_path)[0]["nodes"] == nodes
    assert flatten({"nodes": nodes})["nodes/1/env_steps_per_s"] == 25.0
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE | {"nodes": {"0": "fast"}}) + "\n")
    with pytest.raises(UserError, match="line 1 of .*metrics.jsonl"):
        read_metrics(tmp_path)


def test_of_a_wait_across_its_border_each_interval_has_its_part(monkeypatch):
    now = [90.0]
    table = counters()
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with Meter("actor-0", 0, table, None).wait("trajectory"):
        now[0] = 100.0
        interval = Interval(table, ROWS)
        now[0] = 104.0
    now[0] = 108.0
    with Meter("actor-0", 0, table, None).wait("trajectory"):
        now[0] = 110.0
        assert ended(interval)["waits"] == {"actor:trajectory": 0.6}
        now[0] = 111.0
    now[0] = 114.0
    assert ended(interval)["waits"] == {"actor:trajectory": 0.25}
    table.set(2, "waiting", 1 + metrics.CAUSES.index("action"))
    table.set(2, "since", 114.0)
    now[0] = 118.0  # killed in this wait, which its row keeps
    metrics.count_wait(table.table[2], table.index, now[0])
    table.set(2, "waiting", 0.0)
    now[0] = 124.0
    assert ended(interval)["waits"] == {"env:action": 0.2}


def of_batch(trained_once: int, restart: int, filtered: int, after_end: int) -> dict:
    """What the actor says of a batch that was trained in two epochs."""
    return {
        "iteration": 1,
        "version": 1,
        "trained": 2 * trained_once - 1,
        "skipped": 1,
        "trained_once": trained_once,
        "discarded_by": {"restart": restart, "filtered": filtered, "after_end": after_end},
    }


def test_the_ledger_goes_on_where_a_resumed_run_stopped():
    ledger = Ledger([], epochs=2)
    first = ledger.add(of_batch(10, 2, 3, 1) | {"collected": 20})
    by = {"restart": 2, "filtered": 3, "undrawn": 0, "after_end": 1, "resume": 0}
    assert first == {"collected": 20, "trained_once": 10, "discarded": 6, "discarded_by": by}
    second = ledger.add(of_batch(4, 0, 8, 0) | {"collected": 35})
    by = {"restart": 2, "filtered": 11, "undrawn": 0, "after_end": 1, "resume": 0}
    assert second == {"collected": 35, "trained_once": 14, "discarded": 14, "discarded_by": by}
    assert first["discarded_by"]["filtered"] == 3  # a line of its own
    # 7 were in flight, of which nothing is left.
    resumed = Ledger([second], epochs=2).add(of_batch(10, 2, 3, 1) | {"collected": 16})
    by = {"restart": 4, "filtered": 14, "undrawn": 0, "after_end": 2, "resume": 7}
    assert resumed == {"collected": 51, "trained_once": 24, "discarded": 27, "discarded_by": by}


def node_tally(collected: int, once: int, skipped: int, **lost: int) -> Tally:
    """What a node's ranks tally of a batch that is trained in two epochs."""
    tally = Tally()
    sums = {"trained": 2 * once - skipped, "skipped": skipped, "trained_once": once}
    sums |= {"collected": collected, "env_steps": 5 * collected, "restarts": 1}
    for name, value in sums.items():
        tally.add(name, value)
    for reason, steps in lost.items():
        tally.add(reason, steps, "part")
    return tally


def test_the_ledger_is_of_all_nodes():
    """Each node's workers collect, lose and train; only the sums balance, and restarts add up."""
    config = Config()
    ledger = Ledger([], epochs=2)
    first = Tally()
    first.merge(node_tally(collected=20, once=10, skipped=0, restart=2))
    first.merge(node_tally(collected=30, once=14, skipped=4, restart=0, after_end=3))
    line = first.line(1, config, ("push",))
    ledger.enter(line, counters())
    assert (line["collected"], line["trained_once"], line["discarded"]) == (50, 24, 5)
    assert (line["trained"], line["skipped"]) == (44, 4)
    assert (line["env_steps"], line["restarts"]) == (250, 2)
    by = {"restart": 2, "filtered": 0, "undrawn": 0, "after_end": 3, "resume": 0}
    assert line["discarded_by"] == by

    # Without the second node's workers in it, more was trained than collected.
    alone = Tally()
    alone.merge(node_tally(collected=20, once=10, skipped=0, restart=2))
    second = node_tally(collected=0, once=14, skipped=4, restart=0, after_end=3)
    alone.merge(second)
    with pytest.raises(RuntimeError, match="20 chunk steps were collected in all, but 24 trained"):
        Ledger([], epochs=2).enter(alone.line(1, config, ("push",)), counters())


def test_a_ledger_that_does_not_balance_is_an_error():
    Ledger([], epochs=2).add(of_batch(10, 2, 3, 1) | {"collected": 16})
    for epochs, collected, sides in (
        (2, 15, "15 chunk steps were collected in all, but 10 trained and 6 discarded"),
        (3, 16, "19 samples were trained and 1 skipped, but 3 epochs of 10 chunk steps are 30"),
    ):
        with pytest.raises(RuntimeError, match=f"does not balance: of iteration 1, {sides}"):
            Ledger([], epochs).add(of_batch(10, 2, 3, 1) | {"collected": collected})


SPANS = {
    "env-10": [["step", 10.5, 11.0], ["wait: action", 11.0, 11.25]],
    "env-2": [["step", 10.5, 10.75]],
    "actor-0": [
        ["publish", 10.0, 10.25, {"version": 0, "bytes": 8}],
        ["train", 11.0, 12.0, {"slots": [0, 1], "epoch": 1}],
        ["reduce", 11.75, 12.25, {"bucket": 0, "bytes": 16}],
    ],
    "rollout-0": [
        ["infer", 10.5, 11.5, {"batch": 2}],
        ["fetch", 10.25, 10.5, {"version": 0, "bytes": 8}],
    ],
    "rollout-1": [],
}


def test_the_trace_is_in_chrome_s_format(tmp_path):
    """A process per stage and a thread per worker, in an order that Perfetto keeps; transfers of
    weights and gradients beside them."""
    write_trace(tmp_path / "trace.json", SPANS)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    stages = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(stages.values()) == ["env", "rollout", "weights", "actor", "gradients"]
    assert min(stages) > 0
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    assert sorted(stages, key=order.get) == list(stages)
    rows = {
        e["tid"]: (stages[e["pid"]], e["args"]["name"])
        for e in events
        if e["name"] == "thread_name"
    }
    assert list(rows.values()) == [
        ("env", "env-2"),
        ("env", "env-10"),
        ("rollout", "rollout-0"),
        ("rollout", "rollout-1"),
        ("weights", "weights to rollout-0"),
        ("actor", "actor-0"),
        ("gradients", "gradients of actor-0"),
    ]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 8 and all(stages[e["pid"]] == rows[e["tid"]][0] for e in spans)
    found = {(rows[e["tid"]][1], e["name"]): (e["ts"], e["dur"], e.get("args")) for e in spans}
    assert found["env-10", "step"] == (
        500_000.0,
        500_000.0,
        None,
    )  # microseconds since the first span
    assert found["weights to rollout-0", "fetch"] == (
        250_000.0,
        250_000.0,
        {"version": 0, "bytes": 8},
    )
    assert found["rollout-0", "infer"][2] == {"batch": 2} and found["actor-0", "train"][2] == {
        "slots": [0, 1],
        "epoch": 1,
    }


def test_a_trace_is_read_as_it_was_written(tmp_path):
    write_trace(tmp_path / "trace.json", SPANS)
    rows = read_trace(tmp_path)
    assert list(rows) == [
        "env-2",
        "env-10",
        "rollout-0",
        "weights to rollout-0",
        "actor-0",
        "gradients of actor-0",
    ]  # rollout-1 has no span
    assert rows["env-10"] == [("step", 0.5, 1.0, {}), ("wait: action", 1.0, 1.25, {})]
    assert rows["weights to rollout-0"] == [("fetch", 0.25, 0.5, {"version": 0, "bytes": 8})]


def recorded(folder, spans: dict) -> None:
    folder.mkdir()
    for name, row in spans.items():
        (folder / f"{name}.jsonl").write_text("\n" + json.dumps(row) + '\n[["torn", 1.0')


def test_a_trace_has_the_rows_of_every_node_on_one_clock(tmp_path):
    """The other nodes' clocks are of other machines: one is 500 s behind, one 500 s ahead."""
    recorded(tmp_path / "1", {"env-0": [["step", 1.0, 2.0]], "rollout-0": [["fetch", 1.5, 1.75]]})
    recorded(tmp_path / "10", {"env-0": [["step", 1001.5, 1002.5, {"batch": 3}]]})
    folder = RunFolder(tmp_path / "run", resume=False)
    mine = {"env-0": [["step", 501.5, 502.5]], "env-1": [["step", 500.0, 501.0]]}
    for name, row in mine.items():
        (folder.spans / f"{name}.jsonl").write_text(json.dumps(row))
    assert take_spans(folder.spans, 10, pack_spans(tmp_path / "10", 3), -500.0) == ""
    assert take_spans(folder.spans, 1, pack_spans(tmp_path / "1", 3), 500.0) == ""
    folder.clear(keep_trace=True)  # as before another ratio
    folder.finish()
    rows = read_trace(folder.path)
    assert list(rows) == [
        *("env-0", "env-1", "node 1 env-0", "node 10 env-0"),
        "node 1 weights to rollout-0",
    ]
    assert rows["env-0"] == [("step", 1.5, 2.5, {})]
    assert rows["node 1 env-0"] == [("step", 1.0, 2.0, {})]
    assert rows["node 10 env-0"] == [("step", 1.5, 2.5, {"batch": 3})]
    assert rows["node 1 weights to rollout-0"] == [("fetch", 1.5, 1.75, {})]
    assert place_of("node 10 weights to rollout-0") == (10, "weights to rollout-0")


def test_a_trace_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", resume=False)
    spans = json.dumps([["step", 1.0, 2.0]])
    (folder.spans / "env-0.jsonl").write_text(spans)

    def torn(rows):
        yield {"ph": "M"}
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(run_folder, "trace_events", torn)
        folder.finish()
    assert {path.name for path in folder.path.iterdir()} == {"checkpoints", ".spans"}
    assert (folder.spans / "env-0.jsonl").read_text() == spans
    folder.finish()  # there is room again
    assert read_trace(folder.path)["env-0"] == [("step", 0.0, 1.0, {})]


def test_two_programs_may_write_one_file_whole_at_once(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    replace = os.replace

    def meanwhile(*paths):
        monkeypatch.undo()
        if (child := os.fork()) == 0:
            files.write_whole(file, "theirs")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0 and file.read_text() == "theirs"
        replace(*paths)

    monkeypatch.setattr(os, "replace", meanwhile)
    files.write_whole(file, "ours")
    assert file.read_text() == "ours" and list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_removed_does_not_hide_why_a_file_is_not_whole(tmp_path, monkeypatch):
    """Folders, too; and nothing is left where it can be removed."""

    def write(folder: bool) -> None:
        with files.whole(tmp_path / "x") as unfinished:
            if folder:
                unfinished.mkdir()
            (unfinished / "y" if folder else unfinished).touch()
            raise OSError(errno.ENOSPC, "no space left")

    for folder in (True, False):
        with pytest.raises(OSError, match="no space left"):
            write(folder)
        assert not any(tmp_path.iterdir())

    def refused(*_, **__):
        raise OSError(errno.EROFS, "read-only file system")

    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, refused)
    for folder in (True, False):
        with pytest.raises(OSError, match="no space left"):
            write(folder)


def test_spans_travel_in_pieces_the_newest_first(tmp_path, monkeypatch):
    spans = {"env-0": [["step", i + 0.1, i + 0.9] for i in range(100)]}
    spans["actor-0"] = [["train", 90.0, 99.5], ["publish", 99.5, 99.6]]
    recorded(tmp_path / "node", spans)
    monkeypatch.setattr(run_folder, "PIECE", 100)
    monkeypatch.setattr(run_folder, "SENT", 22)
    pieces = pack_spans(tmp_path / "node", nodes=3)
    assert len(pieces) > 1 and max(map(len, pieces)) == 100
    (tmp_path / "first").mkdir()
    said = take_spans(tmp_path / "first", 2, pieces, 0.0)
    assert said == "trace.json lacks the 91 oldest spans of node 2"
    kept = read_spans(tmp_path / "first")
    assert kept["node 2 env-0"] == spans["env-0"][-9:]
    assert kept["node 2 actor-0"] == spans["actor-0"]
    assert pack_spans(tmp_path / "first" / "none", 2)  # a node that records nothing says so


def test_a_run_that_is_started_over_keeps_the_vocabulary_that_it_uses(tmp_path, monkeypatch):
    vocabulary = tmp_path / "tokenizer.model"
    for words in ("first", "second"):
        vocabulary.write_text(words)
        folder = RunFolder(tmp_path / "run", resume=False)
        folder.keep(vocabulary)
        os.close(folder.lock)
        kept = folder.path / vocabulary.name
        folder.keep(kept)  # as a resumed run does
        assert kept.read_text() == words

    def full(source, target):
        Path(target).write_text("thi")
        raise OSError("no space left")

    vocabulary.write_text("third")
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="no space"):
        folder.keep(vocabulary)
    assert kept.read_text() == "second"


def test_a_run_folder_from_begin_to_end(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "one", resume=False)
    for version in (1, 2, 3):
        folder.append(line(version))
    # Killed while it wrote: at a bracket, which must not look like the end. Its successor goes on
    # below.
    torn = '\n[["step",1.0,2.0],["step",2.0,2.5]]\n[["train",3.0,4.0,{"slots": [1, 2]'
    (folder.spans / "env-0.jsonl").write_text(torn + '\n[["step",4.0,4.5]]')
    (folder.spans / "rendezvous").write_bytes(b"left by actor workers that were killed")
    folder.finish()
    assert {p.name for p in folder.path.iterdir()} == {"checkpoints", "metrics.jsonl", "trace.json"}
    assert [span[:3] for span in read_trace(folder.path)["env-0"]] == [
        ("step", 0.0, 1.0),
        ("step", 1.0, 1.5),
        ("step", 3.0, 3.5),
    ]

    with pytest.raises(UserError, match="is being trained by another process: end that one first"):
        RunFolder(folder.path, resume=False)
    (folder.path / "checkpoints" / "000002").mkdir()
    with pytest.raises(
        UserError, match=f"exists: continue it with --resume {folder.path} or choose another --run"
    ):
        RunFolder(folder.path, resume=False)
    with pytest.raises(UserError, match="is being trained by another process: end that one first"):
        RunFolder(folder.path, resume=True)
    os.close(folder.lock)
    left = folder.path / ".trace.json.1234.partial"  # of a launcher that was killed
    left.touch()
    again = RunFolder(folder.path, resume=True)
    assert not left.exists()
    again.go_on_from(lines_until(folder.path, 2, []))
    assert (
        [one["version"] for one in again.lines()]
        == [1, 2]
        == [one["version"] for one in read_metrics(folder.path)]
    )
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"version": 3, "loss')  # not all of it is there yet
    assert [one["version"] for one in read_metrics(folder.path)] == [1, 2]
    again.finish()


def test_a_checkpoint_s_own_lines_replace_those_of_an_earlier_life(tmp_path):
    earlier = [LINE | {"version": n, "time": float(n)} for n in range(1, 8)]
    text = "".join(json.dumps(one) + "\n" for one in earlier)
    (tmp_path / "metrics.jsonl").write_text(text)
    saved = [LINE | {"version": n, "time": 10.0 * n} for n in range(4, 10)]
    assert lines_until(tmp_path, 9, saved) == earlier[:3] + saved
    assert lines_until(tmp_path, 7, earlier[2:]) == earlier


def test_a_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="choose another --run"):
            RunFolder(path, resume=False)


# ---------------------------------------------------------------- what a person is told


@pytest.mark.parametrize("interactive", [False, True])
def test_progress_shows_each_iteration(capsys, interactive):
    display = progress(7, interactive)
    with display.screen:
        display.say("all workers are ready")
        display.show(line(1, success_rate=None, approx_kl=None))
        display.show(line(2, eval_success_rate=0.75, eval_version=1))
    text = capsys.readouterr().out
    for words in ("2/7", "75.0% at 1", "25.0%", "reward 1.5", "KL 0.0125", "5 min left"):
        assert words in text, text
    if not interactive:
        assert text.startswith("all workers are ready\n") and "KL –" in text


def test_time_left_is_that_of_recent_iterations():
    display = progress(30, interactive=False)
    display.show(line(1, time=100.0))  # with start-up
    assert display.time_left() == "?"
    for i in range(2, 21):
        display.show(line(i, time=100.0 + (i if i < 11 else 10 * i)))
    assert display.time_left() == "2 min"
    display.show(line(30))
    assert display.time_left() == "0 s"


def test_something_is_said_before_the_first_iteration(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    table = counters()
    beginning = Beginning(table, batch=432)

    def at(seconds: float, collected: int) -> str:
        now[0] = 100.0 + seconds
        return beginning.news(collected)

    table.set(0, "ready", 1)
    assert at(1, 0) == at(9.9, 0) == ""
    assert at(10, 0) == "1 of 4 workers are ready after 10 s" and at(11, 0) == ""
    table.table[:, table.index["ready"]] = 1
    assert at(12, 0) == "all 4 workers are ready after 12 s: they collect the first batch"
    assert at(21.9, 10) == ""
    assert at(22, 96) == "first batch: 96 of 432 chunk steps are collected after 22 s"
    assert at(150, 500) == "first batch: all 432 chunk steps are collected; in training after 2 min"


def test_what_a_batch_is():
    config = Config()
    assert batch_line(config, 9) == (
        "48 trajectories = 432 chunk steps, 4 optimizer steps per batch"
    )
    config.actor.minibatch = 48
    config.actor.update_epochs = 1
    config.train.precision = "bfloat16"  # what GPUs choose by themselves
    assert "1 optimizer step per batch, computed in bfloat16" in batch_line(config, 9)


def test_another_node_says_once_where_to_look(capsys):
    display = progress(5, interactive=True, first="10.0.0.7")
    with display.screen:
        display.say("all 6 workers are ready after 2 s")
        for version in (1, 2, 3):
            display.show({"version": version})
    begun, where = capsys.readouterr().out.splitlines()
    assert begun.startswith("all 6 workers") and where.endswith(
        "progress, warnings of training, metrics and checkpoints are on the first node, 10.0.0.7"
    )


def test_nested_numbers_are_mirrored_by_their_path():
    nested = {
        "waits": {"env:action": 0.5},
        "staleness_hist": {"0": 3},
        "eval_per_task": {"push": 1.0},
        "tuning": {"ratio": "3:1", "batch_max": 8},
        "entropy_or_noise": None,
        "lr": 0.1,
        "batch_size_hist": {},
    }
    assert flatten(nested) == {
        "waits/env:action": 0.5,
        "staleness_hist/0": 3,
        "eval_per_task/push": 1.0,
        "tuning/batch_max": 8,
        "lr": 0.1,
    }


# ---------------------------------------------------------------- docs/metrics.md

PLACEHOLDERS = {
    "TASK": ("0",),
    "BUCKET": ("0", "1", "2", "3_or_more"),
    "SIZE": tuple(str(2**i) for i in range(len(HISTOGRAM))),
    "REASON": tuple(metrics.REASONS),
    "STAGE": metrics.STAGES,
    "CAUSE": metrics.CAUSES,
    "NODE": ("0", "1"),
}


def documented() -> dict[str, set[str]]:
    """The first column of every table, and the keys that each entry stands for."""
    rows = {}
    for entry in re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/metrics.md").read_text(), re.M):
        names = [name for name in PLACEHOLDERS if name in entry]
        rows[entry] = set()
        for values in itertools.product(*(PLACEHOLDERS[name] for name in names)):
            key = entry
            for name, value in zip(names, values, strict=True):
                key = key.replace(name, value)
            rows[entry].add(key)
    return rows


def paths(line: dict, above: str = "") -> set[str]:
    """Every key of a line, also those that are null; nested ones as docs/metrics.md writes them."""
    found = set()
    for name, value in line.items():
        found |= paths(value, f"{above}{name}/") if isinstance(value, dict) else {above + name}
    return found


def test_every_key_is_documented_and_every_documented_key_exists(cli, tmp_path):
    """Of real runs by PPO and GRPO, with evaluation, on the emulated simulator and model."""
    flags = (
        "--model emulated --env emulated --tasks 0 --image-size 8 --envs 4 --batch 8 --minibatch 4 "
        "--iterations 2 --eval-envs 1 --eval-episodes 2 --eval-every 1 --actor-workers 2"
    )
    written = set()
    for algorithm in ("ppo", "grpo --group-size 2"):
        run = tmp_path / algorithm[:4].strip()
        status, output = cli("train.py", f"{flags} --run {run} --algorithm {algorithm}").finish(150)
        assert status == 0, output
        assert "8 trajectories = 64 chunk steps, 4 optimizer steps per batch\n" in output
        assert "workers are ready after" in output
        lines = read_metrics(run)
        assert len(lines) == 2 and all("eval_version" in line for line in lines[1:])
        written |= set().union(*map(paths, lines))
    rows = {entry: keys for entry, keys in documented().items() if "NODE" not in entry}
    assert written - set().union(*rows.values()) == set()

    # What is chosen automatically needs longer runs.
    source = (ROOT / "tuning.py").read_text()
    for name in ("batch_max", "batch_wait_ms", "ratio"):
        assert f'"{name}"' in source
        written.add(f"tuning/{name}")
    assert [entry for entry, keys in rows.items() if not keys & written] == []
