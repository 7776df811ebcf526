"""`plan.py` in virtual time: exact where a sum is, within 5 % of the measured ladder, and quick
enough for large clusters.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LINE

import metrics
import plan
import scheduler
import streamer
from benchmarks import plan_against_paper, wire
from config import PRESETS, ROOT, Config, to_json
from errors import UserError
from planning import Costs, Node, events
from planning.costs import calibrate, from_run, inference_cost
from planning.events import Device, NodeState, World, simulate
from planning.settings import PlanConfig, node_of, planned
from planning.wire import Network, all_reduce_s, exposed_s, wire_gb
from run_folder import read_metrics, read_trace, write_trace
from scheduler import Admission, place

ONE = Node(
    lanes=1,
    env_devices=("cpu",),
    rollout_devices=("cpu",),
    actor_devices=("cpu",),
    segment=4,
    chunk=10,
    batch=2,
    minibatch=2,
    micro_batch=1,
    update_epochs=1,
    max_staleness=0,
    batch_max="all",
    batch_wait_s=math.inf,
    stream=False,
)
PRICES = Costs(step_s=3.0, infer_fixed_s=1.0, infer_each_s=0.5, train_each_s=0.25, optimizer_s=0.1)
MANY = replace(ONE, lanes=8, env_devices=("cpu",) * 4, batch=16, minibatch=8, micro_batch=2)
TAILED = Costs(step_s=1.0, step_tail=0.4, infer_fixed_s=0.1, infer_each_s=0.05, train_each_s=0.05)


def as_preset(node: Node, preset: str) -> Node:
    _, staleness, batch_max, wait, stream = PRESETS[preset]
    return replace(
        node, max_staleness=staleness, batch_max=batch_max, batch_wait_s=wait, stream=stream
    )


def predicted(**flags):
    config = PlanConfig(**{"rollout_s": 1050, "actor_s": 861, "rounds": 8, "iterations": 8} | flags)
    node, nodes, _ = planned(config)
    return plan.predict(config, node, calibrate(config), nodes)


def test_the_classes_are_those_of_a_run():
    assert (
        events.DynamicBatcher is scheduler.DynamicBatcher
        and events.Admission is scheduler.Admission
    )
    assert events.Streamer is streamer.Streamer


def test_a_plan_imports_neither_torch_nor_benchmarks():
    code = "import sys, plan; sys.exit('torch' in sys.modules or 'benchmarks' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- sums that can be done by hand


def test_one_lane_in_step():
    found = simulate(ONE, PRICES, iterations=5, warmup=2)
    # Two trajectories of 4 chunks. The value that ends the first rides along with an action; the
    # second's comes alone.
    rollout = 8 * 3.0 + 7 * 1.5 + 2.0 + 1.5
    actor = 2 * 4 * 0.25 + 0.1
    assert found.step_s == pytest.approx(rollout + actor)
    assert found.env_steps_per_s == pytest.approx(2 * 4 * 10 / (rollout + actor))  # eq. 2
    assert found.bubble_env == pytest.approx(1 - 24 / found.step_s)
    assert found.bubble_rollout == pytest.approx(1 - (rollout - 24) / found.step_s)
    assert found.bubble_actor == pytest.approx(1 - actor / found.step_s)


def test_staleness_hides_the_shorter_phase():
    for train_each in (0.25, 10.0):
        costs = replace(PRICES, train_each_s=train_each)
        actor = 2 * 4 * train_each + 0.1
        found = simulate(replace(ONE, max_staleness=1), costs, iterations=5, warmup=3)
        assert found.step_s == pytest.approx(
            max(8 * 3.0 + 6 * 1.5 + 2 * 2.0, actor)
        )  # now every last value rides along


def test_streaming_starts_before_the_batch_is_whole():
    waits = simulate(ONE, PRICES, iterations=4).step_s
    assert simulate(replace(ONE, stream=True), PRICES, iterations=4).step_s == pytest.approx(
        waits - 4 * 0.25
    )  # the first of two


def test_what_an_iteration_pays_besides():
    plain = simulate(ONE, PRICES, iterations=4).step_s
    dear = replace(PRICES, publish_s=0.3, fetch_s=0.7, gradient_s=0.2)
    assert simulate(ONE, dear, iterations=4).step_s == pytest.approx(plain + 0.3 + 0.7 + 0.2)
    late = simulate(ONE, replace(PRICES, message_s=0.01), iterations=4)
    # request and answer of 9 inferences, a finished trajectory, and the word of a new version
    assert late.step_s == pytest.approx(plain + (2 * 9 + 1 + 1) * 0.01)


def test_long_work_on_a_device_goes_in_turns_with_others():
    world = World()
    done = []
    device = Device(world, 1.0)
    for name, seconds in (("long", 3.0), ("short", 0.5), ("longer", 3.5)):
        device.after(seconds, lambda name: done.append((name, world.now)), name)
    world.after(9.0, lambda: setattr(world, "running", False))
    world.run()
    assert done == [("short", 1.5), ("long", 5.5), ("longer", 7.0)]


def test_a_simulator_that_draws_takes_turns_with_the_model_of_its_device():
    """In lockstep, drawing is a part of the simulator's time; asynchronously, of the device's."""
    node = replace(MANY, rollout_devices=("cuda:0",), actor_devices=("cuda:0",))
    drawn = replace(TAILED, step_tail=0.0, draw_share=0.2)
    one = replace(ONE, rollout_devices=("cuda:0",), actor_devices=("cuda:0",))
    for costs in (drawn, replace(drawn, draw_share=0.0)):
        assert simulate(one, costs, iterations=4).step_s == pytest.approx(
            8 * (1.0 + 0.05) + 9 * 0.1 + 10 * 0.05  # the first last value rides along
        )
    # Of the device, in an iteration: 64 chunks drawn and trained, and 80 samples inferred.
    found = simulate(as_preset(node, "full-colocated"), drawn, iterations=20)
    assert found.step_s >= 64 * (0.2 + 0.05) + 80 * 0.05


def test_asynchronous_stages_have_a_shared_gpu_once():
    """Inference's and training's seconds of an iteration, on the same GPUs, are its least."""
    flags = {"infer_share": 0.6, "tail": 0.0, "infer_fixed": 0.0}
    sync = predicted(preset="sync-colocated", **flags)
    found = predicted(preset="full-colocated", **flags)
    assert 0.6 * 1050 + 861 <= found.step_s * 1.01 < sync.step_s
    apart = predicted(preset="full", **flags)
    assert apart.step_s < found.step_s
    drawn = predicted(preset="full-colocated", draw_share=0.1, **flags)
    assert drawn.step_s > found.step_s


def test_workers_of_one_device_take_turns():
    world = World()
    done = []
    device = Device(world)
    for name in "abc":
        device.after(2.0, lambda name: done.append((name, world.now)), name)
    world.after(7.0, lambda: setattr(world, "running", False))
    world.run()
    assert done == [("a", 2.0), ("b", 4.0), ("c", 6.0)]
    asynchronous = as_preset(ONE, "full")
    apart = simulate(asynchronous, PRICES, iterations=5)
    shared = simulate(
        replace(asynchronous, rollout_devices=("cuda:0",), actor_devices=("cuda:0",)),
        PRICES,
        iterations=5,
    )
    assert apart.bubble_actor > shared.bubble_actor and shared.step_s >= apart.step_s


def test_a_vectorised_lane_is_one_request_of_many_samples():
    vectorised = replace(ONE, lane_envs=3, batch=6, minibatch=6)
    found = simulate(vectorised, PRICES, iterations=4)
    rollout = 8 * 3.0 + 7 * 2.5 + 4.0 + 2.5
    assert found.step_s == pytest.approx(rollout + 6 * 4 * 0.25 + 0.1)
    assert found.env_steps_per_s == pytest.approx(3 * 2 * 4 * 10 / found.step_s)


# ---------------------------------------------------------------- who owns what, who may ask


@pytest.mark.parametrize("width, group, ranks", [(1, 1, 2), (4, 1, 2), (2, 8, 2), (4, 2, 2)])
def test_a_lane_or_group_belongs_to_one_rank_as_in_a_run(width, group, ranks):
    """Every trajectory of two batches goes to the rank that `Admission.owner` of a run names."""
    config = Config()
    config.train.algorithm = "grpo" if group > 1 else "ppo"
    config.algorithm.group_size = group
    config.env.envs = 32
    config.env.env_workers = 2
    config.env.lanes = 32 // (2 * width) if width > 1 else 0
    config.env.segment = 2
    config.actor.batch = 64
    config.actor.minibatch = 32
    config.actor.micro_batch = 2 * group
    placement = place("1:1", "disaggregated", 0, 2, 2, 1, ranks)
    node = node_of(config, placement)
    assert (node.lane_envs, node.group, node.lanes) == (width, group, 32 // width)
    real = Admission.of(config)
    owners = {}

    class Noted(streamer.Streamer):
        def add(self, slot):
            owners[slot] = self.rank
            super().add(slot)  # raises where the slot belongs to another rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "Streamer", Noted)
        found = simulate(node, PRICES, iterations=3)
    assert owners == {slot: real.owner(slot, ranks) for slot in range(real.slots)}
    assert found.env_steps_per_s == pytest.approx(64 * 2 * 10 / found.step_s)


def test_a_group_ends_without_a_last_value():
    found = simulate(replace(ONE, lanes=2, group=2, batch=4, micro_batch=2), PRICES, iterations=4)
    # Both lanes ask in step, 4 times in each of two trajectories, and one env worker steps them.
    assert found.step_s == pytest.approx(8 * (2.0 + 2 * 3.0) + 4 * 4 * 0.25 + 2 * 0.1)


def test_lanes_that_wait_for_a_version_are_not_waited_for():
    """B_max of every lane with T_max = ∞ goes on when some lanes have ended their batch."""
    node = replace(MANY, batch_max=3, batch_wait_s=math.inf)
    found = simulate(node, TAILED, iterations=20)
    assert 1 < found.batch_size_mean < 4  # last values ride along
    late = simulate(replace(node, batch_wait_s=10.0), TAILED, iterations=20)
    assert found.step_s == pytest.approx(late.step_s, rel=0.02)  # 10 s are never waited for
    assert predicted(batch_max=8, batch_wait_ms=math.inf).step_s > 0
    slow = replace(TAILED, train_each_s=1.0)
    ahead = replace(node, batch_max="all", max_staleness=1)
    assert simulate(ahead, slow, iterations=6).step_s == pytest.approx(16 * 4 * 1.0, rel=0.02)


def test_the_batcher_knows_how_many_lanes_may_ask():
    world = World()
    node = replace(MANY, batch_max="all", max_staleness=0)
    state = NodeState(world, node, PRICES, events.Barrier(world, 1, None, (0, 1)), None)
    (rollout,) = state.rollouts
    rollout.count_lanes()
    assert rollout.batcher.limit == 8
    rollout.lanes[0].trajectory = state.admission.per_lane
    rollout.count_lanes()
    assert rollout.batcher.limit == 7
    state.publish(1)
    assert rollout.batcher.limit == 8


def test_one_node_sends_nothing_and_a_ring_sends_each_byte_twice():
    network = Network(gb_s=50.0, hop_s=10e-6)
    assert all_reduce_s(2.0, 1, 1, network) == wire_gb(2.0, 1) == 0.0
    assert all_reduce_s(2.0, 5, 1, network) == pytest.approx(2 * 4 / 5 * 2 / 50 + 2 * 4 * 10e-6)
    # Within a node the wire does not matter. Across nodes the ring has all their ranks.
    inside = replace(network, inside_gb_s=300.0, inside_hop_s=3e-6)
    alone = all_reduce_s(2.0, 1, 4, inside)
    assert alone == pytest.approx(2 * 3 / 4 * 2 / 300 + 6 * 3e-6)
    assert alone == all_reduce_s(2.0, 1, 4, replace(inside, gb_s=1.0, hop_s=1.0))
    hops = 2 * (20 - 5) * 3e-6 + 2 * 4 * 10e-6
    assert all_reduce_s(2.0, 5, 4, inside) == pytest.approx(wire_gb(2.0, 20) / 50 + hops)


@pytest.mark.parametrize("trees", [False, True])
def test_more_nodes_bytes_and_latency_never_take_less(trees):
    network = Network(gb_s=3.0, hop_s=20e-6, inside_gb_s=300.0, inside_hop_s=3e-6, trees=trees)
    for gb in (0.001, 1.0):
        seconds = [all_reduce_s(gb, 2**i, 4, network) for i in range(11)]
        assert seconds == sorted(seconds)
        assert all_reduce_s(2 * gb, 8, 4, network) > seconds[3]
        assert all_reduce_s(gb, 8, 4, replace(network, gb_s=6.0)) < seconds[3]
        assert all_reduce_s(gb, 8, 4, replace(network, hop_s=1e-3)) > seconds[3]
    # Many nodes make a ring of small buckets long in hops, not a tree.
    small = all_reduce_s(0.001, 128, 4, replace(network, trees=False))
    assert all_reduce_s(0.001, 128, 4, network) < small / 2 or not trees


def test_a_backward_pass_hides_all_but_the_last_bucket():
    assert exposed_s(1.0, 8, 0.0) == 8.0  # nothing to hide behind
    assert exposed_s(1.0, 8, 4.0) == pytest.approx(8 - 4 * 7 / 8)
    assert exposed_s(1.0, 8, 100.0) == 1.0
    assert exposed_s(8.0, 1, 100.0) == 8.0  # in one piece it begins when all of it is there
    hidden = [exposed_s(1.0, 8, share) for share in (0.0, 1.0, 4.0, 8.0, 9.0)]
    assert hidden == sorted(hidden, reverse=True)


@pytest.mark.parametrize("overlap", [0.0, 0.67])
@pytest.mark.parametrize("gradient_gb", [1.73, 40.0])
def test_measured_training_contains_what_is_not_hidden(overlap, gradient_gb):
    """Whatever the wire takes of --actor-s, phases come back as they were given."""
    flags = {"overlap": overlap, "gradient_gb": gradient_gb, "network_gb_s": 3.1, "gpus": 64}
    found = predicted(preset="sync-disaggregated", **flags)
    assert (1 - found.bubble_actor) * found.step_s < 861
    assert found.step_s == pytest.approx(1050 + 861, rel=0.02)


def test_the_slowest_of_many_nodes_decides_and_staleness_makes_up_for_it():
    """E[max] of N alike nodes: it grows with N, and less where rollouts may run ahead."""
    waits = {}
    for preset in ("sync-disaggregated", "train-async"):
        node = as_preset(MANY, preset)
        alone, eight, many = (
            simulate(node, TAILED, nodes, min(nodes, 8), 40).step_s for nodes in (1, 8, 128)
        )
        assert alone < eight < many
        waits[preset] = many / alone - 1
    assert waits["train-async"] < waits["sync-disaggregated"]


def test_the_wire_is_not_compared_where_there_are_no_namespaces(monkeypatch):
    """A sentence and status 1, in place of figures of something else."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="allows no network namespaces or no tc here"):
        wire.main(wire.WireConfig())


