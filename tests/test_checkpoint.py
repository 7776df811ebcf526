"""Checkpoints come back exactly; anything else is refused in one sentence, and nothing is ever
unpickled.
"""

import errno
import json
import math
import os
import pickle
import resource
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import STATS, tiny_pi
from safetensors.torch import load_file, save_file

import models
from config import ASSETS, Config, embedded_files
from envs import metaworld
from errors import UserError
from models import MODELS, checkpoint, tokenize
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
    meta = checkpoint.header(tiny_checkpoint)[1]
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


def test_a_disk_that_refuses_weights_says_so_as_the_system_does(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as found:
            checkpoint.write(tmp_path / "a.safetensors", {"x": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.errno == errno.EFBIG
    assert found.value.filename == str(tmp_path / "a.safetensors") and not any(tmp_path.iterdir())


def test_find_takes_a_file_a_folder_or_a_run_s_newest_checkpoint(tmp_path):
    # One was killed while it was saved; copies and notes are the user's.
    names = ("000002", "000010", ".000011.partial", "000011-backup", "12", "best")
    for version in names:
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
    later = tmp_path / "run/checkpoints/1000000/model.safetensors"
    later.parent.mkdir()
    later.touch()
    assert checkpoint.find(tmp_path / "run") == later
    later.unlink()
    (later.parent / "state.json").touch()  # an older one is not taken in its place without a word
    with pytest.raises(UserError, match="has no model.safetensors; remove .*1000000 to use an"):
        checkpoint.find(tmp_path / "run")
    (later.parent / "state.json").unlink()
    (later.parent / "pretrained_model").mkdir()
    with pytest.raises(UserError, match="LeRobot's: give .*1000000/pretrained_model"):
        checkpoint.find(tmp_path / "run")


@pytest.mark.parametrize("family", ["pi0", "pi05", "gr00t", "oft"])
def test_every_shipped_checkpoint_finds_its_own_vocabulary(family):
    weights, words = embedded_files(family, "metaworld")
    found = checkpoint.vocabulary(None, weights, family, words)
    models.preparation(family, checkpoint.read_header(weights), found)


def test_a_checkpoint_is_of_its_run_however_it_is_named(monkeypatch, tmp_path):
    run = tmp_path / "run"
    file = saved_with(run / "checkpoints/000001/model.safetensors")
    for link, target in (("file.safetensors", file), ("folder", file.parent), ("again", run)):
        (tmp_path / link).symlink_to(target)
        assert checkpoint.run_of(tmp_path / link) == run
    monkeypatch.chdir(run / "checkpoints")
    assert checkpoint.run_of("000001") == run
    monkeypatch.chdir("000001")
    assert checkpoint.run_of(".") == checkpoint.run_of("model.safetensors") == run
    # On some disks the weights themselves are links.
    blob = file.rename(tmp_path / "blob")
    file.symlink_to(blob)
    assert checkpoint.run_of("model.safetensors") == run
    assert checkpoint.run_of(blob) is None


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
        checkpoint.read_header(checkpoint.find(tmp_path))


@pytest.mark.parametrize(
    "shape",
    [
        {"vision_heads": -1},
        {"vision_heads": 5},
        {"heads": 0},
        {"denoise_steps": 10**9},
        {"depth": 10**5},
        {"width": None},
        {"width": [128]},
        {"width": "wide"},
        {"width": True},
        {"noise_level": math.nan},
        {"noise_range": [0.1]},
        {"value_widths": 3},
        {"value_widths": [0]},
        {"noise": "loud"},
        {"no_such_size": 1},
        {"tokens": 10**6},
        {"noise_level": 0},
        {"noise_range": [0.0, 0.1]},
        {"executed_steps": 11},
        {"patch": 7},
        {"vl_heads": 3},
        {"embodiment": 2},
        {"embodiment": -1},
        {"horizon": 63},
        {"pad_token": 999},
        {"kv_heads": 3},
    ],
    ids=str,
)
def test_a_shape_that_no_network_has_is_refused(tmp_path, shape):
    path = tmp_path / "m.safetensors"
    families = {"pi05": asdict(tiny_pi().config), "gr00t": asdict(models.load("gr00t").CONFIG())}
    for family, whole in families.items():
        checkpoint.save(path, Header(family, whole, STATS), {})
        assert checkpoint.read_header(path).shape == whole
        checkpoint.save(path, Header(family, whole | shape, STATS), {})
        with pytest.raises(UserError, match="cannot read the header of checkpoint") as error:
            checkpoint.read_header(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "family, shape",
    [
        ("pi05", "[" * 100_000),
        ("pi05", '{"a":' * 100_000),
        ("pi05", "null"),
        ("pi05", "{}"),
        ("gr00t", "{}"),
        ("nobody", "{}"),
    ],
)
def test_a_header_of_other_types_is_refused(tmp_path, family, shape):
    path = tmp_path / "m.safetensors"
    save_file({}, path, {"family": family, "shape": shape, "stats": json.dumps(STATS)})
    with pytest.raises(UserError, match="cannot read the header of checkpoint"):
        checkpoint.read_header(path)


OWN = {"state_low": [0.0], "state_high": [1]}
SCALE = {"kind": "openpi_quantiles", "q01": [-1.0], "q99": [1.0]}
OPENPI = {
    "layout": "openpi",
    "state": SCALE,
    "actions": SCALE,
    "prompt": "state",
    "delta": [True],
    "gripper": "libero",
}
RLINF = OWN | {"layout": "rlinf", "action_low": [0.0], "action_high": [1.0], "gripper": ""}
OPENVLA = {"layout": "openvla", "q01": [0.0], "q99": [1.0], "mask": [True], "gripper": "widowx"}
GOOD = {"pi05": (OWN, OPENPI), "gr00t": (OWN, RLINF), "oft": ({}, OWN, OPENVLA)}
ODD = (None, 3, "", "odd", [], {}, math.nan, True, [[1.0]], [math.nan], ["0"], [None], [10**400])
ODD += (
    [1e308],
    [5.0, 5.0],
    [-5.0],
    {"kind": "openpi_min_max"},
    {"kind": []},
    SCALE | {"q99": [-2]},
)
# Values in ODD that are right in some place: more is not known of it.
FINE = {"gripper": ("",), "delta": ([],), "state_low": ([-5.0],)}
FINE |= {"q01": ([-5.0],), "action_low": ([-5.0],)}


def refused(path: Path, family: str, stats: dict) -> bool:
    shape = asdict(models.load(family).CONFIG())
    meta = {"family": family, "shape": json.dumps(shape), "stats": json.dumps(stats)}
    save_file({}, path, meta)
    try:
        checkpoint.read_header(path)
    except UserError as error:
        said = str(error)
        assert said.startswith("cannot read the header of checkpoint"), said
        assert "\n" not in said and len(said) < 500, said
        return True
    return False


@pytest.mark.parametrize("family", GOOD)
def test_statistics_are_what_their_layout_says(tmp_path, family):
    """Every field with every odd value is refused when it is read, or is none that is used."""
    path = tmp_path / "m.safetensors"
    for stats in GOOD[family]:
        assert not refused(path, family, stats)
        assert not refused(path, family, stats | {"note": "of another version"})
        for name in stats:
            left = {key: value for key, value in stats.items() if key != name}
            assert refused(path, family, left) or name in ("gripper", "layout")
            for odd in ODD:
                fine = any(odd is value or odd == value for value in FINE.get(name, ()))
                assert refused(path, family, stats | {name: odd}) != fine, (name, odd)


def test_the_shapes_of_all_published_models_are_in_range():
    for family in ("pi0", "pi05", "gr00t", "oft"):
        for shape in models.load(family).FULL.values():
            found = checkpoint.checked_shape(family, json.loads(json.dumps(asdict(shape))), "it")
            assert found == asdict(shape)


def test_weights_are_as_readable_as_other_files_and_leave_nothing_beside_them(tmp_path):
    header = Header("pi05", {}, {})
    for umask, mode in ((0o022, 0o644), (0o007, 0o660)):
        before = os.umask(umask)
        checkpoint.save(tmp_path / "m.safetensors", header, {"x": torch.zeros(2)})
        os.umask(before)
        assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == mode
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path / "m.safetensors", header, {"x": None})
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_file_that_may_not_be_read_is_not_called_truncated(monkeypatch, tiny_checkpoint):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tiny_checkpoint), "open", refuse)
    with pytest.raises(UserError, match="Permission denied") as error:
        checkpoint.read_header(tiny_checkpoint)
    assert "truncated" not in str(error.value)


