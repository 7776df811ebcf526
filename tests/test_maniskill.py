"""ManiSkill as a vectorised lane: rows that know nothing of each other, success as the tasks define
it, frames right side up.

Skipped where mani_skill is not installed or Vulkan finds nothing to draw with (`bash setup.sh
--maniskill`).
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import envs
from config import ROOT
from errors import UserError
from models.formats import pictures

pytest.importorskip(
    "mani_skill",
    reason="mani_skill is not installed: bash setup.sh --maniskill",
    exc_type=ModuleNotFoundError,
)
maniskill = envs.load("maniskill").module


@pytest.fixture(scope="module", autouse=True)
def can_draw():
    """Keeps one lane, because with the last one of a process go the compiled shaders: 7 s of
    work."""
    try:
        kept = maniskill.Envs(("PickCube-v1",), 32, 1, "cpu")
    except UserError as error:
        pytest.skip(str(error))
    kept.reset([0], 0, [0])
    kept.observe()
    yield
    kept.close()


@pytest.fixture
def make():
    made = []

    def lane(*tasks, count=1, size=32, device="cpu"):
        made.append(maniskill.Envs(tasks, size, count, device))
        return made[-1]

    yield lane
    for one in made:
        one.close()


def sim_of(lane, row: int = 0):
    (key,) = [key for key, rows in lane.playing.items() if row in rows]
    return lane.sims[key]


def states(lane) -> list[torch.Tensor]:
    """Everything that moves, per row: poses and velocities of objects and joints."""
    return [sim_of(lane, row).get_state()[0] for row in range(lane.count)]


def actions(seed: int, steps: int = 6) -> torch.Tensor:
    """[steps, 7]: where the hand goes in an episode, named by its seed like the episode itself."""
    return torch.from_numpy(
        np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)
    )


def test_a_seed_names_an_episode_whatever_its_row_and_its_neighbours(make):
    one = make("PickCube-v1", "StackCube-v1", count=3)
    other = make("PickCube-v1", "StackCube-v1", count=2)
    one.reset([0, 2], 0, [5, 6])
    one.reset([1], 1, [7])
    for a, b, c in zip(actions(5), actions(7), actions(6), strict=True):
        one.step(torch.stack([a, b, c]))
    after = states(one)
    (images, joints) = one.observe()
    other.reset([0, 1], 0, [11, 12])  # another past
    for step in actions(1):
        other.step(step.repeat(2, 1))
    other.reset([1], 0, [5])
    for i, step in enumerate(actions(5)):
        if i == 3:
            other.reset([0], 1, [13])  # a neighbour begins anew, with another task
        other.step(torch.stack([actions(2)[i], step]))
    assert torch.equal(states(other)[1], after[0])
    again = other.observe()
    assert torch.equal(again[0][1], images[0]) and torch.equal(again[1][1], joints[0])
    assert not torch.equal(after[0], after[2])


@pytest.mark.parametrize("name", maniskill.TASKS)
def test_episodes_start_as_maniskill_itself_starts_them(make, name):
    lane = make(name)
    lane.reset([0], 0, [3])
    ours = sim_of(lane).get_state().clone()
    sim_of(lane).reset(seed=[3])
    assert torch.equal(sim_of(lane).get_state(), ours)
    lane.reset([0], 0, [4])
    assert not torch.equal(sim_of(lane).get_state(), ours)


def test_what_the_policy_sees(make):
    spec = maniskill.spec(("PickCube-v1", "PushCube-v1"), 48)
    lane = make(*spec.tasks, count=3, size=48)
    lane.reset([1], 0, [1])
    lane.reset([2], 1, [1])
    images, joints = lane.observe()
    assert images.shape == (3, spec.views, 48, 48, 3) and images.dtype == torch.uint8
    assert joints.shape == (3, spec.state_dim) and joints.dtype == torch.float32
    assert images[0].max() == 0 and images[1:].float().std() > 10  # row 0 plays nothing yet
    assert not torch.equal(images[1], images[2])
    reward, success, _ = lane.step(torch.full((3, spec.action_dim), 100.0))  # clipped, not refused
    assert reward.tolist() == [0.0] * 3 and success.dtype == torch.bool and not success.any()
    assert not torch.equal(lane.observe()[1], joints)
    lane.reset([1], 0, [1])
    assert torch.equal(lane.observe()[0][1], images[1])
    assert lane.film(24).shape == (24, 24, 3)


def test_success_is_the_tasks_own(make):
    """Scripted hands that know where things are push and pick; nothing but the task's own check
    ends the episode."""
    push = make("PushCube-v1")
    pick = make("PickCube-v1")
    push.reset([0], 0, [2])
    pick.reset([0], 0, [2])

    def reach(sim, target: torch.Tensor, gripper: float) -> torch.Tensor:
        """[1, 7]: towards a point, at most 10 cm a step. The frame is the robot's base, which is
        not turned."""
        move = ((target - sim.agent.tcp.pose.p[0]) / 0.1).clamp(-1, 1)
        return torch.cat([move, torch.zeros(3), torch.tensor([gripper])])[None]

    def play(lane, hand) -> int:
        for step in range(maniskill.HORIZON):
            reward, success, _ = lane.step(hand(step))
            if success[0]:
                assert reward[0] == 1.0
                return step + 1
            assert reward[0] == 0.0
        return 0

    sim = sim_of(push)
    behind = torch.tensor([-0.08, 0.0, 0.0])
    start = sim.obj.pose.p[0].clone() + behind
    goal = sim.goal_region.pose.p[0].clone() * torch.tensor([1.0, 1.0, 0.0]) + torch.tensor(
        [0.0, 0.0, 0.02]
    )
    steps = play(
        push,
        lambda t: reach(
            sim, start + torch.tensor([0, 0, 0.1]) if t < 8 else start if t < 16 else goal, -1.0
        ),
    )
    assert 16 < steps <= maniskill.HORIZON
    assert torch.linalg.norm((sim.obj.pose.p - sim.goal_region.pose.p)[0, :2]) < sim.goal_radius

    cube = sim_of(pick)

    def hand(t: int) -> torch.Tensor:
        place = cube.cube.pose.p[0] if t < 22 else cube.goal_site.pose.p[0]
        return reach(
            cube, place + torch.tensor([0, 0, 0.1 if t < 8 else 0.0]), 1.0 if t < 16 else -1.0
        )

    assert 22 < play(pick, hand) <= maniskill.HORIZON


def test_frames_are_right_side_up(make):
    """The cubes are where a camera at the task's documented place shows them: eye and target in
    metres, 90° of view."""
    size = 128
    lane = make("StackCube-v1", size=128)
    lane.reset([0], 0, [1])
    sim = sim_of(lane)
    before = lane.observe()[0][0, 0].int()
    eye = np.array([0.3, 0.0, 0.6])
    target = np.array([-0.1, 0.0, 0.1])
    up = np.array([0.0, 0.0, 1.0])
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, up) / np.linalg.norm(np.cross(forward, up))

    def pixel(
        point: np.ndarray,
    ) -> np.ndarray:  # column, row; half the picture is as wide as the view is deep
        x, y, z = (axis @ (point - eye) for axis in (right, np.cross(right, forward), forward))
        return size / 2 * np.array([1 + x / z, 1 - y / z])

    places = [pixel(cube.pose.p[0].numpy()) for cube in (sim.cubeA, sim.cubeB)]
    for cube in (sim.cubeA, sim.cubeB):
        cube.set_pose(
            cube.pose * type(cube.pose).create_from_pq(torch.tensor([[0.0, 0.0, -5.0]]))
        )  # out of sight
    vanished = ((lane.observe()[0][0, 0].int() - before).abs().sum(dim=-1) > 60).numpy()

    def where_they_were(picture: np.ndarray) -> bool:
        rows, columns = np.nonzero(picture)
        distance = np.stack(
            [np.hypot(columns + 0.5 - x, rows + 0.5 - y) for x, y in places]
        )  # [2, pixels]
        return bool((distance.min(axis=0) < 6).all() and (distance.min(axis=1) < 1.5).all())

    assert where_they_were(vanished)
    assert not any(
        where_they_were(flipped)
        for flipped in (vanished[::-1], vanished[:, ::-1], vanished[::-1, ::-1])
    )


def test_spec():
    spec = maniskill.spec((), 64)
    assert spec.tasks == ("PickCube-v1",) and (
        spec.views,
        spec.state_dim,
        spec.action_dim,
        spec.horizon,
    ) == (1, 9, 7, 80)
    assert {"PickCube-v1", "StackCube-v1", "PushCube-v1"} <= set(maniskill.TASKS)
    assert len({task.prompt for task in maniskill.TASKS.values()}) == len(maniskill.TASKS)
    with pytest.raises(UserError, match="'PickCube-v9'"):
        maniskill.spec(("PickCube-v9",), 64)


def test_without_anything_to_draw_with_it_says_what_is_missing():
    code = 'from envs import maniskill; maniskill.Envs(("PickCube-v1",), 32, 1, "cpu")'
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"VK_ICD_FILENAMES": "/none.json"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "software Vulkan of Mesa 25 or newer" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_rows_are_as_independent_and_nothing_leaves_it(make):
    lane = make("PickCube-v1", count=4, size=64, device="cuda:0")
    lane.reset([0, 1, 2, 3], 0, [5, 6, 5, 7])
    start = torch.stack(list(sim_of(lane).get_state()))
    torch.testing.assert_close(start[2], start[0], rtol=0, atol=1e-6)
    images, joints = lane.observe()
    assert images.device.type == joints.device.type == "cuda" and images.shape == (4, 1, 64, 64, 3)
    reward, success, _ = lane.step(torch.zeros(4, 7, device="cuda:0"))
    assert reward.device.type == success.device.type == "cuda"
    moved = sim_of(lane).get_state().clone()
    lane.reset([1], 0, [5])
    now = sim_of(lane).get_state()
    torch.testing.assert_close(now[1], start[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(now[[0, 2, 3]], moved[[0, 2, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows, columns", [(480, 640), (640, 480), (48, 48)])
def test_a_wide_picture_becomes_square_as_the_policy_was_trained(rows, columns):
    picture = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    given = torch.from_numpy(picture)[None]
    boxed = maniskill.square(given, 224, "letterbox")[0].numpy()
    theirs = pictures.resize_pil(picture, 224)
    assert np.abs(boxed.astype(int) - theirs).max() <= 1  # Pillow rounds twice
    if rows == 480:
        assert not boxed[:28].any() and not boxed[-28:].any() and boxed[28:-28].any()
    bicubic = maniskill.square(given, 224, "bicubic")
    assert torch.equal(bicubic, pictures.resize_bicubic(given, 224))
    assert maniskill.square(given, 224, "squeeze").shape == (1, 224, 224, 3)
