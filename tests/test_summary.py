"""What a run's folder is summarised to, which advice follows from which numbers, and the
pictures.
"""

import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from matplotlib import image

import pictures
import summary
from config import ROOT, Config, from_preset, to_json
from errors import UserError
from metrics import CAUSES
from run_folder import place_of, read_metrics, read_trace, write_trace
from summary import Summary, advice, summarise


def line(iteration: int, **more) -> dict:
    return {
        "iteration": iteration,
        "version": iteration,
        "time": 60.0 * iteration,
        "success_rate": 0.25,
        "env_steps_per_s": 100.0,
        "samples_per_s": 10.0,
        "waits": {"env:action": 0.1, "env:admission": 0.3, "rollout:request": 0.2},
        "gpu_memory_gb": 0.0,
        "batch_size_hist": {"4": 3, "1": 1},
        "staleness_hist": {"0": 30, "1": 10},
        "cpu_fraction": 0.5,
        "collected": 40 * iteration,
        "discarded": 2,
        "restarts": 1,
        "discarded_by": {"restart": 2, "filtered": 0},
        "env_steps": 6000 * iteration,
        "trained_once": 600 * iteration,
    } | more


SPANS = {
    "env-0": [
        ["step", 0.0, 2.0],
        ["wait: action", 2.0, 3.0],
        ["render", 3.0, 3.5],
        ["reset", 3.5, 4.0],
    ],
    "rollout-0": [
        ["infer", 0.5, 1.5, {"batch": 4, "version": 0}],
        ["fetch", 1.1, 1.2, {"version": 1, "bytes": 8}],
        ["wait: request", 1.5, 3.0],
    ],
    "actor-0": [
        ["wait: trajectory", 0.0, 1.0],
        ["publish", 1.0, 1.1, {"version": 1, "bytes": 8}],
        ["train", 1.1, 3.0],
        ["train", 3.0, 3.9],
    ],
}


def a_run(folder, lines: list[dict], config: Config | None = None, spans: dict | None = SPANS):
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config or full()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if spans is not None:
        write_trace(folder / "trace.json", spans)
    return folder


def full() -> Config:
    config = from_preset("full")
    config.env.env_workers = 3
    config.rollout.rollout_workers = 1
    config.actor.actor_workers = 1
    return config


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "metrics", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---------------------------------------------------------------- the numbers


def test_of_a_run_whose_last_line_was_made_up_for_the_first_one_counts():
    measured = line(1, env_steps_per_s=5.0, waits={"env:action": 0.25})
    made_up = {name: x for name, x in line(2, time=70.0).items() if name != "waits"}
    found = summarise([measured, made_up], {})
    assert found.waits["env"] == {"action": 0.25} and found.iterations == 2
    with pytest.raises(UserError, match="nothing was measured: its launcher was killed"):
        summarise([made_up], {})


def test_iterations_count_by_their_time_and_the_first_not_at_all():
    lines = [
        line(
            1,
            env_steps_per_s=1.0,
            batch_size_hist={"256": 99},
            staleness_hist={"3_or_more": 99},
            waits={"actor:gradient": 1.0},
        ),
        line(
            2, time=70.0, env_steps=10_000, trained_once=1000, cpu_fraction=1.0, success_rate=None
        ),  # 10 s
        # 30 s, of which workers that started again measured only those since they were ready
        line(
            3,
            time=100.0,
            env_steps=13_000,
            trained_once=1300,
            waits={"env:action": 0.5},
            eval_success_rate=0.5,
            success_rate=0.75,
        ),
    ]
    found = summarise(lines, {})
    assert (found.env_steps_per_s, found.samples_per_s, found.cpu) == (175.0, 17.5, 0.625)
    assert found.waits["env"] == {"action": pytest.approx(0.4), "admission": pytest.approx(0.075)}
    assert found.waits["rollout"] == {"request": pytest.approx(0.05)} and found.waits["actor"] == {}
    assert found.bubble == {
        "env": pytest.approx(0.475),
        "rollout": pytest.approx(0.05),
        "actor": 0.0,
    }
    assert found.critical == "actor" and found.busy_with == {}
    assert found.batch_sizes == {"4": 6, "1": 2} and found.staleness == {"0": 60, "1": 20}
    assert found.success == [0.25, 0.75] and found.held_out == [0.5, 0.5] and found.iterations == 3
    assert (found.totals["collected"], found.totals["discarded"], found.totals["restarts"]) == (
        120,
        2,
        1,
    ) and not found.gpu
    alone = summarise([line(1, success_rate=None)], {})
    assert alone.env_steps_per_s == 100.0 and alone.success == [] == alone.held_out