# ---------------------------------------------------------------- what must hold for any costs


@pytest.mark.parametrize("preset", PRESETS)
def test_repeats_and_stays_below_every_stage_limit(preset):
    node = as_preset(MANY, preset)
    found = simulate(node, TAILED, iterations=20)
    assert (
        found
        == simulate(node, TAILED, iterations=20)
        != simulate(node, TAILED, iterations=20, seed=1)
    )
    work = {"env": 16 * 4 / 4 * 1.0, "actor": 16 * 4 * 0.05}
    for stage, seconds in work.items():
        assert (1 - getattr(found, f"bubble_{stage}")) * found.step_s == pytest.approx(
            seconds, rel=0.05
        )
    assert found.step_s > 0.95 * max(work.values())


def test_each_level_of_asynchrony_gains():
    speed = {
        preset: simulate(as_preset(MANY, preset), TAILED, iterations=60).env_steps_per_s
        for preset in PRESETS
    }
    assert (
        speed["sync-disaggregated"]
        < speed["train-async"]
        < speed["rollout-async"]
        < 1.02 * speed["full"]
    )


def test_two_measured_phases_come_back():
    for gpus, flags in (
        (8, {}),
        (256, {}),
        (8, {"ratio": "3:1"}),
        (16, {"infer_share": 0.5, "tail": 0.5}),
        (8, {"update_epochs": 4}),
    ):
        found = predicted(gpus=gpus, preset="sync-disaggregated", **flags)
        assert found.step_s == pytest.approx(1050 + 861, rel=0.02)
        assert found.env_steps_per_s == pytest.approx(gpus / 8 * 64 * 8 * 480 / found.step_s)
    assert predicted(preset="train-async").step_s == pytest.approx(1050, rel=0.03)
    assert predicted(preset="train-async", actor_s=2000).step_s == pytest.approx(2000, rel=0.02)
    assert predicted(preset="sync-colocated").step_s == pytest.approx(1050 + 861, rel=0.02)
    assert 500 < predicted(preset="full", actor_s=100).step_s < 900


