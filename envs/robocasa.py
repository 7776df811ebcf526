"""RoboCasa (https://robocasa.ai): kitchen tasks of a Panda arm on wheels, in robosuite.

RoboCasa needs robosuite 1.5 and so an environment of its own, since LIBERO needs 1.4; there, `--env
robocasa` is all:

    python3 -m venv .venv-robocasa && source .venv-robocasa/bin/activate
    pip install -r requirements-robocasa.txt
    # clones of github.com/ARISE-Initiative/robosuite (its master) and robocasa/robocasa
    pip install -e ROBOSUITE -e ROBOCASA
    python -m robocasa.scripts.download_kitchen_assets       # about 10 GB
    python train.py --env robocasa --tasks CloseDrawer --image-size 224

The policy sees what RLinf's does: the left and the hand camera (224 pixels there), `STATE` [25],
and actions [12] in [-1, 1]: hand displacement 3 and rotation 3, gripper (1 closes), base velocity
3, torso, and which of the two moves, arm (-1) or base (1). A seed draws the kitchen, objects,
places and instruction ("Close the left drawer."); the prompts of the spec only name the task.
Left out: soft resets (every episode builds its kitchen anew, as in RoboCasa), faster drawing.
"""

import logging
import random
import re

import numpy as np

import envs
from envs import EnvSpec, Step, drawing, stability
from errors import UserError, require

PACKAGES = ("robosuite", "robocasa")

ROBOT = "PandaOmron"
VIEWS = ("robot0_agentview_left", "robot0_eye_in_hand")
# robosuite's observations, in RLinf's order, and the lowest and highest usual numbers of each in
# any kitchen: metres, quaternions (x, y, z, w), metres per second.
STATE = {
    "robot0_eef_pos": ((0.0, -6.0, 0.5), (6.0, 0.0, 2.0)),
    "robot0_eef_quat": ((-1.0,) * 4, (1.0,) * 4),
    "robot0_gripper_qpos": ((-0.05,) * 2, (0.05,) * 2),
    "robot0_gripper_qvel": ((-0.2,) * 2, (0.2,) * 2),
    "robot0_base_to_eef_pos": ((-1.0, -1.0, -0.5), (1.0, 1.0, 1.5)),
    "robot0_base_to_eef_quat": ((-1.0,) * 4, (1.0,) * 4),
    "robot0_base_pos": ((0.0, -6.0, 0.0), (6.0, 0.0, 1.0)),
    "robot0_base_quat": ((-1.0,) * 4, (1.0,) * 4),
}
LOW, HIGH = (sum(bounds, ()) for bounds in zip(*STATE.values(), strict=True))
ACTIONS = 12
HORIZON = 300  # control steps (RLinf), at 20 per second
DEFAULT_TASKS = ("CloseDrawer",)
# Kitchens to draw from: arguments of RoboCasa's environments, such as layout_ids and style_ids.
KITCHENS: dict = {}


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    """tasks: names of RoboCasa's classes; `Env` says which there are in this version."""
    tasks = tuple(dict.fromkeys(tasks)) or DEFAULT_TASKS
    for name in tasks:
        like = f"the names look like {DEFAULT_TASKS[0]} or PickPlaceCounterToSink"
        well_formed = re.fullmatch(r"([A-Z][a-z0-9]*)+", name)
        require(well_formed, f"unknown RoboCasa task {name!r}: {like}")
    prompts = tuple(" ".join(re.findall(r"[A-Z][a-z0-9]*", name)).lower() for name in tasks)
    shape = (len(VIEWS), image_size, len(LOW), ACTIONS, HORIZON, (LOW, HIGH))
    return EnvSpec(tasks, prompts, *shape, picture=224)


class Env(envs.Env):
    """One env. Another task or episode is another kitchen: some seconds."""

    def __init__(self, tasks: tuple[str, ...], image_size: int, quality: str = "fast"):
        super().__init__(tasks, image_size, quality)
        drawing.choose_device()
        self.task = -1
        self.sim = None

    def _make(self, name: str):
        with drawing.hidden_device():
            import robocasa  # noqa: F401  registers the tasks
            import robosuite
        from robocasa.environments.kitchen.kitchen import REGISTERED_KITCHEN_ENVS
        from robosuite.controllers import load_composite_controller_config

        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
        known = ", ".join(sorted(REGISTERED_KITCHEN_ENVS))
        unknown = f"this RoboCasa has no task {name!r}: choose among {known}"
        require(name in robosuite.environments.REGISTERED_ENVS, unknown)
        return robosuite.make(
            env_name=name,
            robots=ROBOT,
            # The robot's default, as in RoboCasa's data.
            controller_configs=load_composite_controller_config(controller=None, robot=ROBOT),
            has_renderer=False,
            has_offscreen_renderer=True,
            use_camera_obs=False,
            ignore_done=True,
            translucent_robot=False,
            **KITCHENS,
        )

    def reset(self, task: int, seed: int) -> None:
        if task != self.task:
            self.close()
            self.sim = self._make(self.tasks[task])
            self.task = task
        random.seed(seed)
        np.random.seed(seed)
        self.sim.rng = np.random.default_rng(seed)
        try:
            self.seen = self.sim.reset()
        except (FileNotFoundError, ValueError) as error:
            if "No such file" not in str(error):  # so say both Python and MuJoCo
                raise
            missing = f"assets of RoboCasa's kitchens are missing ({error})"
            download = "python -m robocasa.scripts.download_kitchen_assets"
            raise UserError(f"{missing}: run `{download}`") from None
        self.prompt = self.sim.get_ep_meta()["lang"]

    def step(self, action: np.ndarray) -> Step:
        """action [12] float32, each clipped to [-1, 1]."""
        self.seen = self.sim.step(np.clip(action, -1.0, 1.0))[0]
        stability.check(self.sim.sim.data._data)
        success = bool(self.sim._check_success())
        return Step(float(success), success)

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        pictures = np.stack([self._render(view, self.size) for view in VIEWS[: self.views]])
        numbers = [np.asarray(self.seen[name], np.float32).reshape(-1) for name in STATE]
        return pictures, np.concatenate(numbers)

    def renderer(self) -> str:
        return drawing.renderer()

    def film(self, size: int = 256) -> np.ndarray:
        return self._render(VIEWS[0], size)

    def _render(self, camera: str, size: int) -> np.ndarray:
        # GL's rows run from the bottom up.
        return self.sim.sim.render(width=size, height=size, camera_name=camera)[::-1]

    def close(self) -> None:
        if self.sim is not None:
            self.sim.close()
        self.task = -1
        self.sim = None
        self.prompt = None
