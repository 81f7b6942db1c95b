r"""The `[data]` table of a recipe: where rows come from and what becomes of them.

    [data]
    source = "python"            # or a file, a folder, a glob
    text = "{title}\n\n{body}"   # a template over columns; default: all text columns
    group = "author"             # rows that share it stay on one side of the split
    [data.quality]
    min_chars = 16
    [data.dedup]
    near = "drop"
    [data.split]
    heldout_share = 0.08

`settings_of` tells which of these a step depends on, so that a change of the split re-runs the
split and not the reading.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from marrow.core.config import Bytes, Range

Share = Annotated[float, Range(0.0, 1.0)]
Step = Literal["ingest", "clean", "split"]

PYTHON = "python"


@dataclass(frozen=True, slots=True)
class QualityRecipe:
    """Thresholds of the quality rules (`data/quality.py`); a share of 1 switches its rule off."""

    min_chars: Annotated[int, Range(0)] = 16
    max_control_share: Share = 0.01
    max_table_share: Share = 0.55
    max_digit_share: Share = 0.3
    max_blob_share: Share = 0.2
    max_repeated_share: Share = 0.5


@dataclass(frozen=True, slots=True)
class DedupRecipe:
    """What happens to duplicates (`data/dedup.py`).

    exact: drop all but the first of equal texts. near: "drop" near-duplicates, "keep" them in one
    cluster (one side of the split), or "off": not looked for. similarity: Jaccard similarity of
    5-word shingles from which two texts are near-duplicates.
    """

    exact: bool = True
    near: Literal["drop", "keep", "off"] = "drop"
    similarity: Annotated[float, Range(0.5, 0.99)] = 0.8


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """How much is held out, as a share of bytes, and by which seed (`data/split.py`)."""

    heldout_share: Annotated[float, Range(0.001, 0.5)] = 0.07
    seed: Annotated[int, Range(0)] = 0


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """Where rows come from and what becomes of them.

    source: "python" (the running interpreter's own documentation), a file, a folder or a glob.
    format: of the files; "auto" goes by their names. text: template over columns, as in
    "{title}: {body}"; empty means all text columns, joined by blank lines. group: the column that
    keys the split; empty means the top-level package for "python", the file if there are at
    least 20 of them, else each row for itself. Near-duplicates always stay on one side.
    row_group_bytes: uncompressed size of a Parquet row group, the unit of reading and lineage.
    """

    source: str = PYTHON
    format: Literal["auto", "csv", "jsonl", "parquet", "arrow", "text"] = "auto"
    text: str = ""
    group: str = ""
    row_group_bytes: Annotated[Bytes, Range(1 << 16, 1 << 30)] = 8 << 20
    quality: QualityRecipe = QualityRecipe()
    dedup: DedupRecipe = DedupRecipe()
    split: SplitRecipe = SplitRecipe()

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError('source is empty; write "python", a file, a folder or a glob')
        if self.source == PYTHON and self.format != "auto":
            raise ValueError(f'format = "{self.format}" needs files; source = "python" has its own schema')
        if "{" in self.group or "}" in self.group:
            raise ValueError(f"group = {self.group!r} is a column name, not a template; write it bare")


def settings_of(recipe: DataRecipe, step: Step) -> dict[str, Any]:
    """Return the values that one step depends on, beside its parents: the step's part of its key."""
    values = asdict(recipe)
    names = {
        "ingest": ("source", "format", "row_group_bytes"),
        "clean": ("text", "group", "row_group_bytes", "quality", "dedup"),
        "split": ("row_group_bytes", "split"),
    }[step]
    return {name: values[name] for name in names}
