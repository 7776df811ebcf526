"""LIBERO against LIBERO: the same numbers as its own wrapper, whatever was played before, however
many share a scene.
"""

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest

import envs
from config import ROOT
from envs import Step
from errors import UserError

try:
    libero = envs.load("libero").module
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)
import mujoco

from envs import libero_suites
from envs.libero_suites import LIMITS, find

STOVE = "turn_on_the_stove"  # has a lamp, a knob and movable objects
INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION  # time, positions, speeds, controls, warm start


@pytest.fixture(scope="module")
def make():
    """Makes envs. One of them keeps the scene of STOVE alive, so that it is built once for all
    tests."""
    made = [libero.Env((STOVE,), 64)]
    made[0].reset(0, 0)

    def env(*tasks, size=64, **settings):
        made.append(libero.Env(tasks or (STOVE,), size, **settings))
        return made[-1]

    yield env
    for one in made:
        one.close()
    assert not libero.SCENES


def actions(seed: int, steps: int) -> np.ndarray:
    """Random ones that press the hand down, among the objects."""
    drawn = np.random.default_rng(seed).uniform(-0.7, 0.7, (steps, 7)).astype(np.float32)
    drawn[:, 2] -= 0.3
    drawn[steps // 2 :, 3:6] = 0.0  # without rotation the controller keeps its old goal
    return drawn


def physics(model, data) -> np.ndarray:
    state = np.empty(mujoco.mj_stateSize(model, INTEGRATION))
    mujoco.mj_getState(model, data, state, INTEGRATION)
    return state


def difference(a, b) -> float:
    """Largest difference between two memories of an env, all of their fields."""
    if a is None or b is None:
        return 0.0 if a is b else np.inf
    if isinstance(a, tuple):
        return max(difference(x, y) for x, y in zip(a, b, strict=True))
    return float(np.max(np.abs(np.subtract(a, b, dtype=np.float64)), initial=0.0))


# ---------------------------------------------------------------- what there is


def test_all_130_tasks_by_suite_and_by_name():
    counts = {suite: len(libero.spec((suite,), 64).tasks) for suite in LIMITS}
    assert counts == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }
    everything = libero.spec(tuple(LIMITS), 256)
    assert len(set(everything.tasks)) == 130 and everything.horizon == 480
    assert (
        everything.views,
        everything.image_size,
        everything.state_dim,
        everything.action_dim,
    ) == (2, 256, 8, 7)
    assert (
        libero.spec((), 64)
        == libero.spec(("libero_10",), 64)
        == libero.spec(("libero_10", "libero_10"), 64)
    )
    for task, limit in zip(everything.tasks, everything.limits, strict=True):
        assert limit == LIMITS[find(task).suite] == libero.spec((task,), 64).limit(0)
    one = libero.spec((STOVE,), 64)
    assert (one.tasks, one.prompts, one.horizon) == ((STOVE,), ("turn on the stove",), 320)
    for task in everything.tasks:
        assert find(task).file.is_file() and find(task).stem == task == find(task).name
        assert len(libero_suites.initial_states(find(task).states)) == 50 == everything.states
    with pytest.raises(UserError, match="unknown LIBERO task 'juggle'"):
        libero.spec(("juggle",), 64)


@pytest.mark.slow
@pytest.mark.parametrize("suite", libero_suites.installed().tasks)
def test_every_task_can_be_played(suite, monkeypatch):
    """Builds it, settles, steps and draws: some minutes for a suite. Of perturbed ones some lack
    assets in every package that there is, which must be said."""
    monkeypatch.setattr(libero, "MOST_SCENES", 0)
    spec = libero.spec((suite,), 32)
    env = libero.Env(spec.tasks, 32)
    for task in range(len(spec.tasks)):
        try:
            env.reset(task, 0)
        except UserError as lacking:
            assert suite not in LIMITS and "its assets are not here (no /" in str(lacking)
            continue
        step = env.step(libero.NO_OP)
        assert step == Step(0.0, False), spec.tasks[task]
        image, state = env.observe()
        assert np.isfinite(state).all() and image[0].std() > 10 and image[1].std() > 1, spec.tasks[
            task
        ]
    env.close()


def test_a_perturbed_suite_is_played_by_name(make):
    """Its things stand elsewhere than in the scene of the base suite's task of the same name."""
    name = f"libero_goal_swap/{STOVE}"
    assert name in libero.spec(("libero_goal_swap",), 64).tasks
    spec = libero.spec((name,), 64)
    assert (spec.tasks, spec.prompts, spec.limits) == ((name,), ("turn on the stove",), (320,))
    pictures = []
    for env in (make(), make(name)):
        env.reset(0, 3)
        assert env.step(libero.NO_OP) == Step(0.0, False)
        pictures.append(env.observe()[0].astype(int))
        assert pictures[-1][0].std() > 10 and pictures[-1][1].std() > 1
    assert np.abs(pictures[0] - pictures[1])[0].mean() > 5
    env.close()


