"""Does a simulator keep the contract here, how fast is it, and what does it look like?

    python -m envs.check --env metaworld
    python -m envs.check --env libero --suite libero_10 --image-size 256

A short play checks what `envs/__init__.py` asks for; the first failure ends it with exit status 1.
Then whole episodes of random actions, and in Meta-World of its scripted expert, show what each part
costs, in time and memory, and how episodes end. Writes one picture with a row per task: every
camera at the start, in the middle and at the end. Left out: several processes (`bench.py envs`).
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Literal

import imageio.v2 as imageio
import numpy as np
import psutil
import tyro

import envs
from checks import Natural, Positive, check_ranges
from config import ROOT, expanded
from envs import Env, Envs, EnvSpec, Simulator, Step
from errors import UserError, exit_on_user_error, place_of, require


@dataclass(kw_only=True)
class CheckConfig:
    """Makes a simulator, checks and plays it, prints what it costs and draws what it shows."""

    env: str = "metaworld"
    """simulator"""
    tasks: tuple[str, ...] = ()
    """tasks; none means the simulator's default task set"""
    suite: str = ""
    """a suite of the simulator: all of its tasks, beside --tasks"""
    at_most: Natural = 3
    """tasks to play, the first ones; 0 means all"""
    image_size: Positive = 128
    """pixels, square"""
    render_quality: Literal["fast", "full"] = "fast"
    """full draws the simulator's own picture, where it knows the difference"""
    steps: Natural = 0
    """control steps per task and player, at most; 0 means whole episodes"""
    seed: Natural = 0
    """of the episodes and the random actions"""
    out: Path | None = None
    """file of the picture; by default runs/check_NAME.png"""


PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PLAYED = 5  # control steps of the check
ROWS = 2  # envs of a vectorised simulator that the check plays
FILM = 64  # pixels of the frame for people that the check asks for


class BrokenContract(UserError):
    """A simulator does not do what it must. The message is one sentence that says what."""


def demand(condition: object, sentence: str) -> None:
    if not condition:
        raise BrokenContract(sentence)


def check_contract(simulator: Simulator, spec: EnvSpec, config: CheckConfig) -> None:
    """Plays a few steps of the first task. Raises BrokenContract at the first failure."""
    try:
        with envs.starting(simulator.name):
            for what in contract_kept(simulator, spec, config):
                print(f"ok    {what}", flush=True)
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise BrokenContract(f"an error in {place_of(error)}: {said}") from error


def contract_kept(simulator: Simulator, spec: EnvSpec, config: CheckConfig) -> Iterator[str]:
    """Yields what holds of `Env` and `Envs`; `lead` is () for the one and (N,) for the other."""
    random = np.random.default_rng(config.seed)
    if simulator.vectorised:
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        player = simulator.make_many(spec, ROWS, device)
        lead = (ROWS,)
        episodes = (list(range(ROWS)), 0, [config.seed + row for row in range(ROWS)])
    else:
        device = None
        player = simulator.make(spec, config.render_quality)
        lead = ()
        episodes = (0, config.seed)
    try:
        # Begin an episode and look at it.
        player.reset(*episodes)
        first = observe(player, spec, lead, device)
        yield f"pictures {list(first[0].shape)} uint8"
        yield f"state {list(first[1].shape)} float32, finite"
        prompt = None if simulator.vectorised else player.prompt
        for words in (*spec.prompts, spec.prompts[0] if prompt is None else prompt):
            demand(isinstance(words, str) and words, f"a prompt must be words, not {words!r}")
        yield f"prompts of {len(spec.tasks)} tasks"

        # Play it, and look at it as people do.
        for _ in range(PLAYED):
            actions = random.uniform(-1.0, 1.0, (*lead, spec.action_dim)).astype(np.float32)
            given = torch.from_numpy(actions).to(device) if simulator.vectorised else actions
            check_step(player.step(given), lead, device)
        yield f"step takes actions {list(actions.shape)} and returns a Step of finite numbers"
        frame = player.film(FILM)
        demand(isinstance(frame, np.ndarray), f"film must return an array, not {frame!r}")
        expect(f"film({FILM})", frame, (FILM, FILM, 3), "uint8")
        yield f"film({FILM}) [{FILM}, {FILM}, 3] uint8"

        # Begin the same episode again.
        player.reset(*episodes)
        again = observe(player, spec, lead, device)
        for what, before, after in zip(("pictures", "states"), first, again, strict=True):
            same = np.array_equal(before, after)
            demand(same, f"the same seed must begin the same episode, but the first {what} differ")
        yield "the same seed shows the same first observation"
    finally:
        player.close()


def observe(player: Env | Envs, spec: EnvSpec, lead: tuple, device: str | None) -> list[np.ndarray]:
    """Checks an observation. Returns copies: a simulator may write into what it hands out."""
    shape = (*lead, spec.views, spec.image_size, spec.image_size, 3)
    pictures, states = player.observe()
    pictures = expect("the pictures", pictures, shape, "uint8", device)
    states = expect("the state", states, (*lead, spec.state_dim), "float32", device)
    return [pictures.copy(), states.copy()]


def check_step(step: Step, lead: tuple, device: str | None) -> None:
    demand(isinstance(step, Step), f"step must return a Step, not a {type(step).__name__}")
    for name, value in step._asdict().items():
        if name == "failed" and value is False:  # the default, also of a vectorised simulator
            continue
        expect(f"the Step's {name}", value, lead, "" if name == "reward" else "bool", device)


