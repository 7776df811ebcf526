"""`bench.py` on the small models and a CPU: that it runs, counts what it says and refuses what it
cannot do.
"""

import json
import os
import sys

import pytest
import torch
import tyro

import bench
import config
import metrics
import models
import train
from benchmarks import (
    inference,
    ladder,
    machinery,
    measuring,
    prefix,
    tracing,
    transport,
    tuning,
)
from benchmarks.emulated import libero, maniskill
from benchmarks.plan_against_paper import TABLE_1, emulated_node
from channel import layout
from envs import Step
from errors import UserError
from planning.events import simulate


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measuring, "MATMUL", {"cpu": 128})
    monkeypatch.setattr(inference, "BATCHES", (1, 2))
    monkeypatch.setattr(prefix, "SAMPLES", 2)
    monkeypatch.setattr(prefix, "POOL_BYTES", 0)


def test_counters():
    a = torch.randn(8, 16)
    b = torch.randn(16, 4)
    q = torch.randn(1, 2, 8, 4)
    assert measuring.flops_of(lambda: a @ b) == 2 * 8 * 16 * 4

    def attention():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert measuring.flops_of(attention) == 2 * 2 * 2 * 8 * 8 * 4

    def two_of_three():
        x = torch.zeros(100) + 1.0  # the zeros are gone when `+` is done
        return (x.view(10, 10) * 2.0).sum().item()

    assert measuring.peak_bytes_of(two_of_three, "cpu") == 2 * 400 + 4


def test_transport_measures_how_slots_get_their_memory(monkeypatch):
    monkeypatch.setattr(transport, "POOL", 2**22)
    found = transport.memory_rates()
    assert len(found) == 4 and min(found.values()) > 0


@pytest.mark.parametrize("model", ["pi05", "gr00t"])
def test_prefix(model, capsys):
    cached, recomputed = prefix.measure(model, "auto", 0.01)
    assert cached["slot_kb_per_sample"] > recomputed["slot_kb_per_sample"]
    assert cached["gflop_per_sample"] < recomputed["gflop_per_sample"]
    assert cached["s_per_sample"] == cached["read_s_per_sample"] + cached["train_s_per_sample"]
    assert (
        min(
            cached["peak_mb"],
            recomputed["peak_mb"],
            cached["copy_gb_per_s"],
            cached["prefix_gflop_per_s"],
        )
        > 0
    )
    assert "Recomputing is better where" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["pi0", "gr00t", "oft"])
def test_inference(model, tmp_path):
    file = tmp_path / "result.json"
    bench.main(
        bench.BenchConfig(what="inference", model=model, size="small", seconds=0.01, json=file)
    )
    result = json.loads(file.read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 2] and result["what"] == "inference"
    for row in result["rows"]:
        assert row["mode"] == "eager" and row["samples_per_s"] > 0 and row["share_of_peak"] > 0
        assert (row["denoise_step_s"] is None) == (model == "oft")


# ---------------------------------------------------------------- the ladder


@pytest.mark.parametrize(
    "setting, tolerance", [("emulated", 0.02), ("gr00t", 0.02), ("vectorised", 0.1)]
)
def test_the_emulated_settings_are_the_paper_s_columns(setting, tolerance):
    """In virtual time, the sleeps give the rows that they are derived from; ManiSkill's do not fit
    one another better."""
    column = ladder.COLUMNS[setting]
    fewer = {"vectorised": 256}.get(
        setting, 64
    ) / column.costs.ENVS  # envs of the paper for each one here
    for preset in ("sync-colocated", "sync-disaggregated", "train-async"):
        found = simulate(*emulated_node(preset, "1:1", setting), iterations=30).env_steps_per_s
        assert found * column.costs.SCALE * fewer == pytest.approx(
            column.paper[preset], rel=tolerance
        )


def test_splitting_into_single_envs_costs_what_it_costs_the_paper():
    v = maniskill
    rate = 81_920 / (64 * v.SPLIT / v.SCALE)  # env steps/s of the paper's 64 rounds
    assert rate == pytest.approx(ladder.COLUMNS["vectorised"].paper[ladder.SINGLE_ENVS])
    assert pytest.approx(v.SPLIT) == 64 * (v.FIXED + v.EACH)
    # Two lanes per GPU lose less than the inference that they hide; the actor then is the slowest
    # stage.
    assert 2 * v.FIXED + 64 * v.EACH < v.ROUND
    assert ladder.emulated_bound("vectorised", "1:1", "full") == pytest.approx(
        256 * 5 / v.TRAIN_ALL
    )


