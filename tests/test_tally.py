"""What is added to a batch's tally, and the line of metrics.jsonl that it makes."""

import pytest
import torch

from config import Config
from tally import Tally

BATCH = 8
SEGMENT = 5
TASKS = ("push", "reach", "dunk")


def test_numbers_are_kept_by_name_and_nowhere_registered():
    tally = Tally()
    for value in (1.0, torch.tensor(2.0), torch.tensor(3)):
        tally.add("anything", value)
        tally.add("largest", value, "max")
        tally.add("fact", value, per="batch")
    tally.first_epoch = False
    tally.add("anything", 10.0)
    tally.add("largest", 2.0, "max")
    tally.add("fact", 100.0, per="batch")  # it was counted in the first epoch
    assert tally.values == {"anything": 16.0, "largest": 3.0, "fact": 6.0}
    assert tally.get("anything") == 16.0 and tally.get("never") == 0.0


def test_a_maximum_may_be_negative():
    tally = Tally()
    tally.add("depth", -3.0, "max")
    tally.add("depth", -2.0, "max")
    assert tally.values == {"depth": -2.0}


def test_merging_keeps_how_a_name_is_to_be_taken():
    mine = Tally(values={"a": 1.0, "m": 1.0}, how={"a": "sum", "m": "max"})
    other = Tally(values={"m": 4.0, "b": 2.0}, how={"m": "max", "b": "mean"})
    other.first_epoch = False
    mine.merge(other)
    assert mine.values == {"a": 1.0, "m": 4.0, "b": 2.0}
    assert mine.how == {"a": "sum", "m": "max", "b": "mean"}


def whole_batch() -> Tally:
    """Two epochs over a batch of `BATCH` trajectories, whose chunk steps are all trained."""
    tally = Tally()
    samples = 2.0 * BATCH * SEGMENT
    means = ("loss_policy", "loss_value", "entropy_or_noise", "approx_kl", "clip_fraction")
    for name in (*means, "masked_fraction", "staleness_mean"):
        tally.add(name, samples, "mean")
    tally.add("trained", samples)
    tally.add("trained_once", samples / 2)
    tally.add("skipped", 0)
    tally.add("filtered", 0)
    tally.add("ratio_max", 1.5, "max")
    tally.add("staleness_max", 2.0, "max")
    for name, norm in (("", 0.5), ("_policy", 0.4), ("_value", 0.3)):
        tally.add(f"grad_norm{name}", norm, "max")
    parts = {"reward_sum": 4.0, "restart": 3, "after_end": 2}
    parts |= {"samples_at_1": samples, "kl_at_1": 0.5 * samples, "ratio_at_1": 2.0 * samples}
    # Of the first epoch: half of the variance is left.
    parts |= {"returns": 0.0, "returns_square": samples}
    parts |= {"error": 0.0, "error_square": 0.5 * samples}
    parts |= {"episodes_0": 6, "successes_0": 6, "episodes_1": 2, "successes_1": 0}
    parts |= {"trajectories_0": 5, "trajectories_1": 3}
    for name, value in parts.items():
        tally.add(name, value, "part")
    return tally


def test_a_line_is_per_chunk_step():
    config = Config()
    config.actor.batch = BATCH
    config.actor.update_epochs = 2
    line = whole_batch().line(7, config, TASKS)
    means = ("loss_policy", "loss_value", "entropy_or_noise", "approx_kl", "clip_fraction")
    assert all(line[name] == 1.0 for name in (*means, "masked_fraction", "staleness_mean"))
    assert line["masked"] == 2 * BATCH * SEGMENT
    assert (line["success_push"], line["success_reach"]) == (1.0, 0.0)
    assert "success_dunk" not in line
    assert (line["kl_at_1"], line["ratio_at_1"], "kl_at_0" in line) == (0.5, 2.0, False)
    assert line["staleness_hist"] == {"1": 2 * BATCH * SEGMENT}
    assert line["explained_variance"] == 0.5
    norms = [line[name] for name in ("grad_norm", "grad_norm_policy", "grad_norm_value")]
    assert norms == [0.5, 0.4, 0.3]
    # The mean over tasks, whatever their number of episodes.
    assert (line["success_rate"], line["reward"], line["episodes"]) == (0.5, 0.5, 8)
    assert line["trajectories_per_task"] == {"push": 5, "reach": 3, "dunk": 0}
    assert line["episodes_per_task"] == {"push": 6, "reach": 2, "dunk": 0}
    assert (line["iteration"], line["version"], line["staleness_max"]) == (7, 7, 2)
    assert (line["reuse"], line["ratio_max"]) == (2.0, 1.5)
    assert (line["trained"], line["trained_once"]) == (2 * BATCH * SEGMENT, BATCH * SEGMENT)
    assert line["discarded_by"] == {"restart": 3, "filtered": 0, "undrawn": 0, "after_end": 2}
    whole = ("trained", "trained_once", "filtered", "skipped", "masked", "staleness_max")
    assert all(type(line[name]) is int for name in (*whole, "episodes", "version"))


def test_a_line_holds_what_a_loss_names_and_not_the_parts_it_is_made_of():
    tally = whole_batch()
    tally.add("surprise", 8.0 * BATCH * SEGMENT, "mean")
    tally.add("largest_surprise", 3.5, "max")
    line = tally.line(7, Config(), TASKS)
    assert (line["surprise"], line["largest_surprise"]) == (4.0, 3.5)
    parts = {name for name, how in tally.how.items() if how == "part"}
    assert parts & set(line) == {"kl_at_1", "ratio_at_1"}  # these are divided


def test_without_an_episode_s_end_there_is_no_success_rate():
    tally = whole_batch()
    tally.values |= {"episodes_0": 0.0, "episodes_1": 0.0}
    line = tally.line(7, Config(), TASKS)
    assert line["success_rate"] is None and line["episodes"] == 0
    assert not any(name.startswith("success_") for name in line if name != "success_rate")


def test_a_batch_whose_groups_were_all_filtered_has_a_line_too():
    tally = Tally()
    for name in ("trained", "trained_once"):
        tally.add(name, torch.tensor(0))
    tally.add("filtered", torch.tensor(40))
    config = Config()
    config.actor.batch = BATCH
    line = tally.line(1, config, TASKS)
    zero = ("loss_policy", "loss_value", "approx_kl", "clip_fraction", "masked_fraction", "reuse")
    zero += ("ratio_max", "staleness_mean", "staleness_max", "trained", "trained_once", "skipped")
    assert all(line[name] == 0 for name in zero)
    assert line["filtered"] == line["discarded_by"]["filtered"] == 40
    assert line["filtered_fraction"] == pytest.approx(40 / 41)
    assert line["entropy_or_noise"] is None and line["staleness_hist"] == {}
    assert "explained_variance" not in line
