import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_server import CREDENTIALS, Fault, FaultProxy
from range_server import RangeServer

from marrow.core.errors import (
    Conflict,
    DiskFull,
    NotPermitted,
    SourceError,
    Unreachable,
    UsageError,
)
from marrow.store.remote.client import PART_BYTES, Remote, is_url, split_url
from marrow.store.remote.objects import CHUNK_BYTES, _failure
from marrow.store.remote.retry import Patience, Retry

# The waits are short, the counts as they are by default: a test sees what a user would, sooner.
QUICK = Retry(attempts=6, first_delay_s=0.002, max_delay_s=0.02, total_s=20.0, timeout_s=5.0)
SHARED = [HealthCheck.function_scoped_fixture]
DATA = bytes(range(256)) * 40


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL that can be written to."""
    if request.param == "s3":
        return str(request.getfixturevalue("bucket")) + "/some/prefix"
    return str(tmp_path / "place")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RangeServer, Path]]:
    """An HTTP server and the folder whose files it serves."""
    folder = tmp_path_factory.mktemp("served")
    with RangeServer(folder) as server:
        yield server, folder


class Plain(BaseHTTPRequestHandler):
    """A server that knows no ranges; /chunked comes without a length."""

    protocol_version = "HTTP/1.1"
    paths: list[str] = []  # noqa: RUF012

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        if "chunked" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(DATA), 1000):
                part = DATA[start : start + 1000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if "torn" in self.path and self.paths.count(self.path) < 6:  # asked twice each time
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA)


@pytest.fixture
def plain() -> Iterator[str]:
    Plain.paths.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/d"
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_written_is_listed_described_read_and_deleted(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with Remote.open(place, QUICK) as remote:
        assert list(remote.list()) == []
        remote.write("b/two", tmp_path / "file")
        remote.write("a", b"one")
        remote.write("b.txt", b"")
        assert [file.name for file in remote.list()] == ["a", "b.txt", "b/two"]
        assert [file.name for file in remote.list("b")] == ["b.txt", "b/two"]
        assert [file.name for file in remote.list("b/")] == ["b/two"]
        assert list(remote.list("c")) == []
        file = remote.head("b/two")
        assert (file.name, file.num_bytes) == ("b/two", len(DATA)) and file.etag
        assert abs(file.modified_s - time.time()) < 60
        assert [remote.read(name) for name in ("a", "b.txt", "b/two")] == [b"one", b"", DATA]
        remote.delete("a")
        remote.delete("a")
        assert not remote.exists("a")
        assert remote.exists("b.txt")
        counters = remote.counters.as_dict()
        assert counters["bytes_written"] == counters["bytes_read"] == len(DATA) + 3


def test_writing_again_replaces_and_changes_the_etag(place: str) -> None:
    remote = Remote.open(place, QUICK)
    first = remote.write("a", b"one")
    second = remote.write("a", b"two")
    assert (first, second) == (first, remote.head("a").etag) and first != second
    assert remote.read("a") == b"two"


@settings(max_examples=12, suppress_health_check=SHARED, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/\\"), min_size=1))
def test_any_name_comes_back(bucket: str, name: str) -> None:
    if name in (".", "..") or len(name.encode()) > 200:
        return
    remote = Remote.open(f"{bucket}/{uuid.uuid4().hex}", QUICK)
    remote.write(f"f/{name}", b"here")
    assert [file.name for file in remote.list()] == [f"f/{name}"]
    assert remote.read(f"f/{name}") == b"here"


@pytest.mark.parametrize("door", ["s3", "folder", "http", "http without ranges", "http without length"])
def test_a_part_is_the_same_as_a_slice(door: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if door == "s3":
        url, name = request.getfixturevalue("bucket"), "a"
        Remote.open(url).write("a", DATA)
    elif door == "folder":
        url, name = tmp_path.as_uri(), "a"
        (tmp_path / "a").write_bytes(DATA)
    elif door == "http":
        server, folder = request.getfixturevalue("served")
        (folder / "a").write_bytes(DATA)
        url, name = server.url, "a"
    else:
        url, name = request.getfixturevalue("plain"), "chunked" if "length" in door else "a"
    size = len(DATA)
    remote = Remote.open(url, QUICK)
    for start in (0, 1, size - 1, size, size + 7):
        for length in (0, 100, size, None):
            end = None if length is None else start + length
            assert remote.read(name, start, length) == DATA[start:end], (start, length)


@pytest.mark.slow
def test_a_large_file_comes_in_parts_side_by_side(
    fault_proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    data = os.urandom(PART_BYTES * 3 + 12345)
    (tmp_path / "data").write_bytes(data)
    remote = Remote.open(bucket, QUICK)
    remote.write("large", tmp_path / "data")
    fault_proxy.seen.clear()
    assert remote.download("large", tmp_path / "new" / "copy") == len(data)
    assert (tmp_path / "new" / "copy").read_bytes() == data
    spans = sorted(seen.span or (0, 0) for seen in fault_proxy.seen)
    assert [start for start, _ in spans] == [0, PART_BYTES, PART_BYTES * 2, PART_BYTES * 3]


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1])
def test_a_file_of_any_size_is_downloaded(
    size: int, served: tuple[RangeServer, Path], tmp_path: Path
) -> None:
    server, folder = served
    data = os.urandom(size)
    (folder / "sized").write_bytes(data)
    assert Remote.open(server.url).download("sized", tmp_path / "copy") == size
    assert (tmp_path / "copy").read_bytes() == data


def test_a_download_from_a_server_without_ranges_or_length_is_whole(plain: str, tmp_path: Path) -> None:
    remote = Remote.open(plain, QUICK)
    for name in ("a", "chunked"):
        assert remote.download(name, tmp_path / name) == len(DATA)
        assert (tmp_path / name).read_bytes() == DATA


def test_an_answer_without_length_that_is_torn_is_asked_for_again(plain: str) -> None:
    remote = Remote.open(plain, QUICK)
    assert remote.read("torn-chunked") == DATA
    assert remote.counters.retries == 2


def test_the_query_of_a_signed_url_is_sent_but_never_shown(plain: str) -> None:
    url, name = split_url(f"{plain}/rows.csv?X-Signature=secret")
    remote = Remote.open(url, QUICK)
    assert remote.read(name) == DATA
    assert Plain.paths[-1] == "/d/rows.csv?X-Signature=secret"
    with pytest.raises(SourceError) as caught:
        remote.head(name)  # this server knows GET only
    assert "secret" not in str(caught.value) + remote.url


@pytest.mark.parametrize("condition", ["absent", "etag"])
def test_of_many_writers_at_once_one_wins(place: str, condition: str) -> None:
    remote = Remote.open(place, QUICK)
    etag = remote.write("ref", b"old") if condition == "etag" else ""

    def write(number: int) -> bool:
        try:
            remote.write("ref", b"%d" % number, if_absent=not etag, if_etag=etag)
        except Conflict:
            return False
        return True

    # A folder cannot promise the etag against writers in the very same moment; see `Remote.write`.
    alone = condition == "etag" and not place.startswith("s3")
    with ThreadPoolExecutor(1 if alone else 8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert remote.read("ref") == b"%d" % won.index(True)


def test_a_write_whose_answer_was_lost_has_not_lost_to_itself(fault_proxy: FaultProxy, bucket: str) -> None:
    fault_proxy.fault = lambda request, n: Fault(swallow=True) if n == 0 else None
    remote = Remote.open(bucket, QUICK)
    remote.write("ref", b"mine", if_absent=True)
    assert remote.read("ref") == b"mine"
    assert remote.counters.retries == 1
    lost = fault_proxy.count("PUT") + 1
    fault_proxy.fault = lambda request, n: Fault(swallow=True) if fault_proxy.count("PUT") == lost else None
    with pytest.raises(Conflict):
        remote.write("ref", b"other", if_absent=True)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=500), "500"),
        (Fault(status=503), "503"),
        (Fault(status=429), "429"),
        (Fault(cut_after=100), "cut"),
        (Fault(wait_s=0.7), "timeout"),
    ],
    ids=["500", "503", "429", "cut", "slow"],
)
def test_what_fails_for_a_moment_is_tried_again_and_counted(
    fault: Fault, kind: str, fault_proxy: FaultProxy, bucket: str
) -> None:
    Remote.open(bucket).write("a", DATA)
    fault_proxy.seen.clear()
    fault_proxy.fault = lambda request, n: fault if n < 2 else None
    remote = Remote.open(bucket, Retry(first_delay_s=0.002, timeout_s=0.3))
    assert remote.read("a") == DATA
    counters = remote.counters.as_dict()
    assert counters["retries"] == counters[f"error {kind}"] == 2


@pytest.mark.parametrize("verb", ["list", "head", "write", "delete"])
def test_every_verb_survives_a_storm_of_errors(verb: str, fault_proxy: FaultProxy, bucket: str) -> None:
    remote = Remote.open(bucket, QUICK)
    remote.write("a", DATA)
    fault_proxy.seen.clear()
    fault_proxy.fault = lambda request, n: [Fault(status=503), Fault(status=500), None][n % 3]
    if verb == "list":
        assert [file.name for file in remote.list()] == ["a"]
    elif verb == "head":
        assert remote.head("a").num_bytes == len(DATA)
    elif verb == "write":
        remote.write("b", DATA)
        fault_proxy.fault = lambda request, n: None
        assert remote.read("b") == DATA
    else:
        remote.delete("a")
        fault_proxy.fault = lambda request, n: None
        assert not remote.exists("a")
    assert remote.counters.retries >= 2


def test_a_cut_transfer_goes_on_where_it_broke_off(fault_proxy: FaultProxy, bucket: str) -> None:
    data = os.urandom(1 << 20)
    Remote.open(bucket).write("a", data)
    fault_proxy.seen.clear()
    fault_proxy.fault = lambda request, n: Fault(cut_after=200_000) if n < 3 else None
    # Fewer attempts than there are cuts: moving on is what keeps it from giving up.
    remote = Remote.open(bucket, Retry(attempts=3, first_delay_s=0.002))
    assert remote.read("a") == data
    starts = [int(seen.headers.get("range", "bytes=0-")[6:-1]) for seen in fault_proxy.seen]
    # Of the first request no more is lost than the piece that was not full yet; then pieces are small.
    assert starts[0] == 0 and starts[1] >= 200_000 - CHUNK_BYTES
    assert starts[2] > starts[1] + 100_000 and starts[3] > starts[2] + 100_000
    assert remote.counters.bytes_read == len(data)


def test_a_file_written_anew_meanwhile_is_never_mixed_with_the_old(
    fault_proxy: FaultProxy, bucket: str
) -> None:
    Remote.open(bucket).write("a", b"o" * (1 << 20))

    def replace(request: object, n: int) -> Fault | None:
        if n == 1:
            Remote.open(bucket).write("a", b"n" * (1 << 20))  # comes by here too, as number 2
        return Fault(cut_after=300_000) if n == 0 else None

    fault_proxy.seen.clear()
    fault_proxy.fault = replace
    remote = Remote.open(bucket, QUICK)
    with pytest.raises(Conflict, match="changed meanwhile"):
        remote.read("a")


def test_an_endpoint_that_is_down_for_a_while_is_waited_for(fault_proxy: FaultProxy, bucket: str) -> None:
    remote = Remote.open(bucket, Retry(attempts=50, first_delay_s=0.02, max_delay_s=0.05))
    remote.write("a", DATA)
    fault_proxy.down = True
    timer = threading.Timer(0.5, lambda: setattr(fault_proxy, "down", False))
    timer.start()
    assert remote.read("a") == DATA
    timer.join()
    assert remote.counters.retries >= 5


def test_an_endpoint_that_stays_down_is_an_error_in_bounded_time(
    fault_proxy: FaultProxy, bucket: str
) -> None:
    fault_proxy.fault = lambda request, n: Fault(status=503)
    remote = Remote.open(bucket, QUICK)
    with pytest.raises(Unreachable) as caught:
        remote.read("a/b")
    assert f"{bucket}/a/b" in caught.value.message and "6 tries" in caught.value.message
    assert len(fault_proxy.seen) == 6
    slow = Remote.open(bucket, Retry(attempts=10**6, first_delay_s=0.05, max_delay_s=0.1, total_s=0.5))
    start_s = time.monotonic()
    with pytest.raises(Unreachable):
        slow.read("a/b")
    assert time.monotonic() - start_s < 20  # about 0.5 here; all tries would take a day


def test_bytes_that_drip_are_no_progress(fault_proxy: FaultProxy, bucket: str) -> None:
    Remote.open(bucket).write("a", DATA)
    fault_proxy.seen.clear()
    fault_proxy.fault = lambda request, n: Fault(cut_after=1)
    remote = Remote.open(bucket, QUICK)
    with pytest.raises(Unreachable):
        remote.read("a")
    assert len(fault_proxy.seen) == QUICK.attempts


def test_nothing_listening_is_an_error_that_names_the_address(s3_environment: pytest.MonkeyPatch) -> None:
    s3_environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match="s3://place/a: nothing there takes a connection") as caught:
        Remote.open("s3://place", QUICK).read("a")
    assert caught.value.hint is not None and "AWS_ENDPOINT_URL" in caught.value.hint
    assert f"{QUICK.attempts} tries" in caught.value.message


def test_a_refused_connection_can_be_given_up_sooner_than_a_bad_answer(
    fault_proxy: FaultProxy, bucket: str, s3_environment: pytest.MonkeyPatch
) -> None:
    hasty = Retry(attempts=5, first_delay_s=0.01, max_delay_s=0.02, connect_attempts=2)
    fault_proxy.fault = lambda request, n: Fault(status=503)
    with pytest.raises(Unreachable, match=r"the server answers 503 .*5 tries"):
        Remote.open(bucket, hasty).read("a")
    s3_environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match=r"connection .*2 tries"):
        Remote.open("s3://place", hasty).read("a")


@pytest.mark.parametrize("verb", ["read", "head", "download"])
def test_what_is_not_there_is_named(place: str, verb: str, tmp_path: Path) -> None:
    remote = Remote.open(place, QUICK)
    arguments = (tmp_path / "target",) if verb == "download" else ()
    with pytest.raises(SourceError, match="no/such file"):
        getattr(remote, verb)("no/such file", *arguments)
    assert list(tmp_path.glob("**/.tmp-*")) == []
    assert not (tmp_path / "target").exists()
    assert remote.counters.retries == 0


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    with pytest.raises(SourceError, match="s3://no-such-bucket"):
        list(Remote.open("s3://no-such-bucket", QUICK).list())


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("verb", ["read", "head", "write", "delete", "list"])
def test_a_refusal_names_the_variables(fault_proxy: FaultProxy, bucket: str, status: int, verb: str) -> None:
    fault_proxy.fault = lambda request, n: Fault(status=status)
    remote = Remote.open(bucket, QUICK)
    arguments = ("a", b"x") if verb == "write" else ("a",)
    with pytest.raises(NotPermitted) as caught:
        list(getattr(remote, verb)(*arguments))
    assert bucket in caught.value.message
    assert caught.value.hint is not None and "AWS_ACCESS_KEY_ID" in caught.value.hint
    assert len(fault_proxy.seen) == 1


def test_a_download_that_fails_leaves_the_old_file(
    fault_proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    remote = Remote.open(bucket, QUICK)
    remote.write("a", DATA)
    (tmp_path / "a").write_bytes(b"old")
    fault_proxy.fault = lambda request, n: Fault(cut_after=50)
    with pytest.raises(Unreachable):
        remote.download("a", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_stops_a_download_with_one_error(
    small_disk: Callable[[str], Path], served: tuple[RangeServer, Path]
) -> None:
    server, folder = served
    disk = small_disk("256k")
    (folder / "big").write_bytes(bytes(1 << 20))
    with pytest.raises(DiskFull):
        Remote.open(server.url).download("big", disk / "big")
    assert list(disk.iterdir()) == []


def test_closing_ends_the_wait_of_another_thread(fault_proxy: FaultProxy, bucket: str) -> None:
    fault_proxy.fault = lambda request, n: Fault(status=503)
    remote = Remote.open(bucket, Retry(attempts=10**6, first_delay_s=30.0, max_delay_s=30.0))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(remote.read, "a")
        while not fault_proxy.seen:
            time.sleep(0.01)
        remote.close()
        with pytest.raises(Unreachable, match="closed"):
            answer.result(timeout=10)


def test_http_has_no_listing(served: tuple[RangeServer, Path]) -> None:
    with pytest.raises(UsageError, match="no listing"):
        list(Remote.open(served[0].url).list())


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("ftp://host/a", "ftp:// is no address"),
        ("s3:///a", "no bucket"),
        ("file://host/a", "another host"),
        ("http://", "no bucket or host"),
    ],
)
def test_what_is_no_address_is_refused_at_once(url: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Remote.open(url)


def test_an_endpoint_without_encryption_is_for_this_host_or_for_those_who_say_so(
    s3_environment: pytest.MonkeyPatch,
) -> None:
    s3_environment.setenv("AWS_ENDPOINT_URL", "http://user:word@storage.internal:9000")
    with pytest.raises(UsageError, match=r"storage\.internal:9000 is not encrypted") as caught:
        Remote.open("s3://place")
    assert "word" not in str(caught.value)
    s3_environment.setenv("AWS_ALLOW_HTTP", "true")
    Remote.open("s3://place").close()


def test_urls_are_told_from_paths() -> None:
    assert all(map(is_url, ["s3://a/b", "http://a", "https://a/b", "file:///a", "S3://a"]))
    assert not any(map(is_url, ["a", "/a/b", "a:b", "c:/a", "gs://a", "", "s3:/a"]))
    assert split_url("s3://bucket/a/b.csv") == ("s3://bucket/a/", "b.csv")
    assert split_url("https://h/b.csv?k=v/w") == ("https://h/?k=v/w", "b.csv")
    with pytest.raises(UsageError):
        split_url("https://host")


def test_a_name_of_a_host_that_nobody_has_is_not_tried_again() -> None:
    text = "Error performing GET: HTTP error\n\nDebug source:\nkind: Connect, dns error: "
    failure = _failure(ValueError(text + "Name or service not known"))
    assert (failure.kind, failure.transient) == ("dns", False)
    failure = _failure(ValueError(text + "Temporary failure in name resolution"))
    assert (failure.kind, failure.transient) == ("dns", True)


def test_a_remote_that_is_pickled_opens_anew(bucket: str) -> None:
    remote = Remote.open(bucket, QUICK)
    remote.write("a", b"x")
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.read("a") == b"x"
    assert copy.counters is not remote.counters and copy.retry == QUICK


CHILD = """
import os, signal, sys
from marrow.core.errors import UsageError
from marrow.store.remote.client import Remote
signal.alarm(60)
remote = Remote.open(sys.argv[1])
if sys.argv[2] == "after":
    assert remote.read("a") == b"x"
