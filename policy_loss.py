"""The loss of a policy: PPO's, decoupled, with every way to keep the weight of stale samples from
harm (--behaviour-weight). docs/learning.md says which suits which staleness.

Sizes, as in algorithms.py: n samples, which are chunk steps, of U units each.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import AlgorithmConfig
from errors import require

LARGEST = 1e38  # as float32 can hold
FINITE = math.exp(20)  # no weight is larger, as in verl
# Corrections, with the bounds of `PolicyLoss` that each uses and their published values. mask,
# truncate and icepop are AReaL's (icepop after Ring-1T). sequence and geometric reject what
# presets of verl do (verl/trainer/config/algorithm.py, `decoupled_seq_is_rs`, `decoupled_geo_rs`),
# within its bounds; but each unit keeps its w, where verl has the product's or none. The others are
# their papers'; GIPO's tried σ from 0.1 to 2. The bounds of geometric are meant for two engines
# that run the same weights: stale samples differ by more, so give wider ones.
CORRECTIONS: dict[str, dict[str, float]] = {
    "mask": {"weight_max": 5.0},
    "truncate": {"weight_max": 5.0},
    "icepop": {"weight_min": 0.5, "weight_max": 5.0},
    "sequence": {"weight_min": 0.5, "weight_max": 2.0},
    "geometric": {"weight_min": 0.999, "weight_max": 1.001},
    "kpop": {"trust": 0.1},
    "m2po": {"trust": 0.04},
    "gipo": {"trust": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Decoupled PPO (AReaL, arXiv 2505.24298); PPO (arXiv 1707.06347) where the proximal policy is
    the one that acted.

        w = exp(proximal − old)    how far the policy had moved before this update; no gradient
        ratio = exp(new − proximal)
        objective = w · min(ratio·A, clamp(ratio, 1 − ε_low, 1 + ε_high)·A)
        where A < 0 and c > 0:  objective = max(objective, w·c·A)

    ε_low ≠ ε_high is clip-higher (DAPO, arXiv 2503.14476), c is dual clip (arXiv 1912.09729).
    `weight_mode` says how w is kept from harm; CORRECTIONS has the published bounds. A unit is
    trained where its condition holds, and masked elsewhere (min, max: `weight_min`, `weight_max`):

        mask       w ≤ max                                      AReaL
        truncate   always, by min(w, max)                       fengyao.notion.site/off-policy-rl
        icepop     min ≤ w ≤ max                                Ring-1T, arXiv 2510.18855
        sequence   min ≤ Π w ≤ max, over the units of a sample  verl's rejection by seq_sum_k1
        geometric  min ≤ (Π w)^(1/U) ≤ max                      verl's rejection by seq_mean_k1
        kpop       D(p‖q) ≤ φ and D(q‖p) ≤ φ                    ringtech.notion.site/kpop
        m2po       (log w)² ≤ `cut`                             AReaL's: see `SecondMoment`

    p = exp(proximal), q = exp(old), and D(p‖q) = p·log(p/q) + (1 − p)·log((1 − p)/(1 − q)) tells
    the unit from all else: so kpop is for probabilities, not for densities, and of single tokens:
    those of whole chunks are all next to 0, and so is D. A sequence is a chunk step here, the
    counterpart of an LLM's response: one inference drew it, and it is never cut, while a
    trajectory's chunk steps are trained in different passes, as they arrive. With one unit a chunk,
    sequence and geometric are icepop.

        gipo       objective = ω · exp(new − old) · A,  ω = exp(−½·((new − old) / σ)²)

    is GIPO (arXiv 2603.03955): a soft weight ω, without gradient, in place of w, of the proximal
    policy and of clipping. Nothing is masked."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    weight_mode: str = "mask"
    weight_min: float = 0.0
    weight_max: float = 5.0
    trust: float = 1.0  # φ of kpop, τ of m2po, σ of gipo
    cut: float = LARGEST  # m2po: the largest (log w)² that is trained

    def __call__(
        self, new: Tensor, old: Tensor, proximal: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of n samples of U units.

        new, old, proximal [n, U]: log-probs under the policy that is trained, the one that acted
        and the proximal one. advantages [n], or [n, U] of each unit. Returns the loss [] and
        `clip_fraction`, `masked_fraction` and what m2po measures, all of them sums over samples."""
        per_unit = 1.0 / new.shape[1]
        a = advantages.view(len(new), -1)
        if self.weight_mode == "gipo":
            none = torch.zeros((), device=new.device)
            objective = soft_ratio(new - old, self.trust) * a
            return -objective.sum() * per_unit, {"clip_fraction": none, "masked_fraction": none}

        log_weight = proximal - old
        weight = log_weight.exp()
        kept = self.keeps(weight, log_weight, proximal, old)
        most = min(self.weight_max, FINITE) if self.weight_mode == "truncate" else FINITE
        weight = torch.where(kept, weight.clamp(max=most), 0.0)
        log_ratio = torch.where(kept, new - proximal, 0.0)  # masked before exp: 0 · ∞ would be NaN
        ratio = log_ratio.exp()
        objective = torch.minimum(
            ratio * a, ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * a
        )
        if self.dual_clip:
            objective = torch.where(a < 0, torch.maximum(objective, self.dual_clip * a), objective)
        clipped = kept & ((ratio < 1.0 - self.clip_low) | (ratio > 1.0 + self.clip_high))
        numbers = {
            "clip_fraction": clipped.sum() * per_unit,
            "masked_fraction": (~kept).sum() * per_unit,
        }
        if self.weight_mode == "m2po":
            numbers |= SecondMoment(self.trust).measure(log_weight)
        return -(weight * objective).sum() * per_unit, numbers

    def keeps(self, weight: Tensor, log_weight: Tensor, proximal: Tensor, old: Tensor) -> Tensor:
        """Tells which units are trained [n, U], from w, log w and its parts, all [n, U]."""
        if self.weight_mode == "mask":
            return weight <= self.weight_max
        if self.weight_mode == "truncate":
            return torch.ones_like(log_weight, dtype=torch.bool)
        if self.weight_mode == "kpop":
            there_and_back = torch.maximum(binary_kl(proximal, old), binary_kl(old, proximal))
            return there_and_back <= self.trust
        if self.weight_mode == "m2po":
            return log_weight.square() <= self.cut
        if self.weight_mode == "sequence":
            weight = log_weight.sum(1, keepdim=True).exp().expand_as(log_weight)
        elif self.weight_mode == "geometric":
            weight = log_weight.mean(1, keepdim=True).exp().expand_as(log_weight)
        return (weight >= self.weight_min) & (weight <= self.weight_max)


