"""Demonstrations in LeRobot's format: read as they were written, learned from, mistakes named."""

import contextlib
import errno
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_oft
import test_pi_files
import torch
from test_gr00t import TINY as TINY_GR00T

import evaluate
import imitation
import models
import prepare
import pretrain
import train
from config import ROOT, completed
from demonstrations import Demonstrations
from envs import EnvSpec, metaworld
from errors import UserError
from films import write_video
from imitation import Lesson, Piece, Reader
from models import build, checkpoint, lora, tokenize
from models.formats import bins
from models.formats import gr00t as gr00t_files
from models.formats import oft as oft_files
from models.formats import pi as pi_files
from models.formats.preparation import usual
from models.oft import OftConfig
from pretrain import PretrainConfig
from recording import IN_ANY_ORDER, Writer, png

PRESS = metaworld.PROMPTS["handle-press"]
FPS = 80
LENGTHS = (7, 4, 9)


def picture(number: int, camera: int, frame: int, size: int = 64) -> np.ndarray:
    """[size, size, 3], smooth, another for every frame."""
    across = np.linspace(20, 120, size)
    plane = across[:, None] + across[None] * 0.5 + 9.0 * frame
    return np.stack([plane, plane[::-1], np.full_like(plane, 60 + 40 * camera + 5 * number)], -1)


def made(views: int = 1, state: int = 4, action: int = 4, tasks=(PRESS,), size: int = 64) -> list:
    """Episodes: task, pictures [T][V], states, actions in [-1, 1]."""
    rng = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate(LENGTHS):
        frames = range(length)
        shown = [
            [picture(number, v, t, size).astype(np.uint8) for v in range(views)] for t in frames
        ]
        states = rng.uniform(-1, 1, (length, state)).astype(np.float32)
        actions = rng.uniform(-1, 1, (length, action)).astype(np.float32)
        episodes.append((tasks[number % len(tasks)], shown, states, actions))
    return episodes


def write_new(folder: Path, episodes: list, video: bool = False, fps: float = FPS) -> Path:
    with Writer(folder, fps, video, "arm") as to:
        for task, shown, states, actions in episodes:
            to.add(task, [[png(view) for view in views] for views in shown], states, actions)
    return folder


def write_old(folder: Path, episodes: list, video: bool = False, version: str = "v2.1") -> Path:
    """As LeRobot wrote it before v3.0: a table, and a video of each camera, for each episode."""
    meta = folder / "meta"
    meta.mkdir(parents=True)
    tasks = list(dict.fromkeys(task for task, *_ in episodes))
    views, size = len(episodes[0][1][0]), len(episodes[0][1][0][0])
    cameras = [f"observation.images.view{i}" for i in range(views)]
    features = {name: {"dtype": "float32", "shape": [1]} for name in ("timestamp",)}
    features |= {c: {"dtype": "image", "shape": [size, size, 3], "names": None} for c in cameras}
    if video:
        features |= {c: features[c] | {"dtype": "video"} for c in cameras}
    features["depth"] = {"dtype": "video", "shape": [8, 8, 1], "info": {"is_depth_map": True}}
    for name, width in (("observation.state", 2), ("action", 3)):
        features[name] = {"dtype": "float32", "shape": [episodes[0][width].shape[1]]}
    info = {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 2,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_"
        "{episode_index:06d}.mp4",
    }
    (meta / "info.json").write_text(json.dumps(info))
    rows = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    (meta / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = []
    for number, (task, shown, states, actions) in enumerate(episodes):
        listed.append({"episode_index": number, "tasks": [task], "length": len(states)})
        at = {"episode_chunk": number // 2, "episode_index": number}
        columns = {"observation.state": states.tolist(), "action": actions.tolist()}
        columns["timestamp"] = pa.array(np.arange(len(states)) / FPS, pa.float32())
        columns["episode_index"] = [number] * len(states)
        columns["task_index"] = [tasks.index(task)] * len(states)
        for camera, view in zip(cameras, zip(*shown, strict=True), strict=True):
            path = folder / info["video_path"].format(video_key=camera, **at)
            if video:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, list(view), FPS, IN_ANY_ORDER)
            else:
                columns[camera] = [
                    {"bytes": png(x), "path": f"{i}.png"} for i, x in enumerate(view)
                ]
        path = folder / info["data_path"].format(**at)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, listed)) + "\n")
    return folder


def assert_same(data: Demonstrations, episodes: list, exact: bool) -> None:
    assert len(data.episodes) == len(episodes) and data.fps == FPS
    for found, (task, shown, states, actions) in zip(data.episodes, episodes, strict=True):
        assert found.task == task
        assert np.array_equal(found.states, states) and np.array_equal(found.actions, actions)
        for frames in (range(len(states)), [1], range(2, len(states), 2)):
            seen = np.stack(list(data.pictures(found, data.cameras, frames)))
            wanted = np.stack([np.stack(shown[i]) for i in frames])
            assert seen.shape == wanted.shape and seen.dtype == np.uint8
            error = np.abs(seen.astype(int) - wanted)
            # Neighbours differ by 9 grey levels: another frame would show.
            assert error.max() == 0 if exact else (error.mean() < 2.0 and error.max() < 9)


# ---------------------------------------------------------------- the format


