"""RoboCasa in its own robosuite: the real kitchen code, robot and cameras, in a kitchen without
downloaded assets.

Skipped where RoboCasa is not installed; envs/robocasa.py says how. Its assets are 10 GB, so the
kitchen here is of what comes with the package (walls, a counter, four drawers) and of plain colours
in place of its textures.
"""

import importlib.util
import shutil
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import yaml

import envs
from envs import Step
from errors import UserError

if importlib.util.find_spec("robocasa") is None:
    pytest.skip("RoboCasa is not installed: envs/robocasa.py says how", allow_module_level=True)

LAYOUT = {  # metres; sizes of walls and floors are halves
    "room": {
        "walls": [
            {"name": "wall", "type": "wall", "size": [2.0, 1.5, 0.02], "pos": [2.0, 0.0, 1.5]}
        ],
        "floor": [
            {"name": "floor", "type": "floor", "size": [2.0, 1.5, 0.02], "pos": [2.0, -1.5, 0.0]}
        ],
    },
    "main_group": {
        "counters": [
            {
                "name": "counter",
                "type": "counter",
                "size": [4.0, 0.65, 0.92],
                "pos": [2.0, -0.325, 0.46],
            }
        ],
        "drawers": [
            {
                "name": "stack",
                "type": "stack",
                "levels": ["drawer"] * 4,
                "percentages": [0.25] * 4,
                "size": [0.5, 0.6, 0.84],
                "pos": [2.0, -0.3, 0.47],
            }
        ],
    },
}
TEXTURES = (
    "wood/light_wood_planks",
    "wood/wood_grain_1",
    "wood/gray_wood_planks",
    "flat/white",
    "metals/bright_metal",
    "bricks/white_bricks",
)


@pytest.fixture(scope="module")
def robocasa(tmp_path_factory):
    """The adapter, with a kitchen of ours in place of layout 1 and a task that asks for no
    objects."""
    assets = tmp_path_factory.mktemp("robocasa") / "assets"
    shutil.copytree(
        Path(importlib.util.find_spec("robocasa").origin).parent / "models" / "assets", assets
    )
    for i, name in enumerate(TEXTURES):
        path = assets / "textures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(path, np.full((8, 8, 3), 60 + 25 * i, np.uint8))
    (assets / "scenes" / "kitchen_layouts" / "test" / "layout001.yaml").write_text(
        yaml.safe_dump(LAYOUT)
    )
    (assets / "scenes" / "kitchen_styles" / "test" / "style001.yaml").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        module = envs.load("robocasa").module
        import robocasa.models
        from robocasa.environments.kitchen.atomic.kitchen_drawer import ManipulateDrawer

        class CloseEmptyDrawer(ManipulateDrawer):  # registers itself
            def __init__(self, *args, **kwargs):
                super().__init__(*args, behavior="close", **kwargs)

            def _get_obj_cfgs(self):
                return []

        patch.setattr(robocasa.models, "assets_root", str(assets))
        patch.setattr(module, "KITCHENS", {"layout_ids": 1, "style_ids": 1})
        yield module


@pytest.fixture
def make(robocasa):
    made = []

    def env(*tasks, size=48):
        made.append(robocasa.Env(tasks or ("CloseEmptyDrawer",), size))
        return made[-1]

    yield env
    for one in made:
        one.close()


def play(env, seed: int, steps: int = 3):
    env.reset(0, seed)
    for action in np.random.default_rng(seed).uniform(-1, 1, (steps, 12)):
        env.step(action)
    return env.sim.sim.get_state().flatten(), *env.observe(), env.prompt


