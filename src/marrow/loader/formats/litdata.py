"""Reads litdata's optimised chunks without its package: for those who migrate.

    index.json                   chunks: files and sizes; config: the type of each leaf, the tree they form
    chunk-0-0.bin                uint32 N, uint32 offsets[N+1], items
    an item                      uint32 size of each leaf, then the leaves' bytes
    chunk of tokens              the same header, then the tokens of all items end to end

zstd is read in all three of its ways (the file, frames of some items, each item), and so are rows
that were kept as Arrow behind an empty table. Leaves of type pickle are refused: to read them is to
run them; so are encrypted chunks. Images stay bytes (`loader/images.py`).
Source: the format of litdata 0.2.76.
"""

import json
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.hashes import hash_bytes
from marrow.loader.samples import Samples
from marrow.loader.stages import stage

Int64Array = NDArray[np.int64]
INDEX = "index.json"
CACHE_BYTES = 256 << 20
_FRAMED = b"LDFZ01\0\0"
_FRAMED_HEAD = struct.Struct("<8sHHIII")  # magic, version, flags, items, items a frame, frames
_FRAME = struct.Struct("<IIQII")  # first item, items, offset in the file, bytes packed, bytes raw
_ARROW = b"LDARW01\0"
_TORCH_TYPES = [
    "float32",
    "float32",
    "float64",
    "float64",
    "complex64",
    "complex64",
    "complex128",
    "complex128",
    "float16",
    "float16",
    "bfloat16",
    "uint8",
    "int8",
    "int16",
    "int16",
    "int32",
    "int32",
    "int64",
    "int64",
    "bool",
    "uint16",
]
_NUMPY_TYPES = [
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "bool",
]
Decode = Callable[[memoryview], Any]


class LitdataReader:
    """All items of a litdata folder, numbered chunk after chunk.

    Args: block_tokens: for chunks of tokens, how many make a row; a chunk's last incomplete row is
        left out, as litdata does.
    Raises: SourceError without an index; DataError for a leaf type that is not known or unsafe,
        for encryption, or for a chunk that is missing or damaged.
    """

    def __init__(
        self, folder: Path | str, *, block_tokens: int | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.folder = Path(folder)
        self.block_tokens, self.cache_bytes = block_tokens, cache_bytes
        path = self.folder / INDEX
        with explain_os_errors("read the index of litdata chunks", path):
            text = path.read_bytes()
        self._check = hash_bytes(text + str(block_tokens).encode())
        try:
            index = json.loads(text)
            self._chunks: list[dict[str, Any]] = index["chunks"]
            self._layout: _Tree | _Tokens = _layout(index["config"], block_tokens)
            rows = [self._layout.rows(chunk) for chunk in self._chunks]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{path} is no index of litdata chunks that can be read: {error}",
                hint="point at a folder that litdata's optimize wrote",
            ) from error
        self._chunks = [chunk for chunk, count in zip(self._chunks, rows, strict=True) if count]
        self.rows_of_shards = np.array([count for count in rows if count], dtype=np.int64)
        if not len(self.rows_of_shards):
            raise DataError(
                f"{path} names no items", hint="the dataset is empty, or block_tokens is too large"
            )
        self._first = np.concatenate(([0], np.cumsum(self.rows_of_shards)))
        self._open: OrderedDict[int, _Items] = OrderedDict()

    @property
    def num_rows(self) -> int:
        """Return how many items there are."""
        return int(self._first[-1])

    @property
    def check(self) -> str:
        """Return a hash of the index."""
        return self._check

    def take(self, rows_B: Int64Array) -> Samples:
        """Read items, in the order asked for; one that is no dictionary becomes {"value": item}."""
        chunk_B = np.searchsorted(self._first, rows_B, side="right") - 1
        values: list[Any] = [None] * len(rows_B)
        for place in np.argsort(chunk_B, kind="stable").tolist():
            index = int(chunk_B[place])
            items = self._items(index)
            with stage("decode"):
                try:
                    value = items.item(int(rows_B[place] - self._first[index]))
                except (ValueError, TypeError, IndexError, struct.error, OSError) as error:
                    raise self._damaged(index, f"an item does not decode: {error}") from error
            values[place] = value if isinstance(value, dict) else {"value": value}
        return Samples(values, rows_B, self)

    def ahead(self, rows_N: Int64Array) -> None:
        """Do nothing: local files are read when they are wanted."""

    def where(self, row: int) -> str:
        """Name an item: its chunk and its place in it."""
        index = int(np.searchsorted(self._first, row, side="right")) - 1
        name = self._chunks[index]["filename"]
        return f"item {row - int(self._first[index])} of {self.folder / name}"

    def close(self) -> None:
        """Let go of the chunks. Closing twice is fine."""
        self._open.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self.block_tokens, self.cache_bytes)

    def _items(self, index: int) -> "_Items":
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        path = self.folder / self._chunks[index]["filename"]
        with stage("fetch"), explain_os_errors("read a litdata chunk", path):
            data = path.read_bytes()
        with stage("decode"):
            try:
                items = self._layout.open(data, self._chunks[index])
            except (OSError, ValueError, struct.error, pa.ArrowException) as error:
                raise self._damaged(index, str(error)) from error
        self._open[index] = items
        kept = sum(one.num_bytes for one in self._open.values())
        while kept > self.cache_bytes and len(self._open) > 1:
            kept -= self._open.popitem(last=False)[1].num_bytes
        return items

    def _damaged(self, index: int, why: str) -> DataError:
        return DataError(
            f"{self.folder / self._chunks[index]['filename']} is damaged: {why}",
            hint="copy the chunk again from where it came from",
        )


