"""Hashes: equal values have equal hashes, in every process; what has no canonical text is refused."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.hashes import (
    CHUNK_BYTES,
    canonical_json,
    check_file,
    hash_bytes,
    hash_file,
    hash_sources,
    hash_value,
)

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@dataclass(frozen=True)
class Point:
    x: int
    y: object = None


@given(values)
@settings(max_examples=100)
def test_canonical_json_is_json_and_says_the_same(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), values, min_size=1, max_size=6), st.randoms())
@settings(max_examples=60)
def test_the_order_of_keys_does_not_matter(value, random):
    keys = list(value)
    random.shuffle(keys)
    assert hash_value({key: value[key] for key in keys}) == hash_value(value)


@given(values, values)
@settings(max_examples=100)
def test_different_values_have_different_hashes(one, other):
    # 1 and 1.0 and True are equal in Python and differ here: the text tells them apart.
    assert (hash_value(one) == hash_value(other)) == (canonical_json(one) == canonical_json(other))


def test_the_canonical_text_of_each_kind():
    assert canonical_json({"b": (1, 2.0), "a": None}) == '{"a":null,"b":[1,2.0]}'
    assert canonical_json({3, 1, 2}) == canonical_json(frozenset([2, 3, 1])) == "[1,2,3]"
    assert canonical_json(Point(1, {"z": Path("a/b")})) == '{"x":1,"y":{"z":"a/b"}}'
    assert canonical_json(MappingProxyType({"a": 1})) == '{"a":1}'
    assert canonical_json("größe\u2028") == '"größe\u2028"'
    assert hash_value([1]) == hashlib.sha256(b"[1]").hexdigest() == hash_bytes(b"[1]")


@given(st.lists(st.text(), unique=True) | st.lists(st.tuples(st.integers(), st.text()), unique=True))
@settings(max_examples=60)
def test_sets_have_one_text_whatever_order_they_were_filled_in(items):
    text = canonical_json(set(items))
    assert canonical_json(frozenset(reversed(items))) == text
    assert json.loads(text) == json.loads(json.dumps(sorted(items)))


def test_a_set_without_an_order_is_refused():
    with pytest.raises(TypeError, match="not supported between"):
        canonical_json({1, "a"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [1, {"a": math.nan}]])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize("value", [object(), b"bytes", {"a": object()}, Point, 1j, lambda: 0])
def test_what_has_no_canonical_text_is_refused(value):
    with pytest.raises(TypeError, match="no canonical text"):
        canonical_json(value)


def test_keys_that_would_collide_or_have_no_order_are_refused():
    """json writes 1 and "1" as the same key: two values would have one hash."""
    for value in ({1: "a", "1": "b"}, {1: "a"}, {None: 1}, {True: 1}, {"deep": [{2: 1}]}):
        with pytest.raises(TypeError, match="keys"):
            canonical_json(value)


def test_hashes_are_equal_in_another_process_with_another_hash_seed():
    value = "{'b': {'x', 'y', 'zz', 'w'}, 'a': frozenset(map(str, range(50))), 'c': [1.5, None]}"
    code = f"from marrow.core.hashes import hash_value; print(hash_value({value}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {hash_value(eval(value)) + "\n"}


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES * 2 + 17])
def test_files_are_hashed_whole(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "file"
    path.write_bytes(data[:size])
    assert hash_file(path) == hashlib.sha256(data[:size]).hexdigest()
    assert check_file(path) == xxhash.xxh3_128(data[:size]).hexdigest()


@pytest.fixture
def sources(tmp_path) -> Path:
    folder = tmp_path / "package"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.py", "sub/b.py", "k.c", "k.h", "page.html"):
        (folder / name).write_text(f"content of {name}")
    return folder


def test_a_change_of_any_source_changes_the_hash(sources):
    before = hash_sources([sources])
    assert hash_sources([sources]) == before
    for name in ("a.py", "sub/b.py", "k.c", "k.h", "page.html"):
        path = sources / name
        old = path.read_text()
        path.write_text(old + "!")
        assert hash_sources([sources]) != before
        path.write_text(old)
    assert hash_sources([sources]) == before


def test_what_is_no_source_does_not_change_the_hash(sources):
    before = hash_sources([sources])
    (sources / "notes.md").write_text("x")
    (sources / "__pycache__").mkdir()
    (sources / "__pycache__" / "a.cpython-311.pyc").write_text("x")
    assert hash_sources([sources]) == before


def test_the_hash_of_sources_depends_on_where_they_are_to_each_other_and_not_on_the_checkout(
    sources, tmp_path
):
    """Two checkouts agree; a file moved to another folder is another source; order does not matter."""
    before = hash_sources([sources])
    other = tmp_path / "elsewhere" / "package"
    other.parent.mkdir()
    sources.rename(other)
    assert hash_sources([other]) == before
    assert hash_sources([other / "k.c", other / "a.py"]) == hash_sources([other / "a.py", other / "k.c"])
    (other / "sub").rename(other / "sub2")
    assert hash_sources([other]) != before
