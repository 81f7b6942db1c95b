"""OpenLineage events: valid by the published schema, and never in the way of what they tell of."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from open_lineage_schema import check

from marrow.core.errors import DataError, Interrupted, UsageError
from marrow.core.records import Artifact, Parent
from marrow.store.open_lineage import HttpSink, RunEvents, num_rows, run_uuid, source_dataset
from marrow.store.steps import Step, Workspace, run_step
from marrow.store.store import Store

Event = dict[str, Any]


class Endpoint:
    """A real HTTP server that keeps what is posted.

    `answer` is its status, `wait_s` its slowness; while `free` is cleared it answers nothing.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.paths: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.answer = 201
        self.wait_s = 0.0
        self.free = threading.Event()
        self.free.set()
        self.requests = 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests += 1
                time.sleep(endpoint.wait_s)
                endpoint.free.wait(60)
                self.send_response(endpoint.answer)
                self.end_headers()
                if endpoint.answer < 300:
                    endpoint.events.append(json.loads(body))
                    endpoint.paths.append(self.path)
                    endpoint.headers.append(dict(self.headers))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.stop()


def write_rows(workspace: Workspace) -> Mapping[str, Any]:
    (workspace.out / "rows.txt").write_text("a\nb\n")
    return {"rows": 2, "source": "/data/notes.csv"}


def write_shards(workspace: Workspace) -> Mapping[str, Any]:
    (workspace.out / "shard").write_bytes(b"123")
    return {"num_rows": 1}


def fail(_: Workspace) -> Mapping[str, Any]:
    raise DataError("no document is left", hint="look at the rules")


def interrupt(_: Workspace) -> Mapping[str, Any]:
    raise KeyboardInterrupt


def run_two(store: Store, events: RunEvents) -> tuple[Artifact, Artifact]:
    rows = run_step(store, Step("ingest", write_rows), watcher=events).artifact
    shards = Step("shards", write_shards, parents=[Parent("rows", rows.id)])
    return rows, run_step(store, shards, watcher=events).artifact


def read(path: Path) -> list[Event]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def columns(artifact: Artifact) -> Mapping[str, str] | None:
    return {"text": "string", "line": "int64"} if artifact.kind == "ingest" else None


# What is told


