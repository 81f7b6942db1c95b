"""Flat TOML: every key is found on its line, and nothing that only looks like a key is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import RecipeError
from marrow.core.flat_toml import TABLE, cut_setting, flatten, join_key, key_lines, read_flat, split_key


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", {}),
        ("a = 1\n\nb = 2", {"a": 1, "b": 3}),
        ("[t]\na = 1\n[t.u]\nb = 1", {"t": 1, "t.a": 2, "t.u": 3, "t.u.b": 4}),
        ("[[t]]\na = 1\n[[t]]\na = 2\n", {"t": 1, "t.a": 2}),
        ("t.u . v = 1\n'q'.\"r\" = 2", {"t.u.v": 1, "q.r": 2}),
        ("a = [\n  [1, 2]\n]\nb = 1", {"a": 1, "b": 4}),
        ("a = [\n  { b = 1 },\n  {\n b = 2 }\n]\nc = 1", {"a": 1, "c": 6}),
        ("a = '''\nb = 1\n[t]\n'''\nc = 1", {"a": 1, "c": 5}),
        ('a = """\nb = \\"""\nc = 1""""\nd = 1', {"a": 1, "d": 4}),
        ("# '''\na = 1 # \"\"\"\nb = 1", {"a": 2, "b": 3}),
        ('a = \'# [\' # ]\nb = "\\"[#"\nc = 1', {"a": 1, "b": 2, "c": 3}),
        ("a = 1\r\n[t] # x\r\nb = 1\r\n", {"a": 1, "t": 2, "t.b": 3}),
        ("a = '\u2028\x85'\nb = 1", {"a": 1, "b": 2}),
        ('[t.\'a.b\']\n"x = [" = 1\n"\\"" = 2', {'t."a.b"': 1, 't."a.b"."x = ["': 2, 't."a.b"."\\""': 3}),
        ('[ t . "[u]" ]\na = 1', {'t."[u]"': 1, 't."[u]".a': 2}),
    ],
)
def test_each_key_and_header_is_found_on_its_line(text, lines):
    assert key_lines(text) == lines


def test_a_value_is_flattened_with_its_tables():
    tree = {"a": 1, "t": {"b": [{"c": 1}], "u": {}}}
    assert list(flatten("", tree)) == [("a", 1), ("t", TABLE), ("t.b", [{"c": 1}]), ("t.u", TABLE)]


@given(st.lists(st.text(max_size=6), min_size=1, max_size=4))
def test_a_key_is_joined_and_split_again(names):
    assert split_key(join_key(*names)) == names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.b=c=d", ("a.b", "=", "c=d")),
        (' a."b=c" = "d=e"', ('a."b=c"', "=", ' "d=e"')),
        ("a", ("a", "", "")),
        ("=3", ("", "=", "3")),
        ('a"b=3', ('a"b', "=", "3")),
    ],
)
def test_a_setting_is_cut_outside_quotes(text, parts):
    assert cut_setting(text) == parts


def test_the_place_of_a_key_is_its_own_or_the_nearest(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("\n[a.b]\nc = { d = 1 }\n[e]\n")
    file = read_flat(path)
    lines = {key: file.place(key) for key in ("a", "a.b", "a.b.c", "a.b.c.d", "e", "x", "e.y")}
    assert lines == {
        key: f"{path}:{line}"
        for key, line in {"a": 2, "a.b": 2, "a.b.c": 3, "a.b.c.d": 3, "e": 4, "x": 1, "e.y": 4}.items()
    }


@pytest.mark.parametrize(
    ("text", "line"), [("a = 1\nb =\n", 2), ("a = [1,\n\n", 1), ("a = 1\na = 2\n", 2), ("a = '''\nx\n", 2)]
)
def test_what_is_no_toml_is_refused_with_a_line(tmp_path, text, line):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"r\.toml:{line}: ") as caught:
        read_flat(path)
    assert "at line" not in str(caught.value)


def test_a_recipe_nested_beyond_reason_is_refused(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("a = " + "[" * 5000)
    with pytest.raises(RecipeError, match=r"r\.toml:1: "):
        read_flat(path)
