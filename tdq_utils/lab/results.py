"""Rows of results on disk: a CSV that grows by a row at a time and survives a kill."""

import os
from pathlib import Path

import pandas as pd

from tdq_utils.errors import DataError

PROTOCOL = ("images", "sampler", "model", "features")  # must agree in all rows of one table


class Table:
    """Rows on disk, one a job; written whole and renamed, so that a kill at any moment leaves a valid file.

    Several processes each write a file of their own, ``name.rank.csv``, and all read them all.

    Args:
        path: of the CSV. key: names of the columns that tell rows apart. rank: of this process. world: how many there are.
    """

    def __init__(self, path, key, rank=0, world=1):
        self.path, self.key = Path(path), key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.own = self.path if world == 1 else self.path.with_suffix(f".{rank}.csv")
        self.rows = read_rows(self.own, key) if self.own.exists() else []

    def everything(self):
        """The rows of all processes, earlier runs' too: ``{key: row}``."""
        files = [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.[0-9]*.csv"))]
        rows = [row for file in files if file.exists() for row in read_rows(file, self.key)]
        return {tuple(row[name] for name in self.key): row for row in rows}

    def add(self, row):
        """Write one row more."""
        self.rows.append(row)
        _write(self.own, self.rows)

    def merge(self, keys):
        """Gather the rows of all processes in the one file, in the order of ``keys``; remove the others."""
        rank = {key: i for i, key in enumerate(keys)}
        rows = self.everything()
        _write(self.path, [rows[key] for key in sorted(rows, key=lambda key: rank.get(key, len(rank)))])
        for file in self.path.parent.glob(f"{self.path.stem}.[0-9]*.csv"):
            file.unlink()


def read_rows(path, key=()):
    """The rows of a results file as dicts. DataError: a line that was cut or does not fit the header."""
    try:
        text = Path(path).read_text()
        header, *lines = text.splitlines()
        for number, line in enumerate(lines, start=2):
            if line.count(",") != header.count(",") or (number == len(lines) + 1 and not text.endswith("\n")):
                raise ValueError(f"line {number} was cut: {line[:60]!r}; delete that line, and it is measured again")
        frame = pd.read_csv(path, dtype={"model": str})
        if missing := {*key, *PROTOCOL} - set(frame):
            raise ValueError(f"columns {sorted(missing)} are missing")
        return frame.to_dict("records")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a results table as `reproduce` writes it: {error}") from error


def _write(path, rows):
    part = path.with_suffix(".part")
    pd.DataFrame(rows).to_csv(part, index=False, float_format="%.6g")
    with open(part) as file:
        os.fsync(file.fileno())
    part.replace(path)
