"""Plain http straight into the caller's memory: the same bytes and errors as by obstore."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_server import Fault, FaultProxy
from range_server import RangeServer

from marrow.core.errors import Conflict, NotPermitted, SourceError, Unreachable
from marrow.store.remote.client import Remote
from marrow.store.remote.retry import Retry

QUICK = Retry(attempts=6, first_delay_s=0.002, max_delay_s=0.02, total_s=20.0, timeout_s=5.0)
DATA = os.urandom(300_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RangeServer, Path]]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "a b").write_bytes(DATA)
    (folder / "empty").write_bytes(b"")
    with RangeServer(folder) as server:
        yield server, folder


@pytest.fixture
def proxy(served: tuple[RangeServer, Path]) -> Iterator[FaultProxy]:
    with FaultProxy(served[0].url) as proxy:
        yield proxy


def fetch(remote: Remote, name: str, start: int = 0, length: int | None = None, size: int = 4096) -> bytes:
    """Read through one buffer; each piece is copied before the next is asked for."""
    scratch = memoryview(bytearray(size))
    return b"".join([bytes(piece) for piece in remote.stream(name, start, length, scratch=scratch)])


def agents(proxy: FaultProxy) -> list[str]:
    return [seen.headers["user-agent"].split("/")[0] for seen in proxy.seen]


@given(
    start=st.integers(0, len(DATA) + 10),
    length=st.none() | st.integers(0, len(DATA)),
    size=st.sampled_from([1000, 4096, 70_000, 1 << 20]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_through_any_buffer_is_what_the_file_has(
    served: tuple[RangeServer, Path], start: int, length: int | None, size: int
) -> None:
    with Remote.open(served[0].url, QUICK) as remote:
        end = None if length is None else start + length
        assert fetch(remote, "a b", start, length, size) == DATA[start:end]


def test_pieces_lie_in_the_callers_memory(proxy: FaultProxy) -> None:
    scratch = memoryview(bytearray(1 << 16))
    with Remote.open(proxy.url, QUICK) as remote:
        for piece in remote.stream("a b", scratch=scratch):
            assert isinstance(piece, memoryview) and piece.obj is scratch.obj
    assert agents(proxy) == ["marrow"]


def test_an_empty_file_and_many_files_over_few_connections(served: tuple[RangeServer, Path]) -> None:
    with Remote.open(served[0].url, QUICK) as remote, ThreadPoolExecutor(8) as pool:
        assert fetch(remote, "empty") == b""
        assert all(data == DATA for data in pool.map(lambda _: fetch(remote, "a b"), range(64)))
        assert remote.counters.requests == 65 and remote.counters.retries == 0


def test_a_signed_request_to_s3_is_accepted(fault_proxy: FaultProxy, bucket: str) -> None:
    with Remote.open(f"{bucket}/some/prefix") as remote:
        remote.write("x/y z+ü.bin", DATA)
        fault_proxy.seen.clear()
        assert fetch(remote, "x/y z+ü.bin") == DATA
        assert fetch(remote, "x/y z+ü.bin", 100, 50) == DATA[100:150]
        with pytest.raises(SourceError, match="404"):
            fetch(remote, "absent")
    assert agents(fault_proxy) == ["marrow"] * 3


def test_a_file_written_anew_meanwhile_is_a_conflict(fault_proxy: FaultProxy, bucket: str) -> None:
    with Remote.open(bucket) as remote:
        etag = remote.write("a", b"old" * 1000)
        remote.write("a", b"new" * 1000)
        fault_proxy.seen.clear()
        with pytest.raises(Conflict):
            list(remote.stream("a", etag=etag, scratch=memoryview(bytearray(4096))))
    assert agents(fault_proxy) == ["marrow"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_status_that_passes_is_tried_again(proxy: FaultProxy, status: int) -> None:
    proxy.fault = lambda request, n: Fault(status=status) if n < 3 else None
    with Remote.open(proxy.url, QUICK) as remote:
        assert fetch(remote, "a b") == DATA
        assert remote.counters.retries == 3 and remote.counters.errors == {str(status): 3}
    assert agents(proxy) == ["marrow"] * 4


def test_a_cut_transfer_goes_on_with_the_very_next_byte(proxy: FaultProxy) -> None:
    proxy.fault = lambda request, n: Fault(cut_after=70_000) if n < 3 else None
    with Remote.open(proxy.url, QUICK) as remote:
        assert fetch(remote, "a b", size=1 << 20) == DATA
        assert remote.counters.bytes_read == len(DATA), "no byte came twice"
    spans = [seen.headers.get("range", "bytes=0-") for seen in proxy.seen]
    assert spans == ["bytes=0-", "bytes=70000-", "bytes=140000-", "bytes=210000-"]


def test_a_server_that_stands_still_is_a_timeout(proxy: FaultProxy) -> None:
    proxy.fault = lambda request, n: Fault(swallow=True)
    retry = Retry(attempts=2, first_delay_s=0.002, total_s=5.0, timeout_s=0.2)
    with Remote.open(proxy.url, retry) as remote, pytest.raises(Unreachable):
        fetch(remote, "a b")
    assert remote.counters.errors


@pytest.mark.parametrize(("status", "kind"), [(404, SourceError), (403, NotPermitted)])
def test_a_refusal_is_said_once(proxy: FaultProxy, status: int, kind: type[Exception]) -> None:
    proxy.fault = lambda request, n: Fault(status=status)
    with Remote.open(proxy.url, QUICK) as remote, pytest.raises(kind):
        fetch(remote, "a b")
    assert len(proxy.seen) == 1


def test_what_is_not_fit_for_it_goes_through_obstore(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fault = lambda request, n: Fault(status=302) if n == 0 else None
    with Remote.open(proxy.url, QUICK) as remote:
        assert fetch(remote, "a b") == DATA
        assert fetch(remote, "a b") == DATA
    assert agents(proxy) == ["marrow", "object_store", "object_store"], "asked once, then left alone"
    monkeypatch.setenv("http_proxy", proxy.url)  # as a proxy, it is asked for whole addresses
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    proxy.seen.clear()
    with Remote.open("http://example.invalid", QUICK) as remote, pytest.raises((SourceError, Unreachable)):
        fetch(remote, "a b")
    assert "marrow" not in agents(proxy)


def test_an_idle_connection_that_the_server_closed_is_no_error(proxy: FaultProxy) -> None:
    with Remote.open(proxy.url, QUICK) as remote:
        assert fetch(remote, "a b") == DATA
        backend = remote._backend
        direct = backend._direct  # type: ignore[attr-defined]
        for connection in direct._idle:
            connection.shutdown(2)
        assert fetch(remote, "a b") == DATA
        assert remote.counters.retries == 0


def test_a_reader_that_stops_early_leaves_no_connection_in_use(proxy: FaultProxy) -> None:
    with Remote.open(proxy.url, QUICK) as remote:
        pieces = remote.stream("a b", scratch=memoryview(bytearray(4096)))
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert fetch(remote, "a b") == DATA, "what was left of the first answer is not in it"