def test_every_event_is_valid_and_in_order(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    with RunEvents.open(path.as_uri(), "quick", "run-1", store, schema_of=columns) as events:
        rows, shards = run_two(store, events)
    told = read(path)
    for event in told:
        check(event)
    assert [(event["eventType"], event["job"]["name"]) for event in told] == [
        ("START", "quick"),
        ("START", "quick.ingest"),
        ("COMPLETE", "quick.ingest"),
        ("START", "quick.shards"),
        ("COMPLETE", "quick.shards"),
        ("COMPLETE", "quick"),
    ]
    times = [event["eventTime"] for event in told]
    assert times == sorted(times)
    assert told[1]["run"]["runId"] == told[2]["run"]["runId"] != told[3]["run"]["runId"]
    for event in told[1:5]:
        parent = event["run"]["facets"]["parent"]
        assert parent["run"]["runId"] == told[0]["run"]["runId"] == run_uuid("run-1")
        assert parent["job"] == {"namespace": "marrow", "name": "quick"}
    made = told[2]["run"]["facets"]["marrow_step"]
    assert (made["artifact"], made["status"], made["key"]) == (rows.id, "built", rows.key)
    assert shards.id in json.dumps(told[4]["outputs"])


def test_datasets_join_the_steps_and_bear_schema_version_and_figures(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with RunEvents.open(path.as_uri(), "quick", "run-1", store, schema_of=columns) as events:
        rows, shards = run_two(store, events)
    _, _, ingested, _, packed, _ = read(path)
    (source,) = ingested["inputs"]
    assert (source["namespace"], source["name"]) == ("file", "/data/notes.csv")
    (output,) = ingested["outputs"]
    (read_again,) = packed["inputs"]
    assert (output["namespace"], output["name"]) == (read_again["namespace"], read_again["name"])
    for side in (output, read_again):
        assert side["facets"]["version"]["datasetVersion"] == rows.id
        assert side["facets"]["schema"]["fields"] == [
            {"name": "text", "type": "string", "ordinal_position": 1},
            {"name": "line", "type": "int64", "ordinal_position": 2},
        ]
        assert side["facets"]["dataSource"]["uri"] == store.home.as_uri()
    statistics = output["outputFacets"]["outputStatistics"]
    quality = read_again["inputFacets"]["dataQualityMetrics"]
    assert (statistics["rowCount"], statistics["size"], statistics["fileCount"]) == (2, 4, 1)
    assert (quality["rowCount"], quality["bytes"], quality["fileCount"]) == (2, 4, 1)
    assert packed["outputs"][0]["facets"]["version"]["datasetVersion"] == shards.id
    assert "schema" not in packed["outputs"][0]["facets"]


def test_a_cached_step_is_told_too(store: Store, tmp_path: Path) -> None:
    run_step(store, Step("ingest", write_rows))
    path = tmp_path / "events.jsonl"
    with RunEvents.open(path.as_uri(), "quick", "run-2", store) as events:
        run_two(store, events)
    statuses = [event["run"]["facets"].get("marrow_step", {}).get("status") for event in read(path)]
    assert statuses == [None, None, "cached", None, "built", None]


def test_a_failure_is_told_with_its_message_and_raised(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with (
        pytest.raises(DataError, match="no document is left"),
        RunEvents.open(path.as_uri(), "quick", "run-1", store) as events,
    ):
        run_step(store, Step("clean", fail), watcher=events)
    told = read(path)
    assert [event["eventType"] for event in told] == ["START", "START", "FAIL", "FAIL"]
    for event in told:
        check(event)
    assert told[2]["run"]["facets"]["errorMessage"]["message"] == "no document is left"
    assert told[2]["outputs"] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stop")])
def test_an_interrupted_run_is_aborted(store: Store, tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "events.jsonl"

    def stop(_: Workspace) -> Mapping[str, Any]:
        raise error

    with pytest.raises(type(error)), RunEvents.open(path.as_uri(), "quick", "run-1", store) as events:
        run_step(store, Step("clean", stop), watcher=events)
    assert [event["eventType"] for event in read(path)] == ["START", "START", "ABORT", "ABORT"]


@pytest.mark.parametrize(
    ("source", "namespace", "name"),
    [
        ("/data/notes.csv", "file", "/data/notes.csv"),
        ("file:///data/my%20notes.csv", "file", "/data/my notes.csv"),
        ("s3://bucket/a/b.parquet", "s3://bucket", "a/b.parquet"),
        ("https://user:secret@host:8080/x.csv?token=1", "https://host:8080", "x.csv"),
        ("s3://bucket", "s3://bucket", "/"),
        ("python", "marrow", "python"),
    ],
)
def test_sources_are_named_as_the_specification_says_without_secrets(
    source: str, namespace: str, name: str
) -> None:
    dataset = source_dataset(source)
    assert (dataset["namespace"], dataset["name"]) == (namespace, name)
    assert "secret" not in json.dumps(dataset) and "token" not in json.dumps(dataset)
    start = {"eventTime": "2026-01-01T00:00:00Z", "producer": "urn:x", "run": {"runId": run_uuid("1")}}
    url = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
    check(start | {"schemaURL": url, "job": {"namespace": "n", "name": "n"}, "inputs": [dataset]})


@pytest.mark.parametrize(
    ("facts", "rows"),
    [
        ({"num_rows": 3, "num_documents": 9}, 3),
        ({"rows": 9, "documents": 7}, 7),
        ({"train": {"documents": 5}, "heldout": {"documents": 2}}, 7),
        ({"rows": "many"}, None),
        ({"loss": 0.5}, None),
        ({}, None),
    ],
)
def test_the_rows_of_an_artifact_are_read_from_its_facts(facts: Mapping[str, Any], rows: int | None) -> None:
    assert num_rows(facts) == rows


def test_the_check_by_the_schema_can_fail() -> None:
    with pytest.raises(jsonschema.ValidationError):
        check({"eventType": "START"})
    with pytest.raises(jsonschema.ValidationError):
        check(source_dataset("python"))


# HTTP


def test_events_are_posted_in_order_with_the_key(
    store: Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "k3y")
    with RunEvents.open(endpoint.url, "quick", "run-1", store) as events:
        run_two(store, events)
    starts = [event["eventType"] == "START" for event in endpoint.events]
    assert starts == [True, True, False, True, False, False]
    for event in endpoint.events:
        check(event)
    assert set(endpoint.paths) == {"/api/v1/lineage"}
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer k3y"}
    assert (events.sink.sent, events.sink.failed) == (6, 0)


def test_the_path_of_a_url_is_kept(store: Store, endpoint: Endpoint) -> None:
    with RunEvents.open(f"{endpoint.url}/my/place", "quick", "run-1", store):
        pass
    assert set(endpoint.paths) == {"/my/place"}


@pytest.mark.parametrize("answer", [500, 404, 302])
def test_a_failing_endpoint_never_stops_a_run_and_is_said_once(
    store: Store, endpoint: Endpoint, answer: int
) -> None:
    endpoint.answer = answer
    said: list[str] = []
    with RunEvents.open(endpoint.url, "quick", "run-1", store, say=said.append) as events:
        run_two(store, events)
    assert (events.sink.sent, events.sink.failed) == (0, 6)
    assert len(said) == 1 and "OpenLineage" in said[0] and "goes on" in said[0]
    assert endpoint.requests <= 10, "after five failures in a row it gives up"


def test_nobody_listening_costs_no_time(store: Store) -> None:
    said: list[str] = []
    start_s = time.monotonic()
    with RunEvents.open("http://127.0.0.1:9", "quick", "run-1", store, say=said.append) as events:
        run_two(store, events)
    assert events.sink.failed == 6 and len(said) == 1
    assert time.monotonic() - start_s < 5


def test_a_slow_endpoint_delays_no_step(store: Store, endpoint: Endpoint) -> None:
    endpoint.free.clear()
    with RunEvents.open(endpoint.url, "quick", "run-1", store) as events:
        run_two(store, events)
        assert (events.sink.sent, events.sink.failed) == (0, 0), "all steps are over, no answer has come"
        endpoint.free.set()
    assert events.sink.sent == 6, "at the end it is waited for"


def test_an_endpoint_that_hangs_is_left_in_the_end(endpoint: Endpoint) -> None:
    endpoint.wait_s = 3
    sink = HttpSink(endpoint.url, timeout_s=2, patience_s=0.3)
    start_s = time.monotonic()
    for _ in range(4):
        sink.send({})
    sink.close()
    assert time.monotonic() - start_s < 4  # 0.3 here; the four would take 8
    assert sink.failed >= 3 and "longer than" in sink.problem
    endpoint.wait_s = 0


def test_a_secret_in_the_url_is_not_said(store: Store) -> None:
    said: list[str] = []
    url = "http://me:secret@127.0.0.1:9/x?key=secret"
    with RunEvents.open(url, "quick", "run-1", store, say=said.append):
        pass
    assert len(said) == 1 and "secret" not in said[0]


# Files and bad settings


def test_a_file_that_cannot_be_written_never_stops_a_run(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    url = (tmp_path / "file" / "events.jsonl").as_uri()
    with RunEvents.open(url, "quick", "run-1", store, say=said.append) as events:
        rows, _ = run_two(store, events)
    assert store.get(rows.id) == rows
    assert events.sink.failed == 6 and len(said) == 1 and "cannot be written" in said[0]


def test_runs_share_a_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def tell(number: int) -> None:
        with RunEvents.open(path.as_uri(), f"run{number}" * 500, str(number), store):
            pass

    threads: list[threading.Thread] = [threading.Thread(target=tell, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(path)) == 16


@pytest.mark.parametrize("url", ["", "events.jsonl", "ftp://host/x", "http://", "file://", "s3://bucket/x"])
def test_another_place_is_refused(store: Store, url: str) -> None:
    with pytest.raises(UsageError, match="no place for OpenLineage events") as error:
        RunEvents.open(url, "quick", "run-1", store)
    assert "file:///" in str(error.value.hint)


def test_a_step_without_a_watcher_is_told_to_nobody(store: Store) -> None:
    made: Callable[[Workspace], Mapping[str, Any]] = write_rows
    assert run_step(store, Step("ingest", made)).status == "built"
