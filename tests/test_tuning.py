"""What is chosen for `auto`: from costs that are known, with a fake clock."""

import math
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from predicted import NODE

import envs
import metrics
import tuning
from channel import Counters
from config import Config
from planning import Costs
from planning.events import simulate
from scheduler import divide
from tuning import (
    Past,
    Tuner,
    best_batches,
    costs_of,
    line_through,
    miniature,
    options,
    seconds_at,
)

NONE = (0, 0, 0)  # worker counts that no flag gives
METAWORLD = envs.load("metaworld")
COSTS = Costs(
    step_s=0.08, step_tail=0.3, infer_fixed_s=0.010, infer_each_s=0.002, train_each_s=0.001
)


def config_of(ratio: str = "auto", **changes) -> Config:
    """8 emulated envs; names of changes as flags have them."""
    config = Config()
    config.train.model = config.train.env = "emulated"
    config.train.ratio = ratio
    config.train.ratio_from = "3:1"
    config.env.envs = 8
    config.env.segment = 8
    config.env.eval_envs = 0
    config.env.image_size = 8
    config.actor.batch = 16
    config.actor.minibatch = 8
    config.actor.micro_batch = 16
    config.actor.update_epochs = 1
    for name, value in changes.items():
        stage = next(
            s for s in (config.train, config.env, config.rollout, config.actor) if hasattr(s, name)
        )
        setattr(stage, name, value)
    return config


# ---------------------------------------------------------------- what stages cost


def sums(sizes, seconds) -> tuple[float, ...]:
    x = np.array(sizes, float)
    y = np.array(seconds, float)
    return len(x), x.sum(), (x * x).sum(), y.sum(), (x * y).sum()


def test_inference_time_is_a_line_through_batches_of_several_sizes():
    sizes = [1, 2, 4, 8, 8]
    assert line_through(*sums(sizes, [3.0 + 0.5 * n for n in sizes])) == pytest.approx((3.0, 0.5))


def test_costs_are_never_negative():
    assert line_through(*sums([1, 8], [5.0, 4.0])) == (4.5, 0.0)  # larger ones took less
    assert line_through(*sums([1, 8], [0.1, 4.0])) == (0.0, 4.1 / 9)
    assert line_through(*sums([], [])) == (0.0, 0.0)


def test_sizes_that_hardly_differ_say_nothing_of_the_fixed_part():
    fixed, each = line_through(*sums([8, 8, 8], [1.0, 1.1, 0.9]))
    assert fixed == pytest.approx(0.2) and fixed + 8 * each == pytest.approx(1.0)


def test_costs_of_a_stretch():
    config = config_of()
    config.env.env_workers = 2
    gained = {
        ("env", "wait_action_s"): 6.0,
        ("env", "wait_admission_s"): 2.0,
        ("env", "chunks"): 40.0,
        ("env", "chunk_s"): 10.0,
        ("env", "chunk_s_square"): 40 * 0.25**2 * (1 + 0.2**2),
        ("rollout", "wait_request_s"): 4.0,
        ("rollout", "batches"): 10.0,
        ("rollout", "infer_s"): 5.0,
        ("rollout", "weight_sync_s"): 0.6,
        ("rollout", "fetches"): 3.0,
        ("actor", "wait_trajectory_s"): 3.6,
    }

    seconds = {"env": 20.0, "rollout": 10.0, "actor": 10.0}
    costs = costs_of(Counter(gained), sums([2, 6], [0.3, 0.7]), seconds, 16, config)
    assert costs.step_s == pytest.approx((20.0 - 8.0) / 40)  # what is no waiting is work
    assert costs.step_tail == pytest.approx(math.sqrt(math.log(1.04)))
    assert (costs.infer_fixed_s, costs.infer_each_s) == pytest.approx(
        (0.1 + (10.0 - 4.0 - 5.0) / 10, 0.1)
    )
    assert costs.train_each_s == pytest.approx(6.4 / (16 * 8)) and costs.fetch_s == pytest.approx(
        0.2
    )


# ---------------------------------------------------------------- B_max and T_max