@pytest.mark.parametrize("video", [False, True], ids=["pictures", "videos"])
@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_what_was_written_is_read(tmp_path, version, video):
    episodes = made(views=2, tasks=("push", "pull"))
    if version == "v3.0":
        data = Demonstrations(write_new(tmp_path / "d", episodes, video))
    else:
        data = Demonstrations(write_old(tmp_path / "d", episodes, video, version))
    assert len(data.cameras) == 2 and data.shapes == [[4], [4]]
    assert_same(data, episodes, exact=not video)


@contextlib.contextmanager
def same_priority() -> Iterator[None]:
    """SVT-AV1 gives the thread that opens it the highest real-time priority, where it may."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, *before)


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_an_episode_may_be_in_the_middle_of_a_video(tmp_path, codec):
    """As LeRobot writes them in v3.0: one file of several episodes, AV1 by default."""
    episodes = made()
    folder = write_new(tmp_path / "d", episodes, video=True)
    camera = "observation.images.camera_0"
    every = [views[0] for _, shown, _, _ in episodes for views in shown]
    file = str(folder / f"videos/{camera}/chunk-000/file-000.mp4")
    with same_priority(), av.open(file, "w") as file:
        stream = file.add_stream(codec, rate=Fraction(FPS))
        stream.options = {"crf": "10"}  # and a key frame where the codec likes
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for one in every:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
        file.mux(stream.encode())
    table = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(table).to_pylist()
    for row, start in zip(rows, itertools.accumulate((0, *LENGTHS)), strict=False):
        row |= {f"videos/{camera}/file_index": 0, f"videos/{camera}/from_timestamp": start / FPS}
    pq.write_table(pa.Table.from_pylist(rows), table)
    assert_same(Demonstrations(folder), episodes, exact=False)


def test_names_of_openpi_s_and_pandas_index_are_known(tmp_path):
    folder = write_old(tmp_path / "d", made())
    info = json.loads((folder / "meta/info.json").read_text())
    features = info["features"]
    features["state"] = features.pop("observation.state")
    features["actions"] = features.pop("action")
    (folder / "meta/info.json").write_text(json.dumps(info))
    for file in folder.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        names = {"observation.state": "state", "action": "actions"}
        pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), file)
    assert_same(Demonstrations(folder), made(), exact=True)
    new = write_new(tmp_path / "new", made())
    tasks = pq.read_table(new / "meta/tasks.parquet").rename_columns(
        ["task_index", "__index_level_0__"]
    )
    pq.write_table(tasks, new / "meta/tasks.parquet")
    assert_same(Demonstrations(new), made(), exact=True)


def test_a_dataset_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "MOST", 1)  # a file for each episode
    folder = write_new(tmp_path / "d", made())
    assert len(list(folder.glob("data/*/*.parquet"))) == 3
    assert_same(Demonstrations(folder), made(), exact=True)
    with pytest.raises(UserError, match="exists already"):
        write_new(folder, made())
    with pytest.raises(RuntimeError), Writer(tmp_path / "e", FPS, False, "arm") as to:
        to.add("push", [[png(np.zeros((8, 8, 3), np.uint8))]], np.zeros((1, 4)), np.zeros((1, 4)))
        raise RuntimeError
    assert sorted(x.name for x in tmp_path.iterdir()) == ["d"]


def test_one_process_at_a_time_writes_a_dataset(tmp_path):
    """What one left that was killed is in nobody's way."""
    left = tmp_path / ".d.partial" / "data" / "chunk-009" / "file-009.parquet"
    left.parent.mkdir(parents=True)
    left.touch()
    with Writer(tmp_path / "d", FPS, False, "arm") as to:
        with pytest.raises(UserError, match="d is being written by another process"):
            write_new(tmp_path / "d", made())
        for task, shown, states, actions in made():
            to.add(task, [[png(view) for view in views] for views in shown], states, actions)
    assert_same(Demonstrations(tmp_path / "d"), made(), exact=True)
    assert not list(tmp_path.glob("*/data/chunk-009")) and not left.exists()


def change(folder: Path, **info) -> None:
    file = folder / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | info))


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def without_task(folder: Path) -> None:
    (folder / "meta/tasks.jsonl").write_text('{"task_index": 7, "task": "push"}')


def shorter(folder: Path) -> None:
    file = first(folder, "data/*/*.parquet")
    pq.write_table(pq.read_table(file).slice(0, 3), file)


def not_a_number(folder: Path) -> None:
    file = first(folder, "data/*/*.parquet")
    table = pq.read_table(file)
    values = [[float("nan")] * 4] * len(table)
    at = table.column_names.index("action")
    pq.write_table(table.set_column(at, "action", pa.array(values)), file)


def texts_for_numbers(folder: Path) -> None:
    file = first(folder, "data/*/*.parquet")
    table = pq.read_table(file)
    at = table.column_names.index("action")
    pq.write_table(table.set_column(at, "action", pa.array([["up"] * 4] * len(table))), file)


def two_tasks(folder: Path) -> None:
    """As LeRobot has them where the instruction changes within an episode."""
    (folder / "meta/tasks.jsonl").write_text(
        '{"task_index": 0, "task": "push"}\n{"task_index": 1, "task": "pull"}'
    )
    file = first(folder, "data/*/*.parquet")
    table = pq.read_table(file)
    kinds = pa.array([0] * (len(table) - 1) + [1])
    pq.write_table(
        table.set_column(table.column_names.index("task_index"), "task_index", kinds), file
    )


