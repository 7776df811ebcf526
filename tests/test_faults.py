"""A short campaign of faults; `python -m benchmarks.faults` is the long one."""

import random

import pytest

from benchmarks import faults


def test_a_life_with_faults(tmp_path):
    """One env worker is lost, then whatever ends the run."""
    events = faults.live("GRPO", tmp_path / "x", 2, random.Random(3))
    assert len(events) == 2 and not any(event["wrong"] for event in events), events
    assert {event["process"] for event in events} & set(faults.FATAL)
    assert "| env |" in faults.table(events) or "| everything |" in faults.table(events)


def test_accounts_that_do_not_balance_are_seen(tmp_path, monkeypatch):
    line = {"trained": 4, "skipped": 0, "trained_once": 4, "discarded": 1, "collected": 5}
    line |= {"iteration": 1, "discarded_by": {"restart": 1}}
    after = line | {"iteration": 2, "trained_once": 8, "collected": 9}
    (tmp_path / "config.json").write_text('{"actor": {"update_epochs": 1}}')
    good = [line, after]
    for lines in (
        good,
        good[1:],
        [line, line],
        [line, after | {"collected": 8}],
        [line, line | after | {"trained": 5}],
    ):
        monkeypatch.setattr(faults, "lines_of", lambda folder, lines=lines: lines)
        if lines is good:
            faults.check_accounts(tmp_path)
        else:
            with pytest.raises(faults.Wrong):
                faults.check_accounts(tmp_path)
