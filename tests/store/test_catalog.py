import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import ArtifactNotFound, StoreError
from marrow.core.records import Artifact
from marrow.store.catalog import Catalog, Edge
from marrow.store.database import Database

Make = Callable[..., Artifact]


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


def test_an_artifact_comes_back_as_it_was(catalog: Catalog, make_artifact: Make) -> None:
    rows = catalog.add(make_artifact("rows", kind="rows", files=0))
    clean = make_artifact("clean", rows, files=3)
    assert catalog.add(clean) == clean
    assert catalog.get(clean.id) == clean
    assert catalog.get(rows.id) == rows
    assert catalog.get_many([clean.id, "absent", rows.id]) == {clean.id: clean, rows.id: rows}
    assert catalog.get(clean.id).num_bytes == 10 + 11 + 12


def test_adding_the_same_work_again_changes_nothing(catalog: Catalog, make_artifact: Make) -> None:
    first = catalog.add(make_artifact("a"))
    again = make_artifact("a", facts={"rows": 99}, created_s=2e9)
    assert again.id == first.id
    assert catalog.add(again) == first == catalog.get(first.id)
    assert catalog.latest() == [first]


def test_an_unknown_parent_is_refused_and_nothing_is_added(catalog: Catalog, make_artifact: Make) -> None:
    child = make_artifact("child", make_artifact("never added"))
    with pytest.raises(ArtifactNotFound, match="to be its parent"):
        catalog.add(child)
    with pytest.raises(ArtifactNotFound):
        catalog.get(child.id)
    assert catalog.blobs() == set()


def test_a_key_finds_its_newest_artifact(catalog: Catalog, make_artifact: Make) -> None:
    old = catalog.add(make_artifact("a", files=1, created_s=2e9))
    assert catalog.find_key(old.key) == old
    new = catalog.add(make_artifact("a", files=2, created_s=1e9))  # newest by insertion, not by clock
    assert catalog.find_key(old.key) == new
    assert catalog.find_key("no such key") is None


def test_latest_lists_newest_first_and_by_kind(catalog: Catalog, make_artifact: Make) -> None:
    added = [catalog.add(make_artifact(str(i), kind="ab"[i % 2])) for i in range(6)]
    assert catalog.latest() == added[::-1]
    assert catalog.latest(kind="b", limit=2) == [added[5], added[3]]
    assert catalog.latest(kind="none") == []


def test_edges_go_both_ways_with_role_and_detail(catalog: Catalog, make_artifact: Make) -> None:
    a, b = catalog.add(make_artifact("a")), catalog.add(make_artifact("b"))
    c = catalog.add(make_artifact("c", a, b))
    d = catalog.add(make_artifact("d", a))
    up = [Edge(c.id, "role-0", a.id, {"part": 0}), Edge(c.id, "role-1", b.id, {"part": 1})]
    assert catalog.edges_up([c.id]) == up
    assert sorted(edge.child_id for edge in catalog.edges_down([a.id])) == sorted([c.id, d.id])
    assert catalog.edges_down([d.id]) == [] == catalog.edges_up([])


def test_blobs_know_their_users(catalog: Catalog, make_artifact: Make) -> None:
    a, b = catalog.add(make_artifact("a", files=2)), catalog.add(make_artifact("b"))
    assert catalog.blobs() == {file.sha256 for artifact in (a, b) for file in artifact.files}
    assert catalog.users_of_blob(a.files[1].sha256) == [a.id]
    assert catalog.users_of_blob("0" * 64) == []


def test_more_artifacts_than_one_query_takes(catalog: Catalog, make_artifact: Make) -> None:
    added = [catalog.add(make_artifact(str(i))) for i in range(20)]
    ids = [artifact.id for artifact in added] * 60  # 1200 ids: three queries, repeats among them
    assert catalog.get_many(ids) == {artifact.id: artifact for artifact in added}


# Names


def test_a_name_counts_its_versions(catalog: Catalog, make_artifact: Make) -> None:
    a, b = catalog.add(make_artifact("a")), catalog.add(make_artifact("b"))
    assert [catalog.name(x.id, "quickstart") for x in (a, a, b, b, a)] == [1, 1, 2, 2, 3]
    assert catalog.resolve("quickstart") == a
    assert catalog.resolve("quickstart@1") == a
    assert catalog.resolve("quickstart@2") == b
    assert [str(named) for named in catalog.names()] == ["quickstart@1", "quickstart@2", "quickstart@3"]
    assert [named.version for named in catalog.names(artifact_id=a.id)] == [1, 3]


def test_a_text_that_cannot_be_a_name_is_refused(catalog: Catalog, make_artifact: Make) -> None:
    artifact = catalog.add(make_artifact("a"))
    for name in ("", "a@b", "a/b", ".hidden", "-x", "a b", "x" * 101, "ü", "a\n"):
        with pytest.raises(StoreError, match="cannot be a name"):
            catalog.name(artifact.id, name)
    assert catalog.name(artifact.id, "x" * 100) == 1


