"""Other projects' checkpoints: what their files hold, read and written in pieces.

A `Source` describes one layout: which of our parameters is which of their tensors. `load` reads a
file or folder in it, `save` writes it back. Both stream: tensors travel in pieces of `BLOCK` bytes,
so the host never holds more than the model itself, in the type it is wanted in, and one piece.
Nothing is ever unpickled.
"""

import json
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as DTYPES  # by its names in a header
from torch.overrides import TorchFunctionMode

from checks import read_json
from errors import UserError, require, understood
from files import whole
from models import lora
from models.formats.names import Rules, rename

INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
BLOCK = 64 * 2**20  # bytes moved at once
SMALL = 64 * 2**20  # bytes; files up to this size (statistics, tokeniser, …) are copied along
# What wrappers put into a key, and what older transformers called it → what `rules` call it.
SPELLINGS = (
    (r"(^|(?<=\.))(_orig_mod|module)\.", ""),  # torch.compile; DistributedDataParallel
    (r"(\.paligemma)\.language_model\.lm_head\.", r"\1.lm_head."),  # before transformers 4.52
    (r"(\.paligemma)\.language_model\.model\.", r"\1.model.language_model."),
    (r"(\.paligemma)\.(vision_tower|multi_modal_projector)\.", r"\1.model.\2."),
)
# Files of what is no checkpoint of safetensors: pattern of a name, what it is and what to do.
ADAPTER = (
    "a PEFT adapter without the model that it changes: give that one, and this as --adapter, or "
    "merge them with peft's merge_and_unload"
)
SAVED_BY_TORCH = "weights that torch saved: python -m models.convert FILE FOLDER converts them"
OTHER_KINDS = {
    "adapter_config.json": ADAPTER,
    "adapter_model.*": ADAPTER,
    **dict.fromkeys(("*.pt", "*.pth", "*.bin", "*.ckpt"), SAVED_BY_TORCH),
    "*.distcp": "shards of FSDP: convert them with RLinf's convert_dcp_to_pt.py, then with "
    "python -m models.convert",
    "manifest.ocdbt": "weights of JAX: convert the folder above params/ with openpi's "
    "examples/convert_jax_model_to_pytorch.py",
}


