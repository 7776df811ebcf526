"""Model families, one file each and one in `formats/`. A new family is those two, a line in
`MODELS` and a name in `config.Family`. What they must offer: `contract.py`.

No stage knows which family it serves: it calls `build`, and env workers `preparation`.
"""

import importlib
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path

import torch

from config import Config
from errors import require
from models import checkpoint, contract, tokenize
from models.formats import bins, peft, source

MODELS = {
    "pi0": "models.pi",
    "pi05": "models.pi",
    "gr00t": "models.gr00t",
    "oft": "models.oft",
    "emulated": "benchmarks.emulated.policy",
}


def load(name: str):
    """Loads the module of a model family. Raises UserError when it is unknown or lacks anything."""
    require(name in MODELS, f"unknown --model {name!r}: choose one of {', '.join(MODELS)}")
    family = importlib.import_module(MODELS[name])
    what = f"the model family {name!r} ({family.__name__})"
    contract.check(family, what, contract.FAMILY)
    if family.FORMATS is None:
        contract.check(family, what, contract.ALONE)
        return family
    contract.check(family, what, contract.WITH_FILES)
    contract.check(family.NETWORK, f"{what} in its NETWORK", contract.NETWORK)
    return family


def files(name: str):
    """Loads what stands between a model family and the world. Raises UserError as `load`."""
    family = load(name)
    if family.FORMATS is None:
        return family
    module = importlib.import_module(family.FORMATS)
    contract.check(module, f"the files of model family {name!r}", contract.FILES)
    return module


def preparation(name: str, header: checkpoint.Header, tokenizer: Path | str | None):
    """Makes what env workers use between a simulator and a model: `contract.PREPARATION`."""
    made = files(name).preparation(header, str(tokenizer or ""))
    same = not (tokenizer and header.vocabulary)
    require(
        same or tokenize.fingerprint(tokenizer) == header.vocabulary,
        f"{tokenizer} is not the vocabulary that the checkpoint was trained with: give that one "
        "with --tokenizer",
    )
    contract.check(made, f"the preparation of model family {name!r}", contract.PREPARATION)
    return made


def build(config: Config, spec, device="cpu", weights: source.Part = "all") -> torch.nn.Module:
    """Makes the model of `config.train.checkpoint`, ours or another project's, with those `weights`
    on `device`: `contract.MODEL`. Without a checkpoint it is the published model, whose weights are
    "none".

    spec: envs.EnvSpec. Raises UserError when the checkpoint is of another model or does not suit
    the simulator."""
    name = config.train.model
    family = load(name)
    if family.FORMATS is None:
        model = family.build(config, spec, device, weights)
        contract.check_model(model, name)
        return model

    # Ask the checkpoint what it holds
    path, header, layout = held(config, spec)
    ours = path and layout is None
    stored = family.CONFIG(**header.shape)
    shape = replace(stored, **chosen(config, stored))
    check_fit(path, shape, header.stats, config, spec)

    # Make the network, with the adapters that the file has, and find out which it is to have
    model = source.sketch(family.NETWORK, shape if ours else shape.with_lora(0, None, ()))
    adapter = None
    if config.train.adapter and not config.train.resume:
        names = files(name).source_of(None, shape)
        adapter = peft.read(config.train.adapter, Path(config.train.checkpoint), model, names)
        shape = shape.with_lora(adapter.rank, adapter.alpha, tuple(adapter.layers))
    model.config = model.asked(shape, config.actor)

    # Read its weights
    for key, parameter in model.named_parameters():
        kind = parameter.dtype if path else torch.bfloat16  # of the published files
        parameter.data = parameter.data.to(model.dtype_of(key) or kind)
    if ours:
        layout = checkpoint.own(path, model, family.NETWORK.HEADS)
    if path:
        with checkpoint.or_another(path):
            source.load(model, path, layout, device, model.dtype_of, weights)
            checkpoint.require_finite(path, dict(model.named_parameters()))
    if adapter:
        adapter.put(model)

    # Begin anew what the checkpoint does not have, alike in every process
    torch.manual_seed(config.train.seed)
    missing = {key.partition(".")[0] for key, p in model.named_parameters() if p.is_meta}
    if weights in ("all", "training") and missing & set(model.HEADS):
        for key, head in model.heads(shape).items():
            if key in missing:
                model.add_module(key, head.to(device))
    model.begin(config, header.stats)
    model.compute = torch.bfloat16 if config.train.precision == "bfloat16" else None
    words = header.vocabulary
    if config.train.tokenizer:
        words = words or tokenize.fingerprint(config.train.tokenizer)
    model.header = header._replace(shape=asdict(model.config), vocabulary=words)
    contract.check_model(model, name)
    return model


