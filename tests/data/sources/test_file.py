"""Files of a source: known by their names, millions of them in little memory, each as it was given."""

import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.data.sources.file import (
    COMPRESSIONS,
    KNOWN,
    SUFFIXES,
    FileList,
    SourceFile,
    compression_of,
    format_of,
)

NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1, max_size=8
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", ["", *COMPRESSIONS])
def test_each_suffix_has_its_format_packed_or_not_in_any_case(suffix: str, packed: str) -> None:
    for name in (f"a{suffix}{packed}", f"deep/er.x/A{suffix.upper()}{packed.upper()}"):
        assert format_of(name) == SUFFIXES[suffix]
        assert compression_of(name) == COMPRESSIONS.get(packed, "")
    assert suffix in KNOWN


@pytest.mark.parametrize(
    "name", ["a", "a.bin", "a.csv.bin", "csv", ".csv", "a.csv/", "a.gz", ".gz", "a.csv.gz.gz", "a.zip", ""]
)
def test_other_names_have_none(name: str) -> None:
    assert format_of(name) is None


@given(NAMES, st.sampled_from(sorted(SUFFIXES)), st.sampled_from(["", *COMPRESSIONS]))
def test_only_the_end_of_a_name_counts(stem: str, suffix: str, packed: str) -> None:
    assert format_of(f"{stem}{suffix}{packed}") == SUFFIXES[suffix]
    assert format_of(f"{suffix[1:]}.{stem}.unknown{packed}") is None


@given(st.lists(st.tuples(NAMES, st.integers(0, 1 << 60), st.text(max_size=4))))
def test_files_come_back_as_they_were_given(found: list[tuple[str, int, str]]) -> None:
    found = [(f"{name}.csv", num_bytes, version) for name, num_bytes, version in found]
    files = FileList(found, base="/data/", root="s3://bucket", encoding="latin-1")
    assert len(files) == len(found)
    assert files.num_bytes == sum(num_bytes for _, num_bytes, _ in found)
    for file, (name, num_bytes, version) in zip(files, found, strict=True):
        assert file == SourceFile(
            f"/data/{name}", name, "csv", "", num_bytes, version, "s3://bucket", "latin-1"
        )
        assert file.is_whole
    assert list(files[1:3]) == list(files)[1:3]
    assert list(files[::-1]) == list(files)[::-1]


def test_an_index_counts_from_both_ends_and_not_beyond() -> None:
    files = FileList([("a.csv", 1, ""), ("b.txt", 2, "")])
    assert (files[-1].name, files[0].name) == ("b.txt", "a.csv")
    for index in (2, -3):
        with pytest.raises(IndexError):
            files[index]


def test_what_has_no_format_is_counted_by_its_end() -> None:
    found = [("a.csv", 1, ""), ("b.bin", 1, ""), ("c.bin", 1, ""), ("README", 1, ""), (".hidden", 1, "")]
    files = FileList(found)
    assert [file.name for file in files] == ["a.csv"]
    assert dict(files.skipped) == {".bin": 2, "no suffix": 2}


def test_a_declared_format_is_that_of_every_file() -> None:
    files = FileList([("a.bin", 1, ""), ("b.csv.gz", 1, ""), ("README", 1, "")], format="jsonl")
    assert [(file.format, file.compression) for file in files] == [
        ("jsonl", ""), ("jsonl", "gzip"), ("jsonl", ""),
    ]  # fmt: skip
    assert not files.skipped


@pytest.mark.parametrize(
    ("root", "path", "where"),
    [
        ("", "/data/a.csv", "/data/a.csv"),
        ("s3://bucket/rows", "a.csv", "s3://bucket/rows/a.csv"),
        ("s3://bucket/rows/", "a.csv", "s3://bucket/rows/a.csv"),
        ("https://host/rows?token=secret", "a.csv", "https://host/rows/a.csv"),
    ],
)
def test_messages_name_a_file_without_what_is_secret_in_its_address(root: str, path: str, where: str) -> None:
    assert SourceFile(path, "a.csv", "csv", "", 1, root=root).where == where


@pytest.mark.parametrize(
    ("start", "end", "whole"), [(0, -1, True), (0, 5, False), (5, -1, False), (5, 9, False)]
)
def test_a_range_of_a_file_is_not_the_whole(start: int, end: int, whole: bool) -> None:
    assert SourceFile("a", "a", "csv", "", 10, start=start, end=end).is_whole == whole


def test_a_file_takes_about_as_many_bytes_as_its_name() -> None:
    """The docstring's figure, with room for another Python: at most 200 bytes, for a name of 24."""
    count = 20_000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    files = FileList((f"part/{number:012d}.jsonl", number, "") for number in range(count))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(files) == count
    assert used / count < 200
    assert sys.getsizeof(files[0].name) > 60, "most of it is the name"