class _Items:
    """The items of one open chunk."""

    def __init__(self, num_bytes: int, item: Callable[[int], Any]) -> None:
        self.num_bytes, self.item = num_bytes, item


class _Tokens:
    """Chunks of tokens: rows of `block` tokens."""

    def __init__(self, data_format: str, block: int) -> None:
        self.dtype = np.dtype(_leaf_type(data_format))
        self.block = block
        self.as_tensor = data_format.startswith("no_header_tensor")

    def rows(self, chunk: dict[str, Any]) -> int:
        return int(chunk["dim"]) // self.block

    def open(self, data: bytes, chunk: dict[str, Any]) -> _Items:
        head = 4 * (int(chunk["chunk_size"]) + 2)
        tokens = np.frombuffer(data, self.dtype, int(chunk["dim"]), head)

        def item(row: int) -> Any:
            return tokens[row * self.block : (row + 1) * self.block].copy()

        return _Items(len(data), item)


class _Tree:
    """Chunks of items that are trees of leaves."""

    def __init__(self, config: dict[str, Any]) -> None:
        compression = (config.get("compression") or "").split(":")[0]
        if compression not in ("", "zstd"):
            raise ValueError(f"compression {compression!r}, known is zstd")
        self.level = (config.get("compression_level") or "chunk") if compression else ""
        self.formats: list[str] = config["data_format"]
        _, spec = json.loads(config["data_spec"])
        self.spec = spec

    def rows(self, chunk: dict[str, Any]) -> int:
        return int(chunk["chunk_size"])

    def open(self, data: bytes, chunk: dict[str, Any]) -> _Items:
        if self.level == "chunk":
            data = _unzstd(data)
        count = int(chunk["chunk_size"])
        if data[:8] == _FRAMED:
            return self._framed(data, count)
        found = int.from_bytes(data[:4], "little")
        if found != count:
            raise ValueError(f"it holds {found} items, the index says {count}")
        offsets = np.frombuffer(data, np.uint32, count + 1, 4).tolist()
        if offsets[0] == offsets[-1] and data[-8:] == _ARROW:
            return self._arrow(data)
        if sorted(offsets) != offsets or offsets[-1] > len(data):
            raise ValueError("its table of items is not in order")
        decoders = self._decoders()
        view = memoryview(data)

        def item(row: int) -> Any:
            packed = view[offsets[row] : offsets[row + 1]]
            return self._item(memoryview(_unzstd(packed)) if self.level == "sample" else packed, decoders)

        return _Items(len(data), item)

    def _framed(self, data: bytes, count: int) -> _Items:
        _, version, _, found, _, frames = _FRAMED_HEAD.unpack_from(data)
        if version != 1 or found != count:
            raise ValueError(f"it is of version {version} with {found} items, the index says {count}")
        start = _FRAMED_HEAD.size
        offsets = np.frombuffer(data, np.uint32, count + 1, start).tolist()
        start += 4 * (count + 1)
        raw = b"".join(
            _unzstd(memoryview(data)[place : place + packed])
            for _, _, place, packed, _ in (
                _FRAME.unpack_from(data, start + i * _FRAME.size) for i in range(frames)
            )
        )
        decoders, view = self._decoders(), memoryview(raw)
        return _Items(len(raw), lambda row: self._item(view[offsets[row] : offsets[row + 1]], decoders))

    def _arrow(self, data: bytes) -> _Items:
        length = int.from_bytes(data[-12:-8], "little")
        buffer = pa.py_buffer(data[len(data) - 12 - length : -12])
        is_file = data[len(data) - 12 - length :][:6] == b"ARROW1"
        table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(buffer).read_all()
        rows = table.to_pylist()
        return _Items(table.nbytes, lambda row: rows[row])

    def _item(self, data: memoryview, decoders: list[Decode]) -> Any:
        sizes = np.frombuffer(data, np.uint32, len(decoders)).tolist()
        start = 4 * len(decoders)
        leaves = []
        for decode, size in zip(decoders, sizes, strict=True):
            leaves.append(decode(data[start : start + size]))
            start += size
        return _grown(self.spec, iter(leaves))

    def _decoders(self) -> list[Decode]:
        return [_decoder(name) for name in self.formats]


