"""What lies on users' disks for OpenVLA-OFT: weights by their own names, configuration, statistics,
prompts, images, bins.

A folder as Hugging Face tools write it: `config.json`, `model.safetensors.index.json` with its
shards (or one `model.safetensors`), `dataset_statistics.json`, perhaps `preprocessor_config.json`,
`tokenizer.model`.

Sources: moojink/openvla-oft `prismatic/extern/hf/`, `prismatic/vla/`,
`experiments/robot/openvla_utils.py`; RLinf `rlinf/models/embodiment/openvla_oft`,
`rlinf/models/embodiment/prismatic`, `rlinf/envs/action_utils.py`; SimpleVLA-RL
`verl/workers/rollout/rob_rollout.py`. Everything here is exact; only `resize_lanczos` may differ by
1 of 255 in a few values of a million, and before it the originals pass a picture through JPEG.
Pictures rendered at the model's size need neither.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from models import checkpoint, tokenize

# ---------------------------------------------------------------- weights by their original names

VISION_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
LLAMA_LAYER = {
    **{f"{n}_proj": f"self_attn.{n}_proj" for n in "qkvo"},
    **{f"{n}_proj": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}


def tower_names(ours: str, theirs: str, depth: int, dino: bool) -> dict[str, str]:
    names = {f"{ours}.pos_embed": f"{theirs}.pos_embed"}
    names |= {
        f"{ours}.patch_embed.{p}": f"{theirs}.patch_embed.proj.{p}" for p in ("weight", "bias")
    }
    if dino:
        names |= {f"{ours}.{p}": f"{theirs}.{p}" for p in ("cls_token", "reg_token")}
    for i in range(depth):
        for mine, name in VISION_BLOCK.items():
            names |= {
                f"{ours}.blocks.{i}.{mine}.{p}": f"{theirs}.blocks.{i}.{name}.{p}"
                for p in ("weight", "bias")
            }
        if dino:
            names |= {
                f"{ours}.blocks.{i}.scale{k}": f"{theirs}.blocks.{i}.ls{k}.scale_factor"
                for k in (1, 2)
            }
    return names


def names(config) -> dict[str, str]:
    """Our parameter name → the key in a published folder."""
    found = tower_names("dino", "vision_backbone.featurizer", config.dino_depth, True)
    found |= tower_names("siglip", "vision_backbone.fused_featurizer", config.siglip_depth, False)
    found |= {
        f"projector.fc{i}.{p}": f"projector.fc{i}.{p}"
        for i in (1, 2, 3)
        for p in ("weight", "bias")
    }
    for i in range(config.depth):
        ours = f"language.{i}"
        theirs = f"language_model.model.layers.{i}"
        found |= {
            f"{ours}.{mine}.weight": f"{theirs}.{name}.weight" for mine, name in LLAMA_LAYER.items()
        }
        found |= {
            f"{ours}.{n}.weight": f"{theirs}.{n}.weight"
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    found |= {
        "embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    }
    return found | {"language_norm.weight": "language_model.model.norm.weight"}


def names_with_value(config) -> dict[str, str]:
    """RLinf's trained policies also hold the value head, a Sequential with activations at odd
    places, as ours.
    """
    layers = range(0, 2 * len(config.value_widths) + 1, 2)
    keys = [f"{i}.{p}" for i in layers for p in ("weight", "bias")][
        :-1
    ]  # the last layer has no bias
    return names(config) | {f"value_head.{key}": f"value_head.mlp.{key}" for key in keys}


def adapter_names(config) -> dict[str, str]:
    """PEFT's adapter_model.safetensors: two matrices for every linear layer and patch embedding."""
    found = {}
    for ours, theirs in names(config).items():
        kept = theirs.removesuffix(".weight")
        layer = kept.rpartition(".")[2]
        if kept != theirs and layer.endswith(("proj", "qkv", "fc1", "fc2", "fc3", "lm_head")):
            mine = ours.removesuffix(".weight")
            found |= {
                f"{mine}.lora_{x.lower()}": f"base_model.model.{kept}.lora_{x}.weight" for x in "AB"
            }
    return found


def unused(last_dino: int | str = r"\d+", last_siglip: int | str = r"\d+") -> tuple[str, ...]:
    """Keys that a published folder holds and nobody reads. Arguments: the number of each tower's
    last block, if it is known.
    """
    return (
        # the tower's last block: the output before it is read
        rf"vision_backbone\.featurizer\.blocks\.{last_dino}\..*",
        rf"vision_backbone\.fused_featurizer\.blocks\.{last_siglip}\..*",  # likewise
        r"vision_backbone\.(fused_)?featurizer\.norm\.(weight|bias)",  # the last norm: likewise
        # SigLIP's pooling into one vector: patches are read
        r"vision_backbone\.fused_featurizer\.attn_pool\..*",
        # a constant that older tools saved
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )


