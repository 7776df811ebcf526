"""What `benchmarks/helping.py` predicts, and `benchmarks/helping_ladder.py` emulates and tells, of
actors that infer while they wait."""

import json
from dataclasses import replace

import predicted
import pytest
import torch

from benchmarks.emulated import devices, libero, policy
from benchmarks.emulated import helping as emulated
from benchmarks.helping import CASES, RATIOS, as_json, best, line, ratios_of, row_of, shared_out
from benchmarks.helping_ladder import table
from config import Config, completed
from planning import Costs, events
from planning.settings import planned

NODE = replace(predicted.NODE, env_devices=("cpu",) * 8)
COSTS = Costs(step_s=0.1, step_tail=0.3, infer_fixed_s=0.03, infer_each_s=0.02, train_each_s=0.001)


def test_every_request_is_inferred_once():
    parts = shared_out(list(range(7)), 3)
    assert sorted(sum(parts, [])) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) == 1
    assert shared_out([1, 2], 5) == [[1], [2]]  # nobody is asked for nothing


def test_an_actor_that_waits_relieves_inference():
    alone = best(NODE, COSTS)
    helped = best(NODE, COSTS, "helped")
    assert alone.bubble_rollout < 0.05 and alone.bubble_actor > 0.9
    assert helped.env_steps_per_s > 1.2 * alone.env_steps_per_s
    assert helped.bubble_actor < alone.bubble_actor
    assert events.RolloutWorker.__name__ == "RolloutWorker"  # what plan.py uses is as it was
    assert best(NODE, COSTS) == alone


@pytest.mark.parametrize("train_s", [0.03, 0.04])
def test_an_actor_does_one_thing_at_a_time(train_s):
    """Also where nobody queues its work: "cpu" is no device."""
    costs = replace(COSTS, step_s=0.03, train_each_s=train_s)
    helped = best(NODE, costs, "helped")
    assert helped.env_steps_per_s <= 1.01 * NODE.chunk / train_s
    if train_s == 0.04:  # an actor that never waits helps nobody
        assert helped.env_steps_per_s == pytest.approx(best(NODE, costs).env_steps_per_s, rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_every_setting_fits_on_its_gpus(name):
    for gpus, ratio in [(n, ratio) for n in RATIOS for ratio in ratios_of(name, n)]:
        node, _, _ = planned(CASES[name].plan(gpus, ratio))
        r, a = map(int, ratio.split(":"))
        part = gpus // (r + a)
        assert (len(node.rollout_devices), len(node.actor_devices)) == (r * part, a * part)
        assert node.coarse == 1
    everything, _, _ = planned(CASES[name].plan(4, "1:1", "colocated"))
    assert everything.rollout_devices == everything.actor_devices
    assert CASES[name].costs_on(2).infer_each_s > 0


def test_a_row_compares_with_all_that_there_is():
    def row(ratio: str, kind: str, speed: float) -> dict:
        found = events.Prediction(1.0, speed, 0.0, 0.0, 0.0, 1.0, 1)
        return row_of("x", 4, ratio, kind, found)

    rows = [row("1:1", "alone", 100), row("1:1", "helped", 120), row("3:1", "alone", 125)]
    rows += [row("3:1", "helped", 130), row("4 actors", "colocated", 140)]
    words = "| x | 4 | 125 (3:1) | 140 (4 actors) | 130 (3:1) | +20.0% · +4.0% | +4.0% | -7.1% |"
    assert line("x", 4, rows) == words
    more = [*rows, row("1:3", "alone", 50), row("1:3", "helped", 75)]
    assert "| +20.0% · +4.0% · +50.0% |" in line("x", 4, more)
    assert json.loads(as_json(rows))["rows"] == rows and as_json(rows).count("\n") == len(rows) + 2


def test_eight_gpus_have_ratios_of_more_actors_where_training_costs_more():
    more = [name for name in CASES if "1:3" in ratios_of(name, 8)]
    assert more and all("OFT" in name or name == "GR00T on H100s, estimated" for name in more)
    assert all("1:3" in ratios_of(name, 4) for name in CASES)


def test_an_emulated_actor_halves_an_inference_only_while_it_waits(tmp_path, monkeypatch):
    """Two processes' views of it; time passes where something sleeps."""
    now = [100.0]
    monkeypatch.setattr(devices.util, "get_temp_dir", lambda: str(tmp_path))
    monkeypatch.setattr(emulated.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        emulated.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    rollout, actor = emulated.Help(0.5), emulated.Help(0.5)

    assert rollout.inference(0.2, 0.8) == pytest.approx(0.6)  # nothing was trained yet
    assert rollout.inference(0.2, 0.8) == 1.0  # the actor does one thing at a time
    with actor.training():
        assert now[0] == pytest.approx(100.6)  # it trains when it has inferred
        now[0] += 2.0
        assert rollout.inference(0.2, 0.8) == 1.0
    assert rollout.inference(0.2, 0.8) == 1.0  # between two micro-batches it does not wait
    now[0] += 2 * emulated.PAUSE
    assert rollout.inference(0.2, 0.8) == pytest.approx(0.6)


@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
@pytest.mark.parametrize("asked", ["0", "1"])
def test_an_emulated_run_s_actor_helps_only_if_asked(tmp_path, monkeypatch, placement, asked):
    monkeypatch.setenv("EMULATED_HELP", asked)
    monkeypatch.setattr(devices.util, "get_temp_dir", lambda: str(tmp_path))
    config = completed(Config(), model="emulated", env="emulated", placement=placement, ratio="1:1")
    model = policy.build(config, libero.spec((), 8))
    waited = []
    monkeypatch.setattr(model, "wait", waited.append)
    model.act({"image": torch.zeros(4, 1)}, {})
    model.evaluate({"actions": torch.zeros(4, 1)})
    model.act({"image": torch.zeros(4, 1)}, {})
    alone = model.times.infer_base + 4 * model.times.infer_each
    helped = placement == "disaggregated" and asked == "1"
    fewer = model.times.infer_base + 2 * model.times.infer_each
    assert waited[0] == pytest.approx(fewer if helped else alone)
    assert waited[1] == 4 * model.times.train_each
    assert waited[2] == pytest.approx(alone)  # it has only just trained


def test_the_table_pairs_runs_of_one_round():
    rows = []
    for number, (alone, helped) in enumerate([(100.0, 110.0), (200.0, 190.0), (90.0, 90.0)]):
        for arm, speed in (("helped", helped), ("alone", alone)):
            row = {"case": "a", "arm": arm, "round": number, "env_steps_per_s": speed}
            rows.append(row | {"bubble_actor": 0.4 if arm == "alone" else 0.1})
    told = table(rows[2:] + rows[:2]).splitlines()[-1]
    assert told == "| a | 100 | 110 | +10.0% · -5.0% · +0.0% |  | 40% |"
