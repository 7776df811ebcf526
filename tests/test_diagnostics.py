"""Warnings come before a collapse, once, and say what to change."""

from diagnostics import Warnings


def test_warnings_come_once_a_sign_lasts_and_say_what_to_change():
    healthy = {"approx_kl": 0.01, "clip_fraction": 0.1, "masked_fraction": 0.0, "explained_variance": 0.5, "grad_norm": 1.0}
    warnings = Warnings()
    assert all(not warnings.of(healthy) for _ in range(40))
    for key, value, words in (
        ("approx_kl", 0.5, "--lr"), ("clip_fraction", 0.9, "90% of samples"), ("masked_fraction", 0.2, "--max-staleness"),
        ("kl_at_3_or_more", 1.0, "3 and more versions"), ("explained_variance", -2.0, "--value-lr"),
        ("grad_norm", 1e3, "norm is 1000"), ("filtered_fraction", 0.95, "--tasks"),
    ):  # fmt: skip
        warnings, said = Warnings(), []
        for i in range(3 + 30):
            said += [(i, text) for text in warnings.of(healthy | {key: value})]
        assert [i for i, _ in said] == [2, 32] and all(words in text and text.startswith("warning: ") for _, text in said), said
        assert not warnings.of(healthy) and not warnings.of(healthy | {key: value})  # one good iteration starts the count anew


def test_warnings_of_what_falls():
    """A task's success, though the other one's rises, and the noise of actions."""
    line = {"trajectories_per_task": {"push": 24, "reach": 24}, "entropy_or_noise": 0.2}
    warnings, said = Warnings(), []
    for i in range(30):
        said += warnings.of(line | {"success_push": 0.9 if i < 15 else 0.3, "success_reach": i / 30})
    assert len(said) == 1 and said[0].startswith("warning: success at push has fallen from 90% to ") and "--lr" in said[0]
    said = [text for noise in (0.2, -0.5, -1.0, -1.0, -1.0) for text in warnings.of(line | {"entropy_or_noise": noise})]
    assert len(said) == 1 and "entropy 0.20 at first, -1.00 now" in said[0] and "--noise-level" in said[0]