@pytest.mark.parametrize(
    "costs",
    [
        COSTS,
        replace(COSTS, infer_each_s=0.02),  # the rollout worker is the slowest
        replace(COSTS, infer_fixed_s=0.08),  # and small batches are a waste
        replace(COSTS, step_s=0.01, infer_fixed_s=0.03),  # simulators that never let it rest
        replace(COSTS, train_each_s=0.02),  # the actor is the slowest
        replace(COSTS, step_tail=0.8, infer_fixed_s=0.0, infer_each_s=0.01),
    ],
)
def test_the_choice_is_as_good_as_the_best_of_all(costs):
    size, wait, rate, _ = best_batches(NODE, costs)
    runs = {"iterations": 8, "warmup": 3}
    limits = {
        n: [
            share * (costs.infer_fixed_s + n * costs.infer_each_s)
            for share in (0.0, 0.25, 0.5, 1.0, 2.0)
        ]
        for n in range(1, 9)
    }
    everything = [
        replace(NODE, batch_max=n, batch_wait_s=limit)
        for n, some in limits.items()
        for limit in some
    ]
    assert rate >= 0.98 * max(simulate(node, costs, **runs).env_steps_per_s for node in everything)
    assert (
        rate
        == simulate(replace(NODE, batch_max=size, batch_wait_s=wait), costs, **runs).env_steps_per_s
    )


def test_of_equal_ones_the_largest_batches():
    slow_actor = replace(COSTS, train_each_s=0.05)  # whatever the others do
    size, wait, *_ = best_batches(NODE, slow_actor)
    means = [
        simulate(replace(NODE, batch_max=n, batch_wait_s=wait), slow_actor).batch_size_mean
        for n in (1, 2)
    ]
    assert (
        size > 2
        and max(means)
        < simulate(replace(NODE, batch_max=size, batch_wait_s=wait), slow_actor).batch_size_mean
    )


@pytest.mark.parametrize("size, wait", [("all", math.inf), (3, 0.02), (3, math.inf)])
def test_what_the_user_fixed_stays(size, wait):
    assert best_batches(replace(NODE, batch_max=size, batch_wait_s=wait), COSTS)[:2] == (size, wait)
    assert best_batches(replace(NODE, batch_max=size), COSTS)[0] == size
    if math.isfinite(wait):
        assert best_batches(replace(NODE, batch_wait_s=wait), COSTS)[1] == wait


# ---------------------------------------------------------------- which ratios there are


def gpu_options(gpus: int, counts=NONE, **changes) -> set[str]:
    config = config_of(
        model="pi05", env="metaworld", envs=24, batch=48, minibatch=24, micro_batch=18, **changes
    )
    return set(options(config, counts, METAWORLD, gpus, 16))


def test_ratios_on_gpus_use_all_of_them():
    assert gpu_options(4) == {"3:1", "1:1", "1:3"}
    assert gpu_options(8) == {"7:1", "3:1", "5:3", "1:1", "3:5", "1:3", "1:7"}
    assert gpu_options(2) == {"1:1"}


def test_ratios_that_contradict_other_settings_are_left_out():
    assert gpu_options(8, (0, 0, 4)) == {"1:1"}
    assert "1:3" not in gpu_options(4, placement="hybrid") and "3:1" in gpu_options(
        4, placement="hybrid"
    )
    assert gpu_options(4, placement="colocated") == {"3:1"}  # which all share


def test_ratios_without_gpus():
    config = config_of()
    found = options(config, NONE, METAWORLD, 0, 2)
    assert list(found)[0] == "3:1" and set(found) == {"3:1", "2:1", "1:1", "1:2", "2:2", "1:3"}
    assert len(found["1:2"][1].actor_devices) == found["1:2"][0].actor.actor_workers == 2
    assert config.env.env_workers == 0  # the settings given stay what they are
    assert "6:2" in options(config, NONE, METAWORLD, 0, 8)
    config.env.envs = config.actor.batch = config.actor.minibatch = (
        32  # an emulated simulator's devices are processes
    )
    workers = {
        ratio: changed.env.env_workers
        for ratio, (changed, _) in options(config, NONE, envs.load("emulated"), 0, 2).items()
    }
    assert workers == {"3:1": 24, "1:1": 16, "2:1": 21, "1:2": 11, "2:2": 16, "1:3": 8}


def test_worker_counts_that_are_given_stay():
    found = options(config_of(), (4, 1, 2), METAWORLD, 0, 2)
    assert {len(placement.env_devices) for _, placement in found.values()} == {4}
    assert {len(placement.actor_devices) for _, placement in found.values()} == {2}


# ---------------------------------------------------------------- a run, in virtual time


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def at_once(function) -> Future:
    future = Future()
    try:
        future.set_result(function())
    except RuntimeError as error:
        future.set_exception(error)
    return future


