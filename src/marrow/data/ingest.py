"""Sources become rows: one Parquet dataset, whatever the files were.

rows-00000.parquet, rows-00001.parquet, ... hold the rows in the order of the sources; a row that
was broken is in quarantine.jsonl with its file and line, never silently gone. Equal sources give
equal bytes, whoever does the work: the source is cut into pieces (`pieces.py`), an engine has each
of them read and written to a file of its own, and the files are then numbered in the order of the
pieces.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa

from marrow.core.errors import SourceError, explain_os_errors
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.config import PYTHON, DataRecipe
from marrow.data.engine import INLINE, Engine
from marrow.data.ingest_stdlib import ingest_stdlib
from marrow.data.sources.columns import SchemaGrewError, ask
from marrow.data.sources.delimited import Records, Tally, check_share, check_texts
from marrow.data.sources.file import SourceFile
from marrow.data.sources.formats import Chunk, read_file
from marrow.data.sources.listing import Found, find_sources
from marrow.data.sources.pieces import Piece, pieces_of
from marrow.data.sources.streams import Broken
from marrow.data.sources.survey import grown, survey, survey_all
from marrow.data.tables import ParquetFile, described
from marrow.data.template import PROVENANCE

MAX_FILE_BYTES = 1 << 30  # uncompressed bytes of rows after which a new rows file is begun
QUARANTINE = "quarantine.jsonl"
_PROVENANCE_FIELDS = (
    described(PROVENANCE[0], pa.string(), "source file, below the source's folder"),
    described(
        PROVENANCE[1],
        pa.int64(),
        "line at which the row begins (text, CSV, JSONL) or its number (Parquet, Arrow), from 1",
    ),
)


def ingest(
    recipe: DataRecipe, out: Path, progress: Progress = silent, *, engine: Engine = INLINE
) -> dict[str, Any]:
    """Read the source of a recipe into rows-*.parquet in `out`.

    Args: engine: who reads and writes the pieces; the files are the same bytes whoever does.
    Returns: facts: files, rows, bytes read and written, columns, broken rows.
    Raises: SourceError if the source is missing, empty, unreadable or mostly broken, or has no column
        whose type the recipe gives.
    Cost: one pass, two if a later row does not fit the types of the first, one more for each column
    in which types that go together have values that do not; bounded memory for each worker.
    """
    if recipe.source == PYTHON:
        return ingest_stdlib(recipe, out, progress)
    found = find_sources(recipe)
    types = survey(found)
    if set(recipe.types) - set(types.schema.names):
        types = survey_all(found, engine)
    while True:
        schema = ask(types.schema, recipe.types)
        target, renamed = _target(schema, len(found.files))
        task = _Task(schema, target, out, recipe.row_group_bytes, tuple(recipe.types), tuple(types.repeating))
        try:
            rows = _write(task, found, progress, engine)
        except SchemaGrewError as grew:
            types = grown(types, grew, found, engine)
            continue
        return _facts(recipe, found, rows, schema, renamed)


@dataclass(frozen=True, slots=True)
class _Task:
    """How the pieces are read and written. asked: columns whose type the recipe gives."""

    schema: pa.Schema
    target: pa.Schema
    out: Path
    row_group_bytes: int
    asked: tuple[str, ...]
    repeating: tuple[str, ...]


@dataclass(slots=True)
class _Result:
    """What became of a piece. grew: the column that its values did not fit, if any; tallies: by file name."""

    index: int
    num_bytes: int = 0
    paths: list[Path] = field(default_factory=list)
    tallies: dict[str, tuple[SourceFile, Tally]] = field(default_factory=dict)
    grew: tuple[str, ...] | None = None


@dataclass(slots=True)
class _Rows:
    """What was written, all in all."""

    paths: list[Path] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    num_empty: int = 0


def _write(task: _Task, found: Found, progress: Progress, engine: Engine) -> _Rows:
    """Write all rows in one pass, a piece at a time.

    Raises: SchemaGrewError if one does not fit; SourceError if there is no row, or a file is mostly broken.
    """
    rows = _Rows()
    ranged: dict[str, tuple[SourceFile, Tally]] = {}
    texts = Tally()
    meter = _Meter(progress, found.files.num_bytes)
    # Only this thread may tell how far a piece is; of other workers' pieces, it tells the end.
    results = engine.map(
        partial(_write_piece, task, meter.within if engine is INLINE else None), pieces_of(iter(found.files))
    )
    with explain_os_errors("write rows", task.out), ExitStack() as stack:
        quarantine: IO[bytes] | None = None
        try:
            for result in results:
                if result.grew is not None:
                    raise SchemaGrewError(*result.grew)
                for name, (file, tally) in result.tallies.items():
                    rows.tally.add(tally)
                    if file.format == "text":
                        texts.add(tally)
                    if file.is_whole:
                        rows.num_empty += tally.num_rows + tally.num_broken == 0
                    else:
                        ranged.setdefault(name, (file, Tally()))[1].add(tally)
                for path in result.paths:
                    rows.paths.append(path.rename(task.out / f"rows-{len(rows.paths):05d}.parquet"))
                broken = _quarantine(task.out, result.index)
                if broken.exists():
                    quarantine = quarantine or stack.enter_context((task.out / QUARANTINE).open("wb"))
                    quarantine.write(broken.read_bytes())
                    broken.unlink()
                meter.finished(result.num_bytes, rows.tally.num_rows)
        except BaseException:
            close = getattr(results, "close", None)
            if close is not None:
                close()  # no worker writes any more
            for path in [*rows.paths, *task.out.glob("piece-*"), task.out / QUARANTINE]:
                path.unlink(missing_ok=True)
            raise
    for file, tally in ranged.values():
        check_share(file, tally)
    check_texts(texts)
    if rows.tally.num_misfits > rows.tally.num_rows:
        raise SourceError(
            f"data.types: {rows.tally.num_misfits} of {rows.tally.num_misfits + rows.tally.num_rows} rows "
            f"do not fit the types of {', '.join(task.asked)}",
            hint="ask for types that hold the values, such as string",
        )
    if not rows.paths:
        raise SourceError(
            f"the source has no row: {len(found.files)} files without data",
            hint="check how the files were written",
        )
    return rows


@dataclass(slots=True)
class _Meter:
    """Tells how many bytes are read, of pieces that are done and of the one at work."""

    progress: Progress
    total: int
    done: int = 0
    rows: int = 0

    def within(self, num_bytes: int, rows: int) -> None:
        """Tell how far the piece at work is."""
        self._tell(self.done + num_bytes, self.rows + rows)

    def finished(self, num_bytes: int, rows: int) -> None:
        """Count a piece, and tell; rows: all that were written."""
        self.done, self.rows = self.done + num_bytes, rows
        self._tell(self.done, rows)

    def _tell(self, done: int, rows: int) -> None:
        self.progress(min(done, self.total), self.total, "bytes", {"rows": f"{rows:,}"})


def _write_piece(task: _Task, tell: Callable[[int, int], None] | None, piece: Piece) -> _Result:
    """Read a piece and write its rows, and what is broken, beside those of the others."""
    result = _Result(piece.index)
    num_rows = 0
    with explain_os_errors("write rows", task.out), _Writer(task, piece.index, result.paths) as writer:
        for file in piece.files:
            tally = result.tallies.setdefault(file.name, (file, Tally()))[1]
            size = _size_of(file)
            read = 0  # in bytes of rows, which tell well enough how far the file is
            try:
                for chunk in read_file(file, tally, writer.keep) if file.num_bytes else ():
                    num_rows += writer.write(file, chunk, tally)
                    read = min(read + chunk.num_bytes, size)
                    if tell is not None:
                        tell(result.num_bytes + read, num_rows)
            except SchemaGrewError as grew:
                result.grew = grew.args
                return result
            result.num_bytes += size
    return result


def _size_of(file: SourceFile) -> int:
    """Return the bytes of a file or range; of a Parquet file's ranges, the first stands for all."""
    if file.format == "parquet":
        return file.num_bytes if file.start == 0 else 0
    return (file.num_bytes if file.end == -1 else file.end) - file.start