def binary_kl(p: Tensor, q: Tensor) -> Tensor:
    """Returns D(p‖q) = p·log(p/q) + (1 − p)·log((1 − p)/(1 − q)) of log-probs p and q, of the same
    shape.

    Probabilities above 1 − 1e-6 count as that, so that a certain unit costs no infinity."""
    certain = 1.0 - 1e-6
    left_p = 1.0 - p.exp().clamp(max=certain)
    left_q = 1.0 - q.exp().clamp(max=certain)
    return p.exp() * (p - q) + left_p * (left_p / left_q).log()


def soft_ratio(log_ratio: Tensor, sigma: float) -> Tensor:
    """Returns ω·exp(x) of x = log_ratio, ω = exp(−½·(x/σ)²) without gradient. It is at most
    exp(½σ²), for it is made of logarithms: 0 · ∞ would be NaN."""
    return (log_ratio - 0.5 * (log_ratio.detach() / sigma).square()).exp()


@dataclass(frozen=True)
class SecondMoment:
    """M2PO's bound (arXiv 2510.01161) in AReaL's form: of a batch's units, those with the largest
    (log w)² are masked until the mean of the others is at most τ.

    The paper counts and masks only units that a clip may hold, those whose A · log w > 0; AReaL
    and we count all.

    Both sort the batch. A streamed batch is trained before all of it exists, so the batch
    before decides (as in `AdvantageScale`). Its (log w)² are counted below each of 22 edges, a
    factor √2 apart but for the last. The cut is the largest edge below which their mean was at most
    τ; the first batch has no cut.

    As in AReaL, w is the proximal policy's weight, and the ratio beside it is clipped.
    Before a batch's first update w is the paper's π/π_old, without clipping."""

    tau: float

    @property
    def edges(self) -> list[float]:
        # Units of at most τ are never masked. Beyond the last but one edge, 1024·τ, weights are not
        # told apart: at the published τ = 0.04 that is a weight of e^6.4.
        return [self.tau * 2 ** (k / 2) for k in range(21)] + [LARGEST]

    def measure(self, log_weight: Tensor) -> dict[str, Tensor]:
        """log_weight [n, U] → how many units lie below each edge, and the sum of their (log w)²:
        both [edges], sums over units."""
        square = log_weight.square()[..., None]
        below = square <= torch.tensor(self.edges, dtype=square.dtype, device=square.device)
        sums = torch.where(below, square, 0.0).sum((0, 1))
        return {"units_below": below.sum((0, 1)), "squares_below": sums}

    def cut(self, totals: dict[str, float], before: float) -> float:
        """Returns the largest (log w)² to be trained, from a batch's tally of what `measure` found;
        as `before` where nothing of it was trained."""
        edges = self.edges
        if not totals.get(f"units_below_{len(edges) - 1}"):
            return before
        found = edges[0]
        for i, edge in enumerate(edges):
            if totals[f"squares_below_{i}"] <= self.tau * totals[f"units_below_{i}"]:
                found = edge
        return found