class Run:
    """The counters of a run whose stages cost what `costs` says at the ratio 3:1; an iteration
    takes `seconds`."""

    def __init__(
        self,
        costs: Costs,
        past: Past | None = None,
        cores: int = 2,
        iterations: int = 1000,
        **changes,
    ):
        config = config_of(**changes)
        self.costs = costs
        self.version = 0
        self.cpu_s = 0.0
        self.clock = Clock()
        choices = options(config, NONE, METAWORLD, 0, 2)
        self.config = next(iter(choices.values()))[0]
        self.workers = self.config.env.env_workers
        rows = {"actor": [0], "rollout": [1], "env": list(range(2, 2 + self.workers))}
        self.counters = Counters(2 + self.workers, metrics.columns(0))
        self.tuner = Tuner(
            choices, self.counters, rows, past or Past(), cores, iterations, self.clock, at_once
        )

    def serve(self, sizes, seconds: float = 1.0) -> None:
        """So many batches, in so many seconds, in which env workers step a chunk for each
        sample."""
        c = self.costs

        def count(column, amount, row=1):
            return self.counters.add(row, column, amount)

        infer = [c.infer_fixed_s + n * c.infer_each_s for n in sizes]
        n, samples, squares, took, product = sums(sizes, infer)
        for column, amount in zip(
            ("batches", "requests", "batch_square", "infer_s", "batch_infer_s"),
            sums(sizes, infer),
            strict=True,
        ):
            count(column, amount)
        assert took <= seconds, "costs that cannot be"
        count("wait_request_s", seconds - took)
        for row in range(2, 2 + self.workers):
            chunks = samples / self.workers
            count("chunks", chunks, row)
            count("chunk_s", chunks * c.step_s, row)
            count("chunk_s_square", chunks * c.step_s**2 * math.exp(c.step_tail**2), row)
            count("wait_action_s", seconds - chunks * c.step_s, row)
        self.clock.now += seconds

    def iteration(self, seconds: float, cpu_s: float = 0.0) -> str:
        """128 chunk steps, trained."""
        self.serve([2, 3, 5, 6] * 8, seconds)
        self.counters.add(0, "wait_trajectory_s", seconds - 128 * self.costs.train_each_s)
        self.version = self.version + 1
        self.cpu_s = self.cpu_s + cpu_s
        self.tuner.iteration(self.version, self.cpu_s)
        return self.tuner.watch()

    def told(self) -> tuple[float, float]:
        return self.counters.get(1, "tuned_batch_max"), self.counters.get(1, "tuned_wait_s")

    def warm_up(self) -> list[str]:
        said = []
        for size in (1, 2, 3, 4, 5, 6):
            self.serve([size, size + 1] * 6, 10.0)
            said.append(self.tuner.watch())
        return list(filter(None, said))


def test_warm_up_serves_several_sizes_then_chooses():
    run = Run(COSTS)
    assert run.tuner.watch() == "" and run.told() == (0.0, 0.0)  # nothing has been served
    sizes = set()
    for _ in range(3):
        run.serve([2, 3] * 6, 5.0)
        assert run.tuner.watch() == ""
        sizes.add(run.told()[0])
    assert sizes == {2.0, 8.0, 4.0}
    run.serve([4, 5] * 6, 5.0)
    assert run.tuner.watch() == "" and run.tuner.past.news == {}  # now it is being thought of
    said = run.tuner.watch()
    costs = replace(COSTS, train_each_s=0.0)
    size, wait, *_ = best_batches(*miniature(run.config, run.tuner.placement, costs))
    assert run.told() == (size, pytest.approx(wait))
    assert said.startswith(
        f"rollout: batches of at most {size} of 8 lanes, waiting at most {1e3 * wait:.3g} ms: "
    )
    assert (
        "an inference takes 10 ms + 2 ms per sample, a chunk's simulation 80 ms (σ 30%)" in said
        and "\n" not in said
    )
    assert run.tuner.past.news == {"batch_max": size, "batch_wait_ms": pytest.approx(1e3 * wait)}
    run.serve([4, 5] * 6, 5.0)
    assert run.tuner.watch() == ""


