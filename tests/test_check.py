"""The user's smoke test says what it should, and draws what it saw."""

import imageio.v2 as imageio
import numpy as np
import pytest

import envs
from config import UserError
from envs.alone import Alone
from envs.check import CheckConfig, main


def test_meta_world(tmp_path, capsys):
    config = CheckConfig(
        tasks=("handle-press", "reach"),
        at_most=1,
        image_size=32,
        steps=60,
        out=tmp_path / "sheet.png",
    )
    main(config)
    text = capsys.readouterr().out
    assert "2 tasks, 1 cameras of 32 pixels, state [4], action [4]" in text
    assert (
        "handle-press, random" in text
        and "handle-press, expert" in text
        and "success after" in text
        and "reach" not in text
    )
    assert "memory in MB" in text and str(config.out) in text
    sheet = imageio.imread(config.out)
    assert sheet.shape == (2 * 32, 3 * 32, 3) and sheet.std() > 10


def test_libero(tmp_path, capsys):
    try:
        envs.load("libero")
    except UserError as missing:
        pytest.skip(str(missing))
    main(
        CheckConfig(
            env="libero",
            tasks=("turn_on_the_stove",),
            image_size=32,
            steps=4,
            out=tmp_path / "sheet.png",
        )
    )
    assert "turn_on_the_stove, random" in capsys.readouterr().out
    assert imageio.imread(tmp_path / "sheet.png").shape == (32, 6 * 32, 3)


def test_a_vectorised_simulator_is_played_one_by_one():
    import torch

    class Envs:
        def __init__(self, tasks, image_size, count, device):
            self.count = count
            self.size = image_size

        def reset(self, rows, task, seeds):
            assert (rows, task, seeds) == ([0], 1, [7])

        def observe(self):
            return torch.zeros(
                self.count, 2, self.size, self.size, 3, dtype=torch.uint8
            ), torch.ones(self.count, 5)

        def step(self, actions):
            return actions.sum(1), actions[:, 0] > 0

        def close(self):
            pass

    module = type("module", (), {"Envs": Envs})
    one = Alone(module, ("a", "b"), 8)
    one.reset(1, 7)
    image, state = one.observe()
    assert image.shape == (2, 8, 8, 3) and state.tolist() == [1.0] * 5
    assert one.step(np.array([0.5, 0.25])) == (0.75, True)


def test_mistakes(tmp_path):
    for change, words in (
        ({"env": "atari"}, "unknown --env"),
        ({"out": tmp_path / "no" / "x.png"}, "does not exist"),
        ({"steps": -1}, "--steps"),
    ):
        with pytest.raises(UserError, match=words):
            main(CheckConfig(**change))
