"""What honest evaluation plays: a suite on the initial states that were trained on, on those that
were not, and every perturbation of it (`evaluate.py --perturbed`). Left out: playing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from envs import EnvSpec, Simulator
from envs.states import read_states, say_states, split
from errors import require
from pictures import BLUE, ORANGE


class Part(NamedTuple):
    """Episodes that one row sums up."""

    title: str
    spec: EnvSpec
    states: tuple[int, ...] = ()  # that they begin at; none means all
    note: str = ""  # why there are none

    def beginnings(self) -> int:
        """Counts the different ones that its episodes may have."""
        return len(self.spec.tasks) * (len(self.states) or self.spec.states)


class Training(NamedTuple):
    """What is known of how a policy was trained."""

    tasks: frozenset[str] | None  # None: of another project's, which may be any
    train_states: str = ""
    eval_states: str = ""

    def met(self, spec: EnvSpec) -> bool:
        return self.tasks is None or bool(self.tasks & set(spec.tasks))


def states_of(
    env: str, spec: EnvSpec, training: Training, train: str, evaluation: str
) -> tuple[str, str]:
    """Decides which initial states of these tasks were trained on and which are to be played, as
    flags; empty means all. Flags come first, then the training's, if it met these tasks."""
    if training.met(spec):
        train = train or training.train_states
        evaluation = evaluation or training.eval_states
    if evaluation and not train and spec.states:
        train = f"0-{spec.states - 1}"
    return split(env, spec, train, evaluation)[:2]


def parts(
    simulator: Simulator,
    suite: str,
    seen: Callable[[EnvSpec], EnvSpec],
    training: Training,
    train: str,
    evaluation: str,
) -> tuple[list[Part], dict[str, str]]:
    """Lists what is to be played, and what is not: name → why. Raises UserError where the suite has
    no perturbations.

    seen: describes tasks as the policy sees them. train, evaluation: flags of initial states."""
    listed = simulator.perturbed(suite)
    which = "--perturbed is for a suite with perturbations, such as libero_10"
    require(listed, f"{which}: {suite} has none here")
    spec = seen(simulator.spec((suite,), 0))
    found = states_of(simulator.name, spec, training, train, evaluation)
    every = tuple(range(spec.states))
    trained, evaluated = (read_states(states) or every for states in found)
    held_out = tuple(state for state in evaluated if state not in set(trained))
    made = [Part(f"{suite}, not trained on", spec, evaluated)]
    if training.met(spec):
        met = f"all of {spec.states}" if trained == every else say_states(evaluated)
        made = [
            Part(f"{suite}, trained states {say_states(trained)}", spec, trained),
            Part(f"{suite}, held-out states {say_states(held_out)}".strip(), spec, held_out)
            if held_out
            else Part(f"{suite}, held-out states", spec, note=f"none: training met {met}"),
        ]
    for name in sorted(name for name, why in listed.items() if not why):
        spec = seen(simulator.spec((name,), 0))
        known = training.tasks is not None and training.met(spec)
        made.append(Part(f"{name}, trained on" if known else name, spec))
    return made, {name: why for name, why in listed.items() if why}


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
