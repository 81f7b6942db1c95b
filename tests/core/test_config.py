"""Recipes: what is written is what runs, and what is wrong is named with its line."""

import copy
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.config import Bytes, Count, Duration, Range, Recipe, load_recipe
from marrow.core.errors import RecipeError
from marrow.core.frozen_map import EMPTY, FrozenMap
from marrow.core.hashes import hash_value


@dataclass(frozen=True, slots=True)
class Inner:
    min_chars: int = 16
    share: Annotated[float, Range(0, 1)] = 0.5


@dataclass(frozen=True, slots=True)
class Data:
    source: str = "python"
    quality: Inner = Inner()


@dataclass(frozen=True, slots=True)
class Train:
    steps: Annotated[Count, Range(1)] = 1000
    lr: Annotated[float, Range(low=0)] = 3e-4
    optimiser: Literal["muon", "adamw"] = "muon"
    fused: bool = True
    cache: Bytes = 1 << 20
    every: Annotated[Duration, Range(0, 3600)] = 30.0
    clip: Annotated[float, Range(0, 10)] | None = None
    threads: int | Literal["auto"] = "auto"
    betas: tuple[float, ...] = (0.9, 0.95)
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("steps = 13 brings bad luck")


@dataclass(frozen=True, slots=True)
class Needs:
    folder: str


SCHEMA: dict[str, type] = {"data": Data, "train": Train}
Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path) -> Load:
    def write_and_load(text: str, *overrides: str, schema: dict[str, type] = SCHEMA) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8", newline="")
        return load_recipe(path, schema, overrides)

    return write_and_load


