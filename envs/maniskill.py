"""ManiSkill 3 (https://github.com/haosulab/ManiSkill): pick-and-place in SAPIEN, vectorised.

On a GPU one PhysX system simulates the N envs of a task and Vulkan draws them into CUDA memory,
where pictures, states and rewards stay. On a CPU the N envs are N scenes stepped in turn, drawn by
software Vulkan: Mesa's lavapipe 25.0, not Debian 12's 22.3 (see `setup.sh --maniskill`).

A lane plays any mixture of its tasks. It sees the positions of the arm's joints (padded with zeros)
and the task's own camera; actions [7] move the hand by x, y, z and a rotation about them, and set
the gripper (1 open, -1 closed). With the Panda ±1 is ±10 cm and ±0.1 rad a control step; RLinf's
WidowX takes metres and radians. On a GPU each simulator of a lane holds N scenes, so a lane of one
task, or of PutOnPlate's, which share one, is the cheapest.

The same (task, seed) starts from the same state in any row, whatever its neighbours do. On a CPU
the rest is the same too. On a GPU contact forces are added in any order, so two episodes of one
seed drift apart in the last bits, and random numbers are others than the CPU's.

Left out: dense rewards (reward is 1 on success, as each task defines it, else 0), ManiSkill's time
limits and auto-reset (they are wrappers, not used here). Not run so far: a GPU.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

import envs
from config import ROOT
from envs import EnvSpec, Step
from errors import UserError, require

PACKAGES = ("mani_skill",)

# Where setup.sh puts a newer one than the system's.
SOFTWARE_VULKAN = Path(sys.prefix) / "lavapipe" / "icd.json"


class Task(NamedTuple):
    prompt: str  # the wording is ours
    simulator: str  # tasks of one name share it
    episode: dict = {}  # what its episodes are told, beside the seed
    joints: int = 9  # of the robot, fingers included
    camera: str = "base_camera"
    robot: str = "panda"
    picture: int = 256  # as of EnvSpec


TASKS = {
    "PickCube-v1": Task("pick up the red cube and move it to the green ball", "PickCube-v1"),
    "StackCube-v1": Task("put the red cube on the green cube", "StackCube-v1"),
    "PushCube-v1": Task("push the blue cube to the target", "PushCube-v1"),
    "PullCube-v1": Task("pull the blue cube to the target", "PullCube-v1"),
    "PlaceSphere-v1": Task("put the blue ball into the bin", "PlaceSphere-v1"),
}
# RLinf's: name → which of its 25 things and of its 21 tables; each thing is a task of its own, such
# as NAME/carrot.
PUT_ON_PLATE = {
    "PutOnPlateInScene25Main-v3": (slice(0, 16), slice(0, 16)),
    "PutOnPlateInScene25Main-v3-test": (slice(16, 25), slice(16, 21)),
}
DEFAULT_TASKS = ("PickCube-v1",)
HORIZON = 80  # control steps (RLinf, RL-VLA³); ManiSkill's own limits are 50
ACTIONS = 7
# The Panda's angles around where it starts, radians; its fingers, metres.
STATE_RANGE = (
    (-1.0, -1.0, -1.0, -2.8, -1.0, 1.2, -0.5, 0.0, 0.0),
    (1.0, 1.4, 1.0, -1.0, 1.0, 3.4, 2.0, 0.04, 0.04),
)


def plate_assets() -> tuple[Path, Path, Path]:
    """Finds RLinf's things, plates and tables, and ManiSkill's stage and robot. Raises UserError.

    The two environment variables are ManiSkill's and RLinf's own."""
    own = Path(os.environ.get("MS_ASSET_DIR", Path.home() / ".maniskill")) / "data"
    rlinf = Path(os.environ.get("MANISKILL_ASSET_DIR", ROOT / "assets" / "maniskill"))
    things = rlinf / "carrot"
    stage = own / "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb"
    robot = own / "robots/widowx/wx250s.urdf"
    copied = "set MANISKILL_ASSET_DIR to a copy of the Hugging Face data set RLinf/maniskill_assets"
    download = "python -m mani_skill.utils.download_asset"
    needed = {
        things / "more_carrot" / "model_db.json": copied,
        stage: f"run `{download} bridge_v2_real2sim`",
        robot: f"run `{download} widowx250s`",
    }
    for path, how in needed.items():
        missing = f"PutOnPlateInScene25Main-v3 needs assets that are not installed ({path})"
        require(path.is_file(), f"{missing}: {how}")
    return things, stage, robot


def expand(name: str) -> dict[str, Task]:
    """Finds the tasks that a name stands for. Raises UserError."""
    if name in TASKS:
        return {name: TASKS[name]}
    suite, _, thing = name.partition("/")
    unknown = f"unknown ManiSkill task {name!r}: choose"
    require(suite in PUT_ON_PLATE, f"{unknown} among {', '.join((*TASKS, *PUT_ON_PLATE))}")
    folder, _, _ = plate_assets()
    known = models(folder / "more_carrot")
    plate = next(iter(models(folder / "more_plate").values()))["name"]
    tasks = {}
    for i, key in enumerate(list(known)[PUT_ON_PLATE[suite][0]]):
        prompt = f"put {known[key]['name']} on {plate}"
        tasks[f"{suite}/{key}"] = Task(
            prompt, suite, {"thing": i}, 8, "3rd_view_camera", "widowx", 224
        )
    require(not thing or name in tasks, f"{unknown} {suite} or one of {', '.join(tasks)}")
    return {name: tasks[name]} if thing else tasks


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    known = {name: task for given in tasks or DEFAULT_TASKS for name, task in expand(given).items()}
    prompts = tuple(task.prompt for task in known.values())
    joints = max(task.joints for task in known.values())
    usual = tuple(bound[:joints] for bound in STATE_RANGE)
    robot = " and ".join(sorted({task.robot for task in known.values()}))
    picture = max(task.picture for task in known.values())
    shape = (1, image_size, joints, ACTIONS, HORIZON, usual)
    return EnvSpec(tuple(known), prompts, *shape, robot=robot, picture=picture)


def check_drawing(device: torch.device) -> None:
    """Raises UserError where Vulkan finds nothing to draw with."""
    if device.type == "cpu" and SOFTWARE_VULKAN.is_file():
        os.environ.setdefault("VK_ICD_FILENAMES", str(SOFTWARE_VULKAN))
    import sapien

    try:
        sapien.render.RenderSystem(sapien.Device(str(device)))
    except RuntimeError as error:
        need = "software Vulkan of Mesa 25 or newer: run `bash setup.sh --maniskill`"
        if device.type != "cpu":
            vulkan = "libGLX_nvidia.so.0, named by a JSON file in /usr/share/vulkan/icd.d"
            need = f"a CUDA device and its driver's Vulkan ({vulkan})"
        what = f"ManiSkill finds nothing to draw with on {device} ({error})"
        raise UserError(f"{what}; it needs {need}") from None


def models(folder: Path) -> dict[str, dict]:
    """Reads what model_db.json says of each thing, plate or table of a folder, in order."""
    return json.loads((folder / "model_db.json").read_text())


def shrink(pictures: torch.Tensor, rows: int, columns: int, mode="bilinear") -> torch.Tensor:
    """Resizes pictures [N, H, W, 3] uint8 to so many pixels; those of that size stay."""
    if pictures.shape[1:3] == (rows, columns):
        return pictures
    pixels = pictures.permute(0, 3, 1, 2).float()
    small = interpolate(pixels, (rows, columns), mode=mode, antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def square(pictures: torch.Tensor, size: int, fit: envs.Fit) -> torch.Tensor:
    """Makes pictures [N, H, W, 3] uint8 squares of `size`, a wide one by `fit`.

    "letterbox" is openpi's resize_with_pad (within a grey level of Pillow's rounding), "bicubic"
    the resize-naive of OpenVLA."""
    if fit != "letterbox":
        return shrink(pictures, size, size, "bicubic" if fit == "bicubic" else "bilinear")
    longest = max(pictures.shape[1:3])
    rows, columns = (side * size // longest for side in pictures.shape[1:3])
    top = (size - rows) // 2
    left = (size - columns) // 2
    bars = (0, 0, left, size - columns - left, top, size - rows - top)
    return pad(shrink(pictures, rows, columns), bars)


def make(simulator: str, image_size: int, count: int, device: torch.device):
    """Makes a ManiSkill env of `count` scenes that draws nothing unless asked."""
    import mani_skill.envs  # noqa: F401  registers the tasks
    from mani_skill.envs.utils.observations import parse_obs_mode_to_struct
    from mani_skill.utils.registration import REGISTERED_ENVS

    options = {
        "num_envs": count,
        "obs_mode": "none",
        "reward_mode": "none",
        "sim_backend": f"physx_{device}",
        "render_backend": f"sapien_{device}",
        "sensor_configs": {"shader_pack": "default"},
    }
    if simulator in PUT_ON_PLATE:
        from envs.put_on_plate import PutOnPlate

        sim = PutOnPlate(*plate_assets(), *PUT_ON_PLATE[simulator], **options)
        drawn = "rgb+segmentation"
    else:
        options["sensor_configs"] |= {"width": image_size, "height": image_size}
        robot = {"robot_uids": "panda", "control_mode": "pd_ee_delta_pose"}
        sim = REGISTERED_ENVS[simulator].cls(**robot, **options)
        drawn = "rgb"
    sim.obs_mode_struct = parse_obs_mode_to_struct(drawn)  # a step still draws nothing
    sim._hidden_objects.clear()  # PickCube's goal, which nothing but this ball shows
    return sim


def begin(sim, rows: list[int], seeds: list[int], episode: dict) -> None:
    """Starts episodes in some rows, each from its own seed; the others keep their targets.

    BaseEnv.reset has one seed for all, and forgets the others' targets."""
    # Whatever is set, is set in these rows alone.
    sim.scene._reset_mask = these = mask_of(sim, rows)
    sim._elapsed_steps[these] = 0
    sim._clear_sim_state()
    sim.agent.reset()
    with torch.random.fork_rng(devices=[sim.device] if sim.device.type == "cuda" else []):
        for row, seed in zip(rows, seeds, strict=True):
            sim.scene._reset_mask = mask_of(sim, [row])
            torch.manual_seed(seed)
            sim._batched_episode_rng[row] = sim._episode_rng = np.random.RandomState(seed)
            index = torch.tensor([row], device=sim.device)
            sim._initialize_episode(index, {"seeds": [seed], **episode})
    if sim.gpu_sim_enabled:
        sim.scene._gpu_apply_all()
        sim.scene.px.gpu_update_articulation_kinematics()
        sim.scene._gpu_fetch_all()
    sim.scene._reset_mask = these
    sim.agent.controller.reset()
    sim.scene._reset_mask = torch.ones_like(these)