def twice(folder: Path) -> None:
    file = folder / "meta/episodes.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[0])


DAMAGES = {
    "no info": (lambda f: (f / "meta/info.json").unlink(), "is no dataset of LeRobot's"),
    "version": (lambda f: change(f, codebase_version="v1.6"), "is of version v1.6; of LeRobot's"),
    "fps 0": (lambda f: change(f, fps=0), "fps 0 must be more than 0"),
    "fps": (lambda f: change(f, fps=20), "are not 1/20 s apart: is fps in info.json right"),
    "features": (lambda f: change(f, features={}), "has no feature 'observation.state'"),
    "no task": (without_task, "episode 0 in .* has no task"),
    "two tasks": (two_tasks, "episode 0 in .* has frames of several tasks: split it"),
    "no table": (lambda f: first(f, "data/*/*.parquet").unlink(), "is missing: the dataset"),
    "damaged": (lambda f: first(f, "data/*/*.parquet").write_bytes(b"x"), "cannot read .*parquet"),
    "shorter": (shorter, "has 3 frames and should have 7: it is incomplete"),
    "NaN": (not_a_number, "action holds NaN"),
    "no list": (lambda f: (f / "meta/episodes.jsonl").unlink(), "episodes.jsonl is missing"),
    "an unknown field": (lambda f: change(f, data_path="{foo}.parquet"), "has other fields than"),
    "a wide field": (
        lambda f: change(f, data_path="{episode_index:999999999}"),
        "has other fields than",
    ),
    "an attribute": (lambda f: change(f, data_path="{episode_index.x}"), "has other fields than"),
    "outside": (lambda f: change(f, data_path="../{episode_index}.parquet"), "which is not in it"),
    "elsewhere": (lambda f: change(f, data_path="/etc/{episode_index}"), "which is not in it"),
    "no task_index": (
        lambda f: (f / "meta/tasks.jsonl").write_text('{"task": "x"}'),
        "has no task_",
    ),
    "no length": (
        lambda f: (f / "meta/episodes.jsonl").write_text('{"episode_index": 0}'),
        "has no length",
    ),
    "texts": (texts_for_numbers, "cannot read .*parquet: it is of another kind"),
    "twice": (twice, "lists an episode twice"),
    "a line": (lambda f: (f / "meta/tasks.jsonl").write_text("{"), "cannot read .*tasks.jsonl"),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_with_a_folder_is_one_sentence(tmp_path, damage, words):
    folder = write_old(tmp_path / "d", made())
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        Demonstrations(folder)
    assert "\n" not in str(error.value)


def test_a_table_of_episodes_is_checked_and_its_videos_have_a_place(tmp_path):
    folder = write_new(tmp_path / "d", made(), video=True)
    change(folder, video_path=None)
    with pytest.raises(UserError, match="info.json says of .*camera_0 no video_path"):
        Demonstrations(folder)
    table = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"data/chunk_index": None} for row in rows]), table)
    change(folder, video_path="videos/{video_key}/chunk-{chunk_index:03d}/{file_index}.mp4")
    with pytest.raises(UserError, match="what it says of an episode is no number"):
        Demonstrations(folder)


def test_a_picture_s_file_is_in_the_folder_or_a_link_there(tmp_path):
    episodes = made()
    folder = write_old(tmp_path / "d", episodes)
    file = first(folder, "data/*/*.parquet")
    table = pq.read_table(file)
    (tmp_path / "blob").write_bytes(png(episodes[0][1][0][0]))
    (folder / "link.png").symlink_to(tmp_path / "blob")
    camera = "observation.images.view0"
    at = table.column_names.index(camera)

    def seen(name: str) -> np.ndarray:
        cells = pa.array([{"bytes": None, "path": name}] * len(table))
        pq.write_table(table.set_column(at, camera, cells), file)
        data = Demonstrations(folder)
        return next(data.pictures(data.episodes[0], data.cameras, range(1)))

    assert np.array_equal(seen("link.png")[0], episodes[0][1][0][0])
    with pytest.raises(UserError, match="names the file ../blob, which is not in it"):
        seen("../blob")


def cut_video(folder: Path) -> None:
    path = first(folder, "videos/*/*/*.mp4")
    write_video(path, [picture(0, 0, t).astype(np.uint8) for t in range(3)], FPS, IN_ANY_ORDER)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: first(f, "videos/*/*/*.mp4").write_bytes(b"no video"), "cannot read the video"),
        (lambda f: first(f, "videos/*/*/*.mp4").unlink(), "mp4 is missing"),
        (cut_video, "has no frame at 0.038 s: is it cut short"),
    ],
)
def test_a_video_that_cannot_be_read_is_named(tmp_path, damage, words):
    folder = write_old(tmp_path / "d", made(), video=True)
    damage(folder)
    data = Demonstrations(folder)
    with pytest.raises(UserError, match=words):
        list(data.pictures(data.episodes[0], data.cameras, range(7)))


# ---------------------------------------------------------------- units


