"""OpenVLA-OFT as it lies on users' disks: names of weights, configuration, statistics, prompts.

A folder as Hugging Face tools write it: `config.json`, `model.safetensors.index.json` with its
shards (or one `model.safetensors`), `dataset_statistics.json`, perhaps `preprocessor_config.json`,
`tokenizer.model`.

Sources: moojink/openvla-oft `prismatic/extern/hf/`, `prismatic/vla/`,
`experiments/robot/openvla_utils.py`; RLinf `rlinf/models/embodiment/openvla_oft`,
`rlinf/models/embodiment/prismatic`. Everything here is exact; before they resize a picture, the
originals pass it through JPEG. Pictures rendered at the model's size need neither.
"""

from dataclasses import replace
from pathlib import Path
from typing import NotRequired

import numpy as np
import torch

from checks import read_json
from errors import require, understood
from models import tokenize
from models.checkpoint import Header
from models.formats import bins, pictures, source
from models.formats.names import Rules
from models.formats.preparation import Numbers, PreparationBase, statistics, usual
from models.formats.source import Found, Source
from models.oft import FULL, Oft, OftConfig

MARKS = ("vision_backbone.", "base_model.model.")

TOWERS = {"dino": "vision_backbone.featurizer", "siglip": "vision_backbone.fused_featurizer"}
LLAMA = "language_model.model"
LAYER = rf"{LLAMA}.layers.\1"


def tower(ours: str) -> Rules:
    """Rules of one image tower."""
    theirs = TOWERS[ours]
    block = rf"{ours}\.blocks\.(\d+)"
    return (
        (rf"{ours}\.patch_embed\.(.*)", rf"{theirs}.patch_embed.proj.\1"),
        (rf"{block}\.((qkv|proj).*)", rf"{theirs}.blocks.\1.attn.\2"),
        (rf"{block}\.(fc\d.*)", rf"{theirs}.blocks.\1.mlp.\2"),
        (rf"{block}\.scale(\d)", rf"{theirs}.blocks.\1.ls\2.scale_factor"),
        (rf"{ours}\.(.*)", rf"{theirs}.\1"),
    )


NETWORK: Rules = (
    *tower("dino"),
    *tower("siglip"),
    (r"projector.*", r"\g<0>"),
    (r"language\.(\d+)\.([qkvo]_proj.*)", rf"{LAYER}.self_attn.\2"),
    (r"language\.(\d+)\.(\w+_proj.*)", rf"{LAYER}.mlp.\2"),
    (r"language\.(\d+)\.(\w+_layernorm.*)", rf"{LAYER}.\2"),
    (r"language_norm\.(.*)", rf"{LLAMA}.norm.\1"),
    (r"embed_tokens.*", rf"{LLAMA}.\g<0>"),
    (r"lm_head.*", r"language_model.\g<0>"),
)
# RLinf's trained policies hold a value head, with activations at odd places, as ours.
VALUE: Rules = ((r"value_head\.(.*)", r"value_head.mlp.\1"),)

# Keys that nobody reads, beside those of each tower's last block, before which its output is read:
UNUSED = (
    r"vision_backbone\.(fused_)?featurizer\.norm\.(weight|bias)",  # the norm after that block
    r"vision_backbone\.fused_featurizer\.attn_pool\..*",  # pools what is read patch by patch
    # a constant that older tools saved
    r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)


def source_of(path: str | Path | None, config: OftConfig) -> Source:
    """The layout of a folder or file by its keys, strict about the number of vision blocks; without
    one, that of no value head."""
    last = (
        rf"vision_backbone\.featurizer\.blocks\.{config.dino_depth}\..*",
        rf"vision_backbone\.fused_featurizer\.blocks\.{config.siglip_depth}\..*",
    )
    heads = any(key.startswith("value_head.") for key in source.layout(path)) if path else False
    return Source(NETWORK + (VALUE if heads else ()), last + UNUSED)


FIELDS = {  # of config.json, as RLinf sets them: ours ← theirs
    "action_dim": ("action_dim",),
    "chunk": ("num_action_chunks",),
    "views": ("num_images_in_input",),
    "tokens": ("max_prompt_length",),
    "temperature": ("temperature",),
    "center_crop": ("center_crop",),
    "lora_rank": ("lora_rank",),
    "bins": ("n_action_bins",),
    "spare": ("pad_to_multiple_of",),
    "pad": ("pad_token_id",),
    "value_widths": ("value_head_sizes",),
    "width": ("text_config.hidden_size",),
    "depth": ("text_config.num_hidden_layers",),
    "heads": ("text_config.num_attention_heads",),
    "kv_heads": ("text_config.num_key_value_heads", "text_config.num_attention_heads"),
    "mlp": ("text_config.intermediate_size",),
    "norm_eps": ("text_config.rms_norm_eps",),
    "rope_theta": ("text_config.rope_theta",),
    "patch": ("vision.featurizer.patch_size",),
    "dino_width": ("vision.featurizer.embed_dim",),
    "dino_heads": ("vision.featurizer.num_heads",),
    "dino_registers": ("vision.featurizer.reg_tokens",),
    "siglip_width": ("vision.fused_featurizer.embed_dim",),
    "siglip_heads": ("vision.fused_featurizer.num_heads",),
}


