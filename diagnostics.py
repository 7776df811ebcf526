"""What a collapse announces itself by: `Warnings` reads the lines of metrics.jsonl as they come,
and says what to change.

Left out: changing anything by itself. The thresholds are rules of thumb.
"""

from collections.abc import Iterator

# key of a metrics line, from where it is unhealthy (below, where the number is negative), and what
# to say
SIGNS = (
    (
        "clip_fraction",
        0.4,
        "{:.0%} of samples lie outside the clip (healthy below 40 %): lower --lr",
    ),
    (
        "masked_fraction",
        0.05,
        "{:.0%} of samples are too stale to be used: lower --max-staleness or --lr",
    ),
    (
        "kl_at_3_or_more",
        1.0,
        "samples 3 and more versions old differ by KL {:.2g} (healthy below 1): lower "
        "--max-staleness",
    ),
    (
        "explained_variance",
        -0.5,
        "the critic is worse than a constant (explained variance {:.2f}): raise --value-lr",
    ),
    (
        "grad_norm",
        50.0,
        "the gradient's norm is {:.0f} before clipping: lower --lr, and look at the episodes' "
        "rewards",
    ),
    (
        "filtered_fraction",
        0.8,
        "{:.0%} of steps are in groups that nearly all succeed, or fail: choose other --tasks",
    ),
)
# KL from the policy that acted, over 1 + versions since. In the runs of benchmarks/results all that
# learnt from samples 4 and 8 versions old by the interpolated proximal policy, or by none, went
# beyond it, long before some collapsed; and no others did.
FAR = 0.2
# trajectories of a task before its success counts as its best: by then one of 16 a batch is
# smoothed over five
ENOUGH = 80
PATIENCE = (
    3  # iterations in a row before anything is said, and ten times as many before it is said again
)


class Warnings:
    """Says in plain words when a diagnostic has left its healthy range for PATIENCE iterations, and
    what to change.
    """

    def __init__(self):
        self.ill: dict[str, int] = {}
        self.noise: float | None = None  # of the first iteration
        self.success: dict[str, float] = {}  # of each task, smoothed over some ten iterations
        self.seen: dict[str, int] = {}  # trajectories of each task so far
        self.best: dict[str, float] = {}  # the highest that was, once there were ENOUGH

    def of(self, line: dict) -> list[str]:
        found = []
        for key, ill, text in self.signs(line):
            self.ill[key] = self.ill.get(key, 0) + 1 if ill else 0
            if self.ill[key] % (10 * PATIENCE) == PATIENCE:
                found.append(f"warning: {text}")
        return found

    def signs(self, line: dict) -> Iterator[tuple[str, bool, str]]:
        """Every sign: its name, whether it shows now, and what to say then."""
        for key, limit, words in SIGNS:
            value = line.get(key)
            ill = value is not None and (value > limit if limit > 0 else value < limit)
            yield key, ill, words.format(value) if ill else ""
        kl = line.get("approx_kl", 0.0)
        lag = line.get("staleness_mean", 0.0)
        words = (
            f"the policy is far from the one that acted, {lag:.1f} versions before (KL {kl:.2g}, "
            "healthy below"
        )
        change = "lower --max-staleness, --lr or --update-epochs, or give --proximal exact"
        yield "approx_kl", kl > FAR * (1 + lag), f"{words} {FAR * (1 + lag):.1f}): {change}"
        noise = line.get("entropy_or_noise")
        if noise is not None:
            self.noise = noise if self.noise is None else self.noise
            words = (
                f"actions vary less and less (entropy {self.noise:.2f} at first, {noise:.2f} now), "
                "so little more is learnt"
            )
            yield (
                "noise",
                noise < self.noise - 1.0,
                f"{words}: lower --lr, or raise --noise-level or --temperature",
            )
        for task in line.get("trajectories_per_task", ()):
            rate = line.get(f"success_{task}")
            if rate is not None:
                self.seen[task] = self.seen.get(task, 0) + line["trajectories_per_task"][task]
                now = self.success[task] = 0.8 * self.success.get(task, rate) + 0.2 * rate
                best = self.best[task] = max(
                    now if self.seen[task] >= ENOUGH else 0.0, self.best.get(task, 0.0)
                )
                words = f"success at {task} has fallen from {best:.0%} to {now:.0%}"
                yield (
                    f"success_{task}",
                    now < best - 0.25,
                    f"{words}: go back with --checkpoint runs/NAME/checkpoints/NNNNNN and a lower "
                    "--lr",
                )
