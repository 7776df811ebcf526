"""Does a simulator work here, how fast is it, and what does it look like?

    python -m envs.check --env metaworld
    python -m envs.check --env libero --suite libero_10 --image-size 256

Plays random actions, and in Meta-World its scripted expert, and prints how long each part takes,
how much memory an env needs, and how episodes end. Writes one picture with a row per task: every
camera at the start, in the middle and at the end. Left out: several processes (`python bench.py
envs`).
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio.v2 as imageio
import numpy as np
import psutil
import tyro

import envs
from config import ROOT, UserError, exit_on_user_error


@dataclass(kw_only=True)
class CheckConfig:
    """Makes a simulator, plays it, prints what it costs and draws what it shows."""

    env: str = "metaworld"
    """simulator"""
    tasks: tuple[str, ...] = ()
    """tasks; none means the simulator's default task set"""
    suite: str = ""
    """a suite of the simulator: all of its tasks, beside --tasks"""
    at_most: int = 3
    """tasks to play, the first ones; 0 means all"""
    image_size: int = 128
    """pixels, square"""
    render_quality: Literal["fast", "full"] = "fast"
    """full draws the simulator's own picture, where it knows the difference"""
    steps: int = 0
    """control steps per task and player, at most; 0 means whole episodes"""
    seed: int = 0
    """of the episodes and the random actions"""
    out: Path | None = None
    """file of the picture; by default runs/check_NAME.png"""


def players(name: str, task: str, config: CheckConfig, action_dim: int) -> dict:
    """Who plays: name → a function of the env that returns an action [A]."""
    random = np.random.default_rng(config.seed)
    found = {"random": lambda env: random.uniform(-1.0, 1.0, action_dim)}
    if name == "metaworld":
        from metaworld.policies import ENV_POLICY_MAP

        expert = ENV_POLICY_MAP[task + "-v3"]()
        found["expert"] = lambda env: np.clip(expert.get_action(env.state), -1.0, 1.0)
    return found


def seconds(function, times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def row(title: str, *values: str) -> None:
    print(f"{title[:56]:56s}" + "".join(f"{value:>11s}" for value in values), flush=True)


def play(
    env, task: int, horizon: int, config: CheckConfig, action
) -> tuple[list[np.ndarray], float, str]:
    """One episode, or the first `config.steps` of it. Returns three frames, seconds per step, and
    how it ended.
    """
    env.reset(task, config.seed)
    frames = [env.observe()[0]]
    took = 0.0
    steps = min(config.steps or horizon, horizon)
    success = False
    for step in range(1, steps + 1):
        chosen = action(env)
        start = time.perf_counter()
        success = env.step(chosen).success
        took += time.perf_counter() - start
        if step == steps // 2:
            frames.append(env.observe()[0])
        if success:
            break
    frames = [*frames, env.observe()[0]]
    return (
        (frames + frames[-1:])[:3],
        took / step,
        f"success after {step}" if success else f"{step} steps",
    )


def main(config: CheckConfig) -> Path:
    if config.steps < 0 or config.image_size < 1:
        raise UserError("--steps must not be negative, and --image-size at least 1")
    (ROOT / "runs").mkdir(exist_ok=True)
    out = config.out or ROOT / "runs" / f"check_{config.env}.png"
    if not out.absolute().parent.is_dir():
        raise UserError(
            f"the folder {out.absolute().parent} does not exist: create it or give another --out"
        )
    process = psutil.Process()
    import_s = time.perf_counter()
    simulator = envs.load(config.env)
    spec = simulator.spec(tuple(filter(None, (config.suite, *config.tasks))), config.image_size)
    import_s = time.perf_counter() - import_s
    imported = process.memory_info().rss
    print(
        f"{config.env}: {len(spec.tasks)} tasks, {spec.views} cameras of {config.image_size} "
        f"pixels, state [{spec.state_dim}], ",
        end="",
    )
    print(
        f"action [{spec.action_dim}], at most {spec.horizon} control steps; imported in "
        f"{import_s:.1f} s"
    )
    env = simulator.make(spec.tasks, config.image_size, config.render_quality)
    sheet = []
    try:
        row("", "make s", "reset ms", "step ms", "frame ms", "ends")
        for task, name in list(enumerate(spec.tasks))[: config.at_most or None]:
            make_s = seconds(lambda task=task: (env.reset(task, config.seed), env.observe()))
            reset_s = seconds(lambda task=task: env.reset(task, config.seed), 3)
            frame_s = seconds(env.observe, 5)
            for player, action in players(config.env, name, config, spec.action_dim).items():
                frames, step_s, end = play(env, task, spec.horizon, config, action)
                figures = (
                    f"{make_s:.2f}",
                    f"{1e3 * reset_s:.2f}",
                    f"{1e3 * step_s:.2f}",
                    f"{1e3 * frame_s:.1f}",
                )
                row(f"{name}, {player}", *figures, f"  {end}")
                sheet.append(np.concatenate([view for frame in frames for view in frame], axis=1))
        before = process.memory_info().rss
        second = simulator.make(spec.tasks, config.image_size, config.render_quality)
        second.reset(0, config.seed + len(spec.tasks))
        second.observe()
        megabytes = [imported, before - imported, process.memory_info().rss - before]
        second.close()
    finally:
        env.close()
    tasks = len(spec.tasks[: config.at_most or None])
    first, others, another = (x / 1e6 for x in megabytes)
    print(
        f"memory in MB: {first:.0f} imported, {others:.0f} for {tasks} tasks, {another:.0f} for "
        "another env of the first"
    )
    imageio.imwrite(out, np.concatenate(sheet))
    print(f"one row per line above, each camera at the start, in the middle and at the end: {out}")
    return out


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(CheckConfig))
        sys.stdout.flush()
