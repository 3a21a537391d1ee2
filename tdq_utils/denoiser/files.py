"""Files that a kill leaves whole and that several processes may write: beside their place first, then moved onto it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np


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
