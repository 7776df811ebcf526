"""Low-rank adapters (LoRA, arXiv 2106.09685) of every family: the layers that can have one, and
which of them do.

A layer's weight W stays as it is, and alpha/r · B·A is learned beside it, with r inner dimensions.
The sum is never made while training or acting. With adapters everything else of a model is frozen,
but for the heads that reinforcement learning adds (`HEADS`), as in PEFT. Other projects' adapters
on disk: `models/formats/peft.py`. Left out: dropout, adapters of embeddings and of GR00T's weights
per embodiment; an adapted VLM before an expert that is trained whole (RLinf's π).
"""

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import AboveZero, Natural
from errors import require


@dataclass(kw_only=True, frozen=True)
class LoraConfig:
    """Of a family's configuration: the adapters that its weights have."""

    lora_rank: Natural = 0  # r; 0: there are none
    lora_alpha: AboveZero | None = None  # None: the rank, which makes their scale 1
    lora_targets: tuple[str, ...] = ()  # names or patterns for `matching`; none: the family's own

    @property
    def rank(self) -> int:
        """r of the adapters; 0 where there are none."""
        return self.lora_rank

    def with_lora(self, rank: int, alpha: float | None, targets: tuple[str, ...]) -> Self:
        """The configuration with other adapters; with none where `rank` is 0."""
        return replace(self, lora_rank=rank, lora_alpha=alpha, lora_targets=targets)


class Lora(nn.Module):
    """Stands before the class of a layer that can have an adapter, as in Linear.

    parts: where one layer holds several of the original's, one below the other, how many outputs
    each has. Every part has an adapter of its own, as there."""

    def __init__(self, *arguments, parts: tuple[int, ...] = (), **named):
        super().__init__(*arguments, **named)
        self.parts = parts or (len(self.weight),)
        self.scale = 1.0  # alpha/r
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def add_lora(self, rank: int, scale: float = 1.0) -> None:
        """A [parts·r, inputs] normal with std 1/rank, B [outputs, r] zero: PEFT's
        `init_lora_weights="gaussian"`. A convolution's A is one, its B is 1 × 1.

        At least fp32 whatever the weights are: steps of the optimizer are too small for bf16."""
        like = self.weight[:0].to(torch.promote_types(self.weight.dtype, torch.float32))
        first, second = self.shapes(rank)
        self.lora_a = nn.Parameter(like.new_empty(first).normal_() / rank)
        self.lora_b = nn.Parameter(like.new_zeros(second))
        self.scale = scale

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        out, inner, *kernel = self.weight.shape
        return (rank * len(self.parts), inner, *kernel), (out, rank, *(1 for _ in kernel))

    def pairs(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A and B of all parts → of every part, as views."""
        return list(zip(a.chunk(len(self.parts)), b.split(self.parts), strict=True))

    def weights(self, dtype: torch.dtype, rows: slice | None = None) -> tuple[Tensor, ...]:
        """Weight and bias (or None) in the type of what they are multiplied by; only `rows`."""
        chosen = (self.weight, self.bias)
        if rows is not None:
            chosen = tuple(None if p is None else p[rows] for p in chosen)
        return tuple(None if p is None else p.to(dtype) for p in chosen)

    def folded(self) -> Tensor:
        """`weight` with the update added, at least in fp32 where there is one."""
        if self.lora_a is None:
            return self.weight.detach()
        pairs = self.pairs(self.lora_a.detach().flatten(1), self.lora_b.detach().flatten(1))
        update = torch.cat([b @ a for a, b in pairs])
        return self.weight.detach() + self.scale * update.view_as(self.weight)


class Linear(Lora, nn.Linear):
    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """With `rows` only those outputs are computed (of a layer of one part)."""
        weight, bias = self.weights(x.dtype, rows)
        y = F.linear(x, weight, bias)
        if self.lora_a is None:
            return y
        low = F.linear(x, self.lora_a.to(x.dtype)) * self.scale
        if len(self.parts) == 1:
            b = self.lora_b if rows is None else self.lora_b[rows]
            return y + F.linear(low, b.to(x.dtype))
        parts = zip(low.chunk(len(self.parts), -1), self.lora_b.split(self.parts), strict=True)
        return y + torch.cat([F.linear(h, b.to(x.dtype)) for h, b in parts], dim=-1)


class PatchEmbedding(Lora, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] → [n, P, D]."""
        y = F.conv2d(x, *self.weights(x.dtype), self.stride)
        if self.lora_a is not None:
            low = F.conv2d(x, self.lora_a.to(x.dtype), stride=self.stride) * self.scale
            y = y + F.conv2d(low, self.lora_b.to(x.dtype))
        return y.flatten(2).transpose(1, 2)


def layers(model: nn.Module) -> dict[str, Lora]:
    """The layers that can have an adapter, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Lora)}


def adapted(model: nn.Module) -> dict[str, Lora]:
    """Those of them that have one."""
    return {name: layer for name, layer in layers(model).items() if layer.lora_a is not None}


def matching(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the layers that `targets` mean. Raises UserError for one that means none.

    A target is a part of a name between dots, or several, or a pattern of such: "expert", "q_proj",
    "expert.*.mlp"."""
    every = list(layers(model))
    found = set()
    for target in targets:
        mine = [name for name in every if fnmatchcase(f".{name}.", f"*.{target}.*")]
        kinds = ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in every))
        require(mine, f"--lora-targets {target} matches no layer of the model, which has {kinds}")
        found.update(mine)
    return [name for name in every if name in found]


def asked(stored: LoraConfig, actor, default: tuple[str, ...]) -> LoraConfig:
    """The configuration with the adapters that a run trains: as its flags say, or else its
    checkpoint (`stored`). Raises UserError.

    actor: `config.ActorConfig`; default: targets where neither says any."""
    rank = stored.rank if actor.lora_rank is None else actor.lora_rank
    alone = not rank and (actor.lora_alpha or actor.lora_targets)
    require(not alone, "--lora-alpha and --lora-targets describe adapters: give --lora-rank too")
    if not rank:
        return stored.with_lora(0, None, ())
    alpha = actor.lora_alpha or (stored.lora_alpha if rank == stored.rank else None)
    return stored.with_lora(rank, alpha, actor.lora_targets or stored.lora_targets or default)


def fold(model: nn.Module) -> None:
    """Adds every adapter into its weight, and removes it: what is computed stays the same."""
    for layer in adapted(model).values():
        layer.weight.data = layer.folded().to(layer.weight.dtype)
        layer.lora_a = None
        layer.lora_b = None


def adapt(model: nn.Module, default: tuple[str, ...]) -> None:
    """Gives a model the adapters that its configuration says. Others than those are folded first.

    default: targets where the configuration says none."""
    c = model.config
    wanted: dict[str, tuple[int, float]] = {}
    if c.rank:
        scale = (c.lora_alpha or c.rank) / c.rank
        wanted = dict.fromkeys(matching(model, c.lora_targets or default), (c.rank, scale))
    has = adapted(model)
    if {name: (layer.lora_b.shape[1], layer.scale) for name, layer in has.items()} == wanted:
        return
    fold(model)
    for name, settings in wanted.items():
        model.get_submodule(name).add_lora(*settings)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns where a model has adapters: they, and the heads."""
    every = model.named_parameters()
    return {n: p for n, p in every if ".lora_" in n or n.partition(".")[0] in model.HEADS}


def folded(model: nn.Module, name: str) -> Tensor:
    """A tensor of a model by its name; a weight with its adapter added into it."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    return layer.folded() if isinstance(layer, Lora) and leaf == "weight" else getattr(layer, leaf)
