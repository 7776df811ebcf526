"""Numbers of one batch, added where they arise, and the line of metrics.jsonl that they make."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from algorithms import STALENESS, explained_variance
from config import Config
from transfers import Numbers

How = Literal["sum", "mean", "max", "min", "part"]
ALWAYS = ("loss_policy", "loss_value", "approx_kl", "clip_fraction", "masked_fraction")
ALWAYS += ("ratio_max", "staleness_mean")


@dataclass
class Tally:
    """Collects numbers by name, nowhere registered: `add` is enough to have one in metrics.jsonl.

    how: "sum", "max" and "min" appear as they are, "mean" is a sum that appears divided by the
    chunk steps trained, and "part" is a sum that `line` makes other numbers from.

    Numbers that lie on a GPU come to the host together, when `send` and `resolve` are called."""

    first_epoch: bool = True  # whether the running micro-batch is of the batch's first epoch
    values: dict[str, float] = field(default_factory=dict)  # as far as they have come to the host
    how: dict[str, How] = field(default_factory=dict)
    there: list[tuple[str, Tensor]] = field(default_factory=list)  # still on the device
    sent: list[tuple[tuple[str, ...], Numbers]] = field(default_factory=list)  # on their way

    def add(
        self,
        name: str,
        value: Tensor | float,
        how: How = "sum",
        per: Literal["epoch", "batch"] = "epoch",
    ) -> None:
        """per "batch": a fact of the batch, which counts in its first epoch alone; per "epoch": one
        that counts every time."""
        if per == "batch" and not self.first_epoch:
            return
        if self.how.setdefault(name, how) != how:
            raise ValueError(f"the number {name!r} is added as a {how} and as a {self.how[name]}")
        if isinstance(value, Tensor) and not value.is_cpu:
            self.there.append((name, value))
        else:
            self.count(name, float(value))

    def count(self, name: str, number: float) -> None:
        if name not in self.values:
            self.values[name] = number
        elif self.how[name] == "max":
            self.values[name] = max(self.values[name], number)
        elif self.how[name] == "min":
            self.values[name] = min(self.values[name], number)
        else:
            self.values[name] += number

    def send(self) -> None:
        """Lets what was added since the last time travel to the host, and takes in what was sent
        then: the host waits for that, and the device has work meanwhile."""
        before = self.sent
        self.sent = []
        if self.there:
            names, numbers = zip(*self.there, strict=True)
            self.sent = [(names, Numbers(numbers))]
            self.there = []
        for names, numbers in before:
            for name, number in zip(names, numbers.read(), strict=True):
                self.count(name, number)

    def resolve(self) -> None:
        """Waits for everything that was added: `values` are complete then."""
        self.send()
        self.send()

    def merge(self, other: "Tally") -> None:
        """Takes in what another rank has tallied of the same batch."""
        for name, value in other.values.items():
            self.add(name, value, other.how[name])

    def get(self, name: str) -> float:
        """Returns a number as it stands; 0 where nothing was added."""
        return self.values.get(name, 0.0)

    def line(self, version: int, config: Config, tasks: tuple[str, ...]) -> dict:
        """Returns what was tallied of a batch, under the names of the run folder's interface.

        version: the one that the batch made. docs/metrics.md says what each number means."""
        trained = max(1.0, self.get("trained"))  # chunk steps, over all epochs
        once = max(1.0, self.get("trained_once"))  # and in the first
        # A batch whose groups were all filtered has added none of these.
        line = dict.fromkeys(ALWAYS, 0.0) | {"iteration": version, "version": version}
        for name, value in self.values.items():
            if self.how[name] != "part":
                line[name] = value / trained if self.how[name] == "mean" else value
        for name in ("trained", "trained_once", "filtered", "skipped", "staleness_max"):
            line[name] = int(self.get(name))
        line |= self.successes(tasks)
        line |= {
            "reward": self.get("reward_sum") / (config.actor.batch * config.train.nodes),
            "entropy_or_noise": line.get("entropy_or_noise"),
            "masked": int(self.get("masked_fraction")),
            "filtered_fraction": self.get("filtered")
            / (self.get("filtered") + once + self.get("undrawn")),
            "reuse": self.get("trained") / once,
            "discarded_by": {
                reason: int(self.get(reason))
                for reason in ("restart", "filtered", "undrawn", "after_end")
            },
        }
        if "returns" in self.values:
            names = ("returns", "returns_square", "error", "error_square")
            line["explained_variance"] = explained_variance(*map(self.get, names), once)
        return line | self.staleness()

    def successes(self, tasks: tuple[str, ...]) -> dict:
        """Returns episodes and success rates. The mean is over tasks: trajectories have a fixed
        length, so pooled episodes would count the quick tasks more often."""
        episodes = {task: int(self.get(f"episodes_{k}")) for k, task in enumerate(tasks)}
        counts = {task: int(self.get(f"trajectories_{k}")) for k, task in enumerate(tasks)}
        rates = {
            f"success_{task}": self.get(f"successes_{k}") / episodes[task]
            for k, task in enumerate(tasks)
            if episodes[task]
        }
        return rates | {
            "trajectories_per_task": counts,
            "episodes_per_task": episodes,
            "episodes": sum(episodes.values()),
            "success_rate": sum(rates.values()) / len(rates) if rates else None,
        }

    def staleness(self) -> dict:
        """Returns the diagnostics of every staleness bucket that has samples."""
        numbers = {"staleness_hist": {}}
        for name in STALENESS:
            if count := self.get(f"samples_at_{name}"):
                numbers["staleness_hist"][name] = int(count)
                numbers[f"kl_at_{name}"] = self.get(f"kl_at_{name}") / count
                numbers[f"ratio_at_{name}"] = self.get(f"ratio_at_{name}") / count
        return numbers