def test_the_suite_that_is_played_by_default_says_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(libero_suites, "left_out", lambda name: f"1 of {name}'s tasks\n")
    assert libero.spec((), 64).note == "1 of libero_10's tasks\n"


def test_assets_that_are_missing_are_named(make, monkeypatch):
    def lacks(file, **settings):
        raise FileNotFoundError(2, "No such file or directory", "/assets/mug.xml")

    module = libero.original("libero")
    monkeypatch.setattr(module, "TASK_MAPPING", dict.fromkeys(module.TASK_MAPPING, lacks))
    words = (
        r"put_the_bowl_on_the_stove cannot be built: its assets are not here .no /assets/mug.xml"
    )
    with pytest.raises(UserError, match=words):
        make("put_the_bowl_on_the_stove", quality="full").reset(0, 0)


def test_objects_that_never_fit_are_an_error_that_names_the_task(make, monkeypatch):
    from robosuite.utils.errors import RandomizationError

    tries = []

    def crowded(file, **settings):
        tries.append(file)
        raise RandomizationError("Cannot place all objects ):")

    module = libero.original("libero")
    monkeypatch.setattr(module, "TASK_MAPPING", dict.fromkeys(module.TASK_MAPPING, crowded))
    words = "put_the_bowl_on_the_stove cannot be built: its objects do not fit in the scene"
    before = np.random.get_state()[1].copy()
    with pytest.raises(UserError, match=words):
        make("put_the_bowl_on_the_stove", quality="full").reset(0, 0)
    assert len(tries) == libero.DRAWS and np.array_equal(np.random.get_state()[1], before)


def test_importing_a_package_asks_nothing_and_leaves_nothing_at_home(tmp_path, monkeypatch):
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    monkeypatch.setattr(libero.Path, "home", lambda: tmp_path)
    with libero.configured("libero"):
        folder = os.environ["LIBERO_CONFIG_PATH"]
        text = libero.Path(folder, "config.yaml").read_text()
        assert str(libero_suites.folder_of("libero") / "bddl_files") in text
    assert not os.path.exists(folder) and "LIBERO_CONFIG_PATH" not in os.environ
    (tmp_path / ".libero").mkdir()
    (tmp_path / ".libero" / "config.yaml").touch()  # the user's own
    with libero.configured("libero"):
        assert "LIBERO_CONFIG_PATH" not in os.environ


def test_language_is_the_benchmark_s():
    from contextlib import redirect_stdout

    with redirect_stdout(None):
        libero.original()
        from libero.libero import benchmark

        for suite in LIMITS:
            tasks = benchmark.get_benchmark(suite)().tasks
            ours = libero_suites.tasks_of(suite)
            assert [task.name for task in tasks] == [task.name for task in ours]
            assert [task.language for task in tasks] == list(map(libero_suites.prompt, ours))


def test_a_control_that_is_not_a_number_is_an_error(make):
    env = make()
    env.reset(0, 0)
    with pytest.raises(FloatingPointError, match="unstable .mjWARN_BADCTRL"):
        env.step(np.full(7, np.nan))  # MuJoCo would play 0


# ---------------------------------------------------------------- the same as the original


@pytest.fixture(scope="module")
def theirs(make):
    libero.original()
    from libero.libero.envs import OffScreenRenderEnv

    path = find(STOVE).file
    env = OffScreenRenderEnv(bddl_file_name=str(path), camera_heights=64, camera_widths=64)
    yield env
    env.close()


@pytest.mark.parametrize("solver, bound", [(0.0, 1e-9), (1e-8, 1e-6)])
def test_the_same_episode_as_in_libero_s_own_env(make, theirs, solver, bound):
    """Its wrapper, hard reset, seed 0, initial state 3, 15 steps of no-op, then 24 actions: time,
    positions, speeds, warm start, controls, the controller's memory, observations and pictures.

    MuJoCo's solver stops at a tolerance, LIBERO's at 1e-8, so the last bit of a torque may change
    how often it iterates and thereby accelerations by as much. Without that tolerance the two agree
    to 1e-9."""
    ours = make(quality="full")
    ours.reset(0, 0)
    theirs.seed(0)
    theirs.reset()
    theirs.env.sim.model._model.opt.tolerance = ours.scene.model.opt.tolerance = solver
    ours.scene.settled.clear()
    ours.reset(0, 3)
    theirs.set_init_state(ours.scene.states[3])
    for _ in range(15):
        seen = theirs.step([0, 0, 0, 0, 0, 0, -1])[0]
    same(ours, theirs, seen, bound)
    for action in actions(3, 24):
        seen, reward, done, _ = theirs.step(action.tolist())
        assert ours.step(action) == Step(reward, done)
    same(ours, theirs, seen, bound)
    assert ours.data.ncon > 4  # so that contacts were part of it
    ours.close()


