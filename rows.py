"""Chunk steps on their way from the slots to a forward and backward pass."""

from typing import NamedTuple

import torch
from torch import Tensor

Place = tuple[int, int]  # of a chunk step: slot and row


class Rows(NamedTuple):
    """Chunk steps to be trained on: m of them."""

    places: list[Place]  # where each comes from
    stored: dict[str, Tensor]  # slot fields [m, …]
    advantages: Tensor  # [m], not yet scaled
    returns: Tensor | None  # [m]; None without a critic


def joined(first: Rows | None, second: Rows) -> Rows:
    """Puts chunk steps behind others."""
    if first is None or not first.places:
        return second
    stored = {name: torch.cat([x, second.stored[name]]) for name, x in first.stored.items()}
    returns = None if first.returns is None else torch.cat([first.returns, second.returns])
    advantages = torch.cat([first.advantages, second.advantages])
    return Rows(first.places + second.places, stored, advantages, returns)


def cut(rows: Rows, some: slice) -> Rows:
    """Takes some of these chunk steps, in order."""
    stored = {name: x[some] for name, x in rows.stored.items()}
    returns = None if rows.returns is None else rows.returns[some]
    return Rows(rows.places[some], stored, rows.advantages[some], returns)