@pytest.mark.parametrize("ratio", ladder.RATIOS)
@pytest.mark.parametrize("setting", ladder.COLUMNS)
def test_no_row_of_the_event_model_exceeds_its_bound_and_none_is_ahead_of_full(setting, ratio):
    found = {
        p: simulate(*emulated_node(p, ratio, setting), iterations=12).env_steps_per_s
        for p in TABLE_1
    }
    for preset, rate in found.items():
        assert (
            rate <= ladder.emulated_bound(setting, ratio, preset) * 1.02
        )  # chunks are random, and so few of them quick ones
    assert found["full"] > 1.3 * found["sync-disaggregated"]
    assert found["full"] >= 0.97 * max(found["rollout-async"], found["train-async"])


def test_bounds():
    bounds = {ratio: ladder.emulated_bounds("emulated", ratio, "full") for ratio in ladder.RATIOS}
    chunk = 2 * libero.MEAN  # seconds of a worker for its two lanes, at every ratio
    assert [b["env"] * chunk for b in bounds.values()] == pytest.approx([32 * 10, 42 * 10, 48 * 10])
    assert bounds["3:1"]["actor"] == pytest.approx(bounds["1:1"]["actor"] / 2)
    assert [min(b, key=b.get) for b in bounds.values()] == ["env", "actor", "actor"]
    assert all(
        min(b := ladder.emulated_bounds("gr00t", r, "full"), key=b.get) == "env"
        for r in ladder.RATIOS
    )
    # Colocated takes turns, on all devices in turn, whatever the ratio.
    alone = ladder.emulated_bounds("emulated", "1:1", "sync-colocated")
    assert ladder.emulated_bound("emulated", "3:1", "sync-colocated") == pytest.approx(
        1 / (1 / alone["env"] + 1 / alone["actor"])
    )
    assert ladder.real_bound(1000.0, 4.0) == pytest.approx(250.0 * len(os.sched_getaffinity(0)))


def test_a_pipeline_that_fills_does_not_count_as_faster():
    """At 3:1 the actor bounds π0.5: what simulators collect beyond its pace, until admission stops
    them, is in no row."""
    batch = 48 * 2 * 8 * 10
    seconds = batch / ladder.emulated_bound("emulated", "3:1", "full")
    lines = [{"env_steps": (1.5 * n + 1) * batch, "time": n * seconds} for n in range(1, 6)]
    steps = ladder.steady("emulated", "3:1", "full", lines)
    assert ladder.warmup("full") == 2 and steps == 3 * batch
    assert steps / (lines[-1]["time"] - lines[1]["time"]) == pytest.approx(
        ladder.emulated_bound("emulated", "3:1", "full")
    )
    # Where simulators are the bound, and in a real setting, steps count where they are made.
    for setting, ratio in (("gr00t", "3:1"), ("emulated", "1:1"), ("embedded", "3:1")):
        assert ladder.steady(setting, ratio, "full", lines) == 3 * 1.5 * batch


@pytest.mark.parametrize("ratio", ladder.RATIOS)
@pytest.mark.parametrize("setting", ladder.COLUMNS)
def test_what_the_ladder_runs_is_valid(setting, ratio):
    for preset in (
        "sync-colocated",
        "full",
        *([ladder.SINGLE_ENVS] if (setting, ratio) == ("vectorised", "1:1") else []),
    ):
        settings = train.prepare(train.parse(ladder.flags(setting, preset, ratio))).config
        workers, envs = libero.sizes(ladder.COLUMNS[setting].costs, ratio, settings.train.placement)
        assert (settings.env.env_workers, settings.env.envs) == (workers, envs)
        assert settings.env.segment == ladder.COLUMNS[setting].costs.EPISODE
        node = emulated_node(preset.partition(",")[0], ratio, setting)[0]
        actor = settings.actor
        assert (actor.batch, actor.minibatch, actor.micro_batch) == (
            node.batch,
            node.minibatch,
            node.micro_batch * settings.env.segment,
        )
        assert preset == ladder.SINGLE_ENVS or settings.env.envs // settings.env.width == node.lanes


def test_the_emulated_weights_take_their_way_through_the_plane():
    settings = train.prepare(train.parse(["--model", "emulated", "--env", "emulated_gr00t"]))
    moved = layout(settings.weights, 1)[1]
    assert moved == pytest.approx(libero.SYNC / 2 * libero.COPIES, rel=0.01)
    assert (
        pytest.approx(0.8 / 24 / 10) == libero.SYNC
    )  # a 24th of the paper's training step, ten times as fast


