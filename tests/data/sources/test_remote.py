"""Sources at S3 and http(s): the rows of the same files here, streamed, whole or an error."""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_server import CREDENTIALS, DIRECT, Fault, FaultProxy, S3Server
from range_server import RangeServer

from marrow.core.errors import MarrowError, NotPermitted, SourceError, Unreachable, UsageError
from marrow.data.config import DataRecipe
from marrow.data.engine import Processes
from marrow.data.ingest import ingest
from marrow.data.sources.delimited import Tally
from marrow.data.sources.formats import read_file
from marrow.data.sources.listing import find_files, fingerprint
from marrow.data.sources.remote import name_matcher
from marrow.data.sources.streams import open_bytes
from marrow.store.remote.client import Remote


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(server.url) as proxy:
        for name, value in {
            **CREDENTIALS,
            **DIRECT,
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ALLOW_HTTP": "true",
        }.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.csv").write_text("n,t\n" + "".join(f'{i},"text\n{i}"\n' for i in range(20_000)) + "broken\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"n": %d}\n' % i for i in range(500))))
    pq.write_table(pa.table({"n": range(5000), "t": ["x"] * 5000}), folder / "c.parquet", row_group_size=1000)
    with pa.ipc.new_file(str(folder / "d.arrow"), pa.schema([("n", pa.int64())])) as file:
        file.write_table(pa.table({"n": range(700)}))
    (folder / "deep" / "e.md").write_text("# A title\n\ntext\n")
    (folder / "image.png").write_bytes(b"png")
    (folder / ".hidden.csv").write_text("n\n1\n")
    return folder


@pytest.fixture
def bucket(server: S3Server, proxy: FaultProxy, folder: Path, request: pytest.FixtureRequest) -> str:
    """The folder's files below a prefix of a bucket of the test's own."""
    url = server.make_bucket(f"b{abs(hash(request.node.name)) % 10**12}") + "/some/prefix"
    with Remote.open(url) as remote:
        for path in folder.rglob("*"):
            if path.is_file():
                remote.write(path.relative_to(folder).as_posix(), path)
    proxy.seen.clear()
    return url


def test_a_bucket_gives_the_rows_of_the_folder(tmp_path, read_rows, folder, bucket):
    here, here_facts = read_rows(folder)
    there, facts = read_rows(bucket)
    assert there.equals(here)
    drop = ("source", "bytes_written")
    assert {k: v for k, v in facts.items() if k not in drop} == {
        k: v for k, v in here_facts.items() if k not in drop
    }
    assert facts["skipped_files"] == {".png": 1}
    quarantine = [(tmp_path / f"rows-{i}" / "quarantine.jsonl").read_bytes() for i in (0, 1)]
    assert quarantine[0] == quarantine[1]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.csv", ["a.csv"]),
        ("**/*.md", ["deep/e.md"]),
        ("[bc].*", ["b.jsonl.gz", "c.parquet"]),
        ("deep/", ["e.md"]),
        ("a.csv", ["a.csv"]),
    ],
)
def test_globs_folders_and_single_objects(bucket, pattern, names):
    assert [file.name for file in find_files(f"{bucket}/{pattern}").files] == names


def test_a_bucket_without_such_files_is_said(bucket):
    with pytest.raises(SourceError, match="matches no file"):
        find_files(f"{bucket}/*.xyz")
    with pytest.raises(SourceError, match=r"known format .*1 \.png"):
        find_files(f"{bucket}/*.png")
    with pytest.raises(SourceError, match="no such file or bucket"):
        find_files(f"{bucket}/nothing-here")


def test_the_fingerprint_follows_the_objects_and_not_the_reading(bucket, tmp_path, proxy):
    recipe = DataRecipe(source=bucket)
    first = fingerprint(recipe)
    assert fingerprint(recipe) == first
    assert proxy.count("GET", "a.csv") == 0, "a fingerprint reads no data"
    with Remote.open(bucket) as remote:
        remote.write("a.csv", b"n,t\n1,x\n")
    assert fingerprint(recipe) != first


def test_faults_on_the_way_change_nothing(tmp_path, read_rows, folder, bucket, proxy):
    broken: set[str] = set()

    def fault(seen, number):
        if seen.method == "GET" and "prefix" in seen.path and seen.path not in broken and number % 2:
            broken.add(seen.path)
            return Fault(status=503) if len(broken) % 2 else Fault(cut_after=100)
        return None

    proxy.fault = fault
    there, _ = read_rows(bucket)
    assert broken
    assert there.equals(read_rows(folder)[0])


