"""Our own checkpoints: one safetensors file each, whose header says what is in it.

The header's metadata are JSON strings: `family` (a key of `models.MODELS`), `shape` (the family's
configuration) and `stats` (for the embedded models `state_low`, `state_high`: the quantiles that
map the robot's state to [-1, 1]; for published ones what their family's file reader made of their
statistics). Nothing is ever unpickled. Other projects' files: `models/formats/`.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import ROOT, UserError, require
from models.formats.source import INDEX, Source, layout, read_json, weight_files


class Header(NamedTuple):
    family: str
    shape: dict
    stats: dict

    @property
    def published(self) -> bool:
        """Whether it began as another project's model, whose `preparation` resizes pictures."""
        return self.stats.get("layout", "own") != "own"


def find(path: str | Path) -> Path:
    """The weights file of a file, a checkpoint folder or a run (its newest checkpoint)."""
    path = Path(path)
    for base in (path, ROOT / "runs" / path):
        newest = sorted(base.glob("checkpoints/[0-9]*/model.safetensors"))[-1:]
        for candidate in (base, base / "model.safetensors", *newest):
            if candidate.is_file():
                return candidate
    raise UserError(
        f"no checkpoint at {path}: expected a .safetensors file, a folder that holds "
        "model.safetensors, or a run with one"
    )


def metadata(path: str | Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        said = f"cannot read checkpoint {path}: it is truncated or not a safetensors file ({error})"
        folder = Path(path).parent
        if folder.parent.name == "checkpoints":  # of a run
            said += f"; remove {folder} to use an older one"
        raise UserError(said) from None


def read_header(path: str | Path) -> Header:
    meta = metadata(path)
    require(
        {"family", "shape", "stats"} <= meta.keys(),
        f"checkpoint {path} was not written by this project: its header lacks family, shape and "
        "stats",
    )
    try:
        shape = {
            name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
            for name, value in json.loads(meta["shape"]).items()
        }
        return Header(meta["family"], shape, json.loads(meta["stats"]))
    except (ValueError, AttributeError) as error:
        raise UserError(f"cannot read the header of checkpoint {path}: {error}") from None


def of_family(path: str | Path, family: str) -> Header:
    """The header of a checkpoint of ours, which must be of `family`. Raises UserError."""
    header = read_header(path)
    has = header.family
    sentence = f"checkpoint {path} is a {has!r} model: give --model {has} or another checkpoint"
    require(has == family, sentence)
    return header


def is_ours(path: str | Path) -> bool:
    """Whether a checkpoint is in our own layout. Raises UserError where there is none."""
    try:
        file = find(path)
    except UserError:
        if (Path(path) / INDEX).is_file() or any(Path(path).glob("model-*-of-*.safetensors")):
            return not weight_files(path)  # shards are never ours
        raise
    return "family" in metadata(file)


def published(path: Path) -> bool:
    """Whether the checkpoint is another project's, or a run's that began from one."""
    return not is_ours(path) or read_header(find(path)).published


def run_of(path: str | Path) -> Path | None:
    """The run folder that a checkpoint of ours is in, if it is in one."""
    file = find(path) if is_ours(path) else None
    return file.parents[2] if file and file.parent.parent.name == "checkpoints" else None


def vocabulary(given: Path | None, path: Path, family: str, embedded: Path) -> str:
    """The tokeniser file for checkpoint `path`: what the user gives, the one in another project's
    folder or of the run, the embedded default's for a small model of ours, or for GR00T "", an
    installed package's. Raises UserError when there is none."""
    if given is not None:
        return str(given)
    places = [Path(path) / "tokenizer.model"]
    run = run_of(path) or Path(path)
    with contextlib.suppress(UserError, KeyError, TypeError):
        places.append(Path(read_json(run / "config.json")["train"]["tokenizer"]))
    if not published(path):
        places.append(embedded)
    found = next((str(place) for place in places if place.is_file()), "")
    require(
        found or family == "gr00t",
        f"checkpoint {path} brings no tokeniser: give its SentencePiece file with --tokenizer PATH",
    )
    return found


def frame_size(path: Path) -> int:
    """Pixels of the pictures to show a model; another project's `preparation` resizes them."""
    return 256 if published(path) else read_header(find(path)).shape.get("image_size", 64)


def not_finite(tensors: dict[str, torch.Tensor]) -> str:
    """Returns the name of the first tensor that holds a NaN or an infinity, or "".

    One norm of all says that none does. It may overflow (float16): only then is each looked at."""
    real = {name: x for name, x in tensors.items() if x.is_floating_point() and not x.is_meta}
    groups: dict[tuple, list[torch.Tensor]] = {}
    for tensor in real.values():
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    norms = [torch.nn.utils.get_total_norm(group) for group in groups.values()]
    if all(math.isfinite(norm) for norm in norms):
        return ""
    return next((name for name, x in real.items() if not x.isfinite().all()), "")


def save(path: str | Path, header: Header, tensors: dict[str, torch.Tensor]) -> None:
    """Writes beside `path` and renames, so a reader or a crash never sees half a file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shape = json.dumps(header.shape)
    meta = {"family": header.family, "shape": shape, "stats": json.dumps(header.stats)}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, meta)
    os.replace(partial, path)


def own(path: Path, model: torch.nn.Module, heads: Iterable[str] = ()) -> Source:
    """The layout of a file of ours, which may lack some of the model's `heads` or have others."""
    keys = layout(path)
    missing = [name for name in heads if not any(key.startswith(f"{name}.") for key in keys)]
    foreign = [name for name in heads if name not in dict(model.named_children())]
    rules = tuple((rf"{name}\..*", None) for name in missing)
    return Source((*rules, (r".*", r"\g<0>")), tuple(rf"{name}\..*" for name in foreign))
