"""PutOnPlateInScene25Main-v3 in ManiSkill, with assets of the right names and forms that are made
here: boxes for the 25 things, the plate, the table and the robot's links, plain colours for the 21
pictured tables. How RLinf's own fare is not tested.

Skipped like tests/test_maniskill.py.
"""

import json
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import envs
from errors import UserError

pytest.importorskip(
    "mani_skill",
    reason="mani_skill is not installed: bash setup.sh --maniskill",
    exc_type=ModuleNotFoundError,
)
maniskill = envs.load("maniskill").module
MAIN = "PutOnPlateInScene25Main-v3"
ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")


def box(path: Path, size: tuple[float, float, float]) -> None:
    """A box of this size (metres) around the origin, as Wavefront OBJ."""
    corners = [
        np.array(c) * size / 2
        for c in ([x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1))
    ]
    faces = [
        (1, 2, 4),
        (1, 4, 3),
        (5, 7, 8),
        (5, 8, 6),
        (1, 5, 6),
        (1, 6, 2),
        (3, 4, 8),
        (3, 8, 7),
        (1, 3, 7),
        (1, 7, 5),
        (2, 6, 8),
        (2, 8, 4),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"v {x} {y} {z}\n" for x, y, z in corners)
        + "".join(f"f {a} {b} {c}\n" for a, b, c in faces)
    )


def robot() -> str:
    """A URDF with the joints and links of WidowX 250 S that ManiSkill asks for: a chain of
    boxes."""
    links = []
    joints = []
    parent = "base_link"

    def link(name: str) -> None:
        shape = '<origin xyz="0 0 0"/><geometry><box size="0.03 0.03 0.03"/></geometry>'
        inertia = (
            '<inertial><mass value="0.2"/><inertia ixx="1e-3" iyy="1e-3" izz="1e-3" ixy="0" '
            'ixz="0" iyz="0"/></inertial>'
        )
        links.append(
            "<link "
            f'name="{name}"><visual>{shape}</visual><collision>{shape}</collision>{inertia}</link>'
        )

    def joint(
        name: str, kind: str, parent: str, child: str, xyz: str, axis: str, low: float, high: float
    ) -> None:
        limit = (
            f'<axis xyz="{axis}"/><limit lower="{low}" upper="{high}" effort="100" velocity="5"/>'
            if kind != "fixed"
            else ""
        )
        ends = f'<parent link="{parent}"/><child link="{child}"/><origin xyz="{xyz}"/>'
        joints.append(f'<joint name="{name}" type="{kind}">{ends}{limit}</joint>')

    link("base_link")
    for name, xyz, axis in zip(
        ARM,
        ("0 0 0.1", "0 0 0.05", "0.05 0 0.25", "0.15 0 0", "0.1 0 0", "0.07 0 0"),
        ("0 0 1", "0 1 0", "0 1 0", "1 0 0", "0 1 0", "1 0 0"),
        strict=True,
    ):
        link(f"{name}_link")
        joint(name, "revolute", parent, f"{name}_link", xyz, axis, -3.1, 3.1)
        parent = f"{name}_link"
    link("ee_gripper_link")
    joint("ee", "fixed", parent, "ee_gripper_link", "0.1 0 0", "", 0, 0)
    for name, side in (("left", 1), ("right", -1)):
        link(f"{name}_finger_link")
        joint(
            f"{name}_finger",
            "prismatic",
            parent,
            f"{name}_finger_link",
            f"0.09 {side * 0.03} 0",
            f"0 {side} 0",
            0.0,
            0.04,
        )
    return f'<robot name="wx250s">{"".join(links)}{"".join(joints)}</robot>'


@pytest.fixture(scope="module", autouse=True)
def assets(tmp_path_factory):
    import trimesh

    root = tmp_path_factory.mktemp("assets")
    own = root / "own" / "data"
    things = root / "rlinf" / "carrot"
    for kind, count, size in (
        ("more_carrot", 25, (0.04, 0.03, 0.03)),
        ("more_plate", 2, (0.12, 0.12, 0.01)),
    ):
        facts = {}
        for i in range(count):
            name = f"{i:03d}_{kind[5:]}"
            bounds = {"min": [-side / 2 for side in size], "max": [side / 2 for side in size]}
            facts[name] = {
                "name": f"{'thing' if count > 2 else 'plate'} {i}",
                "bbox": bounds,
                "scale": [1.0],
                "density": 800,
            }
            for file in ("collision.obj", "textured.obj"):
                box(things / kind / name / file, size)
        (things / kind / "model_db.json").write_text(json.dumps(facts))
    tables = {f"{i:02d}.png": {"texture": "plain.png", "mix": 0.5} for i in range(21)}
    for i, name in enumerate(tables):
        (things / "more_table" / "imgs").mkdir(parents=True, exist_ok=True)
        imageio.imwrite(
            things / "more_table" / "imgs" / name, np.full((480, 640, 3), 10 * i, np.uint8)
        )
    (things / "more_table" / "model_db.json").write_text(json.dumps(tables))
    (own / "robots" / "widowx").mkdir(parents=True)
    (own / "robots" / "widowx" / "wx250s.urdf").write_text(robot())
    stage = own / "tasks" / "bridge_v2_real2sim_dataset" / "stages" / "bridge_table_1_v1.glb"
    stage.parent.mkdir(parents=True)
    table = trimesh.creation.box(
        (1.2, 0.87, 1.2)
    )  # stood upright by the task, its top comes to 0.87 m
    table.apply_translation((-2.2234, 0.435, 2.8313))
    table.export(stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MS_ASSET_DIR", str(root / "own"))
        patch.setenv("MANISKILL_ASSET_DIR", str(root / "rlinf"))
        yield root


@pytest.fixture
def make():
    made = []
    try:
        maniskill.check_drawing(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))

    def lane(*tasks, count=1, size=32):
        made.append(maniskill.Envs(maniskill.spec(tasks, size).tasks, size, count, "cpu"))
        return made[-1]

    yield lane
    for one in made:
        one.close()


