"""What stands between a simulator and a model: observations in, actions out.

Every env worker has one. A family derives `PreparationBase` in `models/formats/`, says how its
pictures, prompts and states are made, and inherits the checks.
"""

import numpy as np

from config import UserError


class PreparationBase:
    """Observations to the fields of `observation_fields`, and the model's actions to the
    simulator's.

    config: the family's; stats: of the checkpoint's header; tokenizer: the family's."""

    def __init__(self, config, stats: dict, tokenizer):
        self.config = config
        self.stats = stats
        self.tokenizer = tokenizer
        self.layout = stats.get("layout", "own")
        self.own = self.layout == "own"

    # ------------------------------------------------------------ what a family says

    def resize(self, images: np.ndarray) -> np.ndarray:
        """Pictures [V, H, W, 3] uint8 → [V, size, size, 3] uint8."""
        raise NotImplementedError

    def words(self, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """The fields beside the pictures."""
        raise NotImplementedError

    def actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """What the model returned [C, A] → what the robot executes [C, A]; state [S] as the
        simulator gave it."""
        return actions

    # ------------------------------------------------------------ what all have

    def observe(self, images: np.ndarray, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """images [V, H, W, 3] uint8, state [S] and task → the model's observation fields. Raises
        UserError.

        Pictures of any size are resized for another project's model; our own take theirs as they
        are."""
        c = self.config
        size = (c.image_size, c.image_size)
        if images.ndim == 4 and not self.own:
            size = images.shape[1:3]
        if images.dtype != np.uint8 or images.shape != (c.views, *size, 3):
            wanted = f"{size[0]}, {size[1]}" if self.own else "height, width"
            raise UserError(
                f"the images are {list(images.shape)} {images.dtype}: the model needs [{c.views}, "
                f"{wanted}, 3] uint8"
            )
        if not np.isfinite(state).all():
            raise UserError(
                "the state of the robot is not a number in dimension "
                f"{int(np.argmin(np.isfinite(state)))}: {state}"
            )
        return {"image": self.resize(images)} | self.words(state, task)


def padded(ids: list[int], length: int, pad: int, text: str) -> np.ndarray:
    """Token ids [length] int32, padded at the end. Raises UserError when they do not fit."""
    require_room(ids, length, text)
    return np.array(ids + [pad] * (length - len(ids)), np.int32)


def require_room(ids: list[int], length: int, text: str) -> None:
    """Raises UserError when a prompt has more tokens than the model has room for."""
    if len(ids) > length:
        raise UserError(
            f"the prompt {text!r} needs {len(ids)} tokens and the model has room for {length}: "
            "give --tokens"
        )
