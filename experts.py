"""Lets Meta-World's scripted experts act, and writes what they did in LeRobot's format.

Gaussian noise is added to the action that is executed (DART, arXiv 1703.09327), so that the data
also shows how to recover. The action that is recorded is the one without noise. It moves the arm at
0.6 of the expert's speed, so a policy that imitates it often runs out of time: it succeeds at 20 to
50 %. That leaves reinforcement learning, with the prefix frozen, something to learn.
"""

import contextlib
import itertools
import operator
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
from processes import interrupts_wait, leave_interrupts
from recording import Writer, png

CHUNK = Config().rollout.chunk  # actions that a new model predicts
IMAGE_SIZE = 64  # pixels, as new models take them
TASKS = ("button-press-topdown", "button-press", "faucet-open", "handle-press")
LONGEST = 270  # control steps of a demonstration
LIMIT_S = 600.0  # seconds until an expert has begun and played; it usually takes less than ten
AHEAD = 8  # demonstrations that an expert's process may hold until they are taken
Turn = tuple[int, int]  # a task's number and a seed


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
    tasks: tuple[str, ...], task: int, seeds: Sequence[int], config: ExpertConfig
) -> Iterator[Played | None]:
    """Plays demonstrations of tasks[task], and yields them; None in place of one that fails, or
    whose simulation becomes unstable, which teaches nothing."""
    from metaworld.policies import ENV_POLICY_MAP

    from envs import metaworld  # here, for RoboCasa's environment lacks it

    warnings.filterwarnings("ignore")
    with envs.starting("metaworld"):
        env = metaworld.Env(tasks, config.image_size)
        with contextlib.suppress(envs.UNSTABLE):  # whose demonstration then fails, below
            env.reset(task, seeds[0])
            env.observe()
    expert = ENV_POLICY_MAP[tasks[task] + "-v3"]()
    for seed in seeds:
        rng = np.random.default_rng([config.seed, task, seed])
        try:
            env.reset(task, seed)
            played = play(env, expert, rng, config)
        except envs.UNSTABLE as error:
            print(f"warning: {tasks[task]}, seed {seed}: {error}", file=sys.stderr, flush=True)
            env.close()
            env = metaworld.Env(tasks, config.image_size)
            played = None
        yield played
    env.close()


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
    """Lets the experts act, in processes that take turns, and writes a dataset."""
    odd = f"--video needs an even number of pixels: --image-size {spec.image_size} is odd"
    require(not config.video or spec.image_size % 2 == 0, odd)
    started = time.monotonic()
    first = 10_000_000 + 1000 * config.seed  # training and evaluation draw other seeds
    seeds = range(first, first + config.demos)
    turns = list(itertools.product(range(len(spec.tasks)), seeds))
    context = mp.get_context("spawn")
    workers = []
    pipes = []
    with Writer(folder, spec.rate, config.video, "sawyer") as writer:
        try:
            with interrupts_wait():
                for rank in range(PROCESSES):
                    pipe, end = context.Pipe(duplex=False)
                    args = (spec.tasks, turns[rank::PROCESSES], config, end)
                    worker = context.Process(target=act, args=args)
                    worker.start()
                    end.close()  # here, so that the pipe ends with the process
                    workers.append(worker)
                    pipes.append(pipe)
            # Turns were dealt to the processes one by one, so demonstrations arrive in this order.
            for number, (task, _) in enumerate(turns):
                rank = number % PROCESSES
                if played := next_of(pipes[rank], workers[rank], spec.tasks[task]):
                    writer.add(spec.prompts[task], *played)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        choose = "choose other --tasks, a higher --pace or less --action-noise"
        require(writer.frames, f"no demonstration succeeded: {choose}")
    seconds = f"{time.monotonic() - started:.0f} s"
    said = f"{writer.frames} frames of {len(writer.rows)} demonstrations that succeeded"
    print(f"{said}, of {config.demos} per task, in {seconds}")


def act(tasks: tuple[str, ...], turns: list[Turn], config: ExpertConfig, pipe: Connection) -> None:
    """Runs one process: plays its turns, and sends what `demonstrate` yields, or a UserError."""
    leave_interrupts(mp.parent_process().pid)
    sending = deque()
    try:
        with ThreadPoolExecutor(1) as sender:  # so that it plays while others are waited for
            for task, mine in itertools.groupby(turns, operator.itemgetter(0)):
                for played in demonstrate(tasks, task, [seed for _, seed in mine], config):
                    sending.append(sender.submit(pipe.send, played))
                    if len(sending) > AHEAD:
                        sending.popleft().result()
    except UserError as error:
        pipe.send(error)


def next_of(pipe: Connection, worker: mp.Process, task: str) -> Played | None:
    """Returns the next demonstration of a process. Raises UserError where it says so, hangs or was
    killed."""
    require(pipe.poll(LIMIT_S), f"the expert of {task} hangs: nothing came for {LIMIT_S:.0f} s")
    try:
        found = pipe.recv()
    except (EOFError, OSError):  # before a demonstration, or amidst one
        worker.join()
        killed = -worker.exitcode
        ended = f"signal {killed} ended the expert of {task}: is the host out of memory?"
        require(killed <= 0, ended)
        raise SystemExit(1) from None  # its traceback is on the screen
    if isinstance(found, UserError):
        raise found
    return found
