r"""The `[data]` table of a recipe: where rows come from and what becomes of them.

    [data]
    source = "python"            # or a file, a folder, a glob
    text = "{title}\n\n{body}"   # a template over columns; default: all text columns
    group = "author"             # rows that share it stay on one side of the split
    [data.expect.price]          # of the rows; quality_config.py has the keys of these three
    min = 0
    [data.quality]               # of the documents
    min_chars = 16
    [data.pii]
    email = "replace"
    [data.dedup]
    near = "drop"
    [data.decontaminate]
    against = ["evals/*.jsonl"]
    [data.split]
    heldout_share = 0.08

`settings_of` tells which of these a step depends on, so that a change of the split re-runs the
split and not the reading.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal

from marrow.core.config import Bytes, Range
from marrow.core.frozen_map import EMPTY
from marrow.core.hashes import hash_file
from marrow.data.quality_config import Expectation, PiiRecipe, QualityRecipe

Step = Literal["ingest", "clean", "split"]

PYTHON = "python"
# What a recipe may ask of a column, and how messages and Arrow call the same.
TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float32", "float64", "date", "timestamp", "string", "binary"),
)
TYPE_ALIASES = {
    "float": "float32",
    "double": "float64",
    "text": "string",
    "date32": "date",
    "date32[day]": "date",
    "timestamp[us]": "timestamp",
}


@dataclass(frozen=True, slots=True)
class DedupRecipe:
    """What happens to duplicates (`data/dedup/duplicates.py`).

    exact: drop all but the first of equal texts. near: "drop" near-duplicates, "keep" them in one
    cluster (one side of the split), or "off": not looked for. similarity: Jaccard similarity of
    5-word shingles from which two texts are near-duplicates.
    """

    exact: bool = True
    near: Literal["drop", "keep", "off"] = "drop"
    similarity: Annotated[float, Range(0.5, 0.99)] = 0.8


@dataclass(frozen=True, slots=True)
class DecontaminateRecipe:
    """Which documents go because an evaluation asks for what they say (`data/dedup/decontaminate.py`).

    against: files, folders or globs of evaluation texts; none by default. ngram: words in a row that
    must be shared, punctuation and capitals aside. min_matches: how many such n-grams of one
    evaluation file, different ones. action: "drop" the documents or only "report" them.
    """

    against: tuple[str, ...] = ()
    ngram: Annotated[int, Range(4, 64)] = 13
    min_matches: Annotated[int, Range(1)] = 1
    action: Literal["drop", "report"] = "drop"

    def __post_init__(self) -> None:
        if remote := [pattern for pattern in self.against if "://" in pattern]:
            raise ValueError(f"against = {remote[0]!r}: evaluation files must lie on this machine")

    def files(self) -> list[Path]:
        """Return the files that `against` names now."""
        found = {Path(name) for pattern in self.against for name in glob(_in_folder(pattern), recursive=True)}
        return sorted(path for path in found if path.is_file())


def _in_folder(pattern: str) -> str:
    path = Path(pattern).expanduser()
    return str(path / "**" if path.is_dir() else path)


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """How much is held out, as a share of bytes, and by which seed (`data/split.py`)."""

    heldout_share: Annotated[float, Range(0.001, 0.5)] = 0.07
    seed: Annotated[int, Range(0)] = 0


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """Where rows come from and what becomes of them.

    source: "python" (the running interpreter's own documentation), a file, a folder or a glob, here
    or at s3:// or http(s)://, or a dataset hf://datasets/OWNER/NAME. format: of the files; "auto"
    goes by their names. encoding: of text files, such as "latin-1"; "auto" is UTF-8, or what a byte
    order mark says. types: of columns, where the inferred one is not meant; values that do not fit
    are broken rows. subset, splits: of a dataset in the Hugging Face layout; empty means its
    default subset and all of its splits. text: template over columns, as in
    "{title}: {body}"; empty means all text columns, joined by blank lines. group: the column that
    keys the split; empty means the top-level package for "python", the file if there are at
    least 20 of them, else each row for itself. Near-duplicates always stay on one side.
    row_group_bytes: uncompressed size of a Parquet row group, the unit of reading and lineage.
    expect: what must hold of the rows, by column.
    """

    source: str = PYTHON
    format: Literal["auto", "csv", "jsonl", "parquet", "arrow", "text"] = "auto"
    text: str = ""
    group: str = ""
    row_group_bytes: Annotated[Bytes, Range(1 << 16, 1 << 30)] = 8 << 20
    encoding: str = "auto"
    types: Mapping[str, str] = EMPTY
    subset: str = ""
    splits: tuple[str, ...] = ()
    expect: Mapping[str, Expectation] = EMPTY
    quality: QualityRecipe = QualityRecipe()  # noqa: RUF009 - frozen, so one may be shared
    pii: PiiRecipe = PiiRecipe()  # noqa: RUF009
    dedup: DedupRecipe = DedupRecipe()
    decontaminate: DecontaminateRecipe = DecontaminateRecipe()
    split: SplitRecipe = SplitRecipe()

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError('source is empty; write "python", a file, a folder or a glob')
        if self.source == PYTHON and self.format != "auto":
            raise ValueError(f'format = "{self.format}" needs files; source = "python" has its own schema')
        if "{" in self.group or "}" in self.group:
            raise ValueError(f"group = {self.group!r} is a column name, not a template; write it bare")
        check_encoding(self.encoding)
        for column, kind in self.types.items():
            if not kind.strip() or (kind not in TYPES and kind not in TYPE_ALIASES):
                close = difflib.get_close_matches(kind, [*TYPES, *TYPE_ALIASES], n=1)
                meant = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(TYPES)}"
                raise ValueError(f'types: {column} = "{kind}" is no type; {meant}')


def check_encoding(name: str) -> None:
    """Refuse what is no encoding of text. Raises: ValueError."""
    try:
        if name != "auto":
            "".encode(name)
    except LookupError:
        raise ValueError(
            f'encoding = "{name}" is not known; write "auto", "utf-8", "latin-1", "cp1252", "utf-16" or '
            "another one that Python knows"
        ) from None


def settings_of(recipe: DataRecipe, step: Step) -> dict[str, Any]:
    """Return the values that one step depends on, beside its parents: the step's part of its key."""
    values = asdict(recipe)
    names = {
        "ingest": ("source", "format", "row_group_bytes", "encoding", "types", "subset", "splits"),
        "clean": ("text", "group", "row_group_bytes", "expect", "quality", "pii", "dedup", "decontaminate"),
        "split": ("row_group_bytes", "split"),
    }[step]
    settings = {name: values[name] for name in names}
    if step == "clean":  # what the rows are compared with is an input too
        settings["references"] = {
            path.as_posix(): hash_file(path)
            for expected in recipe.expect.values()
            for path in expected.reference()[0]
        }
        settings["evaluations"] = {path.as_posix(): hash_file(path) for path in recipe.decontaminate.files()}
    return settings
