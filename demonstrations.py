"""Demonstrations in LeRobot's format: a folder with tables (parquet) and pictures, which are in the
tables or in videos.

Read are v2.0, v2.1 and v3.0; recording.py writes v3.0. The numbers of all frames stay in memory.
Pictures are read when they are asked for, by pyarrow and PyAV, which brings its own FFmpeg (AV1,
H.264). The package `lerobot` itself wants another torch than this project's, and torchvision.

Left out: the Hub, depth maps, audio, cameras whose pictures differ in size, and episodes of
several tasks.

Source: huggingface/lerobot at 7427f31801f944f5ec9ce53cda02862ce7d1638b, src/lerobot/datasets/
{utils, io_utils, dataset_reader, dataset_writer, video_utils}.py and
src/lerobot/scripts/convert_dataset_v21_to_v30.py.
"""

import io
import os.path
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from typing_extensions import TypedDict

from checks import AboveZero, Natural, Positive, parse_json, read_json
from errors import require, understood

VERSIONS = ("v2.0", "v2.1", "v3.0")
PICTURES = ("image", "video")  # dtypes of what a camera saw
STATES = ("observation.state", "state")  # usual names; the second ones are openpi's
ACTIONS = ("action", "actions")
FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")  # of a template: {episode_index:06d}


class Feature(TypedDict):
    dtype: str
    shape: list[Natural]
    info: NotRequired[dict[str, Any] | None]


class Info(TypedDict):
    """What is read of meta/info.json."""

    codebase_version: str
    fps: AboveZero
    features: dict[str, Feature]
    data_path: str
    video_path: NotRequired[str | None]
    chunks_size: NotRequired[Positive]


class EpisodeLine(TypedDict):
    """Of meta/episodes.jsonl, before v3.0."""

    episode_index: Natural
    length: Positive


class TaskLine(TypedDict):
    """Of meta/tasks.jsonl, before v3.0."""

    task_index: Natural
    task: str


class Listed(NamedTuple):
    """An episode as the files in meta/ list it."""

    number: int
    length: int  # frames
    data: Path
    videos: dict[str, tuple[Path, float]]  # by camera: the file, and the second of its first frame


class Episode(NamedTuple):
    """Where an episode of T frames is, and its numbers."""

    number: int
    data: Path
    videos: dict[str, tuple[Path, float]]  # by camera: the file, and the second of its first frame
    times: np.ndarray  # [T] seconds since its first frame
    states: np.ndarray  # [T, S] fp32
    actions: np.ndarray  # [T, A] fp32, of each frame
    task: str