def adam(*shapes):
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    return optimizer.state_dict(), [p.shape for p in parameters]


@pytest.mark.parametrize("what", ["empty", "list", "wrong shape", "fewer", "pickle", "missing"])
def test_a_damaged_optimizer_is_refused_without_torch_s_advice(tmp_path, what):
    state, sizes = adam((2, 3), (4,))
    path = tmp_path / "000007" / "optimizer.pt"
    path.parent.mkdir()
    sprung = tmp_path / "sprung"
    torch.save(state, path)
    found = checkpoint.read_optimizer(path, sizes)
    assert torch.equal(found[1]["exp_avg"], state["state"][1]["exp_avg"])
    if what == "empty":
        path.write_bytes(b"")
    elif what == "list":
        torch.save([1], path)
    elif what == "wrong shape":
        torch.save(adam((3, 2), (4,))[0], path)
    elif what == "fewer":
        torch.save(adam((2, 3))[0], path)
    elif what == "pickle":
        torch.save({"state": Trap(sprung)}, path)
    else:
        path.unlink()
    for device in ("", "cpu"):
        with pytest.raises(UserError, match="remove .*000007 to continue") as error:
            checkpoint.read_optimizer(path, sizes, device)
        said = str(error.value)
        assert "\n" not in said and "weights_only" not in said and not sprung.exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("step", torch.tensor(-1.0)),
        ("step", torch.tensor(math.nan)),
        ("step", 3.0),
        ("more", 1),
        ("more", torch.ones(2, 3)),
        ("exp_avg", torch.ones(2, 3, dtype=torch.complex64)),
        ("exp_avg", torch.ones(2, 3, dtype=torch.int32)),
    ],
    ids=str,
)
def test_what_adam_never_remembers_is_refused(tmp_path, name, value):
    state, sizes = adam((2, 3), (4,))
    path = tmp_path / "optimizer.pt"
    state["state"][0][name] = value
    torch.save(state, path)
    for device in ("", "cpu"):
        with pytest.raises(UserError, match="cannot read .*optimizer.pt"):
            checkpoint.read_optimizer(path, sizes, device)


