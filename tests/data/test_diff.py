import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.data.diff import RowDiff, diff_rows
from marrow.data.diff_tables import can_compare

Row = tuple[int | None, str | None]


def table(rows: list[Row]) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([r[0] for r in rows], pa.int64()),
            "text": pa.array([r[1] for r in rows], pa.string()),
        }
    )


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table(rows), path, row_group_size=7)
    elif path.suffix == ".arrow":
        pyarrow.feather.write_feather(table(rows), path, compression="uncompressed", chunksize=5)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table(rows), path)
    else:
        path.write_text(
            "".join(json.dumps({"id": r[0], "text": r[1]}) + "\n" for r in rows), encoding="utf-8"
        )
    return path


rows_of_a_table = st.lists(
    st.tuples(st.none() | st.integers(-3, 3), st.none() | st.sampled_from(["", "a", "b", "ü\n"])), max_size=30
)
ENDS = [".parquet", ".arrow", ".jsonl"]


@pytest.mark.parametrize("end", ENDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_of_a_table, rows_of_a_table, st.booleans())
def test_counts_are_those_of_two_bags(
    tmp_path: Path, end: str, old: list[Row], new: list[Row], spill: bool
) -> None:
    a, b = write(tmp_path / f"old{end}", old), write(tmp_path / f"new{end}", new)
    if end == ".jsonl" and not (old and new):
        return  # no row, no columns
    found = diff_rows(a, b, memory_bytes=200 if spill else 1 << 20, spill=tmp_path)
    before, after = Counter(old), Counter(new)
    assert (found.rows_before, found.rows_after) == (len(old), len(new))
    assert found.added == sum((after - before).values())
    assert found.removed == sum((before - after).values())
    assert len(found.samples_added) == min(3, found.added)
    for shown in found.samples_added:
        assert shown in [
            {"id": "null" if r[0] is None else str(r[0]), "text": "null" if r[1] is None else r[1]}
            for r in (after - before)
        ]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.integers(0, 20), st.sampled_from("abc")),
    st.dictionaries(st.integers(0, 20), st.sampled_from("abc")),
)
def test_with_a_key_counts_are_those_of_two_dictionaries(
    tmp_path: Path, old: dict[int, str], new: dict[int, str]
) -> None:
    a, b = (
        write(tmp_path / "old.parquet", list(old.items())),
        write(tmp_path / "new.parquet", list(new.items())),
    )
    found = diff_rows(a, b, key=["id"])
    assert found.added == len(new.keys() - old.keys())
    assert found.removed == len(old.keys() - new.keys())
    assert found.changed == sum(old[k] != new[k] for k in old.keys() & new.keys())
    for before, after in found.samples_changed:
        assert before["id"] == after["id"]
        assert (before["text"], after["text"]) == (old[int(before["id"])], new[int(after["id"])])


def test_order_does_not_count(tmp_path: Path) -> None:
    rows: list[Row] = [(n, str(n)) for n in range(100)]
    found = diff_rows(write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", rows[::-1]))
    assert (found.added, found.removed, found.types_changed) == (0, 0, ())


def test_columns_and_types_are_told_and_do_not_make_every_row_new(tmp_path: Path) -> None:
    old = pa.table({"id": pa.array([1, 2], pa.int32()), "gone": ["a", "b"], "same": [1.5, None]})
    new = pa.table({"same": [1.5, None], "id": pa.array([1, 2], pa.int64()), "come": ["c", "d"]})
    pq.write_table(old, tmp_path / "old.parquet")
    pq.write_table(new, tmp_path / "new.parquet")
    found = diff_rows(tmp_path / "old.parquet", tmp_path / "new.parquet")
    assert (found.added, found.removed) == (0, 0)
    assert (found.columns_added, found.columns_removed) == (("come",), ("gone",))
    assert found.types_changed == (("id", "int32", "int64"),)
    assert found.told() == "+0  -0  rows (2 -> 2)  +column come  -column gone  id: int32 -> int64"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (pa.array([1, 2]), pa.array([1.0, 2.5]), 1),
        (pa.array([1, 2]), pa.array(["1", "x"]), 1),
        (pa.array([[1], None]), pa.array([[1], []]), 1),
        (pa.array([{"a": 1}]), pa.array([{"a": 2}]), 0),
        (pa.array([0.0, float("nan")]), pa.array([-0.0, float("nan")]), 2),
        (pa.array([b"\xff", b""]), pa.array([b"\xff", None]), 1),
        (pa.array([True, None]), pa.array([True, False]), 1),
        (pa.array([None, None]), pa.array(["null", None]), 1),
    ],
)
def test_values_of_any_type_are_compared(tmp_path: Path, old: Any, new: Any, same: int) -> None:
    for name, values in (("old", old), ("new", new)):
        pq.write_table(pa.table({"v": values}), tmp_path / f"{name}.parquet")
    found = diff_rows(tmp_path / "old.parquet", tmp_path / "new.parquet")
    assert found.rows_after - found.added == same


