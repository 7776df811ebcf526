"""Measures inference of one rollout worker over batch sizes: how fast it is, where its time goes,
and how near it comes to what the machine can do.

    python bench.py inference --model pi05 --size small

Weights, pictures and prompts are random; figures are medians. There is a row for every batch size.
On a GPU it computes in bf16, as a rollout worker does (`--precision auto`); rows are eager, and
then with blocks that torch.compile has compiled. On a CPU they are eager, in fp32.

    samples_per_s              `model.act`: actions, log-prob and value of a batch whose
                               observations lie on the device already
    share_of_peak              FLOPs of act over its time, over peak_gflop_per_s
    act_s                      one act
    prefix_s                   what runs once per act: π's prefix, GR00T's features and context, the
                               whole forward of OFT
    denoise_step_s             one velocity of the flow; act takes `denoise_steps` of them; OFT has
                               none
    gflop_per_sample           matrix products of act
    peak_gflop_per_s           of a large matrix product in the same type, which takes turns with
                               the calls above

Left out: CUDA graphs, several GPUs, copying observations to the device, half precision on CPUs.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import models
from benchmarks.measuring import flops_of, matmul, random_model, seconds_of, where
from models.compiled import compile_parts, random_noise, random_observations

BATCHES = (1, 8, 32, 64)


def pieces(name: str, model: nn.Module, obs: dict[str, Tensor]) -> tuple[Callable, Callable | None]:
    """Makes what runs once per `act`, and one denoise step given its result (OFT: None)."""
    if name == "oft":
        return functools.partial(oft_logits, model, obs), None
    if name == "gr00t":
        return gr00t_pieces(model, obs)
    c = model.config
    n = len(obs["tokens"])
    device = obs["tokens"].device
    once = functools.partial(model.prefix, obs["image"], obs["tokens"])
    cache, _, real = once()
    x_t = torch.randn(n, c.chunk, c.action_dim, device=device)
    t = torch.full((n,), 0.5, device=device)
    return once, functools.partial(model.velocity, cache, real, x_t, t, obs.get("state"))


def oft_logits(model: nn.Module, obs: dict[str, Tensor]) -> Tensor:
    return model.action_logits(model.hidden(obs["image"], obs["tokens"]))


def gr00t_context(model: nn.Module, obs: dict[str, Tensor]):
    features, real = model.features(obs)
    return model.context(features, real)


def gr00t_pieces(model: nn.Module, obs: dict[str, Tensor]) -> tuple[Callable, Callable]:
    c = model.config
    n = len(obs["tokens"])
    device = obs["tokens"].device
    dtype = model.vlln.weight.dtype
    once = functools.partial(gr00t_context, model, obs)
    state = model.encode_state(obs["state"].to(dtype), c.embodiment)
    x_t = torch.randn(n, c.horizon, c.max_action_dim, device=device, dtype=dtype)
    bucket = torch.full((n,), c.time_buckets // 2, device=device)
    return once, functools.partial(model.velocity, once(), state, x_t, bucket, c.embodiment)


@torch.inference_mode()
def inference_row(
    name: str, model: nn.Module, n: int, device: str, flops: float, seconds: float
) -> dict:
    """Measures one batch size. flops: of one sample."""
    obs = random_observations(model, n, device)
    noise = random_noise(model, n, device)
    once, step = pieces(name, model, obs)
    product, product_flops = matmul(device, torch.bfloat16 if device == "cuda" else torch.float32)
    calls = [functools.partial(model.act, obs, noise), product, once]
    if step:
        calls.append(step)
    act_s, product_s, once_s, *step_s = seconds_of(calls, device, seconds)
    peak = product_flops / product_s
    return {
        "batch": n,
        "samples_per_s": n / act_s,
        "share_of_peak": n * flops / act_s / peak,
        "act_s": act_s,
        "prefix_s": once_s,
        "denoise_step_s": step_s[0] if step else None,
        "denoise_steps": getattr(model.config, "denoise_steps", None),
        "gflop_per_sample": flops / 1e9,
        "peak_gflop_per_s": peak / 1e9,
    }


def measure(name: str, size: str, seconds: float) -> list[dict]:
    """Measures a row per batch size, and on a GPU again compiled.

    Raises UserError for the full size on a CPU.
    """
    device, size = where(size)
    changes = {"prefix_dtype": "bfloat16"} if device == "cuda" and name != "oft" else {}
    model = random_model(name, size, device, torch.float32, **changes).eval().requires_grad_(False)
    if device == "cuda":
        for key, parameter in model.named_parameters():
            parameter.data = parameter.data.to(model.dtype_of(key) or parameter.dtype)
        model.compute = torch.bfloat16
        models.acting(model)
    one = random_observations(model, 1, device)
    noise = random_noise(model, 1, device)
    # Counted before anything is compiled.
    flops = flops_of(functools.partial(model.act, one, noise))
    rows = []
    for mode in ("eager", "compiled") if device == "cuda" else ("eager",):
        if mode == "compiled":
            compile_parts(model)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        about = {"model": name, "size": size, "dtype": ", ".join(dtypes), "mode": mode}
        try:
            for n in BATCHES:
                rows.append(about | inference_row(name, model, n, device, flops, seconds))
        except TorchDynamoException as error:
            # There is no compiler here, for instance. The eager rows are worth having.
            first = str(error).strip().splitlines()[0]
            print(f"torch.compile failed, so its rows end here: {first}")
    return rows
