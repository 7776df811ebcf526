"""LIBERO (https://github.com/Lifelong-Robot-Learning/LIBERO): tasks of a Panda arm.

Scenes, initial states and success are LIBERO's own code. Stepping and drawing are ours and give the
same numbers (tests compare both):

- One control step is 25 physics steps of 2 ms under robosuite's operational space controller.
  robosuite evaluates the dynamics three times for each and computes every observable; once, and the
  policy's eight numbers, are enough.
- A scene takes a second or two to build. It is kept, with every initial state that was met, so a
  reset costs microseconds.
- `quality="fast"` leaves out shadows, multisampling and detail finer than the pixels of a frame.
- robosuite samples its observables up to two physics steps before a control step ends, and so do
  state and pictures here.

An episode begins at one of some fixed initial states (50 in LIBERO's own suites) and lets it
settle. The place of cabinets and stoves is not in it; LIBERO draws it at every reset, here it is
always what seed 0 gives (as RLinf does). `libero_suites` finds tasks and their files. Left out:
demonstrations, segmentation and depth.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import tempfile
import types
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

import envs
from envs import EnvSpec, Step, drawing, libero_suites, stability
from errors import UserError, require

CAMERAS = ("agentview", "robot0_eye_in_hand")
SETTLE = 15  # steps of no-op before the first observation (RLinf; openpi and openvla-oft take 10)
NO_OP = np.array([0.0, 0, 0, 0, 0, 0, -1])  # -1 opens the gripper
SUBSTEPS = 25  # physics steps of a control step
TIMESTEP = 0.002  # seconds of a physics step
PERIOD = 0.05  # seconds between two samples of robosuite's observables
# The arm is pulled towards its first posture with this stiffness, critically damped (robosuite).
REST_STIFFNESS = 10.0
REST_DAMPING = 2.0 * math.sqrt(REST_STIFFNESS)
# Modules that LIBERO and robosuite import and never need here.
STAND_INS = (
    "matplotlib",
    "matplotlib.cm",
    "cv2",
    "numba",
    "gym",
    "robosuite.macros_private",
    "wand",
    "wand.api",
    "wand.image",
    "skimage",
    "skimage.filters",
)
INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION

# The hand on tables and floors, metres; around pointing down, radians; its fingers, metres.
STATE_RANGE = (
    (-0.6, -0.5, 0.0, 1.5, -1.5, -1.5, 0.0, -0.04),
    (0.4, 0.5, 1.5, 4.0, 1.5, 1.5, 0.04, 0.0),
)
FILM = 256  # pixels, square: of frames for people
# With quality "fast", vertices closer than this / s metres are one, in frames of s pixels. A pixel
# covers 1/s metres of the table in the front camera, and a tenth of that near the hand's.
COARSE = 1.0  # of the scenery and the arm
FINE = 0.3  # of what the hand's camera sees close by
TEXELS = 4  # largest side of a texture, in sides of a frame
DRAWS = 20  # of where objects are, until they fit; of 427 tasks that were built none needs a second
MOST_SCENES = 10  # kept beyond those that an env is playing

if (
    not any(map(libero_suites.folder_of, libero_suites.PACKAGES))
    or importlib.util.find_spec("robosuite") is None
):
    raise ModuleNotFoundError("libero", name="libero")


def spec(tasks: tuple[str, ...], image_size: int) -> EnvSpec:
    """tasks: names of suites and of tasks; none means libero_10."""
    tasks = tasks or ("libero_10",)
    named = [libero_suites.tasks_of(name) for name in tasks]
    found = {task.name: task for group in named for task in group}.values()
    prompts = tuple(map(libero_suites.prompt, found))
    limits = tuple(libero_suites.limit_of(task.suite) for task in found)
    names = tuple(task.name for task in found)
    shape = (len(CAMERAS), image_size, 8, 7, max(limits), STATE_RANGE)
    states = min(libero_suites.count(task.states) for task in found)
    note = "".join(map(libero_suites.left_out, tasks))
    facts = {"robot": "libero", "states": states, "note": note, "rate": 20.0}
    return EnvSpec(names, prompts, *shape, limits=limits, **facts)


perturbed = libero_suites.perturbed


@contextlib.contextmanager
def configured(package: str):
    """Lets a LIBERO package be imported without its question, where its data is to be, and without
    its files in the user's home; one that was configured stays as it is."""
    home = Path.home() / f".{package}" / "config.yaml"
    if "LIBERO_CONFIG_PATH" in os.environ or home.is_file():
        yield
        return
    folder = libero_suites.folder_of(package)
    places = {
        "benchmark_root": folder,
        "bddl_files": folder / "bddl_files",
        "init_states": folder / "init_files",
        "datasets": folder.parent / "datasets",
    }
    with tempfile.TemporaryDirectory() as made:
        text = json.dumps({what: str(place) for what, place in places.items()})
        Path(made, "config.yaml").write_text(text)  # JSON is YAML
        os.environ["LIBERO_CONFIG_PATH"] = made
        try:
            yield
        finally:
            del os.environ["LIBERO_CONFIG_PATH"]


