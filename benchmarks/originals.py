"""What our models make of a reference folder of their originals (tests/golden/*/README.md).

Each function takes a folder with config.json, weights.safetensors under the original's names and
inputs.safetensors, and returns everything that its outputs.safetensors may ask for, by those names.
Gradients are of `loss` and named `grad.<original key>`.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from checks import read_json
from models import lora
from models.flow import flow_sde_step, normal_entropy, normal_logprob, ode_step
from models.formats import bins, source
from models.formats import gr00t as gr00t_files
from models.formats import oft as oft_files
from models.formats import pi as pi_files
from models.gr00t import Gr00t
from models.oft import Oft
from models.pi import Pi, bounded


def gradients(model: torch.nn.Module, path: Path, layout: source.Source) -> dict[str, Tensor]:
    """{"grad." + their key: our gradient of what is theirs}, to compare with the original's."""
    found = {}
    ours = dict(model.named_parameters())
    for key, part in source.match(model, path, layout, source.layout(path)).items():
        gradient = ours[part.name].grad if part.name in ours else None
        if gradient is not None:
            found[f"grad.{key}"] = gradient[part.begin : part.end] if gradient.ndim else gradient
    return found


def pi(folder: Path) -> dict[str, Tensor]:
    """Every output of a reference folder (tests/golden/pi0/README.md), by the names of its
    outputs.safetensors."""
    file = folder / "weights.safetensors"
    stored = source.layout(file)
    weights = pi_files.SOURCES[pi_files.which(file, stored)]
    c = pi_files.shape_of(file, stored, read_json(folder / "config.json"))
    model = source.sketch(Pi, c)
    # In case the folder has no value head; then nothing asks for a value.
    model.value_head.to_empty(device="cpu")
    source.load(model, file, weights, "cpu", torch.float32)
    given = load_file(folder / "inputs.safetensors")
    image = given["images"].permute(0, 1, 3, 4, 2)
    tokens = given["lang_tokens"]
    state = given.get("state")
    tokens_per_view = (c.image_size // c.patch) ** 2
    real = torch.cat(
        [given["image_masks"].repeat_interleave(tokens_per_view, dim=1), given["lang_masks"]], dim=1
    )
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        cache, feature, _ = model.prefix(image, tokens, real)
        out["image_features"] = model.vision(image).unflatten(1, (c.views, tokens_per_view))
        out["prefix_out"] = (
            model.prefix_features(image, tokens, real)[0] * real[..., None]
        )  # of what is not real, nothing is used
        x_t = given["x_t"]
        time = given["time"]
        out["suffix_out"] = model.suffix(cache, real, x_t, time, state)
        out["velocity"] = model.velocity(cache, real, x_t, time, state)
        x = given["start"]
        t = torch.ones(())
        delta = torch.tensor(-1.0 / c.denoise_steps)
        for _ in range(c.denoise_steps):  # openpi's sample_actions, which adds up its times in fp32
            x = x + delta * model.velocity(cache, real, x, t.expand(len(x)), state)
            t = t + delta
        out["sample"] = x
        times = model.times()
        index = given["denoise_index"]
        t = torch.tensor(times)[index][:, None, None]
        t_next = torch.tensor(times)[index + 1][:, None, None]
        h = model.suffix(cache, real, x_t, t[:, 0, 0], state)
        v = model.action_out_proj(h)
        out["value"] = model.value(feature if c.pi05 else h.mean(1))
        steps = {"flow_sde": flow_sde_step(x_t, v, t, t_next, c.noise_level)}
        if c.noise == "network":
            steps["flow_noise"] = (
                ode_step(x_t, v, t, t_next),
                bounded(model.noise_head(h), c.noise_range),
            )
        for name, (mean, std) in steps.items():
            crop = model.executed
            out |= {f"{name}.mean": mean, f"{name}.std": std.expand_as(mean)}
            out[f"{name}.logprob"] = normal_logprob(
                crop(given[f"{name}.x_next"]), crop(mean), crop(std)
            ).sum((1, 2))
            out[f"{name}.entropy"] = normal_entropy(crop(std))
    actions = given["actions"]
    noise = given["noise"]
    t = given["time"][:, None, None]
    cache, _, _ = model.prefix(image, tokens, real)
    velocity = model.velocity(cache, real, t * noise + (1.0 - t) * actions, given["time"], state)
    out["loss_each"] = (velocity - (noise - actions)).square()
    out["loss"] = model.imitation_loss(cache, real, actions, given["time"], noise, state)
    out["loss"].backward()
    return {name: x.detach() for name, x in out.items()} | gradients(model, file, weights)


def gr00t(folder: Path) -> dict[str, Tensor]:
    """Everything that a reference folder's outputs.safetensors may ask for, from its config.json,
    weights and inputs.

    Gradients are of `loss` and named `grad.<original key>`."""
    file = folder / "weights.safetensors"
    cfg = read_json(folder / "config.json")
    given = load_file(folder / "inputs.safetensors")
    eagle = gr00t_files.whole(cfg)["eagle"]
    attention = eagle.get("_attn_implementation") or cfg.get("attn_implementation")
    rows = {"flash_attention_2": "flash", "sdpa": "sdpa"}.get(attention, "eager")
    c = replace(gr00t_files.config_of(cfg), mask_padding=False, padded_rows=rows, train_vlm=True)
    weights = gr00t_files.SOURCES[gr00t_files.which(file)]
    model = source.sketch(Gr00t, c)
    source.load(model, file, weights, "cpu", torch.float32)

    ids = given["eagle_input_ids"]
    real = given["eagle_attention_mask"].bool()
    pixels = given["eagle_pixel_values"]
    robot = given["embodiment_id"]
    noise = given["noise"]
    time = given["time"]
    action = given["action"]
    out = {"vision_features": model.vision(pixels)}
    out["image_embeds"] = model.projector(out["vision_features"])
    out["backbone_features"] = features = model.backbone(pixels, ids, real)
    context = model.context(features, real)
    out["vl_features"] = context[0]
    out["state_features"] = state = model.encode_state(given["state"][:, 0], robot)
    x_t = (1.0 - time[:, None, None]) * noise + time[:, None, None] * action
    bucket = (time * c.time_buckets).long()
    out["action_features"] = model.action_encoder(x_t, bucket, robot)
    out["velocity"] = model.velocity(context, state, x_t, bucket, robot)
    out["loss"] = model.imitation_loss(
        context, state, action, time, noise, given["action_mask"], robot
    )
    out["actions"] = sample(model, context, state, noise, robot)
    if "denoise_index" in given:
        # GR00T's own time and velocity are the reverse of `models/flow.py`'s.
        x_t = given["x_t"]
        step = given["denoise_index"]
        t, t_next = model.at(step, torch.tensor(model.times()))
        v = -model.velocity(context, state, x_t, model.bucket(step), robot)
        mean, std = flow_sde_step(x_t, v, t, t_next, c.noise_level)
        out |= {
            "sde_mean": mean,
            "sde_std": std.expand_as(mean),
            "ode_mean": ode_step(x_t, v, t, t_next),
        }
        x_next = model.executed(given["x_next"])
        out["logprob"] = normal_logprob(x_next, model.executed(mean), std).sum((1, 2))
        if not model.value_head[0].weight.is_meta:
            out["value"] = model.value(context[0], real, state)

    out["loss"].backward()
    found = {name: value.detach() for name, value in out.items()}
    return found | gradients(model, file, weights)


@torch.no_grad()
def sample(model: Gr00t, context, state: Tensor, x: Tensor, robot: int | Tensor) -> Tensor:
    """The deterministic flow from noise x [n, H, A'] to data, N Euler steps."""
    for i in range(model.config.denoise_steps):
        bucket = model.bucket(torch.full((len(x),), i, device=x.device))
        v = model.velocity(context, state, x, bucket, robot)
        x = x + v / model.config.denoise_steps
    return x


def oft(folder: Path) -> dict[str, Tensor]:
    """Every output of a reference folder by our code: features, logits, log-probs, values, actions,
    loss, grad.<original key>.

    See tests/golden/oft/README.md for the inputs. Gradients are of `loss`, which is RLinf's kind
    (log-probs and values against `weights` and `returns`) where the inputs hold those, else the
    fine-tuning loss on `actions`."""
    file = folder / "weights.safetensors"
    inputs = load_file(folder / "inputs.safetensors")
    config = oft_files.config_of(folder)
    model = Oft(config)
    layout = oft_files.source_of(file, config)
    adapters = []
    for name in lora.layers(model):
        (key,) = layout.keys([f"{name}.weight"])[f"{name}.weight"]
        for leaf, end in (("lora_a", "lora_A"), ("lora_b", "lora_B")) if config.rank else ():
            theirs = f"base_model.model.{key.removesuffix('weight')}{end}.weight"
            adapters.append((re.escape(f"{name}.{leaf}"), theirs))
    unused = (*layout.unused, r"base_model\..*")
    layout = layout._replace(rules=(*adapters, *layout.rules), unused=unused)
    source.load(model, file, layout, "cpu", torch.float32)
    key = read_json(folder / "config.json").get("unnorm_key", "")
    stats = oft_files.read_statistics(folder, key)
    table = bins.action_table(stats, config.action_dim, config.bins)
    model.action_table = torch.from_numpy(table)

    image = inputs["image"]
    tokens = inputs["tokens"]
    out = {
        "pixel_values": torch.stack(model.pixels(image), 1)
        .flatten(1, 2)
        .unflatten(0, image.shape[:2])
        .flatten(1, 2)
    }
    out["features"] = model.features(image)
    out["pictures"] = model.projector(out["features"])
    hidden = out["hidden"] = model.hidden(image, tokens)
    out["logits"] = model.lm_head(hidden).float()
    obs = {"image": image, "tokens": tokens}
    greedy = model.act(
        obs,
        {
            "uniform": torch.zeros(hidden.shape[:2]),
            "explore": torch.zeros(len(image), dtype=torch.bool),
        },
    )
    out["greedy_tokens"] = greedy["action_tokens"].long()
    out["greedy_actions"] = greedy["actions"]
    if "action_tokens" in inputs:
        found = model.evaluate(obs | {"action_tokens": inputs["action_tokens"]})
        out["logprobs"] = found["logprob"]
        out["logprob"] = found["logprob"].sum((1, 2))
        out["entropy"] = found["entropy"]
        out["values"] = found["value"][:, None]
        out["loss"] = (
            -(inputs["weights"] * out["logprobs"]).mean()
            + (out["values"] - inputs["returns"]).square().mean()
        )
    else:
        out["loss"] = model.imitate({"image": image, "tokens": tokens}, inputs["actions"], {})
    out["loss"].backward()
    found = {name: x.detach() for name, x in out.items()}
    return found | gradients(model, file, layout)


def resize_lanczos(image: Tensor, size: int) -> Tensor:
    """[n, H, W, 3] uint8 → [n, size, size, 3] uint8 as tf.image.resize(method="lanczos3",
    antialias=True), then rounded.

    openvla-oft's own evaluation resizes so after a JPEG round trip of quality 95, which is left out
    here. In fp32 in TensorFlow's order; a few values of a million may differ by 1 of 255."""
    f = np.float32

    def along_rows(x: Tensor) -> Tensor:  # [n, count, …] → [n, size, …]
        count = x.shape[1]
        scale = f(count) / f(size)
        spread = max(scale, f(1.0))
        at = (np.arange(size, dtype=f) + f(0.5)) * scale
        first = np.ceil(at - f(3.0) * spread - f(0.5)).astype(np.int64)
        rows = first[:, None] + np.arange(int(6 * spread) + 2)  # [size, taps]
        distance = np.abs((rows.astype(f) + f(0.5) - at[:, None]) / spread)
        angle = f(np.pi) * np.maximum(distance, f(1e-3))
        kernel = np.where(
            distance <= f(1e-3),
            f(1.0),
            f(3.0) * np.sin(angle) * np.sin(angle / f(3.0)) / (angle * angle),
        )
        kernel[(distance > f(3.0)) | (rows < 0) | (rows >= count)] = 0.0
        kernel = torch.from_numpy(kernel * (f(1.0) / kernel.sum(1, keepdims=True))).to(x.device)
        rows = torch.from_numpy(rows.clip(0, count - 1)).to(x.device)
        return sum(kernel[:, k, None, None] * x[:, rows[:, k]] for k in range(rows.shape[1]))

    out = along_rows(along_rows(image.float()).transpose(1, 2)).transpose(1, 2)
    return out.round().clamp(0.0, 255.0).to(torch.uint8)


OUTPUTS = {"pi0": pi, "pi05": pi, "gr00t": gr00t, "oft": oft}
