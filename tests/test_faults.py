"""A short campaign of faults; `python -m benchmarks.faults` is the long one."""

import random

import pytest

from benchmarks import faults

LIVES = {
    "GRPO": [("env", "SIGKILL"), ("rollout", "SIGBUS"), ("actor", "SIGSEGV")],
    "PPO": [("resource tracker", "SIGABRT"), ("launcher", "SIGSTOP")],
}


@pytest.mark.parametrize("run", LIVES)
def test_a_life_with_faults(tmp_path, monkeypatch, run):
    """An env and a rollout worker are lost, then whatever ends the run, which goes on and is ended
    again. A stopped launcher is killed when the actor has saved what it has no line of."""
    monkeypatch.setattr(faults, "BASE", f"{faults.BASE} --checkpoint-every 1")
    rng = random.Random(2)
    monkeypatch.setattr(rng, "random", lambda: 0.1)
    events = faults.live(run, tmp_path / "x", LIVES[run], rng)
    last = ("actor", "SIGKILL") if run == "GRPO" else ("fork server", "SIGSTOP")
    events += faults.live(run, tmp_path / "x", [last], rng)
    assert not any(event["wrong"] for event in events), events
    assert [(event["process"], event["signal"]) for event in events[:-1]] == LIVES[run]
    assert f"| {LIVES[run][0][0]} | " in faults.table(events)


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
