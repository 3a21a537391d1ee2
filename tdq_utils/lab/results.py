"""Rows of results on disk: a row is a file, and a CSV is gathered from them; any number of processes write one table."""

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from tdq_utils.denoiser.files import beside
from tdq_utils.errors import DataError

PROTOCOL = ("images", "sampler", "model", "features", "threads")  # must agree in all rows of one table
Row = dict[str, Any]
# What a table that lacks these columns was measured with: the tables that ship. Written only where one differs.
SHIPPED: Row = dict(data="fashion-mnist", prediction="epsilon", classes=0, guidance="-", dtype="float32")


class Table:
    """A CSV and, beside it, the folder ``name.rows`` with a file for each row that was added; rows of the CSV alone stay.

    Nothing is locked: whoever gathers, gathers all. ``keys``: what tells rows apart, of every row wanted, in the CSV's order."""

    def __init__(self, path: str | Path, keys: Sequence[Row]) -> None:
        self.path, self.folder, self.key = Path(path), Path(path).with_suffix(".rows"), tuple(keys[0])
        self.order = {tuple(key.values()): i for i, key in enumerate(keys)}

    def rows(self) -> dict[tuple, Row]:
        """All rows by key, as they are now, in order: those of the CSV, those of the files in their place. DataError: damage."""
        files = [self.path] if self.path.exists() else []
        rows = [row for file in (*files, *sorted(self.folder.glob("*.csv"))) for row in read_rows(file, self.key)]
        found = {tuple(row[name] for name in self.key): row for row in rows}
        return dict(sorted(found.items(), key=lambda pair: self.order.get(pair[0], len(self.order))))

    def begin(self, name: str) -> Path | None:
        """A mark that work of this name has begun, to be removed at its end; ``None`` if there is one already.

        Only advice to take other work first: it can be that of a process that was killed."""
        mark = self._file([name], ".begun")
        try:
            mark.touch(exist_ok=False)
            return mark
        except FileExistsError:
            return None

    def add(self, row: Row) -> None:
        """Write one row more, and gather."""
        _write(self._file((row[name] for name in self.key), ".csv"), [row])
        self.gather()

    def gather(self) -> None:
        """Write the CSV from all rows; again if one came meanwhile, for whoever writes last may have read first."""
        files = None
        while files != (files := sorted(self.folder.glob("*.csv"))):
            _write(self.path, [*self.rows().values()])

    def _file(self, key: Iterable, end: str) -> Path:
        """Its name holds what can be read of a key, and digits that tell apart what cannot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(str, key))
        digits = sha256(text.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub('[^a-zA-Z0-9.-]+', '_', text)[:120]}-{digits}{end}"


def _write(path: Path, rows: Sequence[Row]) -> None:
    if all(SHIPPED.items() <= row.items() for row in rows):
        rows = [{name: value for name, value in row.items() if name not in SHIPPED} for row in rows]
    with beside(path) as part:
        pd.DataFrame(rows).to_csv(part, index=False, float_format="%.6g")


def read_rows(path: str | Path, key: Sequence[str] = ()) -> list[Row]:
    """The rows of a results file as dicts. DataError: a line that was cut or does not fit the header."""
    try:
        text = Path(path).read_text()
        header, *lines = text.splitlines()
        for number, line in enumerate(lines, start=2):
            if line.count(",") != header.count(",") or (number == len(lines) + 1 and not text.endswith("\n")):
                raise ValueError(f"line {number} was cut: {line[:60]!r}")
        frame = pd.read_csv(path, dtype={"model": str, "variant": str, "guidance": str})
        if missing := {*key, *PROTOCOL} - set(frame):
            raise ValueError(f"columns {sorted(missing)} are missing")
        return [row | {name: value for name, value in SHIPPED.items() if name not in row} for row in frame.to_dict("records")]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a table of `reproduce`: {error}; delete that line or file, and resume.") from error
