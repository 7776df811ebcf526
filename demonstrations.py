"""Demonstrations in LeRobot's format: a folder with tables (parquet) and pictures, which are in the
tables or in videos.

Read are v2.0, v2.1 and v3.0; written is v3.0. Numbers of all frames are in memory, pictures are
read episode by episode, by pyarrow and PyAV, which brings its own FFmpeg (AV1, H.264). The package
`lerobot` itself wants another torch than this project's, and torchvision.

Left out: the Hub, depth maps, audio, and cameras whose pictures differ in size.

Source: huggingface/lerobot at 7427f31801f944f5ec9ce53cda02862ce7d1638b, src/lerobot/datasets/
{utils, io_utils, dataset_reader, dataset_writer, video_utils}.py and
src/lerobot/scripts/convert_dataset_v21_to_v30.py.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from fractions import Fraction
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
# Of every frame, beside what was seen and done.
PLACES = {"timestamp": pa.float32(), "frame_index": pa.int64(), "episode_index": pa.int64()}
PLACES |= {"index": pa.int64(), "task_index": pa.int64()}


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


class Line(TypedDict):
    """Of meta/episodes.jsonl and meta/tasks.jsonl, before v3.0."""

    episode_index: NotRequired[Natural]
    length: NotRequired[Positive]
    task_index: NotRequired[Natural]
    task: NotRequired[str]


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
        self.widths = [features[name]["shape"] for name in (self.state, self.action)]
        flat = f"{folder}: {self.state} and {self.action} are of shapes {self.widths}, not vectors"
        require(all(len(shape) == 1 for shape in self.widths), flat)
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
        by_file: dict[Path, list[tuple]] = {}
        for one in found:
            by_file.setdefault(one[2], []).append(one)
        columns = [self.state, self.action, "timestamp", "episode_index", "task_index"]
        episodes = []
        for data, inside in by_file.items():
            table = read_table(data, columns)
            with understood(data):
                widths = (*(shape[0] for shape in self.widths), 1, 1, 1)
                states, actions, times, numbers, kinds = (
                    vectors(table, name, width) for name, width in zip(columns, widths, strict=True)
                )
            for number, length, _, videos in inside:
                rows = np.flatnonzero(numbers[:, 0] == number)
                what = f"episode {number} in {data}"
                says = f"{what} has {len(rows)} frames and should have {length}: it is incomplete"
                require(len(rows) == length, says)
                kind = int(kinds[rows[0], 0])
                require(
                    tasks.get(kind), f"{what} has no task: {self.folder}/meta names none {kind}"
                )
                apart = np.diff(times[rows, 0]) * self.fps
                wrong = (
                    f"frames of {what} are not 1/{self.fps:g} s apart: is fps in info.json right?"
                )
                require(np.all(np.abs(apart - 1.0) < 0.5), wrong)
                seconds = times[rows, 0].astype(np.float64)
                own = (states[rows].astype(np.float32), actions[rows].astype(np.float32))
                for name, values in zip((self.state, self.action), own, strict=True):
                    require(np.isfinite(values).all(), f"{what}: {name} holds NaN or infinity")
                episodes.append(Episode(number, data, videos, seconds, *own, tasks[kind]))
        return episodes

    def tables(self) -> tuple[dict[int, str], list[tuple]]:
        """Returns task by number; and number, length, data and videos of every episode."""
        info = self.info
        meta = self.folder / "meta"
        videos = [name for name in self.cameras if info["features"][name]["dtype"] == "video"]
        where = info.get("video_path") or ""
        if info["codebase_version"] != "v3.0":
            tasks = {one["task_index"]: one["task"] for one in lines(meta / "tasks.jsonl")}
            found = []
            for one in lines(meta / "episodes.jsonl"):
                number = one["episode_index"]
                at = {"episode_chunk": number // info.get("chunks_size", 1000)}
                at["episode_index"] = number
                files = {n: (self.folder / where.format(video_key=n, **at), 0.0) for n in videos}
                data = self.folder / info["data_path"].format(**at)
                found.append((number, one["length"], data, files))
            return tasks, found

        # pandas wrote the first table: the task is its index.
        table = read_table(meta / "tasks.parquet", [])
        with understood(meta / "tasks.parquet"):
            name = "task" if "task" in table.column_names else "__index_level_0__"
            texts = table[name].to_pylist()
            tasks = dict(zip(table["task_index"].to_pylist(), texts, strict=True))
        places = [f"videos/{name}/" for name in videos]
        parts = ("chunk_index", "file_index", "from_timestamp")
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        columns += [place + part for place in places for part in parts]
        found = []
        for file in sorted(meta.glob("episodes/*/*.parquet")):
            for row in read_table(file, columns).to_pylist():
                at = {part: row[f"data/{part}"] for part in parts[:2]}
                data = self.folder / info["data_path"].format(**at)
                files = {}
                for name, place in zip(videos, places, strict=True):
                    at = {part: row[place + part] for part in parts[:2]}
                    path = self.folder / where.format(video_key=name, **at)
                    files[name] = (path, row[place + "from_timestamp"])
                found.append((row["episode_index"], row["length"], data, files))
        return tasks, found

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
                file = io.BytesIO(found["bytes"]) if found["bytes"] else self.folder / found["path"]
                yield np.asarray(Image.open(file).convert("RGB"))


def lines(path: Path) -> list[Line]:
    require(path.is_file(), f"{path} is missing: the dataset is incomplete")
    texts = path.read_bytes().splitlines()
    return [parse_json(text, Line, path, "ignore") for text in texts if text.strip()]


def read_table(path: Path, columns: list[str], rows: list | None = None) -> pa.Table:
    """Reads columns (none: all) of a parquet file, of those rows. Raises UserError."""
    require(path.is_file(), f"{path} is missing: the dataset is incomplete")
    with understood(path):
        has = pq.read_schema(path).names
        lacks = [name for name in columns if name not in has]
        require(not lacks, f"{path} lacks the column {', '.join(lacks)}: it has {', '.join(has)}")
        return pq.read_table(path, columns=columns or None, filters=rows, partitioning=None)


def vectors(table: pa.Table, name: str, width: int) -> np.ndarray:
    """A column of numbers, or of lists of so many numbers, as [n, width]."""
    column = table[name].combine_chunks()
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(len(table), width)


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


class Totals:
    """Adds up numbers [n, D], for the means and deviations of meta/stats.json."""

    def __init__(self):
        self.count = 0
        self.low = self.high = self.sum = self.squares = np.zeros(1)

    def add(self, values: np.ndarray) -> None:
        values = values.astype(np.float64)
        low = values.min(0)
        high = values.max(0)
        self.low = np.minimum(self.low, low) if self.count else low
        self.high = np.maximum(self.high, high) if self.count else high
        self.sum = self.sum + values.sum(0)
        self.squares = self.squares + np.square(values).sum(0)
        self.count += len(values)

    def said(self, shape: tuple[int, ...]) -> dict:
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - np.square(mean), 0.0))
        numbers = {"min": self.low, "max": self.high, "mean": mean, "std": std}
        return {n: x.reshape(shape).tolist() for n, x in numbers.items()} | {"count": [self.count]}


class Writer(contextlib.AbstractContextManager):
    """Writes a dataset of v3.0, which appears all at once when a `with` block ends well.

    Each episode is a row group of a table. Pictures are PNG files in it, so that a policy learns
    from what its simulator draws, to the bit; or videos (H.264), one of an episode and camera."""

    MOST = 100 * 2**20  # bytes of pictures in a table, about
    CHUNK = 1000  # files of a folder

    def __init__(self, folder: Path, fps: float, video: bool, robot: str):
        require(not folder.exists(), f"{folder} exists already: name a folder that does not")
        require(folder.parent.is_dir(), f"the folder {folder.parent} does not exist: create it")
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)  # of a writer that was killed
        self.fps = fps
        self.video = video
        self.robot = robot
        self.tasks: dict[str, int] = {}
        self.rows: list[dict] = []  # of meta/episodes
        self.features: dict[str, dict] = {}
        self.totals: dict[str, Totals] = {}
        self.frames = 0
        self.table: pq.ParquetWriter | None = None
        self.file = 0
        self.written = 0  # bytes of pictures in this table

    def __exit__(self, kind, error, trace) -> None:
        if self.table:
            self.table.close()
        if error is None and self.rows:
            self.finish()
        shutil.rmtree(self.partial, ignore_errors=True)

    def path(self, name: str, number: int, kind: str) -> Path:
        at = f"chunk-{number // self.CHUNK:03d}/file-{number % self.CHUNK:03d}.{kind}"
        path = self.partial / name / at
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(
        self, task: str, pictures: list[list[bytes]], states: np.ndarray, actions: np.ndarray
    ) -> None:
        """Writes an episode: of every frame a PNG file for each camera; states [T, S]; actions
        [T, A]."""
        views = [list(view) for view in zip(*pictures, strict=True)]
        first = [picture_of(view[0]) for view in views]
        cameras = [f"observation.images.camera_{i}" for i in range(len(views))]
        self.describe(cameras, first, states.shape[1], actions.shape[1])
        length = len(states)
        number = len(self.rows)
        kind = self.tasks.setdefault(task, len(self.tasks))
        row = {"episode_index": number, "tasks": [task], "length": length}
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}

        # The numbers of its frames, as LeRobot has them.
        steps = np.arange(length)
        columns = [steps / self.fps, steps, np.full(length, number), self.frames + steps]
        columns.append(np.full(length, kind))
        table = {n: pa.array(x, t) for (n, t), x in zip(PLACES.items(), columns, strict=True)}
        for name, values in ((STATES[0], states), (ACTIONS[0], actions)):
            flat = pa.array(values.astype(np.float32).ravel())
            table[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            self.totals[name].add(values)

        # What the cameras saw.
        for camera, view in zip(cameras, views, strict=True):
            decoded = [picture_of(file) for file in view]
            for picture in decoded[:: max(1, length // 10)]:
                self.totals[camera].add(picture.reshape(-1, 3) / 255.0)
            if self.video:
                write_video(self.path(f"videos/{camera}", number, "mp4"), decoded, self.fps)
                chunk, file = divmod(number, self.CHUNK)
                found = {"chunk_index": chunk, "file_index": file, "from_timestamp": 0.0}
                found["to_timestamp"] = length / self.fps
                row |= {f"videos/{camera}/{part}": value for part, value in found.items()}
            else:
                table[camera] = pa.array([{"bytes": file, "path": None} for file in view])
                self.written += sum(map(len, view))
        self.append(pa.table(table), row)
        self.frames += length
        self.rows.append(row)

    def append(self, table: pa.Table, row: dict) -> None:
        """Puts an episode into the running file, or begins another, and notes where it is."""
        if self.table is None:
            path = self.path("data", self.file, "parquet")
            self.table = pq.ParquetWriter(path, table.schema)
        self.table.write_table(table)
        row["data/chunk_index"], row["data/file_index"] = divmod(self.file, self.CHUNK)
        if self.written > self.MOST:
            self.table.close()
            self.table = None
            self.file += 1
            self.written = 0

    def describe(
        self, cameras: list[str], first: list[np.ndarray], state: int, action: int
    ) -> None:
        if self.features:
            return
        for name, kind in PLACES.items():
            self.features[name] = {"dtype": str(kind).replace("float", "float32"), "shape": [1]}
        for name, width in ((STATES[0], state), (ACTIONS[0], action)):
            self.features[name] = {"dtype": "float32", "shape": [width]}
        for camera, picture in zip(cameras, first, strict=True):
            dtype = "video" if self.video else "image"
            names = ["height", "width", "channels"]
            self.features[camera] = {"dtype": dtype, "shape": list(picture.shape), "names": names}
        self.totals = {name: Totals() for name in (STATES[0], ACTIONS[0], *cameras)}

    def finish(self) -> None:
        meta = self.partial / "meta"
        meta.mkdir(exist_ok=True)
        features = {name: {"names": None} | feature for name, feature in self.features.items()}
        place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
        info = {
            "codebase_version": VERSIONS[-1],
            "robot_type": self.robot,
            "total_episodes": len(self.rows),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": self.CHUNK,
            "data_files_size_in_mb": self.MOST // 2**20,
            "video_files_size_in_mb": 200,
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": f"data/{place}.parquet",
            "video_path": f"videos/{{video_key}}/{place}.mp4" if self.video else None,
            "features": features,
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        shapes = {n: (3, 1, 1) if f["dtype"] in PICTURES else (-1,) for n, f in features.items()}
        stats = {name: total.said(shapes[name]) for name, total in self.totals.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        pq.write_table(pa.Table.from_pylist(self.rows), self.path("meta/episodes", 0, "parquet"))
        columns = {"task_index": list(self.tasks.values()), "task": list(self.tasks)}
        pq.write_table(with_index(pa.table(columns), "task"), meta / "tasks.parquet")
        self.partial.rename(self.folder)


def with_index(table: pa.Table, index: str) -> pa.Table:
    """Tells pandas, which LeRobot reads a table by, which of its columns is the index."""
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kinds[name][0]}
        | {"numpy_type": kinds[name][1], "metadata": None}
        for name in table.column_names
    ]
    said = {"index_columns": [index], "column_indexes": [], "columns": columns}
    return table.replace_schema_metadata({"pandas": json.dumps(said | {"pandas_version": "2.3.3"})})


def picture_of(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def png(picture: np.ndarray) -> bytes:
    """[H, W, 3] uint8 → a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_video(path: Path, pictures: list[np.ndarray], fps: float) -> None:
    """Writes pictures [H, W, 3] uint8 as H.264, with a key frame for every two: frames are read in
    any order (LeRobot's `g=2`)."""
    with av.open(str(path), "w") as container:
        options = {"g": "2", "bf": "0", "crf": "18"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10**4))
        stream.options = options
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