def test_moments_that_no_gradient_has_are_refused_where_they_are_loaded(tmp_path):
    state, sizes = adam((2, 3), (4,))
    path = tmp_path / "optimizer.pt"
    state["state"][1]["exp_avg_sq"][2] = -1.0
    torch.save(state, path)
    checkpoint.read_optimizer(path, sizes)  # it reads no large tensor
    with pytest.raises(UserError, match="cannot read .*optimizer.pt"):
        checkpoint.read_optimizer(path, sizes, "cpu")


def saved_with(path: Path, vocabulary: str = "", stats: dict = STATS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = asdict(tiny_pi().config)
    checkpoint.save(path, Header("pi05", shape, stats, vocabulary), {"x": torch.zeros(1)})
    return path


def test_a_run_copied_to_another_clone_finds_its_vocabulary(monkeypatch, tmp_path):
    run = tmp_path / "run"
    weights = run / "checkpoints" / "000001" / "model.safetensors"
    saved_with(weights, "", OPENPI)
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    (tmp_path / "assets").mkdir()
    old = Path("/other/clone/assets/tokenizer.model")
    (run / "config.json").write_text(json.dumps({"train": {"tokenizer": str(old)}}))
    with pytest.raises(UserError, match="brings no tokeniser"):
        checkpoint.vocabulary(None, run, "pi05", old)
    for here in (tmp_path / "assets", run):  # shipped with this clone, then kept by the run
        (here / "tokenizer.model").touch()
        for given in (None, old):
            assert checkpoint.vocabulary(given, run, "pi05", old) == str(here / "tokenizer.model")


def test_no_other_file_takes_the_place_of_a_vocabulary_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "here")
    there = tmp_path / "there" / "assets" / "tokenizer.model"
    shipped = tmp_path / "here" / "assets" / "tokenizer.model"
    for file in (there, shipped):
        file.parent.mkdir(parents=True)
        file.write_text(str(file))
    run = tmp_path / "run"
    saved_with(run / "checkpoints" / "000001" / "model.safetensors", "", OPENPI)
    (run / "config.json").write_text(json.dumps({"train": {"tokenizer": str(there)}}))

    # What the run names comes before what this clone ships, and what a user gives is all there is.
    assert checkpoint.vocabulary(None, run, "pi05", shipped) == str(there)
    missing = Path("/nowhere/assets/tokenizer.model")
    given = checkpoint.vocabulary(missing, run, "pi05", shipped)
    with pytest.raises(UserError, match=f"no SentencePiece file at {missing}"):
        tokenize.load(given)