def config_of(folder: str | Path) -> OftConfig:
    """What config.json (and preprocessor_config.json) of a folder say. Raises UserError.

    The published files leave widths to the tools' defaults, which `FULL` repeats. Folders of other
    sizes say theirs under `text_config` and, for the towers, under `vision`: {"featurizer" |
    "fused_featurizer": timm's arguments}."""
    folder = Path(folder)
    found = read_json(folder / "config.json")
    with understood(folder / "config.json"):
        backbone = found.get("vision_backbone_id")
        known = "dinosiglip-vit-so-224px"
        sentence = f"{folder} has the vision backbone {backbone!r}: OpenVLA-OFT's is {known!r}"
        require(backbone == known, sentence)
        shape = source.said_by(found, FIELDS)
        for tower, prefix in (("featurizer", "dino"), ("fused_featurizer", "siglip")):
            if timm := source.at(found, f"vision.{tower}"):
                shape[f"{prefix}_depth"] = timm["depth"] - 1
                shape[f"{prefix}_mlp"] = int(timm["embed_dim"] * timm.get("mlp_ratio", 4.0))
        c = replace(FULL["oft"], **shape)
        c = replace(
            c,
            words=(source.at(found, "text_config.vocab_size") or 32064) - c.spare - c.bins,
            image_size=found.get("image_sizes", [c.image_size])[0],
            stop_token=found.get("implement_version", "official") != "rlinf",
            train="lora" if found.get("is_lora", False) else "full",
        )
        if (folder / "preprocessor_config.json").is_file():
            says = read_json(folder / "preprocessor_config.json")
            c = replace(c, dino_mean=tuple(says["means"][0]), dino_std=tuple(says["stds"][0]))
    return c


def read_statistics(folder: str | Path, key: str = "") -> dict:
    """One data set's action statistics, from dataset_statistics.json or config.json's `norm_stats`:
    lists {"q01": [A], "q99": [A], "mask": [A] bool}. Raises UserError.

    `key` is the originals' `unnorm_key`; "" takes the only one there is, and `key` also stands for
    `key_no_noops`."""
    path = Path(folder) / "dataset_statistics.json"
    if path.is_file():
        found = read_json(path)
    else:
        found = read_json(Path(folder) / "config.json").get("norm_stats") or {}
    names = ", ".join(found) or "none"
    if not key:
        count = len(found)
        require(count == 1, f"{folder} has statistics of {count} data sets: choose one of {names}")
        key = next(iter(found))
    if key not in found and f"{key}_no_noops" in found:
        key = f"{key}_no_noops"
    require(key in found, f"{folder} has no statistics of {key!r}: choose one of {names}")
    what = f"the statistics of {key!r} in {folder}"
    with understood(path):
        action = found[key].get("action", {})
        require({"q01", "q99"} <= action.keys(), f"{what} lack the actions' q01 and q99")
        stats = {end: [float(x) for x in action[end]] for end in ("q01", "q99")}
        stats["mask"] = [bool(x) for x in action.get("mask", [True] * len(stats["q01"]))]
    return stats


def check_decoding(folder: Path) -> None:
    """Raises UserError where a folder has OpenVLA-OFT's tensors, but its actions are no words that
    are decoded side by side: they would be read from words that nobody has trained.

    openvla-oft keeps what a continuous policy (L1 or diffusion) needs in files of its own, such as
    action_head--STEP_checkpoint.pt, and its statistics and code beside every policy. Plain
    OpenVLA's code knows no chunks of actions. Where it is not there, only RLinf's setting tells."""
    continuous = ("action_head", "noisy_action_projector", "proprio_projector", "vision_backbone")
    parts = sorted(file.name for name in continuous for file in folder.glob(f"{name}--*"))
    counted = (folder / "dataset_statistics.json").is_file()
    code = folder / "modeling_prismatic.py"
    plain = code.is_file() and "NUM_ACTIONS_CHUNK" not in code.read_text(errors="replace")
    rlinf = (read_json(folder / "config.json").get("num_action_chunks") or 1) != 1
    kind = ""
    if parts:
        kind = f"a continuous policy: it has {', '.join(parts)}"
    elif plain or not (rlinf or counted):
        kind = "plain OpenVLA, which decodes one action word by word"
    elif not (rlinf or code.is_file()):
        kind = f"perhaps plain OpenVLA, for it lacks {code.name}, which tells: download that too"
    require(
        not kind,
        f"{folder} is {kind}; --model oft needs a policy of action tokens: RLinf's, or one of "
        "openvla-oft without --use_l1_regression, --use_diffusion, --use_proprio and --use_film",
    )


