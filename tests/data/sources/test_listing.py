import gzip
import time

import pytest
from ordinary import ordinary_user

from marrow.core.errors import NotPermitted, SourceError
from marrow.data.config import DataRecipe
from marrow.data.sources.file import format_of
from marrow.data.sources.listing import find_files, fingerprint
from marrow.data.sources.streams import lines_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "one.csv").write_text("a\n1\n")
    (tmp_path / "notes.MD").write_text("# Notes\n")
    (tmp_path / "image.png").write_bytes(b"png")
    (tmp_path / "Makefile").write_text("all:\n")
    (tmp_path / ".hidden.csv").write_text("a\n1\n")
    (tmp_path / "three.csv.gz").write_bytes(gzip.compress(b"a\n3\n"))
    return tmp_path


def test_a_folder_gives_its_known_files_in_order_and_counts_the_rest(folder):
    found = find_files(str(folder))
    assert [f.name for f in found.files] == ["b/two.jsonl", "notes.MD", "one.csv", "three.csv.gz"]
    assert [f.format for f in found.files] == ["jsonl", "text", "csv", "csv"]
    assert [f.compression for f in found.files] == ["", "", "", "gzip"]
    assert found.skipped == {".png": 1, "no suffix": 1}


def test_globs_and_single_files_name_the_same_files(folder, monkeypatch):
    assert [f.name for f in find_files(f"{folder}/*.csv").files] == ["one.csv"]
    assert [f.name for f in find_files(f"{folder}/**/*.*l").files] == ["b/two.jsonl"]
    assert [f.name for f in find_files(f"{folder}/one.csv").files] == ["one.csv"]
    monkeypatch.chdir(folder)
    assert [f.name for f in find_files("*.csv*").files] == ["one.csv", "three.csv.gz"]
    assert [f.format for f in find_files("Makefile", "text").files] == ["text"]


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("{}/one.cvs", "no file or folder", "did you mean"),
        ("{}/zzzzzzzzzz", "no file or folder", "looked in"),
        ("{}/*.zip", "matches no file", "looked for .csv"),
        ("{}/*.png", r"known format .*1 .png", "set data.format"),
        ("{}/empty", "is an empty folder", "looked for .csv"),
        ("{}/nothing.csv", "1 file of 0 bytes", "how the file was written"),
    ],
)
def test_a_source_that_gives_nothing_says_what_was_looked_for(folder, source, message, hint):
    (folder / "empty").mkdir()
    (folder / "nothing.csv").touch()
    with pytest.raises(SourceError, match=message) as caught:
        find_files(source.format(folder))
    assert hint in caught.value.hint


def test_a_file_without_permission_is_said(folder):
    (folder / "one.csv").chmod(0)
    from marrow.data.sources.delimited import Tally
    from marrow.data.sources.formats import read_file

    with ordinary_user(), pytest.raises(NotPermitted):
        list(read_file(find_files(str(folder / "one.csv")).files[0], Tally(), lambda _: None))


@pytest.mark.slow
def test_the_fingerprint_follows_the_files(folder):
    recipe = DataRecipe(source=str(folder))
    first = fingerprint(recipe)
    assert fingerprint(recipe) == first
    time.sleep(0.01)
    (folder / "one.csv").write_text("a\n2\n")
    second = fingerprint(recipe)
    assert second != first
    (folder / "four.csv").write_text("a\n1\n")
    assert fingerprint(recipe) not in (first, second)
    assert fingerprint(DataRecipe()) == fingerprint(DataRecipe())


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_lines_come_whole_and_overlong_ones_are_cut_and_marked(tmp_path, monkeypatch, block):
    monkeypatch.setattr("marrow.data.sources.streams.BLOCK_BYTES", block)
    path = tmp_path / "a"
    path.write_bytes(b"one\n\n" + b"x" * 30 + b"\ntwo\n" + b"y" * 10 + b"\nlast")
    with path.open("rb") as stream:
        lines = list(lines_of(stream, 10))
    assert [whole for _, whole in lines] == [True, True, False, True, True, True]
    assert [line for line, whole in lines if whole] == [b"one\n", b"\n", b"two\n", b"y" * 10 + b"\n", b"last"]
    assert lines[2][0].strip() == b"x" * 10


def test_formats_are_known_by_name(tmp_path):
    assert format_of(tmp_path / "a.TSV.GZ") == "csv"
    assert format_of(tmp_path / "a.tar.parquet") == "parquet"
    assert format_of(tmp_path / "a.exe") is None
    assert format_of(tmp_path / "README") is None
