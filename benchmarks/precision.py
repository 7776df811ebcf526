"""Measures how far the log-prob that training computes lies from the one of the rollout, under the
same weights: what a ratio of 1 is worth in each precision.

    python -m benchmarks.precision                    every family; some minutes on two cores
    python -m benchmarks.precision pi05 --rows 96     this one, of more chunk steps
    python -m benchmarks.precision pi05 --wide        eight times as wide, random weights

`act` runs on batches of 1 and 16, and `evaluate` on micro-batches of 1, 16 and all of the same
chunk steps. A CPU takes the same sums in the same order for all of them, as GPUs do not. So the
second kind of row has `evaluate` take every product's sum in two halves, in fp32, and attention by
its definition: what another kernel does, whose results are rounded to bf16 where this one's are.

    gap_mean, gap_max   |difference| of a chunk's log-prob, over chunk steps
    ratio               the lowest and the highest of exp(difference)
    clipped             share of chunks whose ratio is beyond 1 ± 0.2

Weights are those shipped for Meta-World, pictures and prompts are random. "published" is RLinf's
noise on LIBERO: a = 0.5, any of the steps.
"""

import argparse
import contextlib
import itertools
import math
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from config import Config, completed, embedded_files
from envs import EnvSpec
from errors import exit_on_user_error
from models.compiled import random_noise, random_observations

SPEC = EnvSpec(("reach",), ("reach the goal",), 1, 64, 4, 4, 100)
BATCHES = (1, 16)  # of act
KERNELS = ("the same", "other")
PUBLISHED = {"noise_level": 0.5, "sde_steps": 4}
CASES = {
    "pi05": {},
    "pi05 published": PUBLISHED,
    "pi0": {},
    "pi0 published": PUBLISHED,
    "pi0 Flow-Noise": {"noise": "network"},
    "gr00t": {},
    "gr00t published": PUBLISHED,
    "oft": {},
    "oft published": {"temperature": 1.6},
}


def other_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Stands for F.linear of another kernel: two partial sums over the inputs."""
    half = x.shape[-1] // 2
    y = x[..., half:].float() @ weight[:, half:].float().T
    y = y + x[..., :half].float() @ weight[:, :half].float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def other_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, enable_gqa=False) -> Tensor:
    """Stands for attention of another kernel: the definition, in fp32."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.float()
    return (logits.softmax(-1) @ v.float()).to(q.dtype)


@contextlib.contextmanager
def other_kernels():
    with (
        patch.object(F, "linear", other_linear),
        patch.object(F, "scaled_dot_product_attention", other_attention),
    ):
        yield


def model_of(case: str, precision: str, wide: bool) -> nn.Module:
    family = case.partition(" ")[0]
    changes = {"model": family, "precision": precision, "cache_prefix": "off"} | CASES[case]
    shipped, tokenizer = embedded_files(family, "metaworld")
    changes |= {"checkpoint": shipped, "tokenizer": tokenizer}
    model = models.build(completed(Config(), **changes), SPEC)
    return widened(model) if wide else model


def widened(model: nn.Module) -> nn.Module:
    """The same network, eight times as wide and twice as deep, of random weights."""
    c = model.config
    sizes = {"depth": 2 * c.depth, "heads": 8, "width": 1024, "mlp": 3072}
    for name, size in (("head_dim", 128), ("expert_width", 768), ("expert_mlp", 2048)):
        sizes |= {name: size} if hasattr(c, name) else {}
    torch.manual_seed(0)
    made = type(model)(replace(c, **sizes))
    made.compute = model.compute
    for name, parameter in made.named_parameters():
        parameter.data = parameter.data.to(made.dtype_of(name) or parameter.dtype)
    return made


@torch.no_grad()
def gaps(model: nn.Module, rows: int) -> dict[str, Tensor]:
    """Differences of log-probs of chunks, evaluated − acted, of every pair of sizes [pairs·n], by
    the kernels that evaluate."""
    torch.manual_seed(1)
    obs = random_observations(model, rows, "cpu")
    noise = random_noise(model, rows, "cpu")
    found: dict[str, list[Tensor]] = {kernels: [] for kernels in KERNELS}
    for size in BATCHES:
        parts = []
        for first in range(0, rows, size):
            cut = slice(first, first + size)
            taken = ({name: x[cut] for name, x in one.items()} for one in (obs, noise))
            parts.append(model.act(*taken))
        acted = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        stored = {name: (obs | acted)[name].clone() for name in model.training_fields()}
        for kernels, micro in itertools.product(KERNELS, (1, 16, rows)):
            for first in range(0, rows if micro > 1 else 8, micro):
                cut = slice(first, first + micro)
                with other_kernels() if kernels == "other" else contextlib.nullcontext():
                    now = model.evaluate({name: x[cut] for name, x in stored.items()})
                gap = (now["logprob"] - acted["logprob"][cut]).double().sum((1, 2))
                found[kernels].append(gap)
    return {kernels: torch.cat(parts) for kernels, parts in found.items()}


def show(case: str, precision: str, rows: int, wide: bool) -> None:
    """Prints a case's two lines of the table."""
    name = f"{case}{', wide' if wide else ''}"
    for kernels, found in gaps(model_of(case, precision, wide), rows).items():
        ratio = found.exp()
        clipped = ((ratio - 1).abs() > 0.2).double().mean()
        size = f"{found.abs().mean():.1e} | {found.abs().max():.1e}"
        between = f"{ratio.min():.4f} … {ratio.max():.4f}"
        line = f"| {name} | {precision} | {kernels} | {size} | {between} | {clipped:.1%} |"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--wide", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | precision | kernels | gap, mean | largest | ratio | clipped |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if given.families and case.partition(" ")[0] not in given.families:
            continue
        for precision in ("float32", "bfloat16"):
            show(case, precision, given.rows, given.wide)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