def random_actions(n: int, grip: float = -1.0) -> np.ndarray:
    """[n, 7] in [-0.5, 0.5], the gripper open or closed."""
    rng = np.random.default_rng(1)
    actions = rng.uniform(-0.5, 0.5, (n, 7)).astype(np.float32)
    actions[:, 6] = np.where(rng.random(n) < 0.5, grip, 1.0)
    return actions


@pytest.mark.parametrize("gripper", ["", "widowx"])
@pytest.mark.parametrize("family", ["pi0", "pi05"])
@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_targets_of_pi_are_the_inverse_of_its_actions(family, layout, gripper):
    golden = test_pi_files.GOLDEN / family
    if layout == "openpi":  # π0's LIBERO actions are relative to the state
        stats = pi_files.read_norm_stats(golden, family == "pi05", "libero")
    else:
        stats = pi_files.read_processors(golden / "lerobot")
    width = len(next(x for x in stats["actions"].values() if isinstance(x, list)))
    actions = random_actions(5)[:, -width:]
    state = np.linspace(0.1, 0.8, 8, dtype=np.float32)
    preparation = test_pi_files.prepare(family, stats | {"gripper": gripper})
    again = preparation.actions(preparation.targets(actions, state), state)
    ends = [np.array(x) for x in stats["actions"].values() if isinstance(x, list)]
    varied = ends[1] != (ends[0] if "q01" in stats["actions"] else 0.0)  # else a spread of 0
    np.testing.assert_allclose(again[:, varied], actions[:, varied], atol=2e-6)
    # Of its own statistics it makes numbers between -1 and 1, or of mean 0 and deviation 1.
    many = random_actions(500)[:, -width:]
    counted = preparation.counted(np.tile(state, (500, 1)), preparation.in_data(many, state))
    checkpoint.check_stats(family, counted, "x")
    scaled = test_pi_files.prepare(family, counted).targets(many, state)
    if "q01" in counted["actions"]:
        assert np.mean(np.abs(scaled) <= 1.01) > 0.95
    else:
        assert np.allclose(scaled.mean(0), 0, atol=1e-4) and np.allclose(
            scaled.std(0), 1, atol=1e-4
        )


@pytest.mark.parametrize("gripper", ["", "libero", "widowx"])
def test_targets_of_gr00t_and_oft_are_the_inverse_of_their_actions(gripper):
    actions = random_actions(400)
    state = np.zeros(8, np.float32)
    ends = {"state_low": [-1.0] * 8, "state_high": [1.0] * 8}
    ends |= {"action_low": [-0.5] * 6 + [0.0], "action_high": [0.5] * 6 + [1.0]}
    c = replace(TINY_GR00T, max_state_dim=8, max_action_dim=8, action_dim=7)
    made = gr00t_files.Preparation(c, ends | {"layout": "isaac", "gripper": gripper}, None)
    np.testing.assert_allclose(made.actions(made.targets(actions, state)), actions, atol=1e-6)
    counted = made.counted(np.tile(state, (2, 1)), made.in_data(actions, state))
    checkpoint.check_stats("gr00t", counted, "x")
    assert counted["action_low"][6] == (0.0 if gripper else -1.0)

    # OFT says actions by words, whose middles are 1/255 apart.
    stats = {"layout": "openvla", "gripper": gripper, "mask": [True] * 6 + [False]}
    stats |= {"q01": [-0.6] * 6 + [0.0], "q99": [0.6] * 6 + [1.0]}
    oft = oft_files.Preparation(OftConfig(action_dim=7), stats, None)
    tokens = bins.encode_actions(torch.from_numpy(oft.targets(actions, state)), 300).numpy() - 300
    table = bins.action_table(stats, 7)
    spoken = table[np.arange(7), tokens]
    np.testing.assert_allclose(spoken[:, :6], actions[:, :6], atol=0.6 / 255 + 1e-3)
    # (without a gripper of its own, a word between 0 and 1 is what LIBERO is told)
    np.testing.assert_allclose(spoken[:, 6], actions[:, 6], atol=1 / 255)
    counted = oft.counted(np.tile(state, (400, 1)), oft.in_data(actions, state))
    checkpoint.check_stats("oft", counted, "x")
    assert counted["q99"] == np.quantile(oft.in_data(actions, state), 0.99, axis=0).tolist()


def test_what_seldom_happens_is_not_scaled_beyond_measure():
    values = np.zeros((1000, 2))
    values[:, 1] = np.linspace(-1.0, 1.0, 1000)
    values[3, 0] = 1.0  # a gripper that closed once
    low, high = usual(values)
    assert (low[0], high[0]) == (0.0, 1.0)
    np.testing.assert_allclose((low[1], high[1]), (-0.98, 0.98))


def test_after_an_episode_s_end_the_last_action_is_repeated():
    actions = np.arange(5.0)[:, None]
    assert imitation.following(actions, 1, 3)[:, 0].tolist() == [1, 2, 3]
    assert imitation.following(actions, 3, 4)[:, 0].tolist() == [3, 4, 4, 4]


# ---------------------------------------------------------------- learning


def lesson_of(folder: Path, out: Path, **flags) -> Lesson:
    """What pretrain.py makes of flags, with the shipped π0.5 to start from."""
    flags = {"checkpoint": ROOT / "assets" / "pi05_metaworld.safetensors"} | flags
    flags = {"tasks": ("handle-press",), "batch": 4, "steps": 3} | flags
    config = PretrainConfig(dataset=folder, out=out, **flags)
    spec = pretrain.envs.load(config.env).spec(config.tasks, 64)
    return with_spec(config, spec, out)


