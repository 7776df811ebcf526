"""Checkpoints come back exactly; anything else is refused in one sentence, and nothing is ever
unpickled.
"""

import json
import os
import pickle
from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from conftest import STATS, tiny_pi
from safetensors.torch import load_file, save_file

import models
from config import ASSETS, Config, UserError
from models import MODELS, checkpoint
from models.checkpoint import Header
from models.formats import source


def test_roundtrip(tmp_path):
    model = tiny_pi()
    path = tmp_path / "m.safetensors"
    header = Header(
        "pi05", asdict(model.config), STATS
    )  # with its tuples, which JSON does not have
    checkpoint.save(path, header, model.state_dict())
    other = tiny_pi()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    fill(other, path)
    assert checkpoint.read_header(path) == header and os.listdir(tmp_path) == ["m.safetensors"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    checkpoint.save(
        path, header, {n: p.half() for n, p in model.state_dict().items()}
    )  # half precision fills fp32 weights
    fill(other, path)
    assert all(
        torch.equal(a.half().float(), b)
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def fill(model, path, part="all"):
    source.load(model, path, checkpoint.own(path, model), "cpu", torch.float32, part)


def test_a_part_of_the_weights_is_read_and_the_rest_only_checked(tiny_checkpoint):
    stored = load_file(tiny_checkpoint)
    for part, vision, expert in (
        ("none", False, False),
        ("training", False, True),
        ("idle", True, False),
        ("all", True, True),
    ):
        model = tiny_pi().to("meta")
        fill(model, tiny_checkpoint, part)
        for name, read in (
            ("vision.patch_embedding.weight", vision),
            ("action_out_proj.weight", expert),
        ):
            tensor = model.state_dict()[name]
            assert tensor.is_meta != read and (
                not read or torch.equal(tensor, stored[name].float())
            ), (part, name)


def test_the_shipped_checkpoint_is_of_a_known_family():
    header = checkpoint.read_header(ASSETS / "pi05_metaworld.safetensors")
    assert (
        header.family in MODELS
        and len(header.stats["state_low"]) == len(header.stats["state_high"]) == 4
    )


def damaged(tmp_path, tiny_checkpoint, how: str):
    path = tmp_path / "damaged.safetensors"
    weights = load_file(tiny_checkpoint)
    meta = {"family": "pi05", "shape": "{}", "stats": "{}"}
    if how == "truncated":
        path.write_bytes(tiny_checkpoint.read_bytes()[:-1000])
    elif how == "truncated in its header":
        path.write_bytes(tiny_checkpoint.read_bytes()[:100])
    elif how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("not a checkpoint " * 100)
    elif how == "pickle":
        torch.save(weights, path)
    elif how == "missing tensor":
        del weights["action_out_proj.bias"]
        save_file(weights, path, meta)
    elif how == "wrong shape":
        weights["action_out_proj.bias"] = torch.zeros(5)
        save_file(weights, path, meta)
    elif how == "no header":
        save_file(weights, path)
    elif how == "broken header":
        save_file(weights, path, meta | {"shape": "{"})
    return path


@pytest.mark.parametrize(
    "how, words",
    [
        ("truncated", "truncated"),
        ("truncated in its header", "truncated"),
        ("empty", "truncated"),
        ("text", "not a safetensors file"),
        ("pickle", "not a safetensors file"),
        ("missing tensor", "no tensor 'action_out_proj.bias'"),
        ("wrong shape", r"is \[5\], the model needs \[4\]"),
        ("no header", "not written by this project"),
        ("broken header", "header"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path, tiny_checkpoint, how, words):
    path = damaged(tmp_path, tiny_checkpoint, how)
    with pytest.raises(UserError, match=words) as error:
        checkpoint.read_header(path)
        fill(tiny_pi(), path)
    assert "damaged.safetensors" in str(error.value) and "\n" not in str(error.value)


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "trap.safetensors"
    sprung = tmp_path / "sprung"
    trap.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError):
        checkpoint.read_header(trap)
    with pytest.raises(UserError):
        fill(tiny_pi(), trap)
    assert not sprung.exists()
    pickle.loads(trap.read_bytes())
    assert sprung.exists()  # the trap works


def test_find_takes_a_file_a_folder_or_a_run_s_newest_checkpoint(tmp_path):
    for version in ("000002", "000010", ".000011.partial"):  # the last: killed while it was saved
        folder = tmp_path / "run" / "checkpoints" / version
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(version)
    newest = tmp_path / "run/checkpoints/000010/model.safetensors"
    assert (
        checkpoint.find(tmp_path / "run")
        == checkpoint.find(newest.parent)
        == checkpoint.find(newest)
        == newest
    )


def test_half_a_checkpoint_is_never_found(tmp_path):
    folder = tmp_path / "checkpoints" / ".000001.partial"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("half")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no checkpoint at"):
            checkpoint.find(path)


def test_header_is_json(tiny_checkpoint):
    raw = tiny_checkpoint.read_bytes()
    meta = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert (
        meta["family"] == "pi05"
        and json.loads(meta["shape"])["width"] == 32
        and json.loads(meta["stats"]) == STATS
    )


def test_a_name_is_found_where_a_tensor_is_not_finite():
    fine = {"large": torch.full((4,), 60000.0, dtype=torch.float16), "whole": torch.ones(2).long()}
    assert checkpoint.not_finite({}) == checkpoint.not_finite(fine) == ""
    for number in (float("nan"), float("inf"), -float("inf")):
        assert checkpoint.not_finite(fine | {"bad": torch.tensor([0.0, number])}) == "bad"


def test_weights_that_are_not_finite_are_not_loaded(tmp_path, tiny_checkpoint):
    weights = load_file(tiny_checkpoint)
    weights["action_out_proj.bias"][0] = float("nan")
    header = checkpoint.read_header(tiny_checkpoint)
    checkpoint.save(tmp_path / "bad.safetensors", header, weights)
    config = Config()
    config.train.checkpoint = tmp_path / "bad.safetensors"
    config.rollout.chunk = header.shape["chunk"]
    said = "tensor 'action_out_proj.bias' holds NaN or infinity"
    with patch.object(models, "check_fit"), pytest.raises(UserError, match=said):
        models.build(config, None)


def test_a_damaged_checkpoint_of_a_run_leads_to_the_older_one(tmp_path):
    folder = tmp_path / "checkpoints" / "000002"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("torn")
    with pytest.raises(UserError, match=f"; remove {folder} to use an older one$"):
        checkpoint.metadata(checkpoint.find(tmp_path))