def row_of(preset, ratio, rate, base, bound, of_paper=None):
    waits = {f"bubble_{stage}": 0.25 for stage in metrics.STAGES}
    row = {
        "setting": "gr00t",
        "ratio": ratio,
        "preset": preset,
        "env_steps_per_s": rate,
        "bound_env_steps_per_s": bound,
    }
    row |= {"share_of_bound": rate / bound, "paper_ratio_to_sync_disaggregated": of_paper}
    return row | waits | {"ratio_to_sync_disaggregated": rate / base}


def test_the_verdict_says_which_targets_are_met():
    rows = [
        row_of("sync-colocated", "1:1", 900, 500, 2000, 1.7),
        row_of("sync-disaggregated", "1:1", 500, 500, 1000, 1.0),
        row_of("full", "1:1", 960, 500, 1000, 1.9),
        row_of("sync-colocated", "3:1", 900, 400, 2000),
        row_of("sync-disaggregated", "3:1", 400, 400, 800),
        row_of("full", "3:1", 790, 400, 800),
    ]
    ahead, ratio, bound, behind = ladder.verdict(rows)
    assert ahead.startswith("met:") and "sync-colocated, 900" in ahead
    assert ratio.startswith("met:") and "1.92 at 1:1, the paper's 1.90" in ratio
    assert (
        bound.startswith("not met:") and "96.0% of the bound (1000) at the best ratio, 1:1" in bound
    )
    assert "at 3:1 full (790) is behind sync-colocated (900); its bound is 800" in behind
    text = ladder.report(rows)
    assert (
        text.count("sync-colocated | all") == 1
        and "| full | 1:1 | 960 | 1.92 | 1.90 | 96.0% | 25% / 25% / 25% |" in text
    )
    rows[2] |= {
        "env_steps_per_s": 1010.0,
        "share_of_bound": 1.01,
        "ratio_to_sync_disaggregated": 1.8,
    }
    assert [line.startswith("met:") for line in ladder.verdict(rows)[:3]] == [True, False, True]
    assert "above the bound: 1:1 full" in ladder.verdict(rows)[-1]


def test_rows_of_a_run(monkeypatch, capsys):
    """From metrics lines to rows and what is told of them; the run itself is given."""
    settings = config.Config()
    settings.env.env_workers = 3
    settings.rollout.rollout_workers = 1
    settings.actor.actor_workers = 1

    def given(setting, preset, ratio, iterations, trace):
        bubbles = {"bubble_env": 0.5, "bubble_rollout": 0.0, "bubble_actor": 0.25}
        others = {"batch_size_mean": 2.0, "weight_sync_s": 0.001, "weight_stall_s": 0.0}
        lines = [
            {"env_steps": 480.0 * n, "time": 1.0 + 2.0 * n} | bubbles | others
            for n in range(1, iterations + 1)
        ]
        return lines, {n: 3.0 * n for n in range(iterations + 1)}, settings

    monkeypatch.setattr(ladder, "run_preset", given)
    rows = ladder.measure("libero", "", 2)
    assert [row["preset"] for row in rows] == list(TABLE_1) and {row["ratio"] for row in rows} == {
        "3:1"
    }
    full = rows[-1]
    sync = rows[1]
    assert full["env_steps_per_s"] == 240.0 and full["share_of_bound"] == pytest.approx(
        1.5 / len(os.sched_getaffinity(0))
    )
    assert full["working"] == pytest.approx(3 * 0.5 + 1 + 0.75) and full["rollout_s"] is None
    assert (sync["rollout_s"], sync["actor_s"]) == (0.5, 1.5)
    assert "full: 3.2 workers work at the same time" in ladder.report(rows)

    runs = len(capsys.readouterr().out.splitlines())
    rows = ladder.measure("columns", "", 2)
    assert len(rows) == 3 * 3 * 5 + 1  # colocated once for each column, single envs at 1:1 only
    assert len(capsys.readouterr().out.splitlines()) == len(rows) - 6 and runs == 5
    assert {tuple(row) for row in rows} == {tuple(full)}