def with_spec(config: PretrainConfig, spec: EnvSpec, out: Path) -> Lesson:
    data = pretrain.read_dataset(config, spec)
    path, words = pretrain.find_start(config, spec, spec.prompts, out.parent)
    settings = pretrain.settings_of(config, path, words)
    spec = spec._replace(image_size=checkpoint.frame_size(path, spec.picture))
    files = (out, Path(words), out.with_suffix(".model"))
    lesson = pretrain.lesson_of(config, settings, spec, files)
    return pretrain.from_demonstrations(config, lesson, data)


def test_every_frame_comes_once_an_epoch_and_few_pieces_are_in_memory(tmp_path, monkeypatch):
    lesson = lesson_of(write_new(tmp_path / "d", made()), tmp_path / "new.safetensors")
    monkeypatch.setattr(imitation, "PIECE", 4)  # frames
    monkeypatch.setattr(imitation, "BLOCK", 1)  # a piece at a time
    reader = Reader(lesson)
    pieces = [(0, 4), (0, 3), (1, 4), (2, 4), (2, 4), (2, 1)]
    assert reader.at_once == 1
    assert sorted((one.episode, len(one.frames)) for one in reader.pieces) == sorted(pieces)
    every = [(place, frame) for place, length in enumerate(LENGTHS) for frame in range(length)]
    read = []
    alone = threading.Lock()

    def note(piece: Piece) -> dict:
        with alone:
            read.append(piece)
        return {"actions": np.array([(piece.episode, frame) for frame in piece.frames])}

    monkeypatch.setattr(reader, "read", note)
    batches = reader.batches(1)
    epoch = [tuple(next(batches)["actions"][0].tolist()) for _ in every]
    assert sorted(epoch) == every != epoch
    assert len(read) <= len(pieces) + 1  # each once, and the next one ahead
    batches.close()

    # The seed says the order; in an epoch ranks have pieces of their own.
    def order(rank: int = 0, ranks: int = 1, seed: int = 0) -> list:
        one = Reader(replace(lesson, seed=seed), rank, ranks)
        blocks = itertools.islice(one.blocks(), len(one.pieces[rank::ranks]))
        return [(piece.episode, piece.frames[i]) for _, frames in blocks for piece, i in frames]

    assert order() == order() != order(seed=1) and sorted(order()) == every
    assert sorted(order(0, 2) + order(1, 2)) == every


