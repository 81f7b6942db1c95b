import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import MergeConflict
from marrow.store.datasets.manifests import Entry
from marrow.store.versions.merge import common_ancestor, is_ancestor, merge_entries

CONTENTS = st.sampled_from(["a", "b", "c"])
sides = st.dictionaries(st.sampled_from("pqrstu"), CONTENTS)


def entries(files: dict[str, str]) -> list[Entry]:
    return [Entry(name, content, 1) for name, content in sorted(files.items())]


def by_definition(was: str | None, own: str | None, new: str | None) -> str | None:
    """Three-way merge of one file, written out: who changed it wins."""
    if own == new:
        return own
    if own == was:
        return new
    if new == was:
        return own
    return "conflict"


def test_every_case_of_one_file_is_merged_by_definition() -> None:
    for was, own, new in itertools.product([None, "a", "b", "c"], repeat=3):
        base, ours, theirs = (entries({"f": c} if c else {}) for c in (was, own, new))
        wanted = by_definition(was, own, new)
        if wanted == "conflict":
            with pytest.raises(MergeConflict, match="1 file changed in both"):
                merge_entries(base, ours, theirs)
            assert merge_entries(base, ours, theirs, "ours") == (ours, ["f"])
            assert merge_entries(base, ours, theirs, "theirs") == (theirs, ["f"])
        else:
            assert merge_entries(base, ours, theirs) == (entries({"f": wanted} if wanted else {}), [])


@given(sides, sides, sides)
def test_merging_is_symmetric_and_loses_no_change(
    base: dict[str, str], ours: dict[str, str], theirs: dict[str, str]
) -> None:
    one, taken = merge_entries(entries(base), entries(ours), entries(theirs), "ours")
    other, same = merge_entries(entries(base), entries(theirs), entries(ours), "theirs")
    assert (one, taken) == (other, same)
    merged = {entry.name: entry.sha256 for entry in one}
    for name in base.keys() | ours.keys() | theirs.keys():
        wanted = by_definition(base.get(name), ours.get(name), theirs.get(name))
        assert merged.get(name) == (ours.get(name) if wanted == "conflict" else wanted)
        assert (name in taken) == (wanted == "conflict")


def test_a_conflict_names_files_sides_and_choices() -> None:
    base = {f"f{n:02d}": "a" for n in range(15)}
    ours = dict.fromkeys(base, "b")
    theirs = dict.fromkeys(base, "c") | {"new": "c"}
    del theirs["f03"]
    with pytest.raises(MergeConflict) as caught:
        merge_entries(entries(base), entries(ours), entries(theirs), names=("main", "work"))
    told = str(caught.value)
    assert "15 files changed in both main and work" in told
    assert "f03: changed in main, deleted in work" in told
    assert "and 5 more" in told
    assert "--take ours keeps those of main, --take theirs those of work" in told


def test_a_name_cannot_become_a_file_and_a_folder() -> None:
    ours, theirs = entries({"a": "1"}), entries({"a/b": "2"})
    for take in (None, "ours", "theirs"):
        with pytest.raises(MergeConflict, match="a: added"):
            merge_entries([], ours, theirs, take)  # type: ignore[arg-type]


GRAPH = {"1": [], "2": ["1"], "3": ["2"], "x": ["2"], "y": ["x"], "m": ["3", "y"], "z": ["y"], "other": []}


@pytest.mark.parametrize(
    ("one", "two", "shared"),
    [("3", "y", "2"), ("m", "z", "y"), ("3", "3", "3"), ("3", "1", "1"), ("m", "other", None)],
)
def test_the_common_ancestor_is_the_last_shared_version(one: str, two: str, shared: str | None) -> None:
    assert common_ancestor(one, two, GRAPH.__getitem__) == shared
    assert common_ancestor(two, one, GRAPH.__getitem__) == shared


def test_ancestors_include_the_version_itself() -> None:
    assert is_ancestor("2", "m", GRAPH.__getitem__)
    assert is_ancestor("m", "m", GRAPH.__getitem__)
    assert not is_ancestor("m", "2", GRAPH.__getitem__)
