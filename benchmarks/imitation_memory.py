"""Prints what imitating with full-size models takes of a GPU: the table in docs/demonstrations.md.

    python -m benchmarks.imitation_memory           ten seconds, without weights or a GPU

It is what `pretrain.py` compares with the GPUs that are there (`imitation.memory_of`): counted on
tensors without memory, of LIBERO's two views, with checkpointing, computing in bfloat16.
"""

from pathlib import Path

import envs
import models
from config import Config, completed
from errors import exit_on_user_error
from imitation import Lesson, memory_of

# Name, model, frames of a pass, and what learns, as flags of pretrain.py.
ROWS = (
    ("π0.5, `--lora-rank 32`", "pi05", 32, {"lora_rank": 32}),
    ("π0.5, its whole expert", "pi05", 32, {}),
    ("π0.5, `--train-vlm`", "pi05", 8, {"train_vlm": True}),
    ("GR00T N1.5, its whole action head", "gr00t", 32, {}),
    ("OFT, `--lora-rank 32`", "oft", 8, {"lora_rank": 32}),
)


def bytes_of(model: str, frames: int, learns: dict) -> int:
    """Counts the bytes of a GPU that passes of so many frames take."""
    spec = envs.load("libero").spec(("libero_goal",), 224)
    flags = {"model": model, "env": "libero", "checkpoint": None, "precision": "bfloat16"}
    settings = completed(Config(), **flags, cache_prefix="off", **learns)
    _, header, _ = models.held(settings, spec)
    lesson = Lesson(
        settings=settings,
        spec=spec,
        header=header,
        data=None,
        cameras=(),
        every=1,
        steps=1,
        batch=frames,
        micro_batch=frames,
        checkpointing=True,
        lr=1e-4,
        seed=0,
        out=Path(),
        vocabulary=(Path(), Path()),
        save_every=0,
        half=False,
    )
    return memory_of(lesson)


def main() -> None:
    print("| | frames of a pass | GB |\n|---|---|---|")
    for name, model, frames, learns in ROWS:
        print(f"| {name} | {frames} | {bytes_of(model, frames, learns) / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
