"""What `benchmarks/nodes.py` makes of its runs; the runs themselves are minutes long."""

import runpy

import pytest

import train
from benchmarks import ladder, nodes
from benchmarks.emulated import libero
from config import ROOT


def line(time: float, env_steps: int, count: int) -> dict:
    """Of `count` nodes, the last of which collects half as fast."""
    found = {"time": time, "env_steps": env_steps, "env_steps_per_s": 100.0, "cpu_fraction": 0.5}
    found["waits"] = {"env:admission": 0.02}
    if count > 1:
        found |= {"reduce_s": 0.004, "reduce_wait_s": 0.002}
        found["waits"]["actor:gradient"] = 0.1
        speeds = [100.0] * (count - 1) + [50.0]
        found["nodes"] = {str(n): {"env_steps_per_s": speed} for n, speed in enumerate(speeds)}
    return found


def test_a_node_among_two_is_compared_with_one_alone(monkeypatch):
    took = {1: 2.0, 2: 2.5}  # seconds of an iteration

    def run(count, config):
        batch = nodes.BATCH * count
        lines = [line(took[count] * i, batch * i, count) for i in range(1, 5)]
        return lines, {"env": 0.1, "rollout": 0.1, "actor": 0.1, "launcher": 0.2}

    monkeypatch.setattr(nodes, "run", run)
    config = nodes.NodesConfig(counts=(1, 2), iterations=2)
    rows = [nodes.measure(count, config) for count in config.counts]
    nodes.compare(rows)
    one, two = rows
    assert one["env_steps_per_s"] == nodes.BATCH / 2.0
    assert (one["efficiency"], two["efficiency"]) == (1.0, pytest.approx(0.8))
    assert two["collected_efficiency"] == pytest.approx(0.8)
    assert two["predicted_efficiency"] == pytest.approx(1.0, abs=0.02)
    assert (one["spread"], two["spread"]) == (1.0, 0.5)
    assert (one["reduce_ms"], two["reduce_ms"]) == (0.0, pytest.approx(2.0))
    assert two["cores_used"] == pytest.approx(0.5)
    assert "| 2 | 4096 | 80.0% | 80.0% |" in nodes.table(rows)


def test_slower_stages_are_those_of_the_ladder(monkeypatch):
    monkeypatch.setenv("SLOWER", "4")
    slow = runpy.run_path(str(ROOT / "benchmarks" / "emulated" / "libero.py"))
    for name in ("ROUND", "MEAN", "INFER_ALL", "TRAIN_ALL", "SYNC"):
        assert slow[name] == pytest.approx(4 * vars(libero)[name])
    config = train.parse(ladder.flags("emulated", "full", "1:1"))
    steps = config.actor.batch * config.env.segment * config.rollout.chunk
    assert steps == nodes.BATCH and config.actor.minibatches == libero.MINIBATCHES
