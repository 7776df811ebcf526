"""OpenVLA-OFT: exact with the originals' numbers, folders in and out, bins, and a policy whose
log-prob repeats.
"""

import contextlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NOISE_KEYS, slopes
from safetensors.torch import load_file, save_file

import models
from benchmarks import originals
from config import Config
from envs import EnvSpec
from errors import UserError
from models import build, checkpoint, lora, tokenize
from models.formats import bins, peft, pictures, source
from models.formats import oft as oft_files
from models.oft import FULL, Oft, OftConfig

GOLDEN = Path(__file__).parent / "golden" / "oft"
FOLDERS = [GOLDEN, GOLDEN / "lora", GOLDEN / "official"]
CASES = json.loads((GOLDEN / "preprocessing.json").read_text())
TINY = {
    "image_size": 16,
    "dino_width": 16,
    "dino_depth": 1,
    "dino_heads": 2,
    "dino_mlp": 32,
    "siglip_width": 16,
    "siglip_depth": 1,
    "siglip_heads": 2,
    "siglip_mlp": 32,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "kv_heads": 2,
    "mlp": 48,
    "words": 60,
    "tokens": 8,
    "chunk": 3,
    "value_widths": (16,),
    "lora_rank": 3,
    "temperature": 1.6,
}
KEYS = [(1, lane, 2, 3) for lane in range(5)]


