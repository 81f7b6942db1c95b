"""OpenLineage events: what a run does, step by step, told to a file or an HTTP endpoint.

    with RunEvents.open("http://127.0.0.1:5000", "quickstart", run_id, store) as events:
        run_step(store, step, watcher=events)

A run and each of its steps are OpenLineage runs: START, then COMPLETE, FAIL or ABORT, a step with its
run as parent. Datasets are the artifacts (name: recipe/kind, version: artifact id), and outside of the
store what the first step read. `MARROW_OPENLINEAGE` says where to: file:///path appends a line of JSON
an event, http(s)://host posts each to /api/v1/lineage, or to the path of the URL, with the key of
OPENLINEAGE_API_KEY.

One idea: telling must never stop or slow what is told. HTTP has a thread of its own, which gives up on
an endpoint that keeps failing; failures are counted, and said once.
Source: openlineage.io/spec/2-0-2, with the facets' own versions.
"""

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import marrow
from marrow.core.errors import Interrupted, MarrowError, UsageError
from marrow.core.records import Artifact
from marrow.store.lock import Say
from marrow.store.steps import Step, StepResult
from marrow.store.store import Store

ENVIRONMENT = "MARROW_OPENLINEAGE"
KEY_ENVIRONMENT = "OPENLINEAGE_API_KEY"
DEFAULT_PATH = "/api/v1/lineage"
NAMESPACE = "marrow"
PRODUCER = f"urn:marrow:{marrow.__version__}"

Json = dict[str, Any]
SchemaOf = Callable[[Artifact], Mapping[str, str] | None]
"""artifact -> its columns and their types, None where it is no table"""

_SPEC = "https://openlineage.io/spec"
_EVENT = f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
_FACETS = {  # name in the event: (version, class)
    "parent": ("1-2-0", "ParentRunFacet"),
    "errorMessage": ("1-0-1", "ErrorMessageRunFacet"),
    "processing_engine": ("1-1-1", "ProcessingEngineRunFacet"),
    "jobType": ("2-0-4", "JobTypeJobFacet"),
    "schema": ("1-2-0", "SchemaDatasetFacet"),
    "dataSource": ("1-0-1", "DatasourceDatasetFacet"),
    "version": ("1-0-1", "DatasetVersionDatasetFacet"),
    "dataQualityMetrics": ("1-0-3", "DataQualityMetricsInputDatasetFacet"),
    "outputStatistics": ("1-0-2", "OutputStatisticsOutputDatasetFacet"),
}
_RUN_IDS = uuid.UUID("6c1f6d1e-5d0b-5b0e-9f0a-3f8a0f1f4a52")  # any fixed one
_TIMEOUT_S = 5.0
_PATIENCE_S = 10.0  # for what is still to be sent when a run ends
_GIVE_UP = 5  # failures in a row


class Sink(Protocol):
    """Takes events; `problem` is what went wrong first."""

    sent: int
    failed: int
    problem: str

    def send(self, event: Json) -> None:
        """Take an event; never raises."""

    def close(self) -> None:
        """Send what is left, for a while."""


