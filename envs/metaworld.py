"""Meta-World v3 (https://github.com/Farama-Foundation/Metaworld): 50 tasks of a Sawyer arm.

The policy sees one camera and the hand's own position, never an object's: `state` is obs[:4] (hand
x, y, z in metres, gripper opening in [0, 1]). A step takes 0.3 ms and a 64-pixel frame 7 to 13 ms,
spent on 68 thousand triangles rather than on pixels. So frames are drawn only in `observe`, without
shadows, reflections or multisampling, of thinned meshes: 3 times as fast.

Suites are Meta-World's own: `--suite MT10`, `--suite MT50`, and `MT1-reach` or just `reach` for one
task. As in them the scripted experts are told the goal (`Env.state[-3:]`, which the policy never
sees); where only a mark shows it, the policy sees the mark.

Left out: the dense reward (reward is 1 on success, as each task defines it, else 0), the
meta-learning benchmarks (ML1 to ML45), which hide the goal, and the 50 fixed goals that the suites
draw per task: here a seed names one of endlessly many.
"""

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

import envs
from envs import EnvSpec, Step, drawing, stability
from errors import require

# Instructions; the wording is ours, Meta-World itself has none. On these tasks the scripted experts
# mostly need at most 75 control steps,
SHORT_TASKS = {
    "button-press": "press the button on the wall",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button from above behind the wall",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-unlock": "unlock the door",
    "faucet-close": "turn the faucet clockwise",
    "faucet-open": "turn the faucet counter clockwise",
    "hammer": "hammer the screw into the wall",
    "hand-insert": "put the hand into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "pick-place": "pick up the puck and place it at the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate back out of the cabinet from the side",
    "plate-slide-side": "slide the plate into the cabinet from the side",
    "push": "push the puck to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "stick-push": "push the box with the stick",
    "sweep-into": "sweep the puck into the hole",
}
# and on these more.
LONG_TASKS = {
    "assembly": "put the nut on the peg",
    "basketball": "dunk the basketball into the basket",
    "bin-picking": "move the cube from one bin to the other",
    "box-close": "put the lid on the box",
    "coffee-pull": "pull the mug away from the coffee machine",
    "disassemble": "take the nut off the peg",
    "door-open": "open the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the side of the box",
    "peg-unplug-side": "unplug the peg from the side of the box",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place-wall": "pick up the puck and place it behind the wall",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "shelf-place": "place the puck on the shelf",
    "soccer": "kick the ball into the goal",
    "stick-pull": "pull the box with the stick",
    "sweep": "sweep the puck off the table",
    "window-close": "close the window",
    "window-open": "open the window",
}
PROMPTS = dict(sorted((SHORT_TASKS | LONG_TASKS).items()))
DEFAULT_TASKS = ("button-press", "faucet-open", "handle-press")
SUITES = {"MT10": tuple(task.removesuffix("-v3") for task in MT10_V3), "MT50": tuple(PROMPTS)}
# Tasks whose goal nothing but a coloured sphere shows, and the sphere's name in the model.
MARKED = (
    "hand-insert pick-out-of-hole pick-place pick-place-wall push push-back push-wall reach "
    "reach-wall stick-pull"
)
GOAL_MARKS = {"coffee-pull": "mug_goal"} | dict.fromkeys(MARKED.split(), "goal")
CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)  # metres; where LeRobot's Meta-World data was recorded from
HORIZON = 90  # control steps; the scripted experts need 20–65 on the default tasks
LONG_HORIZON = 150  # control steps of the longer tasks (RLinf: 100, Meta-World: 500)
KEEP = 8  # an evaluation lane of MT50 meets 25 tasks
# What Meta-World lets the hand reach, metres (`hand_low`, `hand_high`), and the gripper's opening.
STATE_RANGE = ((-0.5, 0.4, 0.05, 0.0), (0.5, 1.0, 0.5, 1.0))
CELL = 0.01  # metres; a pixel of a 64-pixel frame covers 1.5 cm of the table