class Source(NamedTuple):
    """One layout of checkpoints."""

    rules: Rules
    """our parameter → their key, or keys whose tensors stand in ours one below the other (dim 0);
    one that no rule names is ours alone"""
    unused: tuple[str, ...] = ()
    """regular expressions that match (in full) the keys knowingly left unread"""
    tied: tuple[tuple[str, str], ...] = ()
    """pairs (key in `rules`, alias): one tensor under two names; a file may hold either or both,
    and what we save agrees in both"""
    prefix: str = ""
    """what stands before every key that `rules` give"""

    def keys(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Our parameters → their keys."""
        renamed = ((name, rename(name, self.rules)) for name in names)
        return {name: tuple(self.prefix + key for key in keys) for name, keys in renamed if keys}


class Found(NamedTuple):
    """What a checkpoint says of the model whose weights it holds."""

    shape: Any  # the family's CONFIG
    source: Source
    stats: dict  # of a `checkpoint.Header`
    assumed: dict[str, str] = {}  # what its files do not say: value and why, by name of setting


def at(says: dict, path: str) -> Any:
    """Finds "a.b" in JSON: b in the object a; None where it is not there."""
    for name in path.split("."):
        says = (says or {}).get(name)
    return says


def said_by(says: dict, places: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """What a config.json says of the fields of a CONFIG, lists as tuples.

    places: {field: paths for `at`}; the first that is there counts."""
    found = {}
    for field, paths in places.items():
        values = [value for path in paths if (value := at(says, path)) is not None]
        if values:
            found[field] = tuple(values[0]) if isinstance(values[0], list) else values[0]
    return found


def filled(
    shape: Any, said: Container[str], defaults: dict[str, tuple[Any, str]], rollout: Any
) -> tuple[Any, dict[str, str]]:
    """Gives a CONFIG what a checkpoint's files do not say of it: by the run's flags, or a default.

    said: the fields that the files do say; defaults: {field: (value, whose it is)}. Returns the
    CONFIG and `Found.assumed`."""
    assumed = {}
    for name in [name for name in defaults if name not in said]:
        flag = "horizon" if name == "chunk" else name
        value, why = defaults[name]
        given = getattr(rollout, flag)
        shape = replace(shape, **{name: value if given is None else given})
        if given is None:
            assumed[flag] = f"{value} ({why})"
    return shape, assumed


Part = Literal["all", "none", "training", "idle"]
"""which weights a process reads; `idle`: those that training with a cached prefix does not use"""


def includes(part: Part, model: torch.nn.Module, name: str) -> bool:
    return part == "all" or (part != "none" and name.startswith(model.idle()) == (part == "idle"))


class Uninitialised(TorchFunctionMode):
    """Modules built in this context keep whatever memory holds, for `load` to fill: drawing
    billions of random weights takes a minute, and on the meta device imports half a compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def sketch(network: type[torch.nn.Module], config) -> torch.nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"), Uninitialised():
        return network(config)


def numbers(file: Path, tensors: dict[str, torch.Tensor], key: str) -> list[float]:
    """A tensor of statistics out of a file's. Raises UserError where it holds NaN or infinity."""
    found = tensors[key].float().flatten()
    require(found.isfinite().all(), f"cannot read {file}: {key!r} holds NaN or infinity")
    return found.tolist()


class Stored(NamedTuple):
    """Where a tensor lies on disk."""

    file: Path
    key: str  # its name there
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def spelled(key: str) -> str:
    """A key of a file as `rules` call it."""
    for pattern, ours in SPELLINGS:
        key = re.sub(pattern, ours, key)
    return key


def other_kind(path: Path) -> str:
    """What a file or folder is instead of safetensors, and what to do; "" where nobody knows.

    RLinf's weights lie two folders below what it calls a checkpoint."""
    for pattern, kind in OTHER_KINDS.items():
        inside = (path.glob(depth + pattern) for depth in ("", "*/", "*/*/"))
        if any(map(any, inside)) or path.is_file() and fnmatch(path.name, pattern):
            return kind
    return ""


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: itself, its shards, or its model.safetensors."""
    path = Path(path)
    if path.is_file():
        return [path]
    files = [path / name for name in sorted(set(weight_map(path).values()))]
    for file in files:
        sentence = f"checkpoint {path} lacks its file {file.name}, which {INDEX} lists"
        require(file.is_file(), sentence)
    whole = path / "model.safetensors"
    both = f"checkpoint {path} holds {whole.name} beside the weights that {INDEX} lists"
    require(not files or whole in files or not whole.exists(), f"{both}: remove one of the two")
    # Some shards were uploaded without their index.
    for pattern in ("model.safetensors", SHARDS):
        files = files or sorted(path.glob(pattern))
    sentence = f"no checkpoint at {path}: expected model.safetensors, or its shards with {INDEX}"
    require(files, sentence)
    return files


def weight_map(path: str | Path) -> dict[str, str]:
    """Key → file of a folder with an index; else nothing."""
    index = Path(path) / INDEX
    if not index.is_file():
        return {}
    with understood(index):
        return {key: str(name) for key, name in read_json(index)["weight_map"].items()}


def header(file: Path) -> tuple[bytes, dict[str, str], dict]:
    """A safetensors file up to its tensors (a length of 8 bytes, little-endian, and as much JSON),
    what it says of itself, and the entries of its tensors. Raises UserError."""
    try:
        with file.open("rb") as stream:
            length = stream.read(8)
            head = length + stream.read(min(int.from_bytes(length, "little"), 100_000_000))
        with safe_open(file, framework="pt") as whole:  # which checks it to its end
            meta = whole.metadata() or {}
    except OSError as error:
        raise UserError(f"cannot read checkpoint {file}: {error}") from None
    except SafetensorError as error:
        why = f"not a safetensors file, truncated, or not what its header says ({error})"
        of_run = file.parent.parent.name == "checkpoints"
        older = f"; remove {file.parent} to use an older one" if of_run else ""
        raise UserError(f"cannot read checkpoint {file}: it is {why}{older}") from None
    entries = json.loads(head[8:])
    entries.pop("__metadata__", None)
    return head, meta, entries


def layout(path: str | Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its key, `spelled` as in `rules`, from headers alone. Raises
    UserError if damaged."""
    found = {}
    for file in weight_files(path):
        head, _, entries = header(file)
        for key, entry in entries.items():
            begin, end = (len(head) + offset for offset in entry["data_offsets"])
            stored = Stored(file, key, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
            twice = f"checkpoint {path} has {key!r} twice, under different names"
            require(found.setdefault(spelled(key), stored) is stored, twice)
    for key, name in weight_map(path).items():
        entry = found.get(spelled(key))
        require(
            entry and entry.file.name == name,
            f"checkpoint {path} has no tensor {key!r} in {name}, where {INDEX} says it is",
        )
    return found


class Place(NamedTuple):
    """Rows of one of our tensors that are, whole, one of theirs."""

    name: str
    begin: int
    end: int


def match(
    model: torch.nn.Module, path: str | Path, source: Source, stored: dict[str, Stored]
) -> dict[str, Place]:
    """Their key → where it belongs in ours. Raises UserError naming a key that is missing, extra or
    of another shape."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other_name = dict(source.tied)
    parts: dict[str, Place] = {}
    for name, keys in source.keys(ours).items():
        rows = 0
        shapes = []
        for key in keys:
            if key not in stored and other_name.get(key) in stored:
                key = other_name[key]
            sentence = f"checkpoint {path} has no tensor {key!r}: it is of another model or layout"
            require(key in stored, sentence)
            shapes.append(stored[key].shape)
            parts[key] = Place(name, rows, rows + (shapes[-1] or (1,))[0])
            rows = parts[key].end
        whole = shapes[0] if len(shapes) == 1 else (rows, *shapes[0][1:])
        if whole != ours[name] or any(shape[1:] != whole[1:] for shape in shapes):
            found = " + ".join(str(list(shape)) for shape in shapes)
            raise UserError(
                f"checkpoint {path}: {' and '.join(map(repr, keys))} is {found}, the model needs "
                f"{list(ours[name])} for {name!r}"
            )
    known = set(parts).union(*source.tied)
    for pattern in source.unused:
        known.update(filter(re.compile(pattern).fullmatch, stored))
    extra = [key for key in stored if key not in known]
    if extra:
        what = f"{extra[0]!r} that the model does not know ({len(extra)} such in all)"
        raise UserError(f"checkpoint {path} has a tensor {what}")
    return parts


def first_other(model: torch.nn.Module, path: Path, source: Source) -> str:
    """Returns the key of a tensor of which the model has other numbers than a checkpoint, or "".
    Heads that reinforcement learning adds may be others. Raises UserError as `match` does.

    Numbers are the same where they are so in the coarser one of both dtypes."""
    stored = layout(path)
    state = model.state_dict()
    for key, place in match(model, path, source, stored).items():
        if place.name.partition(".")[0] in model.HEADS:
            continue
        entry = stored[key]
        with safe_open(entry.file, framework="pt") as file:
            theirs = file.get_tensor(entry.key)
        ours = state[place.name]
        ours = ours[place.begin : place.end] if entry.shape else ours.reshape(())
        coarser = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(ours.to(coarser), theirs.to(coarser)):
            return key
    return ""


def without_adapters(source: Source) -> Source:
    """The layout of the weights alone, whatever stands beside them in our model."""
    return source._replace(rules=((r".*\.lora_[ab]", None), *source.rules))


def pieces(stored: Stored) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `BLOCK` bytes (but at least a row) that cover a tensor."""
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, rows * BLOCK // max(1, stored.end - stored.begin))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def load(
    model: torch.nn.Module,
    path: str | Path,
    source: Source,
    device: str | torch.device,
    dtype: torch.dtype | Callable[[str], torch.dtype | None] | None,
    part: Part = "all",
) -> None:
    """Puts a checkpoint's weights, or a part, into `model`, which may be on `meta`, straight to
    `device`. Raises UserError naming a key that is missing, extra or of another shape.

    path: a safetensors file or a folder with one or with shards; dtype: one for all, or a function
    of our parameter's name, or None to keep the file's. Our parameters that `source` does not name
    (heads of our own) stay as they are and where they are; those that are not of `part` as well,
    but for their dtype."""
    stored = layout(path)
    ours = model.state_dict()
    keys_of: dict[str, list[str]] = {}
    places = match(model, path, source, stored)
    for key, place in places.items():
        keys_of.setdefault(place.name, []).append(key)
    read = {}
    for name, keys in keys_of.items():
        kind = (dtype(name) if callable(dtype) else dtype) or stored[keys[0]].dtype
        if not includes(part, model, name):
            read[name] = ours[name].to(kind)
            continue
        new = torch.empty(ours[name].shape, device=device, dtype=kind)
        read[name] = new
        for key in keys:
            entry = stored[key]
            rows = new[places[key].begin : places[key].end] if entry.shape else new.reshape(1)
            for begin, end in pieces(entry):
                # Opened anew for each piece: closing the file lets its mapped pages go, which
                # otherwise count as memory in use.
                with safe_open(entry.file, framework="pt") as file:
                    whole = file.get_slice(entry.key) if entry.shape else None
                    piece = whole[begin:end] if whole else file.get_tensor(entry.key)
                    rows[begin:end].copy_(piece)
                    del piece
    model.load_state_dict(read, strict=False, assign=True)


def save(
    model: torch.nn.Module,
    folder: str | Path,
    source: Source,
    like: str | Path,
) -> None:
    """Writes `model` as the checkpoint `like` it was loaded from: same files, keys, shapes, dtypes
    and order. Tensors that we do not read are copied, as are the small files beside them. Adapters
    are added into the weights.

    `folder` appears at once, and whole. With a file as `like` it is a file too."""
    folder = Path(folder)
    like = Path(like)
    stored = layout(like)
    parts = match(model, like, without_adapters(source), stored)
    tensor_of = partial(lora.folded, model)
    for pair in source.tied:
        for key, alias in (pair, pair[::-1]):
            if key in parts and alias in stored:
                parts[alias] = parts[key]
    with whole(folder, new=True) as unfinished:
        if like.is_file():
            write_like(tensor_of, unfinished, like, stored, parts)
            return
        files = weight_files(like)
        for file in sorted(like.rglob("*")):
            inside = file.relative_to(like)
            other = any(name.startswith((".", "adapter_")) for name in inside.parts)
            if file.is_file() and not other and file not in files and file.stat().st_size <= SMALL:
                (unfinished / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, unfinished / inside)
        unfinished.mkdir(exist_ok=True)
        for file in files:
            write_like(tensor_of, unfinished / file.name, file, stored, parts)


def write_like(
    tensor_of: Callable[[str], torch.Tensor],
    out: Path,
    like: Path,
    stored: dict[str, Stored],
    parts: dict[str, Place],
) -> None:
    """One file: the header of `like` as it stands, then its tensors in their order, ours where we
    have them."""
    here = sorted((entry.begin, key) for key, entry in stored.items() if entry.file == like)
    with out.open("wb") as stream, like.open("rb") as original:
        stream.write(header(like)[0])
        for _, key in here:
            entry = stored[key]
            if key not in parts:
                original.seek(entry.begin)
                for left in range(entry.end - entry.begin, 0, -BLOCK):
                    stream.write(original.read(min(BLOCK, left)))
                continue
            ours = tensor_of(parts[key].name).detach()
            rows = ours[parts[key].begin : parts[key].end] if entry.shape else ours.reshape(1)
            for begin, end in pieces(entry):
                piece = rows[begin:end].to("cpu", entry.dtype).contiguous()
                stream.write(piece.flatten().view(torch.uint8).numpy())
