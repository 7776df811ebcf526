"""Chunk steps on their way from the slots to a forward and backward pass: which of them are drawn
(--chunk-share), joined, cut."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.noise import Key, generator

START = 2**32  # no chunk step has this number: it names where the draw of a trajectory starts
Place = tuple[int, int]  # of a chunk step: slot and row


class Rows(NamedTuple):
    """Chunk steps to be trained on: m of them."""

    places: list[Place]  # where each comes from
    stored: dict[str, Tensor]  # slot fields [m, …]
    advantages: Tensor  # [m], not yet scaled
    returns: Tensor | None  # [m]; None without a critic


def drawn(kept: Tensor, names: list[Key], share: float) -> Tensor:
    """Draws a share of the chunk steps `kept` [n, T] of each trajectory: returns which [n, T].

    The i-th of a trajectory's is drawn where ⌊share·i + start⌋ > ⌊share·(i − 1) + start⌋, with its
    start uniform in [0, 1), named by the trajectory: systematic sampling (Madow and Madow 1944). So
    each one is drawn with probability `share`, whatever the trajectory's length, and they are
    spread over it. Draws of the same number without replacement would make it a few chunk steps
    more or less likely in short trajectories than in long ones, for numbers are whole."""
    starts = torch.tensor([[generator(name).random()] for name in names], dtype=torch.float64)
    number = kept.cumsum(1)
    return kept & ((share * number + starts).floor() > (share * (number - 1) + starts).floor())


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
