"""The simulator as the workers need it: episodes named by a seed, pictures that only depend on the
state.
"""

import numpy as np
import pytest

import envs
from benchmarks.emulated import libero
from envs import Step, metaworld
from errors import UserError


@pytest.fixture
def make():
    made = []

    def env(*tasks):
        made.append(metaworld.Env(tasks, 64))
        return made[-1]

    yield env
    for one in made:
        one.close()


def play(env, task: int, seed: int, steps: int = 4):
    env.reset(task, seed)
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 4))
    states = [env.state.copy(), *(env.step(action) and env.state.copy() for action in actions)]
    return np.stack(states), *env.observe()


def test_a_seed_names_an_episode_whatever_came_before(make):
    one = make("reach", "handle-press")
    other = make("reach", "handle-press")
    first = play(one, 1, 5)
    play(one, 1, 6)
    play(one, 0, 5)
    play(other, 1, 9)
    for again in (play(one, 1, 5), play(other, 1, 5)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(play(one, 1, 6)[0], first[0])


def test_a_simulator_that_was_dropped_and_made_again_plays_the_same_episodes(make, monkeypatch):
    monkeypatch.setattr(metaworld, "KEEP", 1)
    env = make("reach", "push", "button-press")
    first = [play(env, task, 4) for task in (0, 1, 2)]
    again = [play(env, task, 4) for task in (0, 1, 2)]
    assert len(env.sims) == 1
    assert all(
        np.array_equal(a, b)
        for one, other in zip(first, again, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_only_a_goal_that_nothing_else_shows_is_marked(make):
    def marks(name):  # pixels that change when the goal's sphere is put out of sight
        env = make(name)
        env.reset(0, 1)
        before = env.film(96).astype(int)
        env.sim._target_pos = env.sim._target_pos - [0.0, 0.0, 1.0]
        return int((np.abs(env.film(96) - before).sum(axis=-1) > 30).sum())

    assert marks("reach") > 3 and marks("push") > 3 and marks("button-press") == 0


def test_what_the_policy_sees(make):
    env = make("handle-press")
    _, image, state = play(env, 0, 1)
    assert image.shape == (1, 64, 64, 3) and image.dtype == np.uint8 and image.std() > 10
    assert state.shape == (4,) and state.dtype == np.float32 and 0.0 <= state[3] <= 1.0
    assert env.film(32).shape == (32, 32, 3)
    reward, success, _ = env.step(np.full(4, 100.0, np.float32))  # clipped, not refused
    assert (reward, success) == (0.0, False)


def test_thinner_meshes_change_neither_the_physics_nor_much_of_the_picture(make, monkeypatch):
    def press(env):  # down onto the handle, so that colliding meshes matter
        env.reset(0, 3)
        for action in np.random.default_rng(0).normal([0.0, 0.6, -0.4, 0.0], 0.5, (60, 4)):
            env.step(action)
        result = (
            env.sim.data.qpos.copy(),
            env.film(64).astype(int),
            int(env.sim.model.mesh_facenum.sum()),
        )
        env.close()  # with its meshes on the GL side
        return result

    state, picture, faces = press(make("handle-press"))
    monkeypatch.setattr(metaworld.drawing, "thin_meshes", lambda model, cell: None)
    whole_state, whole_picture, whole_faces = press(make("handle-press"))
    assert np.array_equal(state, whole_state) and faces < whole_faces / 3
    assert np.abs(picture - whole_picture).mean() < 2.0  # of 255; measured: 0.9


def test_envs_of_one_task_share_a_context_and_no_picture(make):
    one = make("handle-press")
    other = make("handle-press")
    alone = {seed: play(one, 0, seed)[1] for seed in (1, 2)}
    assert not np.array_equal(alone[1], alone[2])
    play(one, 0, 1)
    play(other, 0, 2)
    assert np.array_equal(one.observe()[0], alone[1]) and np.array_equal(
        other.observe()[0], alone[2]
    )


def test_spec():
    spec = metaworld.spec((), 64)
    assert spec.tasks == metaworld.DEFAULT_TASKS and (
        spec.views,
        spec.state_dim,
        spec.action_dim,
    ) == (1, 4, 4)
    assert metaworld.spec(("push",), 32).prompts == ("push the puck to the goal",)
    with pytest.raises(UserError, match="'juggle'"):
        metaworld.spec(("juggle",), 64)


def test_suites_are_meta_worlds():
    from metaworld.env_dict import MT10_V3, MT50_V3

    names = {
        suite: [name + "-v3" for name in metaworld.spec((suite,), 64).tasks]
        for suite in ("MT10", "MT50")
    }
    assert names["MT10"] == list(MT10_V3) and sorted(names["MT50"]) == sorted(MT50_V3)
    for one in ("MT1-push", "push", "push-v3"):
        assert metaworld.spec((one,), 64).tasks == ("push",)
    assert metaworld.spec(("reach", "MT10", "MT1-sweep"), 64).tasks == (
        *metaworld.SUITES["MT10"],
        "sweep",
    )  # each once, in the order given
    assert (
        len(set(metaworld.PROMPTS.values())) == 50
    )  # a policy could not tell two tasks of one prompt apart
    assert metaworld.spec((), 64).horizon == 90 and metaworld.spec(("MT10",), 64).horizon == 150
    assert metaworld.spec(("reach", "door-open"), 64).limits == (90, 150)  # whatever is beside it
    with pytest.raises(UserError, match="'MT1-juggle'"):
        metaworld.spec(("MT1-juggle",), 64)


def pixel(sim, point: np.ndarray, size: int) -> np.ndarray:
    """Column and row at which an upright picture shows a point (metres), from the camera's pose
    alone.

    MuJoCo's cameras look along their -z, with x to the right and y up; the field of view is
    vertical, in degrees. One that hangs head over (its y points down in the world) shows the same
    upright when both axes are counted from the other end."""
    camera = sim.data.cam(metaworld.CAMERA)
    axes = camera.xmat.reshape(3, 3).T  # rows: the camera's axes in the world
    x, y, z = axes @ (point - camera.xpos)
    focal = size / 2 / np.tan(np.radians(sim.model.cam(metaworld.CAMERA).fovy[0]) / 2)
    upright = 1 if axes[1, 2] > 0 else -1
    return size / 2 + upright * focal / -z * np.array([x, -y])


def test_frames_are_right_side_up(make):
    size = 128
    env = make("reach")
    env.reset(0, 0)
    sim = env.sim
    before = env.film(size).astype(int)
    places = [
        pixel(sim, point, size) for point in (sim.data.geom("objGeom").xpos, sim._target_pos)
    ]  # the puck and the goal
    sim.data.geom("objGeom").xpos[2] -= 1.0  # both out of sight
    sim._target_pos = sim._target_pos - [0.0, 0.0, 1.0]
    vanished = np.abs(env.film(size).astype(int) - before).sum(axis=-1) > 30  # [H, W]

    def where_they_were(picture: np.ndarray) -> bool:
        rows, columns = np.nonzero(picture)
        distance = np.stack(
            [np.hypot(columns + 0.5 - x, rows + 0.5 - y) for x, y in places]
        )  # [2, pixels]
        return bool((distance.min(axis=0) < 6).all() and (distance.min(axis=1) < 2).all())

    assert where_they_were(vanished)
    assert not any(
        where_they_were(flipped)
        for flipped in (vanished[::-1], vanished[:, ::-1], vanished[::-1, ::-1])
    )
    hand = sim.data.body("hand").xpos
    assert (
        pixel(sim, hand + [0.0, 0.0, 0.1], size)[1] < pixel(sim, hand, size)[1] - 5
    )  # up in the world is up in the picture


def test_the_expert_is_told_the_goal_and_the_policy_is_not(make):
    from metaworld.policies import ENV_POLICY_MAP

    env = make("reach")
    expert = ENV_POLICY_MAP["reach-v3"]()
    env.reset(0, 0)
    solved = [env.step(expert.get_action(env.state)).success for _ in range(metaworld.HORIZON)]
    assert any(solved) and np.array_equal(env.state[-3:], env.sim._target_pos)
    assert env.observe()[1].shape == (4,)


@pytest.mark.slow
def test_every_task_of_mt50_is_built_reset_stepped_seen_and_solved(make):
    from metaworld.policies import ENV_POLICY_MAP

    env = make(*metaworld.spec(("MT50",), 64).tasks)
    for task, name in enumerate(env.tasks):
        expert = ENV_POLICY_MAP[name + "-v3"]()
        solved = False
        seen = []
        for seed in range(10):
            env.reset(task, seed)
            seen.append(env.observe()[0])
            for _ in range(
                metaworld.LONG_HORIZON if name in metaworld.LONG_TASKS else metaworld.HORIZON
            ):
                solved = env.step(expert.get_action(env.state)).success
                if solved:
                    break
            if solved:
                break
        assert solved, name
        assert seen[0].std() > 10 and not np.array_equal(seen[0], env.observe()[0]), name
        assert len(env.sims) <= metaworld.KEEP


def test_unknown_simulators_are_named():
    with pytest.raises(UserError, match="unknown --env 'atari'"):
        envs.load("atari")


def test_the_emulated_simulator_offers_the_same(monkeypatch):
    slept = []
    monkeypatch.setattr(libero.time, "sleep", slept.append)
    spec = libero.spec((), 8)
    env = libero.Env(spec.tasks, 8)
    env.reset(0, 1)
    image, state = env.observe()
    assert image.shape == (spec.views, 8, 8, 3) and state.shape == (spec.state_dim,)
    assert [env.step(np.zeros(spec.action_dim)) for _ in range(spec.horizon)] == [
        Step(0.0, False)
    ] * spec.horizon
    assert (
        0.3 * libero.MEAN < np.mean(slept) < 3 * libero.MEAN
        and len(slept) == spec.horizon // libero.CHUNK
    )


def test_a_simulation_that_blows_up_is_an_error_and_leaves_no_log(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = make("push")
    env.reset(0, 1)
    env.step(np.zeros(4))
    env.sim.data.qvel[-1] = 1e11
    with pytest.raises(FloatingPointError, match="unstable .mjWARN_BADQ"):
        for _ in range(3):
            env.step(np.zeros(4))
    env.reset(0, 1)
    env.step(np.zeros(4))  # a new episode is sound again
    with pytest.raises(FloatingPointError, match="unstable"):
        env.step(np.full(4, np.nan))  # MuJoCo would play 0
    assert list(tmp_path.iterdir()) == []


def test_one_env_going_through_many_tasks_keeps_few_contexts(make):
    tasks = [*metaworld.PROMPTS][: metaworld.KEEP + 2]
    env = make(*tasks)
    first = None
    for task in range(len(tasks)):
        env.reset(task, 1)
        picture = env.observe()[0]
        first = picture if first is None else first
    assert len(metaworld.RENDERERS) <= metaworld.KEEP
    env.reset(0, 1)
    assert np.array_equal(env.observe()[0], first)
