"""`marrow bench`: figures of a server that answers, an error for one that does not."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from marrow_process import Marrow
from range_server import RangeServer

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


LOADER = ["bench", "loader", "--seconds", "0.1", "--step-ms", "4", "--batch-rows", "8"]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": list(range(640))}), path, row_group_size=64)
    return path


@pytest.mark.slow
def test_the_loader_is_measured_and_a_setting_named(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "loader.html"
    arguments = [*LOADER, str(parquet), "--workers", "1", "--html", str(page), "--json"]
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    tried = [(one["setting"]["workers"], one["setting"]["prefetch"]) for one in told["settings"]]
    assert tried == [(0, 0), (0, 1), (0, 2), (0, 4), (1, 2)]
    assert [one["setting"]["rows_of_shard"] for one in told["sizes"]] == [4, 16, 64, 256]
    for one in [*told["settings"], *told["sizes"]]:
        assert one["rows"] == 8 * one["batches"] > 0
        assert 0 < one["busy"] <= 1
        assert 0 < one["stepped_s"] + sum(one["waited_s"].values()) <= one["wall_s"]
    assert told["recommended"]["setting"] in [one["setting"] for one in told["settings"]]
    assert f"loader.workers = {told['recommended']['setting']['workers']}" in told["advice"]
    html = page.read_text()
    assert "<svg" in html
    assert "workers=" in html


def test_a_slow_transform_is_what_the_loader_bench_names(
    parquet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "support")
    arguments = [*LOADER, str(parquet), "--workers", "0", "--no-sizes", "--json", "--transform"]
    assert run([*arguments, "loader_jobs:slow_transform"]) == 0
    told = json.loads(capsys.readouterr().out)
    # 8 ms of work beside 4 ms of steps: at most half of the time is busy, however deep the prefetch.
    assert told["recommended"]["busy"] < 0.65
    assert told["settings"][0]["limit"] == "transform"  # without a thread, whatever else the machine does
    assert "comes nearest" in told["advice"]


@pytest.mark.slow
def test_the_loader_bench_reads_a_runs_own_shards(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARROW_HOME", str(finished))
    with Store.open(finished) as store:
        latest = store.runs.latest(recipe="tiny", limit=1)[0]
        shards = next(step.artifact_id for step in latest.steps if step.name == "shards")
    assert run([*LOADER, shards, "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("workers")
    assert "loader.workers = 0" in shown
    assert run([*LOADER, "tiny"]) == 1
    assert "hint: give the id of the shards step" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing_like_it:double", "loader_jobs:nothing", "loader_jobs"])
def test_a_transform_that_is_not_there_ends_with_status_2(
    name: str, parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*LOADER, str(parquet), "--transform", name]) == 2
    assert "hint: write MODULE:NAME" in capsys.readouterr().err


def test_made_up_rows_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run([*LOADER, "--workers", "0", "--no-sizes"]) == 0
    assert "prefetch" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_shards_at_a_url_are_measured(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(finished) as store:
        shards = store.view(store.catalog.latest(kind="shards")[0])
        with RangeServer(shards.parent) as server:
            assert run([*LOADER, f"{server.url}/{shards.name}", "--workers", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all("fetch" in one["worked_s"] for one in told["settings"]), "each setting fetches anew"


def test_a_page_that_cannot_be_written_is_said(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = parquet / "x.html"
    assert run([*LOADER, str(parquet), "--workers", "0", "--no-sizes", "--html", str(page)]) == 1
    assert "cannot write the page" in capsys.readouterr().err


# ---------------------------------------------------------------- kernels


@pytest.mark.slow
def test_kernels_are_measured_against_the_roofline(marrow: Marrow, tmp_path: Path) -> None:
    page = tmp_path / "roofline.html"
    options = ["--op", "swiglu", "--op", "rms_norm", "--seconds", "0.001", "--html", str(page)]
    done = marrow("bench", "kernels", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for word in ("op", "path", "GB/s", "GFLOP/s", "of roof"):
        assert word in lines[0]
    assert any("swiglu" in line and "float32" in line for line in lines)
    assert any("rms_norm" in line and "bfloat16" in line for line in lines)
    assert "*" in done.stdout, "the path that is taken"
    markup = page.read_text(encoding="utf-8")
    assert markup.count("<circle") == len(lines) - 2
    assert "https://" not in markup


@pytest.mark.slow
def test_kernels_are_told_as_json_too(marrow: Marrow) -> None:
    done = marrow("bench", "kernels", "--op", "softcap", "--dtype", "bf16", "--seconds", "0.001", "--json")
    rows = json.loads(done.stdout)
    assert {(row["op"], row["dtype"]) for row in rows} == {("softcap", "bfloat16")}
    assert sum(row["is_chosen"] for row in rows) == len({row["shape"] for row in rows})


def test_an_unknown_operator_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--op", "rms_nrom"]) == 2
    told = capsys.readouterr()
    assert "no operator 'rms_nrom'" in told.err
    assert "rms_norm" in told.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", [["--budget", "5"], ["--out", "somewhere"], ["--tune"]])
def test_what_needs_a_gpu_says_so(
    option: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "kernels", *option]) == 2
    assert "need a CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_cpu_and_of_the_gpu_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--tune", "--json"]) == 2
    assert "not of the GPU's cases" in capsys.readouterr().err
