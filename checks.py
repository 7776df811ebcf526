"""Types and ranges of settings, and of what JSON files say: each stated once, beside its field.

pydantic checks them; what is said about a mistake is one sentence of ours.
"""

import functools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from errors import UserError

# pydantic's words, and ours.
WORDS = {
    "Input should": "must",
    "greater than or equal to": "at least",
    "greater than": "more than",
    "less than or equal to": "at most",
    "Unexpected keyword argument": "is no field of it",
    "Invalid JSON": "is damaged, no JSON",
    "Value error, ": "",
}


def infinity(value: object) -> object:
    """Reads "inf": JSON has no infinity."""
    return math.inf if value == "inf" else value


def finite(found: Any, key: str = "") -> Any:
    """Raises ValueError naming the key of a NaN or infinity that is somewhere inside."""
    parts = found.items() if isinstance(found, dict) else ()
    parts = enumerate(found) if isinstance(found, list) else parts
    for name, part in parts:
        finite(part, f"{key}.{name}".lstrip("."))
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{key} is {found}, not a finite number")
    return found


# NaN is in no range.
MOST = 10**9
Positive = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Total = Annotated[int, Field(ge=0, lt=2**63)]  # of a run of any length
Size = Annotated[int, Field(ge=1, le=10**6)]  # of a network's layer
Length = Annotated[int, Field(ge=1, le=4096)]  # of a picture or sequence that it sees
Count = Annotated[int, Field(ge=1, le=1000)]  # of its layers, heads and denoise steps
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
AboveZero = Annotated[float, Field(gt=0, le=MOST)]
FromZero = Annotated[float, Field(ge=0, le=MOST)]
Bound = Annotated[float, Field(gt=0), BeforeValidator(infinity)]  # inf: none
Limit = Annotated[float, Field(ge=0), BeforeValidator(infinity)]  # inf: none
Finite = Annotated[dict, AfterValidator(lambda found: finite(found))]


@functools.cache
def adapter(kind: Any) -> TypeAdapter:
    """Returns what checks values of a type, such as a dataclass; making it takes milliseconds."""
    return TypeAdapter(kind)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def mistake(error: ValidationError) -> tuple[str, str]:
    """Returns the name of the first field that is wrong, or "it", and its value with what it must
    be."""
    found = error.errors(include_url=False)
    # A field of several types is wrong once for each; its place ends in the type, as pydantic says.
    tried = ("constrained-", "function-", "literal[")
    for one in found:
        one["loc"] = [str(part) for part in one["loc"] if not str(part).startswith(tried)]
    first = found[0]
    words = " or ".join(one["msg"] for one in found if one["loc"] == first["loc"])
    for theirs, ours in WORDS.items():
        words = words.replace(theirs, ours)
    if first["type"] == "value_error":  # of `finite`, which says where and what
        return "", str(first["ctx"]["error"])
    name = " ".join(".".join(first["loc"]).split())[:200]  # names in files may be anything
    if first["type"].startswith("missing"):
        return "it", f"has no {name}"
    return (name, f"{first['input']!r:.60} {words}") if name else ("it", words)


def check_ranges(settings: Any) -> None:
    """Raises UserError naming the first setting of a dataclass that is out of its field's range."""
    try:
        adapter(type(settings)).validate_python(asdict(settings))
    except ValidationError as error:
        name, words = mistake(error)
        raise UserError(f"{flag_of(name)} {words}") from None


def parse_json(text: str | bytes, kind: Any, what: object, extra: str | None = "forbid") -> Any:
    """Reads JSON as a type. Raises UserError, which names `what` and the field, where there is no
    such field, or its value is of another type or out of its range. extra: None where the type says
    itself what further fields may be."""
    try:
        return adapter(kind).validate_json(text, strict=True, extra=extra)
    except ValidationError as error:
        said = " ".join(mistake(error)).strip()
        raise UserError(f"cannot read {what}: {said}") from None


def read_json(
    path: Path, kind: Any = Finite, what: object = "", extra: str | None = "forbid"
) -> Any:
    """Reads a file as `parse_json`. Raises UserError, which names the file or `what`."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what or path}: {error.strerror}") from None
    return parse_json(text, kind, what or path, extra)


def check_writable(path: Path, what: str, flag: str) -> None:
    """Raises UserError where a file could not be written. One that is there stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        path.open("a").close()
        if not was_there:
            path.unlink(missing_ok=True)
    except OSError as error:
        found = f"cannot write {what} to {error.filename}: {error.strerror}"
        raise UserError(f"{found}; give another {flag}") from None
