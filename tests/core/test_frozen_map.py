"""A frozen map is a value: equal ones hash, iterate and print alike, and nothing changes them."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.frozen_map import EMPTY, FrozenMap
from marrow.core.hashes import canonical_json

ITEMS = st.dictionaries(st.text(max_size=4), st.integers(), max_size=8)


@given(ITEMS, st.randoms(use_true_random=False))
def test_equal_maps_iterate_hash_and_print_alike_however_they_were_written(items, random) -> None:
    shuffled = list(items.items())
    random.shuffle(shuffled)
    one, other = FrozenMap(items), FrozenMap(shuffled)
    assert one == other == items
    assert list(one) == list(other) == sorted(items)
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)
    assert canonical_json(one) == canonical_json(dict(shuffled))


@given(ITEMS, ITEMS)
def test_it_is_equal_to_just_the_mappings_with_its_items(first, second) -> None:
    assert (FrozenMap(first) == FrozenMap(second)) == (first == second)
    assert (FrozenMap(first) == second) == (first == second)


@given(ITEMS)
def test_it_reads_like_the_dictionary_it_was_made_of(items) -> None:
    frozen = FrozenMap(items)
    assert isinstance(frozen, Mapping)
    assert len(frozen) == len(items)
    assert dict(frozen) == items
    assert all(frozen[key] == value and frozen.get(key) == value for key, value in items.items())
    assert "no such key" not in frozen


def test_a_later_change_of_the_dictionary_does_not_reach_it() -> None:
    source = {"a": 1}
    frozen = FrozenMap(source)
    source["a"] = 2
    source["b"] = 3
    assert dict(frozen) == {"a": 1}


def test_nothing_can_be_set_or_deleted() -> None:
    frozen = FrozenMap({"a": 1})
    with pytest.raises(TypeError):
        frozen["a"] = 2  # type: ignore[index]
    with pytest.raises(TypeError):
        del frozen["a"]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        frozen.extra = 1  # type: ignore[attr-defined]
    assert dict(frozen) == {"a": 1}


def test_a_key_that_is_missing_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="b"):
        FrozenMap({"a": 1})["b"]


def test_values_that_cannot_be_hashed_say_so_only_when_asked() -> None:
    frozen = FrozenMap({"a": [1]})
    assert frozen["a"] == [1]
    with pytest.raises(TypeError, match="unhashable"):
        hash(frozen)


def test_the_empty_one_equals_any_other_empty_one() -> None:
    assert FrozenMap() == EMPTY == {}
    assert (len(EMPTY), list(EMPTY), hash(EMPTY)) == (0, [], hash(FrozenMap({})))