def sim_of(lane, row: int = 0):
    (key,) = [key for key, rows in lane.playing.items() if row in rows]
    return lane.sims[key]


def test_each_thing_is_a_task_with_an_instruction_of_its_own():
    spec = maniskill.spec((MAIN,), 224)
    assert (
        len(spec.tasks) == 16
        and spec.tasks[3] == f"{MAIN}/003_carrot"
        and spec.prompts[3] == "put thing 3 on plate 0"
    )
    assert (spec.views, spec.state_dim, spec.action_dim, spec.horizon) == (1, 8, 7, 80)
    assert (spec.robot, spec.picture) == ("widowx", 224)
    mixed = maniskill.spec((f"{MAIN}/002_carrot", "PickCube-v1"), 64)
    assert mixed.robot == "panda and widowx"
    assert maniskill.spec((f"{MAIN}-test",), 224).prompts[0] == "put thing 16 on plate 0"
    assert maniskill.spec((f"{MAIN}/002_carrot", "PickCube-v1"), 64).state_dim == 9
    with pytest.raises(UserError, match="'.*/umbrella'"):
        maniskill.spec((f"{MAIN}/umbrella",), 64)


def test_missing_assets_are_named(assets, monkeypatch, tmp_path):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    with pytest.raises(UserError, match="bridge_v2_real2sim"):
        maniskill.spec((MAIN,), 64)
    monkeypatch.setenv("MANISKILL_ASSET_DIR", str(tmp_path))
    with pytest.raises(UserError, match="MANISKILL_ASSET_DIR.*RLinf/maniskill_assets"):
        maniskill.spec((MAIN,), 64)


def test_a_seed_names_an_episode_and_the_task_its_thing(make):
    one = make(MAIN, count=2)
    other = make(MAIN, count=1)
    one.reset([0], 3, [5])
    one.reset([1], 4, [5])
    plan = torch.from_numpy(
        np.random.default_rng(0).uniform(-0.02, 0.02, (4, 2, 7)).astype(np.float32)
    )
    for actions in plan:
        one.step(actions)
    other.reset([0], 9, [8])
    other.step(plan[3, :1])
    other.reset([0], 3, [5])
    for actions in plan:
        other.step(actions[:1])
    sim = sim_of(one)
    again = sim_of(other)
    assert torch.equal(sim.get_state(), again.get_state())
    assert torch.equal(one.observe()[0][0], other.observe()[0][0])
    waiting = [bool(thing.pose.p[0, 0] > 0.9) for thing in sim.things]
    assert waiting == [i != 3 for i in range(16)]
    for seed in range(5):
        one.reset([1], 4, [seed])
        x, y = sim_of(one, 1).plate.pose.p[0, :2].tolist()
        assert abs(x + 0.16) < 0.08 and abs(y) < 0.08


def test_the_pictured_table_lies_behind_robot_thing_and_plate(make):
    lane = make(MAIN, size=64)
    lane.reset([0], 0, [1])
    sim = sim_of(lane)
    image, state = lane.observe()
    assert image.shape == (1, 1, 64, 64, 3) and state.shape == (1, 8)
    colour = 10 * int(sim.table[0])
    table = (image[0, 0] == colour).all(dim=-1).float().mean()
    assert 0.3 < table < 0.99  # the rest is the robot and what lies before it
    lane.fit = "letterbox"  # as openpi shows it to π
    boxed = lane.observe()[0][0, 0]
    assert not boxed[:8].any() and not boxed[-8:].any() and (boxed[8] == colour).all()
    tables = set()
    for seed in range(6):
        lane.reset([0], 0, [seed])
        tables.add(int(sim.table[0]))
    assert len(tables) > 2 and max(tables) < 16


def test_success_needs_the_thing_on_the_plate_and_touching_it(make):
    from sapien import Pose

    lane = make(MAIN)
    lane.reset([0], 2, [4])
    sim = sim_of(lane)
    rest = torch.tensor([[0.0] * 6 + [1.0]])
    assert not any(lane.step(rest).success[0] for _ in range(3))  # beside it on the table
    x, y, z = sim.plate.pose.p[0].tolist()
    sim.things[5].set_pose(Pose([x, y, z + 0.05]))
    assert not any(lane.step(rest).success[0] for _ in range(3))  # another thing
    sim.things[5].set_pose(Pose([1.0, 1.5, 1.0]))
    sim.things[2].set_pose(Pose([x, y, z + 0.05]))
    reward, success, _ = zip(*(lane.step(rest) for _ in range(3)), strict=True)
    assert success[-1][0] and reward[-1][0] == 1.0
    sim.things[2].set_pose(Pose([x + 0.3, y, z + 0.05]))
    assert not lane.step(rest).success[0]


def test_numbers_are_rlinfs():
    from envs.put_on_plate import JOINTS, places

    pairs = places()
    assert pairs.shape[1:] == (2, 2) and len(JOINTS) == 8
    assert np.allclose(pairs.min(axis=(0, 1)), [-0.235, -0.075]) and np.allclose(
        pairs.max(axis=(0, 1)), [-0.085, 0.075]
    )
    assert (
        np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1).min() > 0.07
        and len(np.unique(pairs.reshape(-1, 2).round(6), axis=0)) == 36
    )
