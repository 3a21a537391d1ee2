"""Files that a kill leaves whole and that several processes may write: beside their place first, then moved onto it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from tdq_utils.errors import DataError

LARGEST_JSON = 2**26  # bytes: ten times the settings of the largest model that was saved


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, of nobody else; moved into place at the end, so that a kill leaves no half."""
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield part
        with open(part) as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_arrays(path: str | Path, **arrays: Any) -> None:
    """Write an npz (no pickles) under exactly this name."""
    with beside(Path(path)) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of anybody's. DataError: missing, too large, nested too deeply, or something else."""
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size} bytes, more than {LARGEST_JSON}")
        if not isinstance(found := json.loads(path.read_text()), dict):
            raise ValueError(f"it holds a {type(found).__name__}, no object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} must be settings as JSON: {error}. Write it again, or take it from whoever did.") from error


def check_inside(folder: Path, *names: str) -> None:
    """DataError: a file of ``folder`` is a link that leads out of it."""
    for name in filter(None, names):
        if (path := folder / name).resolve().parent != folder.resolve():
            raise DataError(f"A folder must hold its files itself; {path} leads to {path.resolve()}. Copy the file there.")
