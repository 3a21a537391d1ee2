"""The kit's own exceptions, each with the rule, the value received and the fix; and the rules for plain numbers."""

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any


class TDQError(ValueError):
    """Bad input to the kit; a ``ValueError``, so callers need not import it."""


class DataError(TDQError):
    """A data file or model that is missing, corrupted or unknown."""


_KINDS = {
    "count": ("a whole number, 1 or more", lambda v: v >= 1 and isinstance(v, Integral)),
    "share": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "percent": ("a number above 0 and at most 100", lambda v: 0 < v <= 100),
    "amount": ("a finite number, 0 or more", lambda v: 0 <= v < math.inf),
    "positive": ("a finite number above 0", lambda v: 0 < v < math.inf),
}


def check(kind: str, **values: Any) -> None:
    """Refuse numbers that are not of a ``kind``: "count", "share", "percent", "amount" or "positive". TDQError: one is not."""
    rule, holds = _KINDS[kind]
    for name, value in values.items():
        if not isinstance(value, Real) or not holds(value):
            raise TDQError(f"{name} must be {rule}; got {value!r}.")


def checked_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an ``int``, whatever library it comes from. TDQError: no whole number, or out of range."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if type(value) is not int or not least <= value <= (most or 2**63 - 1):
        raise TDQError(f"{name} must be a whole number from {least} {f'to {most}' if most else 'up'}; got {value!r}.")
    return value


def checked_path(path: Any) -> Path:
    """``path`` as a :class:`pathlib.Path`. TDQError: neither text nor a path."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fspath(path):
        raise TDQError(
            f"A path must be text or a pathlib.Path, without a zero byte; got {path!r}. Pass the name of a file or folder."
        )
    return Path(path)


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made, before any work. TDQError: it, or what should hold it, is no folder to write to."""
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise TDQError(f"Results need a folder that can be written to; got {path}, and {there} is none. Choose another place.")
