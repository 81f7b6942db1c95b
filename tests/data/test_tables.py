"""Parquet files of the steps: row groups of a bounded size, places, equal bytes, plain types."""

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, DiskFull, SourceError
from marrow.data import tables
from marrow.data.tables import ParquetFile, described, open_table, parts, plain_type, stream

SCHEMA = pa.schema([described("n", pa.int64(), "a number"), described("text", pa.string(), "a text")])


def batch(start: int, sizes: list[int]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {"n": list(range(start, start + len(sizes))), "text": ["x" * size for size in sizes]}, schema=SCHEMA
    )


def write(path: Path, batches: list[pa.RecordBatch], group_bytes: int) -> ParquetFile:
    with ParquetFile(path, SCHEMA, group_bytes) as file:
        for item in batches:
            file.write(item)
    return file


def group_bytes_of(path: Path) -> list[int]:
    with pq.ParquetFile(path) as file:
        return [file.read_row_group(i).nbytes for i in range(file.num_row_groups)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 400), max_size=60), min_size=1, max_size=8),
    st.sampled_from([64, 1000, 5000, 1 << 20]),
    st.sampled_from([7, 1 << 16]),
)
def test_all_rows_come_back_in_groups_of_a_bounded_size(tmp_path_factory, sizes, group_bytes, max_rows):
    path = tmp_path_factory.mktemp("t") / "a.parquet"
    batches = [batch(100 * i, part) for i, part in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "MAX_GROUP_ROWS", max_rows)
        file = write(path, batches, group_bytes)
    expected = pa.Table.from_batches(batches, SCHEMA)
    assert pq.read_table(path).equals(expected)
    with pq.ParquetFile(path) as got:
        rows = [got.metadata.row_group(i).num_rows for i in range(got.num_row_groups)]
        assert got.schema_arrow.field("n").metadata[b"description"] == b"a number"
    assert (file.num_rows, file.num_row_groups) == (expected.num_rows, len(rows))
    assert all(0 < count <= max_rows for count in rows)
    # A group is closed by the piece that fills it, which is at most a group more, or one row.
    largest = max((size for part in sizes for size in part), default=0) + 16
    assert all(size <= 2 * group_bytes + 2 * largest + 64 for size in group_bytes_of(path))


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "group_bytes", "groups"),
    [
        (1000, 984, 100_000, 10),
        (1000, 984, 1 << 20, 1),
        (10, 100_000, 1000, 10),
        (0, 10, 1000, 0),
        (1, 10, 1, 1),
    ],
)
def test_one_large_batch_is_cut(tmp_path, num_rows, row_bytes, group_bytes, groups):
    file = write(tmp_path / "a.parquet", [batch(0, [row_bytes] * num_rows)], group_bytes)
    assert groups / 2 <= file.num_row_groups <= groups, "a group is at most twice as large as asked"
    assert pq.read_table(tmp_path / "a.parquet")["n"].to_pylist() == list(range(num_rows))


def test_equal_rows_give_equal_bytes_however_often_they_are_written(tmp_path):
    digests = set()
    for name in "abc":
        write(tmp_path / name, [batch(i * 50, [i] * 50) for i in range(40)], 4000)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    write(tmp_path / "d", [batch(i * 50, [i + 1] * 50) for i in range(40)], 4000)
    assert hashlib.sha256((tmp_path / "d").read_bytes()).hexdigest() not in digests


def test_memory_holds_one_row_group(tmp_path):
    """100 MB of rows through row groups of 1 MiB; Arrow's own pool tells the peak."""
    piece = batch(0, [1000] * 1000)
    before = pa.total_allocated_bytes()
    peak = 0
    with ParquetFile(tmp_path / "a.parquet", SCHEMA, 1 << 20) as file:
        for start in range(100):
            file.write(piece if start % 2 else batch(start, [1000] * 1000))
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert file.num_rows == 100_000
    assert file.num_row_groups >= 45
    assert peak < 8 << 20


