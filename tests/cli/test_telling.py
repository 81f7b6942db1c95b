"""OpenLineage from a whole run's artifacts: the schema is read from the tables themselves."""

import json
from pathlib import Path

import pytest
from open_lineage_schema import check

from marrow.cli.telling import columns_of, events_of
from marrow.core.errors import UsageError
from marrow.store.open_lineage import ENVIRONMENT
from marrow.store.steps import Step, run_step
from marrow.store.store import Store


def test_without_the_setting_nobody_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with Store.open(home) as store, events_of("tiny", "run-1", store) as events:
        assert events is None


def test_columns_are_those_of_the_tables(home: Path) -> None:
    with Store.open(home) as store:
        columns = {
            kind: columns_of(store, store.catalog.latest(kind=kind)[0])
            for kind in ("ingest", "clean", "shards", "train")
        }
    assert columns["ingest"] is not None and columns["ingest"]["body"] == "string"
    assert columns["clean"] is not None and columns["clean"]["document_id"] == "int64"
    assert columns["shards"] is not None and columns["shards"]["tokens"].startswith("fixed_size_list")
    assert columns["train"] is None


def test_events_go_where_the_setting_says(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv(ENVIRONMENT, path.as_uri())
    with Store.open(home) as store:
        ingest = store.catalog.latest(kind="ingest")[0]
        monkeypatch.setattr(Step, "key", lambda _: ingest.key)
        with events_of("tiny", "run-1", store) as events:
            run_step(store, Step("ingest", lambda _: {}), watcher=events)
    told = [json.loads(line) for line in path.read_text().splitlines()]
    for event in told:
        check(event)
    (output,) = told[2]["outputs"]
    names = [field["name"] for field in output["facets"]["schema"]["fields"]]
    assert names[:2] == ["title", "body"]
    assert told[2]["inputs"][0]["namespace"] == "file"


def test_a_place_that_is_none_is_refused_before_the_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "nowhere")
    with Store.open(home) as store, pytest.raises(UsageError, match=ENVIRONMENT):
        events_of("tiny", "run-1", store)