def test_phases_measured_on_other_parts():
    found = predicted(
        preset="sync-colocated", measured_placement="disaggregated", measured_ratio="1:1"
    )
    assert (1 - found.bubble_actor) * found.step_s == pytest.approx(861 / 2, rel=0.02)
    assert 1050 / 2 < found.bubble_actor * found.step_s < 1050 / 1.5
    found = predicted(preset="sync-disaggregated", measured_ratio="1:1", ratio="3:1")
    assert (1 - found.bubble_actor) * found.step_s == pytest.approx(861 * 2, rel=0.02)


def test_splitting_a_vectorised_simulator_costs_what_does_not_shrink():
    flags = dict(
        envs=256, rollout_epochs=2, episode_steps=40, chunk=5, actor_s=100, rounds=0, preset="full"
    )
    whole, halves = (
        predicted(lane_envs=lane, step_fixed=1.0, infer_fixed=1.0, **flags).step_s
        for lane in (64, 32)
    )
    assert 1.7 < halves / whole < 2.1
    assert predicted(lane_envs=32, **flags, infer_fixed=0.0).step_s == pytest.approx(
        predicted(lane_envs=64, **flags).step_s, rel=0.1
    )


def test_coarse_chunks_predict_what_fine_ones_do():
    for preset in ("full", "train-async"):
        coarse, fine = (
            predicted(preset=preset, actor_s=440, rounds=rounds).step_s for rounds in (16, 96)
        )
        assert coarse == pytest.approx(fine, rel=0.025)


