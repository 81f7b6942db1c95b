"""Ingest where things go wrong: files that differ, are cut short, damaged, forbidden, many, or too large."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ordinary import ordinary_user

from marrow.core.errors import NotPermitted, SourceError
from marrow.data.config import DataRecipe
from marrow.data.engine import Threads
from marrow.data.ingest import ingest
from marrow.data.sources.listing import find_files, fingerprint
from marrow.data.tables import ParquetFile

PEAK = (  # on Linux ru_maxrss begins with the peak of the process that started this one; VmHWM does not
    "import re, resource; from pathlib import Path\n"
    "def peak():\n"
    "    status = Path('/proc/self/status')\n"
    "    return (int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) * 1024 if status.exists()\n"
    "            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
)


def run(program: str) -> str:
    """Run Python code in a process of its own and return what it printed."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Parquet of others


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_that_was_damaged_is_found_by_its_check_sum(tmp_path, read_rows, dictionary):
    path = tmp_path / "a.parquet"
    numbers = np.random.default_rng(0).integers(0, 2**60, 20_000)
    pq.write_table(
        pa.table({"n": numbers}),
        path,
        compression="none",
        use_dictionary=dictionary,
        write_page_checksum=True,
    )
    data = bytearray(path.read_bytes())
    place = data.find(numbers[10_000:10_001].tobytes())
    assert place > 0
    assert read_rows(path)[1]["rows"] == 20_000
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.parquet is no readable parquet file.*") as caught:
        read_rows(path)
    assert "again" in str(caught.value.hint)


def test_parquet_files_of_different_schemas_make_one_table(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    pq.write_table(pa.table({"a": pa.array([1], pa.int8()), "b": ["x"]}), source / "1.parquet")
    pq.write_table(pa.table({"b": ["y"], "c": [2.5]}), source / "2.parquet")
    pq.write_table(pa.table({"a": [2**40], "c": pa.array([1], pa.int32())}), source / "3.parquet")
    table, facts = read_rows(source)
    assert facts["columns"] == {"a": "int64", "b": "string", "c": "double"}
    assert table.select(["a", "b", "c"]).to_pylist() == [
        {"a": 1, "b": "x", "c": None},
        {"a": None, "b": "y", "c": 2.5},
        {"a": 2**40, "b": None, "c": 1.0},
    ]


@pytest.mark.slow
def test_a_column_of_the_wrong_type_in_one_of_many_files_loses_nothing(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    for i in range(1200):  # more than are looked into before the first pass
        (source / f"{i:04}.csv").write_text(f"n,t\n{i if i != 1100 else 'word'},x\n")
    table, facts = read_rows(source)
    assert facts["columns"]["n"] == "string"
    assert table["n"].to_pylist() == [str(i) if i != 1100 else "word" for i in range(1200)]
    facts = read_rows(source, types={"n": "int64"})[1]
    assert (facts["rows"], facts["broken_rows"]) == (1199, 1)


# Files


def test_a_file_that_may_not_be_read_is_said(tmp_path, read_rows):
    (tmp_path / "a.csv").write_text("n\n1\n")
    (tmp_path / "a.csv").chmod(0)
    with ordinary_user(), pytest.raises(NotPermitted, match=r"a\.csv"):
        read_rows(tmp_path / "a.csv")


def test_a_file_that_goes_away_or_shrinks_on_the_way_is_an_error_or_read_as_it_is(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.csv").write_text("n\n" + "1\n" * 1000)
    (tmp_path / "out").mkdir()

    def progress(done, total, unit, figures=None):
        (source / "b.csv").unlink(missing_ok=True)

    with pytest.raises(SourceError, match=r"b\.csv"):
        ingest(DataRecipe(source=str(source)), tmp_path / "out", progress)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("when", [0, 2**33, -1000])
def test_a_clock_that_is_wrong_does_no_harm(tmp_path, when):
    """Times are compared for equality only: in the future, at the epoch, or going backwards."""
    path = tmp_path / "a.csv"
    path.write_text("n\n1\n")
    recipe = DataRecipe(source=str(path))
    seen = {fingerprint(recipe)}
    os.utime(path, (when, when))
    seen.add(fingerprint(recipe))
    assert fingerprint(recipe) in seen
    os.utime(path, (when - 10, when - 10))
    seen.add(fingerprint(recipe))
    assert len(seen) == 3
    (tmp_path / "out").mkdir()
    assert ingest(recipe, tmp_path / "out")["rows"] == 1


def test_names_with_odd_characters_are_names(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    names = ["a b.csv", "ünïcode 漢.csv", "per%20cent.csv", "[brackets].csv", "#hash?.csv", "-dash.csv"]
    for name in names:
        (source / name).write_text("n\n1\n")
    assert sorted(read_rows(source)[0]["_file"].to_pylist()) == sorted(names)


def test_a_link_that_leads_in_a_circle_is_followed_once_at_most(tmp_path):
    source = tmp_path / "s"
    (source / "deep").mkdir(parents=True)
    (source / "a.csv").write_text("n\n1\n")
    (source / "deep" / "up").symlink_to(source)
    (source / "gone.csv").symlink_to(tmp_path / "nowhere")
    assert [file.name for file in find_files(str(source)).files] == ["a.csv"]


def many(folder: Path, count: int) -> None:
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:04}").mkdir(parents=True)
        (folder / f"{i // 1000:04}" / f"{i:07}.csv").write_bytes(b"n,t\n%d,x\n" % i)


@pytest.mark.slow
def test_many_tiny_files_cost_little_time_and_memory_each(tmp_path):
    """20,000 files of one row, beside 1,000, in processes of their own."""
    peaks, seconds = {}, {}
    for count in (1_000, 20_000):
        many(tmp_path / str(count), count)
        out = tmp_path / f"out-{count}"
        answer = run(
            f"{PEAK}import time; from marrow.data.config import DataRecipe\n"
            "from marrow.data.ingest import ingest\n"
            f"out = Path({str(out)!r}); out.mkdir(); start = time.process_time()\n"
            f"facts = ingest(DataRecipe(source={str(tmp_path / str(count))!r}), out)\n"
            f"assert facts['rows'] == facts['files'] == {count}, facts\n"
            "print(peak(), time.process_time() - start)"
        )
        peaks[count], seconds[count] = map(float, answer.split())
    # 120 bytes a file in the list, and a piece's worth of open work: 1 KiB a file is much.
    assert (peaks[20_000] - peaks[1_000]) / 19_000 < 1024 * 2
    # A file costs opening it three times and a block of one row: not more the more there are.
    assert seconds[20_000] / 20 < 3 * seconds[1_000]
    numbers = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "out-20000").glob("*.parquet"))])
    assert numbers["n"].to_pylist() == list(range(20_000))


