"""Adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.MODULE.lora_A.weight [r, inputs]
    base_model.model.MODULE.lora_B.weight [outputs, r]

MODULE is a layer by its original's name. Its family's rules say which of ours, or which part of
ours, that is; what stands before it may be missing or more (LeRobot's `model.`; RLinf adapts the
VLM alone). Source: huggingface/peft src/peft/tuners/lora, src/peft/utils/save_and_load.py. Left
out: ranks or alphas per layer, DoRA, `modules_to_save`, biases, adapters whose base is changed
(PiSSA, OLoRA, …). All of them are refused.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NotRequired

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import TypedDict

from checks import AboveZero, Size, read_json
from errors import require
from files import whole
from models import checkpoint, lora
from models.formats import source

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BEFORE = "base_model.model."
# What a fine-tuned policy keeps beside its adapter, and its base has of other data.
STATISTICS = ("policy_preprocessor.json", "norm_stats.json", "dataset_statistics.json")
STATISTICS += ("metadata.json",)
Nothing = Annotated[dict, Field(max_length=0)]


class Says(TypedDict):
    """adapter_config.json."""

    peft_type: Literal["LORA"]
    r: Size
    lora_alpha: AboveZero
    use_rslora: NotRequired[bool]  # alpha/√r instead of alpha/r
    rank_pattern: NotRequired[Nothing | None]
    alpha_pattern: NotRequired[Nothing | None]
    # of those that leave the base as it is
    init_lora_weights: NotRequired[bool | Literal["gaussian", "eva", "orthogonal"]]
    base_model_name_or_path: NotRequired[str | None]


class Adapter(NamedTuple):
    rank: int
    alpha: float
    layers: dict[str, tuple[Tensor, Tensor]]
    """A and B of our layers by name. Both are zero, and so without gradient, for parts of a layer
    that have no adapter"""

    def put(self, model: torch.nn.Module) -> None:
        """Gives a model this adapter, and folds any other. Weights on `meta` stay there."""
        lora.fold(model)
        for name, pair in self.layers.items():
            layer = model.get_submodule(name)
            layer.add_lora(self.rank, self.alpha / self.rank)
            for parameter, tensor in zip((layer.lora_a, layer.lora_b), pair, strict=True):
                if not parameter.is_meta:
                    parameter.data.copy_(tensor)


def says_of(folder: Path) -> Says:
    """adapter_config.json. Raises UserError, also for what would be another function."""
    return read_json(folder / CONFIG, Says, extra="ignore")


def find_base(path: Path | None, adapter: Path | None) -> tuple[Path | None, Path | None]:
    """The checkpoint, and the adapter to put on it, where `path` may be a folder with both, or one
    with an adapter that names its base. Raises UserError where that is not on this machine."""
    if path is None or adapter or not (path / CONFIG).is_file():
        return path, adapter
    if (path / source.INDEX).is_file() or any(path.glob("model*.safetensors")):
        return path, path
    name = says_of(path).get("base_model_name_or_path") or "a model that it does not name"
    places = [Path(name), path / name, path.parent / Path(name).name]
    found = next((place for place in places if place.exists()), None)
    missing = f"{path} is a PEFT adapter of {name}, which is not here"
    require(found, f"{missing}: give that model as --checkpoint, and {path} as --adapter")
    return found, path


def read(folder: Path, base: Path, model: torch.nn.Module, names: source.Source) -> Adapter:
    """The adapter of a folder as our layers have it. Raises UserError where it is of another model,
    or has what is left out here, or statistics that `base` has not.

    names: of the original. Modules that it has and nobody reads may have adapters."""
    says = says_of(folder)
    rank = says["r"]
    alpha = says["lora_alpha"] * (math.sqrt(rank) if says.get("use_rslora") else 1.0)
    file = folder / WEIGHTS
    require(file.is_file(), f"{folder} has no {WEIGHTS}: save it with safe_serialization=True")
    source.header(file)
    check_statistics(folder, base)
    theirs = {source.spelled(key): tensor for key, tensor in load_file(file).items()}
    checkpoint.require_finite(file, theirs)

    # Find the layer of ours, and the part of it, of each tensor
    every = lora.layers(model)
    modules = {}
    for weight, keys in names.keys(f"{name}.weight" for name in every).items():
        for part, key in enumerate(keys):
            modules[key.removesuffix(".weight")] = weight.removesuffix(".weight"), part
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for key, tensor in theirs.items():
        named = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        copy = key.endswith(".lm_head.base_layer.weight")  # PEFT adds the weight itself
        if copy or named and unread(named[1], names):
            continue
        fits = [module for module in modules if named and same(module, named[1])]
        require(len(fits) == 1, f"{file} has a tensor {key!r}, which is of no layer of this model")
        both = {key.replace(".lora_A.", ".lora_B."), key.replace(".lora_B.", ".lora_A.")}
        require(both <= theirs.keys(), f"{file} has {key!r} without its other half")
        name, part = modules[fits[0]]
        layer = every[name]
        pair = layers.setdefault(name, tuple(map(torch.zeros, layer.shapes(rank))))
        mine = layer.pairs(*pair)[part]["AB".index(named[2])]
        needs = f"{list(tensor.shape)}, the model needs {list(mine.shape)}"
        require(tensor.shape == mine.shape, f"{file}: lora_{named[2]} of {name} is {needs}")
        mine.copy_(tensor)
    require(layers, f"{file} holds no adapter")
    return Adapter(rank, alpha, layers)


def same(module: str, other: str) -> bool:
    """Whether two names are of one module, but for what stands before the shorter one."""
    return f".{module}".endswith(f".{other}") or f".{other}".endswith(f".{module}")


def unread(module: str, names: source.Source) -> bool:
    """Whether a module has no effect on what the policy does: a last block whose output is not
    used, or what a language model says words with."""
    tied = [key.removesuffix(".weight") for pair in names.tied for key in pair]
    unused = any(re.fullmatch(rf"(.*\.)?{key}", f"{module}.weight") for key in names.unused)
    return unused or any(same(module, key) for key in tied)


def check_statistics(folder: Path, base: Path) -> None:
    """Raises UserError where an adapter brings statistics that its base does not have: they say in
    which units it acts."""
    for file in (found for name in STATISTICS for found in folder.rglob(name)):
        beside = base / file.relative_to(folder)
        require(
            beside.is_file() and beside.read_bytes() == file.read_bytes(),
            f"{folder} has a {file.name} of its own, by which its actions are scaled, and {base} "
            "another: put a link to that model's weights into it, and give it as --checkpoint",
        )


def save(model: torch.nn.Module, folder: Path, names: source.Source, base: Path) -> None:
    """Writes the adapter alone, for PEFT to load on the model `base`. `folder` appears whole.

    names: the layout of `base`. Parts of layers whose A is zero have no adapter."""
    c = model.config
    tensors = {}
    modules = []
    for name, layer in lora.adapted(model).items():
        keys = names.keys([f"{name}.weight"])[f"{name}.weight"]
        for key, (a, b) in zip(keys, layer.pairs(layer.lora_a, layer.lora_b), strict=True):
            if a.any():
                modules.append(key.removesuffix(".weight"))
                before = BEFORE + modules[-1]
                tensors |= {f"{before}.lora_A.weight": a, f"{before}.lora_B.weight": b}
    says = {
        "peft_type": "LORA",
        "r": c.rank,
        "lora_alpha": c.lora_alpha or c.rank,
        "target_modules": modules,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with whole(folder, new=True) as unfinished:
        unfinished.mkdir()
        checkpoint.write(unfinished / WEIGHTS, tensors, {"format": "pt"})
        (unfinished / CONFIG).write_text(json.dumps(says, indent=1))
