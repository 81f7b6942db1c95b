"""From texts to token shards: train a tokenizer or take one, encode, pack, write Arrow files.

The two steps `tokenizer` and `shards` of a run. Both stream the split's `train.parquet`, so that
memory holds one row group of text (two for each worker of an engine), one window of pieces
(`data/packing.py`) and one shard. A row group is read and encoded by whichever worker is free;
packing takes them in their order, so that the files are the same whatever the engine. The format of
a shard is described in `data/manifest.py`. Documents stay in the order of the split: the order of
samples is the loader's plan, not a property of the files.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marrow.core.errors import DataError, ModelError, SourceError, explain_os_errors
from marrow.core.hashes import check_file, hash_file
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.engine import INLINE, Engine
from marrow.data.manifest import Manifest, ShardEntry
from marrow.data.packing import Row, pack
from marrow.data.shards_config import ShardsRecipe
from marrow.data.tables import open_table, parts, stream
from marrow.kernels.rows.gather_rows import Columns, check_rows
from marrow.text.config import TokenizerRecipe
from marrow.text.tokenizer import CONFIG_NAME, Tokenizer
from marrow.text.tokenizer import FILE_NAME as TOKENIZER_FILE

TRAIN_FILE = "train.parquet"


def train_tokenizer(
    recipe: TokenizerRecipe, split: Path, out: Path, progress: Progress = silent
) -> dict[str, Any]:
    """Train the tokenizer on the split's training documents; write `out/tokenizer.json`.

    Returns: facts; `vocab_size` may be smaller than asked if the texts have too few pairs.
    Raises: DataError if there are no documents.
    """
    assert not recipe.file, "this one is taken, not trained"
    reader = _Texts(split, progress)
    with span("tokenizer"):
        tokenizer = Tokenizer.train(
            (text for _, texts in reader for text in texts),
            recipe.vocab_size,
            min_frequency=recipe.min_frequency,
        )
    tokenizer.save(out / TOKENIZER_FILE)
    facts: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "num_documents": reader.num_documents,
        "num_bytes_text": reader.num_bytes,
    }
    if tokenizer.vocab_size < recipe.vocab_size:
        facts["note"] = (
            f"{recipe.vocab_size} tokens were asked for, but the text has pairs for no more than "
            f"{tokenizer.vocab_size}"
        )
    return facts


def take_tokenizer(path: Path, out: Path) -> dict[str, Any]:
    """Copy a tokenizer.json that somebody else made, and what tells of its special tokens, into `out`.

    Args: path: the file, or a folder with it. Returns: facts.
    Raises: SourceError if it is not there; ModelError if it is none, not byte-level, or no token ends
        a document.
    """
    found = tokenizer_files(path)
    tokenizer = Tokenizer.load(path)
    if not tokenizer.is_byte_level:  # known before hours of training, not when the model is served
        raise ModelError(
            f"tokenizer.file: {path} is not byte-level, so that a run's model could not be served",
            hint="take a byte-level one, as of Llama 3, Qwen or GPT; `write_shards` in Python takes any",
        )
    for name, source in found.items():
        with explain_os_errors("copy the tokenizer", source):
            shutil.copyfile(source, out / name)
    return {"vocab_size": tokenizer.vocab_size, "taken_from": str(path)}


def tokenizer_files(path: Path) -> dict[str, Path]:
    """Return what a tokenizer consists of, by the names it has in a folder. Raises: SourceError."""
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise SourceError(
            f"tokenizer.file: there is no {TOKENIZER_FILE} at {path}",
            hint="give the file, or a folder of a model that holds it",
        )
    config = file.with_name(CONFIG_NAME)
    return {TOKENIZER_FILE: file} | ({CONFIG_NAME: config} if config.is_file() else {})


def write_shards(
    recipe: ShardsRecipe,
    split: Path,
    tokenizer_folder: Path,
    out: Path,
    progress: Progress = silent,
    *,
    engine: Engine = INLINE,
) -> dict[str, Any]:
    """Encode and pack the split's training documents into `out/train-00000.arrow`, ...

    Writes `out/manifest.json` last. Equal inputs give equal bytes, whatever the engine.
    Args: engine: encodes the row groups.
    Returns: facts. Raises: DataError if there are no documents; DiskFull.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokenizer_sha256 = hash_file(tokenizer_folder / TOKENIZER_FILE)
    reader = _Encoded(split, tokenizer_folder, tokenizer_sha256, np.dtype(dtype).name, engine, progress)
    writer = _ShardWriter(out, recipe, tokenizer.pad_id, dtype)
    documents = iter(reader)
    for row in pack(documents, recipe.context, max_padding=recipe.max_padding):
        writer.add(row)
    writer.flush()
    manifest = Manifest(
        context=recipe.context,
        dtype=np.dtype(dtype).name,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        num_rows=writer.num_rows,
        num_documents=reader.num_documents,
        num_tokens=writer.num_tokens,
        num_predicted_tokens=writer.num_tokens - writer.num_pieces,
        num_bytes_text=reader.num_bytes,
        padding_share=round(1 - writer.num_tokens / (writer.num_rows * (recipe.context + 1)), 6),
        shards=tuple(writer.shards),
    )
    manifest.write(out)
    return {
        "num_rows": manifest.num_rows,
        "context": manifest.context,
        "num_documents": manifest.num_documents,
        "num_predicted_tokens": manifest.num_predicted_tokens,
        "bytes_per_token": round(manifest.num_bytes_text / manifest.num_predicted_tokens, 4),
        "padding_share": manifest.padding_share,
        "num_shards": len(manifest.shards),
    }