def expect(what: str, value, shape: tuple, dtype: str, device: str | None = None) -> np.ndarray:
    """Checks a value and brings it to NumPy. Its numbers must be finite.

    dtype: empty for any number. device: where a vectorised simulator must have it as a tensor."""
    if device is not None:
        import torch

        demand(isinstance(value, torch.Tensor), f"{what} must be a tensor, not {value!r}")
        demand(str(value.device) == device, f"{what} must be on {device}, not on {value.device}")
        value = value.cpu()
    value = np.asarray(value)
    wanted = f"{list(shape)} {dtype or value.dtype}"
    have = f"{list(value.shape)} {value.dtype}"
    demand(have == wanted, f"{what} must be {wanted}, not {have}")
    demand(np.isfinite(value).all(), f"{what} must be finite, not {value}")
    return value


def players(config: CheckConfig, task: str, action_dim: int) -> dict[str, Callable]:
    """Who plays: name → a function of the env that returns an action [A]."""
    random = np.random.default_rng(config.seed)
    found = {"random": lambda env: random.uniform(-1.0, 1.0, action_dim)}
    if config.env == "metaworld":
        from metaworld.policies import ENV_POLICY_MAP

        expert = ENV_POLICY_MAP[task + "-v3"]()
        found["expert"] = lambda env: np.clip(expert.get_action(env.state), -1.0, 1.0)
    return found


def print_row(title: str, *values: str) -> None:
    print(f"{title[:56]:56s}" + "".join(f"{value:>11s}" for value in values), flush=True)


def play(env: Env, task: int, horizon: int, config: CheckConfig, action: Callable) -> tuple:
    """Plays one episode, or the first `config.steps` of it.

    Returns three frames [V, H, W, 3], seconds per step, and how it ended."""
    env.reset(task, config.seed)
    frames = [env.observe()[0].copy()]
    took = 0.0
    limit = min(config.steps or horizon, horizon)
    end = f"{limit} steps"
    for taken in range(1, limit + 1):
        chosen = action(env)
        start = time.perf_counter()
        step = env.step(chosen)
        took += time.perf_counter() - start
        if taken == limit // 2:
            frames.append(env.observe()[0].copy())
        if step.success or step.failed:
            end = f"{'failure' if step.failed else 'success'} after {taken}"
            break
    last = env.observe()[0]
    return [*frames, last, last][:3], took / taken, end


def print_costs(env: Env, spec: EnvSpec, config: CheckConfig) -> list[np.ndarray]:
    """Plays the tasks and prints a row for each. Returns their rows of the picture."""
    sheet = []
    print_row("", "make s", "reset ms", "step ms", "frame ms", "ends")
    for task, name in enumerate(spec.tasks[: config.at_most or None]):
        reset = partial(env.reset, task, config.seed)
        make_s = timeit(reset, number=1) + timeit(env.observe, number=1)
        reset_s = timeit(reset, number=3) / 3
        frame_s = timeit(env.observe, number=5) / 5
        for player, action in players(config, name, spec.action_dim).items():
            frames, step_s, end = play(env, task, spec.limit(task), config, action)
            milliseconds = (f"{1e3 * reset_s:.2f}", f"{1e3 * step_s:.2f}", f"{1e3 * frame_s:.1f}")
            print_row(f"{name}, {player}", f"{make_s:.2f}", *milliseconds, f"  {end}")
            sheet.append(np.concatenate([view for frame in frames for view in frame], axis=1))
    return sheet


def main(config: CheckConfig) -> Path:
    """Checks, plays and draws. Raises BrokenContract, and UserError."""
    check_ranges(config)
    (ROOT / "runs").mkdir(exist_ok=True)
    out = config.out or ROOT / "runs" / f"check_{config.env}.png"
    require(out.suffix in PICTURES, f"--out {out} must end in one of {', '.join(PICTURES)}")
    folder = out.absolute().parent
    require(folder.is_dir(), f"the folder {folder} does not exist: create it or give another --out")

    # Load it.
    process = psutil.Process()
    start = time.perf_counter()
    simulator = envs.load(config.env)
    suite = (config.suite,) if config.suite else ()
    spec = simulator.spec((*suite, *config.tasks), config.image_size)
    import_s = time.perf_counter() - start
    imported = process.memory_info().rss
    seen = f"{spec.views} cameras of {config.image_size} pixels, state [{spec.state_dim}]"
    done = f"action [{spec.action_dim}], at most {spec.horizon} control steps"
    print(f"{config.env}: {len(spec.tasks)} tasks, {seen}, {done}; imported in {import_s:.1f} s")

    # Check it, then see what it costs.
    check_contract(simulator, spec, config)
    env = simulator.make(spec, config.render_quality)
    try:
        sheet = print_costs(env, spec, config)
        played = process.memory_info().rss
        second = simulator.make(spec, config.render_quality)
        second.reset(0, config.seed + len(spec.tasks))
        second.observe()
        another = process.memory_info().rss
        second.close()
    finally:
        env.close()
    tasks = len(spec.tasks[: config.at_most or None])
    memory = f"{imported / 1e6:.0f} imported, {(played - imported) / 1e6:.0f} for {tasks} tasks"
    more = f"{(another - played) / 1e6:.0f} for another env of the first"
    print(f"memory in MB: {memory}, {more}")
    imageio.imwrite(out, np.concatenate(sheet))
    print(f"one row per line above, each camera at the start, in the middle and at the end: {out}")
    return out


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main(expanded(tyro.cli(CheckConfig)))
        except BrokenContract as broken:
            print(f"error: the simulator breaks its contract: {broken}", file=sys.stderr)
            raise SystemExit(1) from None
        sys.stdout.flush()