def same(ours, theirs, seen: dict, bound: float) -> None:
    model = theirs.env.sim.model._model
    data = theirs.env.sim.data._data
    wanted = physics(model, data)
    assert (
        np.max(
            np.abs(wanted - physics(ours.scene.model, ours.data)) / np.maximum(1.0, np.abs(wanted))
        )
        < bound
    )
    controller = theirs.env.robots[0].controller
    gripper = theirs.env.robots[0].gripper
    assert difference((controller.goal_pos, controller.goal_ori), ours.goal) < bound
    assert difference(gripper.current_action, ours.grip) < bound
    image, state = ours.observe()
    x, y, z, w = seen["robot0_eef_quat"]
    wanted = [
        *seen["robot0_eef_pos"],
        *libero.rotations().quat2axisangle(np.array([x, y, z, w])),
        *seen["robot0_gripper_qpos"],
    ]
    assert np.abs(state - np.float32(wanted)).max() < 1e-6
    for picture, name in zip(image, ("agentview_image", "robot0_eye_in_hand_image"), strict=True):
        assert np.abs(picture.astype(int) - seen[name][::-1, ::-1]).max() <= 1
        assert picture.std() > 10


# ---------------------------------------------------------------- resets and shared scenes


def play(env, seed: int, steps: int = 6):
    env.reset(0, seed)
    outcomes = [env.step(action) for action in actions(seed, steps)]
    return env._remember(), outcomes, *env.observe()


def test_a_soft_reset_is_a_hard_reset(make):
    env = make()
    play(env, 11)
    play(env, 4)
    env.reset(0, 5)
    soft = env._remember()
    soft_picture = env.observe()[0]
    soft_after = play(env, 5)
    play(env, 11)
    env.reset(0, 5)
    again = env._remember()
    hard_env = make()
    scene = libero.Scene(STOVE, 64, "fast")  # built anew, from LIBERO's files
    try:
        libero.SCENES[STOVE, 64, "new"] = scene
        hard_env.quality = "new"
        hard_env.reset(0, 5)
        hard = hard_env._remember()
        hard_picture = hard_env.observe()[0]
        hard_after = play(hard_env, 5)
    finally:
        hard_env.close()
    assert difference(soft, again) == 0.0 and difference(soft, hard) < 1e-9
    assert difference(soft_after[0], hard_after[0]) < 1e-9 and soft_after[1] == hard_after[1]
    assert np.abs(soft_picture.astype(int) - hard_picture).max() <= 1
    assert np.abs(soft_after[2].astype(int) - hard_after[2]).max() <= 1
    for name in (
        "body_pos",
        "body_quat",
        "site_rgba",
        "geom_rgba",
        "geom_pos",
        "geom_friction",
        "dof_damping",
    ):
        assert np.array_equal(getattr(scene.model, name), getattr(env.scene.model, name)), name


def test_envs_of_a_task_share_its_scene_and_nothing_else(make):
    one = make()
    other = make()
    alone = {seed: play(one, seed) for seed in (1, 2)}
    one.reset(0, 1)
    other.reset(0, 2)
    assert one.scene is other.scene and not np.array_equal(alone[1][2], alone[2][2])
    for first, second in zip(actions(1, 6), actions(2, 6), strict=True):
        one.step(first)
        other.step(second)
    for env, seed in ((one, 1), (other, 2)):
        memory, _, image, state = alone[seed]
        assert difference(env._remember(), memory) == 0.0
        assert all(np.array_equal(a, b) for a, b in zip(env.observe(), (image, state), strict=True))


def test_a_seed_names_an_initial_state(make):
    """Of two tasks, seeds 2i and 2i + 1 both mean state i; after 50 states they come again."""
    env = make(STOVE, "put_the_bowl_on_the_plate")
    poses = []
    for seed in (0, 1, 2, 98, 100):
        env.reset(0, seed)
        poses.append(env.data.qpos.copy())
    assert np.array_equal(poses[0], poses[1]) and np.array_equal(poses[0], poses[4])
    assert not np.array_equal(poses[0], poses[2]) and not np.array_equal(poses[0], poses[3])


