"""What `plan.py` is made of, and the words between its parts: `Node`, `Costs`, `Prediction`.

settings.py   a run's settings → Node; the flags of plan.py → a run's settings
costs.py      two measured phases, or a run's trace → Costs
wire.py       gradients, nodes and a network → bytes and seconds of their sum
events.py     Node, Costs → Prediction
"""

import math
from dataclasses import dataclass, replace

STAGES = ("env", "rollout", "actor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node: its workers, and the settings that decide who waits for whom.

    Names and meaning are those of config.py. `settings.node_of` makes one from a run's settings.
    Workers that name the same device take turns on it, except on "cpu"."""

    lanes: int
    lane_envs: int = 1  # that step together, and whose trajectories begin and end together
    group: int = 1  # envs that GRPO compares; 1 means PPO, whose trajectories end with a value
    env_devices: tuple[str, ...]  # of every env worker; likewise the next two
    rollout_devices: tuple[str, ...]
    actor_devices: tuple[str, ...]
    segment: int  # T, chunk steps of a trajectory
    chunk: float  # C, control steps of a chunk
    coarse: float = 1.0  # real chunk steps in one of these, whose `Costs` are of so many
    batch: int  # trajectories of an iteration; likewise minibatch
    minibatch: int
    micro_batch: int  # trajectories, of one actor rank
    update_epochs: int
    max_staleness: int
    batch_max: int | str
    batch_wait_s: float | str  # T_max in seconds, or "auto": half of one inference
    stream: bool

    @property
    def envs(self) -> int:
        return self.lanes * self.lane_envs

    @property
    def whole(self) -> int:
        """Trajectories that one actor rank takes together, as `scheduler.Admission.whole` says."""
        return max(self.lane_envs, self.group)

    @property
    def served(self) -> int:
        """Lanes that ask one rollout worker, at most."""
        return math.ceil(self.lanes / len(self.rollout_devices))

    @property
    def minibatches(self) -> int:
        """Of a batch, as `config.ActorConfig.minibatches` says."""
        return max(1, round(self.batch / self.minibatch))

    @property
    def optimizer_steps(self) -> int:
        return self.update_epochs * self.minibatches

    def can_share(self, minibatch: int) -> bool:
        """Says whether actor ranks can share this minibatch equally, in whole lanes and groups."""
        ranks = len(self.actor_devices)
        return minibatch > 0 and minibatch % (ranks * self.whole if ranks > 1 else self.group) == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds that work takes when nothing waits."""

    step_s: float  # an env worker's, for one chunk of one lane, on average
    step_tail: float = 0.0  # σ of its log-normal distribution; the mean stays
    step_samples: tuple[float, ...] = ()  # draw from these measured times instead
    draw_share: float = 0.0  # of that time, on the device that infers for the lane
    slice_s: float = math.inf  # that a shared device works for one, if another waits for it
    infer_fixed_s: float = 0.0  # one inference, whatever its size
    infer_each_s: float  # and more for each sample (env) in it
    train_fixed_s: float = 0.0  # one micro-batch, whatever its size
    train_each_s: float  # and more for each chunk step in it
    optimizer_s: float = 0.0  # clipping and the optimizer step, per minibatch
    gradient_s: float = 0.0  # summing gradients, once all ranks are through, per minibatch
    publish_s: float = 0.0  # the actor's part of handing over new weights, per iteration
    fetch_s: float = 0.0  # from there until a rollout worker, which goes on serving, holds them
    message_s: float = 0.0  # from a message until the worker that waits for it goes on


@dataclass(frozen=True, slots=True)
class Prediction:
    """Means over the iterations that count."""

    step_s: float  # seconds of one iteration
    env_steps_per_s: float  # of all nodes (RL-VLA³ eq. 2)
    bubble_env: float  # share of its time that an env worker waits; likewise the next two
    bubble_rollout: float
    bubble_actor: float
    batch_size_mean: float  # samples of one inference
    events: int  # that were simulated


def scaled(costs: Costs, env: float = 1.0, rollout: float = 1.0, actor: float = 1.0) -> Costs:
    """Multiplies what simulators, inference and training take. Optimizer steps stay."""
    return replace(
        costs,
        step_s=costs.step_s * env,
        step_samples=tuple(seconds * env for seconds in costs.step_samples),
        infer_fixed_s=costs.infer_fixed_s * rollout,
        infer_each_s=costs.infer_each_s * rollout,
        train_fixed_s=costs.train_fixed_s * actor,
        train_each_s=costs.train_each_s * actor,
    )
