"""What a model family, its files and its preparation must offer. Checked when they are loaded.

n samples, C actions per chunk of A dimensions. A *field* is a name with a shape and a torch dtype.
"""

import math

import numpy as np
import torch
from torch import Tensor

from errors import UserError, require

FAMILY = {
    "FORMATS": "the name of the module that knows its files, or None: then `build` and "
    "`preparation` are its own",
}
ALONE = {
    "build": "(config, spec, device, weights) → the model",
    "preparation": "(header, tokenizer) → what stands between simulator and model",
}
WITH_FILES = {
    "CONFIG": "a frozen dataclass that derives `lora.LoraConfig`, the shape in a checkpoint's "
    "header: `views`, `image_size`, `played` (C, A) and what is its own",
    "NETWORK": "the class of the model, made from a CONFIG alone",
    "FULL": "{family: CONFIG} of the published models",
}
FILES = {
    "MARKS": "what the names of its tensors contain, in other projects' files",
    "published": "(path, family, config, spec) → `formats.source.Found`, of another project's file",
    "STATS": "{layout: type of its header's `stats`}, \"own\" and other projects'",
    "source_of": "(path or None, config) → `formats.source.Source`, the layout of that project's "
    "file, or of its adapters",
    "preparation": "(header, tokenizer) → what stands between simulator and model",
    "embedded": "(family, tokenizer) → the small model with random weights, of that many words",
    "wording": "(task) → the words that the embedded vocabulary must hold",
}
NETWORK = {
    "HEADS": "names of the modules that reinforcement learning adds, which a file may lack",
    "heads": "(config) → {name: module}, new ones of them",
    "dtype_of": "(name of a parameter) → its dtype, or None to keep the file's",
    "asked": "(configuration in the file, config.ActorConfig) → the one with the run's adapters",
    "begin": "(config, stats): called once, after the weights were read",
    "imitation_draw": "(n) → {name: tensor}, what one imitation step draws",
    "imitate": "(observations, actions [n, C, A], drawn) → loss []",
}
MODEL = {
    "header": "`checkpoint.Header`, for the checkpoints of a run",
    "config": "its configuration",
    "acts_in": "(name of a parameter, or its beginning) → the dtype in which the model uses it, or "
    "None for its own; all of a block have one",
    "observation_fields": "() → {name: (shape, dtype)}, what the policy sees, of one chunk step",
    "slot_fields": "() → {name: (shape, dtype)}, what a slot keeps of a chunk step beside that",
    "training_fields": "() → the names of the slot fields that `evaluate` reads",
    "draw": "(keys, explore) → {name: tensor}, all randomness of one inference (`noise.generator`)",
    "act": "(observations, drawn) → actions, logprob [n, C, A], value [n] and the slot fields",
    "evaluate": "(slot fields) → logprob [n, C, A] and value [n], differentiable, and entropy [] "
    "where exploration is learned",
    "trainable": "() → {name: parameter}, what reinforcement learning updates",
    "critic": "() → {name: parameter}, the part of `trainable` that --value-lr is for",
    "idle": "() → beginnings of the names of parameters that `evaluate` has no use for",
}
KEEPS = {  # what --cache-prefix gpu asks of a model
    "look_once": "(slot fields) → {name: tensor}, what a frozen VLM makes of a frame",
    "cache_fields": "() → {name: (shape, dtype)} of that",
}
PREPARATION = {
    "observe": "(images [V, H, W, 3] uint8, state [S], task) → {name: array}, the observation "
    "fields",
    "actions": "(actions [C, A], state [S]) → what the simulator executes [C, A]",
}

IMITATES = {  # what pretrain.py asks of a preparation
    "in_data": "(actions [H, A] of the simulator, state [S]) → as the model's data says them",
    "targets": "(actions [H, A] of the simulator, state [S]) → what the model is to predict",
    "counted": "(states [n, S], actions [m, A] of `in_data`) → the header's statistics of them",
}


def check(thing: object, what: str, contract: dict[str, str]) -> None:
    """Raises UserError naming what `thing`, called `what`, lacks of a contract."""
    for name, says in contract.items():
        require(hasattr(thing, name), f"{what} lacks {name}: {says}")