@pytest.mark.parametrize("ranks", [2, 8])
def test_all_frames_count_alike_however_many_processes_there_are(tmp_path, ranks):
    lesson = lesson_of(write_new(tmp_path / "d", made()), tmp_path / "new.safetensors")
    counts = np.zeros((len(LENGTHS), max(LENGTHS)))
    for rank in range(ranks):
        blocks = Reader(lesson, rank, ranks).blocks()
        frames = (one for _, block in blocks for one in block)
        for piece, i in itertools.islice(frames, 3200 // ranks):
            counts[piece.episode, piece.frames[i]] += 1
    often = np.concatenate([row[:length] for row, length in zip(counts, LENGTHS, strict=True)])
    assert often.sum() == 3200 and np.abs(often / often.mean() - 1.0).max() < 0.15


def run(lesson: Lesson, tmp_path: Path) -> None:
    imitation.fit(0, 1, lesson, tmp_path / "meeting", threading.Event())


def losses(capsys) -> list[float]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    return [float(line.split()[3]) for line in lines]


def changed(before: dict, after: dict) -> set[str]:
    return {name for name, x in after.items() if not torch.equal(before[name].float(), x.float())}


class Words:
    """A tokeniser for which every text is three words."""

    bos_id = staticmethod(lambda: 1)
    unk_id = staticmethod(lambda: 3)
    encode = staticmethod(lambda text: [5, 6, 7])
    piece_to_id = staticmethod(lambda piece: 4)


PUBLISHED = [("pi05", {"lora_rank": 4}), ("pi05", {}), ("oft", {"lora_rank": 4})]


@pytest.mark.parametrize("family, flags", PUBLISHED)
def test_a_published_checkpoint_learns_and_goes_on_from_what_it_learned(
    tmp_path, family, flags, capsys, monkeypatch
):
    views = 1 if family == "oft" else 2
    state, action = (4, 4) if family == "oft" else (8, 5)
    # The reference models know too few words for a vocabulary of SentencePiece's.
    monkeypatch.setattr(tokenize, "load_for", lambda *_: Words)
    (tmp_path / "words.model").touch()
    if family == "oft":
        folder = test_oft.write_folder(tmp_path / "published")
    else:
        folder = test_pi_files.published(family, "openpi", tmp_path / "published")
    adapted = "lora_rank" in flags
    flags = flags | {"chunk": 3, "tokenizer": tmp_path / "words.model"}
    flags |= {"model": family, "env": "libero", "lr": 1e-2, "micro_batch": 3}
    # A simulator of somebody's own, whose pictures are wider than the model's.
    spec = EnvSpec(("t",), ("push it",), views, 42, state, action, 100)
    data = write_new(tmp_path / "d", made(views, state, action, ("push it",)))
    config = PretrainConfig(dataset=data, out=tmp_path / "x", checkpoint=folder, **flags)
    config = replace(config, batch=8, steps=20)
    monkeypatch.setattr(imitation, "WARMUP", 1)
    monkeypatch.setattr(imitation, "SAID_EVERY", 0.0)
    lesson = with_spec(config, spec, tmp_path / "new.safetensors")
    assert (
        lesson.checkpointing and lesson.header.stats != models.held(lesson.settings, spec)[1].stats
    )
    before = build(lesson.settings, lesson.spec).state_dict()
    run(lesson, tmp_path)
    said = losses(capsys)
    assert len(said) == 20 and sum(said[-5:]) < 0.9 * sum(said[:5])

    # Reinforcement learning goes on from it, with the statistics of the data.
    settings = pretrain.settings_of(
        replace(config, checkpoint=lesson.out), lesson.out, str(flags["tokenizer"])
    )
    again = build(settings, spec)
    assert again.header.stats == lesson.header.stats and again.header.published
    moved = changed(before, again.state_dict())
    assert moved and moved <= set(again.trainable())
    assert not any(name.startswith("value_head") for name in moved)
    if adapted:
        assert all(".lora_" in name for name in moved) and lora.adapted(again)


@pytest.mark.parametrize("family", ["pi0", "gr00t", "oft"])
def test_a_new_model_of_every_family_learns_another_simulator_s_tasks(tmp_path, family, capsys):
    spec = EnvSpec(("t",), ("push it",), 2, 64, 8, 7, 100, robot="libero", rate=20.0)
    spec = pretrain.envs.checked_spec("mine", spec)
    data = write_new(tmp_path / "d", made(2, 8, 7, ("push it", "then rest"), 80))
    config = PretrainConfig(dataset=data, out=tmp_path / "x", model=family, env="libero")
    lesson = with_spec(replace(config, batch=8, steps=12), spec, tmp_path / "new.safetensors")
    assert lesson.lr == pretrain.NEW_LR and lesson.half and not lesson.checkpointing
    run(lesson, tmp_path)
    said = losses(capsys)
    assert said[-1] < said[0]
    words = lesson.vocabulary[1]
    settings = pretrain.settings_of(replace(config, checkpoint=lesson.out), lesson.out, str(words))
    again = build(settings, spec)
    assert again.header.stats == lesson.header.stats != {}
    assert again.header.vocabulary == tokenize.fingerprint(words)


def test_what_does_not_fit_a_gpu_is_refused_at_once(tmp_path, monkeypatch):
    folder = write_new(tmp_path / "d", made())
    lesson = lesson_of(folder, tmp_path / "a.safetensors", train_vlm=True)
    weights = sum(p.nbytes for p in build(lesson.settings, lesson.spec).parameters())
    needed = imitation.memory_of(lesson)
    more = imitation.memory_of(replace(lesson, micro_batch=64))
    less = imitation.memory_of(replace(lesson, micro_batch=64, checkpointing=True))
    assert weights < needed < less < more
    monkeypatch.setattr(imitation.machine, "gpus", lambda: 1)
    gpu = SimpleNamespace(total_memory=2 * needed)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    imitation.check_memory(lesson)
    gpu.total_memory = needed
    with pytest.raises(UserError, match="GB of a GPU, and there are .*smaller --micro-batch"):
        imitation.check_memory(lesson)


def test_parts_of_a_batch_and_recomputing_give_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(imitation, "WARMUP", 1)
    folder = write_new(tmp_path / "d", made())
    found = []
    for name, more in (("a", {}), ("b", {"micro_batch": 3, "checkpointing": "on"})):
        lesson = lesson_of(
            folder, tmp_path / f"{name}.safetensors", train_vlm=True, lr=1e-3, **more
        )
        run(lesson, tmp_path)
        model = build(completed(lesson.settings, checkpoint=lesson.out), lesson.spec)
        found.append(torch.cat([x.double().flatten() for x in model.parameters()]))
    model = build(lesson.settings, lesson.spec)
    before = torch.cat([x.double().flatten() for x in model.parameters()])
    moved = (found[0] - before).norm()
    assert moved > 0.1 and (found[0] - found[1]).norm() < 0.02 * moved


def test_what_is_finished_is_replaced_by_what_is_finished(tmp_path):
    lesson = lesson_of(write_new(tmp_path / "d", made()), tmp_path / "a.safetensors")
    lesson.out.write_bytes(b"finished")
    stop = threading.Event()
    stop.set()
    lesson = replace(lesson, save_every=1)
    imitation.fit(0, 1, lesson, tmp_path / "meeting", stop)
    assert lesson.out.read_bytes() == b"finished" and not lesson.vocabulary[1].exists()
    assert checkpoint.read_header(tmp_path / "a.partial.safetensors").stats == lesson.header.stats
    run(lesson, tmp_path)
    assert checkpoint.read_header(lesson.out).stats == lesson.header.stats
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.model", "a.safetensors", "d"]


def test_a_full_disk_costs_a_save_on_the_way_and_ends_learning_with_a_sentence(
    tmp_path, monkeypatch, capsys
):
    lesson = lesson_of(write_new(tmp_path / "d", made()), tmp_path / "a.safetensors")
    lesson = replace(lesson, save_every=1)
    save = checkpoint.save

    def refuses(times: int):
        refused = iter(range(times))

        def saves(path, *what):
            if next(refused, None) is not None:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            save(path, *what)

        monkeypatch.setattr(checkpoint, "save", saves)

    refuses(1)
    run(lesson, tmp_path)
    partial = tmp_path / "a.partial.safetensors"
    refused = "No space left on device"
    said = capsys.readouterr().err
    assert said == f"warning: cannot write {partial}: {refused}; the next save tries again\n"
    assert lesson.out.is_file() and not partial.exists()

    # The vocabulary of weights that are still there stays with them.
    words = lesson.vocabulary[1]
    words.write_bytes(b"of the finished weights")
    before = sorted(tmp_path.iterdir())
    refuses(lesson.steps)
    with pytest.raises(UserError, match=f"^cannot write {lesson.out}: {refused}$"):
        run(lesson, tmp_path)
    assert words.read_bytes() == b"of the finished weights"
    assert sorted(tmp_path.iterdir()) == before


def test_two_programs_do_not_write_one_checkpoint(tmp_path):
    out = tmp_path / "new" / "model.safetensors"
    out.parent.mkdir()
    left = out.with_name(".model.partial.safetensors.0a1b.partial")
    words = out.with_name(".model.partial.model.0a1b.partial")
    other = out.with_name(".model-2.safetensors.0a1b.partial")
    for file in (left, words, other):
        file.touch()
    with pretrain.reserved(out):
        assert not left.exists() and not words.exists() and other.exists()
        with (
            pytest.raises(UserError, match="another pretrain.py is writing .*: give another --out"),
            pretrain.reserved(out),
        ):
            pass
        with pretrain.reserved(out.with_name("model-2.safetensors")):
            assert not other.exists()
    with pretrain.reserved(out):  # it is free again
        pass
    assert not any(out.parent.iterdir())
    with (
        pytest.raises(UserError, match="none"),
        pretrain.reserved(tmp_path / "b" / "x.safetensors"),
    ):
        raise UserError("none")
    assert not (tmp_path / "b").exists()


def test_statistics_are_the_data_s_or_stay(tmp_path):
    folder = write_new(tmp_path / "d", made())
    ours = lesson_of(folder, tmp_path / "a.safetensors")
    states = np.concatenate([states for _, _, states, _ in made()])
    np.testing.assert_allclose(ours.header.stats["state_low"], np.quantile(states, 0.01, axis=0))
    theirs = lesson_of(folder, tmp_path / "a.safetensors", keep_statistics=True)
    shipped = checkpoint.read_header(ROOT / "assets" / "pi05_metaworld.safetensors")
    assert theirs.header.stats == shipped.stats != ours.header.stats


def test_pictures_of_another_size_are_resized_for_ours(tmp_path):
    lesson = lesson_of(write_new(tmp_path / "d", made(size=96)), tmp_path / "a.safetensors")
    row = Reader(lesson).read(Piece(0, range(7)))
    assert row["image"].shape == (7, 1, 64, 64, 3)
    assert abs(row["image"].mean() - np.mean([shown for shown in made(size=96)[0][1]])) < 1.0


@pytest.mark.parametrize(
    "data, flags, words",
    [
        ({}, {"cameras": ("wrist",)}, "has no camera 'wrist': it has observation.images.camera_0"),
        ({"views": 2}, {}, "the policy has 1 views and the dataset 2 cameras: name those"),
        ({"action": 7}, {}, "action of .* has 7 numbers and --env metaworld 4: give the --env"),
        ({"state": 8}, {}, "observation.state of .* has 8 numbers and --env metaworld 4"),
        ({}, {"action": "joints"}, "has no feature 'joints': name one of"),
        (
            {"tasks": ("dance",)},
            {},
            "no episode of .* is of 'press the handle down': it has 'dance'",
        ),
        ({"tasks": ("sing " * 60,)}, {"tasks": ()}, "the model has room for"),
        ({}, {"checkpoint": Path("nowhere")}, "no checkpoint at nowhere"),
        ({}, {"model": "gr00t"}, "is a 'pi05' model"),
        ({}, {"lora_rank": 2, "lora_targets": ("knee",)}, "--lora-targets knee matches no layer"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, data, flags, words):
    folder = write_new(tmp_path / "d", made(**data))
    with pytest.raises(UserError, match=words) as error:
        lesson = lesson_of(folder, tmp_path / "a.safetensors", **flags)
        build(lesson.settings, lesson.spec)
    assert "\n" not in str(error.value)
    assert [x.name for x in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"dataset": Path("x")}, "say with --out where"),
        ({"dataset": Path("x"), "collect": Path("y")}, "leave out one of them"),
        ({"lora_rank": 8}, "give --checkpoint, or leave them out"),
        ({"env": "libero"}, "--env libero has no scripted experts: give --dataset"),
        ({"dataset": Path("nowhere"), "out": Path("x")}, "is no dataset of LeRobot's"),
        ({"collect": ROOT / "docs"}, "docs exists already"),
        ({"collect": Path("x"), "steps": 3, "out": Path("y")}, "--out, --steps: only for learning"),
        ({"video": True}, "--video: only for what experts leave: give --collect"),
        ({"cameras": ("a",), "state": "b"}, "--cameras, --state: only for a dataset"),
        ({"dataset": Path("x"), "demos": 3}, "--demos: only for experts: leave out --dataset"),
        ({"chunk": 5, "tokens": 9}, "--chunk, --tokens: only for another project's weights"),
        ({"horizon": 5, "dataset": Path("x"), "env": "libero"}, "--horizon: only for another"),
        (
            {"chunk": 5, "checkpoint": ROOT / "assets" / "pi05_metaworld.safetensors"},
            "--chunk: only for another project's weights",
        ),
        ({"collect": Path("x"), "video": True, "image_size": 63}, "--image-size 63 is odd"),
    ],
)
def test_flags_that_contradict_one_another(flags, words):
    with pytest.raises(UserError, match=words):
        pretrain.main(PretrainConfig(**flags))


