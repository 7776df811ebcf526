"""Every family under the one contract of `models/__init__.py`, at its embedded size; and `train.py
--model` with each of them.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, STATS
from safetensors.torch import save_file

import models
from config import Config
from envs import metaworld
from errors import UserError
from models import checkpoint, tokenize
from models.formats import pictures

FAMILIES = [name for name in models.MODELS if name != "emulated"]
SPEC = metaworld.spec(("handle-press",), 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoint with random weights and vocabulary, as `pretrain.py` writes them."""
    folder = tmp_path_factory.mktemp("families")
    found = {}

    def get(name: str):
        if name not in found:
            torch.manual_seed(0)
            family = models.files(name)
            vocabulary = folder / f"{name}.model"
            tokenize.train_vocabulary(
                [family.wording(task) for task in metaworld.PROMPTS.values()], vocabulary
            )
            model = family.embedded(name, str(vocabulary))
            with torch.no_grad():
                for (
                    parameter
                ) in model.parameters():  # none of them zero, so that each of them matters
                    parameter.add_(0.02 * torch.randn_like(parameter))
            path = folder / f"{name}.safetensors"
            checkpoint.save(
                path, checkpoint.Header(name, asdict(model.config), STATS), model.state_dict()
            )
            found[name] = path, vocabulary
        return found[name]

    return get


def built(made, name: str):
    config = Config()
    config.train.model = name
    (config.train.checkpoint, vocabulary) = made(name)
    model = models.build(config, SPEC)
    return model, models.preparation(name, model.header, str(vocabulary))