@pytest.mark.parametrize("setting", ladder.HEADLINES)
def test_the_headlines_can_be_beaten_and_their_bounds_are_what_the_paper_s_gain_says(setting):
    """In virtual time: a device that never rests is as many times as fast as its synchronous
    baseline as the calibration assumes, and everything asynchronous gains more than the paper's."""
    headline = ladder.HEADLINES[setting]
    sync, ours = (
        simulate(
            *emulated_node(preset, headline.rows.ratio, setting), iterations=30
        ).env_steps_per_s
        for preset in headline.rows[:2]
    )
    bound = ladder.emulated_bound(setting, headline.rows.ratio, headline.rows.asynchronous)
    costs = headline.costs
    # The fixed times of four lanes instead of one are in the bound.
    assert bound / sync == pytest.approx(costs.GAIN / costs.REACHED, rel=0.02)
    assert headline.rows.paper == costs.GAIN
    assert costs.GAIN * sync < ours <= bound * 1.001


@pytest.mark.parametrize("setting", ladder.HEADLINES)
def test_what_the_headlines_run_is_valid(setting):
    headline = ladder.HEADLINES[setting]
    for preset in headline.rows[:2]:
        flags = ladder.flags(setting, preset, headline.rows.ratio)
        settings = train.prepare(train.parse(flags)).config
        node, _ = emulated_node(preset, headline.rows.ratio, setting)
        actor = settings.actor
        assert (actor.batch, actor.minibatch, actor.micro_batch, actor.update_epochs) == (
            node.batch,
            node.minibatch,
            node.micro_batch * settings.env.segment,
            node.update_epochs,
        )
        assert settings.env.envs // settings.env.width == node.lanes
        workers = (settings.env.env_workers, actor.actor_workers, actor.max_staleness)
        there = (len(node.env_devices), len(node.actor_devices), node.max_staleness)
        assert workers == there and settings.train.placement == ladder.settings_of(preset)[0]


def test_rows_of_a_headline(monkeypatch):
    def given(setting, preset, ratio, iterations, trace):
        pace = 2.0 if preset == "sync-colocated" else 1.0
        bubbles = {f"bubble_{stage}": 0.5 for stage in metrics.STAGES}
        others = {"batch_size_mean": 2.0, "weight_sync_s": 0.001, "weight_stall_s": 0.0}
        lines = [
            {"env_steps": 480.0 * n, "time": 1.0 + pace * n} | bubbles | others
            for n in range(1, iterations + 1)
        ]
        return lines, {n: 3.0 * n for n in range(iterations + 1)}, config.Config()

    monkeypatch.setattr(ladder, "run_preset", given)
    rows = ladder.measure("metaworld_colocated", "", 3)
    assert [row["gain"] for row in rows] == [0.0, 1.0]
    assert rows[1]["paper_gain"] == pytest.approx(0.852)
    assert set(rows[0]) == set(ladder.measure("emulated", "1:1", 1)[0])
    assert "met:     full-colocated gains 100.0%, the paper's 85.2%" in ladder.report(rows)
    with pytest.raises(UserError, match="has ratios of its own: leave out --ratio"):
        ladder.measure("maniskill_hybrid", "3:1", 1)


def test_refusals():
    with pytest.raises(UserError, match="--size full needs a GPU"):
        inference.measure("oft", "full", 0.01)
    with pytest.raises(UserError, match="--size full needs a GPU"):
        prefix.measure("pi05", "full", 0.01)
    with pytest.raises(UserError, match="oft has no prefix"):
        prefix.measure("oft", "auto", 0.01)


def test_a_simulator_is_chosen_on_the_command_line():
    for args in ("envs --env metaworld", "envs --env libero", "ladder --env vectorised"):
        assert tyro.cli(bench.BenchConfig, args=args.split()).env == args.split()[-1]
    assert tyro.cli(bench.BenchConfig, args=["envs"]).env == "all"
    for setting in ladder.SETTINGS:
        assert tyro.cli(bench.BenchConfig, args=["ladder", "--setting", setting]).setting == setting
    with pytest.raises(UserError, match="only takes time"):
        bench.main(bench.BenchConfig(what="envs", env="vectorised"))