def test_a_simulator_s_control_rate_is_compared_with_the_data_s(tmp_path, capsys):
    folder = write_new(tmp_path / "d", made(tasks=(PRESS, "dance")), fps=10)
    lesson_of(folder, tmp_path / "a.safetensors", tasks=())
    said = capsys.readouterr().out
    assert "it has 10 frames per second and metaworld takes 80 control steps" in said
    assert "3 episodes, 20 frames, 2 tasks" in said
    assert "note: 'dance': no instruction of metaworld" in said
    lesson_of(folder, tmp_path / "a.safetensors")
    said = capsys.readouterr().out
    assert "2 episodes, 16 frames, 1 tasks" in said and "dance" not in said
    other = metaworld.PROMPTS["button-press-topdown"]  # no default task of train.py's
    lesson_of(write_new(tmp_path / "e", made(tasks=(other,))), tmp_path / "b.safetensors", tasks=())
    assert "no instruction" not in capsys.readouterr().out


def start_experts(cli, folder: Path):
    """Starts a command whose experts have just been started, and play for minutes."""
    running = cli("pretrain.py", f"--collect {folder} --demos 2000")
    while len(running.living()) < 2 + imitation.PROCESSES:  # with what tracks their resources
        assert running.process.poll() is None, running.process.communicate()[0]
        time.sleep(0.05)
    return running


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_experts_at_once_and_leaves_nothing(cli, tmp_path, word):
    running = start_experts(cli, tmp_path / "d")
    time.sleep(1.0 if word == signal.SIGINT else 6.0)  # while they start, and while they play
    os.killpg(running.process.pid, word) if word == signal.SIGINT else running.process.terminate()
    status, output = running.finish(timeout=10)
    running.assert_nothing_left(timeout=5)
    assert (status, output) == (130, "interrupted\n") and not list(tmp_path.iterdir())


