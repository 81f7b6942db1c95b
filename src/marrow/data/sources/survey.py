"""Which columns and types the files of a source have, before their rows are written.

A look at the beginning of each file is enough nearly always; where a later row does not fit, all rows
are looked at, a piece at a time by an engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from marrow.core.span import span
from marrow.data.engine import Engine
from marrow.data.sources.columns import SchemaGrewError, join_schemas
from marrow.data.sources.delimited import Tally
from marrow.data.sources.file import SourceFile
from marrow.data.sources.formats import read_file
from marrow.data.sources.listing import Found
from marrow.data.sources.pieces import Piece, pieces_of

SURVEY_FILES = 1000  # looked into before the first pass; one that differs later costs a second pass
_MIN_ROWS = 1024  # of a chunk that tells whether a column's values repeat


@dataclass(frozen=True, slots=True)
class Types:
    """What a survey found: the columns with their types, and those whose values repeat.

    is_whole: it looked at every row.
    """

    schema: pa.Schema
    repeating: frozenset[str] = frozenset()
    is_whole: bool = False


def survey(found: Found) -> Types:
    """Join the types at the beginning of the first files."""
    with span("survey"):
        return _survey(found.files[:SURVEY_FILES], limit=1)


def survey_all(found: Found, engine: Engine) -> Types:
    """Join the types of all rows."""
    with span("survey"):
        schema = pa.schema([])
        for one in engine.map(_survey_piece, pieces_of(iter(found.files))):
            schema = join_schemas(schema, one)
        return Types(schema, _survey(found.files[:SURVEY_FILES], limit=1).repeating, is_whole=True)


def grown(types: Types, grew: SchemaGrewError, found: Found, engine: Engine) -> Types:
    """Return types that hold what the others did not."""
    if not types.is_whole:  # a later row does not fit the types of the first ones: look at all of them
        return survey_all(found, engine)
    # No type holds all values, as of 0.5 and a key of 16 digits: text does.
    index = types.schema.get_field_index(grew.args[0])
    return Types(types.schema.set(index, pa.field(grew.args[0], pa.string())), types.repeating, is_whole=True)


def _survey_piece(piece: Piece) -> pa.Schema:
    return _survey(piece.files, limit=None).schema


def _survey(files: Iterable[SourceFile], limit: int | None) -> Types:
    """Join the columns and types of some files; with a limit, of only so many chunks of each."""
    schema = pa.schema([])
    repeating: dict[str, bool] = {}
    for file in files:
        if not file.num_bytes:
            continue
        for index, chunk in enumerate(read_file(file, Tally(), lambda _: None)):
            schema = join_schemas(schema, chunk.schema())
            if limit is not None:
                for name, column in zip(chunk.batch.schema.names, chunk.batch.columns, strict=True):
                    if len(column) >= _MIN_ROWS:
                        repeating[name] = repeating.get(name, True) and _repeats(column)
                if index + 1 >= limit:
                    break
    return Types(schema, frozenset(name for name, does in repeating.items() if does))


def _repeats(column: pa.Array) -> bool:
    """Tell whether a column has few values, many times each."""
    if pa.types.is_nested(column.type) or pa.types.is_null(column.type):
        return False
    return bool(pc.count_distinct(column).as_py() * 16 <= len(column))
