"""Prompts to token ids through SentencePiece, and the small vocabulary of the embedded default.

π0.5 writes the robot's state into the prompt, each dimension in one of 256 bins (openpi's format).
Real checkpoints need their own SentencePiece file (`--tokenizer PATH`); the embedded default's is
made by `pretrain.py` with `train_vocabulary`.
"""

import hashlib
import io
import string
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece

from errors import UserError, require

PAD = 0


@lru_cache
def load(path: str) -> sentencepiece.SentencePieceProcessor:
    require(
        Path(path).is_file(),
        f"no SentencePiece file at {path}: give --tokenizer PATH (PaliGemma's, for π0 and π0.5, is "
        "what openpi downloads from gs://big_vision/paligemma_tokenizer.model; Llama's lies in "
        "OpenVLA-OFT's checkpoint folder as tokenizer.model)",
    )
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except RuntimeError:
        raise UserError(f"{path} is not a SentencePiece model file") from None


def load_for(path: str, least: int, most: int):
    """`load`, refusing a vocabulary of another model: this one knows `least` to `most` pieces."""
    tokenizer = load(path)
    size = tokenizer.vocab_size()
    require(
        least <= size <= most,
        f"{path} has {size} pieces and the model knows {most}: give its own file with --tokenizer "
        "PATH",
    )
    return tokenizer


def fingerprint(path: Path | str) -> str:
    """What tells one vocabulary from another: SHA-256 of its file, or of a folder's vocab.json."""
    file = Path(path) / "vocab.json" if Path(path).is_dir() else Path(path)
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""  # who reads it says what is wrong


def prompt(task: str, state: np.ndarray) -> str:
    """π0.5's prompt. state [S] normalised to [-1, 1]; bin i covers [-1 + i/128, -1 + (i+1)/128)."""
    bins = np.clip(np.floor((state + 1.0) * 128.0), 0, 255).astype(int)
    return f"Task: {task}, State: {' '.join(map(str, bins))};\nAction: "


def encode(tokenizer, length: int, *texts: str) -> np.ndarray:
    """Token ids [length] int32: BOS, the texts, each on its own, padding. Raises UserError."""
    ids = [tokenizer.bos_id()]
    for text in texts:
        ids += tokenizer.encode(text)
    return padded(ids, length, PAD, "".join(texts))


def padded(ids: list[int], length: int, pad: int, text: str) -> np.ndarray:
    """Token ids [length] int32, padded at the end. Raises UserError when they do not fit."""
    size = len(ids)
    require(
        size <= length,
        f"the prompt {text!r} needs {size} tokens and the model has room for {length}: give "
        "--tokens",
    )
    return np.array(ids + [pad] * (length - size), np.int32)


def train_vocabulary(prompts: list[str], path: Path) -> None:
    """A SentencePiece model with one token per word of `prompts`, state bin and letter."""
    words = sorted({word for text in prompts for word in text.replace(",", "").split()})
    symbols = [f"▁{word}" for word in ["Task:", "State:", *words, *range(256)]]
    symbols += [",", ";\nAction:"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(string.ascii_letters + string.digits + "_.:;,'"),
        model_writer=model,
        model_type="char",
        pad_id=PAD,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        vocab_size=len(symbols) + 100,
        user_defined_symbols=symbols,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