def check_model(model: torch.nn.Module, family: str) -> None:
    """Raises UserError naming what a model lacks, or what is wrong with a field."""
    what = f"the model of family {family!r}"
    check(model, what, MODEL)
    observed = model.observation_fields()
    for name, (shape, dtype) in [*observed.items(), *model.slot_fields().items()]:
        says = f"{what} gives its field {name!r} the"
        require(isinstance(dtype, torch.dtype), f"{says} dtype {dtype!r}, not one of torch's")
        whole = all(isinstance(size, int) and size >= 0 for size in shape)
        require(whole, f"{says} shape {shape!r}, not whole numbers")
    for name, (_, dtype) in observed.items():
        half = f"{what} observes {name!r} as bfloat16, which simulators cannot write"
        require(dtype is not torch.bfloat16, half)
    trained = model.trainable()
    for name in model.critic():
        require(name in trained, f"{what} has {name!r} in its critic and does not train it")


def check_tensors(who: str, fields: dict, tensors: dict[str, Tensor], rows: tuple) -> None:
    """Raises UserError unless every field is there, [*rows, *shape] and of its dtype."""
    for name, (shape, dtype) in fields.items():
        if name not in tensors:
            raise UserError(f"{who} does not give {name!r}")
        found = tensors[name]
        if found.shape != (*rows, *shape) or found.dtype is not dtype:
            raise UserError(
                f"{who} gives {name!r} as {list(found.shape)} {found.dtype}: its field is "
                f"{[*rows, *shape]} {dtype}"
            )


def check_observed(model: torch.nn.Module, row: dict) -> None:
    """Raises UserError unless what a preparation observed, one row, is what the model sees."""
    found = {name: torch.as_tensor(x) for name, x in row.items()}
    fields = model.observation_fields()
    check_tensors("the preparation's observe", fields, found, ())
    strangers = sorted(found.keys() - fields.keys())
    require(not strangers, f"the preparation's observe gives {strangers}, which the model has not")


def check_prompts(preparation, spec) -> None:
    """Raises UserError where a model has no room for an instruction of these tasks, or cannot take
    their pictures and state. spec: envs.EnvSpec, as the model sees it."""
    picture = np.zeros((spec.views, spec.image_size, spec.image_size, 3), np.uint8)
    for prompt in spec.prompts:
        preparation.observe(picture, np.zeros(spec.state_dim, np.float32), prompt)


def check_acted(model: torch.nn.Module, out: dict, n: int, chunk: tuple[int, int]) -> None:
    """Raises UserError unless what `act` returned for n samples of chunks [C, A] can be stored."""
    common = {"actions": chunk, "logprob": chunk, "value": ()}
    fields = {name: (shape, out[name].dtype) for name, shape in common.items() if name in out}
    check_tensors("the model's act", model.slot_fields() | fields, out, (n,))


def check_finite(out: dict[str, Tensor], policy: str, instead: str) -> None:
    """Raises UserError where what `act` returned is no finite number, before anybody takes it.

    MuJoCo plays 0 for a NaN, so no simulator is to see one. policy: what to call it in the
    sentence; instead: what to do."""
    # A finite sum has finite parts, and costs a third of looking at each; large parts may add up to
    # infinity, so where a sum is not finite, its parts are looked at.
    broken = [
        name
        for name in ("actions", "logprob", "value")
        if name in out and not math.isfinite(out[name].sum()) and not out[name].isfinite().all()
    ]
    if broken:
        which = ", ".join(broken)
        raise UserError(f"{policy} gives numbers that are not finite ({which}): {instead}")


def check_evaluated(out: dict[str, Tensor], logprob: Tensor) -> None:
    """Raises UserError unless what `evaluate` returned goes with the stored log-probs [m, C, A]."""
    fields = {
        "logprob": (logprob.shape[1:], out["logprob"].dtype),
        "value": ((), out["value"].dtype),
    }
    check_tensors("the model's evaluate", fields, out, (len(logprob),))