class Demonstrations:
    """The episodes of a folder. Raises UserError where anything is wrong but with pictures."""

    def __init__(self, folder: Path, state: str = "", action: str = ""):
        """state, action: names of features; "" takes the usual ones."""
        file = folder / "meta" / "info.json"
        require(file.is_file(), f"{folder} is no dataset of LeRobot's: it has no meta/info.json")
        info = self.info = read_json(file, Info, extra="ignore")
        version = info["codebase_version"]
        known = (
            f"of LeRobot's format, {', '.join(VERSIONS)} are known: convert it with LeRobot's own"
        )
        require(version in VERSIONS, f"{folder} is of version {version}; {known} scripts")
        self.folder = folder
        self.fps = info["fps"]
        features = info["features"]
        self.state = self.named(state or next((n for n in STATES if n in features), STATES[0]))
        self.action = self.named(action or next((n for n in ACTIONS if n in features), ACTIONS[0]))
        self.shapes = [features[name]["shape"] for name in (self.state, self.action)]
        flat = f"{folder}: {self.state} and {self.action} are of shapes {self.shapes}, not vectors"
        require(all(len(shape) == 1 for shape in self.shapes), flat)
        seen = {name: f for name, f in features.items() if f["dtype"] in PICTURES}
        depth = ("is_depth_map", "video.is_depth_map")
        is_depth = {n for n, f in seen.items() if any((f.get("info") or {}).get(k) for k in depth)}
        self.cameras = tuple(name for name in seen if name not in is_depth)
        require(self.cameras, f"{folder} has no pictures: no feature is of dtype image or video")
        self.episodes = self.read()
        require(self.episodes, f"{folder} has no episodes")

    def named(self, name: str) -> str:
        have = ", ".join(self.info["features"])
        lacks = f"{self.folder} has no feature {name!r}: name one of {have}"
        require(name in self.info["features"], lacks)
        return name

    def read(self) -> list[Episode]:
        """Reads the numbers of all frames, file by file."""
        tasks, found = self.tables()
        twice = f"{self.folder}/meta lists an episode twice"
        require(len({one.number for one in found}) == len(found), twice)
        by_file: dict[Path, list[Listed]] = {}
        for one in found:
            by_file.setdefault(one.data, []).append(one)
        columns = [self.state, self.action, "timestamp", "episode_index", "task_index"]
        episodes = []
        for data, listed in by_file.items():
            table = read_table(data, columns)
            with understood(data):
                widths = (*(shape[0] for shape in self.shapes), 1, 1, 1)
                states, actions, times, numbers, kinds = (
                    vectors(table, name, width) for name, width in zip(columns, widths, strict=True)
                )
            for number, length, _, videos in listed:
                rows = np.flatnonzero(numbers[:, 0] == number)
                what = f"episode {number} in {data}"
                says = f"{what} has {len(rows)} frames and should have {length}: it is incomplete"
                require(0 < len(rows) == length, says)
                kind = kinds[rows[0], 0]
                none = f"{what} has no task: {self.folder}/meta names none {kind:g}"
                require(isinstance(tasks.get(kind), str), none)
                several = f"{what} has frames of several tasks: split it into episodes of one task"
                require(np.all(kinds[rows, 0] == kind), several)
                apart = np.diff(times[rows, 0]) * self.fps
                wrong = (
                    f"frames of {what} are not 1/{self.fps:g} s apart: is fps in info.json right?"
                )
                require(np.all(np.abs(apart - 1.0) < 0.5), wrong)
                own = (states[rows].astype(np.float32), actions[rows].astype(np.float32))
                for name, values in zip((self.state, self.action), own, strict=True):
                    require(np.isfinite(values).all(), f"{what}: {name} holds NaN or infinity")
                episodes.append(Episode(number, data, videos, times[rows, 0], *own, tasks[kind]))
        return episodes

    def tables(self) -> tuple[dict[int, str], list[Listed]]:
        """Returns tasks by number, and every episode that is listed."""
        info = self.info
        meta = self.folder / "meta"
        videos = [name for name in self.cameras if info["features"][name]["dtype"] == "video"]
        where = info.get("video_path") or ""
        unknown = f"{meta}/info.json says of {', '.join(videos)} no video_path"
        require(where or not videos, unknown)
        found = []
        if info["codebase_version"] != "v3.0":
            lines = read_lines(meta / "tasks.jsonl", TaskLine)
            tasks = {one["task_index"]: one["task"] for one in lines}
            for one in read_lines(meta / "episodes.jsonl", EpisodeLine):
                number = one["episode_index"]
                at = {"episode_chunk": number // info.get("chunks_size", 1000)}
                at["episode_index"] = number
                files = {n: (self.named_by(where, video_key=n, **at), 0.0) for n in videos}
                data = self.named_by(info["data_path"], **at)
                found.append(Listed(number, one["length"], data, files))
            return tasks, found

        # pandas wrote the first table: the task is its index.
        table = read_table(meta / "tasks.parquet", [])
        with understood(meta / "tasks.parquet"):
            name = "task" if "task" in table.column_names else "__index_level_0__"
            texts = table[name].to_pylist()
            tasks = dict(zip(table["task_index"].to_pylist(), texts, strict=True))
        places = [f"videos/{name}/" for name in videos]
        parts = ("chunk_index", "file_index")
        columns = ["episode_index", "length", *(f"data/{part}" for part in parts)]
        columns += [place + part for place in places for part in (*parts, "from_timestamp")]
        for file in sorted(meta.glob("episodes/*/*.parquet")):
            for row in read_table(file, columns).to_pylist():
                wrong = f"{file} is damaged: what it says of an episode is no number: {row}"
                require(all(isinstance(value, int | float) for value in row.values()), wrong)
                at = {part: row[f"data/{part}"] for part in parts}
                data = self.named_by(info["data_path"], **at)
                files = {}
                for name, place in zip(videos, places, strict=True):
                    at = {part: row[place + part] for part in parts}
                    path = self.named_by(where, video_key=name, **at)
                    files[name] = (path, row[place + "from_timestamp"])
                found.append(Listed(row["episode_index"], row["length"], data, files))
        return tasks, found

    def named_by(self, template: str, **values) -> Path:
        """Returns the file that a template names. Raises UserError where it has other fields."""
        name = FIELD.sub(
            lambda field: str(values.get(field[1], field[0])).zfill(int(field[2] or 0)), template
        )
        fields = ", ".join(values)
        require("{" not in name, f"{self.folder}: {template!r} has other fields than {fields}")
        return inside(self.folder, name)

    def pictures(
        self, episode: Episode, cameras: tuple[str, ...], frames: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Yields what the cameras saw at some frames, in ascending order: [V, H, W, 3] uint8."""
        each = []
        for camera in cameras:
            if camera in episode.videos:
                path, start = episode.videos[camera]
                each.append(video_frames(path, start + episode.times[frames], self.fps))
            else:
                each.append(self.stored_frames(episode, camera, frames))
        for views in zip(*each, strict=True):
            sizes = {view.shape for view in views}
            differ = f"the pictures of {', '.join(cameras)} differ in size: choose some of one size"
            require(len(sizes) == 1, differ)
            yield np.stack(views)

    def stored_frames(
        self, episode: Episode, camera: str, frames: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Yields the pictures that a table holds, as files {"bytes", "path"}: [H, W, 3] uint8."""
        mine = [("episode_index", "=", episode.number)]
        column = read_table(episode.data, [camera], mine)[camera]
        for frame in frames:
            with understood(f"frame {frame} of {camera} in {episode.data}"):
                found = column[frame].as_py()
                stored = found["bytes"]
                file = io.BytesIO(stored) if stored else inside(self.folder, found["path"])
                yield np.asarray(Image.open(file).convert("RGB"))


def inside(folder: Path, name: str) -> Path:
    """Returns a file that a dataset names. Raises UserError where it is not in its folder; links
    there are the user's, and lead where they like (as in the Hub's cache)."""
    path = os.path.normpath(folder / name)
    outside = f"{folder} names the file {name}, which is not in it: is it damaged?"
    require(Path(path).is_relative_to(os.path.normpath(folder)), outside)
    return Path(path)


def read_lines(path: Path, kind: type) -> list:
    require(path.is_file(), f"{path} is missing: the dataset is incomplete")
    texts = path.read_bytes().splitlines()
    return [parse_json(text, kind, path, "ignore") for text in texts if text.strip()]


def read_table(path: Path, columns: list[str], rows: list | None = None) -> pa.Table:
    """Reads columns (none: all) of a parquet file, of those rows. Raises UserError."""
    require(path.is_file(), f"{path} is missing: the dataset is incomplete")
    with understood(path):
        has = pq.read_schema(path).names
        lacks = [name for name in columns if name not in has]
        require(not lacks, f"{path} lacks the column {', '.join(lacks)}: it has {', '.join(has)}")
        return pq.read_table(path, columns=columns or None, filters=rows, partitioning=None)


def vectors(table: pa.Table, name: str, width: int) -> np.ndarray:
    """Reads a column of numbers, or of lists of so many numbers, as [n, width] fp64."""
    column = table[name].combine_chunks()
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(len(table), width).astype(float)


def video_frames(path: Path, times: Sequence[float], fps: float) -> Iterator[np.ndarray]:
    """Yields the frames of a video that are shown at these seconds, ascending: [H, W, 3] uint8."""
    require(path.is_file(), f"{path} is missing: the dataset is incomplete")
    wanted = list(times)
    found = 0
    with understood(f"the video {path}"), av.open(str(path)) as container:
        stream = container.streams.video[0]
        # To the key frame before the first one.
        container.seek(max(0, round(wanted[0] / stream.time_base) - 1), stream=stream)
        for frame in container.decode(stream):
            late = float(frame.pts * stream.time_base) - wanted[found]
            if late > 0.5 / fps:
                break
            if late > -0.5 / fps:
                yield frame.to_ndarray(format="rgb24")
                found += 1
                if found == len(wanted):
                    return
    require(False, f"the video {path} has no frame at {wanted[found]:.3f} s: is it cut short?")