@pytest.mark.parametrize("preset", ["sync-disaggregated", "full"])
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_few_nodes_stand_for_many(preset, spread):
    """The slowest of 12 nodes, followed one by one and drawn."""
    node = as_preset(MANY, preset)
    costs = replace(TAILED, train_each_s=0.1)
    one = simulate(node, costs, iterations=60).step_s
    every, few = (
        simulate(node, costs, 12, followed, 60, 20, spread=spread).step_s for followed in (12, 3)
    )
    assert few == pytest.approx(every, rel=0.03)
    assert every > (1.05 if spread else 1.0) * one


def test_large_clusters_cost_no_more_events():
    config = PlanConfig(gpus=256, rollout_s=1050, actor_s=861, iterations=1000)
    node, nodes, _ = planned(config)
    few, many = (simulate(node, TAILED, n, config.simulated_nodes, 3, 0).events for n in (3, nodes))
    assert nodes == 32 and many < 1.2 * few
    assert many / 3 * 1020 < 15e6  # of 1000 iterations: half a minute at 2 µs each


# ---------------------------------------------------------------- against what was measured


# `python bench.py ladder --setting emulated`, and again on busier cores: env steps/s, in the order
# of TABLE_1
MEASURED = (1400, 800, 1137, 2013, 2049)
BUSY = (1370.5, 760.1, 1098.4, 1964.9, 1996.1)
BUSY_PHASES = {"rollout_s": 4.643, "actor_s": 2.094}  # of its sync-disaggregated row