@pytest.mark.parametrize("columns", [None, ["n"], ["text", "n"]])
def test_every_place_points_to_its_row(tmp_path, monkeypatch, columns):
    monkeypatch.setattr(tables, "READ_ROWS", 7)
    for index in range(3):
        write(tmp_path / f"rows-{index:05d}.parquet", [batch(1000 * index, list(range(200)))], 3000)
    seen = []
    for place, got in stream(parts(tmp_path, "rows-*.parquet"), columns):
        assert 0 < got.num_rows <= 7
        assert got.schema.names == (columns or ["n", "text"])
        with pq.ParquetFile(tmp_path / place.part) as file:
            whole = file.read_row_group(place.row_group, columns=["n"])["n"].to_pylist()
        assert got.column("n").to_pylist() == whole[place.row : place.row + got.num_rows]
        seen += got.column("n").to_pylist()
    assert seen == [1000 * index + n for index in range(3) for n in range(200)]


def test_a_failing_block_leaves_no_file_that_looks_whole(tmp_path):
    path = tmp_path / "a.parquet"
    file = ParquetFile(path, SCHEMA, 1 << 20)

    def fail() -> None:
        with file:
            file.write(batch(0, [10] * 10))
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    file.close()
    assert pq.read_table(path).num_rows == 0, "pending rows are let go"
    file.close()


def test_closing_twice_keeps_every_row(tmp_path):
    file = write(tmp_path / "a.parquet", [batch(0, [1, 2, 3])], 1 << 20)
    file.close()
    assert pq.read_table(tmp_path / "a.parquet").num_rows == file.num_rows == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"PAR1",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4] + b"PAR2",
        lambda data: b"text\n" * 100,
    ],
    ids=["empty", "magic alone", "half", "wrong magic", "text"],
)
def test_a_damaged_table_of_an_earlier_step_says_to_run_it_again(tmp_path, damage):
    path = tmp_path / "rows-00000.parquet"
    write(path, [batch(0, [50] * 500)], 1000)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"rows-00000\.parquet") as caught:
        open_table(path)
    assert "again" in str(caught.value.hint)
    with pytest.raises(DataError):
        list(stream([path]))


def test_a_missing_table_says_which_step_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"rows-\*\.parquet"):
        parts(tmp_path, "rows-*.parquet")
    with pytest.raises(DataError, match=r"gone\.parquet"):
        open_table(tmp_path / "gone.parquet")
    with pytest.raises(SourceError, match="cannot write rows"):
        ParquetFile(tmp_path / "no" / "a.parquet", SCHEMA, 1000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_full_disk_is_said_while_rows_are_written(tmp_path):
    os.symlink("/dev/full", tmp_path / "a.parquet")
    with pytest.raises(DiskFull) as caught:
        write(tmp_path / "a.parquet", [batch(0, [1000] * 100)] * 3, 1000)
    assert "a.parquet" in caught.value.message


def test_parts_come_in_the_order_of_their_numbers(tmp_path):
    for index in (10, 2, 0, 9, 1):
        (tmp_path / f"rows-{index:05d}.parquet").touch()
    (tmp_path / "other.parquet").touch()
    assert [path.name[5:10] for path in parts(tmp_path, "rows-*.parquet")] == [
        "00000",
        "00001",
        "00002",
        "00009",
        "00010",
    ]


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.large_binary(), pa.binary()),
        (pa.binary_view(), pa.binary()),
        (pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.dictionary(pa.int32(), pa.int64()), pa.int64()),
        (pa.int8(), pa.int8()),
        (pa.string(), pa.string()),
        (pa.list_(pa.int8()), pa.list_(pa.int8())),
        (pa.timestamp("ns", "UTC"), pa.timestamp("ns", "UTC")),
    ],
)
def test_plain_types_hold_the_same_values(kind, plain):
    assert plain_type(kind) == plain
    assert plain_type(plain) == plain
    assert pa.array([None], kind).cast(plain).to_pylist() == [None]
