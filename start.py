"""Where training starts: which weights, vocabulary and size of pictures, and for a resumed run what
its checkpoint remembers.

Left out: reading weights (`models.build`), writing checkpoints (saving.py).
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from typing_extensions import TypedDict

import envs
import models
import recipes
from checks import Finite, Natural, Total, flag_of, read_json
from config import (
    ROOT,
    STAGE_OF,
    Config,
    completed,
    embedded_files,
    expanded,
    from_json,
    loss_of,
    run_path,
    setting,
)
from envs.states import read_states
from errors import UserError, require, understood
from models import checkpoint, untrained
from models.formats import peft
from run_folder import Line, lines_until, may_begin

SMALL_PICTURE = 64  # pixels: what a model takes that starts from random weights


class State(TypedDict, closed=True):
    """state.json of a checkpoint."""

    version: Natural
    seed: Total
    settings: NotRequired[dict]  # settings that cannot change, by name
    scale: Finite  # what the loss remembers
    lines: NotRequired[list[Line]]  # the newest of metrics.jsonl, perhaps not yet written there


def find_start(
    config: Config, simulator: envs.Simulator
) -> tuple[Config, Path | None, State | None, str]:
    """Finds weights, vocabulary and size of pictures: those given, resumed, shipped, or random.

    Returns the settings with them; the checkpoint that config.json names, by its whole path: a
    resumed run begins at another; state.json of that one; and what the user should know, in whole
    lines."""
    train = config.train
    tasks = filter(None, (train.suite, *train.tasks))
    config = completed(config, tasks=tuple(dict.fromkeys(tasks)))
    config.train = expanded(config.train)
    whole, adapter = peft.find_base(config.train.checkpoint, config.train.adapter)
    config = completed(config, checkpoint=whole, adapter=adapter)
    train = config.train
    shipped, vocabulary = embedded_files(train.model, train.env)
    has_files = models.load(train.model).FORMATS is not None
    note = ""
    if has_files and train.checkpoint is None and shipped.is_file():
        config = completed(config, checkpoint=shipped)
    elif has_files and train.checkpoint is None:
        config = with_random_weights(config, simulator)
        none = f"no checkpoint is given and none shipped for {train.env}"
        note = f"{none}: a small {train.model} of random weights starts\n"
    given = config.train.checkpoint
    found, resume = resume_from(config) if train.resume else (given, None)
    if not resume:  # whoever asks what a run began from may stand in another folder
        given = given and checkpoint.absolute(given)
        config = completed(config, adapter=adapter and adapter.absolute())
    config = completed(config, checkpoint=found)
    image_size = config.env.image_size
    if not has_files:
        config = completed(config, image_size=image_size or SMALL_PICTURE)
        return config, given, resume, note

    if resume:
        checkpoint.read_header(checkpoint.find(found))
    models.check_family(train.model, found)
    published = checkpoint.published(found)
    if not (resume and published):
        checkpoint.check_choice(train.statistics, found)
    if published and not (resume or train.recipe):
        note = recipes.note(config)
    theirs = simulator.spec(config.train.tasks, 0).picture
    image_size = image_size or checkpoint.frame_size(found, theirs)
    name = checkpoint.vocabulary(config.train.tokenizer, found, train.model, vocabulary)
    config = completed(config, image_size=image_size, tokenizer=Path(name) if name else None)
    return config, given, resume, note


def with_random_weights(config: Config, simulator: envs.Simulator) -> Config:
    """Makes a small model and its vocabulary, where no checkpoint is given or shipped."""
    image_size = config.env.image_size or SMALL_PICTURE
    spec = simulator.spec(config.train.tasks, image_size)
    spec = spec._replace(views=min(config.env.cameras or spec.views, spec.views))
    sizes = config.rollout.chunk, config.rollout.tokens or 0
    runs = ROOT / "runs"
    if not os.access(runs if runs.exists() else ROOT, os.W_OK):
        require(config.train.run, f"cannot write {runs}: give --run PATH, where you may write")
        runs = run_path(config.train.run).parent  # a checkout that all may read and nobody write
    made, words = untrained.start(runs, config.train.model, spec, spec.state_range, *sizes)
    return completed(config, image_size=image_size, checkpoint=made, tokenizer=words)


def resume_from(config: Config) -> tuple[Path, State]:
    """Returns the newest checkpoint of the run that is resumed, and its state.json. Its "lines" are
    all those of metrics.jsonl that the run goes on from."""
    run = config.train.resume
    path = run_path(run)
    nothing = f"the run {run} was stopped before it saved anything: start it with --run {run}"
    require(not may_begin(path), nothing)
    found = checkpoint.find(path).parent
    resume = read_state(found)
    # What is trained decides what the optimizer remembers. What was met, and what is held out, must
    # stay in config.json, which says nothing of before.
    for name, before in resume.get("settings", {}).items():
        was = " ".join(map(str, before)) if isinstance(before, list) else before
        was = "not given" if was == "" else was
        fixed = f"{flag_of(name)} was {was} when run {run} began: it cannot change now"
        unknown = f"cannot read {state_of(found)}: there is no setting {name!r}"
        require(name in STAGE_OF, unknown)
        now = setting(config, name)
        require((list(now) if isinstance(now, tuple) else now) == before, fixed)
    done = resume["version"]
    over = f"run {run} already has {done} iterations: give more --iterations"
    require(done < config.train.iterations, over)
    return found, resume


class Lineage(NamedTuple):
    """What is known of how weights were trained."""

    runs: list[Config]  # the settings of those that trained them, the newest first
    ends: list[Path]  # weights and adapters whose training nobody knows here


def lineage(path: Path | None, adapter: Path | None) -> Lineage:
    """Finds the run that a checkpoint is of, the one whose checkpoint that began from, and so on,
    as far as their folders are here. Untrained weights have met nothing. Raises UserError."""
    found: dict[Path, Config] = {}
    ends: dict[Path, None] = {}  # in their order
    while path is not None:
        if adapter is not None:
            ends[adapter] = None
        run = None
        with suppress(UserError):  # what a run began from may be gone by now
            run = checkpoint.run_of(path)
        if run is None or run in found or not (run / "config.json").is_file():
            if not untrained.is_name(path.name):
                ends[path] = None
            break
        found[run] = from_json(run / "config.json")
        path, adapter = found[run].train.checkpoint, found[run].train.adapter
    return Lineage(list(found.values()), list(ends))


def met_by(
    known: Lineage, simulator: envs.Simulator
) -> tuple[dict[str, frozenset[int]] | None, str]:
    """Collects the tasks of a simulator that any of these runs trained on, with their initial
    states, of which none means all. Returns them, or None where nobody knows any, and what to say
    of what nobody knows."""
    ends = " and of ".join(map(str, known.ends))
    note = f"what the training of {ends} met is not known here\n" if ends else ""
    if ends and not known.runs:
        return None, note
    met: dict[str, frozenset[int]] = {}
    for run in known.runs:
        if run.train.env != simulator.name:
            continue
        try:
            tasks = simulator.spec(run.train.tasks, 0).tasks
        except UserError as error:
            return None, f"which tasks training met is not known here: {error}\n"
        states = frozenset(read_states(run.env.train_states))
        for task in tasks:
            before = met.get(task, states)
            met[task] = states | before if states and before else frozenset()
    return met, note


def state_of(found: Path) -> str:
    """Names state.json of a checkpoint in a sentence."""
    return f"{found / 'state.json'} (remove {found} to use an older one)"


def read_state(found: Path) -> State:
    """Reads state.json of a run's checkpoint. Its "lines" become all those of metrics.jsonl that
    the run goes on from. Raises UserError."""
    what = state_of(found)
    state = read_json(found / "state.json", State, what, None)
    version = state["version"]
    other = f"cannot read {what}: its version {version} is not its folder's"
    require(found.name.isdecimal() and version == int(found.name), other)
    state["lines"] = lines_until(found.parents[1], version, state.get("lines", []))
    return state


def check_memory_of(config: Config, spec: envs.EnvSpec, model: Any, resume: dict) -> None:
    """Checks what the loss and the optimizer of a resumed run remember. Raises UserError."""
    found = Path(config.train.checkpoint)
    with understood(f"{found / 'state.json'} (remove {found} to use an older one)"):
        loss_of(config)(config, spec).load(dict(resume["scale"]))
    critic = model.critic()
    sizes = [p.shape for name, p in model.trainable().items() if name not in critic]
    sizes += [p.shape for p in critic.values()]
    checkpoint.read_optimizer(found / "optimizer.pt", sizes)