def published(path: Path, family: str, config, spec) -> Found:
    """What an OpenVLA-OFT folder says of itself, made to fit the run. Raises UserError."""
    check_decoding(Path(path))
    stats = read_statistics(path, config.train.statistics)
    c = replace(config_of(path), train="lora", action_dim=len(stats["q01"]))
    # RLinf, whose settings or value head a folder has, decodes without </s> and shows the whole
    # picture; openvla-oft does neither.
    says = read_json(Path(path) / "config.json")
    heads = any(key.startswith("value_head.") for key in source.layout(path))
    rlinf = heads or "num_action_chunks" in says
    whose = "RLinf's" if rlinf else "openvla-oft's"
    names = ("chunk", "tokens", "temperature")
    defaults = {name: (getattr(c, name), "as published on LIBERO") for name in names}
    defaults |= {name: (not rlinf, whose) for name in ("center_crop", "stop_token")}
    said = source.said_by(says, FIELDS | {"stop_token": ("implement_version",)})
    c, assumed = source.filled(c, said, defaults, config.rollout)
    if "num_images_in_input" not in says:
        # Nor do the weights say how many cameras there are: positions alone tell tokens apart.
        c = replace(c, views=config.env.cameras or 1)
        if not config.env.cameras and spec.views > 1:
            assumed["cameras"] = "1 (RLinf's, and openvla-oft's where it is not told)"
    stats |= {"layout": "openvla", "fit": "bicubic"}
    return Found(c, source_of(path, c), stats, assumed)


def prompt(task: str) -> str:
    return f"In: What action should the robot take to {task.lower()}?\nOut:"


def encode(tokenizer, task: str, length: int, pad: int) -> np.ndarray:
    """Token ids [length] int32: BOS, padding, the prompt, "▁". Raises UserError when the prompt
    does not fit.

    Padding stands between BOS and the prompt, because pictures go right after BOS (RLinf
    `processing_prismatic.py`). "▁" is 29871 in Llama's vocabulary."""
    ids = tokenizer.encode(prompt(task))
    blank = tokenizer.piece_to_id("▁")
    require(
        blank != tokenizer.unk_id(),
        "the SentencePiece file has no token '▁', which ends every prompt: it is not one for "
        "OpenVLA-OFT",
    )
    if ids[-1] != blank:
        ids.append(blank)
    padding = [pad] * (length - 1 - len(ids))
    return tokenize.padded([tokenizer.bos_id(), *padding, *ids], length, pad, prompt(task))


class Preparation(PreparationBase):
    """Its actions are the simulator's already (`bins.action_table`); its prompts hold no state.

    Pictures are resized as RLinf does; openvla-oft's own evaluation first compresses them as JPEG.
    """

    def resize(self, images: np.ndarray) -> np.ndarray:
        size = self.config.image_size
        if images.shape[1:3] == (size, size):
            return images
        return pictures.resize_bicubic(torch.from_numpy(images), size).numpy()

    def words(self, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """tokens [L] int32."""
        c = self.config
        return {"tokens": encode(self.tokenizer, task, c.tokens, c.pad)}

    def targets(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """In [-1, 1], of which there are words."""
        if "q01" not in self.stats:
            return actions
        return bins.normalise_actions(self.in_data(actions, state), self.stats)

    def counted(self, states: np.ndarray, actions: np.ndarray) -> dict:
        if "q01" not in self.stats:
            return super().counted(states, actions)
        low, high = usual(actions)
        return self.stats | {"q01": low.tolist(), "q99": high.tolist()}


# Our own prompts hold no state, and our own actions may be in [-1, 1].
ACTIONS = {"q01": Numbers, "q99": Numbers, "mask": list[bool]}
MAYBE = {"state_low": Numbers, "state_high": Numbers} | ACTIONS
STATS = {
    "own": statistics(**{name: NotRequired[kind] for name, kind in MAYBE.items()}),
    "openvla": statistics(**ACTIONS),
}


def preparation(header: Header, tokenizer: str) -> Preparation:
    c = OftConfig(**header.shape)  # a published vocabulary ends with the words that mean actions
    return Preparation(c, header.stats, tokenize.load_for(tokenizer, c.words, c.words + c.bins))


wording = prompt


def embedded(family: str, tokenizer: str) -> Oft:
    """The small model with random weights, all of them trainable."""
    return Oft(OftConfig(words=tokenize.load(tokenizer).vocab_size(), train="full"))
