"""Measures the success rate of a checkpoint, with a 95 % interval per task, and films each task.

    python evaluate.py --checkpoint runs/NAME --episodes 100

The policy acts without exploration (a flow by its ODE, tokens by the likeliest bin). Episodes use
the evaluation seeds, which neither training nor the demonstrations ever draw. Left out: running it
on several processes.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import imageio.v2 as imageio
import numpy as np
import torch
import tyro

import envs
import machine
import models
from config import Config, Family, UserError, embedded_files, exit_on_user_error, from_json, require
from evaluation import EVAL_SEEDS
from models import checkpoint
from processes import keep_freed_memory

ABREAST = 8  # episodes that are played at the same time, in one batch of inference


@dataclass(kw_only=True)
class EvaluateConfig:
    """Success rate of a checkpoint, per task, with videos."""

    checkpoint: Path | None = None
    """a file, a checkpoint or run folder, or another project's; none means Meta-World's shipped"""
    model: Family | None = None
    """family of another project's checkpoint; ours say it themselves"""
    chunk: int = Config().rollout.chunk
    """actions executed per inference, of another project's checkpoint; ours say it themselves"""
    statistics: str = ""
    """of another project's checkpoint: OFT's unnorm key, GR00T's embodiment tag, π's folder"""
    image_size: int = 0
    """pixels of the cameras; 0 means as the model takes them (another project's: 256)"""
    tokens: int | None = None
    """prompt length in tokens; none means as the checkpoint says"""
    env: str = "metaworld"
    """simulator"""
    tasks: tuple[str, ...] = ()
    """tasks; none means those of the run, else the simulator's default task set"""
    suite: str = ""
    """a suite of the simulator (libero_10, …): all of its tasks, beside --tasks"""
    render_quality: Literal["fast", "full"] = "fast"
    """as it was in training"""
    episodes: int = 100
    """episodes, spread evenly over tasks"""
    seed: int = 0
    """shifts the evaluation seeds by a thousand per step"""
    tokenizer: Path | None = None
    """SentencePiece file (gr00t: Qwen's vocabulary); none means the run's, or the embedded one"""
    videos: Path | None = None
    """folder for videos; by default videos/ beside the checkpoints of a run, else ./videos"""
    json: Path | None = None
    """also write the result to this file"""


@dataclass
class Episode:
    number: int
    task: int
    env: object  # the simulator that plays it
    steps: int = 0  # control steps so far
    success: bool | None = None  # None while it goes on
    frames: list[np.ndarray] = field(default_factory=list)  # its video; only of a task's first one


