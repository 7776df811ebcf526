"""Warns of what a collapse announces itself by, and says what to change.

Every key of a line may be absent or null: then its sign does not show. The thresholds are rules of
thumb. Left out: changing anything by itself.
"""

from collections.abc import Iterator

# Signs of one number: its key → from where it is unhealthy (above, or below a negative limit), and
# what to say.
SIGNS = {
    "clip_fraction": (
        0.4,
        "{:.0%} of samples lie outside the clip (healthy below 40 %): lower --lr",
    ),
    "masked_fraction": (
        0.05,
        "{:.0%} of samples are too stale: lower --max-staleness or --lr, or, unless "
        "--behaviour-weight is mask, widen its bounds (--behaviour-weight-min and "
        "--behaviour-weight-max, or --behaviour-trust)",
    ),
    "kl_at_3_or_more": (
        1.0,
        "samples 3 and more versions old have KL {:.2g}: lower --max-staleness",
    ),
    "explained_variance": (
        -0.5,
        "the critic explains less than a constant ({:.2f}): raise --value-lr",
    ),
    "grad_norm": (50.0, "the gradient's norm is {:.0f}: lower --lr, and look at episodes' rewards"),
    "filtered_fraction": (0.8, "{:.0%} of steps are in filtered groups: choose other --tasks"),
}
# KL from the policy that acted, over 1 + the versions since. In the runs of benchmarks/results, all
# those went beyond it that learnt from samples 4 and 8 versions old by the interpolated proximal
# policy, or by none: long before some of them collapsed. No other run did.
FAR = 0.2
NARROW = 1.0  # nats that the entropy of actions may lose since the first iteration
FALLEN = 0.25  # how much of a task's success may be lost again
# Trajectories of a task before its success counts as its best. With 16 a batch it is smoothed over
# five iterations by then.
ENOUGH = 80
# Iterations in a row before anything is said. It is said again after ten times as many.
PATIENCE = 3


class Warnings:
    def __init__(self):
        self.ill: dict[str, int] = {}  # sign → iterations in a row
        self.entropy: float | None = None  # of the first iteration that has one
        self.success: dict[str, float] = {}  # of each task, smoothed over some ten iterations
        self.seen: dict[str, int] = {}  # trajectories of each task so far
        self.best: dict[str, float] = {}  # the highest success, once there were ENOUGH

    def of(self, line: dict) -> list[str]:
        """Returns the warnings that a new line gives rise to."""
        found = []
        for name, ill, text in self.signs(line):
            self.ill[name] = self.ill.get(name, 0) + 1 if ill else 0
            if self.ill[name] % (10 * PATIENCE) == PATIENCE:
                found.append(f"warning: {text}")
        return found

    def signs(self, line: dict) -> Iterator[tuple[str, bool, str]]:
        """Yields every sign: its name, whether it shows now, and what to say then."""
        for key, (limit, text) in SIGNS.items():
            value = line.get(key) or 0.0  # which is healthy
            yield key, value > limit if limit > 0 else value < limit, text.format(value)
        yield "approx_kl", *self.distance(line)
        if (entropy := line.get("entropy_or_noise")) is not None:
            yield "entropy", *self.narrowing(entropy)
        for task, count in (line.get("trajectories_per_task") or {}).items():
            if (rate := line.get(f"success_{task}")) is not None:
                yield f"success_{task}", *self.loss_of_success(task, count, rate)

    def distance(self, line: dict) -> tuple[bool, str]:
        """How far the policy is from the one that acted, for the versions in between."""
        kl = line.get("approx_kl") or 0.0
        lag = line.get("staleness_mean") or 0.0
        limit = FAR * (1 + lag)
        return kl > limit, (
            f"the policy is far from the one that acted, {lag:.1f} versions before (KL {kl:.2g}, "
            f"healthy below {limit:.1f}): lower --max-staleness, --lr or --update-epochs, or give "
            "--proximal exact"
        )

    def narrowing(self, now: float) -> tuple[bool, str]:
        """Whether actions vary less and less."""
        if self.entropy is None:
            self.entropy = now
        return now < self.entropy - NARROW, (
            f"actions vary less and less (entropy {self.entropy:.2f} at first, {now:.2f} now), so "
            "little more is learnt: lower --lr, or raise --noise-level or --temperature"
        )

    def loss_of_success(self, task: str, count: int, rate: float) -> tuple[bool, str]:
        """Whether a task's success falls, though another one's may rise; count: trajectories."""
        self.seen[task] = self.seen.get(task, 0) + count
        now = 0.8 * self.success.get(task, rate) + 0.2 * rate
        best = max(now if self.seen[task] >= ENOUGH else 0.0, self.best.get(task, 0.0))
        self.success[task] = now
        self.best[task] = best
        return now < best - FALLEN, (
            f"success at {task} has fallen from {best:.0%} to {now:.0%}: go back with --checkpoint "
            "runs/NAME/checkpoints/NNNNNN and a lower --lr"
        )