LM_HEAD_COPY = r"base_model\.model\.language_model\.lm_head\.base_layer\.weight"


def adapters_unused(*last: int | str) -> tuple[str, ...]:
    """Adapters of the same layers, and the copy of lm_head itself that PEFT saves along whenever it
    adapts that.
    """
    return (*(rf"base_model\.model\.{pattern}" for pattern in unused(*last)[:4]), LM_HEAD_COPY)


SOURCES = {
    "openvla-oft": checkpoint.Source(names, unused()),
    "rlinf": checkpoint.Source(names_with_value, unused()),
    "peft": checkpoint.Source(adapter_names, adapters_unused()),
}


def source(path: str | Path, config) -> checkpoint.Source:
    """The layout of a folder or file, which tells by its keys, and strict about the number of
    vision blocks.
    """
    keys = checkpoint.layout(path)
    last = (config.dino_depth, config.siglip_depth)
    mapping = []
    patterns = ()
    if any(key.startswith("vision_backbone.") for key in keys):
        mapping.append(
            names_with_value if any(key.startswith("value_head.") for key in keys) else names
        )
        patterns += unused(*last)
    if any(key.startswith("base_model.model.") for key in keys):
        mapping.append(adapter_names)
        patterns += adapters_unused(*last)
    return checkpoint.Source(
        lambda c: {ours: key for table in mapping for ours, key in table(c).items()}, patterns
    )