def test_a_list_of_files_takes_little_memory_each(tmp_path):
    import tracemalloc

    from marrow.data.sources.file import FileList

    tracemalloc.start()
    files = FileList((f"folder/{i:07}.csv", 10, "1790000000000000000") for i in range(20_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(files) < 200, "10^6 files must fit: 200 MB"
    assert files[19_999].name == "folder/0019999.csv"


# Bounds


def test_no_row_group_is_above_the_size_asked_for(tmp_path):
    rng = random.Random(0)
    schema = pa.schema([("t", pa.string())])
    for batch_rows in (1, 7, 1000):
        path = tmp_path / f"{batch_rows}.parquet"
        texts = ["x" * rng.choice([1, 10, 100, 5000]) for _ in range(4000)]
        with ParquetFile(path, schema, 1 << 16) as file:
            for start in range(0, len(texts), batch_rows):
                file.write(
                    pa.RecordBatch.from_pydict({"t": texts[start : start + batch_rows]}, schema=schema)
                )
        got = pq.ParquetFile(path)
        sizes = [got.read_row_group(i).nbytes for i in range(got.num_row_groups)]
        assert max(sizes) <= 1 << 16
        assert sum(sizes[:-1]) / len(sizes[:-1]) > 0.9 * (1 << 16), "and they are well filled"
        assert pq.read_table(path)["t"].to_pylist() == texts


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_memory_stays_bounded_whatever_the_size(tmp_path, suffix, workers):
    """400 MB above the memory of the imports, peak resident set, in a process of its own: 300 MB of input."""
    line = "x" * 90
    path = tmp_path / f"a.{suffix}"
    with path.open("w") as file:
        file.write("n,t\n" if suffix == "csv" else "")
        for i in range(3_000_000 if suffix == "csv" else 1_000_000):
            file.write(f"{i},{line}\n" if suffix == "csv" else f'{{"n": {i}, "t": "{line}"}}\n')
    answer = run(
        f"{PEAK}from marrow.data.config import DataRecipe; from marrow.data.engine import Threads\n"
        "from marrow.data.ingest import ingest\n"
        f"out = Path({str(tmp_path)!r}) / 'out'; out.mkdir(); before = peak()\n"
        f"facts = ingest(DataRecipe(source={str(path)!r}), out, engine=Threads({workers}))\n"
        "print(facts['rows'], peak() - before)"
    )
    rows, above = map(int, answer.split())
    assert rows == (3_000_000 if suffix == "csv" else 1_000_000)
    assert above < 400e6


def test_broken_rows_in_every_block_are_all_kept_with_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    bad = {i for i in range(50_000) if i % 100 == 7}
    wide = [f"{i},x,y" if i % 200 == 7 else f'{i},"open,more' for i in sorted(bad)]
    lines = iter(wide)
    path.write_text(
        "n,t\n" + "".join((next(lines) if i in bad else f"{i},text") + "\n" for i in range(50_000))
    )
    (tmp_path / "out").mkdir()
    start = time.process_time()
    with Threads(2) as engine:
        facts = ingest(DataRecipe(source=str(path)), tmp_path / "out", engine=engine)
    assert time.process_time() - start < 10, "a broken row does not make the others slow: about 0.2 s"
    broken = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert facts["broken_rows"] == len(broken) == len(bad)
    assert {int(b["text"].partition(",")[0]) for b in broken} == bad
    assert [b["line"] for b in broken] == [i + 2 for i in sorted(bad)]
    rows = pq.read_table(next((tmp_path / "out").glob("rows-*.parquet")))
    assert rows["n"].to_pylist() == [i for i in range(50_000) if i not in bad]
