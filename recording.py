"""Writes demonstrations in LeRobot's format, v3.0, as demonstrations.py reads them.

Left out: meta/stats.json, which LeRobot opens a dataset without, and makes itself (its
`lerobot-edit-dataset --operation.type recompute_stats`).
"""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from demonstrations import ACTIONS, STATES, VERSIONS
from errors import require
from files import locked
from films import write_video

# Of every frame, beside what was seen and done.
PLACES = {"timestamp": pa.float32(), "frame_index": pa.int64(), "episode_index": pa.int64()}
PLACES |= {"index": pa.int64(), "task_index": pa.int64()}
# Frames are read in any order: a key frame for every two (LeRobot's `g=2`).
IN_ANY_ORDER = ["-g", "2", "-bf", "0", "-crf", "18"]


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
        self.partial.mkdir(exist_ok=True)
        taken = f"{folder} is being written by another process: name another folder, or wait"
        self.lock = locked(self.partial, taken)
        for left in self.partial.iterdir():  # of a writer that was killed
            shutil.rmtree(left)
        self.fps = fps
        self.video = video
        self.robot = robot
        self.tasks: dict[str, int] = {}
        self.rows: list[dict] = []  # of meta/episodes
        self.features: dict[str, dict] = {}
        self.frames = 0
        self.table: pq.ParquetWriter | None = None
        self.file = 0
        self.written = 0  # bytes of pictures in this table

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self.table:
                self.table.close()
            if error is None and self.rows:
                self.finish()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            os.close(self.lock)

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

        # What the cameras saw.
        for camera, view in zip(cameras, views, strict=True):
            if self.video:
                decoded = [picture_of(file) for file in view]
                write_video(
                    self.path(f"videos/{camera}", number, "mp4"), decoded, self.fps, IN_ANY_ORDER
                )
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