def test_success_and_the_lamp_that_glows(make):
    env = make()
    env.reset(0, 0)
    assert env.step(libero.NO_OP) == Step(0.0, False)
    before = env.film(64)
    knob = next(
        i for i in range(env.scene.model.njnt) if "flat_stove" in env.scene.model.joint(i).name
    )
    env.data.qpos[env.scene.model.jnt_qposadr[knob]] = 1.0
    assert env.step(libero.NO_OP) == Step(1.0, True)
    env.step(libero.NO_OP)
    assert np.abs(env.film(64).astype(int) - before).max() > 50
    env.reset(0, 0)
    assert np.abs(env.film(64).astype(int) - before).max() < 50


def test_scenes_that_nobody_plays_are_bounded(make, monkeypatch):
    monkeypatch.setattr(libero, "MOST_SCENES", 0)
    env = make(STOVE, "put_the_bowl_on_the_plate")
    env.reset(1, 0)
    env.observe()
    assert len(libero.SCENES) == 2  # this one, and the one that the fixture's env plays
    problem = weakref.ref(env.scene.problem)
    env.reset(0, 0)
    assert len(libero.SCENES) == 1
    assert problem() is None, "its gigabytes of addresses are still taken"
    env.close()
    env.close()


# ---------------------------------------------------------------- what the policy sees


def test_what_the_policy_sees(make):
    env = make()
    env.reset(0, 0)
    image, state = env.observe()
    assert image.shape == (2, 64, 64, 3) and image.dtype == np.uint8
    assert state.shape == (8,) and state.dtype == np.float32
    position = state[:3]
    turn = state[3:6]
    fingers = state[6:]
    assert (
        0.9 < position[2] < 1.5
        and 2.8 < np.linalg.norm(turn) < 3.5
        and fingers[0] > 0.03 > -0.03 > fingers[1]
    )
    for _ in range(8):
        env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert env.observe()[1][6] < fingers[0] - 0.005  # 1 closes the gripper
    for _ in range(4):
        env.step(np.array([0, 0, 5.0, 0, 0, 0, 1.0]))  # clipped to 1
    assert position[2] + 0.03 < env.observe()[1][2] < position[2] + 0.2
    assert env.film().shape == (256, 256, 3)
    with pytest.raises(UserError, match="300 pixels"):
        env.film(300)


def test_a_fast_picture_differs_in_shadows_and_edges_only(make):
    """Of 255 grey levels; the physics does not differ at all."""
    fast = make()
    full = make(quality="full")
    (memory, _, image, _) = play(fast, 2)
    (full_memory, _, full_image, _) = play(full, 2)
    assert difference(memory, full_memory) == 0.0
    assert fast.scene.model.ntexdata < full.scene.model.ntexdata / 5
    assert fast.scene.model.mesh_facenum.sum() < full.scene.model.mesh_facenum.sum() / 2
    assert np.abs(image.astype(int) - full_image).mean() < 8.0


# ---------------------------------------------------------------- a guest in the user's house


def test_it_asks_nothing_writes_nothing_and_calls_nobody(tmp_path):
    """In a process of its own, with an empty home, no standard input and no network."""
    script = f"""
import socket, sys
def refuse(*_): raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from envs import libero
random = np.random.get_state()[1].copy()
env = libero.Env(({STOVE!r},), 32)
env.reset(0, 0); env.step(libero.NO_OP); env.observe(); env.close()
assert np.array_equal(np.random.get_state()[1], random), "the user's random numbers were disturbed"
assert not {{"cv2", "numba", "matplotlib"}} & set(sys.modules)
import os, tempfile
# Mesa finds the home without HOME
assert os.environ["MESA_SHADER_CACHE_DIR"].startswith(tempfile.gettempdir())
"""
    log = "/tmp/robosuite.log"
    before = os.stat(log).st_mtime if os.path.exists(log) else None
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MESA_"))} | {
        "HOME": str(home)
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert [path for path in tmp_path.rglob("*") if path != home] == []
    assert (os.stat(log).st_mtime if os.path.exists(log) else None) == before


def test_the_quality_reaches_a_simulator_that_knows_it():
    for name, task in (("libero", STOVE), ("metaworld", "reach")):  # which knows none
        simulator = envs.load(name)
        env = simulator.make(simulator.spec((task,), 64), "full")
        assert (env.quality, env.size) == ("full", 64)


def test_a_camera_that_nobody_sees_is_not_drawn(make, monkeypatch):
    env = make()
    env.reset(0, 0)
    both = env.observe()[0]
    drawn = []
    draw = libero.Scene.draw
    monkeypatch.setattr(
        libero.Scene, "draw", lambda self, *given: drawn.append(given[0]) or draw(self, *given)
    )
    env.views = 1
    assert np.array_equal(env.observe()[0], both[:1]) and drawn == ["agentview"]