def refusal(load: Load, text: str, *overrides: str, schema: dict[str, type] = SCHEMA) -> str:
    """Return the message of the refusal, the path of the recipe left out but for its name."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, schema=schema)
    assert caught.value.exit_code == 2
    return re.sub(r"\S*/(?=\w+\.toml)", "", str(caught.value))


# What is written is what runs


def test_values_units_and_defaults_become_the_sections(load):
    recipe = load(
        """
        [train]
        steps = "2.5k"
        lr = 1
        optimiser = "adamw"
        fused = false
        cache = "64MiB"
        every = "2 min"
        clip = 1
        threads = 4
        betas = [0.8, 1]
        [data.quality]
        min_chars = 1_000
        """
    )
    assert recipe.section(Train) == Train(2500, 1.0, "adamw", False, 64 << 20, 120.0, 1.0, 4, (0.8, 1.0), ())
    assert isinstance(recipe.section(Train).lr, float)
    assert recipe.sections["data"] == Data("python", Inner(1000))
    assert recipe.name == "recipe"


def test_an_empty_recipe_and_empty_tables_are_all_defaults(load):
    assert load("").sections == {"data": Data(), "train": Train()}
    assert load("[train]\n[data]\n[data.quality]\n").sections == {"data": Data(), "train": Train()}


@pytest.mark.parametrize(
    "text",
    [
        "[data]\nsource = 'x'\n[data.quality]\nmin_chars = 3\n",
        "data.source = 'x'\ndata.quality.min_chars = 3\n",
        "data = { source = 'x', quality = { min_chars = 3 } }\n",
        "[data]\nsource = 'x'\nquality = {min_chars = 3}\n",
        "[data]\r\nsource = 'x'\r\nquality.min_chars = 3\r\n",
        "\ufeff[data]\nsource = 'x'\nquality.min_chars = 3\n",
    ],
)
def test_every_way_to_write_a_table_is_the_same_recipe(load, text):
    recipe = load(text)
    assert recipe.sections["data"] == Data("x", Inner(3))
    assert recipe.hash == load("", "data.source=x", "data.quality.min_chars=3").hash


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("7", 7),
        ("'7'", 7),
        ("'1kB'", 1000),
        ("'1kiB'", 1024),
        ("'1KiB'", 1024),
        ("'1.5 GiB'", 3 << 29),
        ("'2_000 MB'", 2 * 10**9),
        ("1e3", 1000),
        ("'2.3 MB'", 2_300_000),
        ("'4.35 kB'", 4350),
        ("'9007199254740993'", 9007199254740993),
    ],
)
def test_sizes_are_exact(load, text, cache):
    assert load(f"train.cache = {text}").section(Train).cache == cache


@pytest.mark.parametrize(
    ("text", "every"), [("'250ms'", 0.25), ("'1.5s'", 1.5), ("'2m'", 120), ("'1h'", 3600), ("7", 7)]
)
def test_durations_are_seconds(load, text, every):
    assert load(f"train.every = {text}").section(Train).every == every


@pytest.mark.parametrize(
    ("text", "steps"), [("'2B tokens'", 2 * 10**9), ("'5 steps'", 5), ("'3k'", 3000), ("'1e3'", 1000)]
)
def test_counts_may_name_what_they_count(load, text, steps):
    assert load(f"train.steps = {text}").section(Train).steps == steps


@given(
    st.builds(
        Train,
        steps=st.integers(14, 2**53),
        lr=st.floats(0, 1e300, allow_nan=False),
        optimiser=st.sampled_from(["muon", "adamw"]),
        fused=st.booleans(),
        cache=st.integers(-(2**60), 2**60),
        every=st.floats(0, 3600),
        clip=st.floats(0, 10),
        threads=st.one_of(st.just("auto"), st.integers(0, 9)),
        betas=st.lists(st.floats(-1e6, 1e6), max_size=4).map(tuple),
        prompts=st.lists(st.text("ab \"'#=[]\n\\\té\u2028", max_size=12), max_size=4).map(tuple),
    )
)
@settings(max_examples=60, deadline=None)
def test_a_recipe_written_out_reads_back_the_same(tmp_path_factory, section):
    text = "[train]\n" + "".join(f"{name} = {toml(value)}\n" for name, value in asdict(section).items())
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path, SCHEMA)
    assert recipe.section(Train) == section
    lines = {key: str(origin).rsplit(":", 1)[1] for key, origin in recipe.origins.items() if "train" in key}
    assert lines == {f"train.{name}": str(i) for i, name in enumerate(asdict(section), 2)}


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\x7f": "\\u007f"}
        return '"' + "".join(escapes.get(letter, letter) for letter in value) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return repr(value)


# The hash, the command line, the base, origins


def test_the_hash_does_not_depend_on_how_values_are_written(load):
    hashes = {
        load("").hash,
        load("[train]\nsteps = 1000\n").hash,
        load("[train]\nsteps = '1k'\n# a comment\n").hash,
        load("", "train.lr=0.0003").hash,
        load("[train]\nlr = 1\n", "train.lr=3e-4").hash,
    }
    assert len(hashes) == 1
    assert load("", "train.lr=0.0004").hash not in hashes


def test_the_command_line_wins_and_takes_toml_or_plain_text(load):
    recipe = load(
        "[train]\nsteps = 5\n",
        "train.steps=7",
        "train.optimiser=adamw",
        "train.betas=[0.5]",
        "train.fused=false",
        "data.source=s3://bucket/a b",
        "data.quality={min_chars = 9}",
        "train.steps=8",
    )
    train = recipe.section(Train)
    assert (train.steps, train.optimiser, train.betas, train.fused) == (8, "adamw", (0.5,), False)
    assert recipe.section(Data) == Data("s3://bucket/a b", Inner(9))


def test_a_base_gives_the_values_that_the_recipe_leaves_out(tmp_path, load):
    (tmp_path / "base.toml").write_text("[train]\nsteps = 5\nlr = 1.0\n")
    recipe = load("base = 'base.toml'\n[train]\nsteps = 6\n")
    assert replace(recipe.section(Train), steps=5) == Train(steps=5, lr=1.0)
    assert recipe.section(Train).steps == 6
    assert str(recipe.origins["train.lr"]) == f"{tmp_path}/base.toml:3"
    assert str(recipe.origins["train.steps"]) == f"{tmp_path}/recipe.toml:3"


def test_a_value_remembers_where_it_came_from(tmp_path, load):
    origins = load("\n[train]\n\nlr = 1\n", "train.steps=3").origins
    place = tmp_path / "recipe.toml"
    assert {key: str(origin) for key, origin in origins.items() if key in ("train.lr", "train.steps")} == {
        "train.lr": f"{place}:4",
        "train.steps": "--set train.steps=3",
    }
    assert str(origins["train.fused"]) == "default"
    assert set(origins) >= {f"train.{name}" for name in asdict(Train())} | {"data.quality.min_chars"}


LAYOUT = '''# a header
base_comment = "# not [a.table] and no \\"""
[data]   # comment with """ and ['
source = """
[train]
steps = 3
"""
[ data . quality ]
"min_chars" = 3
'share' = 1

