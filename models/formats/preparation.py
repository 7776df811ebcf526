"""What stands between a simulator and a model: observations in, actions out.

Every env worker has one. A family derives `PreparationBase` and inherits the checks. It adds

    .resize(images)        another project's: pictures [V, H, W, 3] uint8 → [V, size, size, 3]
    .words(state, task)    → {name: array}, the fields beside the pictures
    .in_data(actions, state), .targets(actions, state), .counted(states, actions)
                           what imitation asks for, where its actions have units of their own
"""

import operator
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from errors import UserError, require
from models.formats import bins

# Of a robot's state or action, one per dimension.
Numbers = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=1)]
ORDERED = {"state_low": "state_high", "action_low": "action_high", "q01": "q99", "min": "max"}


def go_together(stats: dict) -> dict:
    """Raises ValueError unless lists are of one length, and the lower ends nowhere above."""
    for one, other in (ORDERED | {"mean": "std", "mask": "q01"}).items():
        first, second = (stats.get(name, ()) for name in (one, other))
        if len(first) != len(second) and (one in stats or one != "mask"):
            raise ValueError(f"must have {one} and {other} of one length")
        if one in ORDERED and any(map(operator.gt, first, second)):
            raise ValueError(f"must have {one} nowhere above {other}")
    return stats


def statistics(**fields: Any) -> Any:
    """Returns the type of a header's statistics, or of a part of them, that have these fields, and
    of another project perhaps what its robot's gripper and wide pictures need (`envs.Fit`)."""
    fit = NotRequired[Literal["squeeze", "letterbox", "bicubic"]]
    kind = TypedDict("Statistics", {"gripper": NotRequired[bins.Gripper], "fit": fit} | fields)
    return Annotated[kind, AfterValidator(go_together)]


# Of our own models: the quantiles that map the robot's state to [-1, 1].
OWN = statistics(state_low=Numbers, state_high=Numbers)


def usual(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The quantiles of 1 and 99 % of numbers [n, D]. Where they are the same, the least and the
    largest number, so that what is seldom is not scaled beyond measure."""
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    same = low == high
    return np.where(same, values.min(0), low), np.where(same, values.max(0), high)


class PreparationBase:
    """Turns observations into the model's, and its actions into the simulator's. config and
    tokenizer: the family's; stats: of the checkpoint's header."""

    def __init__(self, config, stats: dict, tokenizer):
        self.config = config
        self.stats = stats
        self.tokenizer = tokenizer
        self.layout = stats.get("layout", "own")
        self.own = self.layout == "own"
        self.grip = bins.GRIPPERS[stats.get("gripper", "")]

    def actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The model's [C, A] → what the robot executes [C, A]; state [S] of the simulator."""
        return actions

    def in_data(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """What the simulator executes [H, A] → the same as the model's data says it: the gripper,
        and what is relative to the state [S]. Statistics are of this."""
        return bins.gripper_in_data(actions, self.stats.get("gripper", ""))

    def targets(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """What the simulator executes [H, A] → the model's: the inverse of `actions`."""
        return actions

    def counted(self, states: np.ndarray, actions: np.ndarray) -> dict:
        """The header's statistics of other data: states [n, S], actions [m, A] of `in_data`."""
        low, high = usual(states)
        return self.stats | {"state_low": low.tolist(), "state_high": high.tolist()}

    def observe(self, images: np.ndarray, state: np.ndarray, task: str) -> dict[str, np.ndarray]:
        """images [V, H, W, 3] uint8, state [S] and task → the model's observation fields. Another
        project's model takes pictures of any size. Raises UserError."""
        c = self.config
        fits = images.ndim == 4 and images.shape[::3] == (c.views, 3)
        if self.own:
            fits = images.shape == (c.views, c.image_size, c.image_size, 3)
        wanted = f"{c.image_size}, {c.image_size}" if self.own else "height, width"
        require(
            fits and images.dtype == np.uint8,
            f"the images are {list(images.shape)} {images.dtype}: the model needs [{c.views}, "
            f"{wanted}, 3] uint8",
        )
        if not np.isfinite(state).all():
            wrong = int(np.argmin(np.isfinite(state)))
            raise UserError(f"the state of the robot is not a number in dimension {wrong}: {state}")
        return {"image": images if self.own else self.resize(images)} | self.words(state, task)
