"""MDS by its specification: a writer of a few lines is the oracle, and damage is always a DataError.

`tests/loader/test_migration.py` reads what the package itself wrote.
"""

import bz2
import contextlib
import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.loader.formats.mds import MdsReader

Encode = Callable[[Any], bytes]
COLUMNS: dict[str, tuple[str, int | None, Encode]] = {  # encoding, size, how its values become bytes
    "text": ("str", None, lambda value: value.encode()),
    "raw": ("bytes", None, bytes),
    "number": ("int", 8, lambda value: struct.pack("<q", value)),
    "score": ("float64", 8, lambda value: struct.pack("<d", value)),
    "record": ("json", None, lambda value: json.dumps(value).encode()),
    "big": ("str_int", None, lambda value: str(value).encode()),
    "price": ("str_decimal", None, lambda value: str(value).encode()),
}
ROW = st.fixed_dictionaries(
    {
        "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        "raw": st.binary(max_size=12),
        "number": st.integers(-(1 << 63), (1 << 63) - 1),
        "score": st.floats(allow_nan=False),
        "record": st.recursive(
            st.none() | st.booleans() | st.integers(), lambda inner: st.lists(inner, max_size=2)
        ),
        "big": st.integers(),
        "price": st.decimals(allow_nan=False, allow_infinity=False),
    }
)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "zstd:3": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    "br": lambda data: pa.compress(data, codec="brotli", asbytes=True),
    "gz": gzip.compress,
    "bz2:9": bz2.compress,
    "snappy": lambda data: pa.compress(data, codec="snappy", asbytes=True),
}
HASHES: dict[str, Callable[[bytes], str]] = {
    "xxh3_64": lambda data: xxhash.xxh3_64(data).hexdigest(),
    "xxh64": lambda data: xxhash.xxh64(data).hexdigest(),
    "xxh128": lambda data: xxhash.xxh128(data).hexdigest(),
    "md5": lambda data: hashlib.md5(data).hexdigest(),
    "sha1": lambda data: hashlib.sha1(data).hexdigest(),
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
}


def sample(row: dict[str, Any], columns: dict[str, tuple[str, int | None, Encode]]) -> bytes:
    parts = [encode(row[name]) for name, (_, _, encode) in columns.items()]
    sizes = [len(part) for part, (_, size, _) in zip(parts, columns.values(), strict=True) if not size]
    return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(parts)


def write(
    folder: Path,
    shards: list[list[dict[str, Any]]],
    columns: dict[str, tuple[str, int | None, Encode]] = COLUMNS,
    *,
    compression: str | None = None,
    hashes: tuple[str, ...] = ("sha1",),
    keep_raw: bool = False,
) -> Path:
    """Write a dataset as the specification says."""
    folder.mkdir(exist_ok=True, parents=True)
    entries = []

    def facts(name: str, data: bytes) -> dict[str, Any]:
        (folder / name).write_bytes(data)
        return {"basename": name, "bytes": len(data), "hashes": {h: HASHES[h](data) for h in hashes}}

    for number, rows in enumerate(shards):
        head = json.dumps({"columns": list(columns)}).encode()
        samples = [sample(row, columns) for row in rows]
        start = 4 + 4 * (len(rows) + 1) + len(head)
        offsets = np.cumsum([start, *map(len, samples)]).astype(np.uint32)
        data = struct.pack("<I", len(rows)) + offsets.tobytes() + head + b"".join(samples)
        name = f"shard.{number:05d}.mds"
        raw, packed = facts(name, data), None
        if compression is not None:
            packed = facts(f"{name}.{compression.split(':')[0]}", PACK[compression](data))
            if not keep_raw:
                (folder / name).unlink()
        entries.append(
            {
                "format": "mds", "version": 2, "samples": len(rows), "compression": compression,
                "column_names": list(columns),
                "column_encodings": [encoding for encoding, _, _ in columns.values()],
                "column_sizes": [size for _, size, _ in columns.values()],
                "raw_data": raw, "zip_data": packed,
            }
        )  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "text": f"text {n}", "raw": bytes([n % 256]), "number": n, "score": n / 3,
            "record": {"n": n}, "big": n, "price": Decimal(n) / 4,
        }
        for n in range(start, start + count)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mds"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(ROW, min_size=1, max_size=4), min_size=1, max_size=3), st.randoms())
