"""A piece of rows becomes candidates for documents: template, line rules, quality rules, personal data.

A piece is a row group of the rows files, so pieces are made in any order, by any engine, with one
result. What a rule drops is counted in the piece's tally; tallies are added in the order of the
pieces, which makes counts and samples those of one pass over the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from marrow.core.span import span
from marrow.data.config import DataRecipe, DecontaminateRecipe
from marrow.data.dedup.decontaminate import Evaluations
from marrow.data.documents import ROWS
from marrow.data.quality.filters import filled
from marrow.data.quality.lines import trimmer
from marrow.data.quality.pii import Finding, Scrubbed, masked, scrubber
from marrow.data.quality.rules import Rule, judge, rules_of
from marrow.data.sources.stdlib import group_of
from marrow.data.tables import READ_ROWS, Place, open_table, parts
from marrow.data.tally import Samples, Tally, add_counts
from marrow.data.template import Template, as_texts, check_column, parse_template

MIN_FILE_GROUPS = 20
_SHOWN_CHARS = 200
CANDIDATE_SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("group", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("source_part", pa.string()),
        ("num_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A row group of a rows file."""

    path: Path
    row_group: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """The candidates of a piece (CANDIDATE_SCHEMA), and how many rows it had."""

    candidates: pa.RecordBatch
    num_rows: int
    tally: Tally


@dataclass(frozen=True, slots=True)
class Road:
    """How rows of one schema become documents: template, group column, and where a row lies."""

    template: Template
    group: str
    by_file: bool
    is_stdlib: bool

    @property
    def by_row(self) -> bool:
        """Tell whether each row is a group of its own."""
        return not (self.group or self.is_stdlib or self.by_file)

    def columns(self) -> list[str]:
        """Return the columns that are read."""
        wanted = [*self.template.columns, *self.place_columns()]
        wanted += ["module", "qualified_name"] if self.is_stdlib else []
        wanted += [self.group] if self.group else []
        return list(dict.fromkeys(wanted))

    def place_columns(self) -> tuple[str, str]:
        """Return the columns that name the source file and line."""
        return ("file", "line") if self.is_stdlib else ("_file", "_row")

    def groups(self, place: Place, batch: pa.RecordBatch) -> list[str]:
        """Name the split group of every row of a batch."""
        if self.group:  # a null is no group: such rows must not all become one
            values = as_texts(batch.column(self.group))
            return [_row_name(place, i) if value is None else value for i, value in enumerate(values)]
        if self.is_stdlib:
            names = zip(
                batch.column("module").to_pylist(), batch.column("qualified_name").to_pylist(), strict=True
            )
            return [group_of(module, qualified) for module, qualified in names]
        if self.by_file:
            files: list[str] = batch.column("_file").to_pylist()
            return files
        return [_row_name(place, i) for i in range(batch.num_rows)]


@dataclass(frozen=True, slots=True)
class Work:
    """What is the same for all pieces; can be sent to another process.

    evaluations: names the contents of the evaluation files, so that a process reads them once.
    """

    recipe: DataRecipe
    road: Road
    evaluations: str

    def prepare(self, piece: Piece) -> Prepared:
        """Make the candidates of one piece."""
        return _Maker(self, piece).run()


def pieces_of(rows: Path) -> list[Piece]:
    """List the row groups of the rows files in a folder, in order. Raises: DataError if there is none."""
    found = []
    for path in parts(rows, ROWS):
        with open_table(path) as file:
            found += [Piece(path, group) for group in range(file.num_row_groups)]
    return found


def road_of(recipe: DataRecipe, rows: Path) -> Road:
    """Find the way for these rows. Raises: DataError for a template or group that does not fit."""
    with open_table(parts(rows, ROWS)[0]) as file:
        schema = file.schema_arrow
    metadata = schema.metadata or {}
    is_stdlib = metadata.get(b"marrow.source") == b"python"
    if is_stdlib and not recipe.text:
        template = Template(("source",), (), joined=True)
    else:
        template = parse_template(recipe.text, schema)
    if recipe.group:
        check_column("data.group", recipe.group, schema.names)
    num_files = int(metadata.get(b"marrow.num_files", b"0"))
    return Road(template, recipe.group, num_files >= MIN_FILE_GROUPS, is_stdlib)


@lru_cache(maxsize=1)
def evaluations_of(recipe: DecontaminateRecipe, contents: str) -> Evaluations:
    """Read the evaluation files once a process, for all pieces."""
    return Evaluations(recipe)