def observed(preparation, n: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 1, 64, 64, 3), np.uint8)
    states = rng.uniform(0.0, 0.8, (n, 4)).astype(np.float32)
    rows = [
        preparation.observe(image, state, SPEC.prompts[0])
        for image, state in zip(images, states, strict=True)
    ]
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_observed_acted_and_stored_fits_the_slots(made, name):
    model, preparation = built(made, name)
    n = 4
    obs = observed(preparation, 4)
    fields = model.observation_fields()
    assert {key: (tuple(x.shape[1:]), x.dtype) for key, x in obs.items()} == fields
    assert set(model.training_fields()) <= fields.keys() | model.slot_fields().keys()
    out = model.act(obs, model.draw([(1, i, 0, 0) for i in range(n)], [True] * n))
    assert out["actions"].shape == out["logprob"].shape == (n, 10, 4) and out["value"].shape == (n,)
    for key, (shape, dtype) in model.slot_fields().items():
        assert (out[key].shape[1:], out[key].dtype) == (shape, dtype), key
    executed = preparation.actions(out["actions"][0].numpy(), np.zeros(4, np.float32))
    assert executed.shape == (10, 4) and np.isfinite(executed).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluating_reproduces_the_behaviour_and_moves_with_the_weights(made, name):
    model, preparation = built(made, name)
    obs = observed(preparation, 3)
    out = model.act(obs, model.draw([(1, i, 0, 0) for i in range(3)], [True] * 3))
    batch = {key: (obs | out)[key].clone() for key in model.training_fields()}
    again = model.evaluate(batch)
    torch.testing.assert_close(
        again["logprob"].sum((1, 2)), out["logprob"].clone().sum((1, 2)), atol=1e-4, rtol=0.0
    )
    torch.testing.assert_close(again["value"], out["value"].clone(), atol=1e-4, rtol=0.0)
    (again["logprob"].sum() + again["value"].sum()).backward()
    trained = model.trainable()
    moved = [key for key, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) > 0.8 * len(trained) and any(key in model.critic() for key in moved)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert (
        model.evaluate(batch)["logprob"].sum((1, 2)) - out["logprob"].sum((1, 2))
    ).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_imitation_lowers_its_loss(made, name):
    torch.manual_seed(0)
    vocabulary = made(name)[1]
    model = models.files(name).embedded(name, str(vocabulary))
    preparation = models.files(name).preparation(
        checkpoint.Header(name, asdict(model.config), STATS), str(vocabulary)
    )
    obs = observed(preparation, 8)
    actions = torch.rand(8, 10, 4) - 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    draw = model.imitation_draw(8)
    for _ in range(25):
        loss = model.imitate(obs, actions, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("name", FAMILIES)
def test_a_broken_observation_is_named(made, name):
    _, preparation = built(made, name)
    image = np.zeros((1, 64, 64, 3), np.uint8)
    state = np.zeros(4, np.float32)
    preparation.observe(image, state, SPEC.prompts[0])
    for picture, robot, task in (
        (image.astype(np.float32), state, SPEC.prompts[0]),
        (image[0], state, SPEC.prompts[0]),
        (image, np.array([0.0, np.nan, 0.0, 0.0], np.float32), SPEC.prompts[0]),
        (image, state, "press the handle " * 30),
    ):
        with pytest.raises(UserError):
            preparation.observe(picture, robot, task)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_another_family_is_named(made, name):
    other = FAMILIES[FAMILIES.index(name) - 1]
    config = Config()
    config.train.model = name
    config.train.checkpoint = made(other)[0]
    with pytest.raises(UserError, match=f"'{other}' model: give --model {other}"):
        models.build(config, SPEC, weights="none")


def test_other_projects_checkpoints_tell_their_family(tmp_path):
    for names, key in {
        ("pi0", "pi05"): "paligemma_with_expert.a",
        ("gr00t",): "backbone.eagle_model.a",
        ("oft",): "vision_backbone.a",
    }.items():
        folder = tmp_path / names[0]
        folder.mkdir()
        save_file({key: torch.zeros(1)}, folder / "model-00001-of-00001.safetensors")
        for name in FAMILIES:
            if name in names:
                models.check_family(name, folder)
            else:
                with pytest.raises(
                    UserError, match=f"is of the family {' or '.join(names)}, not {name}"
                ):
                    models.check_family(name, folder)
    save_file({"something.else": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="of no family known here"):
        models.check_family("oft", tmp_path)


def test_frames_of_the_simulator_are_what_every_family_prepares(made):
    env = metaworld.Env(("handle-press",), 64)
    env.reset(0, 7)
    image, state = env.observe()
    env.close()
    for name in FAMILIES:
        _, preparation = built(made, name)
        assert preparation.observe(image, state, SPEC.prompts[0])["image"].shape == (1, 64, 64, 3)
    # Other projects' models resize them, each in its own way.
    small = (
        pictures.resize_pil(image[0], 56),
        pictures.resize_torch(torch.from_numpy(image).float() / 255, 56, 0.0),
    )
    small += pictures.crop_and_resize(image, 56), pictures.resize_eagle(image, 56)
    small += (pictures.resize_bicubic(torch.from_numpy(image), 56),)
    assert all(tuple(x.shape)[-3:-1] == (56, 56) for x in small)


@pytest.mark.parametrize("height, width", [(256, 256), (480, 640), (100, 75), (56, 90)])
def test_pictures_are_resized_to_the_bit_as_their_projects_write_it(height, width):
    """The same in another order of memory takes less time, and must give the same bits."""
    random = np.random.default_rng(height)
    image = random.integers(0, 256, (2, height, width, 3), np.uint8)
    image[1] = random.integers(0, 256)  # an even picture: rounding down must not darken it
    x = torch.from_numpy(image).permute(0, 3, 1, 2).float()
    like = {"align_corners": False, "antialias": True}

    wide = F.interpolate(x, (56, 56), mode="bicubic", **like).clamp(0, 255).round()
    found = pictures.resize_bicubic(torch.from_numpy(image), 56)
    assert torch.equal(found, wide.to(torch.uint8).permute(0, 2, 3, 1))

    high, across = int(height * 0.95), int(width * 0.95)
    top, left = round((height - high) / 2.0), round((width - across) / 2.0)
    middle = (x / 255.0)[:, :, top : top + high, left : left + across]
    small = F.interpolate(middle, (56, 56), mode="bilinear", **like)
    small = (small * 255.0).to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(torch.from_numpy(pictures.crop_and_resize(image, 56)), small)

    square = torch.from_numpy(image[:, :56, :56])
    low, *_, last = crop = crop_places(56)
    assert 0 < low < 2 and 53 < last < 55
    assert torch.equal(
        pictures.center_crop(square, pictures.crop_positions(square.shape[1])),
        cropped(square, torch.tensor(crop)),
    )


def crop_places(size: int, area: float = 0.9) -> list[float]:
    """Where the pixels of a centre crop lie in a row of the picture, as TensorFlow counts."""
    side = np.sqrt(np.float32(area))
    low = (np.float32(1.0) - side) / np.float32(2.0)
    step = (low + side - low) * np.float32(size - 1) / np.float32(size - 1)
    return list(low * np.float32(size - 1) + np.arange(size, dtype=np.float32) * step)


def cropped(image: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Interpolates between the four pixels around each place, as TensorFlow does."""
    x = image.float() * np.float32(1.0 / 255.0)
    low, high, part = at.floor().long(), at.ceil().long(), at - at.floor()
    rows = [x[:, i] for i in (low, high)]
    top, bottom = (r[:, :, low] + (r[:, :, high] - r[:, :, low]) * part[:, None] for r in rows)
    out = top + (bottom - top) * part[:, None, None]
    return (out.clamp(0.0, 1.0) * 255.5).to(torch.uint8)


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name != "pi05"]
)  # π0.5: tests/test_train.py
def test_training_from_end_to_end(cli, made, tmp_path, name):
    path, vocabulary = made(name)
    flags = (
        f"{SMALL} --model {name} --tasks handle-press --max-staleness 0 --iterations 2 "
        f"--checkpoint {path} --tokenizer {vocabulary}"
    )
    status, output = cli("train.py", f"{flags} --run {tmp_path / 'run'}").finish()
    assert status == 0 and "2 iterations done" in output, output
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:  # one minibatch is the whole batch, so its weights are the ones that acted
        assert (
            line["ratio_max"] == pytest.approx(1.0, abs=1e-4)
            and np.isfinite([line["loss_policy"], line["loss_value"]]).all()
        )
        assert line["grad_norm"] > 0
    assert lines[-1]["eval_episodes"] == 2
    saved = checkpoint.find(tmp_path / "run")
    assert checkpoint.read_header(saved).family == name
