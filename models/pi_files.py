"""π0 and π0.5 as they lie on users' disks: names of weights, statistics, prompts, images, actions;
and the parity check.

    layout    weights                                         statistics
    openpi    model.safetensors (examples/convert_jax_…)      assets/…/norm_stats.json
    rlinf     the same, plus the heads of its RL training     …/norm_stats.json
    lerobot   model.safetensors, every key behind "model."    policy_preprocessor.json,
              policy_postprocessor.json + safetensors

`Preparation` stands between a simulator and the model: observations in, actions out, from the
statistics that a checkpoint ships. Sources: openpi src/openpi/{transforms.py, models/tokenizer.py,
policies/libero_policy.py, shared/image_tools.py} and openpi_client/image_tools.py; LeRobot
policies/{pi0, pi05}/processor_*.py and processor/normalize_processor.py. Left out: augmentation,
LoRA and FAST checkpoints, real-time chunking, robots other than those whose state the caller lays
out.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import UserError
from models import checkpoint, tokenize
from models.checkpoint import Source, Stored
from models.flow import normal_logprob
from models.pi import SMALL, Pi, PiConfig, bounded, denoise_times, flow_sde_step, ode_step

# ---------------------------------------------------------------- names of weights

VLM = "paligemma_with_expert.paligemma.model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
# openpi ties it to the embedding and saves it under this name alone
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = VLM + "language_model.embed_tokens.weight"  # LeRobot unties them and reads this one
UNUSED = (
    # the expert predicts no words
    r"(model\.)?paligemma_with_expert\.gemma_expert\.lm_head\.weight",
    r"noise_head\.logvar_(min|max)",  # constants of Flow-Noise: PiConfig.noise_range
)


def names(
    c: PiConfig, prefix: str, embedding: str, value: bool, noise: bool
) -> dict[str, str | tuple[str, ...]]:
    """Our parameter → their key, or keys whose tensors stand in ours one below the other. value,
    noise: with RLinf's heads.
    """
    vision = VLM + "vision_tower.vision_model."
    table = {}

    def put(ours: str, *theirs: str, leaves: tuple[str, ...] = ("weight", "bias")) -> None:
        for leaf in leaves:
            keys = tuple(f"{prefix}{key}.{leaf}" for key in theirs)
            table[f"{ours}.{leaf}"] = keys if len(keys) > 1 else keys[0]

    def decoder(ours: str, theirs: str, adaptive: bool) -> None:
        for i in range(c.depth):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                rms(f"{ours}.{i}.{norm}", f"{theirs}layers.{i}.{norm}", adaptive)
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                put(
                    f"{ours}.{i}.{part}", f"{theirs}layers.{i}.self_attn.{part}", leaves=("weight",)
                )
            for part in ("gate_proj", "up_proj", "down_proj"):
                put(f"{ours}.{i}.mlp.{part}", f"{theirs}layers.{i}.mlp.{part}", leaves=("weight",))
        rms(f"{ours}_norm", f"{theirs}norm", adaptive)

    def rms(ours: str, theirs: str, adaptive: bool) -> None:
        if adaptive:
            put(f"{ours}.dense", f"{theirs}.dense")
        else:
            put(ours, theirs, leaves=("weight",))

    put("vision.patch_embedding", vision + "embeddings.patch_embedding")
    table["vision.position_embedding"] = f"{prefix}{vision}embeddings.position_embedding.weight"
    for i in range(c.vision_depth):
        ours = f"vision.layers.{i}"
        theirs = f"{vision}encoder.layers.{i}"
        put(f"{ours}.layer_norm1", f"{theirs}.layer_norm1")
        put(f"{ours}.layer_norm2", f"{theirs}.layer_norm2")
        put(
            f"{ours}.qkv",
            *(f"{theirs}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")),
        )
        put(f"{ours}.out_proj", f"{theirs}.self_attn.out_proj")
        put(f"{ours}.fc1", f"{theirs}.mlp.fc1")
        put(f"{ours}.fc2", f"{theirs}.mlp.fc2")
    put("vision.post_layernorm", vision + "post_layernorm")
    put("vision.projector", VLM + "multi_modal_projector.linear")
    table["embed_tokens.weight"] = prefix + embedding
    decoder("language", VLM + "language_model.", False)
    decoder("expert", EXPERT, c.pi05)
    time = (
        ("time_mlp_in", "time_mlp_out")
        if c.pi05
        else ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    )
    for part in ("action_in_proj", "action_out_proj", *time):
        put(part, part)
    for i in range(len(c.value_widths) + 1 if value else 0):
        put(f"value_head.{2 * i}", f"value_head.mlp.{2 * i}")
    for i in range(len(c.noise_widths) + 1 if noise else 0):
        put(f"noise_head.{2 * i}", f"noise_head.mlp_logvar.moduleList.{i}.linear_1")
    return table


def source(
    prefix: str = "", value: bool = False, noise: bool = False, lerobot: bool = False
) -> Source:
    first, other = (EMBEDDING, LM_HEAD) if lerobot else (LM_HEAD, EMBEDDING)
    table = partial(names, prefix=prefix, embedding=first, value=value, noise=noise)
    return Source(table, UNUSED, ((prefix + first, prefix + other),))


SOURCES = {
    "openpi": source(),
    "rlinf": source(value=True),
    "rlinf_noise": source(value=True, noise=True),
    "lerobot": source("model.", lerobot=True),
    "lerobot_base": source(lerobot=True),  # as lerobot/pi0_base is stored
}


def source_of(layout: str, c: PiConfig) -> Source:
    """As `SOURCES[layout]`, but a noise network in the file is left alone by a model without
    one.
    """
    if layout != "rlinf_noise" or c.noise == "network":
        return SOURCES[layout]
    plain = SOURCES["rlinf"]
    return plain._replace(unused=(*plain.unused, r"noise_head\..*"))


def save(model: Pi, folder: str | Path, like: str | Path) -> None:
    """A trained policy in the layout of the checkpoint `like` that it began from, for the original
    tools to load.
    """
    layout = which(like, checkpoint.layout(like))
    checkpoint.save_source(model, folder, source_of(layout, model.config), like)


def which(path: str | Path, stored: dict[str, Stored]) -> str:
    """The layout of a checkpoint, a key of `SOURCES`, by the keys it holds."""
    if any(key.startswith("model.paligemma_with_expert.") for key in stored):
        return "lerobot"
    if not any(key.startswith("paligemma_with_expert.") for key in stored):
        raise UserError(
            f"checkpoint {path} is no π0 or π0.5: none of its tensors is named "
            "paligemma_with_expert.…"
        )
    if (Path(path) / "policy_preprocessor.json").is_file():
        return "lerobot_base"
    if not any(key.startswith("value_head.") for key in stored):
        return "openpi"
    return "rlinf_noise" if any(key.startswith("noise_head.") for key in stored) else "rlinf"


# ---------------------------------------------------------------- configuration

FIELDS = {  # of a config.json, ours ← theirs: openpi's, then LeRobot's name
    "chunk": ("action_horizon", "chunk_size"),
    "tokens": ("max_token_len", "tokenizer_max_length"),
    "denoise_steps": ("num_steps", "num_inference_steps"),
    "views": ("num_images",),
    "noise_level": ("noise_level",),
    "noise_range": ("noise_logvar_range",),
    "executed_steps": ("action_chunk",),
    "executed_dims": ("action_env_dim",),
}


def shape_of(path: str | Path, stored: dict[str, Stored], config: dict) -> PiConfig:
    """A checkpoint's configuration: widths and depths from its tensors, which cannot lie, the rest
    from its config.json.

    Neither tells the heads of the image tower where config.json is silent: SigLIP's are 72 wide.
    """
    prefix = "model." if which(path, stored) == "lerobot" else ""
    vision = VLM + "vision_tower.vision_model."
    language = VLM + "language_model.layers."
    expert = EXPERT + "layers."

    def size(key: str, axis: int) -> int:
        if prefix + key not in stored:
            raise UserError(
                f"checkpoint {path} has no tensor {prefix + key!r}: it is of another model or "
                "layout"
            )
        return stored[prefix + key].shape[axis]

    def depth(layers: str) -> int:
        return 1 + max(
            (
                int(k.removeprefix(prefix + layers).split(".")[0])
                for k in stored
                if k.startswith(prefix + layers)
            ),
            default=-1,
        )

    def widths(head: str, step: int) -> tuple[int, ...]:
        found = [
            stored[key].shape[0] for i in range(0, 20, step) if (key := head.format(i)) in stored
        ]
        return tuple(found[:-1])

    pi05 = f"{prefix}time_mlp_in.weight" in stored
    attention = config.get("paligemma", {})
    tower = config.get("vision", {})
    kv_heads = attention.get("num_kv_heads", 1)
    head_dim = size(language + "0.self_attn.k_proj.weight", 0) // kv_heads
    patch = size(vision + "embeddings.patch_embedding.weight", -1)
    vision_width = size(vision + "post_layernorm.weight", 0)
    shape = {
        "pi05": pi05,
        "patch": patch,
        "vision_width": vision_width,
        "vision_depth": depth(vision + "encoder.layers."),
        "image_size": patch * math.isqrt(size(vision + "embeddings.position_embedding.weight", 0)),
        "vision_heads": tower.get("num_attention_heads", max(1, vision_width // 72)),
        "vision_mlp": size(vision + "encoder.layers.0.mlp.fc1.weight", 0),
        "width": size(VLM + "multi_modal_projector.linear.weight", 0),
        "mlp": size(language + "0.mlp.gate_proj.weight", 0),
        "depth": depth(language),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "heads": size(language + "0.self_attn.q_proj.weight", 0) // head_dim,
        "expert_width": size("action_in_proj.weight", 0),
        "expert_mlp": size(expert + "0.mlp.gate_proj.weight", 0),
        "action_dim": size("action_in_proj.weight", 1),
        "state_dim": size("action_in_proj.weight" if pi05 else "state_proj.weight", 1),
        "views": 3,
        "chunk": 10 if pi05 else 50,
        "tokens": 200 if pi05 else 48,
        "denoise_steps": 5 if pi05 else 4,
        "noise_level": 0.5,
        "value_widths": (1024, 512, 256) if pi05 else (512, 256, 128),
        "value_activation": "relu",
    }
    shape["vocabulary"] = size(EMBEDDING if prefix + EMBEDDING in stored else LM_HEAD, 0)
    if found := widths("value_head.mlp.{}.weight", 2):
        shape["value_widths"] = found
    if found := widths("noise_head.mlp_logvar.moduleList.{}.linear_1.weight", 1):
        shape |= {"noise": "network", "noise_widths": found}
    for ours, theirs in FIELDS.items():
        for name in theirs:
            if config.get(name) is not None:
                shape[ours] = (
                    tuple(config[name]) if isinstance(config[name], list) else config[name]
                )
    return PiConfig(**shape | {"sde_steps": shape["denoise_steps"]})


def published(
    path: Path, family: str, chosen: dict, config, env_spec
) -> tuple[PiConfig, Source, dict]:
    """Shape, names and statistics of another project's checkpoint, for `models.pi.build`. Raises
    UserError.

    The simulator may show pictures of another size: `Preparation` resizes them.
    """
    folder = path if path.is_dir() else path.parent
    stored = checkpoint.layout(path)
    layout = which(path, stored)
    says = (
        checkpoint.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    )
    with checkpoint.understood(folder / "config.json"):
        shape = shape_of(path, stored, says)
    if shape.pi05 != (family == "pi05"):
        has = "pi05" if shape.pi05 else "pi0"
        raise UserError(
            f"checkpoint {path} is a {has!r} model: give --model {has} or another checkpoint"
        )
    for what, wanted, most in (
        ("actions per inference (--chunk)", config.rollout.chunk, shape.chunk),
        ("action dimensions", env_spec.action_dim, shape.action_dim),
        ("cameras", env_spec.views, 3),
    ):
        with checkpoint.understood(folder / "config.json"):
            if wanted > most:
                raise UserError(
                    f"the run asks for {wanted} {what} and checkpoint {path} has {most}"
                )
    executed = {"executed_steps": config.rollout.chunk, "executed_dims": env_spec.action_dim}
    shape = replace(shape, views=env_spec.views, **executed, **chosen)
    if layout.startswith("lerobot"):
        stats = read_processors(folder)
    else:
        stats = read_norm_stats(
            folder,
            shape.pi05,
            config.train.env,
            config.train.statistics,
            says.get("discrete_state_input"),
        )
    dims = {
        name: len(next((x for x in stats[name].values() if isinstance(x, list)), []))
        for name in ("state", "actions")
    }
    for name, has, fits in (  # 0: not normalised; statistics may be padded, to 32 for instance
        (
            "state",
            env_spec.state_dim,
            dims["state"] in (0, env_spec.state_dim) or dims["state"] >= 14,
        ),
        (
            "actions",
            env_spec.action_dim,
            dims["actions"] == 0 or dims["actions"] >= env_spec.action_dim,
        ),
    ):
        if not fits:
            raise UserError(
                f"the statistics of checkpoint {path} are of {dims[name]} dimensions of {name}, "
                f"the simulator has {has}"
            )
    return shape, source_of(layout, shape), stats


# ---------------------------------------------------------------- statistics


def read_norm_stats(
    folder: Path, pi05: bool, env: str = "", chosen: str = "", state_in_prompt: bool | None = None
) -> dict:
    """openpi's and RLinf's statistics, and what their file does not say: which normalisation,
    prompt and actions go with them.

    π0 goes by mean and deviation, π0.5 by quantiles (openpi training/config.py). In LIBERO, π0's
    actions are deltas on state[:6]. π0.5's prompt holds the state of real robots but not of
    simulators (`discrete_state_input` in both projects' configurations), if config.json does not
    say. Of several robots' statistics the path names `chosen`, else `env`, the simulator.
    """
    everything = sorted(folder.rglob("norm_stats.json"))
    word = chosen or env
    found = everything
    if chosen or len(everything) > 1:
        found = [file for file in everything if word and word in str(file.relative_to(folder))]
    if len(found) != 1:
        what = ", ".join(str(file.relative_to(folder)) for file in everything) or "none"
        raise UserError(
            f"{folder} must hold one norm_stats.json, or one whose path contains {word!r}: it has "
            f"{what}; choose with --statistics"
        )
    stats = checkpoint.read_json(found[0]).get("norm_stats", {})
    places = {env, *str(found[0].relative_to(folder).parent).lower().replace("_", "/").split("/")}
    libero = "libero" in places
    simulated = bool(places & {"libero", "metaworld", "maniskill", "robocasa"})
    if state_in_prompt is None:
        state_in_prompt = not simulated
    needed = ("q01", "q99") if pi05 else ("mean", "std")
    kinds = {}
    for name in ("state", "actions"):
        with checkpoint.understood(found[0]):
            values = stats.get(name, {})
            if any(values.get(key) is None for key in needed):
                raise UserError(
                    f"{found[0]} lacks {' or '.join(needed)} of {name!r}, which "
                    f"{'π0.5' if pi05 else 'π0'} goes by"
                )
            numbers = {key: [float(x) for x in values[key]] for key in needed}
        kinds[name] = {"kind": "openpi_quantiles" if pi05 else "openpi_mean_std", **numbers}
    return kinds | {
        "layout": "openpi",
        "prompt": "state" if pi05 and state_in_prompt else "newline",
        "delta": [not pi05 and libero and i < 6 for i in range(7)],
    }


def read_processors(folder: Path) -> dict:
    """LeRobot's statistics: the (un)normaliser steps of policy_preprocessor.json and
    policy_postprocessor.json.
    """
    kinds: dict = {"layout": "lerobot", "prompt": "newline", "delta": []}
    for name, file, step_name, key, feature in (
        ("state", "policy_preprocessor.json", "normalizer_processor", "observation.state", "STATE"),
        ("actions", "policy_postprocessor.json", "unnormalizer_processor", "action", "ACTION"),
    ):
        with checkpoint.understood(folder / file):
            by_name = {
                step.get("registry_name"): step
                for step in checkpoint.read_json(folder / file).get("steps", [])
            }
            relative = (
                by_name.get("relative_actions_processor", {}).get("config", {}).get("enabled")
            )
        if relative:
            raise UserError(
                f"{folder / file} makes actions relative to the state, which is not supported"
            )
        if step_name not in by_name:
            raise UserError(
                f"{folder / file} has no step {step_name!r}: it is no π0 or π0.5 of LeRobot"
            )
        if "pi05_prepare_state_tokenizer_processor_step" in by_name:
            kinds["prompt"] = "state"
        config = by_name[step_name].get("config", {})
        state_file = by_name[step_name].get("state_file")
        mode = config.get("norm_map", {}).get(feature, "IDENTITY")
        needed = {
            "IDENTITY": (),
            "MEAN_STD": ("mean", "std"),
            "QUANTILES": ("q01", "q99"),
            "MIN_MAX": ("min", "max"),
        }.get(mode)
        if needed is None:
            raise UserError(f"{folder / file} normalises {key} by {mode}, which is not supported")
        try:
            tensors = load_file(folder / state_file) if needed else {}
            values = {stat: tensors[f"{key}.{stat}"].tolist() for stat in needed}
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / file}: no {' and '.join(needed)} of {key} in {state_file} ({error!r})"
            ) from None
        kinds[name] = {"kind": f"lerobot_{mode.lower()}", "eps": config.get("eps", 1e-8), **values}
    return kinds


def normalise(x: np.ndarray, stats: dict, inverse: bool = False) -> np.ndarray:
    """x [..., D] to the model's units, or back. Each original computes in its own order and
    precision, and so does this.

    openpi (transforms.Normalize, Unnormalize): in fp64, 1e-6 added to the spread, dimensions that
    the statistics lack left alone. LeRobot (NormalizerProcessorStep): in fp32, with `eps` in the
    spread's place only where that is 0.
    """
    kind = stats["kind"]
    if kind == "lerobot_identity":
        return np.asarray(x)
    if kind.startswith("openpi"):
        a, b = (
            np.array(stats[key], np.float64)
            for key in (("q01", "q99") if kind.endswith("quantiles") else ("mean", "std"))
        )
        n = min(len(a), x.shape[-1])
        x = np.array(x, np.float64)
        a = a[:n]
        b = b[:n]
        part = x[..., :n]
        if kind == "openpi_quantiles":
            part = (
                (part + 1.0) / 2.0 * (b - a + 1e-6) + a
                if inverse
                else (part - a) / (b - a + 1e-6) * 2.0 - 1.0
            )
        else:
            part = part * (b + 1e-6) + a if inverse else (part - a) / (b + 1e-6)
        return np.concatenate([part, x[..., n:]], axis=-1)
    keys = {
        "lerobot_mean_std": ("mean", "std"),
        "lerobot_quantiles": ("q01", "q99"),
        "lerobot_min_max": ("min", "max"),
    }[kind]
    a, b = (torch.tensor(stats[key], dtype=torch.float32) for key in keys)
    x = torch.as_tensor(np.asarray(x, np.float32))
    eps = stats["eps"]
    if kind == "lerobot_mean_std":
        return (x * b + a if inverse else (x - a) / (b + eps)).numpy()
    spread = torch.where(b - a == 0, torch.tensor(eps), b - a)
    if kind == "lerobot_quantiles":
        return ((x + 1.0) * spread / 2.0 + a if inverse else 2.0 * (x - a) / spread - 1.0).numpy()
    return ((x + 1) / 2 * spread + a if inverse else 2 * (x - a) / spread - 1).numpy()


# ---------------------------------------------------------------- prompts


def clean(task: str) -> str:
    return task.strip().replace("_", " ").replace("\n", " ")


def prompt(task: str, state: np.ndarray | None, layout: str = "openpi") -> tuple[str, ...]:
    """The texts whose tokens, one after the other, are the prompt. state [S] normalised, or None to
    leave it out.

    A state below -1 falls into bin -1, as in the original; one above 1 into bin 255.
    """
    if state is not None:
        bins = np.digitize(state, np.linspace(-1.0, 1.0, 257)[:-1]) - 1
        return (f"Task: {clean(task)}, State: {' '.join(map(str, bins))};\nAction: ",)
    if layout == "lerobot":  # one text, the task as it is
        return (task if task.endswith("\n") else task + "\n",)
    return clean(task), "\n"


def encode(tokenizer, texts: tuple[str, ...], length: int) -> np.ndarray:
    """Token ids [length] int32: BOS, the texts, padding. Raises UserError when they do not fit."""
    ids = [tokenizer.bos_id(), *(token for text in texts for token in tokenizer.encode(text))]
    if len(ids) > length:
        raise UserError(
            f"the prompt {''.join(texts)!r} needs {len(ids)} tokens and the model has room for "
            f"{length}: give --tokens"
        )
    return np.array(ids + [tokenize.PAD] * (length - len(ids)), np.int32)


# ---------------------------------------------------------------- images


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of a picture scaled to touch the sides of a square of `size`."""
    ratio = max(width / size, height / size)
    return int(height / ratio), int(width / ratio)


@lru_cache
def triangle_weights(old: int, new: int) -> np.ndarray:
    """Pillow's bilinear filter as a matrix [new, old] of whole multiples of 2⁻²² (Pillow
    src/libImaging/Resample.c).
    """
    scale = old / new
    reach = max(scale, 1.0)  # a smaller picture averages over the pixels it merges
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        first = max(0, int(centre - reach + 0.5))
        last = min(old, int(centre + reach + 0.5))
        w = np.maximum(0.0, 1.0 - np.abs((np.arange(first, last) - centre + 0.5) / reach))
        weights[i, first:last] = np.floor(w / w.sum() * 2**22 + 0.5)
    return weights


def resize_pil(image: np.ndarray, size: int) -> np.ndarray:
    """image [H, W, 3] uint8 → [size, size, 3] uint8, centred on black: openpi's, bit for bit,
    without Pillow.

    First across, then down, rounded to 8 bits after each: sums of products below 2³¹, exact in
    fp64.
    """
    if image.shape[:2] == (size, size):
        return image
    height, width = fitted(*image.shape[:2], size)

    def along(x: np.ndarray, new: int) -> np.ndarray:  # [n, old, 3] → [n, new, 3]
        if x.shape[1] == new:
            return x
        sums = np.einsum(
            "ab,nbc->nac", triangle_weights(x.shape[1], new), x.astype(np.float64), optimize=True
        )
        return np.clip(np.floor((sums + 2**21) / 2**22), 0, 255).astype(np.uint8)

    small = along(along(image, width).transpose(1, 0, 2), height).transpose(1, 0, 2)
    out = np.zeros((size, size, 3), np.uint8)
    top = (size - height) // 2
    left = (size - width) // 2
    out[top : top + height, left : left + width] = small
    return out


def resize_torch(image: Tensor, size: int, black: float) -> Tensor:
    """image [n, H, W, 3] fp32 in [black, 1] → [n, size, size, 3], openpi's resize_with_pad_torch
    (black −1) and LeRobot's (0).
    """
    height, width = fitted(*image.shape[1:3], size)
    small = F.interpolate(
        image.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False
    )
    top = (size - height) // 2
    left = (size - width) // 2
    sides = (left, size - width - left, top, size - height - top)
    return F.pad(small.clamp(black, 1.0), sides, value=black).permute(0, 2, 3, 1)


# ---------------------------------------------------------------- between simulator and model


class Preparation:
    """Observations to what `Pi.act` reads, and its actions to what the robot executes.

    stats: `read_norm_stats`, `read_processors`, or the two quantiles of our own small models.
    """

    def __init__(self, config: PiConfig, stats: dict, tokenizer):
        self.config = config
        self.stats = stats
        self.tokenizer = tokenizer
        self.own = "state_low" in stats
        self.layout = stats.get("layout", "own")

    def observe(self, images: np.ndarray, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """images [V, H, W, 3] uint8, state [S], task → image [V, size, size, 3] uint8, tokens [L]
        int32, for π0 state [32] fp32.

        A camera that the robot lacks is left out (`PiConfig.views`), which equals masking it.
        LeRobot keeps a resized picture in fp32; here it is rounded to 8 bits, at most 0.004 off.
        Raises UserError.
        """
        c = self.config
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[0] != c.views
            or images.shape[3] != 3
        ):
            raise UserError(
                f"the images are {list(images.shape)} {images.dtype}: the model needs [{c.views}, "
                "height, width, 3] uint8"
            )
        if not np.isfinite(state).all():
            raise UserError(
                "the state of the robot is not a number in dimension "
                f"{int(np.argmin(np.isfinite(state)))}: {state}"
            )
        if self.own:
            normal = tokenize.normalise(
                state, np.array(self.stats["state_low"]), np.array(self.stats["state_high"])
            )
            texts = (tokenize.prompt(task, normal),) if c.pi05 else prompt(task, None)
        else:
            normal = normalise(state, self.stats["state"])
            texts = prompt(task, normal if self.stats["prompt"] == "state" else None, self.layout)
        out = {"image": self.resize(images), "tokens": encode(self.tokenizer, texts, c.tokens)}
        if not c.pi05:
            if len(normal) > c.state_dim:
                raise UserError(
                    f"the state has {len(normal)} dimensions and the model room for {c.state_dim}"
                )
            out["state"] = np.pad(normal, (0, c.state_dim - len(normal))).astype(np.float32)
        return out

    def resize(self, images: np.ndarray) -> np.ndarray:
        size = self.config.image_size
        if images.shape[1:3] == (size, size):
            return images
        if self.layout != "lerobot":
            return np.stack([resize_pil(image, size) for image in images])
        pixels = resize_torch(torch.from_numpy(images).float() / 255.0, size, 0.0)
        return pixels.mul(255.0).round().to(torch.uint8).numpy()

    def actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """What the model returned [C, A] → what the robot executes [C, A]; state [S] as the
        simulator gave it.
        """
        if self.own:
            return actions
        out = normalise(actions, self.stats["actions"], inverse=True)
        delta = np.array(self.stats["delta"][: out.shape[-1]], bool)
        if delta.any():  # openpi's AbsoluteActions
            out[..., : len(delta)] += np.where(delta, state[: len(delta)], 0.0)
        return out.astype(np.float32)


def preparation(header: checkpoint.Header, tokenizer: str) -> Preparation:
    c = PiConfig(**header.shape)
    return Preparation(
        c, header.stats, tokenize.load_for(tokenizer, int(0.95 * c.vocabulary), c.vocabulary)
    )  # published: padded


def wording(task: str) -> str:
    return task


def embedded(family: str, tokenizer: str) -> Pi:
    """The small model with random weights."""
    return Pi(SMALL[family])


# ---------------------------------------------------------------- parity with the original


def parity(folder: Path) -> dict[str, Tensor]:
    """Every output of a reference folder (tests/golden/pi0/README.md), by the names of its
    outputs.safetensors.
    """
    file = folder / "weights.safetensors"
    stored = checkpoint.layout(file)
    source = SOURCES[which(file, stored)]
    c = shape_of(file, stored, checkpoint.read_json(folder / "config.json"))
    with torch.device("meta"), checkpoint.Uninitialised():
        model = Pi(c)
    model.value_head.to_empty(
        device="cpu"
    )  # in case the folder has none; then nothing asks for a value
    checkpoint.load_source(model, file, source, "cpu", torch.float32)
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
        times = denoise_times(c.denoise_steps)
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
            out[f"{name}.entropy"] = (
                crop(std).log() + 0.5 * math.log(2.0 * math.pi * math.e)
            ).mean()
    actions = given["actions"]
    noise = given["noise"]
    t = given["time"][:, None, None]
    cache, _, _ = model.prefix(image, tokens, real)
    velocity = model.velocity(cache, real, t * noise + (1.0 - t) * actions, given["time"], state)
    out["loss_each"] = (velocity - (noise - actions)).square()
    out["loss"] = model.imitation_loss(cache, real, actions, given["time"], noise, state)
    out["loss"].backward()
    return {name: x.detach() for name, x in out.items()} | checkpoint.gradients(model, file, source)