class _Texts:
    """Streams (document ids, texts) of the training documents, counting as it goes."""

    def __init__(self, split: Path, progress: Progress) -> None:
        self._paths = parts(split, TRAIN_FILE)
        self._progress = progress
        self._total = _total_bytes(self._paths)
        self.num_documents = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[tuple[list[int], list[str]]]:
        for place, batch in stream(self._paths, ["document_id", "text"]):
            ids, texts = batch.column("document_id"), batch.column("text")
            _check_whole(place.part, place.row_group, ids, texts)
            yield ids.to_pylist(), texts.to_pylist()
            self.num_documents += batch.num_rows
            self.num_bytes += pc.sum(pc.binary_length(texts)).as_py() or 0
            self._progress(self.num_bytes, self._total, "B")
        if not self.num_documents:
            raise _no_document(self._paths[0])


@dataclass(frozen=True, slots=True)
class _Piece:
    """A row group of training documents: what one worker encodes at a time."""

    path: Path
    row_group: int

    def __str__(self) -> str:
        return f"row group {self.row_group} of {self.path}"


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A row group encoded: ids int64 [D], tokens [N] from bos to eos, their offsets int64 [D + 1]."""

    document_ids: NDArray[np.int64]
    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    num_bytes: int


class _Encoded:
    """Streams (document id, tokens) of the training documents, encoded by an engine; counts them."""

    def __init__(
        self, split: Path, tokenizer: Path, sha256: str, dtype: str, engine: Engine, progress: Progress
    ) -> None:
        self._paths = parts(split, TRAIN_FILE)
        self._encode = partial(_encode, tokenizer, sha256, dtype)
        self._engine = engine
        self._progress = progress
        self._total = _total_bytes(self._paths)
        self.num_documents = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[tuple[int, NDArray[Any]]]:
        for found in self._engine.map(self._encode, self._pieces()):
            ends = found.offsets.tolist()
            for document_id, (start, end) in zip(found.document_ids.tolist(), pairwise(ends), strict=True):
                yield document_id, found.tokens[start:end]
            self.num_documents += len(found.document_ids)
            self.num_bytes += found.num_bytes
            self._progress(self.num_bytes, self._total, "B")
        if not self.num_documents:
            raise _no_document(self._paths[0])

    def _pieces(self) -> Iterator[_Piece]:
        for path in self._paths:
            with open_table(path) as file:
                num_row_groups = file.num_row_groups
            yield from (_Piece(path, group) for group in range(num_row_groups))


def _encode(tokenizer_folder: Path, sha256: str, dtype: str, piece: _Piece) -> _Tokens:
    """Read and encode one row group, in any thread or process."""
    tokenizer = _tokenizer(tokenizer_folder, sha256)
    with span("encode"):
        with open_table(piece.path) as file:
            table = file.read_row_group(piece.row_group, ["document_id", "text"], use_threads=False)
        ids, texts = (table[name].combine_chunks() for name in ("document_id", "text"))
        _check_whole(piece.path.name, piece.row_group, ids, texts)
        try:
            tokens, offsets = tokenizer.encode_utf8(*_utf8(texts), document=True)
        except DataError as error:
            raise DataError(f"{piece}: {error.message}", hint=error.hint) from None
        return _Tokens(ids.to_numpy(), tokens.astype(dtype), offsets, int(_utf8(texts)[1][-1]))


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, sha256: str) -> Tokenizer:
    """Load a tokenizer once a process; its hash tells it from another at the same place."""
    return Tokenizer.load(folder)


def _utf8(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the bytes of a column of texts and the offsets of each, without a copy of the texts."""
    kind = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, places, data = texts.buffers()
    if not len(texts) or data is None:
        return np.empty(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    offsets = np.frombuffer(places, kind)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _total_bytes(paths: list[Path]) -> int:
    return sum(pc.sum(batch.column(0)).as_py() or 0 for _, batch in stream(paths, ["num_bytes"]))


def _check_whole(part: str, row_group: int, ids: pa.Array, texts: pa.Array) -> None:
    if texts.null_count or ids.null_count:
        raise DataError(
            f"{part}: row group {row_group} has a document without text or id",
            hint="run the split step again; if you wrote the file, fill document_id and text",
        )


def _no_document(path: Path) -> DataError:
    return DataError(f"{path} holds no document", hint="check [data] source and its rules")


class _ShardWriter:
    """Collects rows and writes a shard when it is full."""

    def __init__(
        self, out: Path, recipe: ShardsRecipe, pad_id: int, dtype: type[np.unsignedinteger[Any]]
    ) -> None:
        self._out = out
        self._row_tokens = recipe.context + 1
        self._pad_id = pad_id
        self._dtype = dtype
        self._shard_rows = max(1, recipe.shard_bytes // (self._row_tokens * np.dtype(dtype).itemsize))
        self._rows: list[Row] = []
        self.shards: list[ShardEntry] = []
        self.num_rows = 0
        self.num_tokens = 0
        self.num_pieces = 0

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == self._shard_rows:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        with span("write shard"):
            path = self._out / f"train-{len(self.shards):05d}.arrow"
            batch = self._batch()
            with (
                explain_os_errors("write a shard", path),
                pa.OSFile(str(path), "wb") as file,
                pa.ipc.new_file(file, batch.schema) as arrow,
            ):
                arrow.write_batch(batch)
            self.shards.append(ShardEntry(path.name, len(self._rows), path.stat().st_size, check_file(path)))
        self.num_rows += len(self._rows)
        self.num_tokens += pc.sum(batch.column("num_tokens")).as_py()
        self.num_pieces += sum(map(len, self._rows))
        self._rows = []

    def _batch(self) -> pa.RecordBatch:
        tokens = np.full((len(self._rows), self._row_tokens), self._pad_id, dtype=self._dtype)
        starts: list[int] = []
        row_ends = [0]
        num_tokens = []
        for out, row in zip(tokens, self._rows, strict=True):
            end = 0
            for piece in row:
                starts.append(end)
                out[end : end + len(piece.tokens)] = piece.tokens
                end += len(piece.tokens)
            row_ends.append(len(starts))
            num_tokens.append(end)
        pieces = [piece for row in self._rows for piece in row]
        columns = Columns(
            tokens=tokens,
            starts=np.array(starts, dtype=np.int32),
            starts_of=np.array(row_ends, dtype=np.int32),
            num_tokens=np.array(num_tokens, dtype=np.int32),
        )
        ids = np.array([piece.document_id for piece in pieces], dtype=np.int64)
        return packed_rows(columns, ids, np.array([piece.offset for piece in pieces], dtype=np.int64))


def packed_rows(
    columns: Columns, document_ids: NDArray[np.int64], document_offsets: NDArray[np.int64]
) -> pa.RecordBatch:
    """Return rows as a shard holds them (see `manifest.py`), each with its check.

    Args: document_ids, document_offsets: of each of `columns.starts`.
    """
    ends = pa.array(columns.starts_of)
    return pa.record_batch(
        {
            "tokens": pa.FixedSizeListArray.from_arrays(
                pa.array(columns.tokens.ravel()), columns.tokens.shape[1]
            ),
            "document_starts": pa.ListArray.from_arrays(ends, pa.array(columns.starts)),
            "document_ids": pa.ListArray.from_arrays(ends, pa.array(document_ids)),
            "document_offsets": pa.ListArray.from_arrays(ends, pa.array(document_offsets)),
            "num_tokens": pa.array(columns.num_tokens),
            "row_xxh64": pa.array(check_rows(columns)),
        }
    )
