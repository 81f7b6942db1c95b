"""The server of a run: it starts, answers and drains, or the run says why not; it never outlives its run."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from marrow_process import environment

from marrow.cli import trial
from marrow.cli.recipe import LoadRecipe
from marrow.cli.trial import greedy_twice, running_server, try_server
from marrow.core.errors import ServeError
from marrow.core.progress import silent
from marrow.serve.config import ServeRecipe
from marrow.serve.load import Load
from marrow.store.store import Store

SERVE = ServeRecipe(kv_memory=4 << 20, max_sequences=8, drain=5.0, dtype="fp32")
LOAD = LoadRecipe(requests=6, concurrency=3, max_tokens=8)


@pytest.fixture(scope="module")
def model(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the finished run, as a folder of its own."""
    with Store.open(finished) as store:
        return store.checkout(store.resolve("tiny"), tmp_path_factory.mktemp("export") / "tiny")


def servers_of(folder: Path) -> list[str]:
    """Return the command lines of the processes that serve a folder."""
    shown = subprocess.run(["ps", "-axww", "-o", "args="], capture_output=True, text=True, check=True)
    return [line for line in shown.stdout.splitlines() if str(folder) in line and "--parent-fd" in line]


def assert_gone(folder: Path, *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while servers := servers_of(folder):
        assert time.monotonic() < deadline, f"still there after {within_s:g} s: {servers}"
        time.sleep(0.05)


def test_a_server_that_dies_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    """An empty folder is no model: `marrow serve` says so on stderr and ends."""
    began = time.monotonic()
    with (
        pytest.raises(ServeError, match="ended with status 1 before it was ready"),
        running_server(tmp_path, "tiny", SERVE),
    ):
        raise AssertionError("a server without a model announced itself")
    assert time.monotonic() - began < 30  # it does not wait out START_S
    assert servers_of(tmp_path) == []


def test_a_server_that_says_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(trial, "START_S", 0.02)  # less than it takes to start a Python
    with (
        pytest.raises(ServeError, match="said nothing for 0 s") as refused,
        running_server(tmp_path, "tiny", SERVE),
    ):
        raise AssertionError("no server starts that fast")
    assert refused.value.hint
    assert servers_of(tmp_path) == []


def test_no_descriptor_is_left_open_by_a_server_that_failed(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    before = descriptors()
    with pytest.raises(ServeError), running_server(tmp_path, "tiny", SERVE):
        pass
    assert descriptors() == before


def test_the_greedy_check_asks_each_prompt_twice_without_chance() -> None:
    load = Load(["a", "b", "c", "d", "e"], 64, 8, 3.0, 99, "tiny", {"temperature": 0.8, "seed": 1})
    greedy = greedy_twice(load)
    assert greedy.prompts == ["a", "b", "c", "d"]
    assert greedy.num_requests == 8  # the prompts are taken in turn: numbers i and i + 4 are one prompt
    assert dict(greedy.body) == {"temperature": 0}
    assert greedy.rate_per_s is None
    assert greedy_twice(replace(load, prompts=["a"])).num_requests == 2


@pytest.mark.slow
def test_a_trial_measures_checks_and_drains(model: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    facts = try_server(
        "tiny",
        model,
        ["the loader", "a shard keeps"],
        SERVE,
        LOAD,
        tmp_path,
        lambda done, total, unit, figures=None: seen.append(done),
    )
    assert (facts["requests"], facts["failed"], facts["concurrency"]) == (6, 0, 3)
    assert facts["exit_status"] == 0  # it drained
    assert facts["greedy_agreement"] == 1.0
    assert facts["completion_tokens"] <= 6 * 8
    assert facts["ttft_ms"]["p50"] <= facts["ttft_ms"]["p99"] <= facts["e2e_ms"]["p99"]
    assert max(seen) == 6
    written = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    assert len(written.pop("answers")) == 6
    assert written == facts
    assert servers_of(model) == []


@pytest.mark.slow
def test_a_refused_request_fails_the_trial_with_the_servers_words(model: Path, tmp_path: Path) -> None:
    too_long = "every row of the loader " * 200  # the model has 64 positions
    with pytest.raises(ServeError, match=r"requests failed: HTTP 400") as refused:
        try_server("tiny", model, [too_long], SERVE, LOAD, tmp_path, silent)
    assert "marrow serve" in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []
    assert servers_of(model) == []


@pytest.mark.slow
def test_an_error_inside_the_block_stops_the_server(model: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), running_server(model, "tiny", SERVE) as server:
        port = int(server.url.rpartition(":")[2])
        with urllib.request.urlopen(f"{server.url}/v1/models", timeout=20) as answer:
            assert json.load(answer)["data"][0]["id"] == "tiny"
        raise ZeroDivisionError
    assert servers_of(model) == []
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))  # nobody listens there any more


PARENT = """
import sys, time
from pathlib import Path
from marrow.cli.trial import running_server
from marrow.serve.config import ServeRecipe
with running_server(Path(sys.argv[1]), "tiny", ServeRecipe(kv_memory=4 << 20, drain=2.0)) as server:
    print(server.url, flush=True)
    time.sleep(600)
"""


def start_parent(model: Path, tmp_path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path / "home"),
    )


@pytest.mark.slow
def test_a_killed_parent_leaves_no_server(model: Path, tmp_path: Path) -> None:
    with start_parent(model, tmp_path) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert len(servers_of(model)) == 1
        parent.send_signal(signal.SIGKILL)
    assert_gone(model, within_s=15)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/v1/models", timeout=5)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.5])
def test_a_parent_killed_while_the_server_loads_leaves_none(
    after_s: float, model: Path, tmp_path: Path
) -> None:
    with start_parent(model, tmp_path) as parent:
        deadline = time.monotonic() + 30
        while not servers_of(model):
            assert time.monotonic() < deadline, "no server was started"
            time.sleep(0.02)
        time.sleep(after_s)
        parent.send_signal(signal.SIGKILL)
    assert_gone(model, within_s=30)