def test_an_expert_that_is_killed_is_missed_at_once(cli, tmp_path):
    """As the kernel does where memory is full."""
    running = start_experts(cli, tmp_path / "d")
    children = psutil.Process(running.process.pid).children()
    experts = [one for one in children if "spawn_main" in " ".join(one.cmdline())]
    assert len(experts) == imitation.PROCESSES
    experts[-1].kill()
    status, output = running.finish(timeout=30)
    said = "error: signal 9 ended the expert of button-press-topdown: is the host out of memory?\n"
    assert (status, output) == (2, said) and not list(tmp_path.iterdir())


def test_the_command_line_learns_adapters_and_an_interrupt_saves(cli, tmp_path):
    folder = write_new(tmp_path / "d", made())
    flags = f"--dataset {folder} --checkpoint assets/pi05_metaworld.safetensors --lora-rank 2"
    out = tmp_path / "new"
    running = cli("pretrain.py", f"{flags} --batch 4 --steps 100000 --out {out}")
    for line in running.process.stdout:
        if line.startswith("step 1/"):
            break
    os.kill(running.process.pid, signal.SIGTERM)
    status, output = running.finish()
    out = out / "model.partial.safetensors"
    says = f"interrupted: --checkpoint {out} goes on"
    assert status == 130 and says in output and "Traceback" not in output
    assert not out.with_name("model.safetensors").exists()
    header = checkpoint.read_header(out)
    assert header.shape["lora_rank"] == 2

    # train.py takes it as it is, and so does evaluate.py.
    asked = f"--checkpoint {out} --tasks handle-press --env metaworld"
    setup = prepare.prepare(train.parse(asked.split()))
    assert setup.config.train.tokenizer == out.with_suffix(".model")
    assert evaluate.settings_of(evaluate.EvaluateConfig(checkpoint=out, env="metaworld"))
    # A second one is not written over the first.
    status, output = cli("pretrain.py", f"{flags} --steps 2 --out {out.parent}").finish()
    assert status == 2 and "exists already and would become another" in output


def test_an_unreadable_episode_ends_all_processes_with_one_sentence(cli, tmp_path):
    folder = write_old(tmp_path / "d", made(), video=True)
    sorted(folder.glob("videos/*/*/*.mp4"))[0].write_bytes(b"no video")  # of the first episode
    flags = f"--dataset {folder} --checkpoint assets/pi05_metaworld.safetensors --batch 4"
    status, output = cli("pretrain.py", f"{flags} --steps 5 --out {tmp_path / 'new'}").finish()
    assert status == 2 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("error: cannot read the video")
    assert not (tmp_path / "new" / "model.safetensors").exists()
