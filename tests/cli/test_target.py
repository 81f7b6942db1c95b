"""What a word means: a folder, else a name, a version of it, an id prefix; never silently the wrong thing."""

from pathlib import Path

import pytest
from ordinary import ordinary_user

from marrow.cli.target import find_artifact, find_model, find_version
from marrow.core.errors import ArtifactNotFound, ModelError, StoreError
from marrow.core.records import Artifact
from marrow.store.store import Store
from marrow.store.versions.versions import Versions

MODEL = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "weights"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and a working folder beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def publish(home: Path, kind: str, files: dict[str, str], *names: str) -> Artifact:
    with Store.open(home) as store:
        folder = write(home / "made" / f"{kind}-{len(store.catalog.latest())}", files)
        artifact = store.publish(kind, f"key of {sorted(files.items())}", folder)
        for name in names:
            store.name(artifact, name)
        return artifact


def weights(folder: Path) -> str:
    return (folder / "model.safetensors").read_text(encoding="utf-8")


def test_a_folder_goes_before_a_name(home: Path) -> None:
    publish(home, "export", MODEL, "tiny")
    write(Path("tiny"), MODEL | {"model.safetensors": "mine"})
    found = find_model("tiny")
    assert weights(found.folder) == "mine"
    assert found.name == "tiny"


def test_a_folder_is_called_by_its_own_name() -> None:
    folder = write(Path("models/small"), MODEL)
    for path in ("models/small", "models/small/", str(folder.resolve()), "models/../models/small"):
        assert find_model(path).name == "small"


def test_a_folder_needs_no_store(home: Path) -> None:
    write(Path("small"), MODEL)
    find_model("small")
    assert not home.exists()


def test_a_folder_without_a_config_is_no_model(home: Path) -> None:
    publish(home, "export", MODEL, "notes")
    write(Path("notes"), {"a.txt": "text"})
    with pytest.raises(ModelError, match=r"notes has no config\.json") as refused:
        find_model("notes")
    assert refused.value.hint


def test_a_name_is_its_newest_version_and_older_ones_stay(home: Path) -> None:
    publish(home, "export", MODEL | {"model.safetensors": "first"}, "tiny")
    publish(home, "export", MODEL | {"model.safetensors": "second"}, "tiny")
    assert weights(find_model("tiny").folder) == "second"
    assert weights(find_model("tiny@1").folder) == "first"
    assert weights(find_model("tiny@2").folder) == "second"
    assert find_model("tiny@1").name == "tiny"  # what its clients ask for
    with pytest.raises(ArtifactNotFound, match="no version '3'") as refused:
        find_model("tiny@3")
    assert refused.value.hint == "versions are 1 to 2"


def test_a_name_goes_before_an_id_that_begins_so(home: Path) -> None:
    first = publish(home, "export", MODEL | {"model.safetensors": "first"})
    prefix = first.id[:6]
    assert weights(find_model(prefix).folder) == "first"
    publish(home, "export", MODEL | {"model.safetensors": "second"}, prefix)
    assert weights(find_model(prefix).folder) == "second"
    assert weights(find_model(first.id).folder) == "first"


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("ingest", {"rows-00000.parquet": "rows"}),
        ("tokenizer", {"tokenizer.json": "{}"}),  # a part of a model is not a model
        ("train", {"config.json": "{}", "model.safetensors": "weights"}),
    ],
)
def test_what_is_no_export_is_refused_with_what_it_is(kind: str, files: dict[str, str], home: Path) -> None:
    artifact = publish(home, kind, files)
    with pytest.raises(ModelError, match=f"is an artifact of kind {kind}, not an exported model") as refused:
        find_model(artifact.id[:12])
    assert "name of a run" in (refused.value.hint or "")


def test_what_nothing_answers_to_names_what_is_near(home: Path) -> None:
    publish(home, "export", MODEL, "quickstart")
    with pytest.raises(ArtifactNotFound) as refused:
        find_model("quikstart")
    assert "quickstart" in (refused.value.hint or "")


def test_any_artifact_can_be_found_and_the_store_is_closed_afterwards(home: Path) -> None:
    rows = publish(home, "ingest", {"rows-00000.parquet": "rows"})
    with find_artifact(rows.id[:8]) as (store, artifact):
        assert artifact.id == rows.id
        assert (store.view(artifact) / "rows-00000.parquet").read_text(encoding="utf-8") == "rows"


@pytest.fixture
def reviews(home: Path) -> list[Artifact]:
    """Two versions of a dataset."""
    folder = write(home.parent / "reviews-folder", {"a.csv": "text\nfirst\n"})
    with Store.open(home) as store:
        first = Versions(store).commit(folder, "reviews").version.artifact
        (folder / "a.csv").write_text("text\nsecond\n", encoding="utf-8")
        return [first, Versions(store).commit(folder, "reviews").version.artifact]


def version_of(home: Path, source: str) -> str | None:
    with Store.open(home) as store:
        found = find_version(store, source)
    return None if found is None else found.id


def test_a_source_may_be_a_dataset_version(home: Path, reviews: list[Artifact]) -> None:
    first, second = (artifact.id for artifact in reviews)
    assert version_of(home, "reviews") == version_of(home, "reviews@2") == second
    assert version_of(home, "reviews@1") == version_of(home, "reviews~1") == first
    assert version_of(home, first[:12]) == first


def test_a_source_that_is_there_goes_before_a_dataset(home: Path, reviews: list[Artifact]) -> None:
    write(Path("reviews"), {"mine.csv": "text\nmine\n"})
    assert version_of(home, "reviews") is None
    assert version_of(home, "reviews@2") == reviews[1].id


@pytest.mark.parametrize("source", ["python", "s3://bucket/reviews", "review*", "absent"])
def test_other_sources_are_no_dataset(home: Path, reviews: list[Artifact], source: str) -> None:
    assert version_of(home, source) is None


def test_a_source_of_another_kind_is_said(home: Path) -> None:
    publish(home, "export", MODEL, "tiny")
    with pytest.raises(StoreError, match="kind export, not a dataset"):
        version_of(home, "tiny")


@pytest.mark.parametrize("source", ["reviews@7", "reviews~5"])
def test_a_version_that_a_dataset_does_not_have_is_said(
    home: Path, reviews: list[Artifact], source: str
) -> None:
    with pytest.raises(ArtifactNotFound, match="reviews"):
        version_of(home, source)
    assert version_of(home, "nothing@7") is None  # it may be a file that is not there


def test_a_path_that_may_not_be_looked_at_is_no_version(home: Path) -> None:
    Store.open(home).close()
    locked = write(Path("locked"), {"a.csv": "t\nx\n"})
    locked.chmod(0)
    with ordinary_user():
        assert version_of(home, "locked/a.csv") is None  # whoever reads it says why not
    locked.chmod(0o700)
