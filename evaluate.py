"""Success rate of a checkpoint, with a 95 % interval per task, and one video per task.

    python evaluate.py --checkpoint runs/NAME --episodes 100

The policy acts without exploration (a flow by its ODE, tokens by the likeliest bin). Episodes use
the evaluation seeds, which neither training nor the demonstrations ever draw. Left out: running it
on several processes.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import imageio.v2 as imageio
import numpy as np
import torch
import tyro

import envs
import models
from config import (
    ASSETS,
    Config,
    Family,
    RolloutConfig,
    Simulator,
    UserError,
    embedded_files,
    exit_on_user_error,
    from_json,
)
from env_worker import EVAL_SEEDS
from models import checkpoint
from processes import keep_freed_memory


@dataclass(kw_only=True)
class EvaluateConfig:
    """Success rate of a checkpoint, per task, with videos."""

    checkpoint: Path | None = None
    """a .safetensors file, a checkpoint or run folder, or another project's checkpoint; none means
    Meta-World's shipped one
    """
    model: Family | None = None
    """family of another project's checkpoint; ours say it themselves"""
    chunk: int = RolloutConfig().chunk
    """actions executed per inference, of another project's checkpoint; ours say it themselves"""
    statistics: str = ""
    """which statistics of another project's checkpoint: OFT's unnorm key, GR00T's embodiment tag,
    π's folder
    """
    image_size: int = 0
    """pixels of the cameras; 0 means as the checkpoint's model takes them (another project's: 256,
    which it resizes)
    """
    tokens: int | None = None
    """prompt length in tokens; none means as the checkpoint says"""
    env: Simulator = "metaworld"
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
    """SentencePiece file (gr00t: Qwen's vocabulary); none means the run's, or the embedded
    default's
    """
    videos: Path | None = None
    """folder for videos; by default videos/ beside the checkpoints of a run, else ./videos"""
    json: Path | None = None
    """also write the result to this file"""


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    p = successes / n
    scale = 1.0 + z**2 / n
    middle = (p + z**2 / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def run_episodes(
    model, spec, preparation, config: EvaluateConfig, chunk: int, device: str
) -> tuple[list[list[bool]], list[list]]:
    """Plays every episode, eight at a time. Returns outcomes and the video frames of the first
    episode, per task.
    """
    outcomes = [[] for _ in spec.tasks]
    films = [[] for _ in spec.tasks]
    make = envs.maker(config.env, config.render_quality)
    lanes = [make(spec.tasks, spec.image_size) for _ in range(min(8, config.episodes))]
    try:
        for first in range(0, config.episodes, len(lanes)):
            playing = list(
                range(first, min(first + len(lanes), config.episodes))
            )  # episode numbers; lane = number − first
            steps = dict.fromkeys(playing, 0)
            for episode in playing:
                lanes[episode - first].reset(
                    episode % len(spec.tasks), EVAL_SEEDS + 1000 * config.seed + episode
                )
            while playing:
                seen = [lanes[e - first].observe() for e in playing]
                said = [
                    getattr(lanes[e - first], "prompt", None) or spec.prompts[e % len(spec.tasks)]
                    for e in playing
                ]
                rows = [preparation.observe(*s, words) for s, words in zip(seen, said, strict=True)]
                obs = {
                    name: torch.from_numpy(np.stack([row[name] for row in rows]))
                    for name in rows[0]
                }
                noise = model.draw(
                    [(config.seed, 0, e, steps[e]) for e in playing], [False] * len(playing)
                )
                obs, noise = (
                    {name: x.to(device) for name, x in tensors.items()} for tensors in (obs, noise)
                )
                actions = model.act(obs, noise)["actions"].cpu().numpy()
                for episode, plan, (_, state) in zip(list(playing), actions, seen, strict=True):
                    task = episode % len(spec.tasks)
                    lane = lanes[episode - first]
                    for action in preparation.actions(plan[:chunk], state):
                        if episode < len(spec.tasks) and steps[episode] % 2 == 0:
                            films[task].append(lane.film())
                        _, success = lane.step(action)
                        steps[episode] += 1
                        if success or steps[episode] >= spec.horizon:
                            outcomes[task].append(success)
                            playing.remove(episode)
                            break
    finally:
        for lane in lanes:
            lane.close()
    return outcomes, films


def settings_of(config: EvaluateConfig) -> Config:
    """What a checkpoint says of itself, as settings to build its model from. Raises UserError."""
    settings = Config()
    if config.checkpoint is None and config.env != "metaworld":
        raise UserError(
            f"no checkpoint is shipped for {config.env}: give --checkpoint, a file or a run"
        )
    config.checkpoint = config.checkpoint or ASSETS / "pi05_metaworld.safetensors"
    settings.train.env = config.env
    settings.train.statistics = config.statistics
    if not checkpoint.is_ours(config.checkpoint):
        if config.model is None:
            raise UserError(
                f"checkpoint {config.checkpoint} is another project's: say with --model of which "
                "family it is"
            )
        models.check_family(config.model, config.checkpoint)
        settings.train.checkpoint = config.checkpoint
        settings.train.model = config.model
        settings.rollout.chunk = config.chunk
        settings.rollout.tokens = config.tokens
        return settings
    path = checkpoint.find(config.checkpoint)
    header = (
        checkpoint.of_family(path, config.model) if config.model else checkpoint.read_header(path)
    )
    if "image_size" not in header.shape:
        raise UserError(
            f"checkpoint {path} of family {header.family!r} cannot act: it does not say what it "
            "sees"
        )
    settings.train.checkpoint = path
    settings.train.model = header.family
    for name in {field.name for field in fields(settings.rollout)} & header.shape.keys():
        setattr(settings.rollout, name, header.shape[name])
    settings.rollout.chunk = header.shape.get("executed_steps") or header.shape["chunk"]
    settings.rollout.tokens = config.tokens or settings.rollout.tokens
    return settings


def tasks_of(run: Path | None, env: str) -> tuple[str, ...]:
    """The tasks that a run was trained on, if there is one and the simulator is the same."""
    if run is None or not (run / "config.json").is_file():
        return ()
    train = from_json(run / "config.json").train
    return train.tasks if train.env == env else ()


def main(config: EvaluateConfig) -> dict:
    for flag, value in (("--episodes", config.episodes), ("--chunk", config.chunk)):
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if config.json and not config.json.absolute().parent.is_dir():
        raise UserError(
            f"the folder {config.json.absolute().parent} does not exist: create it or give another "
            "--json"
        )
    keep_freed_memory()
    settings = settings_of(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(settings.train.checkpoint)
    family = settings.train.model
    run = checkpoint.run_of(path)
    tasks = tuple(filter(None, (config.suite, *config.tasks))) or tasks_of(run, config.env)
    spec = envs.load(config.env).spec(tasks, config.image_size or checkpoint.frame_size(path))
    model = models.build(settings, spec, device).eval()
    tokenizer = checkpoint.vocabulary(config.tokenizer, path, family, embedded_files(family)[1])
    preparation = models.preparation(family, model.header, tokenizer)
    print(f"{path}: {config.episodes} episodes of {config.env}", flush=True)
    outcomes, films = run_episodes(model, spec, preparation, config, settings.rollout.chunk, device)

    videos = config.videos or (run or Path(".")) / "videos"
    try:
        videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write videos to {videos}: {error.strerror}; give --videos FOLDER"
        ) from None
    rows = []
    for task, results in zip((*spec.tasks, "all"), (*outcomes, sum(outcomes, [])), strict=True):
        if not results:
            continue
        low, high = wilson(sum(results), len(results))
        print(
            f"{task:28s} {sum(results):4d}/{len(results):<4d} {sum(results) / len(results):6.1%}   "
            f"95 % [{low:.1%}, {high:.1%}]"
        )
        rows.append(
            {
                "task": task,
                "episodes": len(results),
                "success_rate": sum(results) / len(results),
                "low": low,
                "high": high,
            }
        )
    result = {"checkpoint": str(path), "rows": rows}
    if config.json:
        config.json.write_text(json.dumps(result, indent=1))
    for task, film in zip(spec.tasks, films, strict=True):
        if film:
            imageio.mimwrite(
                videos / f"{task.replace('/', '_')}.mp4", film, fps=20, macro_block_size=1
            )
    print(f"videos in {videos}")
    return result


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(EvaluateConfig))
