"""Model families, one file each and one beside it. A new family is those two, a line in `MODELS`
and a name in `config.Family`.

A model file offers `build(config, env_spec, device="cpu", weights="all") -> module` (weights:
`checkpoint.Part`), which offers

    .header                                     models.checkpoint.Header, for the checkpoints of a
                                                run
    .observation_fields() -> {name: (shape, dtype)}  what the policy sees: "image" and what else its
                                                     `preparation` makes
    .slot_fields() -> {name: (shape, dtype)}    what one chunk step stores beyond the common fields,
                                                per chunk step
    .draw(keys, explore) -> {name: tensor}      all randomness of one inference, counter-based: see
                                                `generator`
    .act(obs, noise) -> {name: tensor}          "actions" and "logprob" [n, C, A], "value" [n], slot
                                                fields
    .training_fields() -> (name, …)             the slot fields that `evaluate` reads
    .evaluate(batch) -> {"logprob" [n, C, A], "value" [n], "entropy" []}
                                              differentiable, from slot fields
    .COMPILED                                   names of the methods that `models/compiled.py`
                                                compiles
    .trainable() -> {name: parameter}           what reinforcement learning updates and the weight
                                                plane carries
    .idle() -> (prefix, …)                      beginnings of the names of parameters that
                                                `evaluate` has no use for

    .imitation_draw(n), .imitate(obs, actions, draw) -> loss []      for `pretrain.py`

Beside it, `<family>_files.py` knows files and the world: the layouts of other projects' checkpoints
(`SOURCES`), their statistics and prompts, and

    preparation(header, tokenizer)                   what env workers use, an object with
        .observe(images, state, task) -> {name: array}   what the simulator shows → the observation
                                                         fields of one slot row
        .actions(actions, state) -> actions              what the model returned [C, A] → what the
                                                         simulator executes [C, A]
    embedded(name, tokenizer) -> module              the small model with random weights, for
                                                     `pretrain.py`
    wording(task) -> text                            the words that the embedded vocabulary must
                                                     hold
    save(model, folder, like)                        another project's layout again, see
                                                     `models/export.py`
    parity(folder) -> {name: tensor}                 see `benchmarks/parity.py`

so that no stage knows which family it serves.
"""

import importlib
from pathlib import Path

import numpy as np

from config import UserError
from models import checkpoint

MODELS = {
    "pi0": "models.pi",
    "pi05": "models.pi",
    "gr00t": "models.gr00t",
    "oft": "models.oft",
    "emulated": "benchmarks.emulated.policy",
}
FILES = {
    name: module if name == "emulated" else f"{module}_files" for name, module in MODELS.items()
}


def load(name: str):
    """The module of a model family. Raises UserError when it is unknown."""
    if name not in MODELS:
        raise UserError(f"unknown --model {name!r}: choose one of {', '.join(MODELS)}")
    return importlib.import_module(MODELS[name])


def files(name: str):
    """What stands between a model family and the world; `name` is a key of MODELS."""
    return importlib.import_module(FILES[name])


def build(config, spec, device: str = "cpu", weights: str = "all"):
    return load(config.train.model).build(config, spec, device, weights)


def preparation(name: str, header, tokenizer):
    return files(name).preparation(header, str(tokenizer or ""))


MARKS = {  # what the names of other projects' tensors contain, and whose they are
    "paligemma_with_expert.": ("pi0", "pi05"),
    "eagle_model.": ("gr00t",),
    "vision_backbone.": ("oft",),
    "base_model.model.": ("oft",),
}


def check_family(name: str, path: Path) -> None:
    """Raises UserError when a checkpoint of another project is of another family than `name`, by
    the names of its tensors.
    """
    if checkpoint.is_ours(path):
        return
    keys = checkpoint.layout(path)
    found = {families for mark, families in MARKS.items() if any(mark in key for key in keys)}
    if not found:
        raise UserError(
            f"checkpoint {path} is of no family known here: none of its tensors is named "
            f"{', '.join(MARKS)}"
        )
    if not any(name in families for families in found):
        raise UserError(
            f"checkpoint {path} is of the family {' or '.join(found.pop())}, not {name}: give "
            "another checkpoint, or the --model"
        )


def generator(key: tuple[int, int, int, int]) -> np.random.Generator:
    """Random numbers named by (seed, lane, trajectory, chunk step) and by nothing else.

    Which requests share a batch is a matter of timing; the noise each one gets must not be.
    """
    seed, lane, trajectory, t = key
    return np.random.Generator(
        np.random.Philox(key=[seed, lane << 32 | trajectory], counter=[0, 0, 0, t])
    )