class _Writer:
    """Writes the rows of a piece, and beside them those that are broken."""

    def __init__(self, task: _Task, index: int, paths: list[Path]) -> None:
        self._task, self._index, self._paths = task, index, paths
        self._file: ParquetFile | None = None
        self._num_bytes = 0
        self._broken: IO[str] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            if self._broken is not None:
                stack.enter_context(self._broken)
            if self._file is not None:
                self._file.close(keep=error is None)

    def keep(self, broken: Broken) -> None:
        """Write down a broken row."""
        if self._broken is None:
            self._broken = _quarantine(self._task.out, self._index).open("w", encoding="utf-8")
        self._broken.write(json.dumps(asdict(broken), ensure_ascii=False) + "\n")

    def write(self, source: SourceFile, chunk: Chunk | Records, tally: Tally) -> int:
        """Write rows in the types of the task; return how many there are."""
        task = self._task
        with span("types"):
            batch, lines_N, misfits = chunk.fit(task.schema, task.asked)
            names = pa.repeat(pa.scalar(source.name, pa.string()), batch.num_rows)
            batch = pa.RecordBatch.from_arrays([*batch.columns, names, pa.array(lines_N)], schema=task.target)
        for one in misfits:
            tally.num_rows -= 1
            tally.num_broken += 1
            tally.num_misfits += 1
            kind = task.schema.field(one.column).type
            self.keep(Broken(source.name, one.line, f"{one.column} is no {kind}", one.text))
        if self._file is None or self._num_bytes >= MAX_FILE_BYTES:
            if self._file is not None:
                self._file.close()
            path = task.out / f"piece-{self._index:05d}-{len(self._paths):03d}.parquet"
            self._paths.append(path)
            self._file = ParquetFile(path, task.target, task.row_group_bytes, task.repeating)
            self._num_bytes = 0
        with span("write rows"):
            self._file.write(batch)
        self._num_bytes += batch.nbytes
        return int(batch.num_rows)


def _quarantine(out: Path, index: int) -> Path:
    return out / f"piece-{index:05d}.jsonl"


def _facts(
    recipe: DataRecipe, found: Found, rows: _Rows, schema: pa.Schema, renamed: dict[str, str]
) -> dict[str, Any]:
    return {
        "source": recipe.source,
        "files": len(found.files),
        "skipped_files": found.skipped,
        "empty_files": rows.num_empty,
        "rows": rows.tally.num_rows,
        "broken_rows": rows.tally.num_broken,
        "blank_rows": rows.tally.num_blank,
        "source_bytes": found.files.num_bytes,
        "bytes_written": sum(path.stat().st_size for path in rows.paths),
        "columns": {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)},
        "renamed_columns": renamed,
    }


def _target(schema: pa.Schema, num_files: int) -> tuple[pa.Schema, dict[str, str]]:
    """Add the provenance columns; a user's column of such a name gets another one."""
    renamed = {name: f"{name.strip('_')}_original" for name in schema.names if name in PROVENANCE}
    fields = [field.with_name(renamed.get(field.name, field.name)) for field in schema]
    metadata = {"marrow.source": "files", "marrow.num_files": str(num_files)}
    return pa.schema([*fields, *_PROVENANCE_FIELDS], metadata=metadata), renamed
