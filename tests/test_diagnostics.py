"""Warnings come before a collapse, once, and say what to change."""

import json

import pytest

from benchmarks.equivalence import file
from diagnostics import SIGNS, Warnings


def test_warnings_come_once_a_sign_lasts_and_say_what_to_change():
    healthy = {
        "approx_kl": 0.01,
        "clip_fraction": 0.1,
        "masked_fraction": 0.0,
        "explained_variance": 0.5,
        "grad_norm": 1.0,
    }
    warnings = Warnings()
    assert all(not warnings.of(healthy) for _ in range(40))
    for key, value, words in (
        ("approx_kl", 0.5, "--lr"),
        ("clip_fraction", 0.9, "90% of samples"),
        ("masked_fraction", 0.2, "--max-staleness"),
        ("masked_fraction", 0.2, "unless --behaviour-weight is mask, widen its bounds"),
        ("kl_at_3_or_more", 2.0, "3 and more versions"),
        ("explained_variance", -2.0, "--value-lr"),
        ("grad_norm", 1e3, "norm is 1000"),
        ("filtered_fraction", 0.95, "--tasks"),
    ):
        warnings = Warnings()
        said = []
        for i in range(3 + 30):
            said += [(i, text) for text in warnings.of(healthy | {key: value})]
        assert [i for i, _ in said] == [2, 32] and all(
            words in text and text.startswith("warning: ") for _, text in said
        ), said
        assert not warnings.of(healthy) and not warnings.of(
            healthy | {key: value}
        )  # one good iteration starts the count anew


def test_a_stale_sample_may_be_further_from_the_policy_that_acted():
    for lag, kl, told in ((0.0, 0.19, 0), (0.0, 0.21, 1), (3.0, 0.75, 0), (3.0, 0.85, 1)):
        warnings = Warnings()
        said = [
            text for _ in range(5) for text in warnings.of({"approx_kl": kl, "staleness_mean": lag})
        ]
        assert len(said) == told and all(
            f"{lag:.1f} versions before" in text and "--proximal exact" in text for text in said
        )


def test_keys_that_are_null_or_absent_say_nothing():
    keys = (
        *SIGNS,
        *("approx_kl", "staleness_mean", "entropy_or_noise", "trajectories_per_task"),
    )
    warnings = Warnings()
    for line in (dict.fromkeys(keys), {}, {"trajectories_per_task": {"push": 3}}):
        assert not [text for _ in range(5) for text in warnings.of(line)]
    # A sign that lasts is told though other keys are null.
    line = dict.fromkeys(keys) | {"approx_kl": 0.5}
    assert [len(warnings.of(line)) for _ in range(4)] == [0, 0, 1, 0]


@pytest.mark.parametrize("study", ["equivalence", "default", "algorithms"])
def test_the_runs_that_stale_samples_spoilt_were_told_early_and_no_others(study):
    """The committed study: who was warned of the KL, and when, of runs of 60 iterations."""
    for run in map(json.loads, file(study, "jsonl").read_text().splitlines()):
        warnings = Warnings()
        told = []
        for i, (kl, lag) in enumerate(zip(run["approx_kl"], run["staleness_mean"], strict=True)):
            told += [
                i
                for text in warnings.of({"approx_kl": kl, "staleness_mean": lag})
                if "far from" in text
            ]
        spoilt = run["arm"].startswith(("staleness 4", "staleness 8")) and "exact" not in run["arm"]
        assert bool(told) == spoilt and min(told, default=0) < 45, (run["arm"], run["seed"], told)


def test_warnings_of_what_falls():
    """A task's success, though the other one's rises, and the noise of actions."""
    line = {"trajectories_per_task": {"push": 24, "reach": 24}, "entropy_or_noise": 0.2}
    warnings = Warnings()
    said = []
    for i in range(30):
        said += warnings.of(
            line | {"success_push": 0.9 if i < 15 else 0.3, "success_reach": i / 30}
        )
    assert (
        len(said) == 1
        and said[0].startswith("warning: success at push has fallen from 90% to ")
        and "--lr" in said[0]
    )
    nothing_trained = line | {
        "entropy_or_noise": None
    }  # GRPO: all of a batch's groups were filtered
    assert not [
        text
        for _ in range(5)
        for text in Warnings().of(nothing_trained) + warnings.of(nothing_trained)
    ]
    said = [
        text
        for noise in (0.2, -0.5, -1.0, -1.0, -1.0)
        for text in warnings.of(line | {"entropy_or_noise": noise})
    ]
    assert (
        len(said) == 1
        and "entropy 0.20 at first, -1.00 now" in said[0]
        and "--noise-level" in said[0]
    )
