"""`marrow bench`: figures of a server that answers, an error for one that does not."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from marrow.cli.main import run
from marrow.cli.trial import running_server
from marrow.serve.config import ServeRecipe
from marrow.store.store import Store


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken but not listened on: every connection to it is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def refusal(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["bench", "serve", *arguments]) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    return told.err


def test_a_refused_connection_is_an_error(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal([f"http://127.0.0.1:{closed_port}"], 1, capsys)
    assert f"no server answers at http://127.0.0.1:{closed_port}" in told
    assert "hint: start one with `marrow serve`" in told


def test_a_refused_connection_is_an_error_even_if_the_model_is_named(
    closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then nothing is asked before the load itself; figures of no answer at all would be a lie."""
    arguments = [f"http://127.0.0.1:{closed_port}", "--model", "tiny", "--requests", "3", "--json"]
    told = refusal(arguments, 1, capsys)
    assert "all 3 requests" in told
    assert "ConnectionRefusedError" in told
    assert "hint: " in told


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "127.0.0.1:8000", "http://", "tiny"])
def test_what_is_no_address_ends_with_status_2(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'hint: write "http://host:port"' in refusal([url], 2, capsys)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[]}',
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}",
        b"",
    ],
    ids=["text", "no models", "not found", "hung up"],
)
def test_a_server_of_something_else_is_an_error(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_one() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_one)
        thread.start()
        told = refusal([f"http://127.0.0.1:{listener.getsockname()[1]}"], 1, capsys)
        thread.join()
    assert "no server answers" in told
    assert "hint: " in told


@pytest.mark.slow
def test_a_live_server_is_measured(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(finished) as store:
        folder = store.view(store.resolve("tiny"))
    with running_server(folder, "tiny", ServeRecipe(kv_memory=4 << 20, max_sequences=8)) as server:
        arguments = ["bench", "serve", server.url, "--requests", "6", "--max-tokens", "4"]
        assert run([*arguments, "--concurrency", "2", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert run([*arguments, "--rate", "50", "--prompt", "the loader", "--prompt", "a shard"]) == 0
        shown = capsys.readouterr().out
        assert run([*arguments, "--model", "no-such-model"]) == 1
        refused = capsys.readouterr()
    assert (told["requests"], told["failed"], told["concurrency"]) == (6, 0, 2)
    assert told["completion_tokens"] <= 24
    assert told["requests_per_s"] == pytest.approx(6 / told["wall_s"])
    assert shown.startswith("6 requests, 0 failed, in ")
    assert "completion tokens/s" in shown
    assert "ttft_ms" in shown
    assert refused.out == ""
    assert "all 6 requests" in refused.err
    assert "404" in refused.err


@pytest.mark.slow
def test_the_kernels_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"rms_norm", "attention", "paged_attention"} <= {row["op"] for row in rows}
    assert all(row["microseconds"] > 0 and row["share_of_peak"] > 0 for row in rows)
