"""When a round of evaluation begins, and how its outcomes are read from the counters."""

import metrics
from channel import Counters
from config import Config
from evaluation import Evaluations

TASKS = ("push", "reach")


def counters() -> Counters:
    return Counters(4, metrics.columns(4))


def test_rounds_of_evaluation_never_mix_and_are_reported_once():
    config = Config()
    table = counters()
    config.env.eval_every = 2
    config.env.eval_episodes = 4
    config.train.iterations = 5
    evaluations = Evaluations(config, TASKS, 0, table)

    def play(round: int, outcomes: dict[int, bool]) -> None:
        for episode, success in outcomes.items():
            table.set(2 + episode % 2, f"outcome_{episode}", 2 * round + success)

    assert (
        not evaluations.begins(-1)
        and evaluations.begins(0)
        and not evaluations.begins(0)
        and table.get(0, "eval_round") == 1
    )
    play(1, {0: True, 1: False, 2: False})
    assert not evaluations.begins(4) and evaluations.report() == {}  # one episode is still played
    play(1, {3: False})
    assert evaluations.begins(4) and table.get(0, "eval_round") == 2
    expected = {
        "eval_success_rate": 0.25,
        "eval_episodes": 4,
        "eval_per_task": {"push": 0.5, "reach": 0.0},
        "eval_version": 0,
    }
    assert evaluations.report() == expected and evaluations.report() == {}
    play(2, dict.fromkeys(range(4), True))
    assert evaluations.begins(5)  # the last version, whatever `eval_every` says
    assert evaluations.report() == expected | {
        "eval_success_rate": 1.0,
        "eval_per_task": {"push": 1.0, "reach": 1.0},
        "eval_version": 4,
    }
    play(3, dict.fromkeys(range(4), False))
    assert (
        not evaluations.begins(5)
        and not evaluations.begins(5)
        and evaluations.report()["eval_version"] == 5
    )
    config.env.eval_envs = 0
    assert not Evaluations(config, TASKS, 0, table).begins(0)


def test_workers_at_another_ratio_keep_the_schedule_of_evaluations():
    config = Config()
    lines = [{"eval_version": 0}, {"eval_version": 10}, {}]
    config.env.eval_every = 10
    config.train.iterations = 25

    def first(version: int, lines: list[dict]) -> int:
        """The version that is evaluated first by workers who start at `version`."""
        evaluations = Evaluations(config, TASKS, version, counters(), lines)
        return next(v for v in range(version, 26) if evaluations.begins(v))

    assert first(14, lines) == first(20, lines) == 20
    assert first(21, lines) == 21  # a round that was begun at 20 is lost
    assert first(24, [*lines, {"eval_version": 20}]) == 25  # the last version always gets one
    assert first(14, []) == 14 and first(3, [{}, {}]) == 3


def test_a_round_that_workers_have_played_in_part_is_not_over():
    """Outcomes of the round before stay in the counters, and count for nothing."""
    config = Config()
    config.env.eval_every = 1
    config.env.eval_episodes = 2
    table = counters()
    evaluations = Evaluations(config, TASKS, 0, table)
    assert evaluations.begins(0)
    table.set(2, "outcome_0", 3)  # round 1, success
    table.set(3, "outcome_1", 3)
    assert evaluations.begins(1)  # and round 2 has begun
    assert evaluations.report()["eval_success_rate"] == 1.0
    table.set(2, "outcome_0", 4)  # round 2, no success
    assert not evaluations.begins(2) and evaluations.report() == {}
    table.set(3, "outcome_1", 5)
    assert evaluations.begins(2) and evaluations.report()["eval_success_rate"] == 0.5
