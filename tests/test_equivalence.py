"""The statistics of the equivalence study, on numbers whose answer is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import train
from benchmarks import equivalence
from benchmarks.equivalence import STUDIES, area, summary, table
from benchmarks.seeds import MARGIN, bootstrap, holm, least_gain, tost, welch
from errors import UserError


def test_tost_by_its_interval():
    """It rejects at 5 % exactly where the 90 % Welch interval of the difference lies within the
    margin."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        a = rng.normal(0.9, 0.02, 5)
        b = rng.normal(0.9 + rng.uniform(-0.06, 0.06), 0.02, 5)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
        within = interval.low > -MARGIN and interval.high < MARGIN
        assert (tost(a, b, MARGIN) < 0.05) == within
        seen.add(within)
    assert seen == {True, False}
    same = np.array([0.9, 0.9])
    assert (
        tost(same, same, MARGIN) == tost(np.array([0.9]), a, MARGIN) == 1.0
    )  # nothing is known of how much seeds vary


@pytest.mark.parametrize(
    "deviation, digits", [(0.1, 9), (0.02, 2)]
)  # and in whole points, as of 100 episodes
def test_intervals_cover_the_mean_at_five_seeds(deviation, digits):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = bootstrap(rng.normal(0.5, deviation, 5).round(digits), 1000)
        hits += low <= 0.5 <= high
    assert 0.9 <= hits / 300 <= 0.99
    assert np.isnan(bootstrap(np.array([0.5, 0.6, 0.7, 0.8]))).all() and bootstrap(
        np.full(5, 0.5)
    ) == (0.5, 0.5)
    assert bootstrap(np.array([0.0, 0.1, 0.9, 1.0, 1.0]))[1] == 1.0


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm(p):
    """Against its definition: the smallest level at which stepping down rejects it."""
    for mine, corrected in zip(p, holm(p), strict=True):
        steps = [(len(p) - rank) * q for rank, q in enumerate(sorted(p)) if q <= mine]
        assert corrected == pytest.approx(min(1.0, max(steps)))


def test_lag_does_not_count_as_slow_learning():
    """Versions that play equally well, met later: the same area, though training's own success is
    lower throughout."""
    play = np.linspace(0.4, 0.9, 40)
    late = [max(0, i - 5) for i in range(40)]
    rows = [
        {
            "time": list(range(40)),
            "staleness_mean": [float(i - v) for i, v in enumerate(acted)],
            "success_rate": list(play[acted]),
        }
        for acted in (list(range(40)), late)
    ]
    assert area(rows[0]) == pytest.approx(area(rows[1])) == pytest.approx(play[:32].mean())
    rows[1]["success_rate"][7] = None  # no episode ended: between its neighbours
    assert area(rows[1]) == pytest.approx(area(rows[0]))


