"""Cutting a source into pieces, and the same bytes whoever reads them."""

import csv
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.core.errors import SourceError
from marrow.data.config import DataRecipe
from marrow.data.engine import INLINE, Engine, Processes, Threads
from marrow.data.ingest import ingest
from marrow.data.sources import pieces
from marrow.data.sources.delimited import Tally
from marrow.data.sources.formats import read_file
from marrow.data.sources.listing import find_files
from marrow.data.sources.pieces import FILE_BYTES, pieces_of, ranges_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 KiB, so that files of some 100 KiB are cut."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16 << 10)
    monkeypatch.setattr(pieces, "_STEP_BYTES", 2 << 10)
    monkeypatch.setattr(pieces, "_SHORT_BYTES", 64)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def write_csv(path: Path, num_rows: int = 2000, mark: bytes = b"") -> None:
    """Rows with quotes and line ends in them, and some that are broken."""
    rng = random.Random(0)
    with path.open("wb") as file:
        file.write(mark + b"n,text,f\r\n")
        for i in range(num_rows):
            text = rng.choice(["plain", 'a "quoted"', "two\nlines", "a,b", "", "café"]) * rng.randrange(1, 9)
            quoted = text.replace('"', '""')
            line = f'{i},"{quoted}",{i / 7:.3f}\r\n' if rng.random() < 0.7 else f"{i},plain {i},{i / 3}\n"
            file.write(b"broken\n" if i % 97 == 5 else b"1,\xff,2\n" if i % 89 == 3 else line.encode())


def rows_of(file: object) -> tuple[list[object], list[int], list[tuple[int, str]]]:
    rows: list[object] = []
    lines: list[int] = []
    broken: list[tuple[int, str]] = []
    for chunk in read_file(file, Tally(), lambda b: broken.append((b.line, b.reason))):
        rows += chunk.batch.to_pylist()
        lines += chunk.lines.tolist()
    return rows, lines, broken


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_ranges_hold_the_rows_of_the_whole_once_and_in_order(tmp_path, small, name, mark):
    path = tmp_path / name
    if name == "a.csv":
        write_csv(path, mark=mark)
    elif name == "a.jsonl":
        lines = (b'{"n": %d}\n\n' % i if i % 31 else b"{\r\n" for i in range(9000))
        path.write_bytes(mark + b"".join(lines))
    else:
        table = pa.table({"n": np.random.default_rng(0).random(20_000)})
        pq.write_table(table, path, row_group_size=500)
    file = find_files(str(path)).files[0]
    ranges = list(ranges_of(file))
    assert len(ranges) >= 4
    parts = [rows_of(one) for one in ranges]
    whole = rows_of(file)
    for index in range(3):
        assert [x for part in parts for x in part[index]] == whole[index]
    assert ranges[0].start == 0 and ranges[-1].end == -1
    assert [one.end for one in ranges[:-1]] == [one.start for one in ranges[1:]]


def test_a_quote_that_is_open_for_long_leaves_the_rest_in_one_range(tmp_path, small):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "1,x\n" * 5000 + '2,"' + "inside\n" * 20_000 + '"\n3,y\n')
    file = find_files(str(path)).files[0]
    ranges = list(ranges_of(file))
    assert [row for one in ranges for row in rows_of(one)[0]] == rows_of(file)[0]


@pytest.mark.parametrize(
    "data", [b"a,b\n" + b'1,"x\n' * 30_000, b"a,b\r" + b"1,x\r" * 30_000, b"a\n" + b"x" * 200_000]
)
def test_odd_files_are_cut_without_loss(tmp_path, small, data):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    file = find_files(str(path)).files[0]
    parts = [rows_of(one) for one in ranges_of(file)]
    rows = sum(len(part[0]) + len(part[2]) for part in parts)
    assert rows >= 1
    if b'"' not in data:
        whole = rows_of(file)
        assert [x for part in parts for x in part[1]] == whole[1]


def test_small_files_share_a_piece_and_each_costs_its_opening(tmp_path, small):
    for i in range(100):
        (tmp_path / f"{i:03}.csv").write_text("a\n1\n")
    found = find_files(str(tmp_path))
    cut = list(pieces_of(iter(found.files)))
    assert [file.name for piece in cut for file in piece.files] == [f.name for f in found.files]
    assert len(cut) == 100 // (((16 << 10) + FILE_BYTES) // (FILE_BYTES + 4))
    assert [piece.index for piece in cut] == list(range(len(cut)))