class StandIn(type):
    """Stands for whatever is looked up in a module that is not there, or in what was found so."""

    def __getattr__(cls, name: str) -> "StandIn":
        return stand_in(name)


def stand_in(name: str) -> StandIn:
    if name.startswith("__"):
        raise AttributeError(name)
    return StandIn(name, (), {})


@cache
def original(package: str = "") -> types.ModuleType:
    """Imports a LIBERO package, with stand-ins for what it never needs here. Returns its envs.

    matplotlib makes a folder in the user's home, OpenCV and Wand want system libraries, numba
    compiles for half a minute; robosuite warns without private macros and logs to /tmp. package:
    none means the first that is installed."""
    package = package or next(filter(libero_suites.folder_of, libero_suites.PACKAGES))
    added = {name: types.ModuleType(name) for name in STAND_INS if name not in sys.modules}
    for module in added.values():
        module.__getattr__ = stand_in
    if "numba" in added:
        added["numba"].jit = lambda **_: lambda function: function
    sys.modules |= added
    try:
        with drawing.hidden_device(), configured(package):
            return importlib.import_module(f"{package}.{package}.envs")
    finally:
        for name in added:
            del sys.modules[name]


@cache
def rotations() -> types.ModuleType:
    """Imports robosuite's rotations."""
    original()
    return importlib.import_module("robosuite.utils.transform_utils")


def preload() -> None:
    original()


def build_problem(task: libero_suites.Task, image_size: int, quality: str):
    """Builds LIBERO's env of a task, with its model. The user's random numbers stay. Raises
    UserError where its assets are not there, or its objects do not fit."""
    module = original(task.package)
    from robosuite.controllers import load_controller_config
    from robosuite.utils.errors import RandomizationError

    file = str(task.file)
    kind = module.TASK_MAPPING[module.bddl_utils.get_problem_info(file)["problem_name"]]
    if quality == "fast":
        kind = thinned(kind, image_size)
    random = np.random.get_state()
    np.random.seed(0)
    try:
        for _ in range(DRAWS):
            with contextlib.suppress(RandomizationError):  # objects did not fit: LIBERO draws again
                return kind(
                    file,
                    **{"robots": ["Panda"], **task.settings},
                    controller_configs=load_controller_config(default_controller="OSC_POSE"),
                    initialization_noise=None,
                    use_camera_obs=False,
                    has_offscreen_renderer=False,
                    hard_reset=False,
                )
    except FileNotFoundError as error:
        get = f"{task.package}-download-assets"
        known = importlib.metadata.entry_points(group="console_scripts").names
        how = f"{get} gets them" if get in known else "its package did not bring them"
        lacks = f"LIBERO's {task.name} cannot be built: its assets are not here"
        raise UserError(f"{lacks} (no {error.filename}), and {how}") from None
    else:
        found = f"LIBERO's {task.name} cannot be built: its objects do not fit in the scene"
        raise UserError(f"{found}, wherever they were drawn in {DRAWS} tries")
    finally:
        np.random.set_state(random)
        # Return freed memory to the system: compiling a model takes three times its size.
        with contextlib.suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def thinned(kind: type, image_size: int) -> type:
    """The class of a scene whose textures and meshes are thinned to what a frame can show."""
    from robosuite.utils.binding_utils import MjSim

    class Thinned(kind):
        def _initialize_sim(self, xml_string=None):
            """Does what robosuite's does, but for what is drawn."""
            near = ("gripper0_", *self.objects_dict, *self.fixtures_dict)

            def cell(mesh: str) -> float:
                return (FINE if mesh.startswith(near) else COARSE) / image_size

            texels = max(TEXELS * image_size, FILM)
            xml, files = drawing.thin_assets(self.model.get_xml(), texels, cell)
            self.sim = MjSim(mujoco.MjModel.from_xml_string(xml, files))
            self.sim.forward()
            self.initialize_time(self.control_freq)

    Thinned.__name__ = kind.__name__
    return Thinned