def test_the_trace_tells_what_the_critical_stage_does(tmp_path):
    run = a_run(
        tmp_path / "x",
        [
            line(1),
            line(2, waits={"env:action": 0.5, "actor:trajectory": 0.2, "rollout:request": 0.6}),
        ],
    )
    found = summarise(read_metrics(run), read_trace(run))
    assert found.critical == "actor" and list(found.busy_with) == ["train", "publish"]
    assert found.busy_with["train"] == pytest.approx(0.8 * 2.8 / 2.9) and sum(
        found.busy_with.values()
    ) == pytest.approx(0.8)


def of_node(gradient: float, trajectory: float, **more) -> dict:
    """A node's figures, whose actors wait so much."""
    return {
        "env_steps_per_s": 50.0,
        "bubble_env": 0.3,
        "bubble_rollout": 0.5,
        "bubble_actor": gradient + trajectory,
        "wait_gradient": gradient,
        "restarts": 1,
        "cpu_fraction": 0.5,
        "rss_gb": 2.0,
        "gpu_memory_gb": 0.0,
    } | more


def test_each_node_s_figures_are_means_over_the_time_that_it_was_there():
    lines = [
        line(1),
        line(2, time=70.0, nodes={"0": of_node(0.8, 0.0)}),  # 10 s
        line(3, time=100.0, nodes={"0": of_node(0.4, 0.0), "1": of_node(0.1, 0.3)}),  # 30 s
    ]
    nodes = summarise(lines, {}).nodes
    assert list(nodes) == ["1", "0"]  # the one that is waited for first
    assert nodes["0"]["wait_gradient"] == pytest.approx(0.5) and nodes["0"]["restarts"] == 2
    assert nodes["1"]["wait_gradient"] == 0.1 and nodes["1"]["restarts"] == 1
    assert summarise([*lines, line(4)], {}).nodes == {}  # it went on alone


@pytest.mark.parametrize(
    "nodes, words",
    [
        ({"2": of_node(0.3, 0.0), "0": of_node(0.3, 0.1), "1": of_node(0.35, 0.1)}, None),
        (
            {"2": of_node(0.1, 0.4), "0": of_node(0.5, 0.0), "1": of_node(0.4, 0.0)},
            "Node 2 is slow, so actors of others wait 45% for gradients: compare its env workers, "
            "which wait only 30%, with those of others.",
        ),
        (
            {"1": of_node(0.0, 0.4, bubble_rollout=0.2), "0": of_node(0.5, 0.0)},
            "Node 1 is slow, .*: compare its rollout workers, which wait only 20%, with",
        ),
        (
            {"1": of_node(0.02, 0.05), "0": of_node(0.5, 0.0)},
            "Node 1 is slow, .*: compare its actors, which wait only 7%, with",
        ),
    ],
)
def test_the_summary_names_a_slow_node(nodes, words):
    said = advice(of(*ACTOR_BOUND, nodes=nodes), full())
    if words is None:
        assert said == advice(of(*ACTOR_BOUND), full())
    else:
        assert re.fullmatch(f"{words}.*", said), said
        assert said.count(". ") == 0 and said.endswith(".")


def test_of_many_nodes_the_table_lists_those_that_are_waited_for(capsys):
    nodes = {str(n): of_node(0.01 * n, 0.1, env_steps_per_s=100.0 + n) for n in range(20)}
    summary.Console(width=110).print(summary.table_of(nodes))
    titles, *rows, more = capsys.readouterr().out.splitlines()
    assert len(rows) == summary.LISTED and "rollout busy  actor busy  wait: gradient" in titles
    assert rows[7].split() == ["7", "107", "70%", "50%", "83%", "7%", "50%", "2.0", "GB", "1"]
    assert more.strip() == "12 more nodes, whose actors wait longer"


# ---------------------------------------------------------------- the advice


def of(env: dict, rollout: dict, actor: dict, **more) -> Summary:
    waits = {"env": env, "rollout": rollout, "actor": actor}
    return Summary(
        **{
            "iterations": 9,
            "minutes": 1.0,
            "env_steps_per_s": 1.0,
            "samples_per_s": 1.0,
            "waits": waits,
            "busy_with": {},
            "batch_sizes": Counter(),
            "staleness": Counter(),
            "success": [],
            "held_out": [],
            "totals": {},
            "cpu": 0.5,
            "gpu": False,
            "nodes": {},
        }
        | more
    )


ENV_BOUND = {"action": 0.01}, {"request": 0.3}, {"trajectory": 0.5}
ROLLOUT_BOUND = {"action": 0.4}, {"request": 0.02}, {"trajectory": 0.3}
ACTOR_BOUND = {"admission": 0.4}, {"request": 0.3}, {"trajectory": 0.02}


