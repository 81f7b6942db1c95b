"""Odd answers to a GET: each is taken to the byte, tried again, said once, or left to the other client.

A server of this file plays what is written here, to the byte and in the pieces given, and keeps what it
was asked.
"""

import itertools
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.store.remote.backend import TRANSIENT, Failure, Opened
from marrow.store.remote.direct import MOST_HEAD_BYTES, Direct, Unfit

BODY = bytes(range(256)) * 20
CUT = b"CUT"  # ends the connection here


class Script:
    """A server that gives the n-th request the n-th answer, whatever is asked; pieces leave one by one."""

    def __init__(self) -> None:
        self.answers: list[Sequence[bytes]] = []
        self.asked: list[str] = []
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._opened: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.num_connections += 1
            self._opened.append(connection)
            try:
                self._serve(connection)
            except OSError:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """One connection at a time: who waits for another has let go of the one before."""
        while True:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                got = connection.recv(65536)
                if not got:
                    connection.close()
                    return
                head += got
            self.asked.append(head.decode())
            for piece in self.answers.pop(0):
                if piece == CUT:
                    connection.close()
                    return
                connection.sendall(piece)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._opened:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it was closed already
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


@pytest.fixture
def direct(script: Script) -> Iterator[Direct]:
    direct = Direct(lambda name: f"{script.url}/{name}", 0.5, 5.0)
    yield direct
    direct.close()


