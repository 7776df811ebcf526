"""PPO and GRPO: pure tensor functions, each with its equation, and what the learner asks of a loss.

A sample is a chunk step: one inference and the C control steps that executed it. Its log-prob has U
units that the policy ratio is taken over (`units`): the whole chunk (U = 1, π0.5's published
recipe), each action (C) or each number or token of an action (C·A, OpenVLA-OFT's). An advantage is
a sample's or a unit's. Losses are sums over samples and means over units, so that micro-batches add
up. The actor has one value per chunk step, and so one advantage (docs/recipes.md: which published
recipe has one per action).

`Algorithm` at the end is the contract of a loss: a new one is a subclass and a line in
`ALGORITHMS`.

Left out: entropy bonus (RLinf's of π0 and π0.5 on ManiSkill: 0.005) and reference-model KL (none).
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from checks import parse_json
from config import Config
from errors import require
from policy_loss import CORRECTIONS, LARGEST, PolicyLoss, SecondMoment, given_bounds

# ---------------------------------------------------------------- advantages


def gae(
    reward: Tensor,
    value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
    final: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over segments with auto-reset.

        δ_t = r_t + γ·V'_t − V_t
        A_t = δ_t + γλ·(1 − done_t)·A_{t+1}

    V'_t is V_{t+1} where the episode goes on and 0 where it terminated. Where it was truncated,
    V'_t is the value of its last observation, `final` [n, T], because auto-reset has put a new
    episode's observation into row t + 1.

    Without `final` the time limit also ends an episode at value 0. That is right where the
    objective is success within the limit: bootstrapping would make every state worth "success some
    day" (measured: value loss 0.001 at 30 % success, no advantages left).

    reward, terminated, truncated [n, T]; value [n, T+1]; a step is a chunk step or, at the action
    level, a control step with a value of its own: [n, T·C], of which `unflatten(1, (T, C))` are the
    advantages of every chunk's actions. Returns advantages and returns A + V, both [n, T]."""
    done = terminated.bool() | truncated.bool()
    following = torch.where(done, 0.0, value[:, 1:])
    if final is not None:
        following = torch.where(truncated.bool() & ~terminated.bool(), final, following)
    delta = reward + gamma * following - value[:, :-1]
    carry = gamma * lam * (~done).to(value.dtype)
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + carry[:, t] * running
        advantages[:, t] = running
    return advantages, advantages + value[:, :-1]


