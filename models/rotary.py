"""Rotary embedding as the language models of π0, π0.5 (Gemma) and GR00T (Qwen3) have it: θ is all
they differ in.
"""

import torch
from torch import Tensor


def rotary(
    positions: Tensor, d: int, dtype: torch.dtype, theta: float = 1e4
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [n, 1, S, d/2], computed in fp32. positions [n, S]."""
    half = d // 2
    frequency = theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, S, d], its halves rotated."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
