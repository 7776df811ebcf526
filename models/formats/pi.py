"""π0 and π0.5 as they lie on users' disks: names of weights, statistics, prompts.

    layout    weights                                         statistics
    openpi    model.safetensors (examples/convert_jax_…)      assets/…/norm_stats.json
    rlinf     the same, plus the heads of its RL training     …/norm_stats.json
    lerobot   model.safetensors, every key behind "model."    policy_preprocessor.json,
              policy_postprocessor.json + safetensors

Sources: openpi src/openpi/{transforms.py, models/tokenizer.py, policies/libero_policy.py}; LeRobot
policies/{pi0, pi05}/processor_*.py and processor/normalize_processor.py. Left out: augmentation,
LoRA and FAST checkpoints, real-time chunking, robots other than those whose state the caller lays
out.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from checks import read_json
from errors import require, understood
from models import tokenize
from models.checkpoint import Header, require_family
from models.formats import pictures, source
from models.formats.names import Rules, siglip
from models.formats.preparation import OWN, Numbers, PreparationBase, statistics, usual
from models.formats.source import Found, Source, Stored
from models.pi import FULL, SMALL, Pi, PiConfig

MARKS = ("paligemma_with_expert.",)

VLM = "paligemma_with_expert.paligemma.model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
VISION = VLM + "vision_tower.vision_model"
# openpi ties it to the embedding and saves it under this name alone
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = VLM + "language_model.embed_tokens.weight"  # LeRobot unties them and reads this one
UNUSED = (
    # the expert predicts no words
    r"(model\.)?paligemma_with_expert\.gemma_expert\.lm_head\.weight",
    # Flow-Noise's network, for a model without one; its `logvar_*` are PiConfig.noise_range
    r"noise_head\..*",
)
NETWORK: Rules = (
    (r"vision\.projector\.(.*)", VLM + r"multi_modal_projector.linear.\1"),
    *siglip(VISION),
    (r"language\.(\d+)\.([qkvo]_proj.*)", VLM + r"language_model.layers.\1.self_attn.\2"),
    (r"language\.(\d+)\.(.*)", VLM + r"language_model.layers.\1.\2"),
    (r"language_norm\.(.*)", VLM + r"language_model.norm.\1"),
    (r"expert\.(\d+)\.([qkvo]_proj.*)", EXPERT + r"layers.\1.self_attn.\2"),
    (r"expert\.(\d+)\.(.*)", EXPERT + r"layers.\1.\2"),
    (r"expert_norm\.(.*)", EXPERT + r"norm.\1"),
    (r"(action|time|state)_.*", r"\g<0>"),
)
# RLinf's heads. Its Flow-Noise keeps no activations in the list, so places count half.
VALUE: Rules = ((r"value_head\.(.*)", r"value_head.mlp.\1"),)
NOISE: Rules = tuple(
    (rf"noise_head\.{2 * i}\.(.*)", rf"noise_head.mlp_logvar.moduleList.{i}.linear_1.\1")
    for i in range(10)
)


def layout(embedding: str, alias: str, heads: Rules = (), prefix: str = "") -> Source:
    """embedding: the key that is read; alias: the other name of the same tensor."""
    rules = ((r"embed_tokens\.weight", embedding), *NETWORK, *heads)
    return Source(rules, UNUSED, ((prefix + embedding, prefix + alias),), prefix)


SOURCES = {
    "openpi": layout(LM_HEAD, EMBEDDING),
    "rlinf": layout(LM_HEAD, EMBEDDING, VALUE),
    "rlinf_noise": layout(LM_HEAD, EMBEDDING, VALUE + NOISE),
    "lerobot": layout(EMBEDDING, LM_HEAD, prefix="model."),
    "lerobot_base": layout(EMBEDDING, LM_HEAD),  # as lerobot/pi0_base is stored
}


def source_of(path: str | Path | None, config: PiConfig) -> Source:
    """The layout of a checkpoint by its keys; without one, openpi's."""
    return SOURCES[which(path, source.layout(path)) if path else "openpi"]


