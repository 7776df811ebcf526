"""Measures the success rate of a checkpoint, with a 95 % interval per task, and films each task.

    python evaluate.py --checkpoint runs/NAME --episodes 100

The policy acts without exploration (a flow by its ODE, tokens by the likeliest bin). Episodes use
the evaluation seeds, which neither training nor the demonstrations ever draw. Left out: running it
on several processes.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from pydantic import Field

import envs
import machine
import models
from checks import Count, Length, Natural, Positive, check_ranges, check_writable
from config import Config, Family, embedded_files, expanded
from envs import EnvSpec
from envs.states import read_states, repeats, say_states
from errors import UserError, exit_on_user_error, place_of, require
from evaluation import EVAL_SEEDS
from films import file_name, write_video
from metrics import wilson
from models import checkpoint, contract
from models.formats import peft
from perturbed import Part, Training, check_suite, draw, parts, states_of
from processes import keep_freed_memory
from start import lineage, met_by

ABREAST = 8  # episodes that are played at the same time, in one batch of inference


@dataclass(kw_only=True)
class EvaluateConfig:
    """Success rate of a checkpoint, per task, with videos."""

    checkpoint: Path | None = None
    """a file, a checkpoint or run folder, or another project's; none means Meta-World's shipped"""
    adapter: Path | None = None
    """a folder of PEFT's, whose low-rank adapter is put on the checkpoint"""
    model: Family | None = None
    """family of another project's checkpoint; ours say it themselves"""
    chunk: Positive | None = None
    """actions executed per inference (10), of another project's checkpoint; ours say it
    themselves"""
    statistics: str = ""
    """of another project's checkpoint: OFT's unnorm key, GR00T's embodiment tag, π's folder"""
    image_size: Annotated[int, Field(ge=0, le=4096)] = 0
    """pixels of the cameras; 0 means as in the run, else as the model takes them (of another
    project's: its data's own size in this simulator)"""
    cameras: Natural = 0
    """cameras whose pictures the policy sees, the simulator's first ones; 0 means as in the run,
    else as many as the checkpoint was trained with"""
    tokens: Length | None = None
    """prompt length in tokens; none means as the checkpoint says"""
    horizon: Length | None = None
    """actions that the model predicts at once, where another project's checkpoint does not say"""
    denoise_steps: Count | None = None
    """flow-matching steps; none means as the checkpoint says"""
    center_crop: bool | None = None
    """OFT sees the middle 0.9 of a picture; none means as the checkpoint says"""
    precision: Literal["float32", "bfloat16"] | None = None
    """what the network computes in, but for a frozen VLM, which is as a checkpoint of ours says;
    none means as in the run, else bfloat16 on a GPU"""
    stop_token: bool | None = None
    """</s> stands after OFT's action tokens; none means as the checkpoint says"""
    env: str = ""
    """simulator; none means the run's, else metaworld"""
    tasks: tuple[str, ...] = ()
    """tasks; none means those of the run, else the simulator's default task set"""
    suite: str = ""
    """a suite of the simulator (libero_10, …): all of its tasks, beside --tasks"""
    render_quality: Literal["fast", "full"] | None = None
    """none means as in the run, else fast"""
    episodes: Annotated[int, Field(ge=1, le=10**6)] = 100
    """episodes, spread evenly over tasks"""
    seed: Natural = 0
    """which episodes: those of seed 1 follow on those of seed 0 (LIBERO has 50 per task)"""
    train_states: str = ""
    """which of LIBERO's initial states were trained on, such as 0-39 or 0-9,20-49; empty means as
    in the run, else all"""
    eval_states: str = ""
    """which ones episodes begin at; empty means as in the run, else those that --train-states
    leaves, or without it all. With --perturbed some of them must be held out"""
    perturbed: bool = False
    """of a suite of LIBERO: play --episodes on the states that were trained on, on those that were
    not, and on every perturbation that is installed"""
    tokenizer: Path | None = None
    """SentencePiece file (gr00t: Qwen's vocabulary); none means the run's, or the embedded one"""
    videos: Path | None = None
    """folder for videos; by default videos/VERSION beside the checkpoints of a run, else
    ./videos"""
    json: Path | None = None
    """also write the result to this file, anew whenever episodes have ended"""


