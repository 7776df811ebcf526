"""ManiSkill 3 (https://github.com/haosulab/ManiSkill): pick-and-place tasks of a robot arm in SAPIEN; a vectorised lane of N envs.

On a GPU one PhysX system simulates the N envs of a task and Vulkan draws them into CUDA memory: pictures, states and rewards are
tensors there and never come to the host. On a CPU the N envs are N scenes stepped in turn, drawn by software Vulkan, which needs
no GPU but Mesa's lavapipe (it works with 25.0, and does not with Debian 12's 22.3; `setup.sh --maniskill` looks after it).

A lane plays any mixture of its tasks, with one kind of observation: the joint positions [9] (padded with zeros) and the task's own
camera; actions [7] move the hand by x, y, z (±1 is ±10 cm a control step) and a rotation (±1 is ±0.1 rad), and set the gripper
(1 open, -1 closed). On a GPU each task of a lane holds N scenes, so a lane of one task is the cheapest.

The same (task, seed) starts from the same state in any row, whatever its neighbours do; ManiSkill's own partial reset has one seed
for all rows and forgets the targets of the others. What follows is the same too on a CPU. PhysX on a GPU adds contact forces in
whatever order they come, so there two episodes of one seed drift apart in the last bits; and its random numbers are others than
the CPU's.

Left out: dense rewards (reward is 1 on success, as each task defines it, else 0), ManiSkill's time limits and auto-reset (they are
wrappers, not used here). Not run so far: a GPU.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import UserError
from envs import EnvSpec

if importlib.util.find_spec("mani_skill") is None:  # imported where it is used: that takes seconds
    raise ModuleNotFoundError("No module named 'mani_skill'", name="mani_skill")

os.environ.setdefault("LP_NUM_THREADS", "0")  # software rasteriser: processes scale, its threads only fight
SOFTWARE_VULKAN = Path(sys.prefix) / "lavapipe" / "icd.json"  # where setup.sh puts a newer one than the system's


class Task(NamedTuple):
    prompt: str  # the wording is ours
    joints: int = 9  # of the robot, fingers included
    camera: str = "base_camera"
    options: tuple[tuple[str, str], ...] = (("robot_uids", "panda"), ("control_mode", "pd_ee_delta_pose"))


TASKS = {
    "PickCube-v1": Task("pick up the red cube and move it to the green ball"),
    "StackCube-v1": Task("put the red cube on the green cube"),
    "PushCube-v1": Task("push the blue cube to the target"),
    "PullCube-v1": Task("pull the blue cube to the target"),
    "PlaceSphere-v1": Task("put the blue ball into the bin"),
}
DEFAULT_TASKS = ("PickCube-v1",)
HORIZON = 80  # control steps (RLinf, RL-VLA³); ManiSkill's own limits are 50
ACTIONS = 7
# States that an untrained model takes for -1 and 1: the arm's angles around where it starts, radians; the fingers', metres.
STATE_RANGE = ((-1.0, -1.0, -1.0, -2.8, -1.0, 1.2, -0.5, 0.0, 0.0), (1.0, 1.4, 1.0, -1.0, 1.0, 3.4, 2.0, 0.04, 0.04))


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    tasks = tuple(dict.fromkeys(tasks)) or DEFAULT_TASKS
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"unknown ManiSkill task {name!r}: choose among {', '.join(TASKS)}")
    known = [TASKS[name] for name in tasks]
    return EnvSpec(tasks, tuple(t.prompt for t in known), 1, image_size, max(t.joints for t in known), ACTIONS, HORIZON)


def check_drawing(device: torch.device) -> None:
    """Raises UserError where Vulkan finds nothing to draw with."""
    if device.type == "cpu" and SOFTWARE_VULKAN.is_file():
        os.environ.setdefault("VK_ICD_FILENAMES", str(SOFTWARE_VULKAN))
    import sapien

    try:
        sapien.render.RenderSystem(sapien.Device(place(device)))
    except RuntimeError as error:
        need = (
            "software Vulkan of Mesa 25 or newer: run `bash setup.sh --maniskill`"
            if device.type == "cpu"
            else "a CUDA device and its driver's Vulkan (libGLX_nvidia.so.0, named by a JSON file in /usr/share/vulkan/icd.d)"
        )
        raise UserError(f"ManiSkill finds nothing to draw with on {device} ({error}); it needs {need}") from None


def place(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


def make(name: str, image_size: int, count: int, device: torch.device):
    """A ManiSkill env of `count` scenes that draws nothing unless asked."""
    import mani_skill.envs  # noqa: F401  registers the tasks
    from mani_skill.envs.utils.observations import parse_obs_mode_to_struct
    from mani_skill.utils.registration import REGISTERED_ENVS

    sim = REGISTERED_ENVS[name].cls(
        num_envs=count, obs_mode="none", reward_mode="none", sim_backend=f"physx_{place(device)}",
        render_backend=f"sapien_{place(device)}", **dict(TASKS[name].options),
        sensor_configs={"width": image_size, "height": image_size, "shader_pack": "default"},
    )  # fmt: skip
    sim.obs_mode_struct = parse_obs_mode_to_struct("rgb")  # what `Envs.observe` asks for; a step still draws nothing
    sim._hidden_objects.clear()  # PickCube's goal, which nothing but this ball shows
    return sim


def begin(sim, rows: list[int], seeds: list[int]) -> None:
    """Starts episodes in some rows of a simulator, each from a seed of its own; BaseEnv.reset has one seed for all of them."""

    def only(rows: list[int]) -> torch.Tensor:
        mask = torch.zeros(sim.num_envs, dtype=torch.bool, device=sim.device)
        mask[torch.tensor(rows, device=sim.device)] = True
        return mask

    sim.scene._reset_mask = these = only(rows)  # whatever is set, is set in these rows alone
    sim._elapsed_steps[these] = 0
    sim._clear_sim_state()
    sim.agent.reset()
    with torch.random.fork_rng(devices=[sim.device] if sim.device.type == "cuda" else []):
        for row, seed in zip(rows, seeds, strict=True):
            sim.scene._reset_mask = only([row])
            torch.manual_seed(seed)
            sim._batched_episode_rng[row] = sim._episode_rng = np.random.RandomState(seed)
            sim._initialize_episode(torch.tensor([row], device=sim.device), {"seeds": [seed]})
    if sim.gpu_sim_enabled:
        sim.scene._gpu_apply_all()
        sim.scene.px.gpu_update_articulation_kinematics()
        sim.scene._gpu_fetch_all()
    sim.scene._reset_mask = these
    sim.agent.controller.reset()
    sim.scene._reset_mask = torch.ones_like(these)


class Envs:
    """`count` envs of one lane. Simulators are made when a task is first played: on a GPU one per task, else one per task and row.

    Raises UserError where nothing can draw.
    """

    def __init__(self, tasks: tuple[str, ...], image_size: int, count: int, device: str | torch.device):
        self.tasks, self.size, self.count, self.device = tasks, image_size, count, torch.device(device)
        check_drawing(self.device)
        self.states = max(TASKS[name].joints for name in tasks)
        self.sims = {}  # by (task,) or (task, row)
        self.playing: dict[tuple[int, ...], list[int]] = {}  # rows of the lane that each simulator plays
        self.index: dict[tuple[int, ...], torch.Tensor] = {}  # the same, on the device

    def reset(self, rows: list[int], task: int, seeds: list[int]) -> None:
        """Starts episodes of a task in some rows. seeds: below 2³², one per row."""
        for row in rows:
            for played in self.playing.values():
                if row in played:
                    played.remove(row)
        single = self.device.type == "cpu"
        for key, own in [((task, row), [row]) for row in rows] if single else [((task,), list(rows))]:
            if key not in self.sims:
                self.sims[key] = make(self.tasks[task], self.size, 1 if single else self.count, self.device)
            begin(self.sims[key], [0] if single else own, [seeds[rows.index(row)] for row in own])
            self.playing[key] = sorted(self.playing.get(key, []) + own)
        self.playing = {key: own for key, own in self.playing.items() if own}
        self.index = {key: torch.tensor(own, device=self.device) for key, own in self.playing.items()}

    def _at(self, key: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
        """What a simulator says about the rows that it plays: of [its scenes, …], [rows, …]."""
        return values if len(values) == len(self.index[key]) else values[self.index[key]]

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """actions [N, 7] float32. Returns reward [N] float32 and success [N] bool. Rows never reset stay as they are."""
        success = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        actions = actions.to(self.device, torch.float32)
        for key, index in self.index.items():
            sim = self.sims[key]
            *_, info = sim.step(actions[index] if sim.num_envs == 1 else actions)
            success[index] = self._at(key, info["success"])
        return success.float(), success

    def observe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """images [N, 1, H, W, 3] uint8 and states [N, S] float32, on the device: the only thing that draws."""
        images = torch.zeros(self.count, 1, self.size, self.size, 3, dtype=torch.uint8, device=self.device)
        states = torch.zeros(self.count, self.states, device=self.device)
        for key, index in self.index.items():
            sim, task = self.sims[key], TASKS[self.tasks[key[0]]]
            images[index, 0] = self._at(key, sim._get_obs_sensor_data()[task.camera]["rgb"])
            states[index, : task.joints] = self._at(key, sim.agent.robot.get_qpos()).float()
        return images, states

    def film(self, size: int = 256) -> np.ndarray:
        """A frame for people, [size, size, 3] uint8: what the policy's camera shows of row 0."""
        image = self.observe()[0][0, 0].permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
        return resized[0].permute(1, 2, 0).round().to(torch.uint8).cpu().numpy()

    def close(self) -> None:
        for sim in self.sims.values():
            sim.close()
        self.sims, self.playing, self.index = {}, {}, {}
