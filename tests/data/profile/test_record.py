"""Profiles as files: what is written is read back the same, and what is no profile is said so."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.data.profile.record import SHARES, VERSION, ColumnProfile, Distribution, Profile, read_profile

FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 10**12)
DISTRIBUTIONS = st.builds(
    Distribution,
    COUNTS,
    st.none() | FINITE,
    st.none() | FINITE,
    st.none() | FINITE,
    st.none() | FINITE,
    st.lists(FINITE, min_size=len(SHARES), max_size=len(SHARES)).map(tuple),
    st.floats(0, 1),
    st.lists(st.tuples(FINITE, FINITE, FINITE), max_size=4).map(tuple),
    st.floats(0, 1),
    st.lists(st.tuples(FINITE, FINITE, COUNTS), max_size=4).map(tuple),
)
COLUMNS = st.builds(
    ColumnProfile,
    st.text(max_size=6),
    st.sampled_from(["int64", "string", "struct<a: int64>"]),
    st.sampled_from(["number", "text", "time"]),
    COUNTS,
    COUNTS,
    COUNTS,
    COUNTS,
    st.none() | COUNTS,
    st.floats(0, 1),
    st.lists(st.tuples(st.text(max_size=6), COUNTS), max_size=3).map(tuple),
    COUNTS,
    st.none() | st.text(max_size=6),
    st.none() | st.text(max_size=6),
    st.sampled_from(["values", "characters"]),
    st.none() | DISTRIBUTIONS,
)
PROFILES = st.builds(
    Profile,
    COUNTS,
    st.lists(st.text(max_size=6), max_size=3).map(tuple),
    st.lists(COLUMNS, max_size=4).map(tuple),
)


@given(PROFILES)
@settings(max_examples=50)
def test_what_is_written_is_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, profile: Profile
) -> None:
    path = tmp_path_factory.getbasetemp() / "profile-there-and-back.json"
    profile.write(path)
    assert read_profile(path) == profile
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert values["version"] == VERSION
    path.unlink()


@given(PROFILES)
@settings(max_examples=20)
def test_a_column_is_found_by_its_name_the_first_of_several(profile: Profile) -> None:
    for column in profile.columns:
        first = next(one for one in profile.columns if one.name == column.name)
        assert profile.column(column.name) is first
    assert profile.column("no such column") is None


SMALL = Profile(
    4,
    ("a.csv",),
    (
        ColumnProfile(
            "n", "int64", "number", 4, 1, 0, 0, 3, 0.0, (("1", 1),), 0, "1", "3", "values",
            Distribution(
                3, 1.0, 3.0, 2.0, 0.8, (1.0,) * len(SHARES), 0.0, ((1.0, 0.0, 1.0),), 0.0, ((1.0, 3.0, 3),)
            ),
        ),
    ),
)  # fmt: skip


def told(spoil: Callable[[dict[str, Any]], Any]) -> str:
    """A profile's file after something was done to its values."""
    values = json.loads(json.dumps(SMALL.as_dict()))
    spoil(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (told(lambda v: v.update(version=VERSION + 1)), "another version"),
        (told(lambda v: v.pop("version")), "version"),
        (told(lambda v: v.pop("rows")), "rows"),
        (told(lambda v: v.pop("columns")), "columns"),
        (told(lambda v: v.update(columns=None)), "no profile"),
        (told(lambda v: v.update(columns=[7])), "no profile"),
        (told(lambda v: v["columns"][0].pop("nulls")), "nulls"),
        (told(lambda v: v["columns"][0].update(size=1)), "size"),
        (told(lambda v: v["columns"][0]["numbers"].pop("gap")), "gap"),
        (told(lambda v: v["columns"][0].update(numbers=[1])), "no profile"),
        ("not json", "no profile"),
        ("null", "no profile"),
        ('"text"', "no profile"),
        ('{"version": 1', "no profile"),
    ],
)
def test_what_is_no_profile_is_named_with_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"p\.json") as caught:
        read_profile(path)
    assert words in str(caught.value) and caught.value.hint


def test_bytes_that_are_no_text_are_no_profile(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match="no profile"):
        read_profile(tmp_path / "p.json")


@pytest.mark.parametrize("place", ["gone.json", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, place: str) -> None:
    with pytest.raises(SourceError, match="cannot read the profile") as caught:
        read_profile(tmp_path / place)
    assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path, value: float) -> None:
    path = tmp_path / "p.json"
    SMALL.write(path)
    numbers = SMALL.columns[0].numbers
    assert numbers is not None
    odd = dataclasses.replace(SMALL.columns[0], numbers=dataclasses.replace(numbers, mean=value))
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(SMALL, columns=(odd,)).write(path)
    assert read_profile(path) == SMALL and [one.name for one in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(("rows", "nulls", "share"), [(4, 1, 0.25), (0, 0, 0.0), (3, 3, 1.0)])
def test_the_share_of_nulls_is_of_the_rows(rows: int, nulls: int, share: float) -> None:
    assert dataclasses.replace(SMALL.columns[0], rows=rows, nulls=nulls).null_share == share
