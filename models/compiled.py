"""Compiled inference: a model's blocks go through torch.compile, and on a GPU its whole `act` is
replayed as a CUDA graph, for a few fixed batch sizes.

    python train.py --compile True          (what a GPU does anyway)

A block is an entry of a ModuleList (`layers.blocks`). All blocks of a list are one code, compiled
once whatever the number of layers. The size of the batch is a variable in it, so that a worker
compiles twice, for one sample (which torch.compile takes for a constant) and for all others. What
stands between blocks stays eager; a family without ModuleLists is not compiled.

Left to launch are hundreds of kernels, each of which takes the processor longer than a GPU. A CUDA
graph launches all of them at once, of one batch size: batches are padded to `bucket`. Left out:
CUDA graphs of the actor, whose sizes and weights change.
"""

import contextlib
import fcntl
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from errors import UserError
from models import layers

COMPILED_FOR = 8  # samples, at most: kernels are laid out for about so many, and take any number
WARM_UPS = 2  # calls before a graph is captured: libraries choose their kernels in the first one

# What `act` takes: observations and drawn numbers.
Given = tuple[dict[str, Tensor], dict[str, Tensor]]


def bucket(n: int) -> int:
    """The batch size that n samples are padded to: 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, …
    At full size eight samples take 1.6 times as long as five."""
    if n < 4:
        return n
    step = 1 << (n.bit_length() - 3)  # n lies from 4 to below 8 steps
    steps = -(-n // step)
    return step * (8 if steps == 7 else steps)


def pad(tensors: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Every tensor [m, …] → [n, …], the last row repeated."""
    return {
        name: torch.cat([x, x[-1:].expand(n - len(x), *x.shape[1:])]) for name, x in tensors.items()
    }


def random_observations(model: nn.Module, n: int, device: str) -> dict[str, Tensor]:
    """`model.observation_fields()` [n, …]: noise as pictures, prompts without padding."""
    obs = {}
    for name, (shape, dtype) in model.observation_fields().items():
        if dtype.is_floating_point:
            obs[name] = torch.randn(n, *shape)
        else:  # words that are special in no vocabulary
            low, high = (0, 256) if dtype is torch.uint8 else (3, 300)
            obs[name] = torch.randint(low, high, (n, *shape), dtype=dtype)
    if hasattr(model.config, "image_token"):
        obs["tokens"][:, : model.config.views] = model.config.image_token
    return {name: x.to(device) for name, x in obs.items()}


def random_noise(model: nn.Module, n: int, device: str) -> dict[str, Tensor]:
    """What `model.act` needs beside n observations."""
    drawn = model.draw([(1, lane, 0, 0) for lane in range(n)], [True] * n)
    return {name: x.to(device) for name, x in drawn.items()}


# ---------------------------------------------------------------- blocks


def compile_parts(model: nn.Module) -> None:
    """Makes every block of the model compile itself at its first call. A block that is no single
    graph is an error."""
    import torch._dynamo  # half a compiler, which takes seconds

    torch._dynamo.config.recompile_limit = 64  # codes of one forward; past it, it would go eagerly
    for block in layers.blocks(model).values():
        block.forward = partial(
            of_any_batch, torch.compile(block.forward, dynamic=False, fullgraph=True)
        )


def of_any_batch(forward: Callable, *given, **named):
    """Calls a compiled block, which is to take the first dimension of what it is given, the batch,
    for a variable, and all others for constants."""
    for x in tree_leaves((given, named)):
        if isinstance(x, Tensor) and x.dim() and len(x) > 1:
            torch._dynamo.maybe_mark_dynamic(x, 0)
    return forward(*given, **named)


def compile_for(model: nn.Module, most: int, device: str, sign_of_life: Callable[[], None]) -> None:
    """Compiles the blocks for batches of up to `most` samples, before any is asked for. Raises
    UserError where torch.compile does not work."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    compile_parts(model)
    try:
        # As in a rollout worker: a code is for tensors made in this mode, or for others.
        with first_alone(model, device, sign_of_life), torch.inference_mode():
            for n in sorted({1, min(most, COMPILED_FOR)}):
                model.act(random_observations(model, n, device), random_noise(model, n, device))
                sign_of_life()
    except (TorchDynamoException, InductorError) as error:  # no compiler here, for instance
        why = str(error).strip().splitlines()[0]
        instead = "where a compiler is missing install gcc and g++, or give --compile False"
        raise UserError(f"torch.compile does not work here ({why}): {instead}") from None


@contextlib.contextmanager
def first_alone(model: nn.Module, device: str, sign_of_life: Callable[[], None]) -> Iterator[None]:
    """Lets one of the processes that compile the same at the same time go first, so that the others
    find it in torch's cache on disk. These then go together.

    The cache tells devices apart by their number, so those of other devices do not wait. The
    kernel releases the lock of a process that dies."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    what = repr((type(model), model.config, device))
    name = f"vla3-{hashlib.sha1(what.encode()).hexdigest()[:16]}.lock"
    with (Path(cache_dir()) / name).open("w") as file:
        wanted = fcntl.LOCK_EX
        while True:
            try:
                fcntl.flock(file, wanted | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wanted = fcntl.LOCK_SH
                sign_of_life()
                time.sleep(0.1)
        yield


# ---------------------------------------------------------------- CUDA graphs


class Graphs:
    """Stands for `act` of a model on a GPU and replays it, captured when a batch size first comes.

    A graph reads and writes the addresses that it was captured with. Weights must stay where they
    are (`WeightFetcher` copies new ones there). Graphs of all sizes read and write the first rows
    of the same tensors: what a call returns is overwritten by the next one.

    Where capturing fails, the process says so once and goes on without."""

    def __init__(self, act: Callable, largest: int):
        """largest: the largest batch that can come."""
        self.act = act
        self.largest = largest
        self.given: Given = ({}, {})  # what graphs read [largest, …]
        self.results: dict[str, Tensor] = {}  # what they write [largest, …]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch size
        self.pool = torch.cuda.graph_pool_handle()
        self.fails = False

    def __call__(self, obs: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `act`."""
        n = len(next(iter(noise.values())))
        if not self.results and not self.fails:
            self.given = pad(obs, self.largest), pad(noise, self.largest)
            self.capture(self.largest)  # first, so that all others fit into its memory
        if n not in self.graphs and not self.fails:
            self.capture(n)
        if n not in self.graphs:
            return self.act(obs, noise)
        for mine, given in zip(self.given, (obs, noise), strict=True):
            for name, x in given.items():
                mine[name][:n].copy_(x, non_blocking=True)
        self.graphs[n].replay()
        return first(self.results, n)

    def capture(self, n: int) -> None:
        """Captures `act` for n samples, as torch's notes on CUDA graphs have it: warmed up on a
        side stream."""
        obs, noise = (first(tensors, n) for tensors in self.given)
        now = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(now)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    out = self.act(obs, noise)
            now.wait_stream(side)
            if not self.results:
                self.results = {name: torch.empty_like(x) for name, x in out.items()}
            del out  # before the graph takes its memory
            graph = torch.cuda.CUDAGraph()
            # Other threads of this process may use the GPU meanwhile: new weights are fetched. A
            # capture that fails leaves its stream the current one; the outer context does not.
            with (
                torch.cuda.stream(now),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                for name, x in self.act(obs, noise).items():
                    self.results[name][:n].copy_(x)
        except RuntimeError as error:
            self.fails = True
            why = str(error).strip().splitlines()[0]
            said = f"warning: inference goes without CUDA graphs: capturing {n} samples fails"
            print(f"{said} ({why})", file=sys.stderr, flush=True)
            return
        self.graphs[n] = graph


def first(tensors: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Every tensor [m, …] → its first n rows, as views."""
    return {name: x[:n] for name, x in tensors.items()}