def check_correction(settings: AlgorithmConfig, densities: bool) -> None:
    """Raises UserError where a bound, proximal policy, granularity or dual clip means nothing to
    --behaviour-weight. (gipo leaves --clip-low and --clip-high unused: they have no off. A recipe's
    largest weight stays unused with --proximal behaviour.)

    densities: whether log-probs are those of continuous actions, which may be above 0."""
    method = settings.behaviour_weight
    flag = f"--behaviour-weight {method}"
    for name, value in given_bounds(settings).items():
        unknown = f"--behaviour-{name.replace('_', '-')} {value} means nothing to {flag}"
        require(name in CORRECTIONS[method], f"{unknown}: leave it out")
    bounds = CORRECTIONS[method] | given_bounds(settings)
    least, most = bounds.get("weight_min", 0.0), bounds.get("weight_max", math.inf)
    fresh = f"--behaviour-weight-max {most} is below 1, the weight of fresh samples"
    require(most >= 1.0, f"{fresh}: give 1 or more")
    require(least < most, f"--behaviour-weight-min {least} must be below the largest, {most}")
    one = f"{flag} has no effect with --proximal behaviour, where w is 1"
    same = settings.proximal == "behaviour" and method not in ("mask", "truncate", "gipo")
    require(not same, f"{one}: leave one of them out")
    none = f"{flag} has no proximal policy: leave out --proximal {settings.proximal}"
    require(method != "gipo" or settings.proximal in ("auto", "behaviour"), none)
    discrete = f"{flag} compares probabilities of tokens, and this model's actions have densities"
    require(method != "kpop" or not densities, f"{discrete}: choose another, such as icepop")
    whole = f"{flag} compares probabilities of tokens, and --granularity {settings.granularity} is"
    single = method != "kpop" or settings.granularity == "token"
    require(single, f"{whole} of several, too small for any bound: give --granularity token")
    unclipped = f"{flag} has no clip: leave out --dual-clip {settings.dual_clip}"
    require(method != "gipo" or not settings.dual_clip, unclipped)


def given_bounds(settings: AlgorithmConfig) -> dict[str, float]:
    """Returns the bounds of the correction that the user gave, by their names in `PolicyLoss`."""
    given = {
        "weight_min": settings.behaviour_weight_min,
        "weight_max": settings.behaviour_weight_max,
        "trust": settings.behaviour_trust,
    }
    return {name: value for name, value in given.items() if value is not None}
