r"""From a row to a text: `"{title}\n\n{body}"` over the columns of a batch.

A field is a column name in braces, nothing more; `{{` and `}}` are the braces themselves. A null
becomes the empty string; a row whose fields are all null has no text. Without a template the text
is all text columns in their order, joined by blank lines, nulls and blanks left out; for the
interpreter's own documentation it is the source, where a row has one.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from marrow.core.errors import DataError

PROVENANCE = ("_file", "_row")
_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: `literals` has one entry more than `columns`, which it surrounds.

    With `joined` true the template is the default one: columns with blank lines between.
    """

    columns: tuple[str, ...]
    literals: tuple[str, ...]
    joined: bool = False

    def render(self, batch: pa.RecordBatch) -> list[str | None]:
        """Return one text per row, None for a row that has none."""
        values = [as_texts(batch.column(name)) for name in self.columns]
        if not values:
            return ["".join(self.literals)] * batch.num_rows
        if self.joined:
            if len(values) == 1:
                return values[0]
            return [
                "\n\n".join(v for v in row if v is not None and not v.isspace() and v) or None
                for row in zip(*values, strict=True)
            ]
        first, *after = self.literals
        return [
            None
            if all(v is None for v in row)
            else first + "".join((v or "") + text for v, text in zip(row, after, strict=True))
            for row in zip(*values, strict=True)
        ]


def parse_template(text: str, schema: pa.Schema) -> Template:
    """Check a template against the columns; the empty template is the default one.

    Raises: DataError for an unknown column (with "did you mean"), a lone brace, or no text column.
    """
    known = [name for name in schema.names if name not in PROVENANCE]
    if not text:
        return _default(schema, known)
    columns: list[str] = []
    literals = [""]
    end = 0
    for match in _PART.finditer(text):
        literals[-1] += text[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            literals[-1] += match[0][0]
        elif match[1] is None:
            raise DataError(
                f"data.text: a lone {match[0]!r} at character {match.start() + 1} of {text!r}",
                hint="write {column} for a column, {{ and }} for braces",
            )
        else:
            columns.append(check_column("data.text", match[1].strip(), [*known, *PROVENANCE]))
            literals.append("")
    literals[-1] += text[end:]
    if not columns:
        raise DataError(
            f"data.text = {text!r} names no column, so every row would be the same text",
            hint=f"columns: {', '.join(known)}; write one in braces",
        )
    return Template(tuple(columns), tuple(literals))


def check_column(key: str, name: str, known: Sequence[str]) -> str:
    """Return the name if it is a column.

    Raises: DataError with "did you mean".
    """
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"columns: {', '.join(known)}"
    raise DataError(f"{key}: no column {name!r}", hint=hint)


def as_texts(column: pa.Array) -> list[str | None]:
    """Return a column's values as text; lists and structs as JSON, bytes that are no text as null."""
    kind = column.type
    if pa.types.is_string(kind):
        texts: list[str | None] = column.to_pylist()
        return texts
    if pa.types.is_nested(kind):
        return [
            None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in column.to_pylist()
        ]
    if pa.types.is_binary(kind):
        return [_decoded(v) for v in column.to_pylist()]
    return [None if v is None else str(v) for v in column.to_pylist()]


def _default(schema: pa.Schema, known: list[str]) -> Template:
    columns = tuple(name for name in known if pa.types.is_string(schema.field(name).type))
    if not columns:
        raise DataError(
            f"no text column among {', '.join(known) or 'none'}",
            hint='write a template over the columns, as in data.text = "{a}: {b}"',
        )
    return Template(columns, (), joined=True)


def _decoded(value: Any) -> str | None:
    try:
        return None if value is None else bytes(value).decode()
    except UnicodeDecodeError:
        return None
