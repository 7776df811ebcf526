"""The simulator as the workers need it: episodes named by a seed, pictures that only depend on the state."""

import numpy as np
import pytest

import envs
from config import UserError
from envs import emulated, metaworld


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
    one, other = make("reach", "handle-press"), make("reach", "handle-press")
    first = play(one, 1, 5)
    play(one, 1, 6), play(one, 0, 5), play(other, 1, 9)
    for again in (play(one, 1, 5), play(other, 1, 5)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(play(one, 1, 6)[0], first[0])


def test_what_the_policy_sees(make):
    env = make("handle-press")
    _, image, state = play(env, 0, 1)
    assert image.shape == (1, 64, 64, 3) and image.dtype == np.uint8 and image.std() > 10
    assert state.shape == (4,) and state.dtype == np.float32 and 0.0 <= state[3] <= 1.0
    assert env.film(32).shape == (32, 32, 3)
    reward, success = env.step(np.full(4, 100.0, np.float32))  # clipped, not refused
    assert (reward, success) == (0.0, False)


def test_thinner_meshes_change_neither_the_physics_nor_much_of_the_picture(make, monkeypatch):
    def press(env):  # down onto the handle, so that colliding meshes matter
        env.reset(0, 3)
        for action in np.random.default_rng(0).normal([0.0, 0.6, -0.4, 0.0], 0.5, (60, 4)):
            env.step(action)
        result = env.sim.data.qpos.copy(), env.film(64).astype(int), int(env.sim.model.mesh_facenum.sum())
        env.close()  # with its meshes on the GL side
        return result

    state, picture, faces = press(make("handle-press"))
    monkeypatch.setattr(metaworld, "thin_meshes", lambda model: None)
    whole_state, whole_picture, whole_faces = press(make("handle-press"))
    assert np.array_equal(state, whole_state) and faces < whole_faces / 3
    assert np.abs(picture - whole_picture).mean() < 2.0  # of 255; measured: 0.9


def test_envs_of_one_task_share_a_context_and_no_picture(make):
    one, other = make("handle-press"), make("handle-press")
    alone = {seed: play(one, 0, seed)[1] for seed in (1, 2)}
    assert not np.array_equal(alone[1], alone[2])
    play(one, 0, 1), play(other, 0, 2)
    assert np.array_equal(one.observe()[0], alone[1]) and np.array_equal(other.observe()[0], alone[2])


def test_spec():
    spec = metaworld.spec((), 64)
    assert spec.tasks == metaworld.DEFAULT_TASKS and (spec.views, spec.state_dim, spec.action_dim) == (1, 4, 4)
    assert metaworld.spec(("push",), 32).prompts == ("push the puck to the goal",)
    assert all(name + "-v3" in metaworld.ALL_V3_ENVIRONMENTS for name in metaworld.PROMPTS) and len(metaworld.PROMPTS) == 50
    with pytest.raises(UserError, match="'juggle'"):
        metaworld.spec(("juggle",), 64)


def test_unknown_simulators_are_named():
    with pytest.raises(UserError, match="unknown --env 'atari'"):
        envs.load("atari")


def test_the_emulated_simulator_offers_the_same(monkeypatch):
    slept = []
    monkeypatch.setattr(emulated.time, "sleep", slept.append)
    spec, env = emulated.spec((), 8), emulated.Env((), 8)
    env.reset(0, 1)
    image, state = env.observe()
    assert image.flags.c_contiguous  # torch takes no negative strides
    assert image.shape == (spec.views, 8, 8, 3) and state.shape == (spec.state_dim,)
    assert [env.step(np.zeros(spec.action_dim)) for _ in range(spec.horizon)] == [(0.0, False)] * spec.horizon
    assert 0.3 * emulated.MEAN < np.mean(slept) < 3 * emulated.MEAN and len(slept) == spec.horizon // emulated.CHUNK
