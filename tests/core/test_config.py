"""Recipes: what is written is what runs, and what is wrong is named with its line."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.config import Bytes, Count, Duration, Range, Recipe, load_recipe
from marrow.core.errors import RecipeError


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
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
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