def tiny_oft(dtype: torch.dtype = torch.float32, **changes) -> Oft:
    """A model none of whose weights is zero, so that every one of them matters."""
    torch.manual_seed(0)
    model = Oft(OftConfig(**TINY | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def observations(model: Oft, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random frames, and prompts of different lengths."""
    c = model.config
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(
        0, 256, (n, c.views, c.image_size, c.image_size, 3), generator=random, dtype=torch.uint8
    )
    tokens = torch.randint(3, c.words, (n, c.tokens), generator=random, dtype=torch.int32)
    tokens[:, 0] = 1
    for i in range(n):
        tokens[i, 1 : 1 + i % 3] = c.pad
    return {"image": image, "tokens": tokens}


def stored(model: Oft, obs: dict, out: dict, rows=slice(None)) -> dict:
    """What `evaluate` finds in a slot."""
    return {name: (obs | out)[name][rows].clone() for name in model.training_fields()}


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_every_output_of_the_originals(folder):
    wanted = load_file(folder / "outputs.safetensors")
    found = originals.oft(folder)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        bound = 1e-4 * tensor.abs().max().item() if name.startswith("grad.") else 1e-4
        assert largest(found[name], tensor) <= bound, name
    assert {"features", "hidden", "logits", "loss", "greedy_actions"} <= wanted.keys()
    assert sum(name.startswith("grad.") for name in wanted) >= 12


@pytest.mark.parametrize(
    "change", [{"implement_version": "rlinf"}, {"center_crop": False}, {"num_images_in_input": 1}]
)
def test_parity_fails_where_the_original_does_something_else(tmp_path, change):
    for file in (GOLDEN / "official").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "num_images_in_input" in change:
        with pytest.raises(UserError, match="images"):
            originals.oft(tmp_path)
        return
    wanted = load_file(tmp_path / "outputs.safetensors")
    assert largest(originals.oft(tmp_path)["logits"], wanted["logits"]) > 1e-2


def test_the_published_configuration_is_the_full_size(tmp_path):
    # What config.json of openvla-7b and of its fine-tuned policies says; widths are the tools'
    # defaults.
    text = {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    }
    published = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "image_sizes": [224, 224],
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "text_config": text,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert oft_files.config_of(tmp_path) == replace(FULL["oft"], train="full")
    statistics = {"means": [[0.1, 0.2, 0.3], [0.5] * 3], "stds": [[0.4, 0.5, 0.6], [0.5] * 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    assert oft_files.config_of(tmp_path).dino_std == (0.4, 0.5, 0.6)


def test_parameter_count_at_full_size():
    with torch.device("meta"):
        model = Oft(FULL["oft"])

    def count(keep):
        return sum(p.numel() for n, p in model.named_parameters() if keep(n))

    own = count(lambda n: "lora_" not in n and not n.startswith("value_head."))
    assert abs(own / 7.50e9 - 1) < 0.005
    assert (
        count(lambda n: "lora_" in n) == 109_126_400
        and sum(p.numel() for p in model.trainable().values()) < 0.12e9
    )
    small = Oft(OftConfig())
    assert 1e6 < sum(p.numel() for p in small.parameters()) < 4e6


# ---------------------------------------------------------------- prompts, bins, statistics,
# pictures


@pytest.mark.parametrize("case", ["prompts_40", "prompts_56"])
def test_prompts(case):
    case = CASES[case]
    tokenizer = tokenize.load(str(GOLDEN / "tokenizer.model"))
    for task, text, ids, mask in zip(
        case["tasks"], case["text"], case["tokens"], case["mask"], strict=True
    ):
        assert oft_files.prompt(task) == text
        found = oft_files.encode(tokenizer, task, case["length"], case["pad"])
        assert (
            found.tolist() == ids
            and (found != case["pad"]).astype(int).tolist() == mask
            and found.dtype == np.int32
        )


def test_bins():
    case = CASES["encode_actions"]
    assert (
        bins.encode_actions(torch.tensor(case["actions"], dtype=torch.float64), 31744).tolist()
        == case["tokens"]
    )
    case = CASES["decode_tokens"]
    assert bins.decode_tokens(case["tokens"], 31744).tolist() == case["actions"]
    edges = torch.linspace(-1.0, 1.0, 256, dtype=torch.float64)
    centers = torch.from_numpy(bins.decode_tokens(np.arange(31744, 32000), 31744))
    torch.testing.assert_close(centers[1:].flip(0), (edges[:-1] + edges[1:]) / 2.0)
    assert (
        bins.decode_tokens(bins.encode_actions(centers, 31744).numpy(), 31744) == centers.numpy()
    ).all()


def test_statistics_and_grippers(tmp_path):
    case = CASES["unnormalise"]
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(case["statistics"]))
    stats = oft_files.read_statistics(tmp_path, case["unnorm_key"])
    assert stats == oft_files.read_statistics(tmp_path)
    raw = bins.unnormalise_actions(np.array(case["normalised"]), stats)
    assert raw.tolist() == case["actions"]
    # The inverse, by which demonstrations are prepared (`BOUNDS_Q99`)
    low, high = (np.array(stats[end]) for end in ("q01", "q99"))
    scaled = np.clip(2.0 * (raw - low) / (high - low + 1e-8) - 1.0, -1.0, 1.0)
    back = np.where(stats["mask"], scaled, raw)
    np.testing.assert_allclose(back, case["normalised"], atol=1e-7)
    case = CASES["gripper"]
    assert bins.libero_gripper(np.array(case["raw"])).tolist() == case["libero"]
    np.testing.assert_allclose(
        bins.widowx_gripper(np.array(case["raw"])), case["widowx"], atol=1e-7
    )
    table = bins.action_table(stats | {"gripper": "libero"}, 7)
    for token in (31744, 31800, 31999):
        normalised = np.full(7, bins.decode_tokens(token, 31744))
        wanted = bins.libero_gripper(bins.unnormalise_actions(normalised, stats))
        np.testing.assert_allclose(table[:, token - 31744], wanted, atol=1e-6)


def test_pictures():
    def as_tensor(x):
        return torch.tensor(x, dtype=torch.uint8)[None]

    case = CASES["center_crop"]
    image = as_tensor(case["image"])
    found = pictures.center_crop(image, pictures.crop_positions(image.shape[1]))
    assert torch.equal(found, as_tensor(case["out"]))
    case = CASES["resize_bicubic"]
    assert torch.equal(
        pictures.resize_bicubic(as_tensor(case["image"]), case["size"]), as_tensor(case["out"])
    )
    for name in ("lanczos_16_14", "lanczos_10_14"):
        case = CASES[name]
        assert torch.equal(
            originals.resize_lanczos(as_tensor(case["image"]), case["size"]), as_tensor(case["out"])
        )
    case = CASES["pixel_values"]
    with torch.device("meta"):
        model = Oft(
            replace(
                FULL["oft"],
                image_size=14,
                center_crop=False,
                width=32,
                depth=0,
                heads=1,
                kv_heads=1,
            )
        )
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(1))
    found = torch.cat(model.pixels(as_tensor(case["image"])[None]), 1).flatten(2)[0]
    assert largest(found, torch.tensor(case["out"])) < 1e-6


# ---------------------------------------------------------------- the policy


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": "full", "stop_token": False}, {"views": 2, "kv_heads": 1, "center_crop": True}],
)
def test_ratio_is_one_at_staleness_zero(changes):
    model = tiny_oft(**changes)
    obs = observations(model, 5)
    out = model.act(obs, model.draw(KEYS, [True] * 5))
    for rows in (slice(None), [3, 1]):  # trained in another company than it acted in
        again = model.evaluate(stored(model, obs, out, rows))
        for name in ("logprob", "value"):
            torch.testing.assert_close(again[name], out[name][rows], atol=1e-5, rtol=0)
    assert out["value"].abs().min() > 1e-4 and 0 < again["entropy"] < math.log(256)


def test_the_logprob_in_bf16():
    # Measured on a CPU with six seeds: acting and evaluating in bf16 agree exactly; bf16 is within
    # 0.033 of fp32 per token.
    model = tiny_oft()
    model.load_state_dict({name: x.bfloat16().float() for name, x in model.state_dict().items()})
    obs = observations(model, 5)
    exact = model.act(obs, model.draw(KEYS, [True] * 5))
    model = model.to(torch.bfloat16)
    assert largest(model.evaluate(stored(model, obs, exact))["logprob"], exact["logprob"]) <= 0.05
    out = model.act(obs, model.draw(KEYS, [True] * 5))
    for rows in (slice(None), [3, 1]):
        again = model.evaluate(stored(model, obs, out, rows))
        assert largest(again["logprob"], out["logprob"][rows]) <= 1e-4


def test_logprobs_are_of_a_tempered_softmax_over_the_action_words_alone():
    model = tiny_oft()
    c = model.config
    obs = observations(model, 4)
    out = model.act(obs, model.draw(KEYS[:4], [True] * 4))
    logits = model.lm_head(model.hidden(obs["image"], obs["tokens"]))
    logits[..., : c.words] = -math.inf
    logits[..., c.words + c.bins :] = -math.inf
    every = torch.distributions.Categorical(logits=logits / 1.6)
    expected = every.log_prob(out["action_tokens"].flatten(1).long()).view(4, c.chunk, c.action_dim)
    torch.testing.assert_close(out["logprob"], expected, atol=1e-5, rtol=0)
    assert out["action_tokens"].min() >= c.words and out["action_tokens"].max() < c.words + c.bins
    words = torch.distributions.Categorical(logits=logits[..., c.words : c.words + c.bins] / 1.6)
    torch.testing.assert_close(
        model.evaluate(stored(model, obs, out))["entropy"], words.entropy().mean()
    )
    decoded = bins.decode_tokens(out["action_tokens"].numpy(), c.words)
    np.testing.assert_allclose(out["actions"].numpy(), decoded, atol=1e-7)


def test_samples_follow_the_probabilities():
    model = tiny_oft()
    obs = {name: x.expand(400, *x.shape[1:]) for name, x in observations(model, 1).items()}
    out = model.act(obs, model.draw([(0, 0, 0, t) for t in range(400)], [True] * 400))
    logits = (
        model.action_logits(model.hidden(*(x[:1] for x in (obs["image"], obs["tokens"])))) / 1.6
    )
    probability = logits.softmax(-1)[0].cumsum(-1)  # [C·A, bins]
    index = out["action_tokens"].flatten(1).long() - model.config.words  # [400, C·A]
    for quantile in (0.25, 0.5, 0.75):
        below = probability <= quantile
        share = torch.stack([below[k][index[:, k]] for k in range(index.shape[1])]).float().mean()
        wanted = torch.where(below, probability, 0.0).amax(-1).mean()
        assert abs(share - wanted) < 0.03


def test_without_exploration_the_likeliest_bin_is_taken():
    model = tiny_oft()
    obs = observations(model, 4)
    noise = model.draw(KEYS[:4], [True, False, True, False])
    out = model.act(obs, noise)
    likeliest = (
        model.action_logits(model.hidden(obs["image"], obs["tokens"])).argmax(-1).view(4, 3, 4)
        + model.config.words
    )
    assert torch.equal(out["action_tokens"][[1, 3]].long(), likeliest[[1, 3]])
    assert not torch.equal(out["action_tokens"][[0, 2]].long(), likeliest[[0, 2]])


def test_noise_is_named_by_seed_lane_trajectory_and_step():
    model = tiny_oft()
    uniform = model.draw(NOISE_KEYS, [True] * 7)["uniform"]
    assert torch.equal(uniform[0], uniform[1]) and len(uniform[:, 0].unique()) == 6
    assert uniform.shape == (7, 12) and uniform.min() >= 0 and uniform.max() < 1


@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradient_of_logprob_matches_finite_differences(train):
    model = tiny_oft(torch.float64, train=train)
    obs = observations(model, 3)
    batch = stored(model, obs, model.act(obs, model.draw(KEYS[:3], [True] * 3)))
    trainable = model.trainable()
    tail = "lora_b" if train == "lora" else "weight"
    for layer in (
        "dino.patch_embed",
        "siglip.blocks.0.qkv",
        "projector.fc2",
        "language.0.q_proj",
        "language.1.down_proj",
    ):
        gradient, numeric = slopes(model, batch, trainable[f"{layer}.{tail}"], 1e-6)
        torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_what_reinforcement_learning_updates(train):
    model = tiny_oft(train=train)
    obs = observations(model, 2)
    trainable = model.trainable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    out = model.evaluate(stored(model, obs, model.act(obs, model.draw(KEYS[:2], [True] * 2))))
    (out["logprob"].sum() + out["value"].sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())
    everything = set(dict(model.named_parameters()))
    if train == "full":
        assert set(trainable) == everything and not any("lora" in n for n in everything)
    else:
        assert {n.split(".")[0] for n in trainable} == {
            "dino",
            "siglip",
            "projector",
            "language",
            "lm_head",
            "value_head",
        }
        linear = {n for n, m in model.named_modules() if hasattr(m, "add_lora")}
        assert {n.rpartition(".")[0] for n in trainable if "lora_" in n} == linear and len(
            linear
        ) == 2 * 5 + 3 + 2 * 7 + 1


def test_fresh_adapters_change_nothing_and_folding_them_keeps_the_function():
    model = tiny_oft(train="full")
    obs = observations(model, 3)
    before = model.hidden(obs["image"], obs["tokens"])
    model.config = replace(model.config, train="lora")
    lora.adapt(model, model.ADAPTED)
    assert torch.equal(model.hidden(obs["image"], obs["tokens"]), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted = model.hidden(obs["image"], obs["tokens"])
    assert largest(adapted, before) > 1e-2
    model.config = replace(model.config, train="full")
    lora.adapt(model, model.ADAPTED)
    assert largest(model.hidden(obs["image"], obs["tokens"]), adapted) < 1e-5
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_padding_changes_nothing_and_everything_else_does():
    model = tiny_oft()
    obs = observations(model, 3)
    noise = model.draw(KEYS[:3], [False] * 3)

    def look(o):
        return model.hidden(o["image"], o["tokens"])

    before = look(obs)
    with torch.no_grad():
        model.embed_tokens.weight[model.config.pad] += 10.0
    assert largest(look(obs)[1:], before[1:]) < 1e-6
    shorter = obs["tokens"][1:2, [0, *range(2, 8)]]  # the second prompt has one padding token
    assert largest(model.hidden(obs["image"][1:2], shorter), before[1:2]) < 1e-5
    for changed in (
        obs | {"image": 255 - obs["image"]},
        obs | {"tokens": obs["tokens"].roll(1, 1)},
    ):
        assert ((look(changed) - before).abs().amax((1, 2)) > 1e-3).all()
    assert ((model.act(obs, noise)["value"] - model.value(before)).abs() < 1e-5).all()


def test_attention_goes_both_ways():
    # The last blank influences what the first one predicts: with one action token more, everything
    # moves.
    long = tiny_oft()
    short = tiny_oft(chunk=2)
    short.load_state_dict(long.state_dict())
    obs = observations(long, 2)
    a = long.hidden(obs["image"], obs["tokens"], 1)
    b = short.hidden(obs["image"], obs["tokens"], 1)
    assert largest(a, b) > 1e-3


def test_imitation_learns():
    torch.manual_seed(0)
    model = Oft(OftConfig(**TINY | {"train": "full", "stop_token": False}))
    obs = observations(model, 8)
    actions = torch.rand(8, 3, 4) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        losses.append(model.imitate(obs, actions, {}))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------- folders in and out


# What the code of a policy with chunks of actions holds.
CHUNKS = "from prismatic.vla.constants import NUM_ACTIONS_CHUNK"


def write_folder(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """The first reference model as users have it: two shards with an index, statistics,
    configuration, an unrelated file."""
    folder.mkdir(exist_ok=True)
    weights = {name: x.to(dtype) for name, x in load_file(GOLDEN / "weights.safetensors").items()}
    weights = {name: x for name, x in (weights | changes).items() if x is not None}
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index |= {name: file for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = json.loads((GOLDEN / "config.json").read_text())
    (folder / "dataset_statistics.json").write_text(json.dumps(config.pop("norm_stats")))
    (folder / "config.json").write_text(json.dumps(config | {"implement_version": "official"}))
    (folder / "tokenizer.model").write_bytes(b"a file of somebody else")
    return folder


def spec(**changes) -> EnvSpec:
    return EnvSpec(("t",), ("p",), 1, 16, 4, 4, 100)._replace(**changes)


def settings(path: Path, chunk: int = 3, tokens: int = 9) -> Config:
    config = Config()
    config.train.model = "oft"
    config.train.checkpoint = path
    config.rollout.chunk = chunk
    config.rollout.tokens = tokens
    return config


def test_a_folder_is_read_and_written_back_byte_for_byte(tmp_path):
    folder = write_folder(tmp_path / "theirs")
    model = build(settings(folder), spec())
    kinds = {
        ("fp32" if p.dtype == torch.float32 else "bf16", n in model.trainable())
        for n, p in model.named_parameters()
    }
    assert kinds == {
        ("fp32", True),
        ("bf16", False),
    }  # frozen weights as in the file, what is trained in fp32
    source.save(model, tmp_path / "ours", oft_files.source_of(folder, model.config), folder)
    for file in folder.iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "ours").iterdir())) == 6


def test_a_folder_gives_the_original_s_numbers(tmp_path):
    folder = write_folder(tmp_path / "theirs", torch.float32)
    config = settings(folder)
    inputs = load_file(GOLDEN / "inputs.safetensors")
    wanted = load_file(GOLDEN / "outputs.safetensors")
    model = build(config, spec())
    model.config = replace(model.config, stop_token=False, temperature=1.6)  # RLinf's way with it
    out = model.act(
        inputs, {"uniform": torch.zeros(3, 12), "explore": torch.zeros(3, dtype=torch.bool)}
    )
    assert largest(out["actions"], wanted["greedy_actions"]) < 1e-6
    found = model.evaluate(inputs)
    assert (
        largest(found["logprob"], wanted["logprobs"]) < 1e-4
        and largest(found["value"], wanted["values"][:, 0]) < 1e-4
    )
    assert model.header.stats["q99"] == [0.9, 0.25, 0.13, 1.0] and model.config.train == "lora"


@pytest.mark.parametrize("value_head", [True, False])
def test_trained_adapters_go_back_into_the_folder(tmp_path, value_head):
    changes = (
        {}
        if value_head
        else {
            f"value_head.mlp.{k}": None
            for k in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")
        }
    )
    folder = write_folder(tmp_path / "theirs", torch.float32, **changes)
    model = build(settings(folder), spec())
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    source.save(model, tmp_path / "ours", oft_files.source_of(folder, model.config), folder)
    again = build(settings(tmp_path / "ours"), spec())
    obs = load_file(GOLDEN / "inputs.safetensors")
    assert (
        largest(
            again.hidden(obs["image"], obs["tokens"]), model.hidden(obs["image"], obs["tokens"])
        )
        < 1e-4
    )
    assert value_head == (largest(again.value_head[0].weight, model.value_head[0].weight) < 1e-6)
    theirs, ours = (source.layout(f) for f in (folder, tmp_path / "ours"))
    assert {k: (s.shape, s.dtype) for k, s in theirs.items()} == {
        k: (s.shape, s.dtype) for k, s in ours.items()
    }


def test_an_own_checkpoint_of_either_kind_can_be_trained_either_way(tmp_path):
    obs = None
    for saved in ("lora", "full"):
        model = tiny_oft(train=saved)
        obs = obs or observations(model, 2)
        stats = {"q01": [-1.0] * 4, "q99": [2.0] * 4, "mask": [True, True, True, False]}
        path = tmp_path / f"{saved}.safetensors"
        checkpoint.save(
            path, checkpoint.Header("oft", asdict(model.config), stats), model.state_dict()
        )
        for wanted in ("lora", "full"):
            config = settings(path, tokens=8)
            config.actor.oft_train = wanted
            found = build(config, spec(image_size=16))
            sized = build(config, spec(image_size=16), weights="none")
            assert found.config.train == wanted and any(
                "lora_" in n for n in found.trainable()
            ) == (wanted == "lora")
            assert largest(found.hidden(*obs.values()), model.hidden(*obs.values())) < 1e-5
            assert (
                all(p.is_meta for p in sized.parameters())
                and sized.slot_fields() == found.slot_fields()
            )
            assert {n: p.shape for n, p in sized.trainable().items()} == {
                n: p.shape for n, p in found.trainable().items()
            }
            assert found.action_table.max() > 1.9
            repeated = build(config, spec(image_size=16))
            assert all(
                torch.equal(a, b)
                for a, b in zip(found.parameters(), repeated.parameters(), strict=True)
            )


def test_adapters_of_the_original_tools_load_on_their_own(tmp_path):
    weights = load_file(GOLDEN / "lora" / "weights.safetensors")
    adapters = {k: x for k, x in weights.items() if ".lora_" in k}
    adapters["base_model.model.language_model.lm_head.base_layer.weight"] = weights[
        "language_model.lm_head.weight"
    ]
    save_file(adapters, tmp_path / "adapter_model.safetensors")
    says = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(says))
    config = oft_files.config_of(GOLDEN / "lora").with_lora(0, None, ())
    model = Oft(config)
    adapter = peft.read(tmp_path, tmp_path, model, oft_files.source_of(None, config))
    adapter.put(model)
    assert set(adapter.layers) == set(lora.layers(model)) and adapter.rank == 2
    key = "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_A.weight"
    assert torch.equal(model.dino.patch_embed.lora_a, adapters[key])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"projector.fc2.bias": None}, "projector.fc2.bias"),
        ({"language_model.model.layers.3.mlp.up_proj.weight": torch.zeros(2, 2)}, "layers.3"),
        ({"vision_backbone.featurizer.blocks.3.norm1.weight": torch.zeros(16)}, "blocks.3"),
        ({"language_model.lm_head.weight": torch.zeros(447, 24)}, r"lm_head.*447"),
    ],
)
def test_a_missing_extra_or_misshapen_key_is_named(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        build(settings(write_folder(tmp_path / "theirs", **changes)), spec(), weights="none")


def test_a_published_model_takes_pictures_of_any_size_and_ours_only_its_own(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    words = tokenize.load(str(GOLDEN / "tokenizer.model"))
    config = settings(write_folder(tmp_path / "theirs"))
    config.rollout.tokens = 24
    model = build(config, spec(image_size=32))
    ready = oft_files.Preparation(model.config, model.header.stats, words)
    found = ready.observe(frame, np.zeros(3), "go")["image"]
    assert np.array_equal(found, pictures.resize_bicubic(torch.from_numpy(frame), 16).numpy())
    assert np.array_equal(ready.observe(found, np.zeros(3), "go")["image"], found)
    with pytest.raises(UserError, match=r"the model needs \[1, 16, 16, 3\]"):
        oft_files.Preparation(model.config, {}, words).observe(frame, np.zeros(3), "go")


def test_chunk_and_views_are_what_the_checkpoint_was_trained_with(tmp_path):
    folder = write_folder(tmp_path / "theirs")
    with pytest.raises(UserError, match="chunk = 3 and the run asks for 4"):
        build(settings(folder, chunk=4), spec())
    config = settings(folder)
    assert build(config, spec(views=2), weights="none").config.views == 1
    assert "cameras" not in models.assumptions(config, spec(views=2))
    config.env.cameras = 2
    with pytest.raises(UserError, match="views = 1 and the run asks for 2"):
        build(config, spec(views=2))
    with pytest.raises(UserError, match="--cameras 2 is more than the 1 that the simulator has"):
        build(config, spec())
    says = json.loads((folder / "config.json").read_text())
    del says["num_images_in_input"]  # as the published ones: RLinf's and openvla-oft's code take 1
    (folder / "config.json").write_text(json.dumps(says))
    assert build(config, spec(views=2), weights="none").config.views == 2
    assert "cameras" not in models.assumptions(config, spec(views=2))
    config.env.cameras = 0
    assert build(config, spec(views=2), weights="none").config.views == 1
    assert "cameras = 1 (RLinf's" in models.assumptions(config, spec(views=2))
    assert "cameras" not in models.assumptions(config, spec())  # with one there is no question


@pytest.mark.parametrize("robot, name", [("libero", "libero"), ("widowx", "widowx"), ("", "")])
def test_the_robot_says_what_its_gripper_is_told(tmp_path, robot, name):
    model = build(settings(write_folder(tmp_path / "theirs")), spec(robot=robot))
    stats = model.header.stats
    assert (stats["gripper"], stats["fit"]) == (name, "bicubic")
    told = bins.action_table(stats, 4)[3]
    assert set(told) == ({-1.0, 1.0} if robot else set(told)) and len(told) == 256
    two = spec(robot="panda and widowx")
    with pytest.raises(UserError, match="one robot, and the tasks have panda and widowx"):
        build(settings(tmp_path / "theirs"), two)


def test_what_rlinf_and_openvla_oft_leave_unsaid(tmp_path):
    folder = write_folder(tmp_path / "theirs")
    assert models.assumptions(settings(folder), spec()) == ""
    says = json.loads((folder / "config.json").read_text())
    del says["implement_version"], says["center_crop"], says["temperature"]
    (folder / "config.json").write_text(json.dumps(says))
    config = settings(folder)
    line = models.assumptions(config, spec())
    assert line.endswith(
        "temperature = 1.6 (as published on LIBERO), center_crop = False (RLinf's), "
        "stop_token = False (RLinf's)\n"
    )
    c = build(config, spec(), weights="none").config
    assert (c.center_crop, c.stop_token) == (False, False)
    del says["num_action_chunks"]  # RLinf's mark; the value head is another
    (folder / "modeling_prismatic.py").write_text(CHUNKS)
    (folder / "config.json").write_text(json.dumps(says))
    assert "horizon = 8" in models.assumptions(config, spec())
    config.rollout.horizon = 3
    assert build(config, spec(), weights="none").config.stop_token is False
    heads = [key for key in source.layout(folder) if key.startswith("value_head.")]
    write_folder(folder, **dict.fromkeys(heads))
    (folder / "config.json").write_text(json.dumps(says))
    line = models.assumptions(config, spec())
    assert "center_crop = True (openvla-oft's), stop_token = True (openvla-oft's)\n" in line
    config.rollout.center_crop, config.rollout.stop_token = False, False
    c = build(config, spec(), weights="none").config
    assert (c.center_crop, c.stop_token, c.chunk) == (False, False, 3)
    assert "crop" not in models.assumptions(config, spec())


def test_folders_of_something_else_are_refused(tmp_path, tiny_checkpoint):
    folder = write_folder(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match="pi05"):
        build(settings(tiny_checkpoint), spec())
    with pytest.raises(UserError, match="no checkpoint"):
        build(settings(tmp_path / "nothing"), spec())
    with pytest.raises(UserError, match="4 action dimensions|action_dim = 4"):
        build(settings(folder), spec(action_dim=7))
    (folder / "config.json").write_text(
        json.dumps(config | {"vision_backbone_id": "siglip-vit-so400m"})
    )
    with pytest.raises(UserError, match="siglip-vit-so400m"):
        build(settings(folder), spec())
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        oft_files.config_of(folder)


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("action_head--50000_checkpoint.pt", "", "continuous policy: it has action_head--50000"),
        ("proprio_projector--latest_checkpoint.pt", "", "continuous policy: it has proprio_proj"),
        ("modeling_prismatic.py", "class OpenVLAForActionPrediction: ...", "plain OpenVLA"),
        ("dataset_statistics.json", None, "plain OpenVLA"),
        ("modeling_prismatic.py", None, "lacks modeling_prismatic.py, which tells: download"),
    ],
)
def test_policies_with_the_same_tensors_and_another_decoding_are_refused(
    tmp_path, file, text, named
):
    folder = write_folder(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    del config["num_action_chunks"], config["implement_version"]  # RLinf's alone
    (folder / "config.json").write_text(json.dumps(config))
    code = folder / "modeling_prismatic.py"
    code.write_text(CHUNKS)
    oft_files.check_decoding(folder)
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(UserError, match=named):
        build(settings(folder), spec(), weights="none")


@pytest.mark.parametrize(
    ("chunks", "code", "good"), [(3, "", True), (3, "x", False), (1, "", False)]
)
def test_a_number_of_chunks_says_less_than_code(tmp_path, chunks, code, good):
    folder = write_folder(tmp_path / "theirs")
    says = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(says | {"num_action_chunks": chunks}))
    if code:
        (folder / "modeling_prismatic.py").write_text(code)
    with contextlib.nullcontext() if good else pytest.raises(UserError, match="plain OpenVLA"):
        oft_files.check_decoding(folder)


def test_statistics_that_do_not_go_together_are_refused(tmp_path):
    folder = write_folder(tmp_path / "theirs")
    file = folder / "dataset_statistics.json"
    said = json.loads(file.read_text())
    next(iter(said.values()))["action"]["q01"].pop()
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match="q01 and q99 of one length|q99 and q01 of one length"):
        build(settings(folder), spec(), weights="none")


def test_statistics_of_an_unknown_data_set_are_refused(tmp_path):
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"a": {"action": {}}, "b": {}}))
    for key, message in (
        ("", "choose one of a, b"),
        ("c", "'c': choose one of a, b"),
        ("a", "lack"),
    ):
        with pytest.raises(UserError, match=message):
            oft_files.read_statistics(tmp_path, key)
    with pytest.raises(UserError, match="config.json"):
        oft_files.read_statistics(tmp_path / "nothing")
    with pytest.raises(UserError, match="2 action dimensions"):
        bins.action_table({"q01": [0, 0], "q99": [1, 1], "mask": [True, True]}, 7)


@pytest.mark.parametrize("file", ["dataset_statistics.json", "config.json"])
def test_a_number_that_is_none_is_named_by_file_and_key(tmp_path, file):
    folder = write_folder(tmp_path / "theirs")
    says = json.loads((folder / file).read_text())
    if file == "config.json":
        says["text_config"]["rms_norm_eps"] = math.inf
    else:
        says["tiny_no_noops"]["action"]["q99"][2] = math.nan
    (folder / file).write_text(json.dumps(says))
    with pytest.raises(UserError, match=f"{file}: .*(q99.2 is nan|rms_norm_eps is inf), not a"):
        build(settings(folder), spec(), weights="none")


@pytest.mark.parametrize(
    "wrong", [torch.float32, (2, 1, 16, 16, 3, 1), (2, 1, 15, 16, 3), (2, 2, 16, 16, 3)]
)
def test_a_wrong_picture_is_refused(wrong):
    model = tiny_oft()
    obs = observations(model, 2)
    image = (
        obs["image"].to(wrong)
        if isinstance(wrong, torch.dtype)
        else torch.zeros(wrong, dtype=torch.uint8)
    )
    with pytest.raises(UserError, match="images are .* and the model needs"):
        model.act(obs | {"image": image}, model.draw(KEYS[:2], [True] * 2))


def test_a_wrong_prompt_or_state_is_refused(tmp_path):
    tokenizer = tokenize.load(str(GOLDEN / "tokenizer.model"))
    with pytest.raises(UserError, match="needs 24 tokens and the model has room for 23"):
        oft_files.encode(tokenizer, "open the middle drawer of the cabinet", 23, 0)
    ready = oft_files.Preparation(OftConfig(tokens=40), {}, tokenizer)
    with pytest.raises(UserError, match="not a number in dimension 1"):
        ready.observe(np.zeros((1, 64, 64, 3), np.uint8), np.array([0.1, np.nan]), "open")


def test_the_embedded_vocabulary_holds_a_prompt(tmp_path):
    tasks = ["press the button from above", "unplug the peg from the side of the box"]
    tokenize.train_vocabulary([oft_files.prompt(task) for task in tasks], tmp_path / "t.model")
    tokenizer = tokenize.load(str(tmp_path / "t.model"))
    for task in tasks:
        ids = oft_files.encode(tokenizer, task, OftConfig.tokens, OftConfig.pad)
        assert ids[0] == 1 and ids[-1] == tokenizer.piece_to_id("▁")
        assert ids.tolist().count(tokenizer.unk_id()) == 1  # the line break
