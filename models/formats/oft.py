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
from functools import partial
from pathlib import Path
from typing import NotRequired

import numpy as np
import torch
from torch import Tensor

from checks import read_json
from errors import require, understood
from models import tokenize
from models.checkpoint import Header
from models.formats import pictures, source
from models.formats.names import Rules
from models.formats.preparation import Numbers, PreparationBase, statistics
from models.formats.source import Found, Source
from models.oft import FULL, Lora, Oft, OftConfig

MARKS = ("vision_backbone.", "base_model.model.")

TOWERS = {"dino": "vision_backbone.featurizer", "siglip": "vision_backbone.fused_featurizer"}
LLAMA = "language_model.model"
PEFT = "base_model.model."


def linears(leaf: str, their_leaf: str, before: str = "") -> Rules:
    """Rules of one tensor of every linear layer and patch embedding, the layers that have adapters.

    leaf: a pattern of its name; their_leaf: theirs; before: what stands before their keys."""
    rules: Rules = ()
    for ours, theirs in TOWERS.items():
        tower = f"{before}{theirs}"
        block = rf"{ours}\.blocks\.(\d+)"
        rules += (
            (rf"{ours}\.patch_embed\.{leaf}", f"{tower}.patch_embed.proj.{their_leaf}"),
            (rf"{block}\.(qkv|proj)\.{leaf}", rf"{tower}.blocks.\1.attn.\2.{their_leaf}"),
            (rf"{block}\.(fc\d)\.{leaf}", rf"{tower}.blocks.\1.mlp.\2.{their_leaf}"),
        )
    layer = rf"{before}{LLAMA}.layers.\1"
    return rules + (
        (rf"(projector\.fc\d)\.{leaf}", rf"{before}\1.{their_leaf}"),
        (rf"language\.(\d+)\.([qkvo]_proj)\.{leaf}", rf"{layer}.self_attn.\2.{their_leaf}"),
        (rf"language\.(\d+)\.(\w+_proj)\.{leaf}", rf"{layer}.mlp.\2.{their_leaf}"),
        (rf"lm_head\.{leaf}", f"{before}language_model.lm_head.{their_leaf}"),
    )


NETWORK: Rules = (
    *linears("(?P<leaf>weight|bias)", r"\g<leaf>"),
    (r"dino\.(pos_embed|cls_token|reg_token|blocks\.\d+\.norm.*)", rf"{TOWERS['dino']}.\1"),
    (r"dino\.blocks\.(\d+)\.scale(\d)", rf"{TOWERS['dino']}.blocks.\1.ls\2.scale_factor"),
    (r"siglip\.(pos_embed|blocks\.\d+\.norm.*)", rf"{TOWERS['siglip']}.\1"),
    (r"language\.(\d+)\.(\w+_layernorm.*)", rf"{LLAMA}.layers.\1.\2"),
    (r"language_norm\.(.*)", rf"{LLAMA}.norm.\1"),
    (r"embed_tokens.*", rf"{LLAMA}.\g<0>"),
)
# RLinf's trained policies hold a value head, with activations at odd places, as ours.
VALUE: Rules = ((r"value_head\.(.*)", r"value_head.mlp.\1"),)
# PEFT's adapter_model.safetensors
ADAPTERS: Rules = (
    *linears("lora_a", "lora_A.weight", PEFT),
    *linears("lora_b", "lora_B.weight", PEFT),
)


# Keys that nobody reads, beside those of each tower's last block, before which its output is read:
UNUSED = (
    r"vision_backbone\.(fused_)?featurizer\.norm\.(weight|bias)",  # the norm after that block
    r"vision_backbone\.fused_featurizer\.attn_pool\..*",  # pools what is read patch by patch
    # a constant that older tools saved
    r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"language_model\.lm_head\.base_layer\.weight",  # PEFT's copy, where it adapts lm_head
)


def source_of(path: str | Path, config: OftConfig) -> Source:
    """The layout of a folder or file by its keys, strict about the number of vision blocks."""
    keys = source.layout(path)
    rules: Rules = ()
    if any(key.startswith("vision_backbone.") for key in keys):
        rules += NETWORK
    if any(key.startswith("value_head.") for key in keys):
        rules += VALUE
    if any(key.startswith(PEFT) for key in keys):
        rules += ADAPTERS
    last = (
        rf"vision_backbone\.featurizer\.blocks\.{config.dino_depth}\..*",
        rf"vision_backbone\.fused_featurizer\.blocks\.{config.siglip_depth}\..*",
    )
    return Source(rules, tuple(rf"(base_model\.model\.)?{key}" for key in last + UNUSED))