def test_repeated_keys_are_counted_and_not_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", [(1, "a"), (1, "b"), (2, "c")])
    b = write(tmp_path / "b.parquet", [(1, "a"), (2, "d"), (2, "e")])
    found = diff_rows(a, b, key=["id"])
    assert (found.added, found.removed, found.changed, found.repeated) == (0, 0, 1, 2)


def test_a_missing_key_is_said(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", [(1, "a")])
    with pytest.raises(DataError, match="no column 'price'") as caught:
        diff_rows(a, a, key=["price"])
    assert "both have: id, text" in str(caught.value)


def test_text_is_compared_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\nodd \xff\n")
    (tmp_path / "b.txt").write_bytes(b"one\nodd \xff\nthree")
    found = diff_rows(tmp_path / "a.txt", tmp_path / "b.txt")
    assert found.samples_added == ({"line": "three"},)
    assert found.samples_removed == ({"line": "two"},)


@pytest.mark.parametrize(
    ("name", "broken"), [("a.csv", "id,text\n1,a\n2\n3,c,d\n"), ("a.jsonl", '{"id": 1}\nno json\n')]
)
def test_a_broken_table_is_compared_as_lines_and_says_so(tmp_path: Path, name: str, broken: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / name).write_text(broken)
    (tmp_path / "b" / name).write_text(broken + "more\n")
    found = diff_rows(tmp_path / name, tmp_path / "b" / name)
    assert (found.added, found.removed) == (1, 0)
    assert "compared as lines" in found.note


def test_a_torn_parquet_file_is_said(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", [(1, "a")])
    (tmp_path / "b.parquet").write_bytes(a.read_bytes()[:-10])
    with pytest.raises((SourceError, DataError)):
        diff_rows(a, tmp_path / "b.parquet")


def test_what_can_be_compared_is_known_by_name() -> None:
    assert [can_compare(n) for n in ("a.parquet", "b/C.CSV", "d.jsonl", "e.md", "f.jpg", "g")] == [
        *[True] * 4,
        *[False] * 2,
    ]


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from marrow.data.diff import diff_rows
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
for name, shift in (("a", 0), ("b", 5)):
    with pq.ParquetWriter(folder / f"{name}.parquet", pa.schema([("n", pa.int64())])) as writer:
        for start in range(0, rows, 1 << 18):
            numbers = np.arange(start + shift, min(start + (1 << 18), rows) + shift)
            writer.write_batch(pa.record_batch({"n": pa.array(numbers * 7919)}))
pa.default_memory_pool().release_unused()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = diff_rows(folder / "a.parquet", folder / "b.parquet", memory_bytes=8 << 20, spill=folder)
print(found.added, found.removed, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(3_000_000)],
        capture_output=True,
        text=True,
        check=True,
    )
    added, removed, mib = map(int, done.stdout.split())
    assert (added, removed) == (5, 5)
    # The keys alone are 2 x 3M x 24 bytes = 137 MiB; held are 8 MiB of them and a bucket of each side.
    assert mib < 100


def test_a_report_is_plain_data(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", [(1, "a")])
    found = diff_rows(a, write(tmp_path / "b.parquet", [(1, "b")]), key=["id"])
    assert isinstance(found, RowDiff)
    assert json.loads(json.dumps(found.as_dict()))["changed"] == 1