def expand(name: str) -> tuple[str, ...]:
    """Lists the tasks of a suite, or of `reach`, `reach-v3`, `MT1-reach`. Raises UserError."""
    task = name.removeprefix("MT1-").removesuffix("-v3")
    unknown = f"unknown Meta-World task {name!r} (another --env's?)"
    choose = f"choose MT10, MT50, MT1-TASK or TASK, one of {', '.join(PROMPTS)}"
    require(name in SUITES or task in PROMPTS, f"{unknown}: {choose}")
    return SUITES.get(name, (task,))


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    tasks = tuple(dict.fromkeys(task for name in tasks for task in expand(name))) or DEFAULT_TASKS
    prompts = tuple(PROMPTS[task] for task in tasks)
    limits = tuple(LONG_HORIZON if task in LONG_TASKS else HORIZON for task in tasks)
    shape = (1, image_size, 4, 4, max(limits), STATE_RANGE)
    return EnvSpec(tasks, prompts, *shape, limits=limits, picture=480, rate=80.0)


# GL contexts of this process by (task, pixels), the one used last at the end; envs of a task share.
RENDERERS: dict[tuple[str, int], mujoco.Renderer] = {}
# Without them MuJoCo prints a traceback when it drops a renderer whose context could not be made.
mujoco.Renderer._gl_context = None
mujoco.Renderer._mjr_context = None


class Env(envs.Env):
    """One env: a simulator (0.2 s, 40 MB) for each of the last KEEP tasks."""

    def __init__(self, tasks: tuple[str, ...], image_size: int, quality: str = "fast"):
        super().__init__(tasks, image_size, quality)
        drawing.choose_device()
        self.sims = {}  # by task, the one used last at the end
        # Show no site but one that alone shows a goal, which `_build` puts into group 1.
        self.option = mujoco.MjvOption()
        self.option.sitegroup[:] = 0
        self.option.sitegroup[1] = 1

    def _build(self, name: str):
        sim = ALL_V3_ENVIRONMENTS[name + "-v3"]()
        # Draw object poses from the seed, instead of Meta-World's own task sampling.
        sim._set_task_called = True
        sim._freeze_rand_vec = False
        sim.seeded_rand_vec = True
        sim.max_path_length = 10**9  # the time limit is the lanes'
        # Have the goal in `state`, as in MT1 to MT50, and in the cached bounds that clip `state`.
        sim._partially_observable = False
        sim.__dict__.pop("sawyer_observation_space", None)
        quality = sim.model.vis.quality
        quality.shadowsize = quality.offsamples = 0  # else 95 ms a frame
        sim.model.cam(CAMERA).pos[:] = CAMERA_POSITION
        sim.model.site_group[:] = 0
        if name in GOAL_MARKS:
            sim.model.site(GOAL_MARKS[name]).group = 1
        drawing.thin_meshes(sim.model, CELL)
        return sim

    def reset(self, task: int, seed: int) -> None:
        self.name = self.tasks[task]
        self.sim = self.sims.pop(task, None) or self._build(self.name)
        self.sims[task] = self.sim
        if len(self.sims) > KEEP:
            del self.sims[next(iter(self.sims))]
        self.sim.seed(seed)
        self.state = self.sim.reset(seed=seed)[0]

    def step(self, action: np.ndarray) -> Step:
        """action [4]: hand displacement x, y, z (1 is 1 cm) and gripper, clipped to [-1, 1]."""
        self.state, _, _, _, info = self.sim.step(np.clip(action, -1.0, 1.0))
        stability.check(self.sim.data)
        success = bool(info["success"])
        return Step(float(success), success)

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        return self.film(self.size)[None], self.state[:4].astype(np.float32)

    def renderer(self) -> str:
        return drawing.renderer()

    def film(self, size: int = 256) -> np.ndarray:
        renderer = self._renderer(size)
        if mark := GOAL_MARKS.get(self.name):  # Meta-World moves it late or, in one task, elsewhere
            self.sim.data.site(mark).xpos[:] = self.sim._target_pos
        renderer.update_scene(self.sim.data, CAMERA, self.option)
        # Meta-World's cameras are mounted upside down.
        return np.ascontiguousarray(renderer.render()[::-1, ::-1])

    def _renderer(self, size: int) -> mujoco.Renderer:
        key = (self.name, size)
        if key not in RENDERERS:
            visual = self.sim.model.vis.global_
            visual.offwidth = visual.offheight = size
            renderer = mujoco.Renderer(self.sim.model, size, size)
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            RENDERERS[key] = renderer
            if len(RENDERERS) > KEEP:
                RENDERERS.pop(next(iter(RENDERERS))).close()
        RENDERERS[key] = RENDERERS.pop(key)
        return RENDERERS[key]

    def close(self) -> None:
        """Frees this process's GL contexts; at the interpreter's exit EGL would complain."""
        while RENDERERS:
            RENDERERS.popitem()[1].close()
        self.sims = {}
