"""Our own checkpoints: one safetensors file each, whose header says what is in it.

The header's metadata are JSON strings: `family` (a key of `models.MODELS`), `shape` (the family's
configuration) and `stats` (for the embedded models `state_low`, `state_high`: the quantiles that
map the robot's state to [-1, 1]; for published ones what their family's file reader made of their
statistics). `vocabulary`, no JSON, is the fingerprint of what prompts are made with, if known.
Nothing is ever unpickled. Other projects' files: `models/formats/`.
"""

import contextlib
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checks import Finite, parse_json, read_json
from config import ROOT
from errors import UserError, require
from files import whole
from models import tokenize
from models.formats.source import INDEX, Source, header, layout, other_kind, weight_files
from run_folder import checkpoints


class Header(NamedTuple):
    family: str
    shape: dict
    stats: dict
    vocabulary: str = ""  # `tokenize.fingerprint`; "" where nobody knows

    @property
    def published(self) -> bool:
        """Whether it began as another project's model, whose `preparation` resizes pictures."""
        return self.stats.get("layout", "own") != "own"


def find(path: str | Path) -> Path:
    """The weights file of a file, a checkpoint folder or a run (its newest checkpoint)."""
    path = Path(path)
    for base in (path, ROOT / "runs" / path):
        newest = checkpoints(base)[-1:]
        for folder in (base, *newest):
            for candidate in (folder, folder / "model.safetensors"):
                if candidate.is_file() and not other_kind(candidate):
                    return candidate
        for folder in newest:  # an older one is not taken in its place without a word
            theirs = folder / "pretrained_model"
            require(not theirs.is_dir(), f"{path} is a training folder of LeRobot's: give {theirs}")
            lost = f"checkpoint {folder} has no model.safetensors"
            ours = (folder / "state.json").is_file()
            require(not ours, f"{lost}; remove {folder} to use an older one")
    other = other_kind(path)
    require(not other, f"{path} holds {other}")
    raise UserError(
        f"no checkpoint at {path}: expected a .safetensors file, a folder that holds "
        "model.safetensors, or a run with one"
    )


def absolute(path: Path) -> Path:
    """The same for every working directory: of what `find` takes in runs/, the place there."""
    named = ROOT / "runs" / path
    with contextlib.suppress(UserError):
        if named in (file := find(path), *file.parents):
            return named
    return path.absolute()


@contextlib.contextmanager
def or_another(path: str | Path) -> Iterator[None]:
    """Adds to a UserError about a weights file what to use in its place."""
    folder = Path(path).parent.resolve()
    of_run = folder.parent.name == "checkpoints"
    instead = f"remove {folder} to use an older one" if of_run else "give another one"
    try:
        yield
    except UserError as error:
        said = str(error).removesuffix(f"; {instead}")  # which is said once
        raise UserError(f"{said}; {instead}") from None


def read_header(path: str | Path) -> Header:
    meta = header(Path(path))[1]
    with or_another(path):
        require(
            {"family", "shape", "stats"} <= meta.keys(),
            f"checkpoint {path} was not written by this project: its header lacks family, shape "
            "and stats",
        )
        what = f"the header of checkpoint {path}"
        shape = parse_json(meta["shape"], Finite, f"{what}, shape")
        stats = parse_json(meta["stats"], Finite, f"{what}, stats")
        shape = checked_shape(meta["family"], shape, what)
        check_stats(meta["family"], stats, f"{what}, stats")
        return Header(meta["family"], shape, stats, meta.get("vocabulary", ""))


def divides(size: int, whole: int) -> bool:
    return whole % size == 0


# What must hold in a configuration, and neither its types nor the sizes of the weights show.
MUST = {divides: "divide", operator.le: "be at most", operator.lt: "be less than"}
RELATIONS = (
    ("patch", divides, "image_size"),
    ("heads", divides, "width"),
    ("kv_heads", divides, "heads"),
    ("vl_heads", divides, "features"),
    ("vision_heads", divides, "vision_width"),
    ("dino_heads", divides, "dino_width"),
    ("siglip_heads", divides, "siglip_width"),
    ("executed_steps", operator.le, "chunk"),
    ("executed_dims", operator.le, "action_dim"),
    ("horizon", operator.le, "positions"),
    ("embodiment", operator.lt, "embodiments"),
    ("image_token", operator.lt, "vocabulary"),
    ("pad_token", operator.lt, "vocabulary"),
    ("pad", operator.lt, "vocabulary"),
)


