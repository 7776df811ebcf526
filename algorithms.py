"""GAE and decoupled PPO: pure tensor functions, each with its equation.

Everything is per chunk step: one chunk of C control steps is one action of the decision process, with one log-prob, one
value and one advantage (π0.5's published recipe). Left out: GRPO, token-level objectives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def gae(reward: Tensor, value: Tensor, done: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over segments with auto-reset.

    δ_t = r_t + γ·(1 − done_t)·V_{t+1} − V_t,   A_t = δ_t + γλ·(1 − done_t)·A_{t+1}

    done is success or the time limit. The limit ends an episode at value 0, because success *within* it is the objective:
    bootstrapping there instead made every state worth "success some day", and advantages vanished (measured: value loss
    0.001 at 30 % success).

    reward, done [n, T]; value [n, T+1]. Returns advantages and returns A + V, both [n, T].
    """
    going = (~done.bool()).to(value.dtype)
    delta = reward + gamma * going * value[:, 1:] - value[:, :-1]
    carry = gamma * lam * going
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + carry[:, t] * running
        advantages[:, t] = running
    return advantages, advantages + value[:, :-1]


@dataclass
class AdvantageScale:
    """Advantages are divided by their root mean square over earlier batches, frozen while a batch is trained.

    A streamed batch is trained before all of it exists, so its own statistics cannot be used; those of earlier batches
    (exponential moving average; the first batch uses 1) are the same with and without streaming. Their mean is not
    subtracted: centring is the value head's work, and the mean of earlier batches, whose value head knew less, is biased
    (measured: it turned the average advantage negative for twenty iterations).
    """

    decay: float
    square: float = 1.0

    def __call__(self, advantages: Tensor) -> Tensor:
        return advantages / (self.square**0.5 + 1e-6)

    def update(self, total_square: float, count: float, first: bool) -> None:
        """Takes in one whole batch: Σ A² and how many."""
        decay = 0.0 if first else self.decay
        self.square = decay * self.square + (1.0 - decay) * total_square / count


def proximal_logprob(new: Tensor, old: Tensor, staleness: Tensor) -> Tensor:
    """Interpolated proximal policy of decoupled PPO: old + α(new − old), α = d/(d + 1), no gradient. All [n]."""
    alpha = staleness / (staleness + 1.0)
    return (old + alpha * (new - old)).detach()


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, staleness: Tensor, clip: float, behaviour_weight_max: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Decoupled PPO (AReaL, arXiv 2505.24298), summed over samples; PPO (arXiv 1707.06347) where staleness is 0.

    w = exp(prox − old), ratio = exp(new − prox), loss = −w · min(ratio·A, clamp(ratio, 1 ± ε)·A); samples with w above
    `behaviour_weight_max` are masked. new, old, advantages, staleness [n].
    """
    prox = proximal_logprob(new, old, staleness)
    weight = (prox - old).exp()
    kept = weight <= behaviour_weight_max
    weight = torch.where(kept, weight, 0.0)
    ratio = torch.where(kept, new - prox, 0.0).exp()  # masked before exp: 0 · ∞ would be NaN
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    with torch.no_grad():
        log_ratio = new - old
        stats = {
            "approx_kl": ((log_ratio.exp() - 1.0) - log_ratio).sum(),  # http://joschu.net/blog/kl-approx.html
            "clip_fraction": ((ratio - 1.0).abs() > clip).sum(),
            "masked": (~kept).sum(),
            "ratio_max": log_ratio.exp().max(),
        }
    return (weight * loss).sum(), stats


def value_loss(new: Tensor, old: Tensor, returns: Tensor, clip: float, huber: float) -> Tensor:
    """Clipped Huber loss, summed: max(H(V − R), H(clamp(V, V_old ± ε) − R)). All [n]."""
    clipped = old + (new - old).clamp(-clip, clip)
    plain = F.huber_loss(new, returns, reduction="none", delta=huber)
    return torch.maximum(plain, F.huber_loss(clipped, returns, reduction="none", delta=huber)).sum()
