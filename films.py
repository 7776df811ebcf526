"""Films held-out episodes of a run: of each task one with the first policy, one with the newest.

A lane draws frames (`Lane.film`) in the size that the policy sees, so that nothing new has to be
set up for it. A worker leaves them in .spans/, and the launcher makes videos of them, since
compressing them takes longer than a worker's other lanes may wait. Of both, each task keeps those
of its lowest and of its highest version. Left out: other nodes' episodes than the first one's.
"""

import contextlib
import math
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Config
from envs import resized

TASKS = 12  # that are filmed, the first ones: each costs some 60 frames in a round of evaluation
FRAMES = 60  # of a film, about: longer episodes are filmed less often
EVERY = 2  # control steps between two frames, at least
FPS = 15  # frames per second
QUICKLY = ["-preset", "veryfast"]  # x264's: half of the time, and no larger files
SIDE = 256  # pixels of a video, about: those of small frames become blocks
HURRY_S = 1.5  # seconds in which videos of an interrupted run are begun


class Film(NamedTuple):
    """A file that holds one."""

    file: Path
    task: str
    version: int  # published when the episode began
    won: bool


def film_of(file: Path) -> Film | None:
    """Returns what a file's name says: "reach_000010_success.mp4"; None for other files."""
    found = re.fullmatch(r"(.+)_([0-9]{6,})_(success|failure)", file.stem)
    return found and Film(file, found[1], int(found[2]), found[3] == "success")


def file_name(task: str) -> str:
    """Returns what a film's file has for a task's name."""
    return task.replace("/", "_")[:200]


def films_in(folder: Path, kind: str = "mp4") -> dict[str, list[Film]]:
    """Returns each task's films, the lowest version first."""
    by_task: dict[str, list[Film]] = {}
    for film in map(film_of, folder.glob(f"*.{kind}")):
        if film:
            by_task.setdefault(film.task, []).append(film)
    return {task: sorted(by_task[task], key=lambda film: film.version) for task in sorted(by_task)}


def keep_first_and_last(folder: Path, kind: str) -> None:
    """Removes a task's films that are neither."""
    for found in films_in(folder, kind).values():
        for film in found[1:-1]:
            film.file.unlink(missing_ok=True)


def forget(folder: Path, version: int) -> None:
    """Removes films of versions above this one, which is gone on from: others come in their place.
    -1 means all of them."""
    for kind in ("mp4", "npy"):
        for found in films_in(folder, kind).values():
            for film in found:
                if film.version > version:
                    film.file.unlink(missing_ok=True)


def filmed_episodes(config: Config, first: Iterable[int], tasks: int) -> set[int]:
    """Returns which episodes of a round are filmed: each task's first one that this node plays.
    first: the first episode of each of its evaluation envs."""
    mine = set(first)
    step = config.env.eval_envs * config.train.nodes
    found: dict[int, int] = {}
    for episode in range(config.env.eval_episodes):
        if episode % step in mine and episode % tasks < TASKS:
            found.setdefault(episode % tasks, episode)
    return set(found.values())


class Camera:
    """Films one episode. A simulator that cannot do so ends no run."""

    def __init__(self, film: Callable[[], np.ndarray], task: str, version: int, limit: int):
        """film: draws the env, [H, H, 3] uint8; limit: control steps of the episode."""
        self.film = film
        self.task = task
        self.version = version
        self.every = max(EVERY, -(-limit // FRAMES))
        self.due = 0.0  # the control step of the next frame
        self.frames: list[np.ndarray] = []
        self.trouble = ""

    def look(self, step: float) -> None:
        """Takes a frame if one is due at this control step of the episode."""
        if step < self.due or self.trouble:
            return
        self.due = step + self.every
        try:
            frame = self.film()
            self.frames.append(resized(frame, SIDE) if len(frame) > SIDE else frame)
        except Exception as error:  # of a simulator, whatever it may be
            self.trouble = f"{type(error).__name__}: {error}"

    def leave(self, folder: Path, won: bool) -> None:
        """Takes the last frame, and leaves all of them for `make_videos`. Raises OSError, or what
        NumPy raises where they are not alike."""
        self.look(math.inf)
        if self.trouble:
            raise OSError(self.trouble)
        name = f"{file_name(self.task)}_{self.version:06d}_{'success' if won else 'failure'}"
        partial = folder / f".{name}"
        try:
            with open(partial, "wb") as file:
                np.save(file, np.stack(self.frames))
            partial.replace(folder / f"{name}.npy")
        finally:
            partial.unlink(missing_ok=True)
        keep_first_and_last(folder, "npy")


def write_video(
    file: Path, frames: Iterable[np.ndarray], fps: float, how: Sequence[str] = QUICKLY
) -> None:
    """Writes an H.264 video, which browsers play; frames: [H, W, 3] uint8. Raises OSError, or what
    the encoder raises."""
    import imageio.v2 as imageio

    file.parent.mkdir(exist_ok=True)
    partial = file.parent / f".{uuid.uuid4().hex}.mp4"  # others may write beside it
    try:
        imageio.mimwrite(partial, frames, fps=fps, macro_block_size=1, output_params=how)
        partial.replace(file)  # an encoder that fails may say nothing, but leaves no file
    finally:
        partial.unlink(missing_ok=True)


def make_videos(frames: Path, videos: Path, seconds: float = math.inf) -> None:
    """Makes videos of all frames that workers have left, and puts what is left of them after these
    seconds beside the videos, for later. Trouble is a warning, and is not met again."""
    late = time.monotonic() + seconds
    for left in sorted(frames.glob("*.npy")):
        try:
            if time.monotonic() > late:
                videos.mkdir(exist_ok=True)
                left.replace(videos / left.name)
                continue
            taken = np.load(left)  # [N, H, W, 3] uint8
            side = len(taken[0]) * max(1, round(SIDE / len(taken[0])))
            side += side % 2  # H.264 halves the resolution of colours
            write_video(videos / f"{left.stem}.mp4", [resized(one, side) for one in taken], FPS)
        except Exception as error:  # of the encoder or the disk
            if left.exists():  # else its worker has removed it for a newer one
                said = " ".join(str(error).split())[:200]
                said = f"warning: cannot write the film {left.stem}: {said}"
                print(said, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            left.unlink()
    keep_first_and_last(videos, "mp4")