def mask_of(sim, rows: list[int]) -> torch.Tensor:
    mask = torch.zeros(sim.num_envs, dtype=torch.bool, device=sim.device)
    mask[torch.tensor(rows, device=sim.device)] = True
    return mask


class Envs(envs.Envs):
    """The envs of one lane. A simulator is made when first played; on a CPU one per row."""

    def __init__(self, tasks: tuple[str, ...], image_size: int, count: int, device: str):
        super().__init__(tasks, image_size, count, torch.device(device))
        self.known = [expand(name)[name] for name in tasks]
        check_drawing(self.device)
        self.joints = max(task.joints for task in self.known)
        self.sims = {}  # by (name,) or (name, row)
        self.playing: dict[tuple, list[int]] = {}  # rows of the lane that each simulator plays
        self.index: dict[tuple, torch.Tensor] = {}  # the same, on the device

    def reset(self, rows: list[int], task: int, seeds: list[int]) -> None:
        """seeds: below 2³²."""
        for played in self.playing.values():
            played[:] = [row for row in played if row not in rows]
        chosen = self.known[task]
        groups = {(chosen.simulator,): (list(rows), seeds)}
        if self.device.type == "cpu":
            pairs = zip(rows, seeds, strict=True)
            groups = {(chosen.simulator, row): ([row], [seed]) for row, seed in pairs}
        for key, (own, drawn) in groups.items():
            single = len(key) == 2
            if key not in self.sims:
                scenes = 1 if single else self.count
                self.sims[key] = make(chosen.simulator, self.size, scenes, self.device)
            begin(self.sims[key], [0] if single else own, drawn, chosen.episode)
            self.playing[key] = sorted(self.playing.get(key, []) + own)
        self.playing = {key: own for key, own in self.playing.items() if own}
        device = self.device
        self.index = {key: torch.tensor(own, device=device) for key, own in self.playing.items()}

    def _at(self, key: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
        """What a simulator says about the rows that it plays: of [its scenes, …], [rows, …]."""
        return values if len(values) == len(self.index[key]) else values[self.index[key]]

    def step(self, actions: torch.Tensor) -> Step:
        success = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        actions = actions.to(self.device, torch.float32)
        for key, index in self.index.items():
            sim = self.sims[key]
            *_, info = sim.step(actions[index] if sim.num_envs == 1 else actions)
            success[index] = self._at(key, info["success"])
        return Step(success.float(), success)

    def observe(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.count, 1, self.size, self.size, 3)
        images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        states = torch.zeros(self.count, self.joints, device=self.device)
        for key, index in self.index.items():
            sim = self.sims[key]
            camera = next(task.camera for task in self.known if task.simulator == key[0])
            pictures = self._at(key, sim._get_obs_sensor_data()[camera]["rgb"])
            images[index, 0] = square(pictures, self.size, self.fit)
            joints = self._at(key, sim.agent.robot.get_qpos()).float()
            states[index, : joints.shape[1]] = joints
        return images, states

    def close(self) -> None:
        for sim in self.sims.values():
            sim.close()
        self.sims = {}