def test_what_the_specification_writes_is_read(tmp_path_factory, shards, random) -> None:
    reader = MdsReader(write(tmp_path_factory.mktemp("mds"), shards))
    rows = [row for shard in shards for row in shard]
    assert reader.num_rows == len(rows)
    assert reader.rows_of_shards.tolist() == [len(shard) for shard in shards]
    order = list(range(len(rows))) * 2
    random.shuffle(order)
    assert reader.take(np.array(order)).values == [rows[row] for row in order]
    reader.close()


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("keep_raw", [False, True])
def test_each_compression_is_read(folder: Path, compression: str, keep_raw: bool) -> None:
    shards = [rows_of(3), rows_of(4, start=3)]
    write(folder, shards, compression=compression, keep_raw=keep_raw)
    assert MdsReader(folder).take(np.arange(7)).values == shards[0] + shards[1]


@pytest.mark.parametrize("name", HASHES)
def test_each_hash_finds_a_changed_byte(folder: Path, name: str) -> None:
    write(folder, [rows_of(3)], hashes=(name,))
    assert len(MdsReader(folder).take(np.arange(3))) == 3
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"its {name} is not that of the index") as caught:
        MdsReader(folder).take(np.arange(1))
    assert "copy the shard again" in caught.value.hint


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "uint32", "int64", "float64"])
@pytest.mark.parametrize(
    ("shape", "known"),
    [
        (shape, known)
        for shape in [(3,), (2, 3), (300,), (1, 70_000), ()]
        for known in ["", "type", "both"]
        if shape or known != "both"  # a fixed shape has sides
    ],
)
def test_arrays_come_back_however_much_the_encoding_says(
    folder: Path, dtype: str, shape: tuple[int, ...], known: str
) -> None:
    """A first byte tells the type unless the encoding does, then axes and width of the sides, then them."""
    value = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    numbers = {"uint8": 8, "int16": 17, "float16": 18, "uint32": 32, "int64": 65, "float64": 66}
    width = 1 if max(shape, default=0) < 256 else 2 if max(shape) < 65_536 else 4
    sides = np.array(shape, f"uint{8 * width}").tobytes()
    head = bytes([len(shape) << 2 | {1: 0, 2: 1, 4: 2}[width]]) + sides
    encoding, prefix = {
        "": ("ndarray", bytes([numbers[dtype]]) + head),
        "type": (f"ndarray:{dtype}", head),
        "both": (f"ndarray:{dtype}:{','.join(map(str, shape))}", b""),
    }[known]
    columns = {"array": (encoding, None, lambda value: prefix + value.tobytes())}
    [found] = MdsReader(write(folder, [[{"array": value}]], columns)).take(np.array([0])).values
    assert found["array"].dtype == value.dtype
    assert np.array_equal(found["array"], value) and found["array"].shape == shape
    assert found["array"].flags.writeable, "a row of one's own"


def test_lists_of_images_are_lists_of_bytes(folder: Path) -> None:
    def images(value: list[bytes]) -> bytes:
        return struct.pack(f"<I{len(value)}I", len(value), *map(len, value)) + b"".join(value)

    columns: dict[str, tuple[str, int | None, Encode]] = {
        "array": ("jpeg_array", None, images),
        "list": ("list[png]", None, lambda value: bytes(4) + images(value)),  # 4 bytes lead it
    }
    row = {"array": [b"one", b"", b"three"], "list": [b"x" * 300]}
    empty: dict[str, Any] = {"array": [], "list": []}
    assert MdsReader(write(folder, [[row, empty]], columns)).take(np.array([0, 1])).values == [row, empty]


def test_few_shards_are_kept_open_and_the_answer_is_the_same(folder: Path) -> None:
    shards = [rows_of(5, start=5 * number) for number in range(6)]
    write(folder, shards, compression="gz")
    small = MdsReader(folder, cache_bytes=1)
    rows = np.random.default_rng(0).permutation(30)
    expected = [row for shard in shards for row in shard]
    assert small.take(rows).values == [expected[row] for row in rows]
    assert len(small._open) == 1
    roomy = MdsReader(folder)
    roomy.take(rows)
    assert len(roomy._open) == 6
    roomy.close()
    roomy.close()
    assert roomy.take(rows[:3]).values == [expected[row] for row in rows[:3]], "closed, it opens anew"


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_without_hashes_a_changed_byte_is_another_value_or_a_data_error(
    tmp_path_factory, place: int, change: int
) -> None:
    folder = write(tmp_path_factory.mktemp("mds"), [rows_of(4)], hashes=())
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= change
    path.write_bytes(data)
    found = None
    with contextlib.suppress(DataError):  # no other error, no crash
        found = MdsReader(folder).take(np.arange(4)).values
    assert found is None or len(found) == 4