class RunEvents:
    """Tells of one run and its steps; a `Watcher` of `run_step`."""

    def __init__(
        self, sink: Sink, recipe: str, run_id: str, store: Store, schema_of: SchemaOf, say: Say
    ) -> None:
        self.sink = sink
        self._recipe = recipe
        self._run_id = run_id
        self._store = store
        self._schema_of = schema_of
        self._say = say
        self._has_said = False

    @classmethod
    def open(
        cls,
        url: str,
        recipe: str,
        run_id: str,
        store: Store,
        *,
        schema_of: SchemaOf = lambda _: None,
        say: Say = lambda _: None,
    ) -> "RunEvents":
        """Prepare to tell of a run.

        Args: url: file:///path or http(s)://host[/path]. recipe, run_id: what is run. schema_of: reads
            the columns of an artifact, which the store knows nothing of. say: told of failures, once.
        Raises: UsageError for another URL.
        """
        return cls(_sink(url), recipe, run_id, store, schema_of, say)

    def __enter__(self) -> "RunEvents":
        self._emit("START", self._recipe, self._run_id, "RUN", {})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state, facets = _ending(error)
        self._emit(state, self._recipe, self._run_id, "RUN", facets)
        self.sink.close()
        self._say_problems()

    def started(self, step: Step) -> None:
        """Tell that a step begins."""
        self._emit_step("START", step, {}, self._inputs(step, None), [])

    def ended(self, step: Step, result: StepResult | None, error: BaseException | None) -> None:
        """Tell how a step ended: with a result or an error."""
        state, facets = _ending(error)
        artifact = None if result is None else result.artifact
        if result is not None and artifact is not None:
            facets["marrow_step"] = {
                "_producer": PRODUCER,
                "_schemaURL": f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunFacet",
                "status": result.status,
                "key": artifact.key,
                "artifact": artifact.id,
                "codeVersion": artifact.code_version,
            }
        outputs = [] if artifact is None else [self._output(artifact)]
        self._emit_step(state, step, facets, self._inputs(step, artifact), outputs)

    def _emit_step(
        self, state: str, step: Step, facets: Json, inputs: Sequence[Json], outputs: Sequence[Json]
    ) -> None:
        job = {"namespace": NAMESPACE, "name": self._recipe}
        parent = _facet("parent", run={"runId": run_uuid(self._run_id)}, job=job)
        name, run_id = f"{self._recipe}.{step.title}", f"{self._run_id}/{step.title}"
        self._emit(state, name, run_id, "STEP", {"parent": parent, **facets}, inputs, outputs)

    def _emit(
        self,
        state: str,
        job: str,
        run_id: str,
        job_type: str,
        facets: Json,
        inputs: Sequence[Json] = (),
        outputs: Sequence[Json] = (),
    ) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        engine = _facet("processing_engine", version=marrow.__version__, name="Marrow")
        kind = _facet("jobType", processingType="BATCH", integration="MARROW", jobType=job_type)
        self.sink.send(
            {
                "eventType": state,
                "eventTime": now,
                "producer": PRODUCER,
                "schemaURL": _EVENT,
                "run": {"runId": run_uuid(run_id), "facets": {"processing_engine": engine, **facets}},
                "job": {"namespace": NAMESPACE, "name": job, "facets": {"jobType": kind}},
                "inputs": list(inputs),
                "outputs": list(outputs),
            }
        )
        self._say_problems()

    def _inputs(self, step: Step, made: Artifact | None) -> list[Json]:
        parents = self._store.catalog.get_many(parent.artifact_id for parent in step.parents)
        inputs = [self._input(parents[p.artifact_id]) for p in step.parents if p.artifact_id in parents]
        if made is not None and not step.parents and isinstance(made.facts.get("source"), str):
            inputs.append(source_dataset(made.facts["source"]))
        return inputs

    def _input(self, artifact: Artifact) -> Json:
        metrics = {"rowCount": num_rows(artifact.facts), "bytes": artifact.num_bytes}
        quality = _facet("dataQualityMetrics", **metrics, fileCount=len(artifact.files), columnMetrics={})
        return self._dataset(artifact) | {"inputFacets": {"dataQualityMetrics": quality}}

    def _output(self, artifact: Artifact) -> Json:
        metrics = {"rowCount": num_rows(artifact.facts), "size": artifact.num_bytes}
        statistics = _facet("outputStatistics", **metrics, fileCount=len(artifact.files))
        return self._dataset(artifact) | {"outputFacets": {"outputStatistics": statistics}}

    def _dataset(self, artifact: Artifact) -> Json:
        facets = {
            "version": _facet("version", datasetVersion=artifact.id),
            "dataSource": _facet("dataSource", name=NAMESPACE, uri=self._store.home.as_uri()),
        }
        columns = self._schema_of(artifact)
        if columns:
            fields = [
                {"name": name, "type": kind, "ordinal_position": i + 1}
                for i, (name, kind) in enumerate(columns.items())
            ]
            facets["schema"] = _facet("schema", fields=fields)
        return {"namespace": NAMESPACE, "name": f"{self._recipe}/{artifact.kind}", "facets": facets}

    def _say_problems(self) -> None:
        if self.sink.problem and not self._has_said:
            self._has_said = True
            self._say(f"OpenLineage: {self.sink.problem}; the run goes on without telling all of its events")


class FileSink:
    """Appends events to a file, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.sent = self.failed = 0
        self.problem = ""
        self._path = path

    def send(self, event: Json) -> None:
        """Append the event in one write, so that several runs can share a file."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write((json.dumps(event, ensure_ascii=False) + "\n").encode())
            self.sent += 1
        except OSError as error:
            self.failed += 1
            self.problem = self.problem or f"{self._path} cannot be written: {error.strerror or error}"

    def close(self) -> None:
        """Do nothing: every event is written when it comes."""


