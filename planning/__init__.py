"""What `plan.py` is made of, and the words between its parts: a `Node`, the `Costs` of its work, a
`Prediction`.

settings.py   flags → Node                       costs.py      two measured phases, or a run's trace
              → Costs
events.py     Node, Costs → Prediction           validate.py   predictions beside what was measured
"""

from dataclasses import dataclass, replace

STAGES = ("env", "rollout", "actor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one node runs: workers, and the settings that decide who waits for whom. Names and
    meaning are config.py's.
    """

    lanes: int
    """what asks for an action: one env, or one vectorised batch of `lane_envs` of them"""
    lane_envs: int = 1
    """envs of one lane, which step together and whose trajectories begin and end together"""
    env_devices: tuple[str, ...]
    """of every env worker, as `scheduler.Placement` has them: workers of one device take turns
    there, except on "cpu" 
    """
    rollout_devices: tuple[str, ...]
    actor_devices: tuple[str, ...]
    segment: int
    """T, chunk steps of a trajectory"""
    chunk: float
    """C, control steps of a chunk"""
    coarse: float = 1.0
    """real chunk steps that one here stands for: `Costs` are then of so many, but a trajectory
    still has one last value
    """
    batch: int
    """trajectories that this node contributes to an iteration; likewise minibatch"""
    minibatch: int
    micro_batch: int
    """trajectories of one forward and backward pass of one actor rank"""
    update_epochs: int
    max_staleness: int
    batch_max: int | str
    batch_wait_s: float | str
    """T_max in seconds, or "auto": half of one inference"""
    stream: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds that work takes when nothing waits."""

    step_s: float
    """mean time of an env worker for one chunk of one lane"""
    step_tail: float = 0.0
    """σ of its log-normal distribution; the mean stays"""
    step_samples: tuple[float, ...] = ()
    """draw from these measured times instead"""
    infer_fixed_s: float = 0.0
    """one inference, whatever its size"""
    infer_each_s: float
    """and more for each sample (env) in it"""
    train_fixed_s: float = 0.0
    """one micro-batch, whatever its size"""
    train_each_s: float
    """and more for each chunk step in it"""
    optimizer_s: float = 0.0
    """clipping and the optimizer step, per minibatch"""
    gradient_s: float = 0.0
    """summing gradients over all actor ranks, once all have arrived, per minibatch"""
    publish_s: float = 0.0
    """the actor's part of handing over new weights, per iteration"""
    fetch_s: float = 0.0
    """from there until a rollout worker holds them; it goes on serving meanwhile"""
    message_s: float = 0.0
    """from one worker's message until another, which waits for it, goes on"""


@dataclass(frozen=True, slots=True)
class Prediction:
    step_s: float  # seconds of one iteration
    env_steps_per_s: float  # of all nodes
    bubble_env: float
    bubble_rollout: float
    bubble_actor: float
    batch_size_mean: float  # samples
    events: int


def scaled(costs: Costs, factor: float) -> Costs:
    """Costs of a node that is slower by `factor` in all that it computes."""
    if factor == 1.0:
        return costs
    computes = (
        "step_s",
        "infer_fixed_s",
        "infer_each_s",
        "train_fixed_s",
        "train_each_s",
        "optimizer_s",
    )
    samples = tuple(seconds * factor for seconds in costs.step_samples)
    return replace(
        costs, step_samples=samples, **{name: getattr(costs, name) * factor for name in computes}
    )
