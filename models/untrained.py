"""Somewhere to start from where nothing was trained yet: a family's small model with random
weights, and a vocabulary of its own.

Meta-World has an embedded checkpoint; another simulator has other cameras, actions and words, so
its runs begin here unless they name a checkpoint for it. Weights and vocabulary are a function of
the arguments alone and lie in `runs/`, beside the runs that resume from them.

    python train.py --env libero --suite libero_10

Left out: imitation, which `pretrain.py` does, also of such a model.
"""

import hashlib
import os
import re
import uuid
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import models
from errors import require
from models import checkpoint, tokenize


def start(folder: Path, model: str, spec, state_range, chunk: int, tokens: int) -> tuple[Path, ...]:
    """Makes weights and vocabulary unless they exist, and returns both files.

    spec: envs.EnvSpec; state_range: lowest and highest usual state [S] each; chunk: actions per
    inference; tokens: least length of prompts."""
    named = hashlib.sha1(repr((spec, state_range, chunk, tokens)).encode()).hexdigest()[:10]
    weights = folder / f"untrained_{model}_{named}.safetensors"
    vocabulary = folder / f"untrained_{model}_{named}.model"
    family = models.files(model)
    texts = [family.wording(prompt) for prompt in spec.prompts]
    if not vocabulary.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = vocabulary.with_suffix(f".{uuid.uuid4().hex}")
        tokenize.train_vocabulary(texts, partial)
        os.replace(partial, vocabulary)
    if not weights.is_file():
        torch.manual_seed(0)
        small = family.embedded(model, str(vocabulary))
        words = tokenize.load(str(vocabulary))
        # Beside the task: π0.5's state, GR00T's views, and at most eight of punctuation and others.
        longest = max(len(words.encode(text)) for text in texts)
        tokens = max(tokens, longest + spec.state_dim + spec.views + 8)
        config = fitted(small.config, spec, chunk, tokens)
        odd = f"--image-size {spec.image_size} must be a multiple of the {config.patch} pixels"
        require(spec.image_size % config.patch == 0, f"{odd} of one of the model's patches")
        low, high = state_range
        stats = {"state_low": list(low), "state_high": list(high)}
        header = checkpoint.Header(model, asdict(config), stats, tokenize.fingerprint(vocabulary))
        checkpoint.save(weights, header, type(small)(config).half().state_dict())
    return weights, vocabulary


def is_name(name: str) -> bool:
    """Whether a file of weights is called as `start` calls those that it makes."""
    return re.fullmatch(r"untrained_[a-z0-9]+_[0-9a-f]{10}\.safetensors", name) is not None


def fitted(config, spec, chunk: int, tokens: int):
    """A family's small configuration, for a simulator."""
    known = {field.name for field in fields(config)}
    wanted = {
        "views": spec.views,
        "image_size": spec.image_size,
        "action_dim": spec.action_dim,
        "max_action_dim": spec.action_dim,
        "state_dim": spec.state_dim,
        "max_state_dim": spec.state_dim,
        "chunk": chunk,
        "horizon": chunk,
        "tokens": tokens,
        "positions": max(16, chunk),
    }
    return replace(config, **{name: value for name, value in wanted.items() if name in known})