def is_folder(path: str | Path) -> bool:
    """Whether `path` is an OpenVLA-OFT folder (and not a checkpoint of this project)."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "vision_backbone_id" in config


class Folded:
    """A model as `checkpoint.save_source` sees one, whose adapters are added into the weights one
    tensor at a time.
    """

    class Tensors(dict):
        def __getitem__(self, name: str) -> Tensor:
            layer = self.model.get_submodule(name.rpartition(".")[0])
            return (
                layer.folded()
                if name.endswith(".weight") and hasattr(layer, "folded")
                else super().__getitem__(name)
            )

    def __init__(self, model):
        self.model = model
        self.config = model.config

    def state_dict(self) -> dict[str, Tensor]:
        tensors = self.Tensors(self.model.state_dict())
        tensors.model = self.model
        return tensors


def save(model, folder: str | Path, like: str | Path) -> None:
    """Writes the policy as the folder `like` it came from, adapters added into the weights, so that
    the original tools load it.
    """
    checkpoint.save_source(Folded(model), folder, source(like, model.config), like)


# ---------------------------------------------------------------- configuration and statistics


def read_config(folder: str | Path) -> dict:
    """config.json (and preprocessor_config.json) of a folder → fields of `OftConfig`. Raises
    UserError.

    The published files leave widths to the tools' defaults, which `oft.FULL` repeats. Folders of
    other sizes say theirs under `text_config` and, for the towers, under `vision`: {"featurizer" |
    "fused_featurizer": timm's arguments}. Fields that RLinf sets on the configuration (action_dim,
    num_action_chunks, num_images_in_input, max_prompt_length) are read if present.
    """
    with checkpoint.understood(Path(folder) / "config.json"):
        return fields_of(Path(folder))


def says_views(folder: str | Path) -> bool:
    """Whether config.json says how many cameras there are."""
    return "num_images_in_input" in checkpoint.read_json(Path(folder) / "config.json")


def fields_of(folder: Path) -> dict:
    from models.oft import FULL  # there, because oft imports this file

    found = checkpoint.read_json(folder / "config.json")
    shape = asdict(FULL)
    backbone = found.get("vision_backbone_id")
    if backbone != "dinosiglip-vit-so-224px":
        raise UserError(
            f"{folder} has the vision backbone {backbone!r}: OpenVLA-OFT's is "
            "'dinosiglip-vit-so-224px'"
        )
    for tower, prefix in (("featurizer", "dino"), ("fused_featurizer", "siglip")):
        timm = found.get("vision", {}).get(tower)
        if timm is not None:
            width = timm["embed_dim"]
            shape |= {
                f"{prefix}_width": width,
                f"{prefix}_depth": timm["depth"] - 1,
                f"{prefix}_heads": timm["num_heads"],
            }
            shape |= {
                f"{prefix}_mlp": int(width * timm.get("mlp_ratio", 4.0)),
                "patch": timm["patch_size"],
            }
            shape["dino_registers"] = timm.get("reg_tokens", shape["dino_registers"])
    text = found.get("text_config") or {}
    for ours, theirs in {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    }.items():
        shape[ours] = text.get(theirs, shape[ours])
    shape["kv_heads"] = text.get("num_key_value_heads", shape["heads"])
    shape["bins"] = found.get("n_action_bins", 256)
    shape["spare"] = found.get("pad_to_multiple_of", 64)
    shape["words"] = text.get("vocab_size", 32064) - shape["spare"] - shape["bins"]
    shape["pad"] = found.get("pad_token_id", 32000)
    for ours, theirs in {
        "action_dim": "action_dim",
        "chunk": "num_action_chunks",
        "views": "num_images_in_input",
        "tokens": "max_prompt_length",
        "temperature": "temperature",
        "center_crop": "center_crop",
        "lora_rank": "lora_rank",
    }.items():
        shape[ours] = found.get(theirs, shape[ours])
    shape["value_widths"] = tuple(found.get("value_head_sizes", shape["value_widths"]))
    shape["image_size"] = found.get("image_sizes", [shape["image_size"]])[0]
    shape["stop_token"] = found.get("implement_version", "official") != "rlinf"
    shape["train"] = "lora" if found.get("is_lora", False) else "full"
    if (folder / "preprocessor_config.json").is_file():
        pictures = checkpoint.read_json(folder / "preprocessor_config.json")
        shape["dino_mean"] = tuple(pictures["means"][0])
        shape["dino_std"] = tuple(pictures["stds"][0])
    return shape


def read_statistics(folder: str | Path, key: str = "") -> dict:
    """One data set's action statistics, from dataset_statistics.json or else config.json's
    `norm_stats`.

    `key` is the originals' `unnorm_key`; "" takes the only one there is, and `key` also stands for
    `key_no_noops`. Returns {"q01": [A], "q99": [A], "mask": [A] bool} as lists. Raises UserError.
    """
    path = Path(folder) / "dataset_statistics.json"
    found = (
        checkpoint.read_json(path)
        if path.is_file()
        else checkpoint.read_json(Path(folder) / "config.json").get("norm_stats") or {}
    )
    if not key and len(found) != 1:
        raise UserError(
            f"{folder} has statistics of {len(found)} data sets: choose one of "
            f"{', '.join(found) or 'none'}"
        )
    key = (
        next((k for k in (key, f"{key}_no_noops") if k in found), key) if key else next(iter(found))
    )
    if key not in found:
        raise UserError(f"{folder} has no statistics of {key!r}: choose one of {', '.join(found)}")
    with checkpoint.understood(path):
        action = found[key].get("action", {})
        if not {"q01", "q99"} <= action.keys():
            raise UserError(f"the statistics of {key!r} in {folder} lack the actions' q01 and q99")
        stats = {end: [float(x) for x in action[end]] for end in ("q01", "q99")}
        stats["mask"] = [bool(x) for x in action.get("mask", [True] * len(stats["q01"]))]
    if len({len(x) for x in stats.values()}) != 1:
        raise UserError(
            f"the statistics of {key!r} in {folder} have q01, q99 and mask of different lengths"
        )
    return stats


# ---------------------------------------------------------------- prompts


def prompt(task: str) -> str:
    return f"In: What action should the robot take to {task.lower()}?\nOut:"


def encode(
    tokenizer, task: str, length: int, pad: int, state: np.ndarray | None = None
) -> np.ndarray:
    """Token ids [length] int32: BOS, padding, the prompt, "▁". Raises UserError when the prompt
    does not fit.

    Padding stands between BOS and the prompt, because pictures go right after BOS (RLinf
    `processing_prismatic.py`). "▁" is 29871 in Llama's vocabulary. `state` is not part of the
    prompt; it is only checked.
    """
    if state is not None and not np.isfinite(state).all():
        raise UserError(
            f"the robot's state {np.asarray(state).tolist()} is not finite: the simulator is broken"
        )
    ids = tokenizer.encode(prompt(task))
    blank = tokenizer.piece_to_id("▁")
    if blank == tokenizer.unk_id():
        raise UserError(
            "the SentencePiece file has no token '▁', which ends every prompt: it is not one for "
            "OpenVLA-OFT"
        )
    ids += [blank] * (ids[-1] != blank)
    if len(ids) + 1 > length:
        raise UserError(
            f"the prompt {prompt(task)!r} needs {len(ids) + 1} tokens and the model has room for "
            f"{length}: give --tokens"
        )
    return np.array([tokenizer.bos_id(), *[pad] * (length - 1 - len(ids)), *ids], np.int32)


class Preparation:
    """Observations to what `Oft.act` reads. Its actions are the simulator's already
    (`action_table`).
    """

    def __init__(self, config, stats: dict, tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.published = "layout" in stats

    def observe(self, images: np.ndarray, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """images [V, H, W, 3] uint8, state [S], task → image [V, size, size, 3], tokens [L] int32.
        Raises UserError.

        Pictures for a published model are resized as RLinf does; openvla-oft's own evaluation first
        compresses them as JPEG.
        """
        c = self.config
        size = (
            images.shape[1:3]
            if self.published and images.ndim == 4
            else (c.image_size, c.image_size)
        )
        if images.dtype != np.uint8 or images.shape != (c.views, *size, 3):
            wanted = f"[{c.views}, {', '.join(map(str, size))}, 3] uint8"
            raise UserError(
                f"the images are {list(images.shape)} {images.dtype}: the model needs {wanted}"
            )
        if size != (c.image_size, c.image_size):
            images = resize_bicubic(torch.from_numpy(images), c.image_size).numpy()
        return {"image": images, "tokens": encode(self.tokenizer, task, c.tokens, c.pad, state)}

    def actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return actions


def preparation(header: checkpoint.Header, tokenizer: str) -> Preparation:
    from models.oft import OftConfig

    c = OftConfig(**header.shape)  # a published vocabulary ends with the words that mean actions
    return Preparation(c, header.stats, tokenize.load_for(tokenizer, c.words, c.words + c.bins))


def wording(task: str) -> str:
    return prompt(task)


def embedded(family: str, tokenizer: str):
    """The small model with random weights, all of them trainable."""
    from models.oft import Oft, OftConfig

    model = Oft(OftConfig(words=tokenize.load(tokenizer).vocab_size(), train="full"))
    model.train_as("full")
    return model


# ---------------------------------------------------------------- actions and bins


def bin_centers(bins: int) -> np.ndarray:
    """[bins − 1] float64: the middles between `bins` points from −1 to 1."""
    edges = np.linspace(-1.0, 1.0, bins)
    return (edges[:-1] + edges[1:]) / 2.0


def decode_tokens(tokens: np.ndarray, words: int, bins: int = 256) -> np.ndarray:
    """Action token ids → normalised actions. Later words are lower bins; the first word and the
    second mean the highest.
    """
    index = np.clip(words + bins - np.asarray(tokens) - 1, 0, bins - 2)
    return bin_centers(bins)[index]


def encode_actions(actions: Tensor, words: int, bins: int = 256) -> Tensor:
    """Normalised actions, clipped to [-1, 1] → token ids int64 (`ActionTokenizer`: np.digitize)."""
    edges = torch.from_numpy(np.linspace(-1.0, 1.0, bins)).to(
        actions.device
    )  # torch.linspace differs in the last bit
    return words + bins - torch.bucketize(actions.double().clamp(-1.0, 1.0), edges, right=True)


def unnormalise_actions(actions: np.ndarray, stats: dict) -> np.ndarray:
    """[-1, 1] → the data's units by the quantiles, where the mask says so. actions [..., A]
    float64.
    """
    low = np.array(stats["q01"])
    high = np.array(stats["q99"])
    mask = np.array(stats["mask"], dtype=bool)
    return np.where(mask, 0.5 * (actions + 1.0) * (high - low + 1e-8) + low, actions)


def normalise_actions(actions: np.ndarray, stats: dict) -> np.ndarray:
    """The inverse, clipped to [-1, 1] where the mask says so: how demonstrations are prepared
    (`BOUNDS_Q99`).
    """
    low = np.array(stats["q01"])
    high = np.array(stats["q99"])
    mask = np.array(stats["mask"], dtype=bool)
    return np.where(
        mask, np.clip(2.0 * (actions - low) / (high - low + 1e-8) - 1.0, -1.0, 1.0), actions
    )


def libero_gripper(actions: np.ndarray) -> np.ndarray:
    """The data has the gripper in [0, 1] with 1 open; LIBERO wants 1 closed and −1 open: 2a − 1,
    its sign, turned round.
    """
    actions = np.array(actions)
    actions[..., -1] = -np.sign(2.0 * actions[..., -1] - 1.0)
    return actions


def widowx_gripper(actions: np.ndarray) -> np.ndarray:
    """ManiSkill's WidowX: 1 open, −1 closed."""
    actions = np.array(actions)
    actions[..., -1] = 2.0 * (actions[..., -1] > 0.5) - 1.0
    return actions


