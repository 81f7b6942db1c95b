"""Reads MosaicML Streaming's MDS datasets without its package: for those who migrate.

    index.json                    shards: files, sizes, hashes, the columns with their encodings
    shard.00000.mds[.zstd]        uint32 N, uint32 offsets[N+1], the columns as JSON, samples
    a sample                      uint32 size of each column of variable size, then the columns' bytes

A shard is memory-mapped; a compressed one is decompressed once into memory and kept, the last used
first, up to `cache_bytes`. Sizes, and hashes that the index names, are checked when a shard is
opened. Pickled columns are refused: to read them is to run them.
Source: the format of mosaicml-streaming 0.13, version 2.
"""

import bz2
import gzip
import hashlib
import json
import mmap
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.hashes import hash_bytes
from marrow.loader.samples import Samples
from marrow.loader.stages import stage

Int64Array = NDArray[np.int64]
INDEX = "index.json"
CACHE_BYTES = 256 << 20
_VALUE_TYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
_SCALARS = set(_VALUE_TYPES.values())
_DECOMPRESS: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": lambda data, size: pa.decompress(data, size, codec="zstd", asbytes=True),
    "br": lambda data, size: pa.decompress(data, size, codec="brotli", asbytes=True),
    "gz": lambda data, size: gzip.decompress(data),
    "bz2": lambda data, size: bz2.decompress(data),
    "snappy": lambda data, size: pa.decompress(data, size, codec="snappy", asbytes=True),
}
_HASHES: dict[str, Callable[[bytes], str]] = {
    "xxh3_64": lambda data: xxhash.xxh3_64_hexdigest(data),
    "xxh64": lambda data: xxhash.xxh64_hexdigest(data),
    "xxh128": lambda data: xxhash.xxh128_hexdigest(data),
    "md5": lambda data: hashlib.md5(data, usedforsecurity=False).hexdigest(),
    "sha1": lambda data: hashlib.sha1(data, usedforsecurity=False).hexdigest(),
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
}


