"""OpenVLA's actions as words, and what a gripper's number means to a simulator.

An action dimension is one of `bins` words at the end of the vocabulary; later words are lower bins.
Sources: moojink/openvla-oft `prismatic/vla/action_tokenizer.py`; RLinf
`rlinf/envs/action_utils.py`; SimpleVLA-RL `verl/workers/rollout/rob_rollout.py`.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from errors import require


def decode_tokens(tokens: np.ndarray, words: int, bins: int = 256) -> np.ndarray:
    """Action token ids → normalised actions, the middles between `bins` points from −1 to 1. The
    first word and the second mean the highest."""
    edges = np.linspace(-1.0, 1.0, bins)
    index = np.clip(words + bins - np.asarray(tokens) - 1, 0, bins - 2)
    return ((edges[:-1] + edges[1:]) / 2.0)[index]


def encode_actions(actions: Tensor, words: int, bins: int = 256) -> Tensor:
    """Normalised actions, clipped to [-1, 1] → token ids int64 (`ActionTokenizer`: np.digitize)."""
    edges = np.linspace(-1.0, 1.0, bins)  # torch.linspace differs in the last bit
    edges = torch.from_numpy(edges).to(actions.device)
    return words + bins - torch.bucketize(actions.double().clamp(-1.0, 1.0), edges, right=True)


def unnormalise_actions(actions: np.ndarray, stats: dict) -> np.ndarray:
    """[-1, 1] → the data's units by the quantiles, where the mask says so. actions [..., A]."""
    low, high = (np.array(stats[end]) for end in ("q01", "q99"))
    return np.where(
        stats.get("mask", True), 0.5 * (actions + 1.0) * (high - low + 1e-8) + low, actions
    )


def normalise_actions(actions: np.ndarray, stats: dict) -> np.ndarray:
    """The inverse, clipped to [-1, 1] (openvla-oft `prismatic/vla/datasets/rlds/utils`,
    BOUNDS_Q99)."""
    low, high = (np.array(stats[end]) for end in ("q01", "q99"))
    scaled = np.clip(2.0 * (actions - low) / (high - low + 1e-8) - 1.0, -1.0, 1.0)
    return np.where(stats.get("mask", True), scaled, actions).astype(np.float32)


def libero_gripper(actions: np.ndarray) -> np.ndarray:
    """The last dimension: 1 open, 0 closed in the data, −1 open, 1 closed in LIBERO."""
    return np.concatenate([actions[..., :-1], np.sign(1.0 - 2.0 * actions[..., -1:])], axis=-1)


def widowx_gripper(actions: np.ndarray) -> np.ndarray:
    """ManiSkill's WidowX: 1 open, −1 closed."""
    grip = 2.0 * (actions[..., -1:] > 0.5) - 1.0
    return np.concatenate([actions[..., :-1], grip], axis=-1)


def gripper_in_data(actions: np.ndarray, gripper: str) -> np.ndarray:
    """The inverse: what a simulator executes → 1 open, 0 closed. gripper: of `GRIPPERS`."""
    if not gripper:
        return np.asarray(actions)
    sign = -1.0 if gripper == "libero" else 1.0
    share = np.clip(0.5 + 0.5 * sign * actions[..., -1:], 0.0, 1.0)
    return np.concatenate([actions[..., :-1], share], axis=-1)


GRIPPERS = {"": np.asarray, "libero": libero_gripper, "widowx": widowx_gripper}
Gripper = Literal[tuple(GRIPPERS)]
# Which of them a robot (`EnvSpec.robot`) needs, by the layout of a checkpoint's files, where its
# policies do not speak as the simulator does. The sources are in docs/simulators.md.
ROBOTS = {
    "libero": dict.fromkeys(("openvla", "isaac", "rlinf"), "libero"),
    "widowx": dict.fromkeys(("openpi", "lerobot", "openvla", "isaac", "rlinf"), "widowx"),
}


def gripper_of(robot: str, layout: str) -> str:
    """Names the gripper of another project's policy. Raises UserError for several robots."""
    several = f"another project's checkpoint plays one robot, and the tasks have {robot}"
    require(" and " not in robot, f"{several}: choose tasks of one")
    return ROBOTS.get(robot, {}).get(layout, "")


def action_table(stats: dict, action_dim: int, bins: int = 256) -> np.ndarray:
    """[A, bins] float32: what the simulator executes for the k-th action word of each dimension.

    stats: of `read_statistics`, with "gripper" naming one of `GRIPPERS`; without quantiles actions
    stay in [-1, 1]."""
    values = decode_tokens(np.arange(bins), 0, bins)
    actions = np.repeat(values[:, None], action_dim, axis=1)  # [bins, A]
    if "q01" in stats:
        known = len(stats["q01"])
        require(
            known == action_dim,
            f"the statistics are of {known} action dimensions and the model has {action_dim}",
        )
        actions = unnormalise_actions(actions, stats)
    return GRIPPERS[stats.get("gripper", "")](actions).T.astype(np.float32)
