"""The exact proximal policy of decoupled PPO (AReaL, arXiv 2505.24298)."""

import torch
from torch import Tensor


class ExactProximal:
    """Log-probs under the weights that a batch's first update begins from: computed once per
    trajectory, and kept for later epochs."""

    def __init__(self, model, parameters: list[Tensor]):
        self.model = model
        self.parameters = parameters
        self.begin_batch()

    def begin_batch(self) -> None:
        # Weights at the beginning of the batch, once an update has changed them.
        self.before: list[Tensor] | None = None
        self.known: dict[int, Tensor] = {}  # log-probs [T, C, A] by slot

    def keep_weights(self) -> None:
        """Copies the weights; called before every optimizer step, of which the first one counts."""
        if self.before is None:
            self.before = [p.detach().clone() for p in self.parameters]

    def of(
        self,
        stored: dict[str, Tensor],
        now: Tensor,
        slots: tuple[int, ...],
        chosen: Tensor,
        segment: int,
    ) -> Tensor:
        """Returns the proximal log-probs [m, C, A] of a micro-batch's rows.

        stored: slot fields [m, …]; now: log-probs [m, C, A] of the policy that is trained; chosen
        [m]: their places among the chunk steps of `slots`."""
        trajectory = chosen // segment
        row = chosen % segment
        if not self.known.keys() >= set(slots):
            found = self.under_first_weights(stored, now)
            for i, slot in enumerate(slots):
                whole = now.new_zeros(segment, *now.shape[1:])
                whole[row[trajectory == i]] = found[trajectory == i]
                self.known[slot] = whole
        return torch.stack([self.known[slot] for slot in slots])[trajectory, row]

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
            parameter.data, before.data = before.data, parameter.data