def test_a_checkpoint_finds_the_vocabulary_that_it_was_trained_with(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    shipped = tmp_path / "assets" / "tokenizer.model"
    shipped.parent.mkdir()
    shipped.write_text("shipped")
    beside = tmp_path / "elsewhere" / "tokenizer.model"
    weights = saved_with(tmp_path / "elsewhere" / "my.safetensors")
    assert checkpoint.vocabulary(None, weights, "pi05", shipped) == str(shipped)
    beside.write_text("other words")
    assert checkpoint.vocabulary(None, weights, "pi05", shipped) == str(beside)
    saved_with(weights, tokenize.fingerprint(shipped))
    assert checkpoint.read_header(weights).vocabulary == tokenize.fingerprint(shipped)
    assert checkpoint.vocabulary(None, weights, "pi05", shipped) == str(shipped)
    weights.with_suffix(".model").write_text("untrained")
    saved_with(weights, tokenize.fingerprint(weights.with_suffix(".model")))
    assert checkpoint.vocabulary(None, weights, "pi05", shipped) == str(
        tmp_path / "elsewhere/my.model"
    )

    # A run that is resumed after its vocabulary was replaced reads the copy that it kept.
    run = tmp_path / "run"
    saved_with(run / "checkpoints/000001/model.safetensors", tokenize.fingerprint(shipped))
    (run / "tokenizer.model").write_text("shipped")
    shipped.write_text("replaced")
    (run / "config.json").write_text(json.dumps({"train": {"tokenizer": str(shipped)}}))
    for given in (None, shipped):
        kept = checkpoint.vocabulary(given, run, "pi05", shipped)
        assert kept == str(run / "tokenizer.model")


@pytest.mark.parametrize("family", ["pi0", "pi05", "gr00t", "oft"])
def test_another_vocabulary_of_the_same_size_is_refused(family, tmp_path):
    paths = [tmp_path / "a.model", tmp_path / "b.model"]
    for path, word in zip(paths, ("push", "pull"), strict=True):
        tokenize.train_vocabulary([models.files(family).wording(f"{word} the drawer")], path)
    shape = asdict(models.files(family).embedded(family, str(paths[0])).config)
    header = Header(family, shape, STATS, tokenize.fingerprint(paths[0]))
    models.preparation(family, header, paths[0])
    models.preparation(family, header._replace(vocabulary=""), paths[1])  # as it was always
    with pytest.raises(UserError, match="b.model is not the vocabulary that the checkpoint"):
        models.preparation(family, header, paths[1])


def test_a_run_writes_down_its_vocabulary(tmp_path):
    config = Config()
    config.train.checkpoint = ASSETS / "pi05_metaworld.safetensors"
    config.train.tokenizer = ASSETS / "tokenizer.model"
    spec = metaworld.spec(("handle-press",), 64)
    words = tokenize.fingerprint(config.train.tokenizer)
    model = models.build(config, spec, weights="none")
    assert model.header.vocabulary == words
    config.train.checkpoint = tmp_path / "m.safetensors"
    checkpoint.save(tmp_path / "m.safetensors", model.header._replace(vocabulary="x"), {})
    header = checkpoint.read_header(tmp_path / "m.safetensors")
    assert header.vocabulary == "x"
