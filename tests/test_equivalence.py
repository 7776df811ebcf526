"""The statistics of the equivalence study, on numbers whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import equivalence
from benchmarks.equivalence import MARGIN, STUDIES, bootstrap, summary, table, tost


def test_tost_by_its_interval():
    """It rejects at 5 % exactly where the 90 % Welch interval of the difference lies within the margin."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        a, b = rng.normal(0.9, 0.02, 5), rng.normal(0.9 + rng.uniform(-0.06, 0.06), 0.02, 5)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
        within = interval.low > -MARGIN and interval.high < MARGIN
        assert (tost(a, b, MARGIN) < 0.05) == within
        seen.add(within)
    assert seen == {True, False}
    assert tost(np.array([0.9, 0.9]), np.array([0.9, 0.9]), MARGIN) == 0.0 and tost(np.array([0.9]), a, MARGIN) == 1.0


def test_bootstrap_covers_the_mean():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        low, high = bootstrap(rng.normal(0.5, 0.1, 20), 1000)
        hits += low <= 0.5 <= high
    assert 85 <= hits <= 100


def result(arm: str, seed: int, final: float) -> dict:
    return {"arm": arm, "seed": seed, "flags": "", "final": final, "success_rate": [None, final], "time": [1.0, 120.0],
            "env_steps": [10, 20]}  # fmt: skip


def test_the_table_says_what_is_equivalent_and_what_is_not(tmp_path, monkeypatch):
    base, same, worse = list(STUDIES["equivalence"])[:3]
    noise = (-0.01, 0.0, 0.01, 0.005, -0.005)
    found = [result(arm, i, level + noise[i]) for arm, level in ((base, 0.9), (same, 0.905), (worse, 0.8)) for i in range(5)]
    base, alike, different = summary("equivalence", found)
    assert alike["final_equivalent"] and alike["area_equivalent"] and not different["final_equivalent"]
    assert different["final_difference"] == pytest.approx(-0.1) and base["minutes"] == 2.0
    assert "-10.0 points" in (text := table("equivalence", found)) and text.count("equivalent") == 2
    monkeypatch.setattr(equivalence, "RESULTS", tmp_path)
    equivalence.plot("equivalence", found)
    assert (tmp_path / "equivalence.png").stat().st_size > 5000
