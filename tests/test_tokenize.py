"""Prompts, their tokens, and the vocabulary that is made for them."""

import numpy as np
import pytest

from config import ASSETS
from envs import metaworld
from errors import UserError
from models import tokenize
from models.pi import PiConfig


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    tokenize.train_vocabulary(list(metaworld.PROMPTS.values()), path)
    return path


def test_prompt_bins_the_state():
    state = np.array([-1.0, -1.0 + 1 / 128, 0.0, 0.9999, 1.0, 7.0, -7.0])
    assert (
        tokenize.prompt("lift the cup", state)
        == "Task: lift the cup, State: 0 1 128 255 255 255 0;\nAction: "
    )


def test_every_prompt_fits_and_comes_back(vocabulary):
    tokenizer = tokenize.load(str(vocabulary))
    state = np.array([-1.0, -0.5, 0.5, 1.0])
    for task in metaworld.PROMPTS.values():
        text = tokenize.prompt(task, state)
        ids = tokenize.encode(tokenizer, PiConfig.tokens, text)
        words = ids[ids != tokenize.PAD].tolist()
        assert ids.dtype == np.int32 and ids.shape == (24,) and words[0] == tokenizer.bos_id()
        assert tokenizer.unk_id() not in words and tokenizer.decode(words) == text
        assert (ids[len(words) :] == tokenize.PAD).all()


def test_a_word_and_a_bin_are_one_token_each(vocabulary):
    tokenizer = tokenize.load(str(vocabulary))
    short, long = (
        tokenizer.encode(tokenize.prompt(task, np.zeros(4)))
        for task in ("open the drawer", "open the the drawer")
    )
    assert len(long) == len(short) + 1
    assert (
        len(tokenizer.encode(tokenize.prompt("x", np.zeros(5))))
        == len(tokenizer.encode(tokenize.prompt("x", np.zeros(4)))) + 1
    )


def test_a_prompt_that_is_too_long_is_an_error_not_cut_off(vocabulary):
    with pytest.raises(UserError, match="room for 8"):
        tokenize.encode(
            tokenize.load(str(vocabulary)), 8, tokenize.prompt("open the drawer", np.zeros(4))
        )


def test_the_vocabulary_is_deterministic_and_the_shipped_one(vocabulary, tmp_path):
    tokenize.train_vocabulary(list(metaworld.PROMPTS.values()), tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == vocabulary.read_bytes()
    made, shipped = (tokenize.load(str(path)) for path in (vocabulary, ASSETS / "tokenizer.model"))
    assert made.get_piece_size() == shipped.get_piece_size() == PiConfig.vocabulary
    assert [made.id_to_piece(i) for i in range(399)] == [shipped.id_to_piece(i) for i in range(399)]


def test_files_that_are_no_tokenizer(tmp_path):
    (tmp_path / "text.model").write_text("hello")
    for path in (tmp_path / "none.model", tmp_path / "text.model", tmp_path):
        with pytest.raises(UserError, match="SentencePiece"):
            tokenize.load(str(path))
