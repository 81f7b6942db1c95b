"""A word where tables are asked for is a file, a folder, a glob, else something of the store."""

from pathlib import Path

import pytest

from marrow.cli.data.tables import choose, open_tables_of
from marrow.core.errors import ArtifactNotFound, SourceError, UsageError
from marrow.store.steps import Step, Workspace, run_step
from marrow.store.store import Store
from marrow.store.versions.versions import Versions


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MARROW_CATALOG", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    for name in ("prices.csv", "countries.csv", "notes.txt"):
        (made / name).write_text("n\n1\n")
    return made


def tables_of(target: str) -> dict[str, list[str]]:
    with open_tables_of(target) as tables:
        assert all(path.is_file() for files in tables.values() for path in files)
        return {name: [path.name for path in files] for name, files in tables.items()}


def test_a_file_is_its_own_table(folder: Path) -> None:
    assert tables_of("folder/prices.csv") == {"prices": ["prices.csv"], "data": ["prices.csv"]}


def test_a_folder_has_a_table_of_each_name(folder: Path) -> None:
    assert tables_of("folder") == {"prices": ["prices.csv"], "countries": ["countries.csv"]}


def test_a_glob_is_one_table(folder: Path) -> None:
    assert tables_of("folder/*.csv") == {"data": ["countries.csv", "prices.csv"]}


def test_a_version_is_the_folder_that_it_was_made_of(folder: Path) -> None:
    with Store.open() as store:
        Versions(store).commit(folder, "d")
        (folder / "prices.csv").unlink()
        Versions(store).commit(folder, "d")
    assert tables_of("d") == {"countries": ["countries.csv"], "data": ["countries.csv"]}
    assert tables_of("d@1") == tables_of("d~1") == {"prices": ["prices.csv"], "countries": ["countries.csv"]}


def test_an_artifact_of_a_step_has_the_tables_of_its_files() -> None:
    def build(workspace: Workspace) -> dict[str, int]:
        (workspace.out / "rows-00000.csv").write_text("n\n1\n")
        (workspace.out / "rows-00001.csv").write_text("n\n2\n")
        return {}

    with Store.open() as store:
        made = run_step(store, Step("ingest", build)).artifact
    found = tables_of(made.id[:12])
    assert found["data"] == ["rows-00000.csv", "rows-00001.csv"]


def test_a_path_that_is_there_goes_before_a_name_of_the_store(folder: Path, tmp_path: Path) -> None:
    with Store.open() as store:
        Versions(store).commit(folder, "folder")
    (folder / "more.csv").write_text("n\n1\n")
    assert "more" in tables_of("folder")


def test_without_a_store_the_missing_file_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.csv is no file, and ") as caught:
        tables_of("gone.csv")
    assert caught.value.hint
    assert not (tmp_path / "home").exists(), "a question makes no store"


def test_with_a_store_both_meanings_are_said() -> None:
    Store.open().close()
    with pytest.raises(ArtifactNotFound, match=r"there is no file gone\.csv, and ") as caught:
        tables_of("gone.csv")
    assert caught.value.hint


def test_what_holds_no_table_says_what_tables_are(folder: Path) -> None:
    for target in ("folder/notes.txt",):
        with pytest.raises(SourceError, match="holds no table") as caught:
            tables_of(target)
        assert ".parquet" in caught.value.hint


TABLES = {"prices": [Path("p.csv")], "countries": [Path("c.csv")]}


def test_a_table_is_chosen_by_its_name_or_is_the_targets_own() -> None:
    assert choose(TABLES, "prices", "folder") == [Path("p.csv")]
    assert choose({"data": [Path("x.csv")]}, None, "x.csv") == [Path("x.csv")]
    assert choose(TABLES | {"data": [Path("p.csv")]}, None, "folder") == [Path("p.csv")]


@pytest.mark.parametrize(
    ("tables", "name", "said", "hint"),
    [
        (TABLES, "price", "folder has no table 'price'", "tables: countries, prices"),
        (TABLES, None, "folder has several tables", "choose one with --table: countries, prices"),
        ({"data": [Path("x.csv")]}, "x", "folder has no table 'x'", "tables: data"),
        (TABLES | {"data": [Path("p.csv")]}, "x", "folder has no table 'x'", "tables: countries, prices"),
    ],
)
def test_a_table_that_cannot_be_told_is_a_wrong_command(
    tables: dict[str, list[Path]], name: str | None, said: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        choose(tables, name, "folder")
    assert caught.value.hint == hint
