"""Lets files and folders appear whole, and have one writer at a time."""

import contextlib
import fcntl
import filecmp
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from errors import UserError


@contextlib.contextmanager
def whole(path: Path, new: bool = False) -> Iterator[Path]:
    """Yields where to write a file or folder, which takes its place at `path` at the end. An error,
    an interrupt or a kill leaves there what was there before.

    new: what has come to be there meanwhile stays, and a UserError says where the new one is."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # of this writer alone
    try:
        yield unfinished
        if not (new and path.exists()):
            os.replace(unfinished, path)
            return
    except BaseException:
        # What cannot be removed must not hide why the writing failed.
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        raise
    there = f"{path} has appeared meanwhile: what was to be written there is in {unfinished}"
    raise UserError(there)


def write_whole(file: Path, text: str) -> None:
    """Makes `text` a file's whole contents."""
    with whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def alike(file: Path, other: Path) -> bool:
    """Whether both files are there, with the same contents."""
    return file.is_file() and other.is_file() and filecmp.cmp(file, other, shallow=False)


def locked(folder: Path, taken: str) -> int:
    """Locks a folder until what is returned, a file descriptor, is closed. Raises UserError(taken)
    where another process has it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(taken) from None
    except OSError:  # a file system without locks
        pass
    return lock