class Player:
    """Lets a policy act in a simulator."""

    def __init__(self, config: EvaluateConfig, settings: Config, tasks: tuple[str, ...]):
        path = settings.train.checkpoint
        family = settings.train.model
        self.config = config
        self.chunk = settings.rollout.chunk
        self.device = "cuda" if machine.gpus() else "cpu"
        size = config.image_size or checkpoint.frame_size(path)
        self.simulator = envs.load(config.env)
        self.spec = self.simulator.spec(tasks, size)
        self.model = models.build(settings, self.spec, self.device).eval()
        _, shipped = embedded_files(family, config.env)
        tokenizer = checkpoint.vocabulary(config.tokenizer, path, family, shipped)
        self.preparation = models.preparation(family, self.model.header, tokenizer)

    def play(self) -> list[Episode]:
        """Plays every episode, ABREAST at a time."""
        count = self.config.episodes
        tasks = len(self.spec.tasks)
        seeds = EVAL_SEEDS + 1000 * self.config.seed
        given = self.spec.tasks, self.spec.image_size, self.config.render_quality
        simulators = [self.simulator.make(*given) for _ in range(min(ABREAST, count))]
        ended = []
        try:
            while len(ended) < count:
                begun = []
                for number, env in zip(range(len(ended), count), simulators, strict=False):
                    env.reset(number % tasks, seeds + number)
                    begun.append(Episode(number, number % tasks, env))
                while playing := [episode for episode in begun if episode.success is None]:
                    for episode, actions in zip(playing, self.plan(playing), strict=True):
                        self.execute(episode, actions)
                ended += begun
        finally:
            for env in simulators:
                env.close()
        return ended

    def plan(self, playing: list[Episode]) -> list[np.ndarray]:
        """Infers once for all of them. Returns the actions that each is to execute [C, A]."""
        rows = []
        states = []
        for episode in playing:
            images, state = episode.env.observe()
            prompt = episode.env.prompt or self.spec.prompts[episode.task]
            rows.append(self.preparation.observe(images, state, prompt))
            states.append(state)
        keys = [(self.config.seed, 0, episode.number, episode.steps) for episode in playing]
        noise = self.model.draw(keys, [False] * len(playing))
        obs = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        obs = {name: x.to(self.device) for name, x in obs.items()}
        noise = {name: x.to(self.device) for name, x in noise.items()}
        plans = self.model.act(obs, noise)["actions"][:, : self.chunk].cpu().numpy()
        return [self.preparation.actions(*pair) for pair in zip(plans, states, strict=True)]

    def execute(self, episode: Episode, actions: np.ndarray) -> None:
        """Steps one episode through its actions, or until it ends."""
        filmed = episode.number < len(self.spec.tasks)
        for action in actions:
            if filmed and episode.steps % 2 == 0:
                episode.frames.append(episode.env.film())
            step = episode.env.step(action)
            episode.steps += 1
            if step.success or step.failed or episode.steps >= self.spec.horizon:
                episode.success = bool(step.success and not step.failed)
                return


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Computes the 95 % score interval of a proportion (Wilson 1927)."""
    p = successes / n
    scale = 1.0 + z**2 / n
    middle = (p + z**2 / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def row_of(task: str, episodes: list[Episode]) -> dict:
    """Makes a row of the result, and prints it."""
    n = len(episodes)
    successes = sum(episode.success for episode in episodes)
    rate = successes / n
    low, high = wilson(successes, n)
    print(f"{task:28s} {successes:4d}/{n:<4d} {rate:6.1%}   95 % [{low:.1%}, {high:.1%}]")
    return {"task": task, "episodes": n, "success_rate": rate, "low": low, "high": high}


def settings_of(config: EvaluateConfig) -> Config:
    """Reads what a checkpoint says of itself, as settings to build its model from."""
    nothing = f"no checkpoint is shipped for {config.env}: give --checkpoint, a file or a run"
    require(config.checkpoint or config.env == "metaworld", nothing)
    path = config.checkpoint or embedded_files("pi05", "metaworld")[0]
    family = config.model
    settings = Config()
    rollout = settings.rollout
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
        rollout.chunk = config.chunk
    rollout.tokens = config.tokens or rollout.tokens
    settings.train.checkpoint = path
    settings.train.model = family
    settings.train.env = config.env
    settings.train.statistics = config.statistics
    return settings


def main(config: EvaluateConfig) -> dict:
    """Evaluates. Returns {"checkpoint", "rows"}: a row per task that has episodes, then of all."""
    require(config.episodes >= 1, f"--episodes {config.episodes} must be at least 1")
    require(config.chunk >= 1, f"--chunk {config.chunk} must be at least 1")
    folder = config.json.absolute().parent if config.json else Path()
    require(folder.is_dir(), f"the folder {folder} does not exist: create it or change --json")

    # Build the policy as its checkpoint says, and play.
    keep_freed_memory()
    settings = settings_of(config)
    path = settings.train.checkpoint
    run = checkpoint.run_of(path)
    tasks = tuple(filter(None, (config.suite, *config.tasks)))
    if not tasks and run and (run / "config.json").is_file():
        trained = from_json(run / "config.json").train
        tasks = trained.tasks if trained.env == config.env else ()
    player = Player(config, settings, tasks)
    print(f"{path}: {config.episodes} episodes of {config.env}", flush=True)
    videos = config.videos or (run or Path(".")) / "videos"
    try:
        videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"cannot write videos to {videos}: {error.strerror}"
        raise UserError(f"{found}; give --videos FOLDER") from None
    episodes = player.play()

    # Count successes by task, and write down what was seen.
    by_task = {task: [] for task in player.spec.tasks} | {"all": episodes}
    for episode in episodes:
        by_task[player.spec.tasks[episode.task]].append(episode)
    rows = [row_of(task, mine) for task, mine in by_task.items() if mine]
    result = {"checkpoint": str(path), "rows": rows}
    if config.json:
        config.json.write_text(json.dumps(result, indent=1))
    for episode in episodes:
        if episode.frames:
            film = videos / f"{player.spec.tasks[episode.task].replace('/', '_')}.mp4"
            imageio.mimwrite(film, episode.frames, fps=20, macro_block_size=1)
    print(f"videos in {videos}")
    return result


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(EvaluateConfig))