@pytest.mark.parametrize(
    "preset, measured", list(zip(plan_against_paper.TABLE_1, MEASURED, strict=True))
)
def test_emulated_ladder_from_nominal_times(preset, measured):
    found = simulate(*plan_against_paper.emulated_node(preset, "1:1"), iterations=40)
    assert found.env_steps_per_s == pytest.approx(measured, rel=0.05)


def test_emulated_ladder_from_its_synchronous_row(capsys):
    rows = [
        {
            "setting": "emulated",
            "ratio": "1:1",
            "preset": preset,
            "env_steps_per_s": measured,
            "rollout_s": None,
            "actor_s": None,
        }
        | {f"bubble_{stage}": 0.5 for stage in metrics.STAGES}
        for preset, measured in zip(plan_against_paper.TABLE_1, BUSY, strict=True)
    ]
    rows[1] |= BUSY_PHASES
    for row, measured in zip(plan_against_paper.ladder(rows), BUSY, strict=True):
        assert row["calibrated"] == pytest.approx(measured, rel=0.05)
    assert "1:1 full" in capsys.readouterr().out


def test_the_papers_other_placements_from_its_rows_at_1_1(monkeypatch, capsys):
    parts = [part for part in plan_against_paper.PARTS if part.gpus == 8]
    monkeypatch.setattr(plan_against_paper, "PARTS", parts)
    for row in plan_against_paper.other_parts():
        assert abs(row["error"]) < 0.13  # OFT 3:1 is the worst


# ---------------------------------------------------------------- from a run