@pytest.fixture(params=["threads", "processes"])
def engine(request: pytest.FixtureRequest):
    with Threads(3) if request.param == "threads" else Processes(2) as engine:
        yield engine


def source_of_all(folder: Path) -> Path:
    folder.mkdir()
    write_csv(folder / "b.csv")
    write_csv(folder / "c.csv", num_rows=10)
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"n": i, "text": f"t{i}"}) + "\n" for i in range(4000))
    )
    (folder / "d.txt").write_text("some text\n\n" * 9000)
    (folder / "e.csv").write_text("n\nlate word\n")
    pq.write_table(pa.table({"n": range(3000)}), folder / "f.parquet")
    return folder


def test_rows_are_the_same_bytes_whatever_the_engine(tmp_path, engine: Engine):
    source = source_of_all(tmp_path / "source")
    recipe = DataRecipe(source=str(source), row_group_bytes=1 << 16)
    facts = []
    for name, one in (("inline", INLINE), ("engine", engine)):
        (tmp_path / name).mkdir()
        facts.append(ingest(recipe, tmp_path / name, engine=one))
    assert facts[0] == facts[1]
    assert digest(tmp_path / "inline") == digest(tmp_path / "engine")
    assert facts[0]["broken_rows"] > 20


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_and_whatever_the_workers_where_files_are_cut(tmp_path, small, workers):
    source = source_of_all(tmp_path / "source")
    recipe = DataRecipe(source=str(source), row_group_bytes=1 << 16)
    for name, one in (("inline", INLINE), ("threads", Threads(workers))):
        (tmp_path / name).mkdir()
        ingest(recipe, tmp_path / name, engine=one)
        one.close()
    assert digest(tmp_path / "inline") == digest(tmp_path / "threads")
    assert len(list((tmp_path / "inline").glob("rows-*.parquet"))) > 5
    rows = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "inline").glob("rows-*.parquet"))])
    assert rows["_file"].to_pylist() == sorted(rows["_file"].to_pylist())


def test_a_file_without_c_gives_the_same_bytes(tmp_path, small, monkeypatch):
    source = source_of_all(tmp_path / "source")
    for name in ("fast", "slow"):
        (tmp_path / name).mkdir()
        ingest(DataRecipe(source=str(source)), tmp_path / name)
        monkeypatch.setattr("marrow.kernels.rows.scan_csv._library", lambda: None)
    assert digest(tmp_path / "fast") == digest(tmp_path / "slow")


def test_progress_of_many_workers_never_goes_back(tmp_path, small):
    source = source_of_all(tmp_path / "source")
    (tmp_path / "out").mkdir()
    seen: list[float] = []
    with Threads(3) as engine:
        ingest(
            DataRecipe(source=str(source)),
            tmp_path / "out",
            lambda done, *_: seen.append(done),
            engine=engine,
        )
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in source.iterdir())


def test_an_error_of_a_piece_leaves_no_rows_behind(tmp_path, small, engine: Engine):
    source = source_of_all(tmp_path / "source")
    (source / "z.parquet").write_bytes(b"PAR1 is no table")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match=r"z\.parquet") as caught:
        ingest(DataRecipe(source=str(source)), tmp_path / "out", engine=engine)
    assert caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_is_mostly_broken_only_as_a_whole(tmp_path, small, read_rows):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "1,x\n" * 12_000 + "broken\n" * 9_000)
    table, facts = read_rows(path)
    assert (table.num_rows, facts["broken_rows"]) == (12_000, 9_000)
    path.write_text("a,b\n" + "1,x\n" * 9_000 + "broken\n" * 12_000)
    with pytest.raises(SourceError, match="12000 of 21000 rows are broken"):
        read_rows(path)


def test_the_header_of_a_cut_file_is_read_once(tmp_path, small, read_rows):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "text"])
        writer.writerows((i, "x" * 50) for i in range(3000))
    table, facts = read_rows(path)
    assert table["n"].to_pylist() == list(range(3000))
    assert table["_row"].to_pylist() == list(range(2, 3002))
    assert facts["columns"] == {"n": "int64", "text": "string"}
