"""A lane: what asks for an action, one env or the many envs of a vectorised simulator.

A lane knows which episode runs in each of its envs and when it ends: with success, with failure, or
at the time limit. It is the same whether its envs step one by one or together.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs import Env, Envs, EnvSpec, Simulator, Step
from films import Camera


class Outcome(NamedTuple):
    """What a chunk brought to each env of a lane. At most one of won, failed, late is True."""

    reward: list[float]  # summed over the control steps that the episode took
    won: list[bool]  # the episode has ended with success
    failed: list[bool]  # it has ended without, because the simulator says so
    late: list[bool]  # it was cut by the time limit
    steps: int  # control steps that all envs took in running episodes

    def ended(self) -> list[int]:
        """Lists the rows whose episodes have just ended."""
        rows = range(len(self.won))
        return [row for row in rows if self.won[row] or self.failed[row] or self.late[row]]


class Lane(ABC):
    """Some envs of a simulator that ask for actions together."""

    prompt: str | None = None  # of the running episode, where it differs from the task's

    def __init__(self, index: int, envs: range, spec: EnvSpec, player: Env | Envs):
        self.player = player  # the simulator
        self.index = index
        self.envs = envs  # their numbers; those of evaluation come after all others
        self.spec = spec
        self.tasks = [-1] * len(envs)  # of the running episodes
        self.taken = [0] * len(envs)  # control steps into the episodes
        self.over = [True] * len(envs)  # whether an env has no episode to play
        self.states: np.ndarray | None = None  # [N, S] as last observed
        self.cameras: dict[int, Camera] = {}  # of the rows whose episodes are filmed

    @abstractmethod
    def begin(self, rows: list[int], task: int, seeds: list[int]) -> None:
        """Begins episodes of one task."""

    @abstractmethod
    def observe(self) -> np.ndarray | Tensor:
        """Returns pictures [N, V, H, W, 3] uint8 and sets `states`."""

    @abstractmethod
    def film(self, row: int) -> np.ndarray:
        """Returns a picture of an env for people, [H, H, 3] uint8, and changes nothing."""

    @abstractmethod
    def play(self, plans: list[np.ndarray]) -> Outcome:
        """Steps each env through its plan [C, A], until its episode ends or its time is up."""

    def close(self) -> None:
        self.player.close()

    def reset(self, rows: list[int], tasks: list[int], seeds: list[int]) -> None:
        """Begins an episode in some envs; those of one task together."""
        for task in dict.fromkeys(tasks):
            chosen = [i for i, other in enumerate(tasks) if other == task]
            self.begin([rows[i] for i in chosen], task, [seeds[i] for i in chosen])
        for row, task in zip(rows, tasks, strict=True):
            self.tasks[row] = task
            self.taken[row] = 0
            self.over[row] = False

    def stop(self, rows: list[int]) -> None:
        """Ends episodes until the next reset; envs that step with others do so to no effect."""
        for row in rows:
            self.over[row] = True

    def describe(self) -> str:
        """Names the lane, its envs and tasks, for error messages."""
        tasks = dict.fromkeys(self.spec.tasks[task] for task in self.tasks if task >= 0)
        names = ", ".join(map(repr, tasks)) or "none yet"
        return f"task {names} (lane {self.index}, envs {self.envs[0]} to {self.envs[-1]})"


class SingleLane(Lane):
    """One env as a lane of one."""

    @property
    def prompt(self) -> str | None:
        return self.player.prompt

    def begin(self, rows: list[int], task: int, seeds: list[int]) -> None:
        self.player.reset(task, seeds[0])

    def observe(self) -> np.ndarray:
        picture, state = self.player.observe()
        self.states = state[None]
        return picture[None, : self.spec.views]

    def film(self, row: int) -> np.ndarray:
        return self.player.film(self.spec.image_size)

    def play(self, plans: list[np.ndarray]) -> Outcome:
        if self.over[0]:
            return Outcome([0.0], [False], [False], [False], 0)
        step = self.player.step
        left = self.spec.limit(self.tasks[0]) - self.taken[0]
        total = 0.0
        steps = 0
        won = lost = late = False
        for action in plans[0]:
            if self.cameras:
                self.cameras[0].look(self.taken[0] + steps)
            reward, success, failed = step(action)
            total += reward
            steps += 1
            if success or failed or steps >= left:
                lost = bool(failed)
                won = bool(success) and not lost
                late = not won and not lost
                self.over[0] = True
                break
        self.taken[0] += steps
        return Outcome([float(total)], [won], [lost], [late], steps)


class VectorisedLane(Lane):
    """The envs of a vectorised simulator as a lane."""

    def __init__(
        self, index: int, envs: range, spec: EnvSpec, many: Envs, device: str, keep_on_gpu: bool
    ):
        """keep_on_gpu: pictures stay where they are drawn; else they come to the host."""
        super().__init__(index, envs, spec, many)
        self.device = device
        self.keep_on_gpu = keep_on_gpu
        self.seen: Tensor | None = None  # pictures as last observed, where there are cameras

    def begin(self, rows: list[int], task: int, seeds: list[int]) -> None:
        self.player.reset(rows, task, seeds)

    def observe(self) -> np.ndarray | Tensor:
        pictures, states = self.player.observe()
        pictures = pictures[:, : self.spec.views]
        self.seen = pictures if self.cameras else None
        self.states = states.cpu().numpy()
        return pictures if self.keep_on_gpu else pictures.cpu().numpy()

    def film(self, row: int) -> np.ndarray:
        """Shows what the policy saw last: drawing one env would draw all of them."""
        return self.seen[row, 0].cpu().numpy().copy()  # a simulator may draw in the same place

    def play(self, plans: list[np.ndarray]) -> Outcome:
        actions = torch.from_numpy(np.array(plans)).to(self.device)
        taken = torch.tensor(self.taken, device=self.device)
        limits = torch.tensor([self.spec.limit(task) for task in self.tasks], device=self.device)
        reward = torch.zeros(len(plans), device=self.device)
        begun = ~torch.tensor(self.over, device=self.device)
        alive = begun
        won = torch.zeros_like(begun)
        failed = torch.zeros_like(begun)
        for row, camera in self.cameras.items():
            camera.look(self.taken[row])
        for c in range(actions.shape[1]):
            step = self.player.step(actions[:, c])
            reward = torch.where(alive, reward + step.reward, reward)
            taken = taken + alive
            failed = failed | (alive & step.failed)
            won = won | (alive & step.success & ~failed)
            alive = alive & ~won & ~failed & (taken < limits)
        late = begun & ~alive & ~won & ~failed
        before = sum(self.taken)
        self.taken = taken.tolist()
        self.over = (~alive).tolist()
        if any(self.over[row] for row in self.cameras):  # a film shows how its episode ended
            self.observe()
        steps = sum(self.taken) - before
        return Outcome(reward.tolist(), won.tolist(), failed.tolist(), late.tolist(), steps)


class OneOfMany(Env):
    """One env of a vectorised simulator, as if it were not: for evaluation and to look at it."""

    def __init__(self, simulator: Simulator, spec: EnvSpec, states: tuple[int, ...] = ()):
        super().__init__(spec.tasks, spec.image_size)
        self.device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.many = simulator.make_many(spec, 1, self.device, states)

    def reset(self, task: int, seed: int) -> None:
        self.many.reset([0], task, [seed])

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        pictures, states = self.many.observe()
        return pictures[0].cpu().numpy(), states[0].cpu().numpy()

    def film(self, size: int) -> np.ndarray:
        return self.many.film(size)

    def step(self, action: np.ndarray) -> Step:
        step = self.many.step(torch.from_numpy(np.float32(action))[None].to(self.device))
        failed = torch.as_tensor(step.failed).any()
        return Step(float(step.reward[0]), bool(step.success[0]), bool(failed))

    def close(self) -> None:
        self.many.close()


def make_lane(
    simulator: Simulator,
    spec: EnvSpec,
    config,
    index: int,
    envs: range,
    device: str,
    keep_on_gpu: bool,
    states: tuple[int, ...] = (),
) -> Lane:
    """Makes a lane of these envs. config: the run's `Config`, which has lanes if vectorised.
    states: as `Env.states`."""
    if not config.env.lanes:
        env = simulator.make(spec, config.env.render_quality, states)
        return SingleLane(index, envs, spec, env)
    many = simulator.make_many(spec, len(envs), device, states)
    return VectorisedLane(index, envs, spec, many, device, keep_on_gpu)
