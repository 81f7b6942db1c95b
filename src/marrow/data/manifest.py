"""The manifest of token shards: what `manifest.json` says about the files beside it.

    train-00000.arrow   Arrow IPC file, one record batch, one line for each packed row:
        tokens            fixed_size_list<uint16|uint32>[T+1]  inputs are [:T], targets [1:]
        document_starts   list<int32>   where in the row a document, or the next piece of it, begins
        document_ids      list<int64>   whose piece it is: `document_id` in documents.parquet
        document_offsets  list<int64>   which of the document's tokens the piece begins with
        num_tokens        int32         tokens before the padding
        row_xxh64         uint64        checks the row (`kernels.gather_rows.check_rows`), so that reading
                                        a few rows from anywhere does not mean hashing the whole file

A document is bos + tokens + eos. One longer than T is cut in pieces that overlap by one token:
the last target of a piece is the first input of the next, so each token but bos is predicted
exactly once, and bos never is.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.files import atomic_file

FILE_NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard file; `xxh3` checks its bytes (`core.hashes.check_file`)."""

    name: str
    num_rows: int
    num_bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the shards of a folder hold.

    num_tokens counts stored tokens without padding (a piece's first token is stored twice),
    num_predicted_tokens those that are a target; num_bytes_text the UTF-8 bytes they came from, so
    that nats per predicted token become bits per byte.
    """

    context: int
    dtype: str
    vocab_size: int
    tokenizer_sha256: str
    bos_id: int
    eos_id: int
    pad_id: int
    num_rows: int
    num_documents: int
    num_tokens: int
    num_predicted_tokens: int
    num_bytes_text: int
    padding_share: float
    shards: tuple[ShardEntry, ...]
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, equal bytes for equal manifests."""
        path = folder / FILE_NAME
        with explain_os_errors("write the manifest", path), atomic_file(path, "w") as file:
            file.write(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `manifest.json` of a folder.

        Raises: SourceError if there is none; DataError if it is damaged or of another version.
        """
        path = folder / FILE_NAME
        with explain_os_errors("read the manifest of the shards", path):
            text = path.read_bytes()
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] != VERSION:
                raise ValueError(f"version {values['version']!r}, this program reads {VERSION}")
            known = {field.name for field in fields(cls)}
            shards = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
            manifest = cls(**{k: v for k, v in values.items() if k in known}, shards=shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no manifest of shards: {error}", hint="run the shards step again"
            ) from error
        if sum(shard.num_rows for shard in manifest.shards) != manifest.num_rows or not manifest.num_rows:
            raise DataError(
                f"{path}: its shards do not hold its {manifest.num_rows} rows",
                hint="run the shards step again",
            )
        return manifest
