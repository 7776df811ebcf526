"""What stands between a simulator and a model: observations in, actions out.

Every env worker has one. A family derives `PreparationBase`, says how its pictures, prompts and
states are made, and inherits the checks.
"""

import numpy as np

from config import require


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
        """What the model returned → what the robot executes, [C, A] each; state [S] of the
        simulator."""
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
        wanted = f"{size[0]}, {size[1]}" if self.own else "height, width"
        require(
            images.dtype == np.uint8 and images.shape == (c.views, *size, 3),
            f"the images are {list(images.shape)} {images.dtype}: the model needs [{c.views}, "
            f"{wanted}, 3] uint8",
        )
        finite = np.isfinite(state)
        wrong = int(np.argmin(finite))
        sentence = f"the state of the robot is not a number in dimension {wrong}: {state}"
        require(finite.all(), sentence)
        return {"image": self.resize(images)} | self.words(state, task)