def checked_shape(family: str, shape: dict, what: str) -> dict:
    """Gives a header's shape the types of its family's CONFIG. Raises UserError for what is not in
    it, of another type, or no size that a network can have."""
    import models  # here, for it imports this file

    known = ", ".join(models.MODELS)
    require(
        family in models.MODELS, f"cannot read {what}: its family {family!r} is none of {known}"
    )
    module = models.load(family)
    if module.FORMATS is None:
        return shape
    found = parse_json(json.dumps(shape), module.CONFIG, what)
    lacks = {"views", "image_size", "tokens", "chunk", "action_dim"} - shape.keys()
    require(not lacks, f"cannot read {what}: it lacks {', '.join(sorted(lacks))}")
    for name, relation, other in RELATIONS:
        pair = [getattr(found, part, None) for part in (name, other)]
        wide = name == "heads" and hasattr(found, "head_dim")  # each head has a width of its own
        holds = wide or None in pair or relation(*pair)
        said = f"{name} {pair[0]} must {MUST[relation]} {other} {pair[1]}"
        require(holds, f"cannot read {what}: {said}")
    return {name: getattr(found, name) for name in shape}


def check_stats(family: str, stats: dict, what: str) -> None:
    """Raises UserError unless statistics are what the family's files say of their layout."""
    import models  # here, for it imports this file

    if models.load(family).FORMATS is None:
        return
    kinds = models.files(family).STATS
    layout = stats.get("layout", "own")
    known = isinstance(layout, str) and layout in kinds
    require(known, f"cannot read {what}: its layout {layout!r:.60} is none of {', '.join(kinds)}")
    parse_json(json.dumps(stats), kinds[layout], what, "ignore")


