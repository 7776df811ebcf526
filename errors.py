"""A user's mistakes, and how a program ends on one: in one sentence, without a traceback."""

import contextlib
import errno
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import output

UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
UNUSABLE += (errno.EISDIR,)


class UserError(Exception):
    """A mistake of the user's. The message is one sentence saying what is wrong and what to do."""


def require(condition: object, sentence: str) -> None:
    """Raises UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def understood(what: object) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong inside with what a file says."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        damaged = f"it is of another kind or version, or damaged ({error!r})"
        raise UserError(f"cannot read {what}: {damaged}") from None


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a UserError, a full disk, and a path that cannot be used, into one line on stderr and
    exit status 2; Ctrl-C into one and 130. Nothing that is printed can fail within it."""
    output.never_fail()
    try:
        yield
    except UserError as error:
        said = str(error)
    except OSError as error:
        if error.errno in output.DISK:
            said = f"{output.disk_trouble(error)}; make room, or write elsewhere"
        elif error.errno in UNUSABLE:
            said = f"cannot use the path {str(error.filename)[:300]}: {error.strerror}"
        else:
            raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    else:
        return
    print(f"error: {said}", file=sys.stderr)
    raise SystemExit(2)


def place_of(error: BaseException) -> str:
    """Returns "file:line" where an error arose: the innermost place outside installed packages."""
    place = error
    if not (isinstance(error, SyntaxError) and error.filename):
        installed = ("<frozen", *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(installed)]
        place = (own or frames)[-1]
    return f"{place.filename.removeprefix(f'{Path(__file__).parent}/')}:{place.lineno}"