def test_nothing_is_chosen_from_the_moment_after_the_first_iteration():
    run = Run(COSTS)
    for _ in range(3):  # one to begin with, then the first two sizes
        run.serve([2, 3] * 6, 5.0)
        run.tuner.watch()
    run.serve([4, 5] * 5, 5.0)  # two batches are missing
    run.tuner.iteration(1, 0.0)
    for row in range(2, 2 + run.workers):
        run.counters.add(row, "wait_action_s", 0.25)  # it began before, and ends now
    run.serve([4, 5], 0.25)
    assert (
        [run.tuner.watch() for _ in range(3)] == [""] * 3
        and run.told() == (4.0, 0.0)
        and run.tuner.batches.chosen_at is None
    )
    said = []
    for _ in range(6):
        run.serve([4, 5] * 6, 5.0)
        said.append(run.tuner.watch())
    assert len(list(filter(None, said))) == 1 and run.told() != (4.0, 0.0)
    assert 0.04 < run.tuner.batches.chosen_at.step_s <= COSTS.step_s  # that wait weighs little now


def test_batches_are_looked_at_again_when_costs_change(monkeypatch):
    run = Run(COSTS)
    looked = []
    assert len(run.warm_up()) == 1
    before = run.told()
    real = tuning.best_batches
    monkeypatch.setattr(tuning, "best_batches", lambda *args: looked.append(args) or real(*args))
    for _ in range(5):  # of 32 inferences each
        run.iteration(20.0)
    assert looked == []  # too few to tell
    for _ in range(15):
        run.iteration(20.0)
    assert (
        len(looked) == 1 and run.told() == before
    )  # for training's cost, which the warm-up could not know
    run.costs = replace(
        COSTS, step_s=0.005, infer_fixed_s=0.2, infer_each_s=0.001
    )  # episodes that succeed at once, say
    said = [run.iteration(20.0) for _ in range(8)]
    assert len(looked) > 1 and any("batches of at most" in text for text in said)
    monkeypatch.setattr(tuning, "PAUSE", 1e9)  # however much they change, not all the time
    count = len(looked)
    run.costs = COSTS
    assert [run.iteration(20.0) for _ in range(8)] == [""] * 8 and len(looked) == count


def test_nothing_is_told_where_nothing_is_auto():
    run = Run(COSTS, ratio="3:1", batch_max="all", batch_wait_ms=math.inf)
    assert (
        run.warm_up() == []
        and [run.iteration(20.0) for _ in range(25)] == [""] * 25
        and run.told() == (0.0, 0.0)
    )


def test_no_limit_of_waiting_is_no_reason_to_wait_for_ever_in_virtual_time():
    run = Run(COSTS, batch_wait_ms=math.inf)
    (said,) = run.warm_up()
    assert "waiting at most inf ms" in said and run.tuner.past.news["batch_wait_ms"] == "inf"


def test_a_prediction_that_fails_is_told_and_ends_nothing(monkeypatch):
    run = Run(COSTS)

    def fail(*_):
        raise RuntimeError("every worker waits for another")

    monkeypatch.setattr(tuning, "best_batches", fail)
    assert run.warm_up() == [
        "warning: nothing is tuned now, for in virtual time every worker waits for another"
    ]
    assert run.told() == (4.0, 0.0)  # half the lanes, as to begin with


SLOW_ACTOR = replace(COSTS, train_each_s=0.1)  # 12.8 s of an iteration


def test_a_ratio_changes_when_that_pays():
    run = Run(SLOW_ACTOR, batch_max=4, batch_wait_ms=10.0)
    said = [run.iteration(12.8) for _ in range(4)]
    assert (
        said[:3] == [""] * 3
        and run.tuner.ratio in ("1:2", "2:2", "1:1", "1:3")
        and run.tuner.past.news == {"ratio": run.tuner.ratio}
    )
    assert (
        said[3].startswith(f"ratio {run.tuner.ratio} instead of 3:1: an iteration is to take ")
        and "\n" not in said[3]
    )
    assert "training 100 ms per chunk step" in said[3]
    assert run.iteration(12.8) == ""  # the workers are about to leave


def test_a_ratio_stays_when_the_rest_of_the_run_is_too_short_for_a_change():
    run = Run(SLOW_ACTOR, iterations=5, batch_max=4, batch_wait_ms=10.0)
    said = [run.iteration(12.8) for _ in range(4)][3]
    assert run.tuner.ratio == "3:1" and said.startswith(
        "ratio 3:1 stays, an iteration takes 12.8 s: the best other, "
    )
    assert "in the rest of the run and cost 13 s" in said


def test_a_ratio_stays_when_cores_are_the_limit():
    """One that promises more only because cores are not simulated."""
    run = Run(SLOW_ACTOR, batch_max=4, batch_wait_ms=10.0)
    for _ in range(4):
        run.iteration(12.8, cpu_s=2 * 12.8)  # on two cores
    assert run.tuner.ratio == "3:1"