def which(path: str | Path, stored: dict[str, Stored]) -> str:
    """The layout of a checkpoint, a key of `SOURCES`, by the keys it holds."""
    if any(key.startswith("model.paligemma_with_expert.") for key in stored):
        return "lerobot"
    parts = {key.partition(".")[0] for key in stored}
    here = "none of its tensors is named paligemma_with_expert.…"
    require("paligemma_with_expert" in parts, f"checkpoint {path} is no π0 or π0.5: {here}")
    if (Path(path) / "policy_preprocessor.json").is_file():
        return "lerobot_base"
    if "value_head" not in parts:
        return "openpi"
    return "rlinf_noise" if "noise_head" in parts else "rlinf"


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
# RLinf's folders have no config.json. By family and simulator, how many actions its models predict
# at once; elsewhere as many as openpi's (rlinf/models/embodiment/openpi/dataconfig).
RLINF_HORIZON = {
    ("pi0", "metaworld"): 5,
    ("pi05", "metaworld"): 5,
    ("pi0", "robocasa"): 5,
    ("pi05", "robocasa"): 50,
}


def shape_of(path: str | Path, stored: dict[str, Stored], config: dict) -> PiConfig:
    """A checkpoint's configuration: widths and depths from its tensors, which cannot lie, the rest
    from its config.json, or else as in `FULL`.

    Neither tells the heads of the image tower where config.json is silent: SigLIP's are 72 wide."""
    prefix = "model." if which(path, stored) == "lerobot" else ""
    vision = VISION + "."
    language = VLM + "language_model.layers."

    def size(key: str, axis: int = 0) -> int:
        key = prefix + key
        sentence = f"checkpoint {path} has no tensor {key!r}: it is of another model or layout"
        require(key in stored, sentence)
        return stored[key].shape[axis]

    def depth(layers: str) -> int:
        start = prefix + layers
        numbers = [int(k[len(start) :].split(".")[0]) for k in stored if k.startswith(start)]
        return 1 + max(numbers, default=-1)

    def widths(head: str, step: int) -> tuple[int, ...]:
        keys = [head.format(i) for i in range(0, 20, step)]
        return tuple(stored[key].shape[0] for key in keys if key in stored)[:-1]

    pi05 = f"{prefix}time_mlp_in.weight" in stored
    kv_heads = config.get("paligemma", {}).get("num_kv_heads", 1)
    head_dim = size(language + "0.self_attn.k_proj.weight") // kv_heads
    patch = size(vision + "embeddings.patch_embedding.weight", -1)
    vision_width = size(vision + "post_layernorm.weight")
    heads = config.get("vision", {}).get("num_attention_heads", max(1, vision_width // 72))
    shape = {
        "pi05": pi05,
        "patch": patch,
        "vision_width": vision_width,
        "vision_depth": depth(vision + "encoder.layers."),
        "image_size": patch * math.isqrt(size(vision + "embeddings.position_embedding.weight")),
        "vision_heads": heads,
        "vision_mlp": size(vision + "encoder.layers.0.mlp.fc1.weight"),
        "vocabulary": size(EMBEDDING if prefix + EMBEDDING in stored else LM_HEAD),
        "width": size(VLM + "multi_modal_projector.linear.weight"),
        "mlp": size(language + "0.mlp.gate_proj.weight"),
        "depth": depth(language),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "heads": size(language + "0.self_attn.q_proj.weight") // head_dim,
        "expert_width": size("action_in_proj.weight"),
        "expert_mlp": size(EXPERT + "layers.0.mlp.gate_proj.weight"),
        "action_dim": size("action_in_proj.weight", 1),
        "state_dim": size("action_in_proj.weight" if pi05 else "state_proj.weight", 1),
    }
    if found := widths("value_head.mlp.{}.weight", 2):
        shape["value_widths"] = found
    if found := widths("noise_head.mlp_logvar.moduleList.{}.linear_1.weight", 1):
        shape |= {"noise": "network", "noise_widths": found}
    shape |= source.said_by(config, FIELDS)
    c = replace(FULL["pi05" if pi05 else "pi0"], **shape)
    return replace(c, sde_steps=c.denoise_steps)


def cameras_of(says: dict) -> int:
    """How many cameras a config.json names; 0 where it is silent. LeRobot's lists all pictures, of
    which those called empty are masked."""
    features = (says.get("input_features") or {}).items()
    real = [feature.get("type") for name, feature in features if "empty_camera" not in name]
    return says.get("num_images") or real.count("VISUAL")


def published(path: Path, family: str, config, spec) -> Found:
    """What another project's checkpoint says of itself, made to fit the run. Raises UserError.

    The simulator may show pictures of another size: `Preparation` resizes them."""
    folder = path if path.is_dir() else path.parent
    stored = source.layout(path)
    kind = which(path, stored)
    require(
        not any(key.startswith("normalize_") for key in stored),
        f"checkpoint {path} keeps statistics among its weights, as older LeRobot did: convert it "
        "with LeRobot's lerobot/processor/migrate_policy_normalization.py",
    )
    file = folder / "config.json"
    says = read_json(file) if file.is_file() else {}
    chunk = config.rollout.chunk
    train = config.train
    with understood(file):
        shape = shape_of(path, stored, says)
        said = source.said_by(says, FIELDS)
        settings = ("chunk", "tokens", "denoise_steps", "noise_level")
        defaults = {name: (getattr(shape, name), "as published") for name in settings}
        played = "pi05" if shape.pi05 else "pi0", train.env
        if not kind.startswith("lerobot") and played in RLINF_HORIZON:
            defaults["chunk"] = RLINF_HORIZON[played], f"RLinf's in {train.env}"
        shape, assumed = source.filled(shape, said, defaults, config.rollout)
        shape = replace(shape, sde_steps=shape.denoise_steps)  # all of them, as above
        trained = cameras_of(says)
        views = config.env.cameras or min(trained or spec.views, spec.views)
        require_family(path, "pi05" if shape.pi05 else "pi0", family)
        for what, wanted, most in (
            ("actions per inference (--chunk)", chunk, shape.chunk),
            ("action dimensions", spec.action_dim, shape.action_dim),
            ("cameras", views, trained or 3),
        ):
            sentence = f"the run asks for {wanted} {what} and checkpoint {path} has {most}"
            if most == shape.chunk and "horizon" in assumed:
                sentence += ", as is assumed: say with --horizon how many it was trained with"
            require(wanted <= most, sentence)
    shape = replace(shape, views=views, executed_steps=chunk, executed_dims=spec.action_dim)
    if not (trained or config.env.cameras) and spec.views > 1:
        assumed["cameras"] = f"{views} (all, as openpi and RLinf show in this simulator)"
    if kind.startswith("lerobot"):
        stats = read_processors(folder)
        if stats["prompt"] == "state":
            assumed["state"] = "in the prompt without padding (LeRobot since March 2026)"
    else:
        in_prompt = says.get("discrete_state_input")
        deltas = says.get("extra_delta_transform")
        chosen = train.statistics
        stats = read_norm_stats(folder, shape.pi05, train.env, chosen, in_prompt, deltas)
        if deltas is None and any(stats["delta"]):
            assumed["extra_delta_transform"] = "true (openpi's and RLinf's of π0 in LIBERO)"
        if shape.pi05 and in_prompt is None:
            place = "in the prompt" if stats["prompt"] == "state" else "not in the prompt"
            assumed["state"] = f"{place} (openpi's and RLinf's for such a robot)"
    # Statistics may be padded, to 32 for instance.
    wishes = (("state", spec.state_dim, 14), ("actions", spec.action_dim, spec.action_dim))
    for name, wanted, padded in wishes:
        has = next((len(x) for x in stats[name].values() if isinstance(x, list)), None)
        require(
            has in (None, wanted) or has >= padded,  # None: not normalised
            f"the statistics of checkpoint {path} are of {has} dimensions of {name}, the simulator "
            f"has {wanted}",
        )
    return Found(shape, SOURCES[kind], stats | {"fit": "letterbox"}, assumed)


def read_norm_stats(
    folder: Path,
    pi05: bool,
    env: str = "",
    chosen: str = "",
    state_in_prompt: bool | None = None,
    deltas: bool | None = None,
) -> dict:
    """openpi's and RLinf's statistics, and what their file does not say: which normalisation,
    prompt and actions go with them.

    π0 goes by mean and deviation, π0.5 by quantiles (openpi training/config.py). In LIBERO, π0's
    actions are deltas on state[:6] (`extra_delta_transform`), if config.json does not say. π0.5's
    prompt holds the state of real robots but not of simulators (`discrete_state_input` in both
    projects' configurations), if config.json does not say. Of several robots' statistics the path
    names `chosen`, else `env`, the simulator."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("norm_stats.json")}
    word = chosen or env
    found = list(files)
    if chosen or len(files) > 1:
        found = [place for place in files if word and word in place]
        exact = [place for place in found if word == str(Path(place).parent)]
        found = exact or found
    require(
        len(found) == 1,
        f"{folder} must hold one norm_stats.json, or one whose path contains {word!r}: it has "
        f"{', '.join(sorted(files)) or 'none'}; choose with --statistics",
    )
    file = files[found[0]]
    places = {env, *str(Path(found[0]).parent).lower().replace("_", "/").split("/")}
    if deltas is None:
        deltas = not pi05 and "libero" in places
    if state_in_prompt is None:
        state_in_prompt = not places & {"libero", "metaworld", "maniskill", "robocasa"}
    mode = "quantiles" if pi05 else "mean_std"
    needed = ENDS[mode]
    kinds: dict = {}
    with understood(file):
        stats = read_json(file).get("norm_stats", {})
        for name in ("state", "actions"):
            values = stats.get(name, {})
            require(
                all(values.get(key) is not None for key in needed),
                f"{file} lacks {' or '.join(needed)} of {name!r}, which "
                f"{'π0.5' if pi05 else 'π0'} goes by",
            )
            numbers = {key: [float(x) for x in values[key]] for key in needed}
            kinds[name] = {"kind": f"openpi_{mode}", **numbers}
    return kinds | {
        "layout": "openpi",
        "prompt": "state" if pi05 and state_in_prompt else "newline",
        "delta": [bool(deltas) and i < 6 for i in range(7)],
    }


def read_processors(folder: Path) -> dict:
    """LeRobot's statistics: the (un)normaliser steps of policy_{pre,post}processor.json."""
    kinds: dict = {"layout": "lerobot", "prompt": "newline", "delta": []}
    for name, file_name, step_name, key, feature in (
        ("state", "policy_preprocessor.json", "normalizer_processor", "observation.state", "STATE"),
        ("actions", "policy_postprocessor.json", "unnormalizer_processor", "action", "ACTION"),
    ):
        file = folder / file_name
        with understood(file):
            steps = {step.get("registry_name"): step for step in read_json(file).get("steps", [])}
            relative = steps.get("relative_actions_processor", {}).get("config", {})
            require(
                not relative.get("enabled"),
                f"{file} makes actions relative to the state, which is not supported",
            )
            require(
                step_name in steps,
                f"{file} has no step {step_name!r}: it is no π0 or π0.5 of LeRobot",
            )
            config = steps[step_name].get("config", {})
            state_file = steps[step_name].get("state_file")
            mode = config.get("norm_map", {}).get(feature, "IDENTITY")
            needed = ENDS.get(mode.lower())
        if step := steps.get("pi05_prepare_state_tokenizer_processor_step"):
            words = step.get("config", {})
            kinds["prompt"] = "state" if words.get("include_state_in_prompt", True) else "task"
            told = f"{file} tells the model about speed and quality, which is not supported"
            require(not words.get("use_episode_metadata"), told)
        require(needed is not None, f"{file} normalises {key} by {mode}, which is not supported")
        with understood(f"{' and '.join(needed)} of {key} in {state_file}, which {file} names"):
            tensors = load_file(folder / state_file) if needed else {}
            place = folder / str(state_file)
            values = {x: source.numbers(place, tensors, f"{key}.{x}") for x in needed}
        kinds[name] = {"kind": f"lerobot_{mode.lower()}", "eps": config.get("eps", 1e-8), **values}
    return kinds


ENDS = {  # what each normalisation goes by
    "identity": (),
    "mean_std": ("mean", "std"),
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
}


def normalise(x: np.ndarray, stats: dict, inverse: bool = False) -> np.ndarray:
    """x [..., D] to the model's units, or back. Each original computes in its own order and
    precision, and so does this.

    openpi (transforms.Normalize, Unnormalize): in fp64, 1e-6 added to the spread, dimensions that
    the statistics lack left alone. LeRobot (NormalizerProcessorStep): in fp32, with `eps` in the
    spread's place only where that is 0."""
    project, _, mode = stats["kind"].partition("_")
    if mode == "identity":
        return np.asarray(x)
    ends = [stats[key] for key in ENDS[mode]]
    if project == "openpi":
        n = min(len(ends[0]), x.shape[-1])
        x = np.array(x, np.float64)
        a, b = (np.array(end[:n], np.float64) for end in ends)
        part = openpi_scaled(x[..., :n], a, b, mode, inverse)
        return np.concatenate([part, x[..., n:]], axis=-1)
    a, b = (torch.tensor(end, dtype=torch.float32) for end in ends)
    return lerobot_scaled(torch.tensor(x).float(), a, b, mode, inverse, stats["eps"]).numpy()


def openpi_scaled(x: np.ndarray, a: np.ndarray, b: np.ndarray, mode: str, inverse=False):
    if mode == "mean_std":
        return x * (b + 1e-6) + a if inverse else (x - a) / (b + 1e-6)
    if inverse:
        return (x + 1.0) / 2.0 * (b - a + 1e-6) + a
    return (x - a) / (b - a + 1e-6) * 2.0 - 1.0


def lerobot_scaled(x: Tensor, a: Tensor, b: Tensor, mode: str, inverse: bool, eps: float):
    if mode == "mean_std":
        return x * b + a if inverse else (x - a) / (b + eps)
    spread = torch.where(b - a == 0, torch.tensor(eps), b - a)
    if not inverse:
        return 2.0 * (x - a) / spread - 1.0
    return (x + 1.0) * spread / 2.0 + a if mode == "quantiles" else (x + 1.0) / 2.0 * spread + a


def clean(task: str) -> str:
    return task.strip().replace("_", " ").replace("\n", " ")


def prompt(task: str, state: np.ndarray | None, layout: str = "openpi") -> tuple[str, ...]:
    """The texts whose tokens, one after the other, are the prompt. state [S] normalised, or None to
    leave it out. layout: "task" is LeRobot's π0.5 with `include_state_in_prompt: false`.

    A state below -1 falls into bin -1, as in the original; one above 1 into bin 255."""
    if state is not None:
        bins = np.digitize(state, np.linspace(-1.0, 1.0, 257)[:-1]) - 1
        return (f"Task: {clean(task)}, State: {' '.join(map(str, bins))};\nAction: ",)
    if layout == "task":
        return (f"Task: {clean(task)};\nAction: ",)
    if layout == "lerobot":  # one text, the task as it is
        return (task if task.endswith("\n") else task + "\n",)
    return clean(task), "\n"


class Preparation(PreparationBase):
    """stats: `read_norm_stats`, `read_processors`, or the two quantiles of our own small models.

    A camera that the robot lacks is left out (`PiConfig.views`), which equals masking it. LeRobot
    keeps a resized picture in fp32; here it is rounded to 8 bits, at most 0.004 off."""

    def words(self, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """tokens [L] int32, for π0 state [S'] fp32, padded."""
        c = self.config
        if self.own:
            low, high = (np.array(self.stats[f"state_{end}"]) for end in ("low", "high"))
            normal = openpi_scaled(state, low, high, "quantiles")
            texts = (tokenize.prompt(task, normal),) if c.pi05 else prompt(task, None)
        else:
            normal = normalise(state, self.stats["state"])
            kind = self.stats["prompt"]
            layout = "task" if kind == "task" else self.layout
            texts = prompt(task, normal if kind == "state" else None, layout)
        out = {"tokens": tokenize.encode(self.tokenizer, c.tokens, *texts)}
        if not c.pi05:
            has = len(normal)
            room = c.state_dim
            require(has <= room, f"the state has {has} dimensions and the model room for {room}")
            out["state"] = np.pad(normal, (0, room - has)).astype(np.float32)
        return out

    def resize(self, images: np.ndarray) -> np.ndarray:
        size = self.config.image_size
        if images.shape[1:3] == (size, size):
            return images
        if self.layout != "lerobot":
            return np.stack([pictures.resize_pil(image, size) for image in images])
        pixels = pictures.resize_torch(torch.from_numpy(images).float().div_(255.0), size, 0.0)
        return pixels.mul_(255.0).round_().to(torch.uint8).numpy()

    def actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        if self.own:
            return actions
        out = normalise(actions, self.stats["actions"], inverse=True)
        delta = np.array(self.stats["delta"][: out.shape[-1]], bool)
        if delta.any():  # openpi's AbsoluteActions
            out[..., : len(delta)] += np.where(delta, state[: len(delta)], 0.0)
        return self.grip(out).astype(np.float32)

    def in_data(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        out = np.array(super().in_data(actions, state))
        delta = np.array(self.stats.get("delta", [])[: out.shape[-1]], bool)
        if delta.any():  # openpi's DeltaActions
            out[..., : len(delta)] -= np.where(delta, state[: len(delta)], 0.0)
        return out

    def targets(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        if self.own:
            return actions
        return normalise(self.in_data(actions, state), self.stats["actions"]).astype(np.float32)

    def counted(self, states: np.ndarray, actions: np.ndarray) -> dict:
        if self.own:
            return super().counted(states, actions)
        found = dict(self.stats)
        for name, values in (("state", states), ("actions", actions)):
            low, high = usual(values)
            numbers = {"mean": values.mean(0), "std": values.std(0), "q01": low, "q99": high}
            numbers |= {"min": values.min(0), "max": values.max(0)}
            needed = ENDS[found[name]["kind"].partition("_")[2]]
            found[name] = found[name] | {end: numbers[end].tolist() for end in needed}
        return found


def scale(kind: str) -> Any:
    """Returns the type of what `normalise` goes by, of one kind."""
    project, _, mode = kind.partition("_")
    more = {"eps": float} if project == "lerobot" else {}
    return statistics(kind=Literal[kind], **dict.fromkeys(ENDS[mode], Numbers), **more)


KINDS = tuple(scale(f"{project}_{mode}") for project in ("openpi", "lerobot") for mode in ENDS)
Scale = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007  no `|` for a tuple
Prompt = Literal["state", "newline", "task"]
THEIRS = statistics(state=Scale, actions=Scale, prompt=Prompt, delta=list[bool])
STATS = {"own": OWN, "openpi": THEIRS, "lerobot": THEIRS}


def preparation(header: Header, tokenizer: str) -> Preparation:
    c = PiConfig(**header.shape)
    least = int(0.95 * c.vocabulary)  # the table of a published model is padded
    return Preparation(c, header.stats, tokenize.load_for(tokenizer, least, c.vocabulary))


def wording(task: str) -> str:
    return task


def embedded(family: str, tokenizer: str) -> Pi:
    return Pi(replace(SMALL[family], vocabulary=tokenize.load(tokenizer).vocab_size()))
