"""Which fixed initial states training begins at, and which evaluation, of a simulator that has some
(LIBERO). All for both is the published protocol; a split shows what is memorised.
"""

from collections.abc import Mapping
from itertools import pairwise

from envs import EnvSpec
from errors import require


def read_states(text: str) -> tuple[int, ...]:
    """Reads ranges such as 0-9,20-29, whose ends count. Raises UserError."""
    numbers: set[int] = set()
    wrong = f"{text!r} names no initial states: give ranges such as 0-39 or 0-9,20-49"
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        right = first.isdecimal() and (last.isdecimal() or not dash)
        require(right and int(first) <= int(last or first) < 10**6, wrong)
        numbers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def say_states(states: tuple[int, ...]) -> str:
    """Says what `read_states` reads, as shortly as can be."""
    starts = [b for a, b in pairwise((-2, *states)) if b != a + 1]
    ends = [a for a, b in pairwise((*states, 10**7)) if b != a + 1]
    pairs = zip(starts, ends, strict=True)
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in pairs)


def split(env: str, spec: EnvSpec, train: str, evaluation: str) -> tuple[str, str, str]:
    """Decides which initial states are trained on and evaluated on, of which each may be given.

    Returns both as flags, and what to say; all three are empty where none is given, which means all
    for both. Raises UserError."""
    if not train and not evaluation:
        return "", "", ""
    given = {"--train-states": read_states(train), "--eval-states": read_states(evaluation)}
    flags = " and ".join(flag for flag, states in given.items() if states)
    drawn = (
        f"{env} has no fixed initial states: it draws each episode's from the seed, so leave out"
    )
    require(spec.states, f"{drawn} {flags}")
    every = tuple(range(spec.states))
    for flag, states in given.items():
        beyond = f"{flag} {say_states(states)} is out of range: each task has the initial states"
        require(set(states) <= set(every), f"{beyond} {say_states(every)}")
    trained, evaluated = given.values()
    rest = tuple(state for state in every if state not in {*trained, *evaluated})
    trained = trained or rest
    evaluated = evaluated or rest
    other = "evaluation" if trained else "training"
    none = f"{flags} leaves none of the {spec.states} initial states to {other}"
    require(trained and evaluated, none)
    both = tuple(state for state in trained if state in set(evaluated))
    note = f"of {spec.states} initial states, training meets {say_states(trained)}, evaluation "
    note += say_states(evaluated) + (f" (trained on, too: {say_states(both)})" if both else "")
    return say_states(trained), say_states(evaluated), note + "\n"


def states_met(met: Mapping[str, frozenset[int]], spec: EnvSpec) -> tuple[int, ...]:
    """Lists the initial states that any of these tasks was trained on.

    met: those of each task that was; none means all."""
    every = range(spec.states)
    sets = [met[task] or frozenset(every) for task in spec.tasks if task in met]
    return tuple(state for state in every if any(state in states for states in sets))


def repeats(episodes: int, spec: EnvSpec, states: str) -> str:
    """Says in a line where episodes begin at one state more than once: they tell less than as many
    independent ones, as which an interval counts them.

    states: as `read_states` reads them; none means all."""
    beginnings = len(spec.tasks) * (len(read_states(states)) or spec.states)
    if not 0 < beginnings < episodes:
        return ""
    often = f"{beginnings} beginnings, each up to {-(-episodes // beginnings)} times"
    return f"{episodes} episodes have {often}: intervals count them as independent\n"
