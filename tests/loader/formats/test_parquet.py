"""Rows of Parquet by number: those that pyarrow reads, whatever the files and row groups."""

import pickle
from pathlib import Path
from typing import Any

import loader_jobs as jobs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.loader.formats.parquet import ParquetReader
from marrow.loader.loader import Loader
from marrow.loader.samples import Collate

ROWS = 230


def table_of(rows: int = ROWS, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    return pa.table(
        {
            "id": list(numbers),
            "text": [f"row {number}" for number in numbers],
            "nested": [{"a": [number, None], "b": None if number % 3 else str(number)} for number in numbers],
            "maybe": [None if number % 5 else number for number in numbers],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parquet")
    pq.write_table(table_of(100), path / "a.parquet", row_group_size=17)
    pq.write_table(table_of(0), path / "b.parquet")
    pq.write_table(table_of(ROWS - 100, 100), path / "c.parquet", row_group_size=40)
    return path


@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=40), cache_bytes=st.sampled_from([0, 3000, 1 << 20]))
@settings(max_examples=40, deadline=None)
def test_any_rows_in_any_order(folder: Path, rows: list[int], cache_bytes: int) -> None:
    with ParquetReader(folder, cache_bytes=cache_bytes) as reader:
        found = reader.take(np.array(rows, dtype=np.int64))
    expected = table_of().take(rows) if rows else table_of(0)
    assert found.as_list() == expected.to_pylist()
    assert len(found) == len(rows)


def test_columns_are_chosen(folder: Path) -> None:
    with ParquetReader(folder, ["maybe", "id"]) as reader:
        assert list(reader.take(np.array([5])).as_list()[0]) == ["maybe", "id"]


def test_row_groups_of_a_window_are_decoded_once_each(folder: Path) -> None:
    """Though rows come shuffled. Without a window and with a small cache, nearly each row costs a group."""
    counts = {}
    for window in (None, 2):
        reader = ParquetReader(folder, ["id"], cache_bytes=700)
        with Loader(reader, 10, 0, collate=Collate(), window=window, prefetch=0, stop=ROWS) as loader:
            ids = [number for batch in loader for number in batch["id"].tolist()]
        assert sorted(ids) == list(range(ROWS))
        assert ids != sorted(ids)
        counts[window] = reader.decoded_groups
    groups = len(ParquetReader(folder).rows_of_shards)
    assert counts[2] <= 1.5 * groups  # a batch may hold the end of one window and the start of the next
    assert counts[None] > 3 * groups


def test_a_row_knows_its_file_and_group(folder: Path) -> None:
    reader = ParquetReader(folder)
    assert reader.where(99) == f"row 99 of {folder / 'a.parquet'}, row group 5"
    assert reader.where(100) == f"row 0 of {folder / 'c.parquet'}, row group 0"
    assert reader.where(181) == f"row 81 of {folder / 'c.parquet'}, row group 2"


def test_a_failing_transform_names_the_file(folder: Path) -> None:
    collate = Collate(jobs.fails_on_multiples_of_50)
    with (
        Loader(ParquetReader(folder, ["id"]), ROWS, 0, collate=collate) as loader,
        pytest.raises(DataError, match=r"row \d+ of .*\.parquet, row group \d\): KeyError"),
    ):
        next(loader)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_the_same_whatever_the_workers(folder: Path, workers: int) -> None:
    def batches(workers: int) -> list[Any]:
        reader = ParquetReader(folder, ["id"])
        with Loader(reader, 16, 5, collate=Collate(jobs.double), workers=workers, stop=ROWS) as loader:
            return [{name: column.tolist() for name, column in batch.items()} for batch in loader]

    assert batches(workers) == batches(0)


def test_the_check_is_of_the_files_not_of_their_folder(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert ParquetReader(tmp_path).check == ParquetReader(folder).check
    pq.write_table(table_of(100, 1), tmp_path / "a.parquet", row_group_size=17)
    assert ParquetReader(tmp_path).check != ParquetReader(folder).check


def test_files_that_change_before_a_worker_opens_them_are_noticed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table_of(10), path)
    data = pickle.dumps(ParquetReader(path))
    pq.write_table(table_of(11), path)
    with pytest.raises(DataError, match="changed"):
        pickle.loads(data)


def test_sources_of_all_kinds(folder: Path) -> None:
    assert ParquetReader(folder / "a.parquet").num_rows == 100
    assert ParquetReader(str(folder / "[ac].parquet")).num_rows == ROWS
    assert (
        ParquetReader([folder / "c.parquet", folder / "a.parquet"]).take(np.array([0])).as_list()[0]["id"]
        == 100
    )


def test_closing_twice_is_fine_and_an_empty_take_too(folder: Path) -> None:
    reader = ParquetReader(folder)
    assert reader.take(np.array([], dtype=np.int64)).as_list() == []
    reader.close()
    reader.close()


@pytest.mark.parametrize("kept", [0, 3, 11, 500, -1])
def test_a_file_cut_short_is_named(folder: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.parquet"
    path.write_bytes((folder / "a.parquet").read_bytes()[:kept])
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read"):
        ParquetReader(path)


def test_a_page_that_is_damaged_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(table_of(2000), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[60:400] = bytes(340)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read: row group 0"):
        ParquetReader(path).take(np.array([1]))


def test_what_is_not_there_or_empty_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no \.parquet file"):
        ParquetReader(tmp_path)
    with pytest.raises(SourceError, match="hold no rows"):
        ParquetReader(folder / "b.parquet")
    with pytest.raises(DataError, match="no column 'nope'"):
        ParquetReader(folder, ["nope"])


def test_files_of_two_schemas_are_refused_unless_the_columns_agree(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [2], "text": [5]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="'text' is int64, not string"):
        ParquetReader(tmp_path)
    assert ParquetReader(tmp_path, ["id"]).num_rows == 2