def test_a_sample_that_does_not_decode_is_named(folder: Path) -> None:
    write(folder, [rows_of(4)], hashes=())
    path = folder / "shard.00000.mds"
    path.write_bytes(path.read_bytes().replace(b"text 2", b"text \xff"))
    reader = MdsReader(folder)
    assert len(reader.take(np.array([0, 1, 3]))) == 3, "the others are as they were"
    with pytest.raises(DataError, match=r"shard\.00000\.mds is damaged: sample 2 does not decode") as caught:
        reader.take(np.array([0, 2]))
    assert caught.value.hint == "copy the shard again from where it came from"


@pytest.mark.parametrize("kept", [0, 3, 30, -1])
def test_a_shard_cut_short_is_found_without_hashes_too(folder: Path, kept: int) -> None:
    write(folder, [rows_of(3)], hashes=())
    path = folder / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"shard\.00000\.mds is damaged"):
        MdsReader(folder).take(np.arange(3))


def test_a_count_that_is_not_the_indexs_is_found(folder: Path) -> None:
    write(folder, [rows_of(3)], hashes=())
    path = folder / "shard.00000.mds"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<I", 2) + data[4:])
    with pytest.raises(DataError, match="its table of 2 samples is not that of the index"):
        MdsReader(folder).take(np.arange(3))
    path.write_bytes(struct.pack("<I", 1 << 30) + data[4:])
    with pytest.raises(DataError, match="is damaged"):
        MdsReader(folder).take(np.arange(3))


def test_a_packed_shard_that_does_not_unpack_is_named(folder: Path) -> None:
    for compression in PACK:
        own = write(folder / compression.split(":")[0], [rows_of(3)], compression=compression, hashes=())
        [path] = own.glob("shard*")
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(DataError, match=r"does not decompress|has \d+ bytes"):
            MdsReader(own).take(np.arange(3))


def test_missing_files_are_named_with_a_hint(folder: Path) -> None:
    for compression in (None, "gz"):
        own = write(folder / str(compression), [rows_of(1)], compression=compression)
        [path] = own.glob("shard*")
        path.unlink()
        with pytest.raises(SourceError, match=path.name) as caught:
            MdsReader(own).take(np.array([0]))
        assert caught.value.hint


REFUSED = [
    ({"format": "csv"}, "format 'csv'"),
    ({"version": 1}, "version 1"),
    ({"compression": "rar:3"}, "compression 'rar', known are zstd"),
    ({"column_encodings": ["pkl"] * 7}, "would run whatever is in it"),
    ({"column_encodings": ["hologram"] * 7}, "encoding 'hologram', known are"),
    ({"column_encodings": ["str"]}, "zip"),
    ({"raw_data": None}, "NoneType"),
    ({"samples": "many"}, "invalid literal"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_an_index_that_is_not_understood_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    write(folder, [rows_of(1)])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= change
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json is no index of MDS shards") as caught:
        MdsReader(folder)
    assert said in str(caught.value)
    assert caught.value.hint == "point at a folder of MDS"


def test_a_dataset_without_shards_is_refused(folder: Path) -> None:
    write(folder, [])
    with pytest.raises(DataError, match="names no shards"):
        MdsReader(folder)


def test_the_check_follows_the_index(folder: Path) -> None:
    one = MdsReader(write(folder / "one", [rows_of(3)]))
    again = MdsReader(write(folder / "again", [rows_of(3)]))
    other = MdsReader(write(folder / "other", [rows_of(3, start=1)]))
    assert one.check == again.check != other.check
    assert one.where(2) == f"sample 2 of {folder / 'one' / 'shard.00000.mds'}"
    assert one.ahead(np.arange(3)) is None
