"""A trained policy in the layout of the checkpoint it began from, for the original tools to load.

    python -m models.export --checkpoint runs/NAME --like ORIGINAL --out FOLDER

Every tensor of ORIGINAL (openpi, RLinf, LeRobot, NVIDIA, OpenVLA-OFT) keeps its key, shape and
dtype; those that training changed get their new values, adapters are added into them, and small
files (statistics, configuration, tokeniser) come along. With --adapter-only FOLDER holds the
adapters alone, as PEFT keeps them. Left out: value and noise heads that ORIGINAL has no room for.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

import models
from config import expanded
from errors import exit_on_user_error, require
from models import checkpoint
from models.formats import peft, source


@dataclass(kw_only=True)
class ExportConfig:
    """Writes a trained policy in the layout of the checkpoint it began from."""

    checkpoint: Path
    """a .safetensors file of ours, a checkpoint folder, or a run folder (its newest checkpoint)"""
    like: Path
    """the checkpoint that training began from: a folder or file of another project"""
    out: Path
    """folder to write (a file where --like is one); it must not exist"""
    adapter_only: bool = False
    """write only the adapters that were trained, as PEFT keeps them, to be put on --like"""


def main(config: ExportConfig) -> None:
    path = checkpoint.find(config.checkpoint)
    header = checkpoint.read_header(path)
    parent = config.out.absolute().parent
    require(
        not config.out.exists(),
        f"{config.out} exists already: give another --out, since nothing is overwritten",
    )
    require(parent.is_dir(), f"the folder {parent} does not exist: create it or give another --out")
    inside = parent.resolve().is_relative_to(config.like.resolve())
    require(not inside, f"{config.out} is in the original's own folder: give another --out")
    require(
        not checkpoint.is_ours(config.like),
        f"--like {config.like} is one of our own checkpoints: give the original that training "
        "began from",
    )
    family = models.load(header.family)
    require(
        family.FORMATS is not None,
        f"checkpoint {path} is of the family {header.family!r}, which no other project knows",
    )
    models.check_family(header.family, config.like)
    other = f"checkpoint {path} acts by statistics of the demonstrations that it has learned"
    keep = "so its tools would act in wrong units: learn with pretrain.py --keep-statistics"
    require(not header.stats.get("counted"), f"{other}, --like {config.like} by others, {keep}")
    model = source.sketch(family.NETWORK, family.CONFIG(**header.shape))
    layout = checkpoint.own(path, model, family.NETWORK.HEADS)
    source.load(model, path, layout, "cpu", None)
    names = models.files(header.family).source_of(config.like, model.config)
    if config.adapter_only:
        none = f"checkpoint {path} has no adapters: leave out --adapter-only"
        require(model.config.rank, none)
        weights = source.without_adapters(names)
        changed = source.first_other(model, config.like, weights)
        beside = f"checkpoint {path} has another {changed!r} than --like, beside its adapters"
        require(not changed, f"{beside}: leave out --adapter-only, or give what they are put on")
        peft.save(model, config.out, names, config.like)
    else:
        source.save(model, config.out, names, config.like)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(expanded(tyro.cli(ExportConfig)))