class HttpSink:
    """Posts events from a thread of its own, in their order, each at most twice."""

    def __init__(self, url: str, *, timeout_s: float = _TIMEOUT_S, patience_s: float = _PATIENCE_S) -> None:
        self.sent = self.failed = 0
        self.problem = ""
        self._url = url
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._failed_in_a_row = 0
        self._waiting: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="openlineage", daemon=True)
        self._thread.start()

    def send(self, event: Json) -> None:
        """Leave the event to the thread."""
        self._waiting.put(event)

    def close(self) -> None:
        """Wait until all events are sent, or for `patience_s`; the rest counts as failed."""
        self._waiting.put(None)
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            self._failed_in_a_row = _GIVE_UP  # the thread drops what is left, and ends
            self.failed += self._waiting.qsize()
            self.problem = self.problem or f"{_public(self._url)} takes longer than {self._patience_s:.0f} s"

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            if self._failed_in_a_row >= _GIVE_UP or not self._post(event):
                self.failed += 1
                self._failed_in_a_row += 1
            else:
                self.sent += 1
                self._failed_in_a_row = 0

    def _post(self, event: Json) -> bool:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_ENVIRONMENT):
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(2):
            try:
                request = Request(self._url, json.dumps(event).encode(), headers, method="POST")
                with urlopen(request, timeout=self._timeout_s) as answer:
                    answer.read()
                return True
            except (OSError, HTTPException, ValueError) as error:  # HTTPError and URLError are OSErrors
                self.problem = self.problem or f"{_public(self._url)}: {error}"
                if 400 <= getattr(error, "code", 0) < 500:
                    return False
                time.sleep(0.1 * (1 - attempt))
        return False


def run_uuid(run_id: str) -> str:
    """Return the UUID that stands for a run of ours, the same wherever it is asked."""
    return str(uuid.uuid5(_RUN_IDS, run_id))


def source_dataset(source: str) -> Json:
    """Name what a run read from outside, as the specification names it; passwords are left out."""
    parts = urlsplit(source)
    if parts.scheme == "file" or not (parts.scheme and parts.netloc):
        is_path = parts.scheme == "file" or os.sep in source or os.path.lexists(source)
        path = Path(unquote(parts.path) if parts.scheme == "file" else source)
        namespace, name = ("file", str(path.absolute())) if is_path else (NAMESPACE, source)
        uri = path.absolute().as_uri() if is_path else f"urn:marrow:source:{source}"
    else:
        namespace = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        name = parts.path.strip("/") or "/"
        uri = f"{namespace}/{parts.path.lstrip('/')}"
    facets = {"dataSource": _facet("dataSource", name=namespace, uri=uri)}
    return {"namespace": namespace, "name": name, "facets": facets}


def num_rows(facts: Mapping[str, Any]) -> int | None:
    """Return the rows of an artifact, from what its step noted; None for what has none."""
    sides = [facts[side] for side in ("train", "heldout") if isinstance(facts.get(side), Mapping)]
    if sides and all("documents" in side for side in sides):
        return sum(int(side["documents"]) for side in sides)
    counts = (facts.get(name) for name in ("num_rows", "documents", "rows"))
    return next((count for count in counts if isinstance(count, int)), None)


def _ending(error: BaseException | None) -> tuple[str, Json]:
    if error is None:
        return "COMPLETE", {}
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return "ABORT", {}
    message = error.message if isinstance(error, MarrowError) else f"{type(error).__name__}: {error}"
    return "FAIL", {"errorMessage": _facet("errorMessage", message=message, programmingLanguage="PYTHON")}


def _facet(name: str, /, **values: Any) -> Json:
    version, title = _FACETS[name]
    url = f"{_SPEC}/facets/{version}/{title}.json#/$defs/{title}"
    return {"_producer": PRODUCER, "_schemaURL": url} | {k: v for k, v in values.items() if v is not None}


def _sink(url: str) -> Sink:
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.path:
        return FileSink(Path(unquote(parts.path)))
    if parts.scheme in ("http", "https") and parts.netloc:
        return HttpSink(url if parts.path.strip("/") else url.rstrip("/") + DEFAULT_PATH)
    raise UsageError(
        f"{ENVIRONMENT}: {url!r} is no place for OpenLineage events",
        hint="give file:///path/to/events.jsonl or http://host:port",
    )


def _public(url: str) -> str:
    """Return a URL without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