def test_corrections_are_compared_with_what_auto_takes_at_their_staleness(tmp_path, monkeypatch):
    """On made-up runs, of unequal numbers of seeds; the study goes through staleness 4, 8, 2 within
    each seed, skips what is there, and reads its baselines where the first study left them."""
    monkeypatch.setattr(equivalence, "RESULTS", tmp_path)
    noise = (-0.01, 0.0, 0.01, 0.005, -0.005)
    level = {"synchronous": 0.9, "staleness 4": 0.5, "staleness 4, exact": 0.8, "staleness 2": 0.7}
    first = [result(arm, i + 1, x + noise[i]) for arm, x in level.items() for i in range(5)]
    first.append(result("staleness 1", 1, 0.9))  # no baseline
    (tmp_path / "equivalence.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))

    monkeypatch.setattr(equivalence, "one_run", made_up)
    config = equivalence.EquivalenceConfig(
        what="run", study="corrections", seeds=3, results=tmp_path / "elsewhere"
    )
    raw = equivalence.file("corrections", "jsonl", config.results)
    assert raw == tmp_path / "elsewhere" / "corrections.jsonl"
    raw.parent.mkdir()
    raw.write_text(json.dumps(made_up("corrections", "staleness 4, icepop", 1, "")) + "\n")
    equivalence.run(config)
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    ran = [(row["arm"], row["seed"]) for row in lines]
    assert len(ran) == len(set(ran)) == 3 * len(STUDIES["corrections"]) == 39
    assert [seed for _, seed in ran[13:]] == [2] * 13 + [3] * 13
    assert [arm[10] for arm, _ in ran[13:26]] == list("4444888822222")

    raw.write_text(raw.read_text().rsplit("\n", 3)[0] + "\n")  # the last two runs are missing
    equivalence.main(
        equivalence.EquivalenceConfig(
            what="analyse", study="corrections", results=tmp_path / "elsewhere"
        )
    )
    found = equivalence.rows("corrections", "", config.results)
    of = {row["arm"]: row for row in summary("corrections", found)}
    assert "staleness 1" not in of and of["staleness 2, gipo"]["seeds"] == 2
    assert of["staleness 4, gipo"]["final_gain"] == pytest.approx(0.1, abs=0.01)  # 0.9 and 0.8
    assert of["staleness 4, gipo"]["final_gain_p"] < 0.05
    assert of["staleness 4, m2po"]["final_gain_p"] > 0.05
    for arm, gain in (("exact", 0.1), ("m2po", 0.1), ("gipo", 0.2)):  # from 0.7, interpolated
        assert of[f"staleness 2, {arm}"]["final_gain"] == pytest.approx(gain, abs=0.01)
    for lag in ("staleness 2", "staleness 4"):  # corrected among the arms of one staleness
        mine = [row for arm, row in of.items() if arm.startswith(lag) and "area_gain" in row]
        assert [row["area_gain_holm_p"] for row in mine] == holm([r["area_gain_p"] for r in mine])
        assert len(mine) == {"staleness 2": 5, "staleness 4": 4}[lag]
    assert "final_gain" not in of["staleness 8, gipo"]  # no exact arm at 8 was made up
    assert "final_difference" not in of["staleness 4, exact"]  # the first study's business
    text = (tmp_path / "elsewhere" / "corrections.md").read_text()
    assert ": better |" not in text and "| 3.0% |" in text  # there are three seeds
    assert "Staleness 2: seeds of the reference, 'staleness 2', differ by 0.8 points" in text
    assert "with 5 seeds and 5 arms" in text and "Staleness 8" not in text
    assert (tmp_path / "elsewhere" / "corrections.png").stat().st_size > 5000


def test_a_candidate_s_new_seeds_are_compared_among_themselves(tmp_path, monkeypatch):
    """Baselines in the folder of the results come before those of the first study."""
    monkeypatch.setattr(equivalence, "RESULTS", tmp_path)
    monkeypatch.setattr(equivalence, "one_run", made_up)
    new = tmp_path / "new"
    base, candidate = "staleness 4, exact", "staleness 4, gipo"
    for seeds, folder in ((1, tmp_path), (6, new)):
        for study, arm in (("equivalence", base), ("corrections", candidate)):
            equivalence.run(
                equivalence.EquivalenceConfig(
                    what="run", study=study, first=seeds, arms=(arm,), results=folder
                )
            )
    for folder, seeds in ((tmp_path, range(1, 6)), (new, range(6, 11))):
        found = equivalence.rows("corrections", "", folder)
        assert {row["seed"] for row in found} == set(seeds) and len(found) == 10
    of = {row["arm"]: row for row in summary("corrections", found)}
    assert of[candidate]["area_gain_holm_p"] == of[candidate]["area_gain_p"] < 0.05  # one arm
    assert ": better |" in equivalence.table("corrections", found)


@pytest.mark.parametrize("level", [0.81, 0.83, 0.94, 0.98])
def test_equal_seeds_tell_nothing_whatever_their_mean_is_rounded_to(level):
    equal = np.full(5, level)
    for values, base in ((equal, equal - 0.3), (equal, np.linspace(0.4, 0.6, 5)), (equal, equal)):
        assert welch(values, base) == welch(base, values) == 1.0
        assert tost(values, base, 0.05) == 1.0


@pytest.mark.parametrize("arms, level", [(1, "not shown"), (2, "better")])
def test_the_area_decides_and_final_success_only_must_not_be_worse(arms, level):
    row = {"area_gain": 0.04, "area_gain_p": 0.03, "area_gain_holm_p": 0.06 / arms, "gain_seeds": 5}
    assert equivalence.gain_cell(row, "area").endswith(f": {level}")
    assert equivalence.gain_cell(row | {"gain_seeds": 4}, "area").endswith(f"0.030, {0.06 / arms}0")
    for gain, verdict in ((0.04, "not shown to be worse"), (-0.04, "worse")):
        row = {"final_gain": gain, "final_gain_p": 0.03, "gain_seeds": 5}
        assert equivalence.gain_cell(row, "final").endswith(f", 0.030: {verdict}")
    doubtful = equivalence.gain_cell(row | {"final_gain_p": 0.06}, "final")
    assert doubtful.endswith("0.060: not shown to be worse")


@pytest.mark.parametrize("arms", [1, 4])
def test_the_least_gain_that_is_seen(arms):
    """Against the power of Student's t-test, which Welch's nears where spreads are equal."""
    least = least_gain(0.02, 5, arms)
    critical = stats.t.ppf(1 - 0.025 / arms, 8)
    shift = least / (0.02 * (2 / 5) ** 0.5)
    power = stats.nct.sf(critical, 8, shift) + stats.nct.cdf(-critical, 8, shift)
    assert power == pytest.approx(0.82, abs=0.03)  # Welch's has fewer degrees of freedom


def made_up(study: str, arm: str, seed: int, flags: str) -> dict:
    level = 0.9 if arm.endswith("gipo") else 0.8
    return result(arm, seed, level + 0.001 * seed) | {"masked_fraction": [0.0, 0.06]}


def result(arm: str, seed: int, final: float) -> dict:
    return {
        "arm": arm,
        "seed": seed,
        "flags": "",
        "final": final,
        "success_rate": [None, final],
        "time": [1.0, 120.0],
        "env_steps": [10, 20],
        "staleness_mean": [0.0, 0.5],
        "staleness_max": [0, 1],
        "masked_fraction": [0.0, 0.0],
    }


def test_the_table_says_what_is_equivalent_and_what_is_not(tmp_path, monkeypatch):
    base, same, worse = list(STUDIES["equivalence"])[:3]
    noise = (-0.01, 0.0, 0.01, 0.005, -0.005)
    found = [
        result(arm, i, level + noise[i])
        for arm, level in ((base, 0.9), (same, 0.905), (worse, 0.8))
        for i in range(5)
    ]
    base, alike, different = summary("equivalence", found)
    assert (
        alike["final_equivalent"] and alike["area_equivalent"] and not different["final_equivalent"]
    )
    assert different["final_difference"] == pytest.approx(-0.1) and base["minutes"] == 2.0
    assert (
        "-10.0 points" in (text := table("equivalence", found))
        and text.count(": equivalent") == 2
        and "| 0.2, 1 |" in text
    )
    assert "100% of studies with 5 seeds, and in 80% with 5" in text
    monkeypatch.setattr(equivalence, "RESULTS", tmp_path)
    equivalence.plot("equivalence", found)
    assert (tmp_path / "equivalence.png").stat().st_size > 5000

    # A figure that was not reached is no figure.
    for one in found:
        one["final"] += 0.3 * (one["seed"] - 3)
    assert "and in 80% with more than 40" in table("equivalence", found)


def test_every_arm_is_a_command():
    for study in STUDIES.values():
        for flags in study.values():
            train.parse([*flags.split(), "--eval-every", "0"])


def test_results_that_cannot_be_compared_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(equivalence, "RESULTS", tmp_path)
    one = result("PPO", 1, 0.9)
    other = result("PPO", 2, 0.9) | {"flags": "--iterations 3"}
    raw = tmp_path / "algorithms.jsonl"
    raw.write_text(f"{json.dumps(one)}\n{json.dumps(other)}\n")
    assert equivalence.rows("algorithms", "") == [one] and equivalence.rows(
        "algorithms", "--iterations 3"
    ) == [other]
    for wrong in (one, result("PPO", 2, 0.9) | {"time": [1.0]}):
        raw.write_text(f"{json.dumps(one)}\n{json.dumps(wrong)}\n")
        with pytest.raises(UserError, match="twice, or runs of different length"):
            equivalence.rows("algorithms", "")
