"""What the first epoch of a batch computes of a chunk step, and later epochs use again: the
log-prob of the exact proximal policy, and what a frozen VLM makes of a frame.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rows import Place


class Kept:
    """Tensors by name, of every chunk step of a batch, on the device where they were computed."""

    def __init__(self):
        self.rows: dict[Place, dict[str, Tensor]] = {}

    def begin_batch(self) -> None:
        self.rows.clear()

    def of(
        self, places: list[Place], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Returns the tensors [m, …] of m chunk steps. compute() makes them, without a gradient: in
        the first epoch alone, which has all chunk steps of the later ones."""
        if places[0] in self.rows:
            rows = [self.rows[place] for place in places]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        found = compute()
        for i, place in enumerate(places):
            self.rows[place] = {name: tensor[i] for name, tensor in found.items()}
        return found


class ExactProximal:
    """Log-probs under the weights that a batch's first update begins from (AReaL, arXiv
    2505.24298)."""

    def __init__(self, model, parameters: list[Tensor]):
        self.model = model
        self.parameters = parameters
        self.kept = Kept()
        self.begin_batch()

    def begin_batch(self) -> None:
        # Weights at the beginning of the batch, once an update has changed them.
        self.before: list[Tensor] | None = None
        self.kept.begin_batch()

    def keep_weights(self) -> None:
        """Copies the weights; called before every optimizer step, of which the first one counts."""
        if self.before is None:
            self.before = [p.detach().clone() for p in self.parameters]

    def of(self, stored: dict[str, Tensor], now: Tensor, places: list[Place]) -> Tensor:
        """Returns the proximal log-probs [m, C, A] of m chunk steps.

        stored: slot fields [m, …]; now: log-probs [m, C, A] of the policy that is trained."""
        found = self.kept.of(places, lambda: {"logprob": self.under_first_weights(stored, now)})
        return found["logprob"]

    def under_first_weights(self, stored: dict[str, Tensor], now: Tensor) -> Tensor:
        if self.before is None:  # nothing has changed yet
            return now.detach()
        self.exchange()
        with torch.no_grad():
            found = self.model.evaluate(stored)["logprob"]
        self.exchange()
        return found

    def exchange(self) -> None:
        for parameter, before in zip(self.parameters, self.before, strict=True):
            # In place: a part of a weight that ranks share is known by where it lies.
            now = parameter.data.clone()
            parameter.data.copy_(before)
            before.copy_(now)
