import ast
import hashlib
import inspect
import io
import linecache
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from marrow.core.errors import SourceError
from marrow.data.sources.stdlib import SCHEMA, group_of, read_stdlib, stdlib_files, stdlib_folder


@pytest.fixture(scope="module")
def rows(stdlib_rows: Path) -> list[dict]:
    return pq.read_table(stdlib_rows / "rows-00000.parquet").to_pylist()


def test_docs_and_lines_equal_those_of_inspect(rows):
    import argparse
    import json.decoder

    found = {row["qualified_name"]: row for row in rows}
    for thing in (
        argparse.ArgumentParser,
        argparse.ArgumentParser.parse_args,
        json.decoder.JSONDecoder.decode,
    ):
        row = found[f"{thing.__module__}.{thing.__qualname__}"]
        assert row["doc"] == inspect.getdoc(thing) or thing.__doc__ is None
        assert row["file"] == Path(inspect.getsourcefile(thing)).relative_to(stdlib_folder()).as_posix()
        line = linecache.getline(str(stdlib_folder() / row["file"]), row["line"])
        assert thing.__name__ in line
    assert found["json.decoder.JSONDecoder.decode"]["signature"] == "(self, s, _w=WHITESPACE.match)"


def test_every_source_byte_is_in_once_and_is_that_of_the_file(rows):
    modules = [row for row in rows if row["kind"] == "module"]
    assert len({row["file"] for row in modules}) == len(modules)
    for row in modules[::25]:
        data = (stdlib_folder() / row["file"]).read_bytes()
        assert row["source"].encode() == data or not data.isascii()
        assert row["source_hash"] == hashlib.sha256(data).hexdigest()
    assert all(row["source"] is None for row in rows if row["kind"] in ("class", "function"))
    assert 5e6 < sum(len(row["source"]) for row in modules) < 30e6


def test_topics_equal_those_of_help_and_lie_where_they_say(rows):
    from pydoc_data.topics import topics

    got = {row["qualified_name"].removeprefix("topics."): row for row in rows if row["kind"] == "topic"}
    assert {name: row["source"] for name, row in got.items()} == topics
    line = linecache.getline(str(stdlib_folder() / got["assert"]["file"]), got["assert"]["line"])
    assert "'assert'" in line


def test_tests_packages_and_built_files_are_left_out(rows):
    files = {row["file"] for row in rows}
    assert not [f for f in files if {"test", "tests", "site-packages", "idle_test"} & set(f.split("/")[:-1])]
    assert not [f for f in files if "_sysconfigdata" in f]
    assert "unittest/mock.py" in files


def test_the_schema_says_what_each_column_holds(stdlib_rows):
    schema = pq.read_schema(stdlib_rows / "rows-00000.parquet")
    assert schema.names == SCHEMA.names
    assert all(schema.field(name).metadata[b"description"] for name in schema.names)


@pytest.mark.slow
def test_nothing_is_imported_or_run(tmp_path):
    """A module that would write a file when run is read; in a process of its own, no module is loaded."""
    for i in range(30):
        (tmp_path / f"m{i}.py").write_text(f"raise SystemExit({i})\n")
    program = (
        "import sys; from pathlib import Path; from marrow.data.sources.stdlib import *\n"
        "before = set(sys.modules)\n"
        f"root = Path({str(tmp_path)!r})\n"
        "n = sum(1 for f in stdlib_files(root) for _ in read_stdlib(f, root))\n"
        "n += sum(1 for f in stdlib_files()[:30] for _ in read_stdlib(f, stdlib_folder()))\n"
        "new = {m for m in set(sys.modules) - before if not m.startswith('encodings')}\n"
        "assert n > 60 and not new, new"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_interpreter_without_sources_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "os.py").write_text("")
    with pytest.raises(SourceError, match=r"no standard library in source form: 1 \.py files") as caught:
        stdlib_files(tmp_path)
    assert "data.source" in caught.value.hint
    with pytest.raises(SourceError):
        stdlib_files(tmp_path / "python311.zip")


def test_odd_files_still_give_their_module(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "python2.py").write_text("print 'hello'\n")
    (tmp_path / "nested.py").write_text(
        "try:\n    import a\nexcept ImportError:\n    def f(x: int) -> str:\n        def inner(): ...\n"
        "if True:\n    class C(dict, metaclass=type):\n        async def m(self, *, k=1): 'doc'\n"
    )
    (tmp_path / "broken.py").write_bytes(b"x = '\xff'\n")
    latin = list(read_stdlib(tmp_path / "latin.py", tmp_path))
    assert "é" in latin[0].source
    assert [row.kind for row in read_stdlib(tmp_path / "python2.py", tmp_path)] == ["module"]
    nested = [(r.qualified_name, r.kind, r.signature) for r in read_stdlib(tmp_path / "nested.py", tmp_path)]
    assert nested[1:] == [
        ("nested.f", "function", "(x: int) -> str"),
        ("nested.C", "class", "(dict, metaclass=type)"),
        ("nested.C.m", "function", "(self, *, k=1)"),
    ]
    with pytest.raises(SourceError, match="no Python text"):
        list(read_stdlib(tmp_path / "broken.py", tmp_path))


def test_a_private_twin_is_grouped_with_its_public_module():
    assert group_of("_pyio", "_pyio") == "io"
    assert group_of("json.decoder", "json.decoder") == group_of("json", "json") == "json"
    assert group_of("_py_abc", "_py_abc") == group_of("abc", "abc") == "abc"
    assert group_of("_threading_local", "x") == "threading_local"
    assert group_of("_collections_abc", "x").startswith("collections")
    assert group_of("", "topics.assert") == "topics.assert"


@pytest.mark.parametrize("version", ["3.12", pytest.param("3.13", marks=pytest.mark.slow)])
def test_other_versions_libraries_are_read_too(version):
    """Their grammar is not ours: a file with newer syntax keeps its module row."""
    found = sorted(Path(sys.base_prefix).parent.glob(f"{version}.*/lib/python{version}"))
    if not found:
        pytest.skip(f"no Python {version} beside this one")
    files = [
        f for i, f in enumerate(stdlib_files(found[0])) if i % 8 == 0 or f.name in ("abc.py", "topics.py")
    ]
    rows = [row for file in files for row in read_stdlib(file, found[0])]
    assert sum(row.kind == "topic" for row in rows) > 70
    assert sum(row.kind == "module" for row in rows) > 60
    assert ast.parse(io.StringIO(next(r.source for r in rows if r.qualified_name == "abc")).read())