def test_a_ratio_is_looked_at_again_at_checkpoints_only(monkeypatch):
    run = Run(COSTS, checkpoint_every=5, batch_max=4, batch_wait_ms=10.0)
    looked = []
    real = tuning.seconds_at
    monkeypatch.setattr(
        tuning,
        "seconds_at",
        lambda *args: looked.append(run.version) or {**real(*args), "1:1": 1e9},
    )
    for _ in range(16):
        run.iteration(20.0)
    assert looked == [4, 5, 10, 15]


def test_a_ratio_that_turns_out_slower_is_left_for_good():
    past = Past(left="1:1", measured={"1:1": 10.0})
    run = Run(SLOW_ACTOR, past, batch_max=4, batch_wait_ms=10.0)
    said = [run.iteration(12.8) for _ in range(4)][3]
    assert said == "ratio 1:1 again: an iteration takes 12.8 s at 3:1, and took 10 s at 1:1"
    assert run.tuner.ratio == "1:1" and past.rejected == {"3:1"} and past.left == ""
    past = Past(rejected={"1:1", "1:2", "2:2", "2:1", "1:3"})
    run = Run(SLOW_ACTOR, past, batch_max=4, batch_wait_ms=10.0)
    said = [run.iteration(12.8) for _ in range(4)][3]
    assert run.tuner.ratio == "3:1" and "no other is possible" in said


@pytest.mark.parametrize(
    "before", [12.7, 12.8, 12.6]
)  # seconds of an iteration at 1:1, which prediction takes to be far fewer
def test_two_ratios_do_not_take_turns(before):
    past = Past(left="1:1", measured={"1:1": before}, rejected={"1:2", "2:2", "2:1", "1:3"})
    run = Run(SLOW_ACTOR, past, batch_max=4, batch_wait_ms=10.0, checkpoint_every=5)
    said = [run.iteration(12.8) for _ in range(16)]
    assert (
        run.tuner.ratio == "3:1"
        and past.measured == {"1:1": before, "3:1": pytest.approx(12.8)}
        and past.rejected == {"1:2", "2:2", "2:1", "1:3"}
    )
    assert said[3].startswith(
        f"ratio 3:1 stays, an iteration takes 12.8 s: it took {before:.3g} s at the best other, "
        "1:1; "
    )
    assert not any(said[4:])


def test_a_ratio_that_ran_comes_again_when_that_pays_as_measured():
    past = Past(
        measured={"1:1": 10.0}, rejected={"1:2", "2:2", "2:1"}
    )  # costs have changed since 1:1 was left
    run = Run(SLOW_ACTOR, past, batch_max=4, batch_wait_ms=10.0)
    said = [run.iteration(12.8) for _ in range(4)][3]
    assert (
        said.startswith("ratio 1:1 instead of 3:1: an iteration is to take 10 s instead of 12.8 s")
        and past.left == "3:1"
    )


def test_ratios_on_gpus_differ_in_workers_alone():
    config = config_of(
        model="pi05",
        env="metaworld",
        envs=24,
        batch=48,
        minibatch=24,
        micro_batch=18,
        segment=9,
        ratio_from="1:1",
    )
    choices = options(config, (8, 0, 0), METAWORLD, 4, 16)
    infer_bound = Costs(step_s=0.001, infer_fixed_s=0.01, infer_each_s=0.02, train_each_s=0.001)
    found = seconds_at(choices, "1:1", infer_bound, 0.0, 16)
    assert set(found) == set(choices)
    assert found["1:1"] / found["3:1"] == pytest.approx(
        1.5, rel=0.15
    )  # three rollout workers instead of two
    assert found["1:3"] / found["1:1"] == pytest.approx(2.0, rel=0.15)
    train_bound = Costs(step_s=0.001, infer_fixed_s=0.0, infer_each_s=0.0001, train_each_s=0.1)
    found = seconds_at(choices, "1:1", train_bound, 0.0, 16)
    assert found["3:1"] / found["1:3"] == pytest.approx(3.0, rel=0.05)


def test_a_vectorised_run_is_predicted_with_lanes_as_wide_as_its_own():
    config = config_of(model="pi05", env="maniskill", envs=32, batch=32, minibatch=32, lanes=2)
    config.env.env_workers = 2
    node, _ = miniature(config, divide(config, METAWORLD, 4, 8), COSTS)
    assert (node.lanes, node.lane_envs, node.env_devices) == (4, 8, ("cuda:0", "cuda:1"))
    assert best_batches(node, COSTS).env_steps_per_s > 0