def _layout(config: dict[str, Any], block_tokens: int | None) -> "_Tree | _Tokens":
    if config.get("encryption"):
        raise ValueError("its chunks are encrypted")
    loader = config.get("item_loader") or "PyTreeLoader"
    if loader == "TokensLoader":
        if not block_tokens or block_tokens < 1:
            raise ValueError("it holds tokens without an end: say how many make a row, with block_tokens=")
        return _Tokens(config["data_format"][0], block_tokens)
    if loader != "PyTreeLoader":
        raise ValueError(f"its item loader is {loader}, known are PyTreeLoader and TokensLoader")
    tree = _Tree(config)
    for name in tree.formats:
        if name.split(":")[0] != "json":  # those lie in Arrow; if not, opening the chunk says so
            _decoder(name)
    return tree


def _grown(spec: dict[str, Any], leaves: Iterator[Any]) -> Any:
    """Put leaves back into their tree."""
    kind = spec["type"]
    if kind is None:
        return next(leaves)
    parts = [_grown(child, leaves) for child in spec["children_spec"]]
    name = kind.rpartition(".")[2]
    if name in ("dict", "OrderedDict"):
        return dict(zip(json.loads(spec["context"]), parts, strict=True))
    if name in ("tuple", "list"):
        return tuple(parts) if name == "tuple" else parts
    raise ValueError(f"items are of type {kind}, known are dict, list and tuple")


def _leaf_type(name: str) -> str:
    kind, _, number = name.partition(":")
    types = _NUMPY_TYPES if kind == "no_header_numpy" else _TORCH_TYPES
    return types[int(number)]


def _decoder(name: str) -> Decode:
    """Return the function that decodes leaves of a type."""
    kind = name.partition(":")[0]
    if kind in ("no_header_tensor", "no_header_numpy"):
        dtype = _leaf_type(name)
        return lambda data: np.frombuffer(data, dtype).copy()
    if kind not in _LEAVES:
        why = "; reading it would run whatever is in it" if kind == "pickle" else ""
        raise ValueError(f"a leaf is of type {name!r}{why}; known are {', '.join(_LEAVES)}")
    return _LEAVES[kind]


def _numpy(data: memoryview) -> NDArray[Any]:
    number, axes = np.frombuffer(data, np.uint32, 2).tolist()
    shape = np.frombuffer(data, np.uint32, axes, 8).tolist()
    return np.frombuffer(data[8 + 4 * axes :], _NUMPY_TYPES[number]).reshape(shape).copy()


def _tensor(data: memoryview) -> NDArray[Any]:
    number, axes = struct.unpack_from(">II", data)
    shape = struct.unpack_from(f">{axes}I", data, 8)
    return np.frombuffer(data[8 + 4 * axes :], _TORCH_TYPES[number]).reshape(shape).copy()


_LEAVES: dict[str, Decode] = {
    "str": lambda data: str(data, "utf-8"),
    "text": lambda data: str(data, "utf-8"),
    "int": lambda data: int(struct.unpack("<q", data)[0]),
    "float": lambda data: float(struct.unpack("<d", data)[0]),
    "bool": lambda data: data[0] != 0,
    "bytes": bytes,
    "file": bytes,
    "jpeg": bytes,
    "image": bytes,
    "numpy": _numpy,
    "tensor": _tensor,
}


def _unzstd(data: bytes | memoryview) -> bytes:
    """Decompress one frame; its size need not be known."""
    unpacked: bytes = pa.input_stream(pa.py_buffer(data), compression="zstd").read()
    return unpacked


def _reopened(folder: Path, block_tokens: int | None, cache_bytes: int) -> LitdataReader:
    return LitdataReader(folder, block_tokens=block_tokens, cache_bytes=cache_bytes)