class _Maker:
    """Makes the candidates of one piece."""

    def __init__(self, work: Work, piece: Piece) -> None:
        recipe = work.recipe
        self._work = work
        self._piece = piece
        self._rules: list[Rule] = rules_of(recipe.quality)
        self._trim = trimmer(filled(recipe.quality).lines)
        self._scrub: Callable[[str], Scrubbed] | None = scrubber(recipe.pii)
        self._evaluations = (
            evaluations_of(recipe.decontaminate, work.evaluations) if recipe.decontaminate.against else None
        )
        self._tally = Tally()

    def run(self) -> Prepared:
        batches, num_rows = [], 0
        with open_table(self._piece.path) as file:
            columns = self._work.road.columns()
            for batch in file.iter_batches(READ_ROWS, row_groups=[self._piece.row_group], columns=columns):
                batches.append(
                    self._batch(Place(self._piece.path.name, self._piece.row_group, num_rows), batch)
                )
                num_rows += batch.num_rows
        candidates = pa.concat_batches(batches) if batches else _no_candidates()
        return Prepared(candidates, num_rows, self._tally)

    def _batch(self, place: Place, batch: pa.RecordBatch) -> pa.RecordBatch:
        road = self._work.road
        with span("template"):
            texts = road.template.render(batch)
            groups = road.groups(place, batch)
        files, lines = (batch.column(name).to_pylist() for name in road.place_columns())
        kept: list[int] = []
        for i, text in enumerate(texts):
            text = texts[i] = self._judge(text, {"file": files[i], "line": lines[i]})
            if text is not None:
                kept.append(i)
        text_column = pa.array([texts[i] for i in kept], pa.string())
        if self._evaluations is not None:
            kept, text_column = self._decontaminate(kept, text_column, files, lines)
        columns = [
            text_column,
            pa.array([groups[i] for i in kept], pa.string()),
            pa.array([files[i] for i in kept], pa.string()),
            pa.array([lines[i] for i in kept], pa.int64()),
            pa.array([place.row_group] * len(kept), pa.int32()),
            pa.array([place.row + i for i in kept], pa.int32()),
            pa.array([place.part] * len(kept), pa.string()),
            pc.binary_length(text_column).cast(pa.int64()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=CANDIDATE_SCHEMA)

    def _judge(self, text: str | None, place: dict[str, Any]) -> str | None:
        """Return the text as it stays, or None."""
        if text is None:  # class and function rows of the documentation lie in their module's text
            if not self._work.road.is_stdlib:
                self._drop("no_text", "", place)
            return None
        if self._trim is not None:
            text = self._trimmed(text, place)
        with span("quality"):
            verdict = judge(text, self._rules)
        if verdict is not None:
            measured = {"value": round(verdict.value, 4), "limit": verdict.limit}
            self._drop(verdict.rule, text, {**place, **measured})
            return None
        if self._scrub is None:
            return text
        with span("personal data"):
            scrubbed = self._scrub(text)
        if scrubbed.found:
            self._note_findings(text, scrubbed, place)
        if scrubbed.dropped_by is not None:
            self._drop(f"pii:{scrubbed.dropped_by}", text, place)
            return None
        return scrubbed.text

    def _trimmed(self, text: str, place: dict[str, Any]) -> str:
        assert self._trim is not None
        with span("quality"):
            trimmed = self._trim(text)
        for rule, line in trimmed.dropped:
            add_counts(self._tally.lines, rule, {"lines": 1, "bytes": num_bytes(line)})
            self._sample(self._tally.notes, rule, line, place)
        return trimmed.text

    def _decontaminate(
        self, kept: list[int], texts: pa.Array, files: list[Any], lines: list[Any]
    ) -> tuple[list[int], pa.Array]:
        assert self._evaluations is not None
        with span("decontaminate"):
            found = self._evaluations.find(texts)
        self._tally.contaminated += len(found)
        drops = self._work.recipe.decontaminate.action == "drop"
        for one in found:
            text, row = texts[one.text].as_py(), kept[one.text]
            told = {"evaluation": one.evaluation, "matches": one.matches, "excerpt": self._shown(one.excerpt)}
            place = {"file": files[row], "line": lines[row], **told}
            if drops:
                self._drop("contaminated", text, place)
            else:
                self._sample(self._tally.notes, "contaminated", text, place)
        if not drops or not found:
            return kept, texts
        gone = {one.text for one in found}
        stays = [i for i in range(len(kept)) if i not in gone]
        return [kept[i] for i in stays], texts.take(pa.array(stays, pa.int64()))

    def _note_findings(self, text: str, scrubbed: Scrubbed, place: dict[str, Any]) -> None:
        actions = dict(self._work.recipe.pii.actions())
        for kind in {one.kind for one in scrubbed.found}:
            add_counts(self._tally.found, kind, {"documents": 1})
        for one in scrubbed.found:
            add_counts(self._tally.found, one.kind, {"found": 1})

            def finding(one: Finding = one) -> dict[str, Any]:
                form = masked(text[one.start : one.end])
                return {"kind": one.kind, **place, "action": actions[one.kind], "form": form}

            self._tally.findings.offer(one.kind, place["file"], place["line"], finding)

    def _drop(self, rule: str, text: str, place: dict[str, Any]) -> None:
        self._tally.drop(rule, num_bytes(text))
        self._sample(self._tally.samples, rule, text, place)

    def _sample(self, samples: Samples, rule: str, text: str, place: dict[str, Any]) -> None:
        """Offer a text as a sample; place: its file and line, and what else is to be told of it."""
        samples.offer(
            rule, place["file"], place["line"], lambda: {"rule": rule, **place, "text": self._shown(text)}
        )

    def _shown(self, text: str) -> str:
        """Return the beginning of a text for a sample, without the personal data that is looked for."""
        if self._scrub is not None:
            text = self._scrub(text).text
        return text[:_SHOWN_CHARS]


def num_bytes(text: str) -> int:
    """Return the UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _row_name(place: Place, row: int) -> str:
    return f"{place.part}/{place.row_group}/{place.row + row}"


def _no_candidates() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=CANDIDATE_SCHEMA)