@pytest.mark.parametrize(
    "waits, changes, more, words",
    [
        (
            ({"action": 0.1}, {"request": 0.1}, {"trajectory": 0.14}),
            {},
            {},
            "balanced, for none waits more than 14%",
        ),
        (
            ACTOR_BOUND,
            {"max_staleness": 0},
            {},
            "take turns .* env workers wait 40% .* --preset full",
        ),
        (
            ROLLOUT_BOUND,
            {"batch_max": "all"},
            {},
            "wait 40% for actions, .* slowest lane: give --batch-max auto",
        ),
        (ENV_BOUND, {"stream": False}, {}, "Actors wait 50% for whole batches: --stream"),
        (ROLLOUT_BOUND, {}, {"cpu": 0.97}, "cores are the limit .97% busy"),
        (
            ACTOR_BOUND,
            {},
            {},
            "Actors never rest while env workers wait 40% .* version: give training more with "
            "--ratio 2:1",
        ),
        (ACTOR_BOUND, {"ratio": "1:1"}, {}, "--ratio 1:2"),
        (ACTOR_BOUND, {"placement": "colocated"}, {"gpu": True}, "--placement disaggregated"),
        (
            ROLLOUT_BOUND,
            {},
            {},
            "Rollout workers never rest while env workers wait 40% .* for actions: give "
            "--rollout-workers 2",
        ),
        (
            ROLLOUT_BOUND,
            {},
            {"gpu": True, "cpu": 0.97},
            "try --placement colocated, where every GPU does both",
        ),
        (ROLLOUT_BOUND, {"ratio": "3:2"}, {"gpu": True}, "--ratio 4:1"),
        (ACTOR_BOUND, {"ratio": "3:1"}, {"gpu": True}, "--ratio 2:2"),
        (
            ACTOR_BOUND,
            {"ratio": "1:3"},
            {"gpu": True},
            "try --placement colocated, where every GPU does both",
        ),
        (
            ENV_BOUND,
            {},
            {},
            "Env workers never rest while actors wait 50% .* for trajectories: give --env-workers "
            "4",
        ),
        (ENV_BOUND, {"envs": 3}, {}, "give more --envs, and more"),
        (
            ENV_BOUND,
            {"lanes": 2, "env_workers": 4},
            {},
            "--env-workers 6",
        ),  # 24 envs do not divide into 5 × 2 lanes
        (
            ({"action": 0.1}, {"request": 0.3}, {"trajectory": 0.5}),
            {},
            {},
            "Env workers wait only 10% .* while actors",
        ),
        (
            ({"admission": 0.3}, {"request": 0.5}, {"trajectory": 0.3}),
            {},
            {},
            "No stage is busy more than 70%.* --max-staleness 2",
        ),
        (
            ({"action": 0.3}, {"request": 0.5}, {"trajectory": 0.3}),
            {},
            {},
            "overlap with --envs 48 --batch 96",
        ),
    ],
)
def test_advice_follows_from_the_numbers(waits, changes, more, words):
    config = full()
    for name, value in changes.items():
        stage = next(
            stage
            for stage in (config.train, config.env, config.rollout, config.actor)
            if hasattr(stage, name)
        )
        setattr(stage, name, value)
    said = advice(of(*waits, **more), config)
    assert re.search(words, said), said
    assert said.count(". ") == 0 and said.endswith(".")  # one sentence


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_summary_and_draws(tmp_path):
    nodes = {"0": of_node(0.5, 0.0), "1": of_node(0.1, 0.4)}
    lines = [line(1), line(2, eval_success_rate=0.5), line(3, success_rate=1.0, nodes=nodes)]
    run = a_run(tmp_path / "x", lines)
    done = command(run)
    assert done.returncode == 0, done.stderr
    for words in (
        "3 iterations in 3.0 min; pi05 on metaworld, preset full, ratio 3:1",
        "100 env steps/s, 10.0 chunk steps trained/s",
        "in training 25% to 100%; on held-out seeds 50%\n",
        "1 restarts, 2 of 120 chunk steps discarded (2 lost with a worker)",
        "admission 30%, action 10%",
        "critical: train 97%",
        "3 to 4",
        "75%",
        "wait: gradient",
        "advice: Node 1 is slow, so actors of others wait 50% for gradients",
    ):
        assert words in done.stdout, done.stdout
    for picture in ("swimlane.png", "curve.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path / "config.json").touch()
    empty = tmp_path / "empty"
    other = tmp_path / "other"
    a_run(empty, [])
    a_run(other, [{"iteration": 1}])
    assert "python -m metrics NAME" in command("--help").stdout
    torn = a_run(tmp_path / "torn", [line(1), line(2)])
    (torn / "trace.json").write_text('{"traceEvents": [')
    for args, words in (
        ((), "give one run"),
        ((tmp_path,), "holds no metrics.jsonl"),
        (("no-such-run",), "runs/no-such-run: runs/ holds"),
        ((empty,), "metrics.jsonl is empty"),
        ((other,), "of another kind or version"),
        ((torn,), "trace.json: "),
    ):
        failed = command(*args)
        assert (
            failed.returncode != 0 and words in failed.stderr and "Traceback" not in failed.stderr
        ), failed.stderr
        assert (
            failed.stderr.startswith("error: ")
            and failed.stderr.count("\n") == 1
            and not failed.stdout
        )


# ---------------------------------------------------------------- the pictures


def test_every_wait_and_every_kind_of_work_has_a_colour():
    assert set(pictures.WAITS) == set(summary.FOR) == set(CAUSES)
    recorded = {
        "step",
        "render",
        "reset",
        "infer",
        "fetch",
        "train",
        "optimizer",
        "publish",
        "checkpoint",
        "reduce",
    }
    assert set(pictures.WORK) == recorded


def test_the_window_lies_around_a_publication_after_the_middle(tmp_path):
    spans = {
        "rollout-0": [("infer", 0.1 * i, 0.1 * i + 0.05, {}) for i in range(1000)],
        "actor-0": [("publish", at, at + 0.1, {}) for at in (10.0, 58.0, 70.0)],
    }
    assert pictures.window(spans) == (
        pytest.approx(57.0),
        pytest.approx(59.0),
    )  # 40 inferences of 0.05 s
    short = {"rollout-0": [("infer", 1.0, 1.25, {})]}
    assert pictures.window(short) == (1.0, 1.25)


def nodes_spans(nodes: int, workers: int) -> dict[str, list]:
    """Of nodes with so many env workers and an actor each; the last but one waits for nobody, and
    the others the less, the higher their number."""
    spans = {}
    for node in range(nodes):
        prefix = f"node {node} " * (node > 0)
        for worker in range(workers):
            spans[f"{prefix}env-{worker}"] = [("step", 0.0, 10.0, {})]
        wait = 0.0 if node == nodes - 2 else 5.0 - 0.1 * node
        begun = 10.0 - wait
        row = [("train", 0.0, begun, {}), ("wait: gradient", begun, 10.0, {})]
        spans[f"{prefix}actor-0"] = row
    return spans


def test_of_many_nodes_the_swimlane_draws_the_first_and_the_slowest():
    everything = nodes_spans(nodes=2, workers=4)
    assert pictures.shown(everything, 0.0, 10.0) == ([0, 1], "")
    assert pictures.shown(nodes_spans(1, 60), 0.0, 10.0) == ([0], "")
    drawn, left_out = pictures.shown(nodes_spans(nodes=8, workers=30), 0.0, 10.0)
    assert drawn == [0, 6]
    assert left_out == (
        "\nnode 0, and of 7 others those that wait least for gradients: 6; trace.json has all"
    )
    drawn, left_out = pictures.shown(nodes_spans(nodes=8, workers=9), 0.0, 10.0)
    assert drawn == [0, 6, 7, 5] and "gradients: 6, 7, 5;" in left_out
    # The window counts: there node 1 is the one that does not wait.
    late = nodes_spans(3, 30) | {"node 2 actor-0": [("wait: gradient", 3.0, 9.0, {})]}
    assert pictures.shown(late, 8.0, 9.0)[0] == [0, 1]


def test_the_swimlane_of_many_nodes_is_drawn_in_order(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_bars", lambda axes, row, *_: drawn.append(row))
    spans = nodes_spans(4, 20)
    spans["node 3 rollout-0"] = [("fetch", 0.0, 1.0, {})]
    write_trace(tmp_path / "trace.json", spans)
    pictures.draw(tmp_path)
    assert (tmp_path / "swimlane.png").is_file() and len(drawn) == 42
    rows = read_trace(tmp_path)
    names = [name for name in rows if place_of(name)[0] in (0, 2)]
    assert [row[0] for row in drawn[:-2]] == [rows[name][0] for name in names[:-2]]
    assert names[-2:] == ["actor-0", "node 2 actor-0"]


def test_the_window_lies_where_every_node_has_spans():
    spans = {"rollout-0": [("infer", 0.1 * i, 0.1 * i + 0.05, {}) for i in range(1000)]}
    spans["actor-0"] = [("publish", 58.0, 58.1, {})]
    spans["node 1 env-0"] = [("step", 90.0, 99.0, {})]
    assert pictures.window(spans) == (pytest.approx(90.0), pytest.approx(92.0))


def test_the_swimlane_shows_what_each_row_did(tmp_path):
    run = a_run(tmp_path / "x", [line(1)])
    pictures.draw(run)
    pixels = (image.imread(run / "swimlane.png")[:, :, :3] * 255).round().astype(int)
    for what in ("step", "render", "reset", "infer", "fetch", "train"):
        colour = [int(pictures.WORK[what][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - colour).max(-1) <= 1).sum() > 100, what
