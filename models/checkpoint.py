"""Weights on disk: one safetensors file whose header says what is in it. Nothing is ever unpickled.

Header (safetensors metadata, JSON strings): `family` (a key of `models.MODELS`), `shape` (the family's configuration) and
`stats` (`state_low`, `state_high`: the quantiles that map the robot's state to [-1, 1]).
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from config import UserError


class Header(NamedTuple):
    family: str
    shape: dict
    stats: dict


def find(path: str | Path) -> Path:
    """The weights file behind a file, a checkpoint folder or a run folder (its newest checkpoint)."""
    path = Path(path)
    for candidate in (path, path / "model.safetensors", *sorted(path.glob("checkpoints/[0-9]*/model.safetensors"))[-1:]):
        if candidate.is_file():
            return candidate
    raise UserError(f"no checkpoint at {path}: expected a .safetensors file or a folder that holds model.safetensors")


def read_header(path: str | Path) -> Header:
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read checkpoint {path}: it is truncated or not a safetensors file ({error})") from None
    if not {"family", "shape", "stats"} <= meta.keys():
        raise UserError(f"checkpoint {path} was not written by this project: its header lacks family, shape and stats")
    try:
        return Header(meta["family"], json.loads(meta["shape"]), json.loads(meta["stats"]))
    except ValueError as error:
        raise UserError(f"cannot read the header of checkpoint {path}: {error}") from None


def save(path: str | Path, header: Header, tensors: dict[str, torch.Tensor]) -> None:
    """Writes beside `path` and renames, so a reader or a crash never sees half a file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    meta = {"family": header.family, "shape": json.dumps(header.shape), "stats": json.dumps(header.stats)}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, meta)
    os.replace(partial, path)


class Uninitialised(TorchFunctionMode):
    """Modules built in this context keep whatever memory holds, for `load` to fill: drawing random weights for nothing takes
    a minute for billions of them, and on the meta device its first use imports half a compiler (2 s)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load(model: torch.nn.Module, path: str | Path, only_check: bool = False) -> None:
    """Fills every parameter of `model`, or only checks that it could.

    Raises UserError naming the first tensor that is missing or of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name, tensor in model.state_dict().items():
                if name not in names:
                    raise UserError(f"checkpoint {path} has no tensor {name!r}: it is of another model")
                found = file.get_slice(name).get_shape()
                if list(tensor.shape) != found:
                    raise UserError(f"checkpoint {path}: {name!r} is {found}, the model needs {list(tensor.shape)}")
                if not only_check:
                    tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error}") from None
