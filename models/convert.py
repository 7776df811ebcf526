"""Weights that torch saved (RLinf's full_weights.pt) as a safetensors file. Nothing is unpickled.

    python -m models.convert global_step_100/actor/model_state_dict/full_weights.pt FOLDER

FOLDER then needs what lies beside the weights that their training began from: config.json,
statistics, vocabulary, and of OpenVLA-OFT modeling_prismatic.py. Left out: shards, whose tensors
are parts.
"""

from pathlib import Path
from typing import Annotated

import torch
import tyro

from errors import UserError, exit_on_user_error, require
from models import checkpoint
from models.formats import source


def main(
    weights: Annotated[Path, tyro.conf.Positional], folder: Annotated[Path, tyro.conf.Positional]
) -> None:
    """Writes weights that torch saved as FOLDER/model.safetensors."""
    out = folder / "model.safetensors"
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file: give a folder")
    weights_there = (out.name, source.INDEX, source.SHARDS)
    there = next((file for kind in weights_there for file in folder.glob(kind)), None)
    require(there is None, f"{there} exists already: give another folder, or remove it")
    try:
        found = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        tensors = {str(name): tensor.detach() for name, tensor in found.items()}
    except Exception as error:  # a damaged file raises anything; torch advises to load it unsafely
        why = getattr(error, "strerror", None) or "damaged, or not one tensor per name"
        raise UserError(f"cannot read weights from {weights}: {why}") from None

    # A safetensors file holds every name's numbers anew, also of tensors that are tied.
    seen = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(out, tensors, {"format": "pt"})
    beside = (
        "put beside it what was beside those that they were trained from: config.json, statistics, "
    )
    beside += "vocabulary, and of OpenVLA-OFT modeling_prismatic.py"
    print(f"wrote {out}: {beside}")


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)
