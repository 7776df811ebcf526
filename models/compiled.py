"""Compiled inference: the large pieces of a family's `act` go through torch.compile, for a few
fixed batch sizes.

    python train.py --compile True          (what a GPU does anyway)

Kernels fitted to a batch size are worth their compilation if the size comes back: batches are
padded to powers of two. All sizes that a rollout worker can meet are compiled before it says that
it is ready, and kept on disk by torch for the next run. Left out: CUDA graphs (they fix the
addresses of weights, which two blocks of memory take turns to hold).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from errors import UserError

SMALLEST = 8  # samples; below, an inference is bound by reading weights, so padding is nearly free


def bucket(n: int) -> int:
    """The batch size that n samples are padded to."""
    return max(SMALLEST, 1 << (n - 1).bit_length())


def buckets(most: int) -> list[int]:
    """All that batches of at most `most` samples can meet."""
    return [SMALLEST << i for i in range((bucket(most) // SMALLEST).bit_length())]


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


def compile_parts(model: nn.Module) -> None:
    """`model.COMPILED`, in place. A piece that is no single graph is an error."""
    for part in model.COMPILED:
        setattr(model, part, torch.compile(getattr(model, part), dynamic=False, fullgraph=True))


def compile_for(model: nn.Module, most: int, device: str, sign_of_life: Callable[[], None]) -> None:
    """Compiles `act` for every batch of at most `most` samples. Raises UserError where
    torch.compile does not work."""
    # Half a compiler, which takes seconds to import.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    sizes = buckets(most)
    torch._dynamo.config.recompile_limit = 2 * len(sizes) + 8  # past it, torch would go on eagerly
    compile_parts(model)
    try:
        # As in a rollout worker: a graph is for tensors made in this mode, or for others.
        with torch.inference_mode():
            for n in sizes:
                model.act(random_observations(model, n, device), random_noise(model, n, device))
                sign_of_life()
    except (TorchDynamoException, InductorError) as error:  # no compiler here, for instance
        why = str(error).strip().splitlines()[0]
        raise UserError(f"torch.compile does not work here ({why}): give --compile False") from None