GRIPPERS = {"": lambda actions: actions, "libero": libero_gripper, "widowx": widowx_gripper}


def action_table(stats: dict, action_dim: int, bins: int = 256) -> np.ndarray:
    """[A, bins] float32: what the simulator executes for the k-th action word of each dimension.

    stats: as `read_statistics` returns, with "gripper" naming one of `GRIPPERS`; without quantiles
    actions stay in [-1, 1].
    """
    actions = np.repeat(
        decode_tokens(np.arange(bins), 0, bins)[:, None], action_dim, axis=1
    )  # [bins, A]
    if "q01" in stats:
        if len(stats["q01"]) != action_dim:
            raise UserError(
                f"the statistics are of {len(stats['q01'])} action dimensions and the model has "
                f"{action_dim}"
            )
        actions = unnormalise_actions(actions, stats)
    return GRIPPERS[stats.get("gripper", "")](actions).T.astype(np.float32)


# ---------------------------------------------------------------- pictures


def center_crop(image: Tensor, area: float = 0.9) -> Tensor:
    """The middle `area` of pictures, resized back: [n, H, H, 3] uint8 → the same. As
    tf.image.crop_and_resize, bit for bit.

    Runs in fp32 in TensorFlow's order: corners of the box are pixel centres, horizontal before
    vertical, × 255.5 rounded down.
    """
    size = image.shape[1]
    side = np.sqrt(np.float32(area))
    low = (np.float32(1.0) - side) / np.float32(2.0)
    step = (low + side - low) * np.float32(size - 1) / np.float32(size - 1)
    at = low * np.float32(size - 1) + np.arange(size, dtype=np.float32) * step
    first = np.floor(at).astype(np.int64)
    last = np.ceil(at).astype(np.int64)
    first = torch.from_numpy(first).to(image.device)
    last = torch.from_numpy(last).to(image.device)
    part = torch.from_numpy(at - np.floor(at)).to(image.device)
    x = image.float() * np.float32(1.0 / 255.0)
    rows = [x[:, i] for i in (first, last)]
    top, bottom = (r[:, :, first] + (r[:, :, last] - r[:, :, first]) * part[:, None] for r in rows)
    out = top + (bottom - top) * part[:, None, None]
    return (out.clamp(0.0, 1.0) * 255.5).to(torch.uint8)