def test_a_seed_names_an_episode_whatever_came_before(make):
    one = make()
    other = make()
    first = play(one, 5)
    for again in (play(other, 4), play(one, 6)):
        assert not np.array_equal(again[0], first[0])
    for again in (play(other, 5), play(one, 5)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert {play(one, seed, 0)[3] for seed in range(5)} == {
        "Close the left drawer.",
        "Close the right drawer.",
    }


def test_what_the_policy_sees(robocasa, make):
    spec = robocasa.spec(("CloseEmptyDrawer",), 48)
    env = make()
    env.reset(0, 1)
    images, state = env.observe()
    assert (
        images.shape == (spec.views, 48, 48, 3)
        and images.dtype == np.uint8
        and all(image.std() > 5 for image in images)
    )
    assert state.shape == (spec.state_dim,) == (25,) and state.dtype == np.float32
    assert np.all(np.isfinite(state)) and np.allclose(
        np.linalg.norm(state[[3, 4, 5, 6]]), 1.0, atol=1e-5
    )
    assert np.allclose(
        state[:3], env.sim.sim.data.get_site_xpos("gripper0_right_grip_site"), atol=1e-5
    )
    assert np.allclose(state[18:21], env.seen["robot0_base_pos"]) and np.allclose(
        state[21:25], env.seen["robot0_base_quat"]
    )
    assert env.film(32).shape == (32, 32, 3)


def test_actions_move_what_they_say(make):
    env = make()

    def moved(action: dict[int, float]) -> tuple[float, float]:
        """How far the hand moves in the base's frame, and the base on the floor, in metres, in half
        a second."""
        env.reset(0, 3)
        before = env.observe()[1]
        plan = np.zeros(12)
        plan[list(action)] = list(action.values())
        for _ in range(10):
            env.step(plan)
        after = env.observe()[1]
        return float(np.linalg.norm((after - before)[11:14])), float(
            np.linalg.norm((after - before)[18:20])
        )

    hand, base = moved({0: 1.0, 11: -1.0})
    assert hand > 0.05 and base < 0.01
    hand, base = moved({7: -1.0, 11: 1.0})
    assert hand < 0.03 and base > 0.05


def test_success_is_the_tasks_own(make):
    env = make()
    env.reset(0, 2)
    rest = np.array([0.0] * 11 + [-1.0])
    assert env.step(rest) == Step(0.0, False)
    env.sim.drawer.close_door(env=env.sim)
    assert env.step(rest) == Step(1.0, True)


def test_frames_are_right_side_up(make):
    """The hand is where the camera's pose says; a frame flipped either way would show it
    elsewhere."""
    size = 96
    env = make()
    name = "robot0_agentview_left"
    env.reset(0, 1)
    model = env.sim.sim.model
    data = env.sim.sim.data
    camera = model.camera_name2id(name)
    before = env._render(name, size).astype(int)
    hand = [
        i for i in range(model.ngeom) if (model.geom_id2name(i) or "").startswith("gripper0_right")
    ]
    axes = data.cam_xmat[camera].reshape(3, 3)
    focal = size / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    x, y, z = (
        data.geom_xpos[hand].mean(axis=0) - data.cam_xpos[camera]
    ) @ axes  # x right, y up, looking along -z
    expected = size / 2 + focal / -z * np.array([x, -y])  # column, row
    model.geom_rgba[hand, 3] = 0.0
    vanished = np.abs(env._render(name, size) - before).sum(axis=-1) > 30

    def where_it_was(picture: np.ndarray) -> bool:
        return np.linalg.norm(np.argwhere(picture).mean(axis=0)[::-1] + 0.5 - expected) < 5

    assert where_it_was(vanished)
    assert not any(
        where_it_was(flipped)
        for flipped in (vanished[::-1], vanished[:, ::-1], vanished[::-1, ::-1])
    )


def test_spec_and_mistakes(robocasa, make, monkeypatch):
    spec = robocasa.spec((), 224)
    assert spec.tasks == ("CloseDrawer",) and spec.prompts == ("close drawer",)
    assert (spec.views, spec.state_dim, spec.action_dim, spec.horizon) == (2, 25, 12, 300)
    assert all(len(bound) == 25 for bound in robocasa.spec((), 64).state_range)
    with pytest.raises(UserError, match="'close drawer'"):
        robocasa.spec(("close drawer",), 224)
    with pytest.raises(UserError, match="no task 'JuggleKnives'.*CloseDrawer"):
        make("JuggleKnives").reset(0, 0)
    monkeypatch.setattr(
        robocasa, "KITCHENS", {"layout_ids": 2, "style_ids": 2}
    )  # one of RoboCasa's own
    with pytest.raises(
        UserError, match="assets of RoboCasa's kitchens are missing.*download_kitchen_assets"
    ):
        make("CloseDrawer").reset(0, 0)