def head(status: str = "200 OK", length: int | str = len(BODY), *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {length}", *lines, "", ""]).encode("latin-1")


def opened(
    direct: Direct, start: int = 0, end: int | None = None, *, size: int = 8192, careful: bool = False
) -> Opened:
    return direct.open("name", start, end, "", memoryview(bytearray(size)), careful=careful)


def whole(opened: Opened) -> bytes:
    return b"".join([bytes(piece) for piece in opened.chunks])


@given(
    cuts=st.lists(st.integers(0, len(BODY) + 60), max_size=8),
    size=st.integers(100, 8192),
    careful=st.booleans(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_an_answer_is_cut_on_its_way_the_bytes_are_the_same(
    script: Script, direct: Direct, cuts: list[int], size: int, careful: bool
) -> None:
    answer = head() + BODY
    edges = [0, *sorted(cuts), len(answer)]
    script.answers = [[answer[low:high] for low, high in itertools.pairwise(edges) if low < high]]
    found = opened(direct, size=size, careful=careful)
    assert whole(found) == BODY
    assert found.file.num_bytes == len(BODY)
    assert script.num_connections == 1, "one that was read to the end is used again"


def test_pieces_fill_the_buffer_each_time_but_the_last(script: Script, direct: Direct) -> None:
    script.answers = [[head() + BODY[:100], BODY[100:3000], BODY[3000:]]]
    sizes = [len(piece) for piece in opened(direct, size=1000).chunks]
    assert sum(sizes) == len(BODY)
    assert sizes[1:-1] == [1000] * (len(sizes) - 2) and sizes[0] <= 1000, "the head is no part of the first"


def test_what_is_asked_is_plain_http(script: Script) -> None:
    direct = Direct(lambda name: f"{script.url}/a%20b/{name}?x=1&y", 0.5, 5.0)
    script.answers = [
        [head("206 Partial Content", 10, "Content-Range: bytes 5-14/5120") + BODY[5:15]],
        [head("206 Partial Content", 20, "Content-Range: bytes 5100-5119/5120") + BODY[5100:]],
        [head() + BODY],
    ]
    scratch = memoryview(bytearray(8192))
    for start, end, etag in ((5, 15, '"abc"'), (5100, None, 'W/"abc"'), (0, None, "")):
        found = direct.open("n", start, end, etag, scratch)
        assert whole(found) == BODY[start:end] and found.file.num_bytes == 5120
    direct.close()
    lines = [asked.split("\r\n") for asked in script.asked]
    assert {one[0] for one in lines} == {"GET /a%20b/n?x=1&y HTTP/1.1"}
    assert [[line for line in one if line.startswith("Range")] for one in lines] == [
        ["Range: bytes=5-14"],
        ["Range: bytes=5100-"],
        [],
    ]
    # A weak etag says nothing of bytes, and no server matches one.
    assert [any(line == 'If-Match: "abc"' for line in one) for one in lines] == [True, False, False]
    assert all(f"Host: {script.url.removeprefix('http://')}" in one for one in lines)


@pytest.mark.parametrize("status", sorted(TRANSIENT))
def test_a_status_that_may_pass_is_transient(script: Script, direct: Direct, status: str) -> None:
    script.answers = [[head(f"{status} Whatever", 0)]]
    with pytest.raises(Failure) as caught:
        opened(direct)
    assert (caught.value.kind, caught.value.transient) == (status, True)


@pytest.mark.parametrize("status", ["401", "403", "404", "410", "412"])
def test_a_refusal_is_final(script: Script, direct: Direct, status: str) -> None:
    script.answers = [[head(f"{status} No", 0)]]
    with pytest.raises(Failure) as caught:
        opened(direct)
    assert (caught.value.kind, caught.value.transient) == ("changed" if status == "412" else status, False)


@pytest.mark.parametrize("status", ["401", "403", "410"])
def test_what_a_signature_may_have_caused_is_asked_again_by_the_other(script: Script, status: str) -> None:
    direct = Direct(lambda name: f"{script.url}/{name}?X-Amz-Signature=abc", 0.5, 5.0)
    script.answers = [[head(f"{status} No", 0)], [head("404 Not Found", 0)]]
    with pytest.raises(Unfit):
        opened(direct)
    with pytest.raises(Failure, match="404"):
        opened(direct)


@pytest.mark.parametrize(
    "answer",
    [
        head("302 Found", 0, "Location: http://127.0.0.1/elsewhere"),
        head("204 No Content", 0),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        head("200 OK", 5, "Transfer-Encoding: chunked"),
        head("200 OK", 5, "Content-Encoding: gzip"),
        head("200 OK", "-5"),
        head("200 OK", "5, 5"),
        head("200 OK", 5, "Last-Modified: last Tuesday"),
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 fine\r\nContent-Length: 5\r\n\r\nhello",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MOST_HEAD_BYTES,
    ],
    ids=lambda answer: answer[:40].decode(),
)
def test_an_answer_that_is_nothing_for_here_is_left_to_the_other(
    script: Script, direct: Direct, answer: bytes
) -> None:
    script.answers = [[answer], [head() + BODY]]
    with pytest.raises(Unfit):
        opened(direct, size=MOST_HEAD_BYTES + 100)
    assert whole(opened(direct)) == BODY, "and its connection is not used again"
    assert script.num_connections == 2


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Content-Range: bytes 10-18/5120",
        "Content-Range: bytes 11-20/5120",
        "Content-Range: bytes 10-19/*",
        "Content-Range: lines 10-19/5120",
        "Content-Range: bytes */5120",
    ],
)
def test_another_range_than_asked_for_is_never_taken(script: Script, direct: Direct, line: str) -> None:
    script.answers = [[head("206 Partial Content", 10, *filter(None, [line])) + BODY[10:20]]]
    with pytest.raises(Unfit):
        opened(direct, 10, 20)


def test_a_server_that_knows_no_ranges_is_left_to_the_other(script: Script, direct: Direct) -> None:
    script.answers = [[head() + BODY]]
    with pytest.raises(Unfit):
        opened(direct, 10, 20)


def test_names_of_headers_have_no_case_and_values_no_edges(script: Script, direct: Direct) -> None:
    lines = ["CONTENT-length:   5  ", 'eTaG:\t"x"', "Last-Modified: Thu, 01 Jan 1970 00:01:40 GMT"]
    script.answers = [["\r\n".join(["HTTP/1.1 200", *lines, "", "hello"]).encode()]]
    found = opened(direct)
    assert whole(found) == b"hello"
    assert (found.file.etag, found.file.modified_s) == ('"x"', 100.0)


@pytest.mark.parametrize("cut_at", [0, 1, 20, len(head())])
def test_a_cut_before_or_in_the_head_is_transient(script: Script, direct: Direct, cut_at: int) -> None:
    script.answers = [[head()[:cut_at], CUT]]
    with pytest.raises(Failure) as caught:
        whole(opened(direct))
    assert (caught.value.kind, caught.value.transient) == ("cut", True)


@pytest.mark.parametrize("size", [1000, 8192])
@pytest.mark.parametrize("num_bytes", [1, 999, 1000, 1001, len(BODY) - 1])
def test_all_that_came_before_a_cut_is_given(
    script: Script, direct: Direct, num_bytes: int, size: int
) -> None:
    script.answers = [[head() + BODY[:num_bytes], CUT]]
    got: list[bytes] = []
    chunks = opened(direct, size=size).chunks
    with pytest.raises(Failure, match="broke off") as caught:
        got.extend(map(bytes, chunks))
    assert b"".join(got) == BODY[:num_bytes] and caught.value.transient


def test_bytes_beyond_the_length_are_not_of_the_file(script: Script, direct: Direct) -> None:
    script.answers = [[head("200 OK", 10) + BODY]]
    assert whole(opened(direct)) == BODY[:10]


@pytest.mark.parametrize("before", [b"", head()[:30], head(), head() + BODY[:500]])
def test_a_server_that_falls_silent_is_a_timeout(script: Script, before: bytes) -> None:
    direct = Direct(lambda name: f"{script.url}/{name}", 0.02, 5.0)
    script.answers = [[before]]
    with pytest.raises(Failure) as caught:
        whole(opened(direct))
    assert (caught.value.kind, caught.value.transient) == ("timeout", True)


def test_a_server_that_drips_is_out_of_time_as_a_whole(script: Script) -> None:
    direct = Direct(lambda name: f"{script.url}/{name}", 0.5, 0.05)

    class Dripping(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            yield head()
            for at in range(0, len(BODY), 10):
                time.sleep(0.005)
                yield BODY[at : at + 10]

    script.answers = [Dripping()]
    start_s = time.monotonic()
    with pytest.raises(Failure) as caught:
        whole(opened(direct, careful=True))
    assert caught.value.kind == "timeout" and time.monotonic() - start_s < 1.0, "2.5 s if nobody looked"


def test_a_connection_that_is_to_be_closed_is_not_kept(script: Script, direct: Direct) -> None:
    script.answers = [[head("200 OK", len(BODY), "Connection: Close") + BODY], [head() + BODY]]
    assert whole(opened(direct)) == whole(opened(direct)) == BODY
    assert script.num_connections == 2


def test_an_idle_connection_that_has_ended_is_replaced_once(script: Script, direct: Direct) -> None:
    script.answers = [[head() + BODY], [CUT], [head() + BODY], [CUT], [CUT]]
    assert whole(opened(direct)) == BODY
    assert whole(opened(direct)) == BODY, "it ended while idle, a new one answered"
    with pytest.raises(Failure, match="without an answer"):
        opened(direct)
    assert script.num_connections == 3 and len(script.asked) == 5


def test_nobody_listening_is_transient(script: Script) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    direct = Direct(lambda name: f"http://127.0.0.1:{port}/{name}", 0.5, 5.0)
    with pytest.raises(Failure, match="ConnectionRefusedError") as caught:
        opened(direct)
    assert (caught.value.kind, caught.value.transient) == ("connect", True)


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1/x", "http:///x", "http://me:secret@127.0.0.1/x", "file:///x", ""]
)
def test_addresses_that_are_nothing_for_here_open_no_connection(url: str) -> None:
    with pytest.raises(Unfit):
        opened(Direct(lambda name: url, 0.5, 5.0))


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_is_left_to_the_other(
    script: Script, direct: Direct, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(Unfit):
        opened(direct)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    script.answers = [[head() + BODY]]
    assert whole(opened(direct)) == BODY
