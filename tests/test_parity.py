"""Each family equals its original on the reference folders; the command says which output
misses.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import parity
from config import ROOT
from errors import UserError

GOLDEN = ROOT / "tests" / "golden"
FOLDERS = sorted(folder.parent for folder in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_output_of_the_original(folder):
    lines = parity.check(folder)
    assert [line for line in lines if not line.passed] == []
    names = {line.name for line in lines}
    assert names == load_file(folder / "outputs.safetensors").keys()
    assert "loss" in names and sum(name.startswith("grad.") for name in names) >= 5


def test_what_differs_is_a_miss():
    theirs = {
        "a": torch.tensor([1.0, 2.0]),
        "grad.b": torch.tensor([100.0, 1e-3]),
        "c": torch.zeros(2),
        "d": torch.ones(2),
    }
    ours = {
        "a": torch.tensor([1.0, 2.0002]),
        "grad.b": torch.tensor([100.005, 2e-3]),
        "c": torch.zeros(3),
        "d": torch.ones(2) * torch.nan,
    }
    found = {
        line.name: line
        for line in parity.compare(ours | {"more": torch.zeros(1)}, theirs | {"e": torch.zeros(1)})
    }
    assert [name for name, line in found.items() if line.passed] == ["grad.b"]
    assert found["a"].error == pytest.approx(2e-4, rel=1e-2) and found[
        "grad.b"
    ].error == pytest.approx(5e-5, rel=1e-2)
    assert found["c"].error == found["e"].error == float("inf")
    ours["a"] = torch.tensor([1.0, 2.00005])
    ours["grad.b"] = torch.tensor([100.02, 1e-3])
    found = {line.name: line.passed for line in parity.compare(ours, theirs)}
    assert found["a"] and not found["grad.b"]


def test_the_command_exits_1_on_a_miss(tmp_path, capsys):
    folder = tmp_path / "changed"
    shutil.copytree(GOLDEN / "pi05", folder)
    outputs = load_file(GOLDEN / "pi05" / "outputs.safetensors")
    assert parity.main([str(folder)]) == 0 and "FAIL" not in capsys.readouterr().out
    outputs["velocity"] += 1e-3
    save_file(outputs, folder / "outputs.safetensors")
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.parity", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        found.returncode == 1
        and found.stdout.count("FAIL") == 1
        and "velocity" in found.stdout.split("FAIL")[1].splitlines()[0]
    )
    assert len(found.stdout.splitlines()) == len(outputs) + 1


def test_what_cannot_be_compared_is_the_user_s_mistake(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"family": "pi06"}))
    save_file({}, tmp_path / "outputs.safetensors")
    with pytest.raises(UserError, match="of family 'pi06'"):
        parity.check(tmp_path)
    with pytest.raises(UserError, match="takes one folder"):
        parity.main([])


@pytest.mark.parametrize(
    "missing", ["config.json", "inputs.safetensors", "outputs.safetensors", "weights.safetensors"]
)
def test_an_incomplete_folder_is_named(tmp_path, missing):
    shutil.copytree(GOLDEN / "pi0", tmp_path / "f")
    (tmp_path / "f" / missing).unlink()
    with pytest.raises(UserError, match=str(tmp_path / "f")):
        parity.check(tmp_path / "f")