class Pose(NamedTuple):
    """What the controller knows of the arm: copies, so that they stay what they were."""

    position: np.ndarray  # [3] metres, of the grip site
    rotation: np.ndarray  # [3, 3]
    velocity: np.ndarray  # [6] linear, angular
    jacobian: np.ndarray  # [6, 7]
    mass: np.ndarray  # [7, 7]
    joints: np.ndarray  # [7] radians
    speeds: np.ndarray  # [7]


class Memory(NamedTuple):
    """Everything of an env that the next steps depend on. An env has attributes of these names."""

    physics: np.ndarray  # MuJoCo's integration state: time, qpos, qvel, ctrl, warm start …
    goal: tuple[np.ndarray, np.ndarray]  # position [3], rotation [3, 3]: the controller's aim
    stale: Pose | None  # what robosuite's controller still believes in, right after a reset
    grip: tuple[float, float]  # each finger's in [-1, 1], what the gripper's rate limit has come to
    clock: float  # seconds since robosuite last sampled its observables
    sampled: bool
    seen: tuple[np.ndarray, np.ndarray]  # joint positions [nq] and visible lamps when it did
    fingers: np.ndarray  # [2] one physics step later
    lamps: np.ndarray  # visibility of what glows when switched on


class Scene:
    """A task's model, success and initial states: what envs of a process that play it share."""

    def __init__(self, task: str, image_size: int, quality: str):
        found = libero_suites.find(task)
        self.states = libero_suites.initial_states(found.states)
        self.quality = quality
        self.buffer = max(image_size, FILM)  # pixels, the largest frame
        self.problem = build_problem(found, image_size, quality)
        self.problem.sim.forward()
        self.problem.visualize({what: False for what in self.problem._visualizations})
        self.model: mujoco.MjModel = self.problem.sim.model._model
        sizes = self.states.shape[1], 1 + self.model.nq + self.model.nv
        other = f"the initial states of the LIBERO task {task} are of another scene than its file"
        require(sizes[0] == sizes[1], f"{other}: {sizes[0]} numbers instead of {sizes[1]}")
        self.view = mujoco.MjData(self.model)  # poses of what is drawn
        self.settled: dict[int, Memory] = {}
        self.gl: mujoco.GLContext | None = None  # once a frame is drawn
        self.players = 0
        self._find_arm(self.problem.robots[0])
        self.lamps = []
        for name in dict.fromkeys(vars(self.problem).get("visualization_sites_list", ())):
            sites = self.problem.get_object(name).object_properties["vis_site_names"]
            self.lamps += [self.model.site(site).id for site, _ in sites.values()]
        self.start = self._remember_start(self.controller)

    def _find_arm(self, robot) -> None:
        """Looks up where the arm is in the model, and how robosuite controls it."""
        self.controller = robot.controller
        self.site = robot.eef_site_id
        self.hand = self.model.body(robot.robot_model.eef_name).id
        self.arm = in_a_row(robot._ref_joint_vel_indexes)
        self.arm_qpos = in_a_row(robot._ref_joint_pos_indexes)
        self.arm_actuators = in_a_row(robot._ref_joint_actuator_indexes)
        self.finger_actuators = in_a_row(robot._ref_joint_gripper_actuator_indexes)
        self.finger_qpos = np.array(robot._ref_gripper_joint_pos_indexes)
        self.torque_limits = self.model.actuator_ctrlrange[self.arm_actuators].T.copy()  # [2, 7]
        low, high = self.model.actuator_ctrlrange[self.finger_actuators].T
        self.grip_bias = 0.5 * (high + low)
        self.grip_weight = 0.5 * (high - low)
        self.grip_speed = robot.gripper.speed

    def _remember_start(self, controller) -> Memory:
        """What robosuite has right after its own reset."""
        data = self.problem.sim.data._data
        lamps = self.model.site_rgba[self.lamps, 3]
        return Memory(
            physics=integration_state(self.model, data),
            goal=(controller.goal_pos, controller.goal_ori),
            stale=Pose(
                controller.ee_pos,
                controller.ee_ori_mat,
                np.concatenate([controller.ee_pos_vel, controller.ee_ori_vel]),
                controller.J_full,
                controller.mass_matrix,
                controller.joint_pos,
                controller.joint_vel,
            ),
            grip=(0.0, 0.0),
            clock=TIMESTEP,
            sampled=True,
            seen=(data.qpos.copy(), lamps),
            fingers=data.qpos[self.finger_qpos],
            lamps=lamps,
        )

    def success(self, data: mujoco.MjData) -> tuple[bool, np.ndarray]:
        """LIBERO's verdict on a simulator's state, and which lamps it lets glow."""
        self.problem.sim.data._data = data
        success = bool(self.problem._check_success())
        self.problem._post_process()
        return success, self.model.site_rgba[self.lamps, 3]

    def draw(self, camera: str, size: int) -> np.ndarray:
        """Draws what a camera shows, [size, size, 3] uint8. Raises UserError."""
        large = f"a LIBERO frame of {size} pixels is more than {self.buffer}"
        require(size <= self.buffer, f"{large}, which this env was made for")
        if self.gl is None:
            self._prepare_drawing()
        self.gl.make_current()
        self.camera.fixedcamid = self.model.camera(camera).id
        seen = (self.option, None, self.camera, mujoco.mjtCatBit.mjCAT_ALL)
        mujoco.mjv_updateScene(self.model, self.view, *seen, self.drawn)
        frame = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(frame, self.drawn, self.context)
        pixels = np.empty((size, size, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, frame, self.context)
        # GL's rows go up. LIBERO does not mind and turns the picture by 180°, which mirrors it.
        return pixels[::-1, ::-1]

    def _prepare_drawing(self) -> None:
        self.gl = mujoco.GLContext(self.buffer, self.buffer)
        self.gl.make_current()
        visual = self.model.vis
        visual.global_.offwidth = visual.global_.offheight = self.buffer
        self.drawn = mujoco.MjvScene(self.model, maxgeom=1000)
        if self.quality == "fast":
            visual.quality.shadowsize = visual.quality.offsamples = 0
            self.drawn.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.drawn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.option = mujoco.MjvOption()
        self.option.geomgroup[0] = 0  # collision geometry
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def close(self) -> None:
        if self.gl is not None:
            self.gl.make_current()
            self.context.free()
            self.gl.free()


# Of this process by task, image size and quality; least recently used first.
SCENES: OrderedDict[tuple, Scene] = OrderedDict()


def drop_idle_scenes(most: int) -> None:
    """Frees all but so many of the scenes that nobody plays, with their GL contexts."""
    idle = [key for key, scene in SCENES.items() if not scene.players]
    dropped = idle[: max(0, len(idle) - most)]
    for key in dropped:
        SCENES.pop(key).close()
    # robosuite's parts refer to one another. Python would free them late, for they are few, and
    # MuJoCo has reserved gigabytes of addresses for each: soon no program could be started.
    if dropped:
        gc.collect()


def integration_state(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    physics = np.empty(mujoco.mj_stateSize(model, INTEGRATION))
    mujoco.mj_getState(model, data, physics, INTEGRATION)
    return physics


def in_a_row(indexes: list[int]) -> slice:
    """Consecutive indexes as a slice, which copies nothing: most of the cost of seven numbers."""
    return slice(indexes[0], indexes[-1] + 1)


class Env(envs.Env):
    """One env: its own physics state in a scene that it may share."""

    def __init__(self, tasks: tuple[str, ...], image_size: int, quality: str = "fast"):
        super().__init__(tasks, image_size, quality)
        drawing.choose_device()
        self.scene: Scene | None = None

    def reset(self, task: int, seed: int) -> None:
        self._enter(self.tasks[task])
        scene = self.scene
        data = self.data
        chosen = self.states or range(len(scene.states))
        index = chosen[seed // len(self.tasks) % len(chosen)]
        if index in scene.settled:
            self._recall(scene.settled[index])
            return
        self._recall(scene.start)
        data.time = scene.states[index, 0]
        data.qpos[:], data.qvel[:] = np.split(scene.states[index, 1:], [scene.model.nq])
        mujoco.mj_forward(scene.model, data)
        _, self.lamps = scene.success(data)
        self.clock += TIMESTEP  # robosuite samples its observables once more
        for _ in range(SETTLE):
            self.step(NO_OP)
        scene.settled[index] = self._remember()

    def _enter(self, task: str) -> None:
        key = (task, self.size, self.quality)
        if key not in SCENES:
            SCENES[key] = Scene(*key)
        SCENES.move_to_end(key)
        if self.scene is SCENES[key]:
            return
        self._leave()
        scene = self.scene = SCENES[key]
        scene.players += 1
        drop_idle_scenes(MOST_SCENES)
        data = self.data = mujoco.MjData(scene.model)
        # Views of the simulator's memory: making them anew costs more than what is done with them.
        self.position = data.site_xpos[scene.site]
        self.rotation = data.site_xmat[scene.site].reshape(3, 3)
        self.qpos = data.qpos
        self.qvel = data.qvel
        self.bias = data.qfrc_bias
        self.ctrl = data.ctrl
        self.jacobian = np.zeros((6, scene.model.nv))
        self.jacobians = (self.jacobian[:3], self.jacobian[3:])
        self.mass = np.zeros((scene.model.nv, scene.model.nv))

    def _leave(self) -> None:
        if self.scene is not None:
            self.scene.players -= 1
            self.scene = None

    def _remember(self) -> Memory:
        self.physics = integration_state(self.scene.model, self.data)
        return Memory(*(vars(self)[name] for name in Memory._fields))

    def _recall(self, memory: Memory) -> None:
        mujoco.mj_setState(self.scene.model, self.data, memory.physics, INTEGRATION)
        vars(self).update(memory._asdict())

    def step(self, action: np.ndarray) -> Step:
        """action [7]: hand displacement (1 is 5 cm), rotation (1 is 0.5 rad), gripper (-1 opens, 1
        closes); clipped to [-1, 1]."""
        scene = self.scene
        data = self.data
        model = scene.model
        action = np.asarray(action, np.float64)
        delta = np.clip(action[:6], -1.0, 1.0) * scene.controller.output_max
        close = float(np.sign(action[6])) * scene.grip_speed
        low, high = scene.torque_limits
        for substep in range(SUBSTEPS):
            # See where the arm is, and in the first physics step where it is to go.
            mujoco.mj_step1(model, data)
            pose = self.stale or self._pose()
            self.stale = None
            if substep == 0:
                rotation = self.goal[1]
                if delta[3:].any():
                    turn = rotations().axisangle2quat(delta[3:])
                    rotation = rotations().quat2mat(turn) @ pose.rotation
                self.goal = (pose.position + delta[:3], rotation)

            # Drive arm and fingers.
            self.ctrl[scene.arm_actuators] = np.minimum(np.maximum(self._torques(pose), low), high)
            left, right = self.grip
            self.grip = (max(-1.0, min(1.0, left - close)), max(-1.0, min(1.0, right + close)))
            self.ctrl[scene.finger_actuators] = scene.grip_bias + scene.grip_weight * self.grip

            # Sample as robosuite does: once per period, on a clock of its own.
            self.clock += TIMESTEP
            now = not self.sampled and self.clock <= PERIOD
            if now:
                self.seen = (self.qpos.copy(), self.lamps)
                self.sampled = True
            mujoco.mj_step2(model, data)
            if now:
                self.fingers = self.qpos[scene.finger_qpos]
            if self.clock >= PERIOD:
                self.clock = self.clock % PERIOD
                self.sampled = False
        stability.check(data)
        success, self.lamps = scene.success(data)
        return Step(float(success), success)

    def _pose(self) -> Pose:
        scene = self.scene
        arm = scene.arm
        mujoco.mj_jacSite(scene.model, self.data, *self.jacobians, scene.site)
        mujoco.mj_fullM(scene.model, self.mass, self.data.qM)
        jacobian = self.jacobian[:, arm].copy()
        speeds = self.qvel[arm].copy()
        return Pose(
            self.position.copy(),
            self.rotation.copy(),
            jacobian @ speeds,
            jacobian,
            self.mass[arm, arm].copy(),
            self.qpos[scene.arm_qpos].copy(),
            speeds,
        )

    def _torques(self, pose: Pose) -> np.ndarray:
        """Operational space control (Khatib 1987) as robosuite's OSC_POSE has it.

        τ = Jᵀ(Λ_position F, Λ_rotation F) + gravity + Nᵀ M a with Λ = (J M⁻¹ Jᵀ)⁻¹ and
        N = 1 − M⁻¹ Jᵀ Λ J, so that Nᵀ M a = M a − Jᵀ Λ J a: two systems of equations instead of the
        original's inverses. Returns [7] newton metres."""
        scene = self.scene
        position, rotation = self.goal
        here, turned, velocity, j, mass, joints, speeds = pose

        # The rotation still to go is ½ (a × d + b × e + c × f) of the columns of both rotations.
        force = np.empty(6)
        np.subtract(position, here, out=force[:3])
        (ax, bx, cx), (ay, by, cy), (az, bz, cz) = turned.tolist()
        (dx, ex, fx), (dy, ey, fy), (dz, ez, fz) = rotation.tolist()
        force[3] = 0.5 * (ay * dz - az * dy + by * ez - bz * ey + cy * fz - cz * fy)
        force[4] = 0.5 * (az * dx - ax * dz + bz * ex - bx * ez + cz * fx - cx * fz)
        force[5] = 0.5 * (ax * dy - ay * dx + bx * ey - by * ex + cx * fy - cy * fx)
        controller = scene.controller
        force = controller.kp * force - controller.kd * velocity

        # The acceleration that is left to redundancy.
        to_rest = REST_STIFFNESS * (controller.initial_joint - joints) - REST_DAMPING * speeds
        spread = j @ np.linalg.solve(mass, j.T)  # [6, 6], Λ⁻¹
        systems = np.array((spread, spread))
        systems[0, :3, 3:] = systems[0, 3:, :3] = 0.0  # position and rotation are decoupled
        wrench, unseen = np.linalg.solve(systems, np.array((force, j @ to_rest))[..., None])[..., 0]
        return j.T @ (wrench - unseen) + self.bias[scene.arm] + mass @ to_rest

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures from front, hand; state [8]: the hand's position, axis-angle and fingers."""
        self._pose_view()
        scene = self.scene
        image = np.stack([scene.draw(camera, self.size) for camera in CAMERAS[: self.views]])
        # The axis times an angle in (0, 2π), as in openpi: downwards it does not jump.
        turn = rotations().quat2axisangle(np.roll(scene.view.xquat[scene.hand], -1))
        state = np.concatenate([scene.view.site_xpos[scene.site], turn, self.fingers])
        return image, state.astype(np.float32)

    def renderer(self) -> str:
        return drawing.renderer()

    def film(self, size: int = FILM) -> np.ndarray:
        self._pose_view()
        return self.scene.draw(CAMERAS[0], size)

    def _pose_view(self) -> None:
        model = self.scene.model
        view = self.scene.view
        view.qpos[:], model.site_rgba[self.scene.lamps, 3] = self.seen
        mujoco.mj_kinematics(model, view)
        mujoco.mj_comPos(model, view)
        mujoco.mj_camlight(model, view)

    def close(self) -> None:
        """Frees what nobody plays any more. Left to the interpreter's exit, EGL complains."""
        self._leave()
        drop_idle_scenes(0)
