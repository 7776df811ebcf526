"""Lets what a program prints never end it: a reader that has left (`| head`), an encoding that
lacks a character (LC_ALL=C), a full disk under `> log`, a stream that was closed (`>&-`).
"""

import contextlib
import errno
import io
import os
import sys

# What a full or write-protected disk says, wherever it is met: ours to explain, nobody's bug.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Descriptor(io.FileIO):
    """Writes to a file descriptor. What it cannot take is dropped."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            if written := super().write(data):
                return written
        return len(data)


def never_fail() -> None:
    """Makes stdout and stderr of this process streams that take everything; a character that their
    encoding lacks becomes "?" or an escape. Streams that somebody has put in their place stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8", "replace"))
        elif stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):
                stream.flush()
            raw = Descriptor(stream.fileno(), "w", closefd=False)
            errors = "replace" if name == "stdout" else "backslashreplace"
            lines = stream.line_buffering
            through = stream.write_through
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, errors, None, lines, through
            )
            setattr(sys, name, wrapped)


def disk_trouble(error: Exception, file: object = "") -> str:
    """Says what a disk has refused: "cannot write runs/x/metrics.jsonl: No space left on device".

    error: an OSError, or what a library makes of one; file: for an error that does not name it."""
    where = getattr(error, "filename", None) or file
    said = getattr(error, "strerror", None) or repr(error)
    return f"cannot write{f' {where}' if where else ''}: {said}"
