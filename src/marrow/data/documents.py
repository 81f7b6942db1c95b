"""The files that rows become: documents.parquet and, beside it, what fell and what was found."""

import pyarrow as pa

from marrow.data.tables import described

ROWS = "rows-*.parquet"
DOCUMENTS = "documents.parquet"
DROPPED = "dropped.jsonl"
FINDINGS = "pii.jsonl"
NOTES = "notes.jsonl"
DOCUMENT_SCHEMA = pa.schema(
    [
        described("document_id", pa.int64(), "position in documents.parquet, from 0"),
        described("text", pa.string(), "what is trained on"),
        described("group", pa.string(), "documents that share it stay on one side of the split"),
        described("file", pa.string(), "source file, below the source's folder"),
        described("line", pa.int64(), "line (text, CSV, JSONL) or row (Parquet, Arrow) in that file, from 1"),
        described("row_group", pa.int32(), "row group in source_part, from 0"),
        described("row", pa.int32(), "row within that row group, from 0"),
        described("source_part", pa.string(), "rows file that the document was made from"),
        described("num_bytes", pa.int64(), "UTF-8 bytes of text"),
        described(
            "cluster", pa.int64(), "document_id of the first near-duplicate in its cluster, or its own"
        ),
    ]
)
