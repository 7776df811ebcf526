"""PutOnPlateInScene25Main-v3, RLinf's task in ManiSkill: a WidowX arm puts a thing on a plate.

A digital twin of BridgeData V2 (SimplerEnv): the picture of a real table lies behind whatever is
robot, thing or plate. Numbers, names and files are RLinf's (https://github.com/RLinf/RLinf,
rlinf/envs/maniskill/tasks/put_on_in_scene_multi.py, Apache 2.0): 25 things and 21 tables, of which
16 and 16 are for training and the others for testing, 36 places and 4 directions.

Different here: a task has one thing and so one instruction, and the seed draws table, places and
direction; a row that begins anew leaves the others alone. Left out: a dense reward, and RLinf's
variants for evaluation (other lights, textures, positions).
"""

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import (
    WidowX250SBridgeDatasetFlatTable,
)
from mani_skill.utils import sapien_utils
from mani_skill.utils.geometry.rotation_conversions import quaternion_to_matrix
from mani_skill.utils.structs.types import SimConfig

from envs.maniskill import models, shrink

CAMERA = "3rd_view_camera"
PICTURE = (480, 640)  # rows, columns: the camera's and the tables'
ROBOT = sapien.Pose([0.147, 0.028, 0.870], [0, 0, 0, 1])
ARM = (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398)  # radians
JOINTS = (*ARM, 0.037, 0.037)  # fingers in metres
HEIGHT = 0.90  # metres, from which thing and plate drop onto the table (0.87)
# Places are 6 × 6 within REACH of the centre, and of these the pairs farther apart; metres.
CENTRE = np.array([-0.16, 0.0])
REACH = 0.075
GRID = np.linspace(-1.0, 1.0, 6)
APART = 0.070
TURNS = np.pi / 4 * np.arange(4)  # radians, of the thing about the vertical
UPRIGHT = [1.0, 0.0, 0.0, 0.0]  # quaternion (w, x, y, z)
# Of a success:
BESIDE = 0.01  # metres beyond the plate's rim, at most
ABOVE = 0.05  # metres above it, at most
FORCE = 0.03  # newtons between the two, more


def places() -> np.ndarray:
    """[pairs, 2, 2] metres: where the thing and the plate may lie."""
    grid = CENTRE + REACH * np.stack(np.meshgrid(GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 2)
    pairs = np.stack([np.repeat(grid, len(grid), axis=0), np.tile(grid, (len(grid), 1))], axis=1)
    return pairs[np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1) > APART]