def test_the_search_for_the_best_tuning(monkeypatch):
    """What is to run: the best of the best ratios, and other batches at the very best one."""
    monkeypatch.setattr(tuning, "SIZES", (2, 8, 16, 32))
    monkeypatch.setattr(tuning, "WAITS", (0.5,))
    rows = tuning.search("quick")
    assert len(rows) == len(tuning.RATIOS) * 4 and rows[0]["ratio"] == "1:2"
    chosen = tuning.worth_running(rows)
    assert chosen[0] == rows[0] and len({row["ratio"] for row in chosen}) == 3
    assert {row["batch_max"] for row in chosen if row["ratio"] == "1:2"} >= {8, 16, 32}
    assert tuning.search("emulated")[0]["ratio"] in ("1:1", "2:2")
    lines = [{"env_steps": 100 * i, "time": 2.0 * i} for i in range(5)] + [
        {"env_steps": 400, "time": 99.0}
    ]
    assert tuning.rate(lines, 1) == 50.0  # the end of a run does not count


def test_envs(tmp_path):
    file = tmp_path / "result.json"
    bench.main(bench.BenchConfig(what="envs", env="metaworld", seconds=0.01, json=file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["how"] for row in rows][:4] == [
        "naive",
        "ours, fast",
        "ours, no frames",
        "ours, hard reset",
    ]
    assert rows[0]["times_naive"] == rows[0]["times_naive_cpu"] == 1.0 and {
        row["env"] for row in rows
    } == {"metaworld"}
    assert {(row["processes"], row["envs_per_process"]) for row in rows} >= {
        (1, 1),
        (2, 1),
        (1, 2),
        (1, 4),
    }
    for row in rows:
        assert (
            min(
                row["env_steps_per_s"],
                row["chunk_ms"],
                row["reset_ms"],
                row["private_mb_per_process"],
            )
            > 0
        )
    assert rows[1]["times_naive_cpu"] > 5.0  # by how much is a matter of the machine


def test_tracing_by_hand():
    """Two iterations after the warm-up, and one that is not measured."""

    def run(cpu_s: float, seconds: float, spans: dict) -> tracing.Run:
        lines = [{"env_steps": 100 * i, "time": seconds * i} for i in range(1, 6)]
        return tracing.Run(lines, {i: cpu_s * i for i in range(6)}, spans)

    spans = {
        "env-0": [("step", 0.1 * i, 0.1 * i + 0.05, {}) for i in range(100)],
        "actor-0": [("train", 2.0, 3.0, {}), ("train", 3.0, 10.0, {})],
    }
    traced = run(6.0, 2.0, spans)
    untraced = run(5.0, 1.0, {})
    assert tracing.rates(traced) == (50.0, 0.06, 3.0)
    row = tracing.row(
        "emulated", [traced] * 3, [untraced, run(50.0, 9.0, {}), untraced], 100.0, 2.0
    )
    assert (row["env_steps_per_s"], row["env_steps_per_s_untraced"], row["rate_ratio"]) == (
        50.0,
        100.0,
        0.5,
    )
    assert row["cpu_ratio"] == pytest.approx(6.0 / 5.0) and row[
        "spans_per_s_busiest"
    ] == pytest.approx(10.0)
    assert row["spans_per_s"] == pytest.approx(10.2) and row["cost_fraction"] == pytest.approx(1e-3)
    assert row["cost_fraction_of_cpu"] == pytest.approx(100e-6 * 10.2 / 3.0)


def test_a_recorded_span_costs_more_than_one_that_is_not(monkeypatch):
    monkeypatch.setattr(tracing, "SPANS", 2000)
    plain, more = tracing.span_us(3)
    assert plain > 0 and more > 0


def test_processor_time_goes_to_whose_it_is():
    assert [
        machinery.part_of(name) for name in ("env-3", "rollout-0", "actor-1", "python", "")
    ] == ["env", "rollout", "actor", "launcher", "launcher"]
    before = dict(env=1.0, rollout=2.0, actor=3.0, launcher=4.0)
    after = dict(env=1.2, rollout=2.1, actor=3.0, launcher=4.1)
    lines = {"collected": 1000, "time": 5.0}, {"collected": 3000, "time": 9.0}
    # Looked at later, and for longer, than written.
    first = machinery.Look(lines[0], before, 100.0)
    row = machinery.rates(first, machinery.Look(lines[1], after, 108.0))
    assert row["chunk_steps_per_s"] == 500 and row["actor_us"] == 0
    assert [row["env_us"], row["rollout_us"], row["cpu_us"]] == pytest.approx([50, 25, 100])


def test_two_pipelines_are_compared_round_by_round():
    ours, other = (
        [{"round_trips_per_s": rate, "cpu_us": cpu} for rate, cpu in runs]
        for runs in (((100, 5), (200, 5), (90, 4)), ((10, 10), (10, 20), (30, 20)))
    )
    assert machinery.relate(ours, other) == {
        "round_trips_per_s": 10,
        "cpu_us": 20,
        "ours_times_rate": 10,
        "ours_times_rate_least": 3,
        "its_cpu_to_ours": 4,
    }


def test_slots_of_the_machinery_benchmark_grow_with_the_pictures_alone():
    small = machinery.sizes(2, 8)
    large = machinery.sizes(256, 64)
    assert large["slot_kb"] - small["slot_kb"] == pytest.approx(
        (machinery.SEGMENT + 1) * 2 * 3 * (64**2 - 8**2) / 1e3
    )
    assert large["pool_mb"] == pytest.approx(2 * machinery.BATCH * large["slot_kb"] / 1e3, rel=0.01)


def test_machinery():
    row = machinery.run_pipeline(8, 8, 0.0)
    assert row["envs"] == 8 and row["cpu_us"] == pytest.approx(
        sum(row[f"{part}_us"] for part in machinery.PARTS)
    )
    assert (
        min(
            row[key]
            for key in ("chunk_steps_per_s", "env_us", "rollout_us", "actor_us", "private_mb")
        )
        > 0
    )


def test_another_checkout_takes_turns_with_this_one(monkeypatch, tmp_path):
    """Who begins alternates, each runs its own `train.py`, and the ratio is of the medians."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.py").touch()
    calls = []
    given = {other: iter([100.0, 300.0, 200.0]), config.ROOT: iter([500.0, 100.0, 300.0])}

    def run(command, watch, limit_s=300.0, checkout=config.ROOT):
        calls.append((command[1], checkout, command[command.index("--envs") + 1]))
        figures = {"cpu_us": 5.0 if checkout == other else 4.0, "private_mb": 1.0}
        return {"chunk_steps_per_s": next(given[checkout])} | figures

    monkeypatch.setattr(machinery, "follow", run)
    (row,) = machinery.measure_against(other, 3, 1.0, envs=(8,), pixels=(8,))
    here = config.ROOT
    assert [checkout for _, checkout, _ in calls] == [here, other, other, here, here, other]
    assert {(script, envs) for script, _, envs in calls} == {("train.py", "8")}
    assert (row["envs"], row["pixels"], row["rounds"]) == (8, 8, 3)
    assert (row["chunk_steps_per_s"], row["other_chunk_steps_per_s"]) == (300.0, 200.0)
    assert (row["rate_ratio"], row["cpu_ratio"]) == (1.5, 0.8)


def test_a_real_run_of_another_checkout(tmp_path):
    """Another folder with this code: the run must be of that folder, not of this one."""
    for part in config.ROOT.iterdir():
        if part.name not in (".git", "runs", "train.py"):
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "train.py").write_text("print('the other one')\n")
    with pytest.raises(UserError, match="the other one"):
        machinery.run_pipeline(8, 8, 0.0, checkout=tmp_path)


def test_what_fails_is_told(tmp_path):
    with pytest.raises(UserError, match="has no train.py: give --against the folder"):
        bench.main(bench.BenchConfig(what="machinery", against=tmp_path))
    with pytest.raises(UserError, match="two comparisons"):
        bench.main(bench.BenchConfig(what="machinery", against=tmp_path, peer="python"))
    with pytest.raises(UserError, match="no TorchRL: make one with"):
        bench.main(bench.BenchConfig(what="machinery", peer=str(tmp_path / "python")))
    with pytest.raises(UserError, match="failed or took longer than 60 s: broken"):
        machinery.follow([sys.executable, "-c", "print('broken')"], lambda folder, pid: None, 60.0)


def test_a_task_of_zero_takes_no_time(monkeypatch):
    def sleep(seconds):
        raise AssertionError(f"slept {seconds} s")

    monkeypatch.setattr("time.sleep", sleep)
    config = train.parse(
        ["--model", "emulated", "--env", "emulated", "--tasks", "0", "--image-size", "8"]
    )
    spec = libero.spec(config.train.tasks, 8)
    env = libero.Env(spec.tasks, 8)
    model = models.build(config, spec)
    env.reset(0, 1)
    assert [env.step(None) for _ in range(20)] == [Step(0.0, False)] * 20
    assert model.act({"image": torch.zeros(3, 1)}, {})["actions"].shape == (
        3,
        config.rollout.chunk,
        spec.action_dim,
    )
    model.evaluate({"actions": torch.zeros(3, 1)})