def group_advantages(outcome: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Returns GRPO's advantages (arXiv 2402.03300): A_i = (R_i − mean) / (std + 1e-6) among the G
    trajectories that began in the same state.

    outcome [g, G], one per trajectory. Groups whose mean lies outside [low, high] teach nothing
    (all alike: A = 0) or little, and are filtered (RLinf: success rates in [0.1, 0.9]). Returns
    advantages [g, G], 0 in filtered groups, and which groups are kept [g]."""
    mean = outcome.mean(dim=1, keepdim=True)
    spread = (outcome - mean).square().mean(dim=1, keepdim=True).sqrt()
    kept = (mean[:, 0] >= low) & (mean[:, 0] <= high)
    return torch.where(kept[:, None], (outcome - mean) / (spread + 1e-6), 0.0), kept


@dataclass
class AdvantageScale:
    """Advantages are divided by their root mean square over earlier batches, frozen while a batch
    is trained.

    A streamed batch is trained before all of it exists, so its own statistics cannot be used; those
    of earlier batches (exponential moving average; the first batch uses 1) are the same with and
    without streaming. Their mean is not subtracted: centring is the value head's work, and the mean
    of earlier batches, whose value head knew less, is biased (measured: it turned the average
    advantage negative for twenty iterations)."""

    decay: Annotated[float, Field(ge=0, lt=1)]
    square: Annotated[float, Field(ge=0, le=LARGEST)] = 1.0

    def __call__(self, advantages: Tensor) -> Tensor:
        return advantages / (self.square**0.5 + 1e-6)

    def update(self, total_square: float, count: float, first: bool) -> None:
        """Takes in one whole batch: Σ A² and how many."""
        decay = 0.0 if first else self.decay
        self.square = decay * self.square + (1.0 - decay) * total_square / count


# ---------------------------------------------------------------- policy


def units(logprob: Tensor, granularity: str) -> Tensor:
    """Log-probs of every number or token of a chunk [n, C, A] → of every unit [n, U]: "chunk" sums
    all, "action" each action's."""
    if granularity == "chunk":
        return logprob.sum(dim=(1, 2))[:, None]
    return logprob.sum(dim=2) if granularity == "action" else logprob.flatten(1)


def interpolated_proximal(new: Tensor, old: Tensor, staleness: Tensor) -> Tensor:
    """Proximal policy of decoupled PPO without another forward: old + α(new − old), α = d/(d + 1),
    no gradient.

    new, old [n, U]; staleness d [n]. The exact one is the log-prob under the weights that the
    batch's first update begins from."""
    alpha = (staleness / (staleness + 1.0))[:, None]
    return (old + alpha * (new - old)).detach()


STALENESS = ("0", "1", "2", "3_or_more")  # buckets of the diagnostics


def by_staleness(new: Tensor, old: Tensor, staleness: Tensor) -> dict[str, Tensor]:
    """Measures how far the policy is from the one that acted, per staleness bucket and in all.

    new, old [n, U]; staleness [n]. Returns sums over samples: `samples_at_…`, `kl_at_…` (KL by
    http://joschu.net/blog/kl-approx.html) and `ratio_at_…` (new / old) of every bucket, and
    `approx_kl`; and a maximum, `ratio_max`."""
    log_ratio = new.detach() - old
    kl = (log_ratio.exp() - 1.0 - log_ratio).mean(1)
    ratio = log_ratio.exp().mean(1)
    bucket = staleness.long().clamp(0, len(STALENESS) - 1)
    found = {"approx_kl": kl.sum(), "ratio_max": log_ratio.exp().max()}
    for i, name in enumerate(STALENESS):
        here = bucket == i  # not as an index: the host would wait to know how many there are
        found[f"samples_at_{name}"] = here.sum()
        found[f"kl_at_{name}"] = torch.where(here, kl, 0.0).sum()
        found[f"ratio_at_{name}"] = torch.where(here, ratio, 0.0).sum()
    return found


# ---------------------------------------------------------------- value


def value_loss(new: Tensor, old: Tensor, returns: Tensor, clip: float, huber: float) -> Tensor:
    """Clipped Huber loss, summed: max(H(V − R), H(clamp(V, V_old ± ε) − R)). All [n]."""
    clipped = old + (new - old).clamp(-clip, clip)
    plain = F.huber_loss(new, returns, reduction="none", delta=huber)
    return torch.maximum(plain, F.huber_loss(clipped, returns, reduction="none", delta=huber)).sum()


def explained_variance(
    returns: float, returns_square: float, error: float, error_square: float, count: float
) -> float:
    """1 − Var(R − V) / Var(R) from sums over a batch: 1 is a perfect critic, 0 one that knows the
    mean, below 0 a harmful one."""
    variance = returns_square / count - (returns / count) ** 2
    left = error_square / count - (error / count) ** 2
    return 1.0 - left / variance if variance > 1e-12 else 0.0


# ---------------------------------------------------------------- what the learner asks of a loss


class Targets(NamedTuple):
    """What trajectories teach: n of them, of T chunk steps."""

    advantages: Tensor  # [n, T], not yet scaled
    returns: Tensor | None  # [n, T] for the critic; None without one
    kept: Tensor  # [n, T] bool: the chunk steps that are trained on


class Samples(NamedTuple):
    """The m chunk steps that a loss is computed from."""

    new: Tensor  # [m, U] log-probs of the policy that is trained; has a gradient
    old: Tensor  # [m, U] of the policy that acted
    proximal: Tensor  # [m, U] of decoupled PPO's proximal policy
    advantages: Tensor  # [m], scaled
    value: Tensor  # [m] of the critic that is trained; has a gradient
    returns: Tensor | None  # [m]
    stored: dict[str, Tensor]  # slot fields [m, …], also those of `slot_fields`


@dataclass
class Remembered(AdvantageScale):
    """What a loss keeps of earlier batches. Checkpoints that are older than `cut` have none."""

    cut: Annotated[float, Field(ge=0, le=LARGEST)] = LARGEST


class Algorithm:
    """The contract of a loss, with what PPO and GRPO share.

    A subclass must define `groups`, `critic` and `targets`; the rest has defaults."""

    groups: bool  # trajectories are episodes, compared within groups that begin in the same state
    critic: bool  # there is a value head to be trained

    def __init__(self, config: Config, spec):
        """spec: the simulator's EnvSpec."""
        self.config = config
        self.spec = spec
        self.settings = config.algorithm
        self.advantage_scale = AdvantageScale(config.algorithm.advantage_memory)
        self.policy_loss = PolicyLoss(
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
            dual_clip=self.settings.dual_clip,
            weight_mode=self.settings.behaviour_weight,
            **CORRECTIONS[self.settings.behaviour_weight] | given_bounds(self.settings),
        )

    @classmethod
    def slot_fields(cls, config: Config) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns name → (shape, dtype) of what this loss needs stored of every chunk step, beyond
        the common fields. Whoever computes it writes it into the slots."""
        return {}

    def targets(self, data: dict[str, Tensor], played: Tensor) -> Targets:
        """Computes advantages from whole trajectories, on the host: which chunk steps are trained
        on is known before the GPU is asked.

        data: the common slot fields and those of `slot_fields` [n, T or T + 1, …]; with `groups`
        also "outcomes" [n, G], how each member of a trajectory's group ended, and "member" [n], its
        own place in the group. played [n, T]: the chunk steps that belong to the trajectory."""
        raise NotImplementedError

    def scale(self, advantages: Tensor) -> Tensor:
        """Scales advantages [m] by what is known from earlier batches."""
        return self.advantage_scale(advantages)

    def loss(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss [], a sum over samples, and numbers for metrics.jsonl by name, which are
        sums over samples too and appear there as means. Those of several, [k], are for
        `finish_batch` alone, as `name_0` and so on."""
        loss, numbers = self.policy_loss(
            samples.new, samples.old, samples.proximal, samples.advantages
        )
        return loss, numbers | {"loss_policy": loss.detach()}

    def finish_batch(self, totals: dict[str, float], first: bool) -> None:
        """Takes in a whole batch that was trained. totals: what was tallied of it, over all ranks,
        by the names that the learner and `loss` gave; first: whether it is the run's first batch.
        """
        before = self.policy_loss
        if before.weight_mode == "m2po":
            cut = SecondMoment(before.trust).cut(totals, before.cut)
            self.policy_loss = replace(before, cut=cut)

    def state(self) -> dict:
        """Returns what must outlive a checkpoint, as JSON; `load` takes it back."""
        return asdict(self.advantage_scale) | {"cut": self.policy_loss.cut}

    def load(self, state: dict) -> None:
        """Raises UserError where no loss of this kind has returned it."""
        known = parse_json(json.dumps(state), Remembered, "what the loss remembers")
        self.advantage_scale.square = known.square
        self.policy_loss = replace(self.policy_loss, cut=known.cut)


class Ppo(Algorithm):
    """Decoupled PPO with a critic; segments of fixed length."""

    groups = False
    critic = True

    @classmethod
    def slot_fields(cls, config: Config) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        # V of an episode's last observation, where the time limit ended it in this chunk step.
        return {"final": ((), torch.float32)} if config.algorithm.bootstrap_truncated else {}

    def targets(self, data: dict[str, Tensor], played: Tensor) -> Targets:
        advantages, returns = gae(
            data["reward"],
            data["value"],
            data["terminated"],
            data["truncated"],
            self.settings.gamma,
            self.settings.gae_lambda,
            data.get("final"),
        )
        return Targets(advantages, returns, played)

    def loss(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        loss, numbers = super().loss(samples)
        before = samples.stored["value"]
        settings = self.settings
        values = value_loss(
            samples.value, before, samples.returns, settings.value_clip, settings.huber
        )
        return loss + settings.value_weight * values, numbers | {"loss_value": values.detach()}

    def finish_batch(self, totals: dict[str, float], first: bool) -> None:
        super().finish_batch(totals, first)
        # Those that --chunk-share has left out have advantages, too.
        samples = totals["trained_once"] + totals.get("undrawn", 0.0)
        self.advantage_scale.update(totals["advantage_square"], samples, first)


class Grpo(Algorithm):
    """GRPO: no critic. Advantages are scaled within their groups."""

    groups = True
    critic = False

    def targets(self, data: dict[str, Tensor], played: Tensor) -> Targets:
        outcomes = data["outcomes"]
        if self.spec.compares == "success":
            low = self.settings.group_low
            high = self.settings.group_high
            advantages, kept = group_advantages(outcomes, low, high)
        else:  # summed rewards have no natural bounds: only groups without any spread are filtered
            advantages, _ = group_advantages(outcomes, -math.inf, math.inf)
            kept = outcomes.amax(1) - outcomes.amin(1) > 1e-6
        mine = advantages.gather(1, data["member"][:, None])  # [n, 1]
        return Targets(mine.expand_as(played), None, played & kept[:, None])


ALGORITHMS: dict[str, type[Algorithm]] = {"ppo": Ppo, "grpo": Grpo}  # what --algorithm takes


def load(config: Config, spec) -> Algorithm:
    """Makes the loss of a run."""
    return checked(config.train.algorithm)(config, spec)


def checked(name: str) -> type[Algorithm]:
    """Returns the class of a loss. Raises UserError, naming what is missing, where it does not keep
    the contract."""
    kind = ALGORITHMS[name]
    missing = [
        name for name in ("groups", "critic") if not isinstance(getattr(kind, name, None), bool)
    ]
    if kind.targets is Algorithm.targets:
        missing.append("targets")
    lacks = f"the loss {name!r} ({kind.__name__} in algorithms.py) lacks {', '.join(missing)}"
    require(not missing, f"{lacks}: `Algorithm` says what it must offer")
    return kind
