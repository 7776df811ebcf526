"""Does every LIBERO suite that is installed build, step and draw?

    python -m benchmarks.libero_suites                    # all tasks, an hour on a core
    python -m benchmarks.libero_suites --at-most 1        # one of each suite, five minutes

Each task is built, begun at its first and its last initial state, stepped once without moving, and
drawn by both cameras. Counted are those in which all of that works, the pictures show something,
the first state differs from the last, and nothing is solved before anybody has moved. Writes a
table, and a picture with the first task of every suite.
"""

import multiprocessing
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import tyro

from envs import libero_suites
from errors import UserError, exit_on_user_error

SIZE = 128  # pixels
ACROSS = 10  # pictures in a row
RESULTS = Path(__file__).parent / "results"


@dataclass(kw_only=True)
class SuitesConfig:
    """Builds and draws LIBERO's tasks."""

    at_most: int = 0
    """tasks of each suite, the first ones; 0 means all"""
    suites: tuple[str, ...] = ()
    """none means all that are installed"""
    out: Path = RESULTS / "libero_suites.md"
    """the table; the picture lies beside it"""


def check(name: str, at_most: int) -> tuple[str, list[str], np.ndarray | None]:
    """Plays the tasks of a suite. Returns how many are right, what is wrong, and a picture."""
    from envs import libero

    libero.MOST_SCENES = 0
    spec = libero.spec((name,), SIZE)
    tasks = range(len(spec.tasks))[: at_most or None]
    env = libero.Env(spec.tasks, SIZE)
    wrong = []
    good = 0
    picture = None
    for task in tasks:
        before = len(wrong)
        try:
            seen = []
            for state in (0, -1):
                states = libero_suites.count(libero_suites.find(spec.tasks[task]).states)
                env.states = (state % states,)
                env.reset(task, 0)
                step = env.step(libero.NO_OP)
                pictures, numbers = env.observe()
                seen.append(pictures)
                dull = pictures[0].std() < 10 or pictures[1].std() < 1
                if step.success or dull or not np.isfinite(numbers).all():
                    what = "is solved at once" if step.success else "shows nothing"
                    wrong.append(f"{spec.tasks[task]} {what} at state {env.states[0]}")
            if states > 1 and np.array_equal(*seen):
                wrong.append(f"{spec.tasks[task]}: the first and the last state look alike")
            picture = seen[0][0].copy() if picture is None else picture
        except UserError as error:
            lacks = re.search(r"assets are not here \(no .*/assets/(\S+)\)", str(error))
            wrong.append(f"`{name}` lacks `{lacks[1]}`" if lacks else str(error))
        except Exception as error:  # whatever it is, other tasks go on
            said = " ".join(f"{type(error).__name__}: {error}".split())
            wrong.append(f"{spec.tasks[task]} is not built: {said}")
        good += len(wrong) == before
    env.close()
    return f"{good} of {len(tasks)}", list(dict.fromkeys(wrong)), picture


def main(config: SuitesConfig) -> None:
    found = libero_suites.installed()
    rows = [
        "| suite | package | tasks | initial states | steps | built, drawn and not yet solved |"
    ]
    rows.append("|---|---|---|---|---|---|")
    problems = []
    pictures = []
    # Not all in one process: what MuJoCo and Mesa leave behind adds up.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=8) as pool:
        for suite in config.suites or found.tasks:
            tasks = found.tasks[suite]
            counts = [libero_suites.count(task.states) for task in tasks]
            states = " or ".join(map(str, sorted(set(counts))))
            good, wrong, picture = pool.apply(check, (suite, config.at_most))
            limit = libero_suites.limit_of(suite)
            start = f"| `{suite}` | {tasks[0].package} | {len(tasks)} | {states} | {limit} "
            rows.append(f"{start}| {good} |")
            print(rows[-1], *wrong, sep="\n", flush=True)
            problems += wrong
            pictures += [] if picture is None else [picture]
            write(config, rows, problems, pictures)


def write(config: SuitesConfig, rows: list[str], problems: list[str], pictures: list) -> None:
    """Writes what is known so far."""
    missing = libero_suites.installed().missing
    command = " ".join(["python", "-m", __spec__.name, *sys.argv[1:]])
    lines = [f"Made by `{command}`.", "", *rows, "", "Not right:", ""]
    lines += [f"- {line}" for line in problems] or ["- nothing"]
    lines += ["", "Named by a package, but not playable:", ""]
    lines += [f"- `{suite}` {why}" for suite, why in sorted(missing.items())] or ["- none"]
    config.out.write_text("\n".join([*lines, ""]))
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    shown = [*pictures, *[blank] * (-len(pictures) % ACROSS)]
    across = [np.hstack(shown[i : i + ACROSS]) for i in range(0, len(shown), ACROSS)]
    if across:
        imageio.imwrite(config.out.with_suffix(".png"), np.vstack(across))


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(SuitesConfig))