def resize_bicubic(image: Tensor, size: int) -> Tensor:
    """[n, H, W, 3] uint8 → [n, size, size, 3] uint8 as torchvision's antialiased bicubic (RLinf:
    LIBERO's 256 pixels to 224).
    """
    x = image.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return x.clamp(0.0, 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def resize_lanczos(image: Tensor, size: int) -> Tensor:
    """[n, H, W, 3] uint8 → [n, size, size, 3] uint8 as tf.image.resize(method="lanczos3",
    antialias=True), then rounded.

    The originals resize so after a JPEG round trip of quality 95, which is left out here. In fp32
    in TensorFlow's order.
    """
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


# ---------------------------------------------------------------- parity with the originals


def parity(folder: Path) -> dict[str, Tensor]:
    """Every output of a reference folder by our code: features, logits, log-probs, values, actions,
    loss, grad.<original key>.

    See tests/golden/oft/README.md for the inputs. Gradients are of `loss`, which is RLinf's kind
    (log-probs and values against `weights` and `returns`) where the inputs hold those, else the
    fine-tuning loss on `actions`.
    """
    from safetensors.torch import load_file

    from models.oft import Oft, config_of

    folder = Path(folder)
    inputs = load_file(folder / "inputs.safetensors")
    config = config_of(read_config(folder))
    model = Oft(config)
    layout = source(folder / "weights.safetensors", config)
    mapping = layout.names(config)
    checkpoint.load_source(model, folder / "weights.safetensors", layout, "cpu", torch.float32)
    stats = read_statistics(
        folder, checkpoint.read_json(folder / "config.json").get("unnorm_key", "")
    )
    model.set_actions(action_table(stats, config.action_dim, config.bins))

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
        out["loss"] = model.imitation_loss(image, tokens, inputs["actions"])
    parameters = dict(model.named_parameters())
    chosen = {
        name: parameters[name]
        for name in mapping
        if name in parameters and parameters[name].requires_grad
    }
    gradients = torch.autograd.grad(out["loss"], list(chosen.values()), allow_unused=True)
    out |= {
        f"grad.{mapping[n]}": g for n, g in zip(chosen, gradients, strict=True) if g is not None
    }
    return {name: x.detach() for name, x in out.items()}
