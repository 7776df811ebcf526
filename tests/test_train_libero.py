"""Learning and evaluating on LIBERO from end to end, with its real pictures, and what a model
starts from there.
"""

import json

import numpy as np
import pytest
import torch

import envs
import models
from config import ROOT, Config
from errors import UserError
from models import checkpoint, untrained

try:
    libero = envs.load("libero").module
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(autouse=True)
def no_new_starts_are_left():
    """Random weights lie beside the runs; those that a test made go with it."""
    before = set((ROOT / "runs").glob("untrained_*"))
    yield
    for file in set((ROOT / "runs").glob("untrained_*")) - before:
        file.unlink()


TASKS = "turn_on_the_stove libero_goal_swap/put_the_bowl_on_the_plate"
TINY = (
    "--model pi05 --env libero --ratio 3:1 --image-size 32 --envs 2 --env-workers 2 --batch 2 "
    "--minibatch 2 --micro-batch 2 "
    "--update-epochs 1 --segment 2 --seed 1"
)


def test_three_iterations_and_an_evaluation(cli, tmp_path):
    """Two env processes with a task each, one of them of a perturbed suite (LIBERO-Pro); the small
    π0.5 sees both cameras."""
    run = tmp_path / "x"
    status, output = cli(
        "train.py", f"{TINY} --tasks {TASKS} --eval-envs 0 --iterations 3 --run {run}"
    ).finish(timeout=400)
    assert status == 0 and "3 iterations done" in output and "Traceback" not in output, output
    assert output.count("a small pi05 of random weights starts") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3] and all(
        line["samples_per_s"] > 0 for line in lines
    )
    assert lines[-1]["env_steps"] >= 3 * 2 * 2 * 10
    header = checkpoint.read_header(checkpoint.find(run))
    assert (header.shape["views"], header.shape["action_dim"], header.shape["image_size"]) == (
        2,
        7,
        32,
    )

    flags = (
        f"--checkpoint {run} --env libero --tasks turn_on_the_stove --episodes 1 --json "
        f"{tmp_path / 'e.json'}"
    )
    status, output = cli("evaluate.py", flags).finish(timeout=400)
    assert (
        status == 0
        and "turn_on_the_stove" in output
        and (run / "videos" / "000003" / "turn_on_the_stove.mp4").is_file()
    ), output
    assert [row["episodes"] for row in json.loads((tmp_path / "e.json").read_text())["rows"]] == [
        1,
        1,
    ]


def test_mistakes(cli, tmp_path):
    status, output = cli("evaluate.py", "--env libero").finish(timeout=60)
    assert (
        status == 2
        and output
        == "error: no checkpoint is shipped for libero: give --checkpoint, a file or a run\n"
    )
    status, output = cli("train.py", f"{TINY} --suite libero_11 --run {tmp_path / 'x'}").finish(
        timeout=60
    )
    assert (
        status == 2 and "unknown LIBERO task 'libero_11'" in output and output.count("\n") == 1
    ), output


@pytest.mark.parametrize("model", ["pi05", "pi0", "gr00t", "oft"])
def test_every_family_starts_from_random_weights(tmp_path, model):
    spec = libero.spec(("libero_goal",), 32)
    weights, vocabulary = untrained.start(tmp_path, model, spec, libero.STATE_RANGE, 10, 24)
    again = untrained.start(tmp_path, model, spec, libero.STATE_RANGE, 10, 24)
    assert again == (weights, vocabulary) and len(list(tmp_path.iterdir())) == 2
    other = untrained.start(
        tmp_path, model, spec._replace(image_size=64), libero.STATE_RANGE, 10, 24
    )
    assert other[0] != weights

    config = Config()
    config.train.model = model
    config.train.checkpoint = weights
    config.train.env = "libero"
    policy = models.build(config, spec)
    preparation = models.preparation(model, policy.header, str(vocabulary))
    picture = np.zeros((2, 32, 32, 3), np.uint8)
    state = np.array(libero.STATE_RANGE[1], np.float32)
    for prompt in spec.prompts:  # all of them fit
        row = preparation.observe(picture, state, prompt)
    obs = {name: torch.from_numpy(np.stack([x, x])) for name, x in row.items()}
    acted = policy.act(obs, policy.draw([(0, 0, 0, 0), (0, 1, 0, 0)], [True, True]))
    plan = preparation.actions(acted["actions"][0].numpy(), state)
    assert plan.shape == (10, 7) and np.isfinite(plan).all()
