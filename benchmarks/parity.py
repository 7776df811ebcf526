"""Compares a family with reference outputs of its original implementation.

    python -m benchmarks.parity FOLDER

FOLDER is one of tests/golden: it holds config.json (with "family"), weights.safetensors under the
original's names, inputs.safetensors and outputs.safetensors. `originals.py` says what our code
makes of them. Here every output is compared, and one line printed for each. The exit status is 1 if
any misses, and 2 if the folder cannot be read. Left out: preprocessing.json, whose cases the tests
go through.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.originals import OUTPUTS
from errors import UserError, exit_on_user_error, require

BOUND = 1e-4  # absolute; for `grad.*` relative to the largest element of the reference


class Line(NamedTuple):
    name: str
    error: float  # inf: missing or of another shape
    passed: bool


def family(folder: Path):
    """Finds the function that reads a reference folder. Raises UserError."""
    try:
        name = json.loads((folder / "config.json").read_text()).get("family")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {error}") from None
    require(
        name in OUTPUTS,
        f"{folder / 'config.json'} is of family {name!r}: known are {', '.join(OUTPUTS)}",
    )
    return OUTPUTS[name]


def compare(found: dict[str, Tensor], reference: dict[str, Tensor]) -> list[Line]:
    """Compares every output of the reference, in the order of their names."""
    lines = []
    for name, theirs in sorted(reference.items()):
        ours = found.get(name)
        error = float("inf")
        if ours is not None and ours.shape == theirs.shape:
            ours = ours.detach().double()
            theirs = theirs.double()
            error = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
            if name.startswith("grad."):
                error /= max(theirs.abs().max().item(), 1e-30)
        lines.append(Line(name, error, error <= BOUND))  # a NaN is no pass
    return lines


def check(folder: Path) -> list[Line]:
    """Compares a family with a reference folder. Raises UserError where it cannot be read."""
    try:
        reference = load_file(folder / "outputs.safetensors")
        return compare(family(folder)(folder), reference)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {folder}: {error}") from None
    except KeyError as error:
        raise UserError(f"{folder}: inputs.safetensors lacks {error}") from None


def main(arguments: list[str]) -> int:
    one = len(arguments) == 1 and not arguments[0].startswith("-")
    require(one, "python -m benchmarks.parity takes one folder")
    torch.set_num_threads(1)
    lines = check(Path(arguments[0]))
    for line in lines:
        kind = "relative" if line.name.startswith("grad.") else "absolute"
        print(f"{'pass' if line.passed else 'FAIL'}  {line.error:8.1e} {kind}  {line.name}")
    missed = sum(not line.passed for line in lines)
    print(f"{len(lines) - missed} of {len(lines)} outputs within {BOUND}")
    return 1 if missed or not lines else 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv[1:]))
