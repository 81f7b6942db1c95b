from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marrow.core.errors import ArtifactNotFound, StaleVersion, StoreError
from marrow.core.records import Artifact
from marrow.store.catalog import Catalog
from marrow.store.database import Database
from marrow.store.datasets.refs import DATASET, Refs

Make = Callable[..., Artifact]


@pytest.fixture
def refs(database: Database) -> Refs:
    return Refs(database)


def version(make: Make, label: str, *parents: Artifact) -> Artifact:
    return make(label, *parents, kind=DATASET)


def test_a_branch_moves_with_its_numbers(database: Database, refs: Refs, make_artifact: Make) -> None:
    first = version(make_artifact, "1")
    second = version(make_artifact, "2", first)
    assert refs.advance("d", None, first) == 1
    assert refs.advance("d", first.id, second) == 2
    assert refs.branch("d").artifact_id == second.id
    catalog = Catalog(database)
    assert [catalog.resolve(name).id for name in ("d@1", "d@2", "d")] == [first.id, second.id, second.id]


@pytest.mark.parametrize("expected", [None, "other"])
def test_whoever_is_second_changes_nothing(
    database: Database, refs: Refs, make_artifact: Make, expected: str | None
) -> None:
    first = version(make_artifact, "1")
    refs.advance("d", None, first)
    late = version(make_artifact, "late", first)
    with pytest.raises(StaleVersion, match="moved by another process"):
        refs.advance("d", expected, late)
    assert refs.branch("d").artifact_id == first.id
    with pytest.raises(ArtifactNotFound):
        Catalog(database).get(late.id)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "a/b", "x" * 101, "ü"])
def test_what_cannot_be_a_name_is_refused(refs: Refs, make_artifact: Make, name: str) -> None:
    with pytest.raises(StoreError, match="cannot be a name"):
        refs.advance(name, None, version(make_artifact, "1"))


def test_a_removed_branch_keeps_its_numbers(database: Database, refs: Refs, make_artifact: Make) -> None:
    first, second = version(make_artifact, "1"), version(make_artifact, "2")
    refs.advance("d", None, first)
    refs.remove("d")
    assert refs.all() == []
    assert refs.advance("d", None, second) == 2, "d@1 never comes to mean something else"
    assert Catalog(database).resolve("d@1").id == first.id
    with pytest.raises(ArtifactNotFound):
        refs.remove("gone")


def test_an_unknown_branch_is_said_with_the_known_ones(refs: Refs, make_artifact: Make) -> None:
    with pytest.raises(ArtifactNotFound, match="marrow data commit"):
        refs.branch("d")
    refs.advance("reviews", None, version(make_artifact, "1"))
    with pytest.raises(ArtifactNotFound, match="known: reviews"):
        refs.branch("d")


def test_versions_come_and_go_as_kept(refs: Refs, make_artifact: Make) -> None:
    first = version(make_artifact, "1")
    refs.advance("d", None, first)
    for _ in range(2):
        refs.mark_absent([first.id])
    assert refs.absent() == {first.id}
    refs.mark_present([first.id, first.id])
    assert refs.absent() == set()
    assert refs.datasets() == [first.id]


RACE = """
import sys
from pathlib import Path
from marrow.core.errors import StaleVersion
from marrow.core.hashes import hash_value
from marrow.core.records import Artifact
from marrow.store.database import Database
from marrow.store.datasets.refs import Refs
from marrow.store.store import artifact_id
refs = Refs(Database(Path(sys.argv[1]), sys.argv[2]))
who = sys.argv[3]
print("ready", flush=True)
sys.stdin.readline()
won = lost = 0
while won < 8:
    head = refs.get("d")
    key = hash_value([who, won, lost])
    one = Artifact(artifact_id("dataset", key, (), ()), "dataset", key, (), (), {}, "", "", {}, 0.0)
    try:
        refs.advance("d", head.artifact_id if head else None, one)
        won += 1
    except StaleVersion:
        lost += 1
print(won)
"""


@pytest.mark.parametrize(
    "catalog_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_two_processes_never_take_the_same_number(
    home: Path, catalog_url: str, database: Database, spawn: Callable[..., Any]
) -> None:
    children = [spawn(RACE, home, catalog_url, who) for who in "ab"]
    for child in children:
        assert child.line() == "ready"
    for child in children:
        child.go()
    assert [child.result() for child in children] == [["8"], ["8"]]
    numbers = [named.version for named in Catalog(database).names(name="d")]
    assert numbers == list(range(1, 17))