child = os.fork()
if child == 0:
    signal.alarm(20)
    try:
        print("read", remote.read("a").decode(), flush=True)
    except UsageError as error:
        print("refused", error.message, flush=True)
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert status == 0, status
print("parent", remote.read("a").decode())
"""


@pytest.mark.parametrize(("when", "expect"), [("before", "read x"), ("after", "refused process")])
def test_a_forked_child_reads_or_is_told_but_never_hangs(bucket: str, when: str, expect: str) -> None:
    Remote.open(bucket).write("a", b"x")
    command = [sys.executable, "-W", "ignore", "-c", CHILD, bucket, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith(expect) and lines[1] == "parent x"


@pytest.mark.slow
def test_a_spawned_child_reads_although_its_parent_did(bucket: str) -> None:
    remote = Remote.open(bucket, QUICK)
    remote.write("a", b"x")
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).read('a').decode())"
    command = [sys.executable, "-c", code, pickle.dumps(remote).hex()]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "x\n"


def test_local_files_never_load_the_object_store_client(tmp_path: Path) -> None:
    code = (
        "import sys; from marrow.store.remote.client import Remote; r = Remote.open(sys.argv[1]); "
        "r.write('a', b'x'); assert r.read('a') == b'x'; print('obstore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"


def test_credentials_stay_out_of_errors(fault_proxy: FaultProxy, bucket: str) -> None:
    fault_proxy.fault = lambda request, n: Fault(status=400)
    with pytest.raises(SourceError) as caught:
        Remote.open(bucket, QUICK).read("a")
    assert "Signature" not in str(caught.value)
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in str(caught.value).replace("test_", "")


def test_waits_grow_are_bounded_and_differ() -> None:
    retry = Retry(first_delay_s=1.0, max_delay_s=8.0)
    for failures, most_s in [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 8.0), (1000, 8.0)]:
        delays = [retry.delay_s(failures) for _ in range(400)]
        assert all(0 <= delay_s <= most_s for delay_s in delays)
        # Full jitter: spread over the whole range; 400 draws miss a tenth of it once in 10^18.
        assert min(delays) < 0.1 * most_s and max(delays) > 0.9 * most_s


def test_patience_counts_what_stands_still_only() -> None:
    patience = Patience(Retry(attempts=3, first_delay_s=0.0), threading.Event())
    for _ in range(5):
        assert patience.wait() and patience.wait()
        patience.progressed()
    assert [patience.wait() for _ in range(3)] == [True, True, False]
