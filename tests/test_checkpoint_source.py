"""Other projects' layouts: parts of tensors, shards, ties; bytes that go back as they came; little
memory; errors by name.
"""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import originals
from config import ROOT
from errors import UserError
from models import checkpoint, convert
from models.formats import source
from models.formats.source import Source

SOURCE = Source(
    (
        (r"linear\.weight", ("q", "k", "v")),
        (r"linear\.bias", "b"),
        (r"words\.weight", "head"),
        (r"scale", "s"),
    ),
    (r"junk\..*",),
    (("head", "emb"),),
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = None
        self.linear = nn.Linear(3, 6)
        self.words = nn.Embedding(5, 3)
        self.register_buffer("scale", torch.zeros(()))
        self.own = nn.Linear(2, 2)  # a head that the layout does not know


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    found = {
        "q": torch.randn(2, 3),
        "k": torch.randn(1, 3),
        "v": torch.randn(3, 3),
        "b": torch.randn(6),
        "head": torch.randn(5, 3),
    }
    found = {key: x.bfloat16() if key in "qkv" else x for key, x in found.items()}
    return found | {
        "s": torch.tensor(3.0),
        "junk.count": torch.tensor(7),
        "junk.x": torch.randn(4, 2).half(),
    }


def on_disk(folder, shards: int, tensors: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "assets" / "robot").mkdir(parents=True)
    (folder / "assets" / "robot" / "norm_stats.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("hidden")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {
        key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, key in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file(
            {k: x for k, x in tensors.items() if weight_map[k] == file},
            folder / file,
            {"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(source, "BLOCK", 8)  # bytes: a row at a time


@pytest.mark.parametrize("like", ["theirs", "theirs/model.safetensors"])
def test_an_export_that_fails_leaves_nothing_and_overwrites_nothing(tmp_path, monkeypatch, like):
    on_disk(tmp_path / "theirs", 1, weights())
    with torch.device("meta"):
        model = Model()
    model.own = nn.Linear(2, 2)
    source.load(model, tmp_path / "theirs", SOURCE, "cpu", None)
    write = source.write_like

    def full(tensor_of, out, *_):
        out.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(source, "write_like", full)
    with pytest.raises(OSError, match="No space"):
        source.save(model, tmp_path / "new", SOURCE, tmp_path / like)
    assert os.listdir(tmp_path) == ["theirs"]

    def meanwhile(*given):
        (tmp_path / "new").write_bytes(b"another program's")
        write(*given)

    monkeypatch.setattr(source, "write_like", meanwhile)
    with pytest.raises(UserError, match="has appeared meanwhile: what was to be written there is"):
        source.save(model, tmp_path / "new", SOURCE, tmp_path / like)
    assert (tmp_path / "new").read_bytes() == b"another program's"


@pytest.mark.parametrize("shards", [1, 3])
def test_roundtrip(tmp_path, shards):
    on_disk(tmp_path / "theirs", shards, weights())
    with torch.device("meta"):
        model = Model()
    model.own = nn.Linear(2, 2)
    source.load(model, tmp_path / "theirs", SOURCE, "cpu", None)
    w = weights()
    assert (
        torch.equal(model.linear.weight, torch.cat([w["q"], w["k"], w["v"]]))
        and model.linear.weight.dtype == torch.bfloat16
    )
    assert (
        torch.equal(model.words.weight, w["head"])
        and model.scale == 3.0
        and isinstance(model.words.weight, nn.Parameter)
    )

    saved = tmp_path / "ours"
    source.save(model, saved, SOURCE, tmp_path / "theirs")
    written = {file.name: file.stat().st_mtime_ns for file in saved.iterdir()}
    with pytest.raises(UserError, match="has appeared meanwhile: what was to be written there is"):
        source.save(model, saved, SOURCE, tmp_path / "theirs")
    assert written == {file.name: file.stat().st_mtime_ns for file in saved.iterdir()}
    for kept in tmp_path.glob(".ours.*.partial"):
        shutil.rmtree(kept)
    theirs = {
        f.relative_to(tmp_path / "theirs"): f.read_bytes()
        for f in (tmp_path / "theirs").rglob("*")
        if f.is_file()
    }
    ours = {f.relative_to(saved): f.read_bytes() for f in saved.rglob("*") if f.is_file()}
    assert ours == {
        name: data for name, data in theirs.items() if name.parts[0] != ".cache"
    }  # byte for byte
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]

    with torch.no_grad():
        model.linear.weight[2] = 9.0
    trained = tmp_path / "trained"
    source.save(model, trained, SOURCE, tmp_path / "theirs")
    again = {k: x for file in trained.glob("*.safetensors") for k, x in load_file(file).items()}
    assert (again["k"] == 9.0).all() and all(
        torch.equal(again[key], w[key]) for key in w if key != "k"
    )


def test_shards_without_an_index(tmp_path):
    on_disk(tmp_path / "theirs", 3, weights())
    assert not checkpoint.is_ours(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors.index.json").unlink()
    assert not checkpoint.is_ours(tmp_path / "theirs")
    model = Model()
    source.load(model, tmp_path / "theirs", SOURCE, "cpu", None)
    assert torch.equal(model.words.weight, weights()["head"])
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.is_ours(tmp_path)


def test_dtype_is_chosen_by_the_caller(tmp_path):
    on_disk(tmp_path / "theirs", 1, weights())
    model = Model()
    source.load(model, tmp_path / "theirs", SOURCE, "cpu", torch.float32)
    assert model.linear.weight.dtype == model.words.weight.dtype == torch.float32
    source.load(
        model,
        tmp_path / "theirs",
        SOURCE,
        "cpu",
        lambda name: torch.float16 if name.startswith("words") else torch.float32,
    )
    assert model.words.weight.dtype == torch.float16 and model.linear.bias.dtype == torch.float32
    file = tmp_path / "theirs" / "model.safetensors"
    source.save(model, tmp_path / "one.safetensors", SOURCE, file)  # a file for a file
    assert load_file(tmp_path / "one.safetensors")["head"].dtype == torch.float32  # as theirs


def test_checking_reads_nothing(tmp_path):
    on_disk(tmp_path / "theirs", 1, weights())
    with torch.device("meta"):
        model = Model()
    source.load(model, tmp_path / "theirs", SOURCE, "meta", None)
    assert all(p.is_meta for p in model.parameters())


def test_a_tied_tensor_may_stand_under_either_name_or_both(tmp_path):
    w = weights()
    head = w.pop("head")
    for i, held in enumerate(({"head": head}, {"emb": head}, {"head": head, "emb": head.clone()})):
        on_disk(tmp_path / str(i), 1, w | held)
        model = Model()
        source.load(model, tmp_path / str(i), SOURCE, "cpu", None)
        with torch.no_grad():
            model.words.weight.mul_(2.0)
        source.save(model, tmp_path / f"saved{i}", SOURCE, tmp_path / str(i))
        saved = load_file(tmp_path / f"saved{i}" / "model.safetensors")
        assert saved.keys() == (w | held).keys() and all(
            torch.equal(saved[key], 2.0 * head) for key in held
        )


def test_gradients_go_by_their_names(tmp_path):
    on_disk(tmp_path / "theirs", 1, weights())
    model = Model()
    source.load(model, tmp_path / "theirs", SOURCE, "cpu", torch.float32)
    (model.linear.weight * torch.arange(6.0)[:, None]).sum().backward()
    found = originals.gradients(model, tmp_path / "theirs", SOURCE)
    assert {key: x[:, 0].tolist() for key, x in found.items()} == {
        "grad.q": [0, 1],
        "grad.k": [2],
        "grad.v": [3, 4, 5],
    }


def change(tensors: dict, how: str) -> dict:
    if how == "missing":
        del tensors["k"]
    elif how == "extra":
        tensors["adapter"] = torch.zeros(2)
    elif how == "shape":
        tensors["b"] = torch.zeros(5)
    elif how == "part":
        tensors["v"] = torch.zeros(4, 3)
    elif how == "width":
        tensors["k"] = torch.zeros(1, 4)
    return tensors


@pytest.mark.parametrize(
    "how, words",
    [
        ("missing", "no tensor 'k'"),
        ("extra", "a tensor 'adapter' that the model does not know"),
        ("shape", r"'b' is \[5\], the model needs \[6\] for 'linear.bias'"),
        ("part", r"\[2, 3\] \+ \[1, 3\] \+ \[4, 3\], the model needs \[6, 3\]"),
        ("width", r"\[2, 3\] \+ \[1, 4\] \+ \[3, 3\]"),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_key_that_does_not_fit_is_named(tmp_path, how, words, shards):
    on_disk(tmp_path / "theirs", shards, change(weights(), how))
    model = Model()
    before = model.linear.bias.clone()
    with pytest.raises(UserError, match=words) as error:
        source.load(model, tmp_path / "theirs", SOURCE, "cpu", None)
    assert "\n" not in str(error.value) and torch.equal(
        model.linear.bias, before
    )  # nothing is half loaded


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "module._orig_mod.", "junk"])
def test_what_wrappers_put_into_keys_is_left_out(tmp_path, before, shards):
    on_disk(tmp_path / "plain", shards, weights())
    wrapped = {before.replace("junk", "_orig_mod.module.") + key: x for key, x in weights().items()}
    if before == "junk":  # a compiled part of a model
        wrapped |= {"junk._orig_mod.x": wrapped.pop("_orig_mod.module.junk.x")}
    on_disk(tmp_path / "theirs", shards, wrapped)
    assert source.layout(tmp_path / "theirs").keys() == weights().keys()
    model = Model()
    source.load(model, tmp_path / "theirs", SOURCE, "cpu", torch.float32)
    assert torch.equal(model.words.weight, weights()["head"]) and model.scale == 3.0
    source.save(model, tmp_path / "ours", SOURCE, tmp_path / "theirs")
    for file in (tmp_path / "theirs").glob("*.safetensors"):  # under the names that it had
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()


def test_one_key_under_two_names_is_refused(tmp_path):
    on_disk(tmp_path / "theirs", 1, weights() | {"module.b": torch.zeros(6)})
    with pytest.raises(UserError, match="has '(module.)?b' twice"):
        source.layout(tmp_path / "theirs")


@pytest.mark.parametrize(
    "file, words",
    [
        ("adapter_config.json", "a PEFT adapter .* merge_and_unload"),
        ("adapter_model.safetensors", "a PEFT adapter .* merge_and_unload"),
        ("actor/model_state_dict/full_weights.pt", "python -m models.convert"),
        ("pytorch_model-00001-of-00002.bin", "python -m models.convert"),
        ("params/manifest.ocdbt", "convert_jax_model_to_pytorch.py"),
        ("actor/dcp_checkpoint/__0_0.distcp", "convert_dcp_to_pt.py"),
    ],
)
def test_other_kinds_of_checkpoints_are_named(tmp_path, file, words):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    for given in (tmp_path, tmp_path / file):
        with pytest.raises(UserError, match=words) as error:
            checkpoint.is_ours(given)
        assert "\n" not in str(error.value)
    on_disk(tmp_path / "theirs", 1, weights())  # beside them, what can be read is read
    shutil.copytree(tmp_path / "theirs", tmp_path, dirs_exist_ok=True)
    assert not checkpoint.is_ours(tmp_path)


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    shard = "model-00001-of-00001.safetensors"
    save_file({"x": torch.zeros(2)}, folder / shard)
    saved = tmp_path / "full_weights.pt"
    torch.save({"x": torch.ones(2)}, saved)
    for left in (shard, source.INDEX):
        with pytest.raises(UserError, match=f"{left} exists already: give another folder"):
            convert.main(saved, folder)
        (folder / source.INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
        (folder / shard).unlink(missing_ok=True)
    save_file({"x": torch.zeros(2)}, folder / shard)
    assert source.weight_files(folder) == [folder / shard]
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="holds model.safetensors beside the weights that .* lists"):
        source.weight_files(folder)
    (folder / source.INDEX).write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    assert source.weight_files(folder) == [folder / "model.safetensors"]
    with pytest.raises(UserError, match="full_weights.pt is a file: give a folder"):
        convert.main(saved, saved)


def test_weights_that_torch_saved_are_converted(tmp_path):
    saved = tmp_path / "full_weights.pt"
    out = tmp_path / "folder"
    torch.save(weights() | {"emb": weights()["head"].T.contiguous().T}, saved)
    convert.main(saved, out)
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights().keys() | {"emb"} and os.listdir(out) == ["model.safetensors"]
    assert all(torch.equal(found[key], x) for key, x in weights().items())
    with pytest.raises(UserError, match="exists already"):
        convert.main(saved, out)
    tied = weights()
    torch.save(tied | {"emb": tied["head"]}, saved)
    convert.main(saved, tmp_path / "tied")
    assert torch.equal(load_file(tmp_path / "tied" / "model.safetensors")["emb"], tied["head"])


@pytest.mark.parametrize("what", ["none", "empty", "list", "nested", "pickle"])
def test_what_torch_saved_of_another_kind_is_refused_and_not_unpickled(tmp_path, what):
    saved = tmp_path / "full_weights.pt"
    if what == "empty":
        saved.touch()
    elif what != "none":
        trap = pathlib.PurePosixPath("/")  # any class that is not torch's
        torch.save(
            {"list": [1], "nested": {"a": {"b": torch.ones(1)}}, "pickle": trap}[what], saved
        )
    with pytest.raises(UserError, match="cannot read weights from") as error:
        convert.main(saved, tmp_path / "out")
    said = str(error.value)
    assert "\n" not in said and "weights_only" not in said and not (tmp_path / "out").exists()


def test_damaged_files_are_refused(tmp_path):
    folder = tmp_path / "theirs"
    on_disk(folder, 3, weights())
    first = sorted(folder.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    for damaged, words in (
        (whole[:-3], "truncated"),
        (whole[:20], "truncated"),
        (b"", "truncated"),
        (b"x" * 100, "not a safetensors file"),
        (whole + b"more", "not what its header says"),
    ):
        first.write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            source.load(Model(), folder, SOURCE, "cpu", None)
    first.unlink()
    with pytest.raises(UserError, match=f"lacks its file {first.name}"):
        source.load(Model(), folder, SOURCE, "cpu", None)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        source.load(Model(), folder, SOURCE, "cpu", None)
    with pytest.raises(UserError, match="no checkpoint at"):
        source.load(Model(), tmp_path / "nowhere", SOURCE, "cpu", None)


def test_the_index_must_agree_with_the_shards(tmp_path):
    folder = tmp_path / "theirs"
    on_disk(folder, 2, weights())
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"]["lost"] = said["weight_map"]["q"]
    index.write_text(json.dumps(said))
    with pytest.raises(UserError, match="no tensor 'lost'"):
        source.load(Model(), folder, SOURCE, "cpu", None)


MEMORY = """
import sys
import torch
from torch import nn
from models.formats import source
def high_water():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
source.BLOCK = 4 * 2**20
with torch.device("meta"):
    model = nn.Linear(5000, 8000)
model.config = None
layout = source.Source((("weight", ("a", "b")), ("bias", "c")))
torch.zeros(10).sum()
start = high_water()
source.load(model, sys.argv[1], layout, "cpu", None)
loaded = high_water()
source.save(model, sys.argv[1] + ".saved", layout, sys.argv[1])
print(loaded - start, high_water() - start, float(model.weight.sum()))
"""


def test_loading_and_saving_hold_one_copy(tmp_path):
    # 160 MB
    file = tmp_path / "big.safetensors"
    size = 4 * (8000 * 5000 + 8000)
    save_file(
        {"a": torch.ones(2000, 5000), "b": torch.ones(6000, 5000), "c": torch.ones(8000)}, file
    )
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    loaded, saved, total = map(float, out.stdout.split())
    assert total == 8000 * 5000 and loaded < 1.2 * size and saved < 1.2 * size, (
        loaded / size,
        saved / size,
    )