def test_naming_what_is_not_there_is_refused(catalog: Catalog) -> None:
    with pytest.raises(ArtifactNotFound):
        catalog.name("f" * 64, "quickstart")
    assert catalog.names() == []


def test_a_prefix_of_an_id_is_enough_if_only_one_has_it(catalog: Catalog, make_artifact: Make) -> None:
    a = catalog.add(make_artifact("a", id="abcd" + "0" * 60))
    catalog.add(make_artifact("b", id="abce" + "0" * 60))
    assert catalog.resolve("abcd") == a == catalog.resolve(a.id)
    for target in ("abc", "abcf", "abcd" + "0" * 61):
        with pytest.raises(ArtifactNotFound):
            catalog.resolve(target)


def test_an_ambiguous_prefix_lists_what_it_may_mean(catalog: Catalog, make_artifact: Make) -> None:
    catalog.add(make_artifact("a", id="abcd1" + "0" * 59, kind="shards"))
    catalog.add(make_artifact("b", id="abcd2" + "0" * 59, kind="model"))
    with pytest.raises(ArtifactNotFound, match="fits several") as caught:
        catalog.resolve("abcd")
    assert caught.value.hint == "write more of it: abcd100000 (shards), abcd200000 (model)"


def test_a_name_comes_before_an_id_prefix(catalog: Catalog, make_artifact: Make) -> None:
    catalog.add(make_artifact("a", id="cafe" + "0" * 60))
    named = catalog.add(make_artifact("b"))
    catalog.name(named.id, "cafe")
    assert catalog.resolve("cafe") == named
    assert catalog.resolve("cafe0") != named


NEARBY = [
    ("quickstrat", "did you mean 'quickstart'?"),
    ("quickstrat@1", "did you mean 'quickstart'?"),
    ("zzz", "known names: other, quickstart"),
    ("quickstart@7", "versions are 1 to 1"),
    ("quickstart@", "versions are 1 to 1"),
    ("quickstart@one", "versions are 1 to 1"),
    ("", "known names: other, quickstart"),
]


def test_an_unknown_target_says_what_is_near(catalog: Catalog, make_artifact: Make) -> None:
    artifact = catalog.add(make_artifact("a"))
    catalog.name(artifact.id, "quickstart")
    catalog.name(artifact.id, "other")
    for target, hint in NEARBY:
        with pytest.raises(ArtifactNotFound) as caught:
            catalog.resolve(target)
        assert caught.value.hint == hint, target


def test_an_empty_catalog_says_what_to_do(catalog: Catalog) -> None:
    with pytest.raises(ArtifactNotFound, match="no artifact is called 'quickstart'") as caught:
        catalog.resolve("quickstart")
    assert caught.value.hint is not None and "run a recipe" in caught.value.hint


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # one catalog for all examples: each takes names of its own
@given(steps=st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 2)), max_size=12), data=st.data())
def test_names_behave_like_lists_that_only_grow(
    catalog: Catalog, make_artifact: Make, steps: list[tuple[str, int]], data: st.DataObject
) -> None:
    known = [catalog.add(make_artifact(f"m{i}")) for i in range(3)]
    prefix = f"n{len({named.name for named in catalog.names()})}-"
    model: dict[str, list[str]] = {}
    for name, which in steps:
        versions = model.setdefault(prefix + name, [])
        if not versions or versions[-1] != known[which].id:
            versions.append(known[which].id)
        assert catalog.name(known[which].id, prefix + name) == len(versions)
    for name, versions in model.items():
        assert [named.artifact_id for named in catalog.names(name=name)] == versions
        assert catalog.resolve(name).id == versions[-1]


NAME = """
import sys
from pathlib import Path
from marrow.store.catalog import Catalog
from marrow.store.database import Database
database = Database(Path(sys.argv[1]), sys.argv[2])
for i in range(20):
    Catalog(database).name(sys.argv[3 + i % 2], "shared")
database.close()
"""


@pytest.mark.parametrize(
    "catalog_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_two_processes_name_without_losing_a_version(
    catalog: Catalog, make_artifact: Make, home: Path, catalog_url: str, spawn: Callable[..., Any]
) -> None:
    a, b = catalog.add(make_artifact("a")), catalog.add(make_artifact("b"))
    for child in [spawn(NAME, home, catalog_url, a.id, b.id) for _ in range(2)]:
        child.result()
    versions = catalog.names(name="shared")
    assert [named.version for named in versions] == list(range(1, len(versions) + 1))
    assert len(versions) >= 20
    for before, after in itertools.pairwise(versions):
        assert before.artifact_id != after.artifact_id