[train]
prompts = [
  "x = 1",  # ]
  \'\'\'[y]\'\'\',
]
betas = [
  1.0
]
clip = 1
'''


def test_lines_are_right_behind_strings_arrays_and_comments(load):
    text = LAYOUT.replace('base_comment = "# not [a.table] and no \\"""\n', "\n")
    origins = load(text).origins
    lines = {key: int(str(origin).rsplit(":", 1)[1]) for key, origin in origins.items() if ":" in str(origin)}
    assert lines == {
        "data.source": 4,
        "data.quality.min_chars": 9,
        "data.quality.share": 10,
        "train.prompts": 13,
        "train.betas": 17,
        "train.clip": 20,
    }


# Refusals: each with its place and a way out

REFUSALS = [
    (
        "[train]\nlr = 1\nstpes = 3\n",
        "recipe.toml:3: unknown key in [train]: 'stpes'",
        "did you mean 'steps'?",
    ),
    ("[trian]\n\nsteps = 3\n", "recipe.toml:1: unknown table: 'trian'", "did you mean 'train'?"),
    ("[trian]\n", "recipe.toml:1: unknown table: 'trian'", "did you mean 'train'?"),
    ("[xyz]\na = 1\n", "recipe.toml:1: unknown table: 'xyz'", "known: data, train"),
    ("\nsteps = 3\n", "recipe.toml:2: unknown key: 'steps'", "did you mean 'train.steps'?"),
    ("[data]\nsteps = 3\n", "recipe.toml:2: unknown key in [data]: 'steps'", "did you mean 'train.steps'?"),
    ("[data.quality]\nmin_chrs = 3\n", "recipe.toml:2: unknown key in [data.quality]", "'min_chars'?"),
    ("[data.qualty]\nmin_chars = 3\n", "recipe.toml:1: unknown key in [data]: 'qualty'", "'quality'?"),
    ("[data]\n\nquality = {min_char = 3}\n", "recipe.toml:3: unknown key in [data.quality]", "'min_chars'?"),
    (
        "[[train]]\nsteps = 3\n",
        "recipe.toml:1: train = [{'steps': 3}] is a list, not a table",
        "write [train]",
    ),
    ("train = 3\n", "recipe.toml:1: train = 3 is a whole number, not a table", "write [train]"),
    ("[data]\nquality = 3\n", "recipe.toml:2: data.quality = 3 is a whole number", "write [data.quality]"),
    ("[train.lr]\nx = 1\n", "recipe.toml:1: train.lr is a table, not a number", "write a number"),
    ("[train]\nlr = {}\n", "recipe.toml:2: train.lr is a table, not a number", "write a number"),
    (
        "[train]\nsteps = 'many'\n",
        "recipe.toml:2: train.steps = 'many' is not a count",
        "units: k, K, M, B, T",
    ),
    ("[train]\nsteps = 1.5\n", "train.steps = 1.5 is a number, not a count", "write a count such as"),
    ("[train]\nsteps = '1.5'\n", "train.steps = '1.5' is not a count", "write a number"),
    ("[train]\nsteps = '9e999'\n", "train.steps = '9e999' is not a count", "write a number"),
    (
        "[train]\ncache = '3 XiB'\n",
        "recipe.toml:2: train.cache = '3 XiB' is not a size in bytes",
        "KiB, MB, MiB",
    ),
    (
        "[train]\nevery = '3 s ago'\n",
        "train.every = '3 s ago' is not a duration",
        "units: ms, s, m, min, h, d",
    ),
    (
        "[train]\nevery = '2h'\n",
        "recipe.toml:2: train.every = '2h' is out of range",
        "at least 0 and at most 3600",
    ),
    ("[train]\nsteps = 0\n", "recipe.toml:2: train.steps = 0 is out of range", "at least 1"),
    ("[train]\nclip = 11\n", "train.clip = 11 is out of range", "at most 10"),
    ("[train]\nlr = nan\n", "recipe.toml:2: train.lr = nan is no finite number", "finite"),
    ("[train]\nlr = inf\n", "recipe.toml:2: train.lr = inf is no finite number", "finite"),
    ("[train]\nlr = true\n", "train.lr = True is a true or false, not a number", "write a number"),
    ("[train]\nfused = 1\n", "train.fused = 1 is a whole number, not a true or false", "true or false"),
    ("[train]\noptimiser = 'adam'\n", "train.optimiser = 'adam' is none of 'muon', 'adamw'", "'adamw'?"),
    ("[train]\nbetas = 0.9\n", "train.betas = 0.9 is a number, not a list of numbers", "list of numbers"),
    ("[train]\nbetas = [0.9, 'x']\n", "recipe.toml:2: train.betas = 'x' is a string", "write a number"),
    ("[data]\nsource = 3\n", "recipe.toml:2: data.source = 3 is a whole number, not a string", "string"),
    ("[train]\nsteps = 13\n", "recipe.toml:2: [train] steps = 13 brings bad luck", ""),
    ("[train]\nsteps = \n", "recipe.toml:2: ", "TOML"),
    ("[train]\nsteps = 1\nsteps = 2\n", "recipe.toml:3: ", "TOML"),
    ("base = 3\n", "recipe.toml:1: base = 3 is a whole number, not a string", "write a string"),
    ("base = 'none.toml'\n", "no recipe at none.toml", "did you mean recipe.toml?"),
    ("base = 'recipe.toml'\n", "recipe.toml:1: base = 'recipe.toml': a base may not have a base", "copy"),
]


@pytest.mark.parametrize(("text", "says", "hint"), REFUSALS, ids=[repr(text) for text, _, _ in REFUSALS])
def test_what_is_wrong_is_named_with_its_line(load, text, says, hint):
    message = refusal(load, text)
    assert says in message
    assert hint in message.partition("hint: ")[2]


@pytest.mark.parametrize(
    ("override", "says", "hint"),
    [
        ("train.lr", "--set train.lr: no value", "--set table.key=value"),
        ("=3", "--set =3: no value", "--set table.key=value"),
        ("lr=3", "--set lr=3: unknown key: 'lr'", "did you mean 'train.lr'?"),
        ("trian.lr=3", "--set trian.lr=3: unknown table: 'trian'", "did you mean 'train'?"),
        ("train.l=3", "--set train.l=3: unknown key in [train]: 'l'", "did you mean 'lr'?"),
        ("train.lr=fast", "--set train.lr=fast: train.lr = 'fast' is a string", "write a number"),
        ("train.lr=", "--set train.lr=: train.lr = '' is a string", "write a number"),
        ("data.quality=3", "--set data.quality=3: data.quality = 3", "write"),
        ("train.steps.x=3", "--set train.steps.x=3: train.steps is a table", "write a count"),
        ("train={lrr=1}", "--set train={lrr=1}: unknown key in [train]: 'lrr'", "did you mean 'lr'?"),
    ],
)
def test_the_command_line_is_refused_with_its_own_words(load, override, says, hint):
    message = refusal(load, "", override)
    assert says in message
    assert hint in message


def test_a_missing_value_names_file_and_table(load):
    message = refusal(load, "\n", schema={"needs": Needs})
    assert "recipe.toml: [needs] needs folder" in message
    assert "recipe.toml:2: [needs] needs folder" in refusal(load, "\n[needs]\n", schema={"needs": Needs})
    assert "add folder = ... to [needs]" in message


def test_a_missing_recipe_suggests_a_near_name(tmp_path, load):
    load("")
    with pytest.raises(RecipeError, match=r"did you mean .*recipe\.toml\?"):
        load_recipe(tmp_path / "recip.toml", SCHEMA)
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path, SCHEMA)
    (tmp_path / "latin.toml").write_bytes(b"[data]\nsource = '\xe9'\n")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "latin.toml", SCHEMA)


@given(st.text("tra in[]=.#\"'{}\n\\1e,", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_recipe_or_a_recipe_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_text(text)
    refused = None
    try:
        load_recipe(path, SCHEMA)
    except RecipeError as error:
        refused = error
    assert refused is None or "fuzz.toml" in str(refused)


# Tables with free keys


@dataclass(frozen=True, slots=True)
class Bounds:
    low: float | None = None
    high: float | None = None
    level: Literal["warn", "fail"] = "fail"

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low = {self.low:g} is more than high = {self.high:g}")


@dataclass(frozen=True, slots=True)
class Free:
    types: Mapping[str, str] = EMPTY
    weights: Mapping[str, Annotated[float, Range(0, 10)]] = EMPTY
    expect: Mapping[str, Bounds] = EMPTY
    level: str = ""


FREE: dict[str, type] = {"data": Free, "train": Train}


def test_a_table_with_free_keys_holds_values_or_tables(load):
    recipe = load(
        "[data.types]\nprice = 'float64'\nid = 'int64'\n"
        "[data.weights]\nweb = 1\n"
        "[data.expect.price]\nlow = 0\n[data.expect.id]\nlevel = 'warn'\n",
        schema=FREE,
    )
    data = recipe.section(Free)
    assert data.types == {"id": "int64", "price": "float64"}
    assert data.weights == {"web": 1.0}
    assert isinstance(data.weights["web"], float)
    assert data.expect == {"price": Bounds(low=0.0), "id": Bounds(level="warn")}


def test_without_a_word_such_a_table_is_empty_and_cannot_be_filled(load):
    recipe = load("", schema=FREE)
    assert recipe.section(Free) == Free()
    assert recipe.section(Free).types == {}
    assert str(recipe.origins["data.types"]) == "default"
    with pytest.raises(TypeError):
        recipe.section(Free).types["a"] = "b"  # type: ignore[index]
    assert load("[data.types]\n[data.expect]\n", schema=FREE).hash == recipe.hash


ODD = [
    "a.b",
    "price (EUR)",
    'say "hi"',
    "it's",
    "a=b",
    "größe",
    "[x]",
    "#1",
    " ",
    "",
    "tab\there",
    "a\\b",
    "\x7f",
]


@pytest.mark.parametrize("name", ODD)
def test_a_free_key_may_have_any_name(load, name):
    quoted = toml(name)
    for text in (
        f"[data.expect.{quoted}]\nlow = 3\n",
        f"[data . expect]\n{quoted} . low = 3\n",
        f"[data]\nexpect = {{ {quoted} = {{ low = 3 }} }}\n",
        f"[data.expect]\n{quoted} = {{ low = 3 }}\n",
    ):
        recipe = load(text, schema=FREE)
        assert recipe.section(Free).expect == {name: Bounds(low=3.0)}
        places = {key: str(origin) for key, origin in recipe.origins.items() if key.startswith("data.expect")}
        assert len(places) == 3
        assert sum(bool(re.search(r":[12]$", place)) for place in places.values()) == 1
    typed = load("", f"data.types.{quoted}=int64", schema=FREE)
    assert typed.section(Free).types == {name: "int64"}


def test_the_line_of_a_quoted_key_is_its_own(tmp_path, load):
    text = "[data.types]\n'a.b' = 'x'\n\"c \\\" [d]\" = 'y'\n[data.expect.\"e.f\"]\nhigh = 3\n"
    origins = load(text, schema=FREE).origins
    lines = {
        key: str(origin).rpartition(":")[2] for key, origin in origins.items() if "recipe" in str(origin)
    }
    assert lines == {
        'data.types."a.b"': "2",
        'data.types."c \\" [d]"': "3",
        'data.expect."e.f".high': "5",
    }


def test_the_command_line_adds_to_a_table_with_free_keys(load):
    recipe = load(
        "[data.types]\nprice = 'int64'\nid = 'int64'\n",
        "data.types.price=float64",
        "data.weights={web = 2, books = 3}",
        "data.expect.price.low=1",
        schema=FREE,
    )
    data = recipe.section(Free)
    assert data.types == {"id": "int64", "price": "float64"}
    assert data.weights == {"books": 3.0, "web": 2.0}
    assert data.expect == {"price": Bounds(low=1.0)}
    assert str(recipe.origins["data.types.price"]) == "--set data.types.price=float64"
    assert str(recipe.origins["data.types.id"]).endswith("recipe.toml:3")


def test_a_base_and_its_recipe_fill_one_table(tmp_path, load):
    (tmp_path / "base.toml").write_text("[data.types]\na = 'x'\nb = 'x'\n[data.expect.a]\nlow = 1\n")
    data = load("base = 'base.toml'\n[data.types]\nb = 'y'\n[data.expect.a]\nhigh = 2\n", schema=FREE)
    assert data.section(Free).types == {"a": "x", "b": "y"}
    assert data.section(Free).expect == {"a": Bounds(1.0, 2.0)}


def test_the_order_of_writing_changes_neither_hash_nor_order(load):
    one = load("[data.types]\nb = 'x'\na = 'y'\n", schema=FREE)
    two = load("[data.types]\na = 'y'\nb = 'x'\n", schema=FREE)
    assert one.hash == two.hash
    assert list(one.section(Free).types) == list(two.section(Free).types) == ["a", "b"]
    assert load("[data.types]\na = 'x'\nb = 'y'\n", schema=FREE).hash != one.hash


def test_a_map_is_a_value(load):
    section = load("[data.expect.a]\nlow = 1\n[data.types]\nb = 'c'\n", schema=FREE).section(Free)
    for twin in (copy.deepcopy(section), pickle.loads(pickle.dumps(section)), replace(section)):
        assert twin == section
        assert hash(twin) == hash(section)
    assert hash_value(asdict(section)) == hash_value(section)
    assert FrozenMap({"a": 1}) != FrozenMap({"a": 2})


def test_a_thousand_columns_are_read_in_reasonable_time(load):
    text = "".join(f"[data.expect.c{i}]\nlow = {i}\nhigh = {i + 1}\n" for i in range(1000))
    assert len(load(text, schema=FREE).section(Free).expect) == 1000


FREE_REFUSALS = [
    (
        "[data.expect.price]\n\nlwo = 3\n",
        "recipe.toml:3: unknown key in [data.expect.price]: 'lwo'",
        "did you mean 'low'?",
    ),
    ("[data.expect]\nprice = 3\n", "recipe.toml:2: data.expect.price = 3 is", "write [data.expect.price]"),
    ("[data.types]\na = 3\n", "recipe.toml:2: data.types.a = 3 is a whole number, not a string", "string"),
    ("[data.types.a]\nb = 3\n", "recipe.toml:1: data.types.a is a table, not a string", "write a string"),
    ("[data]\ntypes = 'x'\n", "recipe.toml:2: data.types = 'x' is a string, not a table", "[data.types]"),
    ("[data.weights]\na = 11\n", "recipe.toml:2: data.weights.a = 11 is out of range", "at most 10"),
    ("[data.expect.p]\nlevel = 'fial'\n", "data.expect.p.level = 'fial' is none of", "did you mean 'fail'?"),
    ("[data.expect.p]\nlow = 2\nhigh = 1\n", "recipe.toml:2, ", "config show"),
    ("[data.expct.p]\nlow = 2\n", "recipe.toml:1: unknown key in [data]: 'expct'", "did you mean 'expect'?"),
    ("[train.'a.b']\nlr = 2\n", "recipe.toml:1: unknown key in [train]: 'a.b'", "known: "),
]


@pytest.mark.parametrize(("text", "says", "hint"), FREE_REFUSALS, ids=[t for t, _, _ in FREE_REFUSALS])
def test_what_is_wrong_within_free_keys_is_named_with_its_line(load, text, says, hint):
    message = refusal(load, text, schema=FREE)
    assert says in message
    assert hint in message.partition("hint: ")[2]


@given(st.dictionaries(st.text(max_size=8).filter(lambda s: s.isprintable()), st.floats(0, 10), max_size=5))
@settings(max_examples=60, deadline=None)
def test_free_keys_written_out_read_back_the_same(tmp_path_factory, weights):
    text = "[data.weights]\n" + "".join(f"{toml(name)} = {value!r}\n" for name, value in weights.items())
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path, FREE)
    assert recipe.section(Free).weights == weights
    lines = sorted(
        str(o).rsplit(":", 1)[1] for k, o in recipe.origins.items() if k.startswith("data.weights.")
    )
    assert lines == sorted(str(i) for i in range(2, 2 + len(weights)))
