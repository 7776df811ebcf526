"""The user's smoke test says what it should, and draws what it saw."""

import imageio.v2 as imageio
import pytest

import envs
from config import UserError
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


def test_mistakes(tmp_path):
    for change, words in (
        ({"env": "atari"}, "unknown --env"),
        ({"out": tmp_path / "no" / "x.png"}, "does not exist"),
        ({"steps": -1}, "--steps"),
    ):
        with pytest.raises(UserError, match=words):
            main(CheckConfig(**change))
