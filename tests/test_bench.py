"""`bench.py` on the small models and a CPU: that it runs, counts what it says and refuses what it cannot do."""

import json

import pytest
import torch
import tyro

import bench
import benchmarks
from benchmarks import inference, ladder, prefix, tuning
from config import UserError
from envs import vectorised


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmarks, "MATMUL", {"cpu": 128})
    monkeypatch.setattr(inference, "BATCHES", (1, 2))
    monkeypatch.setattr(prefix, "SAMPLES", 2)
    monkeypatch.setattr(prefix, "POOL_BYTES", 0)


def test_counters():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    q = torch.randn(1, 2, 8, 4)
    assert benchmarks.flops_of(lambda: a @ b) == 2 * 8 * 16 * 4
    attention = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)  # noqa: E731
    assert benchmarks.flops_of(attention) == 2 * 2 * 2 * 8 * 8 * 4

    def two_of_three():
        x = torch.zeros(100) + 1.0  # the zeros are gone when `+` is done
        return (x.view(10, 10) * 2.0).sum().item()

    assert benchmarks.peak_bytes_of(two_of_three, "cpu") == 2 * 400 + 4


@pytest.mark.parametrize("model", ["pi05", "gr00t"])
def test_prefix(model, capsys):
    cached, recomputed = prefix.measure(model, "auto", 0.01)
    assert cached["slot_kb_per_sample"] > recomputed["slot_kb_per_sample"]
    assert cached["gflop_per_sample"] < recomputed["gflop_per_sample"]
    assert cached["s_per_sample"] == cached["read_s_per_sample"] + cached["train_s_per_sample"]
    assert min(cached["peak_mb"], recomputed["peak_mb"], cached["copy_gb_per_s"], cached["prefix_gflop_per_s"]) > 0
    assert "Recomputing is better where" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["pi0", "gr00t", "oft"])
def test_inference(model, tmp_path):
    file = tmp_path / "result.json"
    bench.main(bench.BenchConfig(what="inference", model=model, size="small", seconds=0.01, json=file))
    result = json.loads(file.read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 2] and result["what"] == "inference"
    for row in result["rows"]:
        assert row["mode"] == "eager" and row["samples_per_s"] > 0 and row["share_of_peak"] > 0
        assert (row["denoise_step_s"] is None) == (model == "oft")


def test_the_vectorised_setting_is_the_paper_s_column():
    """Env steps/s of the five rows that `envs/vectorised.py` is derived from, from its constants."""
    v = vectorised
    rate = lambda seconds: 81_920 / (64 * seconds / v.SCALE)  # noqa: E731  of a round: simulation, inference, training
    simulate = lambda envs, lanes: lanes * v.FIXED + envs * v.EACH  # noqa: E731
    lockstep = simulate(64, 1) + v.INFER_ALL
    paper = ladder.PAPER["vectorised"]
    assert rate(lockstep + v.TRAIN_ALL) == pytest.approx(paper["sync-disaggregated"])
    assert rate(max(lockstep, v.TRAIN_ALL)) == pytest.approx(paper["train-async"], rel=0.05)
    assert rate(simulate(64, 64)) == pytest.approx(paper["rollout-async"])
    assert rate(simulate(32, 1) + v.INFER_ALL / 2 + v.TRAIN_ALL / 2) == pytest.approx(paper["sync-colocated"], rel=0.1)
    # Two lanes per GPU lose less than the inference that they hide; the actor then is the slowest stage.
    assert simulate(64, 2) < lockstep and ladder.emulated_bound("vectorised", "1:1", "full") == pytest.approx(256 * 5 / v.TRAIN_ALL)


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
    lines = [{"env_steps": 100 * i, "time": 2.0 * i} for i in range(5)] + [{"env_steps": 400, "time": 99.0}]
    assert tuning.rate(lines, 1) == 50.0  # the end of a run does not count


def test_envs(tmp_path):
    file = tmp_path / "result.json"
    bench.main(bench.BenchConfig(what="envs", env="metaworld", seconds=0.01, json=file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["how"] for row in rows][:4] == ["naive", "ours, fast", "ours, no frames", "ours, hard reset"]
    assert rows[0]["times_naive"] == rows[0]["times_naive_cpu"] == 1.0 and {row["env"] for row in rows} == {"metaworld"}
    assert {(row["processes"], row["envs_per_process"]) for row in rows} >= {(1, 1), (2, 1), (1, 2), (1, 4)}
    for row in rows:
        assert min(row["env_steps_per_s"], row["chunk_ms"], row["reset_ms"], row["private_mb_per_process"]) > 0
    assert rows[1]["times_naive_cpu"] > 5.0  # by how much is a matter of the machine
