"""Tables on disk: rows that several write at once, kills, damage, neighbours."""

import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest

from tdq_utils.denoiser.files import beside
from tdq_utils.errors import DataError
from tdq_utils.lab.results import Table, read_rows

KEYS = [dict(method=method, repeat=repeat) for method in ("mse", "tdq: a / b") for repeat in range(8)]


def row(key, fcd=1.0):
    return {**key, "images": 5, "sampler": "DDIM", "model": "0123e5", "features": "classifier", "threads": 1, "fcd": fcd}


def test_threads_that_write_at_once_lose_no_row(tmp_path):
    """Each with a table of its own, as processes have."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: Table(tmp_path / "t.csv", KEYS).add(row(key)), reversed(KEYS)))
    assert [(found["method"], found["repeat"]) for found in read_rows(tmp_path / "t.csv")] == [(*key.values(),) for key in KEYS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.rows"]


def test_plain_processes_that_write_at_once_lose_no_row(tmp_path):
    def work(first):
        for key in KEYS[first::2]:
            Table(tmp_path / "t.csv", KEYS).add(row(key))

    running = [get_context("fork").Process(target=work, args=(first,)) for first in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert len(read_rows(tmp_path / "t.csv", tuple(KEYS[0]))) == len(KEYS)


def test_whoever_writes_last_has_read_every_row(tmp_path, monkeypatch):
    """A row that comes after the rows were read, and before the CSV is written, is in the CSV at the end."""
    first, second = Table(tmp_path / "t.csv", KEYS), Table(tmp_path / "t.csv", KEYS)
    original, added = Table.rows, []

    def rows(table):
        found = original(table)
        if table is first and not added:
            added.append(second.add(row(KEYS[1])))
        return found

    monkeypatch.setattr(Table, "rows", rows)
    first.add(row(KEYS[0]))
    assert len(read_rows(tmp_path / "t.csv")) == 2


def test_a_committed_table_is_extended_from_its_csv_alone(tmp_path):
    out = tmp_path / "t.csv"
    pd.DataFrame([row(KEYS[2], 0.1234567), row(KEYS[0], 2.5)]).to_csv(out, index=False, float_format="%.6g")
    before = out.read_text().splitlines()
    Table(out, KEYS).add(row(KEYS[1], 1 / 3))
    assert out.read_text().splitlines() == [before[0], before[2], "mse,1,5,DDIM,0123e5,classifier,1,0.333333", before[1]]
    assert len(list((tmp_path / "t.rows").iterdir())) == 1


def test_a_neighbour_is_left_alone(tmp_path):
    neighbours = [tmp_path / name for name in ("t.2024-05-01.csv", "t.0.csv", "t-old.csv")]
    for neighbour in neighbours:
        neighbour.write_text("mine")
    Table(tmp_path / "t.csv", KEYS).add(row(KEYS[0]))
    assert [neighbour.read_text() for neighbour in neighbours] == ["mine"] * 3
    assert Table(neighbours[0], KEYS).folder != Table(tmp_path / "t.csv", KEYS).folder
    assert len(read_rows(tmp_path / "t.csv")) == 1


def test_a_kill_leaves_a_valid_table(tmp_path, monkeypatch):
    table = Table(tmp_path / "t.csv", KEYS)
    table.add(row(KEYS[0]))
    for key, moment in zip(KEYS[1:], ("fsync", "replace"), strict=False):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), killed)
            table.add(row(key))
        assert len(table.rows()) == len(read_rows(tmp_path / "t.csv")) == 1
        (tmp_path / "t.rows" / "half.csv.0.part").write_text("method,rep")  # what a kill without a chance to clean up leaves
    table.add(row(KEYS[1]))
    assert len(read_rows(tmp_path / "t.csv")) == 2


def killed(*args):
    raise KeyboardInterrupt


def test_a_row_that_was_not_gathered_is_gathered_later(tmp_path, monkeypatch):
    table = Table(tmp_path / "t.csv", KEYS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Table, "gather", killed)
        table.add(row(KEYS[0]))
    assert len(table.rows()) == 1 and not table.path.exists()
    table.gather()
    assert len(read_rows(table.path)) == 1


def test_begun_work_is_marked_once(tmp_path):
    one, other = Table(tmp_path / "t.csv", KEYS), Table(tmp_path / "t.csv", KEYS)
    mark = one.begin("mse-4-4")
    assert mark.exists() and other.begin("mse-4-4") is None and other.begin("mse/4/4") is not None
    mark.unlink()
    assert other.begin("mse-4-4") == mark
    assert one.rows() == {}


@pytest.mark.parametrize("damage", ["", "method,repeat\nmse,1\n", "\x00\x00", None])
def test_a_damaged_row_is_named(tmp_path, damage):
    table = Table(tmp_path / "t.csv", KEYS)
    table.add(row(KEYS[0]))
    (file,) = (tmp_path / "t.rows").iterdir()
    file.write_text(file.read_text()[:-3] if damage is None else damage)
    with pytest.raises(DataError, match=f"{file.name} must be a table of `reproduce`: .*; delete that line or file"):
        table.rows()
    file.unlink()
    assert len(table.rows()) == 1  # it had been gathered


def test_a_cut_line_is_named_and_nothing_is_lost(tmp_path):
    table = Table(tmp_path / "t.csv", KEYS)
    for key in KEYS[:2]:
        table.add(row(key))
    table.path.write_text(cut := table.path.read_text()[:-20])
    with pytest.raises(DataError, match="line 3 was cut: 'mse,1.*delete that line or file, and resume"):
        table.add(row(KEYS[2]))
    assert table.path.read_text() == cut
    table.path.write_text("method,fcd\nmse,1\n")
    with pytest.raises(DataError, match="columns .* are missing"):
        read_rows(table.path)


def test_a_table_without_rows_is_no_file(tmp_path):
    assert Table(tmp_path / "t.csv", KEYS).rows() == {} and not list(tmp_path.iterdir())


def test_nothing_is_left_beside_a_file_that_was_not_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt), beside(tmp_path / "t.csv") as part:
        part.write_text("half")
        killed()
    assert not list(tmp_path.iterdir())