@dataclass
class Episode:
    """An episode that is played, and its outcome."""

    number: int
    task: int
    env: object  # the simulator that plays it
    steps: int = 0  # control steps so far
    success: bool | None = None  # None while it goes on
    broke: bool = False  # the simulation became unstable
    # Its film, until that is written; only of a task's first one.
    frames: list[np.ndarray] = field(default_factory=list)

    @contextlib.contextmanager
    def fails_if_unstable(self) -> Iterator[None]:
        """Makes it a failure, and says so, where the simulation becomes unstable."""
        try:
            yield
        except envs.UNSTABLE as error:
            said = f"warning: {error}: episode {self.number} counts as failed"
            print(said, file=sys.stderr, flush=True)
            self.success = False
            self.broke = True


class Player:
    """Lets a policy act in a simulator."""

    def __init__(self, config: EvaluateConfig, settings: Config, tasks: tuple[str, ...]):
        path = self.path = settings.train.checkpoint
        family = settings.train.model
        self.config = config
        self.chunk = settings.rollout.chunk
        self.device = "cuda" if machine.gpus() else "cpu"
        if self.device == "cpu":
            # Threads on all cores wait for one another as soon as anything else needs a core.
            torch.set_num_threads(max(1, machine.cores() // 2))
        self.simulator = envs.load(config.env)
        spec = self.simulator.spec(tasks, 0)
        size = config.image_size or checkpoint.frame_size(path, spec.picture)
        models.use_tf32(self.device, settings.train.precision)
        model = models.build(settings, spec._replace(image_size=size), self.device)
        self.model = models.acting(model).eval()
        self.assumed = models.assumptions(settings, spec)
        self.size = size
        self.spec = self.seen(spec)
        _, shipped = embedded_files(family, config.env)
        tokenizer = checkpoint.vocabulary(config.tokenizer, path, family, shipped)
        self.preparation = models.preparation(family, self.model.header, tokenizer)

    def seen(self, spec: EnvSpec) -> EnvSpec:
        """Describes tasks as this policy sees them."""
        return spec._replace(image_size=self.size).seen_by(self.model.header)

    def play(
        self, part: Part, chosen: list[tuple[int, int]], seeds: int
    ) -> Iterator[list[Episode]]:
        """Plays episodes of a part, and yields those that ended: ABREAST at a time.

        chosen: of each the task and the round, which decides on LIBERO's initial state; seeds: the
        first round's first one."""
        self.spec = self.seen(part.spec)
        tasks = len(self.spec.tasks)
        count = len(chosen)
        given = self.spec, self.config.render_quality, part.states
        with envs.starting(self.config.env):
            simulators = [self.simulator.make(*given) for _ in range(min(ABREAST, count))]
            task, turn = chosen[0]
            with contextlib.suppress(envs.UNSTABLE):  # the same beginning fails again, below
                simulators[0].reset(task, seeds + turn * tasks + task)
                simulators[0].observe()
        ended = 0
        try:
            while ended < count:
                begun = []
                for number, env in zip(range(ended, count), simulators, strict=False):
                    task, turn = chosen[number]
                    begun.append(Episode(number, task, env))
                    with begun[-1].fails_if_unstable():
                        env.reset(task, seeds + turn * tasks + task)
                while playing := [episode for episode in begun if episode.success is None]:
                    for episode, actions in zip(playing, self.plan(playing), strict=True):
                        self.execute(episode, actions)
                for place, episode in enumerate(begun):
                    if episode.broke:
                        simulators[place] = self.simulator.make(*given)
                        episode.env.close()
                ended += len(begun)
                yield begun
        finally:
            for env in simulators:
                env.close()

    def plan(self, playing: list[Episode]) -> list[np.ndarray]:
        """Infers once for all of them. Returns the actions that each is to execute [C, A]."""
        rows = []
        states = []
        for episode in playing:
            images, state = episode.env.observe()
            prompt = episode.env.prompt or self.spec.prompts[episode.task]
            rows.append(self.preparation.observe(images[: self.spec.views], state, prompt))
            states.append(state)
        keys = [(self.config.seed, 0, episode.number, episode.steps) for episode in playing]
        noise = self.model.draw(keys, [False] * len(playing))
        obs = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        obs = {name: x.to(self.device) for name, x in obs.items()}
        noise = {name: x.to(self.device) for name, x in noise.items()}
        out = self.model.act(obs, noise)
        contract.check_finite(out, f"the policy of checkpoint {self.path}", "give another one")
        plans = out["actions"][:, : self.chunk].cpu().numpy()
        return [self.preparation.actions(*pair) for pair in zip(plans, states, strict=True)]

    def execute(self, episode: Episode, actions: np.ndarray) -> None:
        """Steps one episode through its actions, or until it ends."""
        filmed = episode.number < len(self.spec.tasks)
        for action in actions:
            if filmed and episode.steps % 2 == 0:
                episode.frames.append(episode.env.film())
            with episode.fails_if_unstable():
                step = episode.env.step(action)
            if episode.broke:
                return
            episode.steps += 1
            if step.success or step.failed or episode.steps >= self.spec.limit(episode.task):
                episode.success = bool(step.success and not step.failed)
                return


def in_turn(config: EvaluateConfig, tasks: int) -> tuple[list[tuple[int, int]], int]:
    """Deals episodes to so many tasks in turn. Raises UserError.

    Returns (task, round) of each of --episodes episodes, and the seed of the first."""
    count = config.episodes
    chosen = [(number % tasks, number // tasks) for number in range(count)]
    seeds = EVAL_SEEDS + config.seed * -(-count // tasks) * tasks
    demonstrations = 10_000_000  # the first of their seeds
    out = f"--seed {config.seed} is out of range: choose a small one, from 0 up"
    require(seeds <= demonstrations - count, out)
    return chosen, seeds


def row_of(task: str, episodes: list[Episode]) -> dict:
    """Makes a row of the result."""
    n = len(episodes)
    successes = sum(episode.success for episode in episodes)
    low, high = wilson(successes, n)
    rate = successes / n
    return {"task": task, "episodes": n, "success_rate": rate, "low": low, "high": high}


def line_of(row: dict, width: int = 28) -> str:
    """Says a row, or why it has no numbers."""
    if "note" in row:
        return f"{row['task']:{width}s} {row['note']}"
    n, rate = row["episodes"], row["success_rate"]
    numbers = f"{round(rate * n):4d}/{n:<4d} {rate:6.1%}"
    return f"{row['task']:{width}s} {numbers}   95 % [{row['low']:.1%}, {row['high']:.1%}]"


def rows_of(part: Part, episodes: list[Episode]) -> list[dict]:
    """Counts successes: a row per task that has episodes, then of all."""
    by_task = {task: [] for task in part.spec.tasks} | {"all": episodes}
    for episode in episodes:
        by_task[part.spec.tasks[episode.task]].append(episode)
    return [row_of(task, mine) for task, mine in by_task.items() if mine]


def settings_of(config: EvaluateConfig) -> Config:
    """Reads what a checkpoint says of itself, as settings to build its model from."""
    nothing = f"no checkpoint is shipped for {config.env}: give --checkpoint, a file or a run"
    require(config.checkpoint or config.env == "metaworld", nothing)
    path = config.checkpoint or embedded_files("pi05", "metaworld")[0]
    family = config.model
    settings = Config()
    rollout = settings.rollout
    checkpoint.check_choice(config.statistics, path)
    if checkpoint.is_ours(path):
        path = checkpoint.find(path)
        header = checkpoint.of_family(path, family) if family else checkpoint.read_header(path)
        family = header.family
        blind = f"checkpoint {path} of family {family!r} cannot act: it does not say what it sees"
        require("image_size" in header.shape, blind)
        for name in header.shape.keys() & asdict(rollout).keys():
            setattr(rollout, name, header.shape[name])
        rollout.chunk = header.shape.get("executed_steps") or header.shape["chunk"]
    else:
        unknown = f"checkpoint {path} is another project's: say with --model of which family it is"
        require(family, unknown)
        models.check_family(family, path)
    rollout.chunk = config.chunk or rollout.chunk
    for name in ("tokens", "horizon", "denoise_steps", "center_crop", "stop_token"):
        given = getattr(config, name)
        if given is not None:
            setattr(rollout, name, given)
    if rollout.sde_steps and rollout.denoise_steps:  # no noise is drawn here
        rollout.sde_steps = min(rollout.sde_steps, rollout.denoise_steps)
    settings.train.checkpoint = path
    settings.train.adapter = config.adapter
    settings.train.model = family
    settings.train.env = config.env
    settings.train.precision = config.precision or ("bfloat16" if machine.gpus() else "float32")
    settings.train.statistics = config.statistics
    settings.env.cameras = config.cameras
    return settings


def as_in_training(config: EvaluateConfig, runs: list[Config]) -> EvaluateConfig:
    """Fills in what no flag gives: as the checkpoint's run had it, or else train.py's defaults.

    runs: those of the checkpoint's `start.Lineage`."""
    saved = checkpoint.folder_of(config.checkpoint) if config.checkpoint else None
    videos = saved.parents[1] / "videos" / saved.name if saved else Path("videos")
    trained = runs[0] if runs else Config()
    precision = trained.train.precision
    given = tuple(filter(None, (config.suite, *config.tasks)))
    tasks = trained.train.tasks if config.env in ("", trained.train.env) else ()
    return replace(
        config,
        env=config.env or trained.train.env,
        tasks=given or tasks,
        image_size=config.image_size or trained.env.image_size,
        cameras=config.cameras or trained.env.cameras,
        precision=config.precision or (None if precision == "auto" else precision),
        render_quality=config.render_quality or trained.env.render_quality,
        videos=config.videos or videos,
    )


def write_videos(folder: Path, tasks: tuple[str, ...], ended: list[Episode]) -> None:
    """Writes films of episodes, and forgets their frames: those of all tasks would fill memory.
    Results count for more, so that trouble here is only a warning."""
    for episode in ended:
        film = folder / f"{file_name(tasks[episode.task])}.mp4"
        try:
            if episode.frames:
                write_video(film, episode.frames, 20)
        except Exception as error:  # of the encoder, whatever it may be
            said = " ".join(str(error).split())[:200]
            print(f"warning: cannot write the film {film}: {said}", file=sys.stderr, flush=True)
        episode.frames = []


def main(config: EvaluateConfig) -> dict:
    """Evaluates. Returns {"checkpoint", "rows"}: a row per task that has episodes, then of all.
    With --perturbed it is a row per part, each with its "tasks", and "missing"."""
    check_ranges(config)

    # See that there is something to play. Another simulator's run tells nothing of this one.
    keep_freed_memory()
    whole, adapter = peft.find_base(config.checkpoint, config.adapter)
    known = lineage(whole, adapter)
    runs = known.runs
    config = as_in_training(replace(config, checkpoint=whole, adapter=adapter), runs)
    simulator = envs.load(config.env)
    spec = simulator.spec(config.tasks, 0)
    met, unknown = met_by(known, simulator)
    evaluated = runs[0].env.eval_states if runs and runs[0].train.env == config.env else ""
    training = Training(met, evaluated, partly=bool(known.ends))
    flags = (config.train_states, config.eval_states)
    if config.perturbed:
        missing = check_suite(simulator, config.tasks)
        found = parts(simulator, config.tasks[0], training, *flags)
    else:
        train, played = states_of(config.env, spec, training, *flags)

    # Build the policy as its checkpoint says, and see that all can be written.
    settings = settings_of(config)
    player = Player(config, settings, config.tasks)
    if config.json:
        check_writable(config.json, "the result", "--json FILE")
    check_writable(config.videos / ".writable", "videos", "--videos FOLDER")
    path = settings.train.checkpoint
    shown = f"{player.spec.image_size} pixels, --render-quality {config.render_quality}"
    if settings.train.precision == "bfloat16":
        shown += ", --precision bfloat16"
    if config.perturbed:
        said = f"{player.assumed}{unknown}{path}: {shown}"
        return play_parts(config, player, found, missing, said)

    # Play, count successes by task, and write down what was seen.
    part = Part("", spec, read_states(played))
    tasks = len(spec.tasks)
    what = f"{config.episodes} episodes of {config.env}"
    if config.episodes < tasks:
        what += f", of the first {config.episodes} of {tasks} tasks alone"
    if played:
        what += f", initial states {played} ({training.says(spec, train, config.train_states)})"
    said = f"{player.assumed}{unknown if played else ''}{spec.note}"
    said += repeats(config.episodes, spec, played)
    contract.check_prompts(player.preparation, player.spec)
    print(f"{said}{path}: {what}, {shown}", flush=True)
    episodes = []
    result = {"checkpoint": str(path), "rows": []}
    said_at = time.monotonic()
    try:
        for ended in player.play(part, *in_turn(config, tasks)):
            episodes += ended
            result["rows"] = rows_of(part, episodes)
            if config.json:
                config.json.write_text(json.dumps(result, indent=1))
            write_videos(config.videos, spec.tasks, ended)
            if time.monotonic() - said_at >= 10.0 and len(episodes) < config.episodes:
                said_at = time.monotonic()
                successes = sum(episode.success for episode in episodes)
                played = f"{len(episodes)} of {config.episodes} episodes"
                print(f"played {played}, {successes} succeeded", flush=True)
    finally:  # whatever ends it, what was counted is said
        for row in result["rows"]:
            print(line_of(row))
    print(f"videos in {config.videos}")
    return result


def play_parts(
    config: EvaluateConfig, player: Player, found: list[Part], missing: dict[str, str], said: str
) -> dict:
    """Plays a suite as it was trained on, held out and perturbed; prints, draws and writes success,
    after each part anew. One that turns out not to work here has a row that says so.

    found: of `parts`; missing: perturbations, with why they cannot be played or ""."""
    picture = config.videos / "perturbed.png"
    check_writable(picture, "the picture", "--videos FOLDER")
    for part in found:
        contract.check_prompts(player.preparation, player.seen(part.spec))
    most = f"at most {config.episodes} episodes of {config.env} a row, of tasks and initial states"
    print(f"{said}, {most} from everywhere in it, no two with one beginning", flush=True)
    width = max(len(part.title) for part in found)
    missing = {name: why for name, why in missing.items() if why}
    result = {"checkpoint": str(player.path), "rows": [], "missing": missing}
    for part in found:
        row = play_part(config, player, part, first=part is found[0])
        result["rows"].append(row)
        print(line_of(row, width), flush=True)
        if config.json:
            config.json.write_text(json.dumps(result, indent=1))
        draw(picture, result["rows"], f"{config.checkpoint}")
    print(*(part.spec.note for part in found), sep="", end="")
    for why in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, other in missing.items() if other == why)
        print(f"not here, for each {why}: {names}")
    print(f"picture {picture}, videos in {config.videos}")
    return result


def play_part(config: EvaluateConfig, player: Player, part: Part, first: bool) -> dict:
    """Plays a part and makes its row. An error is its note, beside the rows of tasks for what had
    ended by then; but of the first part it is raised, for it would come again."""
    row = {"task": part.title, "note": part.note}
    if part.note:
        return row
    part, chosen = part.chosen(config.episodes, config.seed)
    cycle = len(part.spec.tasks) * len(part.states)  # seeds after which its states come again
    folder = config.videos / part.title.replace(", ", "-").replace(" ", "-")
    episodes = []
    try:
        for ended in player.play(part, chosen, -(-EVAL_SEEDS // cycle) * cycle):
            episodes += ended
            write_videos(folder, part.spec.tasks, ended)
    except Exception as error:  # of a simulator, whatever it may be
        if first:
            raise
        row["note"] = str(error)
        if not isinstance(error, UserError):
            row["note"] = f"{error!r:.200} at {place_of(error)}"
        if episodes:
            *row["tasks"], every = rows_of(part, episodes)
            won = round(every["episodes"] * every["success_rate"])
            row["note"] += f" (after {won} successes in {len(episodes)} of {len(chosen)} episodes)"
        return row
    *tasks, every = rows_of(part, episodes)
    return every | {"task": part.title, "states": say_states(part.states), "tasks": tasks}


if __name__ == "__main__":
    with exit_on_user_error():
        main(expanded(tyro.cli(EvaluateConfig)))
