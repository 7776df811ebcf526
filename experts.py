"""Lets Meta-World's scripted experts act, and writes what they did in LeRobot's format.

Gaussian noise on the action that they execute (DART, arXiv 1703.09327) makes the data show how to
recover, too. A frame's action is the expert's own. The demonstrator moves at 0.6 of the expert's
speed, so a policy sees well and runs out of time: it succeeds at 20–50 %, which leaves
reinforcement learning, with the prefix frozen, something to learn.
"""

import math
import os
import signal
import time
import warnings
from dataclasses import dataclass
from multiprocessing.pool import IMapIterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.multiprocessing as mp

import envs
from checks import Fraction, FromZero, Length, Natural, Positive
from config import Config
from envs import EnvSpec
from errors import UserError, require
from imitation import PROCESSES
from processes import INTERRUPTS, die_with, interrupts_wait
from recording import Writer, png

CHUNK = Config().rollout.chunk  # actions that a new model predicts
IMAGE_SIZE = 64  # pixels, as new models take them
TASKS = ("button-press-topdown", "button-press", "faucet-open", "handle-press")
LONGEST = 270  # control steps of a demonstration
LIMIT_S = 120.0  # seconds that a demonstration may take; it is usually less than one


@dataclass(kw_only=True)
class ExpertConfig:
    """How the experts act, and what is written of it."""

    video: bool = False
    """--collect writes videos (H.264) instead of PNG files: smaller, and not exact"""
    image_size: Length = IMAGE_SIZE
    """pixels of what --collect draws"""
    demos: Positive = 25
    """demonstrations per task"""
    pace: Fraction = 0.6
    """the demonstrator's speed as a fraction of the expert's: careful, as people who teleoperate"""
    action_noise: FromZero = 0.5
    """standard deviation of the noise on executed actions, in units of the action range [-1, 1]"""
    seed: Natural = 0
    """seed of demonstrations, initial weights and batches"""


class Played(NamedTuple):
    """An episode of T control steps."""

    pictures: list[list[bytes]]  # a PNG file for every frame and camera
    states: np.ndarray  # [T, S]
    actions: np.ndarray  # [T, A]


def demonstrate(
    tasks: tuple[str, ...], task: int, seeds: range, config: ExpertConfig
) -> list[Played]:
    """Plays demonstrations of tasks[task]. Returns those that succeed: others teach nothing."""
    from metaworld.policies import ENV_POLICY_MAP

    from envs import metaworld  # here, for RoboCasa's environment lacks it

    warnings.filterwarnings("ignore")
    with envs.starting("metaworld"):
        env = metaworld.Env(tasks, config.image_size)
        env.reset(task, seeds[0])
        env.observe()
    expert = ENV_POLICY_MAP[tasks[task] + "-v3"]()
    played = []
    for seed in seeds:
        env.reset(task, seed)
        rng = np.random.default_rng([config.seed, task, seed])
        played.append(play(env, expert, rng, config))
    env.close()
    return [episode for episode in played if episode]


def play(env, expert, rng: np.random.Generator, config: ExpertConfig) -> Played | None:
    """Plays one demonstration; None where it fails."""
    pictures = []
    states = []
    actions = []
    finish = None  # the control step that succeeds
    for t in range(LONGEST):
        images, state = env.observe()
        pictures.append([png(image) for image in images])
        states.append(state)
        action = config.pace * np.clip(expert.get_action(env.state), -1.0, 1.0).astype(np.float32)
        action[3] /= config.pace  # the gripper is not a speed
        actions.append(action)
        noise = rng.normal(0.0, config.action_noise, 4) * (finish is None)
        success = env.step(np.clip(action + noise, -1.0, 1.0)).success
        if success and finish is None:
            finish = t
        # Go on past success for C steps, so that the last frames have labels, too.
        if finish is not None and t >= finish + CHUNK:
            return Played(pictures, np.stack(states), np.stack(actions))
    return None


def gather(config: ExpertConfig, spec: EnvSpec, folder: Path) -> None:
    """Lets the experts act, half of a task's demonstrations in each job, and writes a dataset."""
    odd = f"--video needs an even number of pixels: --image-size {spec.image_size} is odd"
    require(not config.video or spec.image_size % 2 == 0, odd)
    started = time.monotonic()
    seeds = 10_000_000 + 1000 * config.seed  # training and evaluation draw other seeds
    half = math.ceil(config.demos / 2)
    every = range(seeds, seeds + config.demos)
    parts = [every[first : first + half] for first in range(0, config.demos, half)]
    jobs = [(spec.tasks, n, part, config) for n in range(len(spec.tasks)) for part in parts]
    context = mp.get_context("spawn")
    with Writer(folder, spec.rate, config.video, "sawyer") as to:
        with interrupts_wait():
            pool = context.Pool(PROCESSES, begin, (os.getpid(),))
        with pool:
            results = pool.imap(demonstration, jobs)
            for job in jobs:
                for episode in next_of(results, spec.tasks[job[1]], LIMIT_S * half):
                    to.add(spec.prompts[job[1]], *episode)
        choose = "choose other --tasks, a higher --pace or less --action-noise"
        require(to.frames, f"no demonstration succeeded: {choose}")
    seconds = f"{time.monotonic() - started:.0f} s"
    said = f"{to.frames} frames of {len(to.rows)} demonstrations that succeeded"
    print(f"{said}, of {config.demos} per task, in {seconds}")


def begin(parent: int) -> None:
    """Begins a process of the pool, which ends its processes by SIGTERM."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


def next_of(results: IMapIterator, task: str, limit: float) -> list[Played]:
    """Returns what comes within `limit` seconds. Of a process that was killed nothing does."""
    try:
        return results.next(limit)
    except mp.TimeoutError:
        late = f"the expert of {task} has played for {limit / 60:.0f} minutes"
        raise UserError(f"{late}: was its process killed for want of memory?") from None


def demonstration(job: tuple) -> list[Played]:
    return demonstrate(*job)