class MdsReader:
    """All samples of an MDS folder, numbered shard after shard. Samples are dictionaries by column.

    Columns of encoding jpeg, png and pil stay bytes (`loader/images.py` decodes the first two).
    Raises: SourceError without an index; DataError for another format or version, an encoding that
        is not known or unsafe, a shard that is missing, cut short or altered.
    """

    def __init__(self, folder: Path | str, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder = Path(folder)
        self.cache_bytes = cache_bytes
        path = self.folder / INDEX
        with explain_os_errors("read the index of MDS shards", path):
            text = path.read_bytes()
        self._check = hash_bytes(text)
        try:
            index = json.loads(text)
            if index["version"] != 2:
                raise ValueError(f"version {index['version']}, this program reads 2")
            self._shards = [_Shard.of(entry) for entry in index["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no index of MDS shards: {error}", hint="point at a folder of MDS"
            ) from error
        if not self._shards:
            raise DataError(f"{path} names no shards", hint="the dataset is empty")
        self.rows_of_shards = np.array([shard.num_rows for shard in self._shards], dtype=np.int64)
        self._first = np.concatenate(([0], np.cumsum(self.rows_of_shards)))
        self._open: OrderedDict[int, tuple[Any, NDArray[np.uint32]]] = OrderedDict()

    @property
    def num_rows(self) -> int:
        """Return how many samples there are."""
        return int(self._first[-1])

    @property
    def check(self) -> str:
        """Return a hash of the index."""
        return self._check

    def take(self, rows_B: Int64Array) -> Samples:
        """Read samples, in the order asked for."""
        shard_B = np.searchsorted(self._first, rows_B, side="right") - 1
        values: list[Any] = [None] * len(rows_B)
        for place in np.argsort(shard_B, kind="stable").tolist():  # shard by shard
            index = int(shard_B[place])
            data, offsets = self._data(index)
            local = int(rows_B[place] - self._first[index])
            with stage("decode"):
                low, high = int(offsets[local]), int(offsets[local + 1])
                try:
                    values[place] = self._shards[index].sample(memoryview(data)[low:high])
                except (ValueError, LookupError, ArithmeticError) as error:
                    path = self.folder / self._shards[index].name
                    raise _damaged(path, f"sample {local} does not decode: {error}") from error
        return Samples(values, rows_B, self)

    def ahead(self, rows_N: Int64Array) -> None:
        """Do nothing: local files are read when they are wanted."""

    def where(self, row: int) -> str:
        """Name a sample: its shard and its place in it."""
        index = int(np.searchsorted(self._first, row, side="right")) - 1
        return f"sample {row - int(self._first[index])} of {self.folder / self._shards[index].name}"

    def close(self) -> None:
        """Let go of the shards. Closing twice is fine."""
        self._open.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return MdsReader, (self.folder,)

    def _data(self, index: int) -> tuple[Any, NDArray[np.uint32]]:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        shard = self._shards[index]
        data = shard.load(self.folder)
        try:
            count = int(np.frombuffer(data, np.uint32, 1)[0])
            offsets = np.frombuffer(data, np.uint32, count + 1, 4)
        except ValueError as error:
            raise _damaged(self.folder / shard.name, str(error)) from error
        rises = bool(np.all(offsets[1:] >= offsets[:-1])) and int(offsets[-1]) <= len(data)
        if count != shard.num_rows or not rises:
            raise _damaged(self.folder / shard.name, f"its table of {count} samples is not that of the index")
        self._open[index] = data, offsets
        kept = sum(len(one[0]) for one in self._open.values())
        while kept > self.cache_bytes and len(self._open) > 1:
            kept -= len(self._open.popitem(last=False)[1][0])
        return self._open[index]


class _Shard:
    """One entry of the index."""

    def __init__(self, name: str, zipped: dict[str, Any] | None, raw: dict[str, Any], codec: str) -> None:
        self.name, self.zipped, self.raw, self.codec = name, zipped, raw, codec
        self.num_rows = 0
        self.columns: list[tuple[str, int | None, Callable[[memoryview], Any]]] = []

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "_Shard":
        """Read an entry; raises ValueError for what is not understood."""
        if entry["format"] != "mds" or entry["version"] != 2:
            raise ValueError(f"a shard of format {entry['format']!r} version {entry['version']}")
        codec = (entry.get("compression") or "").split(":")[0]
        if codec and codec not in _DECOMPRESS:
            raise ValueError(f"compression {codec!r}, known are {', '.join(_DECOMPRESS)}")
        shard = cls(entry["raw_data"]["basename"], entry.get("zip_data"), entry["raw_data"], codec)
        shard.num_rows = int(entry["samples"])
        names, sizes, encodings = (entry[f"column_{what}"] for what in ("names", "sizes", "encodings"))
        for name, size, encoding in zip(names, sizes, encodings, strict=True):
            shard.columns.append((name, size, _decoder(name, encoding)))
        return shard

    def load(self, folder: Path) -> Any:
        """Return the shard's bytes, checked: mapped, or decompressed."""
        raw = folder / self.name
        with stage("fetch"):
            if raw.exists() or not self.zipped:
                with explain_os_errors("open an MDS shard", raw), raw.open("rb") as file:
                    try:
                        data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    except ValueError as error:
                        raise _damaged(raw, "it is empty") from error
                _verify(raw, data, self.raw)
                return data
            path = folder / self.zipped["basename"]
            with explain_os_errors("open an MDS shard", path):
                packed = path.read_bytes()
        _verify(path, packed, self.zipped)
        with stage("decode"):
            try:
                data = _DECOMPRESS[self.codec](packed, int(self.raw["bytes"]))
            except (OSError, ValueError, EOFError, pa.ArrowException) as error:
                raise _damaged(path, f"it does not decompress: {error}") from error
        _verify(path, data, self.raw)
        return data

    def sample(self, data: memoryview) -> dict[str, Any]:
        """Decode one sample."""
        sizes, start = [], 0
        for _, size, _ in self.columns:
            if not size:
                size = int.from_bytes(data[start : start + 4], "little")
                start += 4
            sizes.append(size)
        values = {}
        for (name, _, decode), size in zip(self.columns, sizes, strict=True):
            values[name] = decode(data[start : start + size])
            start += size
        return values


def _verify(path: Path, data: Any, facts: dict[str, Any]) -> None:
    if len(data) != facts["bytes"]:
        raise _damaged(path, f"it has {len(data)} bytes, the index says {facts['bytes']}")
    with stage("verify"):
        for name, expected in (facts.get("hashes") or {}).items():
            if name in _HASHES and _HASHES[name](data) != expected:
                raise _damaged(path, f"its {name} is not that of the index")


def _decoder(column: str, encoding: str) -> Callable[[memoryview], Any]:
    """Return the function that decodes a column."""
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray":
        return _array_decoder(rest)
    if kind in _SCALARS:
        return lambda data: np.frombuffer(data, kind)[0]
    if kind == "pkl":
        raise ValueError(f"column {column!r} is pickled; reading it would run whatever is in it")
    if kind not in _PLAIN:
        raise ValueError(f"column {column!r} has the encoding {encoding!r}, known are {', '.join(_PLAIN)}")
    return _PLAIN[kind]


def _list_of_bytes(data: memoryview, start: int) -> list[bytes]:
    """Split uint32 count, uint32 sizes, items."""
    count = int.from_bytes(data[start : start + 4], "little")
    sizes = np.frombuffer(data, np.uint32, count, start + 4).tolist()
    low = start + 4 + 4 * count
    items = []
    for size in sizes:
        items.append(bytes(data[low : low + size]))
        low += size
    return items


_PLAIN: dict[str, Callable[[memoryview], Any]] = {
    "bytes": bytes,
    "str": lambda data: str(data, "utf-8"),
    "int": lambda data: int(np.frombuffer(data, np.int64)[0]),
    "json": lambda data: json.loads(bytes(data)),
    "str_int": lambda data: int(str(data, "utf-8")),
    "str_float": lambda data: float(str(data, "utf-8")),
    "str_decimal": lambda data: Decimal(str(data, "utf-8")),
    "jpeg": bytes,
    "png": bytes,
    "pil": bytes,
    "list[jpeg]": lambda data: _list_of_bytes(data, 4),
    "list[png]": lambda data: _list_of_bytes(data, 4),
    "list[pil]": lambda data: _list_of_bytes(data, 4),
    "jpeg_array": lambda data: _list_of_bytes(data, 0),
    "jpegarray": lambda data: _list_of_bytes(data, 0),
}


def _array_decoder(rest: str) -> Callable[[memoryview], Any]:
    fixed_type, _, shape_text = rest.partition(":")
    fixed_shape = tuple(int(side) for side in shape_text.split(",")) if shape_text else None

    def decode(data: memoryview) -> NDArray[Any]:
        start = 0
        dtype = fixed_type
        if not dtype:
            dtype, start = _VALUE_TYPES[data[0]], 1
        shape = fixed_shape
        if shape is None:
            axes, width = data[start] >> 2, 1 << (data[start] % 4)
            sides = np.frombuffer(data, f"uint{8 * width}", axes, start + 1)
            shape, start = tuple(int(side) for side in sides), start + 1 + axes * width
        return np.frombuffer(data[start:], dtype).reshape(shape).copy()

    return decode


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged: {why}", hint="copy the shard again from where it came from")