def folded(model: Oft, name: str) -> Tensor:
    """A weight with its adapter added into it."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, Lora) and name.endswith(".weight"):
        return layer.folded()
    return model.get_parameter(name)


def save(model: Oft, folder: Path, like: Path) -> None:
    """Writes the policy as the folder `like` it came from, adapters added into the weights."""
    source.save(model, folder, source_of(like, model.config), like, partial(folded, model))


FIELDS = {  # of config.json, as RLinf sets them: ours ← theirs
    "action_dim": "action_dim",
    "chunk": "num_action_chunks",
    "views": "num_images_in_input",
    "tokens": "max_prompt_length",
    "temperature": "temperature",
    "center_crop": "center_crop",
    "lora_rank": "lora_rank",
    "bins": "n_action_bins",
    "spare": "pad_to_multiple_of",
    "pad": "pad_token_id",
}
TEXT = {  # of its `text_config`
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
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
        text = found.get("text_config") or {}
        given = {ours: found.get(theirs) for ours, theirs in FIELDS.items()}
        given |= {ours: text.get(theirs) for ours, theirs in TEXT.items()}
        shape = {name: value for name, value in given.items() if value is not None}
        for tower, prefix in (("featurizer", "dino"), ("fused_featurizer", "siglip")):
            shape |= tower_of(found.get("vision", {}).get(tower), prefix)
        c = replace(FULL["oft"], **shape)
        c = replace(
            c,
            kv_heads=text.get("num_key_value_heads", c.heads),
            words=text.get("vocab_size", 32064) - c.spare - c.bins,
            value_widths=tuple(found.get("value_head_sizes", c.value_widths)),
            image_size=found.get("image_sizes", [c.image_size])[0],
            stop_token=found.get("implement_version", "official") != "rlinf",
            train="lora" if found.get("is_lora", False) else "full",
        )
        if (folder / "preprocessor_config.json").is_file():
            says = read_json(folder / "preprocessor_config.json")
            c = replace(c, dino_mean=tuple(says["means"][0]), dino_std=tuple(says["stds"][0]))
    return c


def tower_of(timm: dict | None, prefix: str) -> dict:
    """Fields of `OftConfig` from timm's arguments of one tower, which may be left out."""
    if timm is None:
        return {}
    fields = {
        f"{prefix}_width": timm["embed_dim"],
        f"{prefix}_depth": timm["depth"] - 1,
        f"{prefix}_heads": timm["num_heads"],
        f"{prefix}_mlp": int(timm["embed_dim"] * timm.get("mlp_ratio", 4.0)),
        "patch": timm["patch_size"],
    }
    return fields | ({"dino_registers": timm["reg_tokens"]} if "reg_tokens" in timm else {})


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
    alike = len({len(x) for x in stats.values()}) == 1
    require(alike, f"{what} have q01, q99 and mask of different lengths")
    return stats


def check_decoding(folder: Path) -> None:
    """Raises UserError where a folder has OpenVLA-OFT's tensors, but its actions are no words that
    are decoded side by side: they would be read from words that nobody has trained.

    openvla-oft keeps what a continuous policy (L1 or diffusion) needs in files of its own, such as
    action_head--STEP_checkpoint.pt, and its statistics and code beside every policy. Plain
    OpenVLA's code knows no chunks of actions."""
    continuous = ("action_head", "noisy_action_projector", "proprio_projector", "vision_backbone")
    parts = sorted(file.name for name in continuous for file in folder.glob(f"{name}--*"))
    code = folder / "modeling_prismatic.py"
    chunked = not code.is_file() or "NUM_ACTIONS_CHUNK" in code.read_text(errors="replace")
    theirs = chunked and (folder / "dataset_statistics.json").is_file()
    rlinf = "num_action_chunks" in read_json(folder / "config.json")
    kind = f"a continuous policy: it has {', '.join(parts)}"
    if not parts:
        kind = "plain OpenVLA, which decodes one action word by word"
    require(
        not parts and (rlinf or theirs),
        f"{folder} is {kind}; --model oft needs a policy of action tokens: RLinf's, or one of "
        "openvla-oft without --use_l1_regression, --use_diffusion, --use_proprio and --use_film",
    )


def published(path: Path, family: str, config, spec) -> Found:
    """What an OpenVLA-OFT folder says of itself, made to fit the run. Raises UserError."""
    check_decoding(Path(path))
    stats = read_statistics(path, config.train.statistics)
    c = replace(config_of(path), train="full", action_dim=len(stats["q01"]))
    # RLinf, whose settings or value head a folder has, decodes without </s> and shows the whole
    # picture; openvla-oft does neither.
    says = read_json(Path(path) / "config.json")
    heads = any(key.startswith("value_head.") for key in source.layout(path))
    rlinf = heads or "num_action_chunks" in says
    whose = "RLinf's" if rlinf else "openvla-oft's"
    names = ("chunk", "tokens", "temperature")
    defaults = {name: (getattr(c, name), "as published on LIBERO") for name in names}
    defaults |= {name: (not rlinf, whose) for name in ("center_crop", "stop_token")}
    theirs = FIELDS | {"stop_token": "implement_version"}
    said = {ours for ours, name in theirs.items() if says.get(name) is not None}
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