def traced_run(folder, step=0.02, fixed=0.01, each=0.005, micro=0.04, sizes=True):
    """A run folder of one env worker, one rollout worker and one actor that did the same in every
    iteration."""
    config = Config()
    config.train.preset = "sync-disaggregated"
    config.train.ratio = "1:1"
    config.env.envs = 2
    config.env.env_workers = 1
    config.env.segment = 2
    config.rollout.rollout_workers = 1
    config.rollout.batch_max = "all"
    config.rollout.batch_wait_ms = math.inf
    config.rollout.chunk = 5
    config.actor.actor_workers = 1
    config.actor.batch = 2
    config.actor.minibatch = 2
    config.actor.micro_batch = 2
    config.actor.update_epochs = 1
    config.actor.max_staleness = 0
    config.actor.stream = False
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    infer = fixed + 2 * each
    spans = {"env-0": [], "rollout-0": [], "actor-0": []}
    iteration = 2 * (2 * step + infer) + infer + 2 * micro
    for i in range(6):
        now = i * iteration
        for _ in range(2):
            for name in ("env-0", "rollout-0"):
                waits = "wait: action" if name == "env-0" else "infer"
                spans[name].append([waits, now, now + infer])
            spans["env-0"] += [
                ["step", now + infer, now + infer + step],
                ["step", now + infer + step, now + infer + 2 * step],
            ]
            spans["rollout-0"].append(["wait: request", now + infer, now + infer + 2 * step])
            now += infer + 2 * step
        spans["rollout-0"].append(["infer", now, now + infer])
        spans["env-0"].append(["wait: admission", now, now + infer + 2 * micro])
        spans["rollout-0"].append(["wait: request", now + infer, now + infer + 2 * micro])
        spans["actor-0"].append(["wait: trajectory", i * iteration, now + infer])
        spans["actor-0"] += [
            ["train", now + infer + k * micro, now + infer + (k + 1) * micro] for k in range(2)
        ]
    write_trace(folder / "trace.json", spans)
    lines = [
        LINE
        | {"env_steps": 20 * i, "time": iteration * i, "batch_size_mean": 2.0, "weight_sync_s": 0.0}
        for i in range(1, 7)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return iteration


def test_a_run_predicts_itself(tmp_path):
    iteration = traced_run(tmp_path / "run")
    config = PlanConfig(from_=str(tmp_path / "run"), iterations=4)
    node, nodes, costs, line, _ = from_run(config)
    assert (node.lanes, node.segment, node.chunk, node.batch, node.max_staleness, nodes) == (
        2,
        2,
        5.0,
        2,
        0,
        1,
    )
    assert costs.step_s == pytest.approx(0.02, rel=1e-3)
    assert costs.infer_fixed_s + 2 * costs.infer_each_s == pytest.approx(0.02, rel=1e-3)
    assert costs.train_each_s == pytest.approx(0.02, rel=1e-3) and costs.message_s == pytest.approx(
        0.0, abs=1e-5
    )
    assert plan.predict(config, node, costs, nodes).step_s == pytest.approx(iteration, rel=0.01)
    assert f"reached {20 / iteration:.0f} env steps/s" in line


def test_of_a_run_on_two_nodes_costs_are_the_first_one_s(tmp_path):
    """The second node's workers take three times as long, and rows of both are in the trace. Lines
    of before, when there was one node, do not count."""
    traced_run(tmp_path / "one")
    traced_run(tmp_path / "two")
    run = tmp_path / "two"
    slow = {}
    for name, row in read_trace(run).items():
        slow[f"node 1 {name}"] = [
            (what, 3 * start, 3 * end, args) for what, start, end, args in row
        ]
    write_trace(run / "trace.json", read_trace(run) | slow)
    saved = json.loads((run / "config.json").read_text())
    saved["train"]["nodes"] = 2
    (run / "config.json").write_text(json.dumps(saved))
    nodes = {"nodes": {"0": {}, "1": {}}}
    lines = [line | {"env_steps": 2 * line["env_steps"]} | nodes for line in read_metrics(run)]
    lines = [LINE | {"batch_size_mean": 99.0}, *lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = from_run(PlanConfig(from_=str(tmp_path / "one")))
    both = from_run(PlanConfig(from_=str(run)))
    assert both[0] == alone[0] and both[2] == alone[2]


def test_a_run_of_several_nodes_gives_gradients_and_network(tmp_path):
    """Two nodes with a rank each have summed 6 MB in two optimizer steps, of 0.1 s each."""
    traced_run(tmp_path / "run")
    run = tmp_path / "run"
    saved = json.loads((run / "config.json").read_text())
    saved["train"]["nodes"] = 2
    saved["actor"]["minibatch"] = 1
    saved["actor"]["micro_batch"] = 1
    (run / "config.json").write_text(json.dumps(saved))
    more = {"nodes": {"0": {}, "1": {}}, "reduce_bytes": 6e6, "reduce_s": 0.2}
    more |= {"reduce_wait_s": 0.16}
    lines = [line | more for line in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    node, nodes, costs, _, found = from_run(PlanConfig(from_=str(run)))
    assert nodes == 2 and costs.gradient_s == pytest.approx(0.08)
    assert found.gradient_gb == pytest.approx(3e-3)
    assert found.network_gb_s == pytest.approx(6e-3 / 0.2)
    # Many nodes send twice as much, at that speed. One node sends nothing.
    _, nodes, many, *_ = from_run(PlanConfig(from_=str(run), gpus=1024))
    assert nodes == 128 and 0.16 < many.gradient_s < 0.21
    _, nodes, one, *_ = from_run(PlanConfig(from_=str(run), gpus=1, gpus_per_node=1))
    assert nodes == 1 and one.gradient_s < 0.01
    _, _, fast, _, found = from_run(PlanConfig(from_=str(run), gpus=1024, network_gb_s=1.0))
    assert found.network_gb_s == 1.0 and fast.gradient_s < many.gradient_s
    # A flag that is given counts, even if its value is the usual one.
    *_, line, found = from_run(PlanConfig(from_=str(run)))
    assert found.gpus == 16 and "it had 2 nodes, and 2 of 8 GPUs are predicted" in line
    asked = PlanConfig(from_=str(run), gpus=8, network_gb_s=50.0, gradient_gb=1.73)
    _, nodes, *_, found = from_run(asked)
    assert (nodes, found.gpus, found.network_gb_s, found.gradient_gb) == (1, 8, 50.0, 1.73)
    with pytest.raises(UserError, match="--gpus 12 is no multiple of --gpus-per-node 8"):
        from_run(PlanConfig(from_=str(run), gpus=12))


def test_a_sweep_from_more_nodes_than_it_goes_up_to_says_so(tmp_path, capsys):
    given = {"rollout_s": 1050, "actor_s": 861, "gpus": 2048, "iterations": 1, "rounds": 8}
    file = tmp_path / "sweep.json"
    plan.main(PlanConfig(**given, sweep=True, json=file, plot=tmp_path / "sweep.png"))
    said = capsys.readouterr().out
    assert "batch fixed: no size up to 1024 GPUs can be compared" in said
    assert {row["batch"] for row in json.loads(file.read_text())["rows"]} == {"grows"}
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_a_vectorised_run_has_lanes_of_many_envs(tmp_path):
    """Lanes ask, samples are inferred, and a lane's trajectories go to one rank."""
    traced_run(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    saved["env"] |= {"envs": 8, "env_workers": 1, "lanes": 2}
    saved["actor"] |= {"batch": 8, "minibatch": 8, "actor_workers": 2}
    saved["rollout"]["batch_wait_ms"] = 1.0
    path.write_text(json.dumps(saved))
    node, nodes, costs, *_ = from_run(PlanConfig(from_=str(tmp_path / "run")))
    assert (node.lanes, node.lane_envs, node.batch, len(node.env_devices)) == (2, 4, 8, 1)
    # Without sizes in the trace the fixed share is of a full batch: 8 samples.
    assert costs.infer_fixed_s == pytest.approx(0.25 * 8 * costs.infer_each_s, rel=1e-3)
    assert plan.predict(PlanConfig(iterations=4), node, costs, nodes).batch_size_mean >= 4
    faster, *_ = from_run(PlanConfig(from_=str(tmp_path / "run"), ratio="3:1"))
    assert (faster.lanes, faster.lane_envs, len(faster.env_devices)) == (2, 4, 2)


def test_a_run_under_another_preset(tmp_path):
    traced_run(tmp_path / "run")
    node, _, costs, *_ = from_run(PlanConfig(from_=str(tmp_path / "run"), preset="full"))
    assert (node.max_staleness, node.batch_max, node.batch_wait_s, node.stream) == (
        1,
        "auto",
        "auto",
        True,
    )
    _, _, faster, *_ = from_run(PlanConfig(from_=str(tmp_path / "run"), preset="sync-colocated"))
    assert faster.train_each_s == pytest.approx(costs.train_each_s / 2)
    # Each has the whole machine, so neither has it while the other does.
    shared, *_ = from_run(PlanConfig(from_=str(tmp_path / "run"), preset="full-colocated"))
    assert shared.rollout_devices == shared.actor_devices == ("0",)
    assert set(node.rollout_devices + node.actor_devices) == {"cpu"}
    node, *_ = from_run(PlanConfig(from_=str(tmp_path / "run"), max_staleness=3))
    assert (node.max_staleness, node.batch_max, node.stream) == (3, "all", False)


def test_a_run_that_changed_its_ratio_mixes_two(tmp_path):
    iteration = traced_run(tmp_path / "run")
    run = tmp_path / "run"
    lines = read_metrics(run)
    config = json.loads((run / "config.json").read_text())
    lines[2]["tuning"] = {"batch_max": 1}
    lines[3]["tuning"] = {}

    def reached(ratio: str) -> str:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "config.json").write_text(
            json.dumps(config | {"train": config["train"] | {"ratio": ratio, "ratio_from": "1:1"}})
        )
        return from_run(PlanConfig(from_=str(run)))[3]

    assert f"reached {20 / iteration:.0f} env steps/s" in reached("auto")
    lines[3]["tuning"] = {"ratio": "1:1"}
    with pytest.raises(
        UserError,
        match="came to ratio 1:1 on its way, and its trace has both: resume it with --ratio 1:1",
    ):
        reached("auto")
    assert "reached" in reached("1:1")  # resumed since, and the trace is of these workers alone


def test_inference_cost_is_a_line_where_sizes_are_known():
    spans = [("infer", 0.0, 0.01 + 0.005 * n, {"batch": n}) for n in (1, 4, 2, 8)]
    assert inference_cost(spans, 4.0, 8, 0.2) == pytest.approx((0.01, 0.005))
    fixed, each = inference_cost([("infer", 0.0, 0.1, {})], 8.0, 8, 0.2)
    assert fixed + 8 * each == pytest.approx(0.1) and fixed == pytest.approx(0.02)


# ---------------------------------------------------------------- the command


def test_command_line(cli, tmp_path):
    file = tmp_path / "plan.json"
    status, output = cli(
        ROOT / "plan.py",
        "--gpus 8 --ratio 1:1 --preset train-async --rollout-s 1050 --actor-s 861 --rounds 16 "
        f"--json {file}",
    ).finish()
    found = json.loads(file.read_text())
    assert status == 0 and "step_s" in output and "critical stage" in output
    assert found["step_s"] == pytest.approx(1050, rel=0.02) and {
        f"bubble_{s}" for s in metrics.STAGES
    } <= set(found)
    status, output = cli(ROOT / "plan.py", "--gpus 8").finish()
    assert status == 2 and output.startswith("error: give --rollout-s")


def test_sweep_says_what_breaks_and_what_would_help(tmp_path, capsys):
    config = PlanConfig(
        rollout_s=100,
        actor_s=40,
        sweep=True,
        plot=tmp_path / "sweep.png",
        json=tmp_path / "sweep.json",
        envs=16,
        rollout_epochs=2,
        rounds=4,
        iterations=4,
        gradient_gb=500.0,
        gpus_per_node=4,
        gpus=4,
    )
    plan.main(config)
    result = json.loads(config.json.read_text())
    output = capsys.readouterr().out
    grows = [row for row in result["rows"] if row["batch"] == "grows"]
    assert [row["gpus"] for row in grows] == [4 * 2**i for i in range(9)] and grows[0][
        "efficiency"
    ] == 1.0
    assert grows[-1]["gradient_share"] > grows[1]["gradient_share"] > 0
    assert "scaling breaks at 8 GPUs" in output and "cannot share its minibatches" in output
    gains = {
        change["change"]: change["gain"]
        for change in result["changes"]
        if change["batch"] == "grows"
    }
    assert max(gains, key=gains.get) in (
        "half the bytes of gradients, or twice the network",
        "half as many optimizer steps",
    )
    assert config.plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"gpus": 12}, "--gpus 12"),
        ({"gpus": 0}, "--gpus 0"),
        ({"ratio": "3"}, "R:A"),
        ({"gpus": 1}, "--placement colocated"),
        ({"ratio": "5:3"}, "3 actor workers"),
        ({"minibatch": 7}, "--minibatch 7"),
        ({"envs": 64, "lane_envs": 5}, "--lane-envs 5"),
        ({"envs": 64, "lane_envs": 32}, "spread evenly"),
        ({"rollout_s": -1.0}, "--rollout-s"),
        ({"infer_share": 2.0}, "--infer-share"),
        ({"optimizer_s": 1000.0}, "--optimizer-s"),
        ({"iterations": 0}, "--iterations"),
        ({"network_gb_s": 0.0}, "--network-gb-s 0.0 must be more than 0"),
        ({"tail": math.nan}, "--tail nan must"),
        ({"from_": "no-such-run", "rollout_s": None, "actor_s": None}, "there is no run"),
        ({"from_": f"{ROOT}/tests", "rollout_s": None, "actor_s": None}, "no trace.json"),
        ({"from_": "no-such-run", "actor_s": None}, "leave out --rollout-s"),
        (
            {"from_": "x", "rollout_s": None, "actor_s": None, "envs": 128, "chunk": 5},
            "leave out --envs, --chunk",
        ),
        ({"validate": True, "ladder": ROOT / "no-such-file"}, "cannot read the ladder"),
        ({"json": ROOT / "tests"}, "cannot write the result to .*tests: Is a directory"),
        ({"plot": Path("sweep.txt"), "sweep": True}, "must end in one of .png"),
        (
            {"sweep": True, "gpus": 2000, "gpus_per_node": 2000, "ratio": "1999:1"},
            "is more than the 1024 GPUs that a sweep goes up to",
        ),
    ],
)
def test_mistakes_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        plan.main(
            PlanConfig(
                **{"rollout_s": 100.0, "actor_s": 100.0, "rounds": 8, "iterations": 1} | flags
            )
        )
