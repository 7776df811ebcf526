"""Inference of one rollout worker over batch sizes: how fast, where its time goes, and how near to
what the machine can do.

    python bench.py inference --model pi05 --size small

Random weights, pictures and prompts; medians. Rows: every batch size, on a GPU with the VLM in bf16
and what is trained in fp32, as in a run with `--prefix-dtype bfloat16`, eager and then compiled by
torch.compile for exactly that size; on a CPU eager in fp32.

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

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from benchmarks.measuring import flops_of, matmul, random_model, seconds_of, where
from models.compiled import compile_parts, random_noise, random_observations

BATCHES = (1, 8, 32, 64)


def pieces(name: str, model: nn.Module, obs: dict[str, Tensor]) -> tuple[Callable, Callable | None]:
    """What runs once per `act`, and one denoise step given its result (OFT: None)."""
    c = model.config
    n = len(obs["tokens"])
    device = obs["tokens"].device
    if name == "oft":
        return lambda: model.action_logits(model.hidden(obs["image"], obs["tokens"])), None
    if name == "gr00t":

        def once():
            features, real = model.features(obs)
            return model.context(features, real)

        context = once()
        dtype = model.vlln.weight.dtype
        state = model.encode_state(obs["state"].to(dtype), c.embodiment)
        x_t = torch.randn(n, c.horizon, c.max_action_dim, device=device, dtype=dtype)
        bucket = torch.full((n,), c.time_buckets // 2, device=device)
        return once, lambda: model.velocity(context, state, x_t, bucket, c.embodiment)
    cache, _, real = model.prefix(obs["image"], obs["tokens"])
    x_t = torch.randn(n, c.chunk, c.action_dim, device=device)
    t = torch.full((n,), 0.5, device=device)

    def once():
        return model.prefix(obs["image"], obs["tokens"])

    return once, lambda: model.velocity(cache, real, x_t, t, obs.get("state"))


def dtype_in_rollout(name: str, model: nn.Module, key: str) -> torch.dtype:
    """As a run on a GPU with a frozen VLM in bf16 holds it: what is trained in fp32. OFT's files
    are in bf16."""
    if name == "oft":
        return torch.float32 if key.startswith("value_head.") or "lora_" in key else torch.bfloat16
    return model.dtype_of(key)


@torch.inference_mode()
def inference_row(
    name: str, model: nn.Module, n: int, device: str, flops: float, seconds: float
) -> dict:
    """flops: of one sample."""
    obs = random_observations(model, n, device)
    noise = random_noise(model, n, device)
    once, step = pieces(name, model, obs)
    product, product_flops = matmul(device, torch.bfloat16 if device == "cuda" else torch.float32)
    calls = [lambda: model.act(obs, noise), product, once, *([step] if step else [])]
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
    """A row per batch size, and on a GPU again compiled. Raises UserError for the full size on a
    CPU."""
    device, size = where(size)
    changes = {"prefix_dtype": "bfloat16"} if device == "cuda" and name != "oft" else {}
    model = random_model(name, size, device, torch.float32, **changes).eval().requires_grad_(False)
    for key, parameter in model.named_parameters() if device == "cuda" else ():
        parameter.data = parameter.data.to(dtype_in_rollout(name, model, key))
    one = random_observations(model, 1, device)
    noise = random_noise(model, 1, device)
    flops = flops_of(lambda: model.act(one, noise))  # counted before anything is compiled
    rows = []
    for mode in ("eager", "compiled") if device == "cuda" else ("eager",):
        if mode == "compiled":
            compile_parts(model)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        about = {"model": name, "size": size, "dtype": ", ".join(dtypes), "mode": mode}
        try:
            for n in BATCHES:
                torch.compiler.reset()  # past some number of shapes it would go on eagerly
                rows.append(about | inference_row(name, model, n, device, flops, seconds))
        except (
            TorchDynamoException
        ) as error:  # no compiler on this machine, for instance; the eager rows are worth having
            print(
                f"torch.compile failed, so its rows end here: {str(error).strip().splitlines()[0]}"
            )
    return rows
