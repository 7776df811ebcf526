"""What honest evaluation plays: a suite on the initial states that were trained on, on those that
were not, and every perturbation of it (`evaluate.py --perturbed`). Left out: playing.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from envs import EnvSpec, Simulator
from envs.states import read_states, say_states, split, states_met
from errors import require
from pictures import BLUE, ORANGE


class Part(NamedTuple):
    """Episodes that one row sums up."""

    title: str
    spec: EnvSpec
    states: tuple[int, ...] = ()  # that they begin at; none means all
    note: str = ""  # why there are none

    def chosen(self, episodes: int, seed: int) -> tuple["Part", list[tuple[int, int]]]:
        """Chooses the task and the initial state of so many episodes, spread over this part.

        No pair of task and state comes twice, so there may be fewer. Seed 1 begins where seed 0
        ended. Returns the part with the states that are used, and (task, index into those states)
        of each episode."""
        tasks = spread(range(len(self.spec.tasks)))
        states = spread(self.states or range(self.spec.states))
        count = min(episodes, len(tasks) * len(states))
        turns = [divmod(number, len(tasks)) for number in range(seed * count, (seed + 1) * count)]
        pairs = [(tasks[at], states[(at + turn) % len(states)]) for turn, at in turns]
        met = tuple(sorted({state for _, state in pairs}))
        return self._replace(states=met), [(task, met.index(state)) for task, state in pairs]


def spread(items: Sequence[int]) -> list[int]:
    """Orders items so that any few in a row are spread over all (steps of the golden ratio)."""
    golden = (math.sqrt(5) - 1) / 2
    return [items[i] for i in sorted(range(len(items)), key=lambda i: i * golden % 1)]


class Training(NamedTuple):
    """What is known of how a policy was trained."""

    # Task → the initial states that training met; no states mean all of them. None instead of a
    # dictionary: another project's checkpoint, which may have met anything.
    met: dict[str, frozenset[int]] | None
    eval_states: str = ""
    partly: bool = False  # some earlier weights have an unknown past, so it may have met more

    def tasks_of(self, spec: EnvSpec) -> tuple[str, ...]:
        """Lists those that were trained on, or may have been."""
        met = spec.tasks if self.met is None else self.met
        return tuple(task for task in spec.tasks if task in met)

    def says(self, spec: EnvSpec, train: str, given: str) -> str:
        """Says which initial states training met. given: the flag, for who knows better."""
        tasks = self.tasks_of(spec)
        if not tasks:
            return f"not trained on{self.as_far(', ')}"
        if self.met is None and not given:
            return "nobody knows which were trained on"
        few = len(tasks) < len(spec.tasks)
        said = f"training met {train}" + (f" of {share(tasks, spec)}" if few else "")
        return said if given else said + self.as_far(", ")

    def as_far(self, before: str) -> str:
        """Says that something was not trained on only as far as is known, where that is so."""
        return f"{before}as far as known" if self.partly else ""


def share(tasks: tuple[str, ...], spec: EnvSpec) -> str:
    return f"{len(tasks)} of {len(spec.tasks)} tasks"


def states_of(
    env: str, spec: EnvSpec, training: Training, train: str, evaluation: str
) -> tuple[str, str]:
    """Decides which initial states of these tasks were trained on and which are to be played, as
    flags; empty means all. Flags come first, then the training's, if it met any of these tasks.
    Raises UserError."""
    if training.tasks_of(spec) and spec.states:
        if training.eval_states and not evaluation:
            there = [state for state in read_states(training.eval_states) if state < spec.states]
            other = f"the run was evaluated on initial states {training.eval_states}, and these"
            require(there, f"{other} tasks have 0-{spec.states - 1} alone: give --eval-states")
            evaluation = say_states(tuple(there))
        met = range(spec.states) if training.met is None else states_met(training.met, spec)
        if evaluation or len(met) < spec.states:
            train = train or say_states(tuple(met))
    if evaluation and not train and spec.states:
        train = f"0-{spec.states - 1}"
    return split(env, spec, train, evaluation)[:2]


def check_suite(simulator: Simulator, tasks: tuple[str, ...]) -> dict[str, str]:
    """Lists the perturbations of the one suite that is to be played: name → why it cannot be
    played, or "". Raises UserError where it is not one, or has none."""
    require(len(tasks) == 1, "--perturbed is for one suite: give --suite, without --tasks")
    listed = simulator.perturbed(tasks[0])
    which = "--perturbed is for a suite with perturbations, such as libero_10"
    require(listed, f"{which}: {tasks[0]} has none here")
    return listed


def parts(
    simulator: Simulator, suite: str, training: Training, train: str, evaluation: str
) -> list[Part]:
    """Lists what is to be played. train, evaluation: flags of initial states. Raises UserError."""
    # The suite itself: tasks that were trained on, then those that were not.
    spec = simulator.spec((suite,), 0)
    known = training.tasks_of(spec)
    others = tuple(task for task in spec.tasks if task not in known)
    made = []
    if known:
        name = f"{suite} ({share(known, spec)})" if others else suite
        made += trained_parts(name, simulator, known, training, train, evaluation)
    if others:
        name = f"{suite} ({share(others, spec)})" if known else suite
        rest = simulator.spec(others, 0)
        found = states_of(simulator.name, rest, training, train, evaluation)[1]
        title = f"{name}, not trained on{training.as_far(' ')}"
        made.append(Part(title, rest, read_states(found)))

    # Every perturbation that can be played here.
    for name, why in sorted(simulator.perturbed(suite).items()):
        if why:
            continue
        spec = simulator.spec((name,), 0)
        known = training.tasks_of(spec) if training.met is not None else ()
        title = name
        if known:
            some = "" if len(known) == len(spec.tasks) else f"{share(known, spec)} "
            title += f", {some}trained on" + (training.as_far(" ") if some else "")
        # Begin at --eval-states where they are given; a part that has none of them is not played.
        given = read_states(evaluation)
        states = tuple(state for state in given if state < spec.states)
        none = f"none: its initial states are 0-{spec.states - 1}, and --eval-states {evaluation}"
        made.append(Part(title, spec, states, none if given and not states else ""))
    return made


def trained_parts(
    name: str,
    simulator: Simulator,
    tasks: tuple[str, ...],
    training: Training,
    train: str,
    evaluation: str,
) -> list[Part]:
    """Lists the states that these tasks were trained on, or may have been, and those held out.
    Raises UserError where the flag leaves none of these."""
    spec = simulator.spec(tasks, 0)
    every = tuple(range(spec.states))
    found = states_of(simulator.name, spec, training, train, evaluation)
    trained, evaluated = (read_states(states) or every for states in found)
    unknown = training.met is None and not train
    if unknown:
        title = f"{name}, states {say_states(trained)} (taken as trained on)"
    else:
        title = f"{name}, trained states {say_states(trained)}"
    made = [Part(title, spec, trained)]
    rest = tuple(state for state in every if state not in set(trained))
    held_out = tuple(state for state in evaluated if state in rest)
    why = f"training met {say_states(trained)}: give others"
    if unknown:
        why = "nobody knows what training met: give --train-states, too"
    none = f"--eval-states {evaluation} has no initial state that was held out, for {why}"
    require(held_out or not evaluation, f"{none}, or leave it out")
    held_out = held_out or rest
    title = f"{name}, held-out states"
    if held_out:
        far = "" if train else training.as_far(" ")
        made.append(Part(f"{title} {say_states(held_out)}{far}", spec, held_out))
    elif unknown:
        made.append(Part(title, spec, note="none known: --train-states says what training met"))
    else:
        made.append(Part(title, spec, note=f"none: training met all of {spec.states}"))
    return made


def draw(file: Path, rows: list[dict], title: str) -> None:
    """Draws success as bars with their 95 % intervals."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if "note" not in row]
    rates = np.array([row["success_rate"] for row in shown])
    ends = np.array([(row["low"], row["high"]) for row in shown])
    colours = [BLUE if " states " in row["task"] else ORANGE for row in shown]
    axes = Figure(figsize=(8, 1.2 + 0.3 * len(shown)), layout="constrained").subplots()
    axes.barh([row["task"] for row in shown], rates, color=colours)
    axes.errorbar(rates, range(len(shown)), xerr=abs(ends.T - rates), fmt="none", ecolor="black")
    axes.invert_yaxis()
    axes.set(xlabel="success rate, with 95 % intervals", xlim=(0, 1), title=title)
    axes.grid(alpha=0.3, axis="x")
    axes.figure.savefig(file, dpi=110)
