"""`marrow lineage --file` and `--forget`: what became of a source file, over a whole finished run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from marrow_process import Marrow

from marrow.cli.main import run
from marrow.cli.source_lineage import as_text, forget_as_text, split_place, to_forget, trace_file
from marrow.core.records import Parent
from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest
from marrow.data.manifest import Manifest
from marrow.loader.loader import Loader
from marrow.store.store import Store
from marrow.store.versions.versions import Versions


def by_kind(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in told["artifacts"]}


@pytest.fixture(scope="module")
def told(finished: Path) -> dict[str, Any]:
    with Store.open(finished) as store:
        return trace_file(store, "notes.csv")


def test_every_artifact_that_has_of_the_file_is_told_in_order(told: dict[str, Any]) -> None:
    effects = {one["kind"]: one["effect"] for one in told["artifacts"]}
    assert told["seen"] is True
    assert effects == {
        "ingest": "holds",
        "clean": "holds",
        "split": "holds",
        "tokenizer": "learned",
        "shards": "holds",
        "train": "learned",
        "evaluate": "measured",
        "export": "learned",
        "serve": "learned",
        "report": "learned",
    }
    assert list(effects)[:4] == ["ingest", "clean", "split", "tokenizer"]


def test_the_figures_are_those_of_the_artifacts(told: dict[str, Any], finished: Path) -> None:
    found = by_kind(told)
    with Store.open(finished) as store:
        facts = {kind: store.get(one["id"]).facts for kind, one in found.items()}
        manifest = Manifest.read(store.view(store.get(found["shards"]["id"])))
    assert found["ingest"]["rows"] == facts["ingest"]["rows"] == 400, "the source is this one file"
    assert found["clean"]["documents"] == facts["clean"]["documents"]
    for side in ("train", "heldout"):
        assert found["split"][f"{side}_documents"] == facts["split"][side]["documents"]
    assert found["shards"]["packed_rows"] == manifest.num_rows
    (consumed,) = found["train"]["consumed"]
    assert consumed["samples"] == [0, 48] and consumed["first_position"] == 0
    assert found["train"]["times_seen"] == 48, "every sample holds some of the only file"
    assert found["export"]["names"] == ["tiny@1"]


def test_a_row_that_the_run_never_came_to_is_not_said_to_be_consumed(finished: Path) -> None:
    """By another road: the loader itself gives the batches again."""
    with Store.open(finished) as store:
        one = by_kind(trace_file(store, "notes.csv", 12))
        shards = store.view(store.get(one["shards"]["id"]))
        rows = one["shards"]["rows"]
        tables = [pa.ipc.open_file(path).read_all() for path in sorted(shards.glob("*.arrow"))]
        tokens = [row for table in tables for row in table["tokens"].to_pylist()]
        wanted = {tuple(tokens[row][:-1]) for row in rows}
        held = 0
        with Loader(shards, batch_rows=4, seed=one["train"]["consumed"][0]["seed"]) as loader:
            for _, batch in zip(range(12), loader, strict=False):
                held += sum(tuple(row) in wanted for row in batch.tokens_N.reshape(4, -1).tolist())
    assert one["ingest"]["rows"] == one["clean"]["documents"] == 1
    assert 1 <= len(rows) <= 5
    assert one["train"]["times_seen"] == held
    if not held:
        assert one["train"]["tokenizer_learned"] is True


def test_a_held_out_row_was_not_trained_on(finished: Path) -> None:
    with Store.open(finished) as store:
        for line in range(2, 2000):
            found = by_kind(trace_file(store, "notes.csv", line))
            if found["split"]["heldout_documents"]:
                break
    assert found["shards"]["packed_rows"] == 0
    assert found["train"]["times_seen"] == 0 and found["train"]["effect"] == "untouched"
    assert found["tokenizer"]["effect"] == "untouched"
    assert (found["split"]["effect"], found["evaluate"]["effect"]) == ("holds", "measured")
    answer = to_forget(trace_only(found))
    assert {one["kind"] for one in answer["clear"]} >= {"train", "tokenizer", "shards", "export"}


def trace_only(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    matching = {"folder": None, "names": ["notes.csv"], "contents": 0}
    told = {"file": "notes.csv", "line": 1, "seen": True, "matching": matching}
    return told | {"artifacts": list(found.values())}


def test_the_answer_to_a_delete_request_names_each_artifact_and_what_to_do(told: dict[str, Any]) -> None:
    answer = to_forget(told)
    actions = {one["kind"]: one["action"] for one in answer["actions"]}
    assert actions["train"] == actions["tokenizer"] == "train again without it, then remove"
    assert actions["shards"] == actions["export"] == "make again without it, then remove"
    assert actions["evaluate"] == "measure again without it, then remove"
    assert len(answer["actions"]) == 10 and answer["clear"] == []
    assert all(len(one["id"]) == 64 and one["why"] for one in answer["actions"])
    assert json.loads(json.dumps(answer)) == answer


def test_dataset_versions_that_hold_the_file_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "notes.csv").write_text("a\n1\n")
    with Store.open(tmp_path / "home") as store:
        first = Versions(store).commit(folder, "docs").version
        (folder / "other.csv").write_text("b\n2\n")
        second = Versions(store).commit(folder, "docs").version
        (folder / "deep" / "notes.csv").rename(folder / "renamed.csv")
        third = Versions(store).commit(folder, "docs").version
        by_name = trace_file(store, "notes.csv")
        by_bytes = trace_file(store, str(folder / "renamed.csv"))
        assert trace_file(store, "none.csv")["seen"] is False
    ids = [version.artifact.id for version in (first, second, third)]
    assert [one["id"] for one in by_name["artifacts"]] == ids, "under its later name too"
    assert [one["id"] for one in by_bytes["artifacts"]] == ids
    assert by_bytes["artifacts"][0]["files"] == ["deep/notes.csv"]
    (action, _, _) = to_forget(by_name)["actions"]
    assert action["action"] == "commit without it, then remove" and "deep/notes.csv" in action["why"]


@dataclass
class Edited:
    """A dataset whose file was edited, renamed and replaced, and a model made of its first version."""

    home: Path
    folder: Path
    versions: list[str]
    model: str


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    folder = tmp_path / "ds"
    folder.mkdir()
    (folder / "empty.csv").write_text("")
    (folder / "a.csv").write_text("text\nthe first words\n")
    with Store.open(tmp_path / "edited") as store:
        versions = [Versions(store).commit(folder, "docs").version.artifact]
        (rows := tmp_path / "rows").mkdir()
        facts = ingest(DataRecipe(source=str(store.view(versions[0]))), rows)
        source = [Parent("source", versions[0].id)]
        read = store.publish("ingest", "k1", rows, parents=source, facts={**facts, "source": "docs@1"})
        (tmp_path / "model").mkdir()
        model = store.publish("model", "k2", tmp_path / "model", parents=[Parent("rows", read.id)])
        (folder / "a.csv").write_text("text\nother words\n")
        versions.append(Versions(store).commit(folder, "docs").version.artifact)
        (folder / "a.csv").rename(folder / "b.csv")
        versions.append(Versions(store).commit(folder, "docs").version.artifact)
        (folder / "b.csv").write_text("text\nnothing of it\n")
        versions.append(Versions(store).commit(folder, "docs").version.artifact)
    return Edited(tmp_path / "edited", folder, [version.id for version in versions], model.id)


def test_every_version_that_ever_held_the_file_is_found_by_name_and_by_path(
    edited: Edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(edited.folder.parent)
    with Store.open(edited.home) as store:
        answers = [
            trace_file(store, wanted)["artifacts"]
            for wanted in ("a.csv", "ds/a.csv", "./ds/../ds/a.csv", str(edited.folder / "a.csv"))
        ]
    versions = [one for one in answers[0] if one["kind"] == "dataset"]
    assert [one["id"] for one in versions] == edited.versions[:3], "the last has neither name nor bytes"
    assert [one["names"] for one in versions] == [["docs@1"], ["docs@2"], ["docs@3"]]
    assert [one["matched"] for one in versions] == [{"a.csv": "name"}, {"a.csv": "name"}, {"b.csv": "bytes"}]
    assert [one["kind"] for one in answers[0]] == ["ingest", "model", *["dataset"] * 3]
    assert answers[0][1]["id"] == edited.model and answers[0][1]["effect"] == "holds"
    assert answers[1:] == answers[:1] * 3


def test_a_path_finds_them_where_folder_and_index_are_gone(
    edited: Edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(edited.folder.parent)
    shutil.rmtree(edited.folder)
    shutil.rmtree(edited.home / "indexes")
    with Store.open(edited.home) as store:
        told = trace_file(store, "ds/a.csv")
    assert [o["id"] for o in told["artifacts"] if o["kind"] == "dataset"] == edited.versions[:3]
    assert told["matching"]["folder"] is None and "a.csv" in told["matching"]["names"]


def test_what_was_looked_for_is_said(edited: Edited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(edited.folder.parent)
    with Store.open(edited.home) as store:
        told = trace_file(store, "ds/a.csv")
        other = trace_file(store, str(edited.folder / "empty.csv"))
    assert told["matching"] == {"folder": str(edited.folder), "names": ["a.csv"], "contents": 2}
    text = as_text(told)
    assert f"in dataset versions: files named a.csv (its name below {edited.folder})" in text
    assert "one of the 2 contents" in text
    assert "docs@3  holds: 1 files: b.csv (the same bytes)" in text
    assert [set(one["matched"].values()) for one in other["artifacts"]] == [{"name"}] * 4
    assert "docs@1" in forget_as_text(to_forget(told))


# The command


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Lineage = Callable[..., Done]


@pytest.fixture
def lineage(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lineage:
    """Call `marrow lineage` in this process."""

    def call(*arguments: str, home: Path = finished) -> Done:
        monkeypatch.setenv("MARROW_HOME", str(home))
        capsys.readouterr()
        status = run(["lineage", *arguments])
        return Done(status, *capsys.readouterr())

    return call


def test_the_command_says_it_in_text_and_as_json(lineage: Lineage) -> None:
    done = lineage("--file", "notes.csv")
    assert done.returncode == 0 and done.stderr == ""
    assert "notes.csv: seen" in done.stdout
    assert "tiny@1" in done.stdout and "samples 0 to 48" in done.stdout
    assert json.loads(lineage("--file", "notes.csv", "--json").stdout)["seen"] is True
    row = json.loads(lineage("--file", "notes.csv", "--row", "12", "--json").stdout)
    assert by_kind(row)["ingest"]["rows"] == 1


def test_the_command_in_a_process_of_its_own(marrow: Marrow, finished: Path) -> None:
    done = marrow("lineage", "--file", "nowhere.csv", home=finished)
    assert (done.returncode, done.stderr) == (1, "")
    assert "never seen" in done.stdout


def test_forgetting_changes_nothing(lineage: Lineage, home: Path) -> None:
    before = sorted((path.name, path.stat().st_size) for path in (home / "blobs").rglob("*"))
    done = lineage("--forget", "notes.csv:12", home=home)
    assert done.returncode == 0
    assert "to forget notes.csv, line 12" in done.stdout and "nothing was changed" in done.stdout
    assert sorted((path.name, path.stat().st_size) for path in (home / "blobs").rglob("*")) == before
    assert json.loads(lineage("--forget", "notes.csv:12", "--json", home=home).stdout)["line"] == 12


def test_a_file_that_was_never_seen_is_said_so(lineage: Lineage) -> None:
    done = lineage("--file", "nowhere.csv", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told.pop("matching")["contents"] == 0
    assert told == {"file": "nowhere.csv", "line": None, "seen": False, "artifacts": []}
    beyond = lineage("--file", "notes.csv", "--row", "100000")
    assert beyond.returncode == 1 and "never seen" in beyond.stdout
    forgotten = lineage("--forget", "nowhere.csv")
    assert forgotten.returncode == 0 and "nothing to forget" in forgotten.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tiny", "--file", "x"],
        ["--file", "x", "--forget", "x"],
        ["--file", "x", "--dot"],
        ["--file", "x", "--down"],
        ["tiny", "--row", "3"],
        ["--forget", "x", "--row", "3"],
        ["--file", "x", "--row", "0"],
    ],
)
def test_what_does_not_go_together_is_refused(lineage: Lineage, arguments: list[str]) -> None:
    done = lineage(*arguments)
    assert done.returncode == 2 and done.stdout == ""


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("notes.csv", ("notes.csv", None)),
        ("notes.csv:12", ("notes.csv", 12)),
        ("a/b:c.csv", ("a/b:c.csv", None)),
        ("a:1:2", ("a:1", 2)),
        (":7", ("", 7)),
    ],
)
def test_a_place_is_a_file_and_maybe_a_row(text: str, place: tuple[str, int | None]) -> None:
    assert split_place(text) == place


def test_a_file_whose_name_ends_like_a_row_is_found_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x:12").write_text("")
    assert split_place("x:12") == ("x:12", None)