def read_optimizer(
    path: Path,
    sizes: list[torch.Size],
    device: str = "",
    cut: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[int, dict]:
    """Reads what optimizer.pt remembers: AdamW's state of parameters of these shapes, in order, but
    of those that never had a gradient. Raises UserError.

    Without a device it only looks: the file is mapped, and takes no memory. So it is for `cut`,
    which takes from a tensor of the file what this process needs of it."""
    why = "it is damaged, or of other weights"
    tensors = {}
    try:
        mapped = not device or cut is not None
        where = "cpu" if mapped else device
        found = torch.load(path, map_location=where, weights_only=True, mmap=mapped)
        numbers = [number for group in found["param_groups"] for number in group["params"]]
        right = numbers == list(range(len(sizes)))
        for number, state in found["state"].items():
            right &= state.keys() == {"step", "exp_avg", "exp_avg_sq"}
            right &= state["exp_avg"].shape == state["exp_avg_sq"].shape == sizes[number]
            right &= state["step"].numel() == 1 and bool(state["step"] >= 1)
            for name in ("exp_avg", "exp_avg_sq") if cut else ():
                state[name] = cut(state[name])
            tensors |= {f"{number} {name}": tensor for name, tensor in state.items()}
            right &= not device or bool((state["exp_avg_sq"] < 0).logical_not().all())
        right &= all(tensor.is_floating_point() for tensor in tensors.values())
    except Exception as error:  # a damaged file raises anything; torch advises to load it unsafely
        right = False
        why = getattr(error, "strerror", None) or why
    older = f"remove {path.parent} to continue from an older checkpoint"
    require(right, f"cannot read {path} ({why}): {older}")
    broken = not_finite(tensors) if device else ""
    require(not broken, f"{path}: its tensor {broken} holds NaN or infinity; {older}")
    return found["state"]


def of_family(path: str | Path, family: str) -> Header:
    """The header of a checkpoint of ours, which must be of `family`. Raises UserError."""
    header = read_header(path)
    require_family(path, header.family, family)
    return header


def require_family(path: str | Path, has: str, family: str) -> None:
    other = f"checkpoint {path} is a {has!r} model"
    require(has == family, f"{other}: give --model {has}, a --recipe of it, or another checkpoint")


def is_ours(path: str | Path) -> bool:
    """Whether a checkpoint is in our own layout. Raises UserError where there is none."""
    try:
        file = find(path)
    except UserError:
        if (Path(path) / INDEX).is_file() or any(Path(path).glob("model-*-of-*.safetensors")):
            return not weight_files(path)  # shards are never ours
        raise
    return "family" in header(file)[1]


def published(path: Path) -> bool:
    """Whether the checkpoint is another project's, or a run's that began from one."""
    return not is_ours(path) or read_header(find(path)).published


def check_choice(statistics: str, path: Path) -> None:
    """Raises UserError where statistics are chosen, and the checkpoint is none to choose from."""
    alone = f"--statistics {statistics} is for another project's checkpoint"
    require(not (statistics and is_ours(path)), f"{alone}: {path} has none to choose from")


def folder_of(path: str | Path) -> Path | None:
    """The folder RUN/checkpoints/VERSION that a checkpoint of ours is in, also by a link or from
    inside of it."""
    if not is_ours(path):
        return None
    file = find(path)
    folders = (file.parent.resolve(), file.resolve().parent)
    return next((f for f in folders if f.parent.name == "checkpoints"), None)


def run_of(path: str | Path) -> Path | None:
    """The run folder that a checkpoint of ours is in."""
    folder = folder_of(path)
    return folder and folder.parents[1]


def vocabulary(given: Path | None, path: Path, family: str, embedded: Path) -> str:
    """The tokeniser file for checkpoint `path`: what the user gives, the one beside it, of its run,
    the embedded default's for a small model of ours, or for GR00T "", an installed package's. Of
    several the one whose fingerprint the checkpoint has. Raises UserError when there is none."""
    path = Path(path)
    run = run_of(path) or path
    ours = is_ours(path)
    named = None
    with contextlib.suppress(UserError, KeyError, TypeError):
        named = Path(read_json(run / "config.json")["train"]["tokenizer"])
    if given not in (None, named):
        return str(given)  # who reads it says what is wrong
    beside = find(path) if ours or path.is_file() else path / "model.safetensors"
    # Families that share a folder have vocabularies of their own names.
    places = [beside.with_suffix(".model"), beside.with_name(embedded.name)]
    places.append(beside.with_name("tokenizer.model"))
    if named:
        # A run keeps a copy. What it names may be of another clone, which ships it as this one.
        places += [run / named.name, named, ROOT / named.parent.name / named.name]
    if not published(path):
        places.append(embedded)
    there = [place for place in places if place.exists()]
    wanted = read_header(find(path)).vocabulary if ours else ""
    right = [place for place in there if wanted and tokenize.fingerprint(place) == wanted]
    found = next(iter(right + there), given)
    require(
        found or family == "gr00t",
        f"checkpoint {path} brings no tokeniser: give its SentencePiece file with --tokenizer PATH",
    )
    return str(found or "")


def frame_size(path: Path, theirs: int) -> int:
    """Pixels of the pictures to show a model. theirs: what other projects' data has, whose
    `preparation` resizes it."""
    return theirs if published(path) else read_header(find(path)).shape.get("image_size", 64)


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


def require_finite(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises UserError where a tensor of a checkpoint holds a NaN or an infinity."""
    broken = not_finite(tensors)
    require(not broken, f"checkpoint {path}: tensor {broken!r} holds NaN or infinity")


def check_finite(path: str | Path) -> None:
    """The same of each tensor in the file of a checkpoint of ours, one after the other."""
    path = find(path)
    header(path)
    with or_another(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dictionary
            require_finite(path, {name: file.get_tensor(name)})


def save(path: str | Path, header: Header, tensors: dict[str, torch.Tensor]) -> None:
    shape = json.dumps(header.shape)
    meta = {"family": header.family, "shape": shape, "stats": json.dumps(header.stats)}
    if header.vocabulary:
        meta["vocabulary"] = header.vocabulary
    write(Path(path), tensors, meta)


def write(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
    """Writes beside `path` and renames, so a reader or a crash never sees half a file. Raises
    OSError where the disk refuses it."""
    try:
        with whole(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # as the umask says; the library's files are private
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, partial, meta)
            partial.chmod(mode)
    except SafetensorError as error:  # the library's word for what the system says
        if not (found := re.search(r"os error (\d+)", str(error))):
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def own(path: Path, model: torch.nn.Module, heads: Iterable[str] = ()) -> Source:
    """The layout of a file of ours, which may lack some of the model's `heads` or have others."""
    keys = layout(path)
    missing = [name for name in heads if not any(key.startswith(f"{name}.") for key in keys)]
    foreign = [name for name in heads if name not in dict(model.named_children())]
    rules = tuple((rf"{name}\..*", None) for name in missing)
    return Source((*rules, (r".*", r"\g<0>")), tuple(rf"{name}\..*" for name in foreign))
