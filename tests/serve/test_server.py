"""The server as a process: its port, its signals, and its parent's end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from marrow.core.errors import PortInUse, ServeError
from marrow.serve.config import ServeRecipe
from marrow.serve.server import bind, run_server, url_of

PROGRAM = """
import sys, warnings
from pathlib import Path
from marrow.serve.config import ServeRecipe
from marrow.serve.server import run_server
warnings.simplefilter("error")
recipe = ServeRecipe(dtype="fp32", kv_memory=1 << 20, max_sequences=2, drain=float(sys.argv[2]))
parent_fd = 0 if sys.argv[3] == "child" else None
ended_by = run_server(
    Path(sys.argv[1]), recipe, name="tiny", announce=lambda url: print(url, flush=True), parent_fd=parent_fd
)
print("ended by", ended_by, flush=True)
"""
BODY = {"model": "tiny", "prompt": [70], "max_tokens": 250, "ignore_eos": True, "stream": True}


class Running:
    """A server in a process of its own; its standard input is the pipe of its parent."""

    def __init__(self, folder: Path, drain_s: float, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), str(drain_s), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), self.process.stderr and self.process.stderr.read()

    def end(self, timeout_s: float = 20) -> tuple[str, str, int]:
        out, err = self.process.communicate(timeout=timeout_s)
        return out, err, self.process.returncode


@pytest.fixture
def start_process(llama: Path) -> Iterator[Callable[..., Running]]:
    opened: list[Running] = []

    def start(drain_s: float = 10, kind: str = "alone") -> Running:
        opened.append(Running(llama, drain_s, kind))
        return opened[-1]

    yield start
    for server in opened:
        server.process.kill()
        server.process.communicate()


def events_of(url: str, count: int, into: list[dict[str, Any]], begun: threading.Event) -> None:
    with httpx.stream("POST", url + "/v1/completions", json=BODY | {"n": count}, timeout=30) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                into.append(json.loads(line[6:]))
                begun.set()


def terminated(server: Running, count: int) -> list[dict[str, Any]]:
    """Send SIGTERM as soon as the first of some completions has begun; return all that still came."""
    events: list[dict[str, Any]] = []
    begun = threading.Event()
    reader = threading.Thread(target=events_of, args=(server.url, count, events, begun))
    reader.start()
    assert begun.wait(20)
    server.process.terminate()
    reader.join(20)
    return events


@pytest.mark.slow  # a second or two to start a process with torch
def test_sigterm_lets_running_requests_end_and_prints_nothing(start_process: Callable[..., Running]) -> None:
    server = start_process()
    events = terminated(server, 4)
    out, err, code = server.end()
    finished = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert finished == ["length"] * 4
    assert (out, err, code) == ("ended by 15\n", "", 0)


@pytest.mark.slow  # a second or two to start a process with torch
def test_sigterm_ends_what_is_left_at_the_deadline_with_an_error(
    start_process: Callable[..., Running],
) -> None:
    server = start_process(drain_s=0)
    events = terminated(server, 100)
    _, err, code = server.end()
    assert "shutting down" in events[-1]["error"]["message"]
    assert (err, code) == ("", 0)


@pytest.mark.slow  # a second or two to start a process with torch
def test_an_idle_server_stops_at_once(start_process: Callable[..., Running]) -> None:
    server = start_process()
    with httpx.Client() as client:  # an idle connection kept open
        assert client.get(server.url + "/health").json()["status"] == "ok"
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.end()[2] == 0
    assert time.monotonic() - begin < 5


@pytest.mark.slow  # a second or two to start a process with torch
def test_a_server_does_not_outlive_its_parent(start_process: Callable[..., Running]) -> None:
    """What kill -9 of the parent does to a child: its end of the pipe closes, nothing else."""
    server = start_process(kind="child")
    assert httpx.get(server.url + "/health").status_code == 200
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.stdin = None
    assert server.end()[2] == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_a_taken_port_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)) as error:
            run_server(tmp_path / "no model", ServeRecipe(port=port), name="x", announce=print)
    assert error.value.hint is not None and "serve.port=0" in error.value.hint


def test_two_servers_get_two_free_ports_and_nobody_else_gets_them() -> None:
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", 0) as second:
        assert url_of(first) != url_of(second)
        with pytest.raises(PortInUse):
            bind("127.0.0.1", first.getsockname()[1])


def test_an_unknown_host_is_told() -> None:
    with pytest.raises(ServeError, match=r"host\.invalid"):
        bind("host.invalid", 0)