class PutOnPlate(BaseEnv):
    """RLinf's task on ManiSkill's own engine."""

    SUPPORTED_OBS_MODES = ("none",)
    SUPPORTED_REWARD_MODES = ("none",)

    def __init__(
        self, folder: Path, stage: Path, robot: Path, things: slice, tables: slice, **kwargs
    ):
        """folder: RLinf's assets. stage, robot: ManiSkill's. things, tables: which to play with."""
        self.folder = folder
        self.stage = stage
        self.known = dict(list(models(folder / "more_carrot").items())[things])
        pictures = folder / "more_table" / "imgs"
        names = list(models(folder / "more_table"))[tables]
        found = np.stack([imageio.imread(pictures / name)[..., :3] for name in names])
        self.tables = shrink(torch.from_numpy(found), *PICTURE)
        self.places = places()
        WidowX250SBridgeDatasetFlatTable.urdf_path = str(robot)
        super().__init__(robot_uids=WidowX250SBridgeDatasetFlatTable, **kwargs)

    @property
    def _default_sim_config(self):
        return SimConfig(sim_freq=500, control_freq=5, spacing=20)

    def _load_agent(self, options: dict):
        super()._load_agent(options, sapien.Pose([0.127, 0.060, 0.85], [0, 0, 0, 1]))

    def _build(self, name: str, facts: dict, folder: Path, aside: list[float]):
        """Builds a thing or plate. Returns it and half of its size [3], metres."""
        scale = facts.get("scale", [1.0])[0]
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(
            str(folder / name / "collision.obj"),
            scale=[scale] * 3,
            material=sapien.physx.PhysxMaterial(1.0, 1.0, 0.0),  # two frictions, no restitution
            density=facts.get("density", 1000),
        )
        looks = [folder / name / f"textured.{kind}" for kind in ("obj", "dae", "glb")]
        looks = next(path for path in looks if path.exists())
        builder.add_visual_from_file(str(looks), scale=[scale] * 3)
        builder.initial_pose = sapien.Pose(aside)
        half = np.subtract(facts["bbox"]["max"], facts["bbox"]["min"]) * scale / 2
        return builder.build(name=name), torch.from_numpy(half).float().to(self.device)

    def _load_scene(self, options: dict):
        for robot in self.agent.robot._objs:
            sapien_utils.set_articulation_render_material(robot, specular=0.9, roughness=0.3)
        builder = self.scene.create_actor_builder()
        pose = sapien.Pose(q=[0.707, 0.707, 0, 0])
        builder.add_nonconvex_collision_from_file(str(self.stage), pose=pose)
        builder.add_visual_from_file(str(self.stage), pose=pose)
        builder.initial_pose = sapien.Pose([2.0634, 2.8313, 0.0])
        builder.build_static(name="arena")
        # Where the things wait that are not the row's.
        self.aside = [[1.0, 0.3 * i, 1.0] for i in range(len(self.known))]
        folder = self.folder / "more_carrot"
        built = [
            self._build(name, facts, folder, aside)
            for (name, facts), aside in zip(self.known.items(), self.aside, strict=True)
        ]
        self.things = [thing for thing, _ in built]
        self.halves = torch.stack([half for _, half in built])  # [things, 3]
        folder = self.folder / "more_plate"
        name, facts = next(iter(models(folder).items()))
        self.plate, self.plate_half = self._build(name, facts, folder, [2.0, 0.0, 1.0])
        # Of each row: its thing, its table, and half of the box around the thing.
        self.thing = torch.zeros(self.num_envs, device=self.device, dtype=torch.long)
        self.table = torch.zeros_like(self.thing)
        self.thing_half = torch.zeros(self.num_envs, 3, device=self.device)
        self.tables = self.tables.to(self.device)

    def _load_lighting(self, options: dict):
        self.scene.set_ambient_light([0.3] * 3)
        for direction, strength in (([0, 0, -1], 2.2), ([-1, -0.5, -1], 0.7), ([1, 1, -1], 0.7)):
            self.scene.add_directional_light(direction, [strength] * 3)

    def _after_reconfigure(self, options: dict):
        in_front = [actor._objs[0].per_scene_id for actor in (*self.things, self.plate)]
        in_front += [link._objs[0].entity.per_scene_id for link in self.agent.robot.get_links()]
        self.in_front = torch.tensor(in_front, dtype=torch.int16, device=self.device)

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        """Begins one row, or when ManiSkill makes its scenes all of them, in the same pose.

        options: seeds [rows], thing."""
        chosen = options.get("thing", 0)
        for row, seed in zip(env_idx.tolist(), options.get("seeds", env_idx.tolist()), strict=True):
            draw = np.random.default_rng(seed)
            self.thing[row] = chosen
            self.table[row] = int(draw.integers(len(self.tables)))
            (x, y), (plate_x, plate_y) = self.places[draw.integers(len(self.places))]
            turn = TURNS[draw.integers(len(TURNS))]
        self.agent.reset(init_qpos=np.array([JOINTS]))
        self.agent.robot.set_pose(ROBOT)
        turned = [float(np.cos(turn / 2)), 0.0, 0.0, float(np.sin(turn / 2))]
        for thing, aside in zip(self.things, self.aside, strict=True):
            thing.set_pose(sapien.Pose(aside, UPRIGHT))
        self.things[chosen].set_pose(sapien.Pose([x, y, HEIGHT], turned))
        self.plate.set_pose(sapien.Pose([plate_x, plate_y, HEIGHT], UPRIGHT))
        axes = quaternion_to_matrix(torch.tensor(turned, device=self.device)).abs()
        self.thing_half[env_idx] = axes @ self.halves[chosen]

    def evaluate(self) -> dict:
        """Finds success: the thing is over the plate, near it, and they touch."""
        rows = torch.arange(self.num_envs, device=self.device)
        touch = self.scene.get_pairwise_contact_forces
        where = torch.stack([thing.pose.p for thing in self.things])[self.thing, rows]  # [N, 3]
        force = torch.stack([touch(thing, self.plate) for thing in self.things])[self.thing, rows]
        offset = where - self.plate.pose.p
        beside = torch.linalg.norm(offset[:, :2], dim=1) <= self.plate_half.max() + BESIDE
        gap = offset[:, 2] - self.plate_half[2] - self.thing_half[:, 2]
        above = (offset[:, 2] > 0) & (gap <= ABOVE)
        return {"success": beside & above & (torch.linalg.norm(force, dim=1) > FORCE)}

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict:
        seen = super()._get_obs_sensor_data(apply_texture_transforms)
        picture = seen[CAMERA]
        kinds = picture["segmentation"]  # [N, H, W, 1]
        front = torch.isin(kinds, self.in_front.to(kinds.dtype))
        picture["rgb"] = torch.where(front, picture["rgb"], self.tables[self.table])
        return seen