def test_an_object_that_changes_while_it_is_read_is_an_error(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr("marrow.data.sources.remote.READ_AHEAD_BYTES", 1 << 20)
    with Remote.open(bucket) as remote:
        remote.write("big.csv", b"n,t\n" + b"1,some text\n" * 200_000)
        file = find_files(f"{bucket}/big.csv").files[0]
        with open_bytes(file) as stream:
            assert len(stream.read(1 << 20)) == 1 << 20
            remote.write("big.csv", b"n,t\n" + b"2,some text\n" * 200_000)
            with pytest.raises(MarrowError, match="changed"):
                stream.read()


def test_no_permission_is_said(bucket, proxy):
    proxy.fault = lambda seen, number: Fault(status=403)
    with pytest.raises(NotPermitted) as caught:
        find_files(bucket)
    assert "AWS_" in str(caught.value.hint)


def test_other_processes_open_the_bucket_anew(tmp_path, bucket, folder):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with Processes(2) as engine:
        ingest(DataRecipe(source=bucket), tmp_path / "one", engine=engine)
    ingest(DataRecipe(source=bucket), tmp_path / "two")
    for path in sorted((tmp_path / "two").iterdir()):
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()


def test_only_the_row_groups_that_are_asked_for_are_fetched(bucket, folder, proxy):
    """A Parquet file of which one row group is asked is not fetched as a whole."""
    table = pa.table({"n": range(200_000), "t": [str(i * 7919) for i in range(200_000)]})
    pq.write_table(
        table, folder / "big.parquet", row_group_size=10_000, compression="none", use_dictionary=False
    )
    with Remote.open(bucket) as remote:
        remote.write("big.parquet", folder / "big.parquet")
    proxy.seen.clear()
    file = replace(find_files(f"{bucket}/big.parquet").files[0], start=19, end=20, line=190_001)
    rows = [n for chunk in read_file(file, Tally(), print) for n in chunk.batch.column("n").to_pylist()]
    assert rows == list(range(190_000, 200_000))
    asked = sum(seen.span[1] - seen.span[0] for seen in proxy.seen if seen.method == "GET" and seen.span)
    assert asked < file.num_bytes * 1.2


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    with RangeServer(folder.parent) as server:
        yield f"{server.url}/source"


@pytest.mark.parametrize("name", ["a.csv", "b.jsonl.gz", "c.parquet", "d.arrow", "deep/e.md"])
def test_a_file_of_a_web_server_gives_the_rows_of_the_same_file_here(
    read_rows, folder, web, monkeypatch, name
):
    for key, value in DIRECT.items():
        monkeypatch.setenv(key, value)
    assert read_rows(f"{web}/{name}")[0].equals(read_rows(folder / name)[0])


def test_a_web_folder_and_a_missing_file_are_said(web, monkeypatch):
    for key, value in DIRECT.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SourceError, match="no such file"):
        find_files(f"{web}/missing.csv")
    with pytest.raises(UsageError):
        find_files("ftp://host/a.csv")


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.csv", ["a.csv"], ["d/a.csv", "a.csv.gz"]),
        ("**/*.csv", ["a.csv", "d/a.csv", "d/e/a.csv"], ["a.csv.gz"]),
        ("d/**", ["d/a", "d/e/a"], ["e/a"]),
        ("a?.csv", ["ab.csv"], ["a.csv", "a/.csv"]),
        ("[ab]*.csv", ["a1.csv", "b.csv"], ["c.csv"]),
        ("[!ab].csv", ["c.csv"], ["a.csv"]),
        ("[0-9].csv", ["3.csv"], ["a.csv"]),
        ("a+(b).csv", ["a+(b).csv"], ["aab.csv"]),
    ],
)
def test_names_match_as_a_glob_of_files_does(pattern, yes, no, tmp_path):
    matches = name_matcher(pattern)
    assert [name for name in (*yes, *no) if matches(name)] == yes
    for name in (*yes, *no):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(name))
    if "**" not in pattern or pattern.endswith("/*.csv"):
        found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.glob(pattern) if p.is_file()}
        assert found == set(yes)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gs://bucket/a.csv", "gs:// is no address"),
        ("ftp://host/a.csv", "ftp:// is no address"),
        ("http://127.0.0.1:1/*.csv", "is a pattern"),
    ],
)
def test_an_address_that_cannot_be_listed_or_read_is_refused_at_once(source: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        find_files(source)
    assert "s3://" in str(caught.value.hint)


def test_a_source_whose_server_is_not_there_is_told_soon_and_in_our_words() -> None:
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.csv"
        start_s = time.monotonic()
        with pytest.raises(Unreachable) as caught:
            find_files(url)
        assert time.monotonic() - start_s < 5  # 0.15 s of waits on average, at most 0.3; ten tries: 14
    assert caught.value.message.startswith(f"cannot look at {url}: nothing there takes a connection (3 tries")
    assert caught.value.hint and "server" in caught.value.hint
    assert "Generic" not in caught.value.message and "reqwest" not in caught.value.message