def acting(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every weight the dtype in which the model uses it, in place. `act` computes the same
    numbers as with the weights that learn, to the bit, and has nothing to convert."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(model.acts_in(name) or parameter.dtype)
    return model


def use_tf32(device: str, precision: str) -> None:
    """Sets how this process multiplies float32 on a GPU: rounded to TF32's 10 bits where networks
    compute in bfloat16, else as it is. Both workers have to do alike.

    The older of torch's two ways to say it: torch.compile asks by it (torch 2.13)."""
    if device != "cpu":
        torch.set_float32_matmul_precision("high" if precision == "bfloat16" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "bfloat16"  # of convolutions


def held(config: Config, spec) -> tuple[Path | None, checkpoint.Header, source.Source | None]:
    """Returns the checkpoint, None without one; what it says of its model; and the layout of
    another project's. Raises UserError as `build`."""
    name = config.train.model
    if not config.train.checkpoint:
        shape = asdict(published_shape(config, spec))
        return None, checkpoint.Header(name, shape, {"layout": ""}), None
    path = Path(config.train.checkpoint)
    if checkpoint.is_ours(path):
        path = checkpoint.find(path)
        return path, checkpoint.of_family(path, name), None
    shape, layout, stats, _ = published(config, spec)
    stats |= {"gripper": bins.gripper_of(spec.robot, stats["layout"])}
    checkpoint.check_stats(name, stats, f"the statistics of checkpoint {path}")
    return path, checkpoint.Header(name, asdict(shape), stats), layout


def published_shape(config: Config, spec):
    """The configuration of a family's published model, made to fit a run without its files."""
    name = config.train.model
    shape = load(name).FULL[name]
    known = {field.name for field in fields(shape)}
    chunk = config.rollout.chunk
    sizes = {"views": config.env.cameras or min(shape.views, spec.views)}
    if "executed_steps" in known:
        sizes |= {"executed_steps": chunk, "executed_dims": spec.action_dim}
        sizes["chunk"] = config.rollout.horizon or max(chunk, shape.chunk)
    else:
        sizes |= {"chunk": chunk, "action_dim": spec.action_dim}
    return replace(shape, **sizes)


def published(config: Config, spec) -> source.Found:
    """What another project's checkpoint says of itself, made to fit the run. Raises UserError, also
    for sizes that no network has."""
    name = config.train.model
    path = Path(config.train.checkpoint)
    found = files(name).published(path, name, config, spec)
    checkpoint.checked_shape(name, asdict(found.shape), f"the configuration of checkpoint {path}")
    return found


def assumptions(config: Config, spec) -> str:
    """Lines that say what is assumed of another project's checkpoint, whose files do not say it,
    and which adapter is put on it; "" where there is nothing. spec: envs.EnvSpec. Raises UserError
    as `build`."""
    name = config.train.model
    path = config.train.checkpoint
    if load(name).FORMATS is None:
        return ""
    lines = ""
    if config.train.adapter and not config.train.resume:
        lines = f"adapter {config.train.adapter} is put on checkpoint {path}\n"
    if checkpoint.is_ours(path):
        return lines
    assumed = published(config, spec).assumed
    listed = ", ".join(f"{setting} = {value}" for setting, value in assumed.items())
    if listed:
        lines += f"checkpoint {path} does not say, so it is assumed: {listed}\n"
    return lines


def chosen(config: Config, shape) -> dict:
    """What the run's flags say of a family's configuration; None means as the checkpoint says."""
    flags = {"train_vlm": config.actor.train_vlm}
    flags["cache_prefix"] = config.actor.cache_prefix in ("auto", "slots")
    precision = config.train.precision
    followed = precision if precision != "auto" else "float32"
    flags["prefix_dtype"] = config.rollout.prefix_dtype or followed
    rollout = ("tokens", "denoise_steps", "noise_level", "sde_steps", "noise")
    rollout += ("temperature", "center_crop", "stop_token")
    flags |= {name: getattr(config.rollout, name) for name in rollout}
    known = {field.name for field in fields(shape)}
    found = {name: value for name, value in flags.items() if value is not None and name in known}
    steps = found.get("denoise_steps")
    if steps and shape.sde_steps == shape.denoise_steps:  # all of them are stochastic
        found = {"sde_steps": steps} | found
    return found


def check_fit(path: Path, shape, stats: dict, config: Config, spec) -> None:
    """Raises UserError unless a checkpoint suits the simulator and the run's chunks."""
    chunk, action_dim = shape.played
    sizes = asdict(shape)
    horizon = sizes.get("horizon", sizes["chunk"])
    cameras = config.env.cameras
    few = f"--cameras {cameras} is more than the {spec.views} that the simulator has"
    require(cameras <= spec.views, few)
    agree = {
        "horizon": (horizon, config.rollout.horizon or horizon),
        "views": (shape.views, cameras or min(shape.views, spec.views)),
        "action_dim": (action_dim, spec.action_dim),
        "chunk": (chunk, config.rollout.chunk),
    }
    if "layout" not in stats:
        agree["image_size"] = (shape.image_size, spec.image_size)
    for name, (has, wanted) in agree.items():
        says = f"checkpoint {path} has {name} = {has} and the run asks for {wanted}"
        instead = "make them agree by a flag of that name"
        if name == "action_dim":
            instead = f"give one that was trained for {config.train.env}, or its own --env"
        require(has == wanted, f"{says}: {instead}")
    known = len(stats.get("state_low", range(spec.state_dim)))
    require(
        known == spec.state_dim,
        f"checkpoint {path} knows a state of {known} dimensions and the simulator has "
        f"{spec.state_dim}: they do not fit",
    )


def check_family(name: str, path: Path) -> None:
    """Raises UserError when another project's checkpoint is not of family `name`, by its keys."""
    if checkpoint.is_ours(path):
        return
    names = " ".join(source.layout(path))
    marks = {family: files(family).MARKS for family in MODELS if load(family).FORMATS is not None}
    found = [family for family in marks if any(mark in names for mark in marks[family])]
    known = ", ".join(dict.fromkeys(chain(*marks.values())))
    sentence = f"checkpoint {path} is of no family known here: none of its tensors is named {known}"
    require(found, sentence)
    require(
        name in found,
        f"checkpoint {path} is of the family {' or '.join(found)}, not {name}: give another "
        "checkpoint, or the --model or a --recipe of its family",
    )
