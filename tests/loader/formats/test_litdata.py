"""litdata chunks by their specification: a writer of a few lines is the oracle, unsafe leaves are refused.

`tests/loader/test_migration.py` reads what the package itself wrote.
"""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.loader.formats.litdata import _NUMPY_TYPES, _TORCH_TYPES, LitdataReader

LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
ENCODE: dict[str, Callable[[Any], bytes]] = {
    "int": lambda value: struct.pack("<q", value),
    "float": lambda value: struct.pack("<d", value),
    "bool": lambda value: bytes([value]),
    "str": lambda value: value.encode(),
    "bytes": bytes,
}
KINDS = {bool: "bool", int: "int", float: "float", str: "str", bytes: "bytes"}
VALUES: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(-(1 << 63), (1 << 63) - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    bytes: st.binary(max_size=8),
}


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:  # a frame whose size is not known before
        stream.write(data)
    return out.getvalue().to_pybytes()


def spec_of(value: Any) -> dict[str, Any]:
    """The tree of a value, as torch's pytrees are written."""
    if isinstance(value, dict):
        children = [spec_of(child) for child in value.values()]
        return {"type": "builtins.dict", "context": json.dumps(list(value)), "children_spec": children}
    if isinstance(value, (list, tuple)):
        name = f"builtins.{type(value).__name__}"
        return {"type": name, "context": "null", "children_spec": [spec_of(child) for child in value]}
    return LEAF


def leaves_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in leaves_of(child)]
    if isinstance(value, (list, tuple)):
        return [leaf for child in value for leaf in leaves_of(child)]
    return [value]


def item(parts: list[bytes]) -> bytes:
    return struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts)


def chunk(items: list[bytes]) -> bytes:
    start = 4 * (len(items) + 2)
    offsets = np.cumsum([start, *map(len, items)]).astype(np.uint32)
    return struct.pack("<I", len(items)) + offsets.tobytes() + b"".join(items)


def write_index(folder: Path, chunks: list[dict[str, Any]], **config: Any) -> Path:
    base = {
        "compression": None, "compression_level": None, "encryption": None, "item_loader": "PyTreeLoader",
        "data_format": ["int"], "data_spec": json.dumps([1, LEAF]),
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": base | config}))
    return folder


def write(folder: Path, chunks: list[list[Any]], level: str = "") -> Path:
    """Write items that are trees of plain values, all of the first one's shape."""
    entries = []
    for number, values in enumerate(chunks):
        items = [item([ENCODE[KINDS[type(v)]](v) for v in leaves_of(value)]) for value in values]
        data = chunk([zstd(one) for one in items] if level == "sample" else items)
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(zstd(data) if level == "chunk" else data)
        entries.append({"filename": name, "chunk_size": len(values), "chunk_bytes": len(data), "dim": None})
    first = chunks[0][0]
    return write_index(
        folder,
        entries,
        data_format=[KINDS[type(leaf)] for leaf in leaves_of(first)],
        data_spec=json.dumps([1, spec_of(first)]),
        compression="zstd:4" if level else None,
        compression_level=level or None,
    )


def write_leaf(folder: Path, kind: str, *datas: bytes) -> LitdataReader:
    """Write items of a single leaf."""
    (folder / "chunk-0-0.bin").write_bytes(chunk([item([data]) for data in datas]))
    entry = {"filename": "chunk-0-0.bin", "chunk_size": len(datas), "chunk_bytes": 0, "dim": None}
    return LitdataReader(write_index(folder, [entry], data_format=[kind]))


@st.composite
def trees(draw: st.DrawFn) -> list[list[Any]]:
    """Chunks of items of one shape, with values of one type at each place."""
    kinds = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=5))
    shape = draw(st.sampled_from(["dict", "tuple", "list", "nested"]))

    def value() -> Any:
        leaves = [draw(VALUES[kind]) for kind in kinds]
        if shape == "dict":
            return {f"k{number}": leaf for number, leaf in enumerate(leaves)}
        if shape == "nested":
            return {"a": [tuple(leaves), {"b": leaves[0]}], "c": leaves[-1]}
        return tuple(leaves) if shape == "tuple" else leaves

    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return [[value() for _ in range(count)] for count in counts]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees(), st.sampled_from(["", "chunk", "sample"]), st.randoms())
def test_what_the_specification_writes_is_read(tmp_path_factory, chunks, level: str, random) -> None:
    reader = LitdataReader(write(tmp_path_factory.mktemp("litdata"), chunks, level))
    values = [value for values in chunks for value in values]
    assert reader.num_rows == len(values)
    assert reader.rows_of_shards.tolist() == list(map(len, chunks))
    order = list(range(len(values))) * 2
    random.shuffle(order)
    found = reader.take(np.array(order)).values
    assert found == [
        values[row] if isinstance(values[row], dict) else {"value": values[row]} for row in order
    ]


@pytest.mark.parametrize("number", range(len(_NUMPY_TYPES)))
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 4), ()])
def test_arrays_keep_type_and_shape(tmp_path: Path, number: int, shape: tuple[int, ...]) -> None:
    value = np.arange(int(np.prod(shape))).astype(_NUMPY_TYPES[number]).reshape(shape)
    data = struct.pack(f"<{2 + len(shape)}I", number, len(shape), *shape) + value.tobytes()
    [found] = write_leaf(tmp_path, "numpy", data).take(np.array([0])).values
    assert (found["value"].dtype, found["value"].shape) == (value.dtype, shape)
    assert np.array_equal(found["value"], value)
    assert found["value"].flags.writeable


@pytest.mark.parametrize("number", [number for number, name in enumerate(_TORCH_TYPES) if name != "bfloat16"])
def test_tensors_keep_type_and_shape(tmp_path: Path, number: int) -> None:
    """Their heads are big-endian, unlike all else."""
    value = np.arange(6).astype(_TORCH_TYPES[number]).reshape(2, 3)
    data = struct.pack(">4I", number, 2, 2, 3) + value.tobytes()
    [found] = write_leaf(tmp_path, "tensor", data).take(np.array([0])).values
    assert (found["value"].dtype, found["value"].tolist()) == (value.dtype, value.tolist())


@pytest.mark.parametrize(
    ("kind", "types"), [("no_header_numpy", _NUMPY_TYPES), ("no_header_tensor", _TORCH_TYPES)]
)
def test_arrays_without_a_head_are_flat(tmp_path: Path, kind: str, types: list[str]) -> None:
    number = types.index("int32")
    value = np.arange(5, dtype=np.int32)
    found = write_leaf(tmp_path, f"{kind}:{number}", value.tobytes(), b"").take(np.array([0, 1])).values
    assert [one["value"].tolist() for one in found] == [[0, 1, 2, 3, 4], []]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("tensor", struct.pack(">3I", _TORCH_TYPES.index("bfloat16"), 1, 2) + bytes(4)),  # numpy has none
        ("tensor", struct.pack(">3I", 99, 1, 2) + bytes(8)),
        ("tensor", struct.pack(">3I", 0, 1, 3) + bytes(8)),
        ("numpy", struct.pack("<3I", 99, 1, 2) + bytes(8)),
        ("numpy", struct.pack("<3I", 0, 1, 3) + bytes(8)),
        ("numpy", b"abc"),
        ("int", b"abc"),
        ("float", b""),
        ("bool", b""),
        ("str", b"\xff"),
        ("no_header_tensor:10", bytes(4)),  # bfloat16
    ],
)
def test_a_leaf_that_does_not_decode_is_named(tmp_path: Path, kind: str, data: bytes) -> None:
    reader = write_leaf(tmp_path, kind, data)
    with pytest.raises(DataError, match=r"chunk-0-0\.bin is damaged: an item does not decode") as caught:
        reader.take(np.array([0]))
    assert caught.value.hint == "copy the chunk again from where it came from"


@pytest.mark.parametrize("kind", ["bytes", "file", "jpeg", "image"])
def test_images_and_files_stay_bytes(tmp_path: Path, kind: str) -> None:
    assert write_leaf(tmp_path, kind, b"\xff\xd8").take(np.array([0])).values == [{"value": b"\xff\xd8"}]


# Tokens


def write_tokens(folder: Path, counts: list[int], dtype: str = "uint16") -> Path:
    """Write chunks of so many tokens, numbered through, two items each."""
    entries, start = [], 0
    for number, count in enumerate(counts):
        tokens = np.arange(start, start + count).astype(dtype)
        start += count
        half = tokens[: count // 2].tobytes()
        (folder / f"{number}.bin").write_bytes(chunk([half, tokens.tobytes()[len(half) :]]))
        entries.append({"filename": f"{number}.bin", "chunk_size": 2, "dim": count, "chunk_bytes": 0})
    kind = f"no_header_numpy:{_NUMPY_TYPES.index(dtype)}"
    return write_index(folder, entries, data_format=[kind], item_loader="TokensLoader")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(1, 12))
def test_tokens_of_a_chunk_are_cut_into_rows_and_its_rest_left_out(
    tmp_path_factory, counts: list[int], block: int
) -> None:
    folder = write_tokens(tmp_path_factory.mktemp("tokens"), counts)
    expected, start = [], 0
    for count in counts:
        expected += [
            list(range(start + row * block, start + (row + 1) * block)) for row in range(count // block)
        ]
        start += count
    if not expected:
        with pytest.raises(DataError, match="names no items") as caught:
            LitdataReader(folder, block_tokens=block)
        assert "block_tokens is too large" in caught.value.hint
        return
    reader = LitdataReader(folder, block_tokens=block)
    assert reader.num_rows == len(expected)
    found = reader.take(np.arange(len(expected))).values
    assert [value["value"].tolist() for value in found] == expected
    assert all(value["value"].dtype == np.uint16 for value in found)
    found[0]["value"][:] = 0
    assert reader.take(np.array([0])).values[0]["value"].tolist() == expected[0], "rows are copies"


@pytest.mark.parametrize("block", [None, 0, -1])
def test_tokens_without_a_length_of_rows_are_refused(tmp_path: Path, block: int | None) -> None:
    with pytest.raises(DataError, match="say how many make a row, with block_tokens="):
        LitdataReader(write_tokens(tmp_path, [10]), block_tokens=block)


def test_the_length_of_rows_is_part_of_what_the_data_is(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, [40])
    assert LitdataReader(folder, block_tokens=4).check != LitdataReader(folder, block_tokens=8).check


def test_tokens_cut_short_are_damage(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, [40])
    (folder / "0.bin").write_bytes((folder / "0.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"0\.bin is damaged"):
        LitdataReader(folder, block_tokens=4).take(np.array([0]))


# Bad indexes and damage


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"encryption": {"algorithm": "fernet"}}, "encrypted"),
    ({"compression": "rar:1"}, "compression 'rar', known is zstd"),
    ({"item_loader": "ParquetLoader"}, "item loader is ParquetLoader"),
    ({"data_format": ["pickle"]}, "would run whatever is in it"),
    ({"data_format": ["mesh"]}, "known are"),
    ({"data_format": None}, "NoneType"),
    ({"data_spec": "no JSON"}, "Expecting value"),
    ({"item_loader": "TokensLoader", "data_format": ["no_header_numpy:99"]}, "index out of range"),
    ({"item_loader": "TokensLoader", "data_format": []}, "index out of range"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_an_index_that_is_not_understood_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    entry = {"filename": "0.bin", "chunk_size": 1, "dim": 8, "chunk_bytes": 0}
    write_index(tmp_path, [entry], **change)
    with pytest.raises(DataError, match="is no index of litdata chunks that can be read") as caught:
        LitdataReader(tmp_path, block_tokens=4)
    assert said in str(caught.value)
    assert caught.value.hint == "point at a folder that litdata's optimize wrote"


def test_trees_of_other_types_are_refused_by_name(tmp_path: Path) -> None:
    entry = {"filename": "chunk-0-0.bin", "chunk_size": 1, "dim": None, "chunk_bytes": 0}
    spec = {"type": "collections.deque", "context": "null", "children_spec": [LEAF]}
    write_index(tmp_path, [entry], data_spec=json.dumps([1, spec]))
    (tmp_path / "chunk-0-0.bin").write_bytes(chunk([item([struct.pack("<q", 1)])]))
    with pytest.raises(DataError, match=r"items are of type collections\.deque, known are dict, list"):
        LitdataReader(tmp_path).take(np.array([0]))


@pytest.mark.parametrize("level", ["", "chunk", "sample"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), change=st.integers(1, 255))
def test_a_changed_byte_is_another_value_or_a_data_error(
    tmp_path_factory, level: str, place: int, change: int
) -> None:
    values = [{"n": n, "text": f"text {n}", "score": n / 3, "yes": True} for n in range(4)]
    folder = write(tmp_path_factory.mktemp("litdata"), [values], level)
    path = folder / "chunk-0-0.bin"
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= change
    path.write_bytes(data)
    found = None
    with contextlib.suppress(DataError):  # no other error, no crash
        found = LitdataReader(folder).take(np.arange(4)).values
    assert found is None or len(found) == 4


def test_a_table_of_items_that_is_not_in_order_is_damage(tmp_path: Path) -> None:
    folder = write(tmp_path, [[1, 2, 3]])
    path = folder / "chunk-0-0.bin"
    data = bytearray(path.read_bytes())
    data[8:12], data[12:16] = data[12:16], data[8:12]
    path.write_bytes(data)
    with pytest.raises(DataError, match="its table of items is not in order"):
        LitdataReader(folder).take(np.array([0]))


def test_a_count_that_is_not_the_indexs_is_damage(tmp_path: Path) -> None:
    folder = write(tmp_path, [[1, 2, 3]])
    path = folder / "chunk-0-0.bin"
    path.write_bytes(struct.pack("<I", 2) + path.read_bytes()[4:])
    with pytest.raises(DataError, match="it holds 2 items, the index says 3"):
        LitdataReader(folder).take(np.array([0]))


def test_chunks_without_items_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path, [[1, 2], [3]])
    index = json.loads((folder / "index.json").read_text())
    index["chunks"].insert(1, {"filename": "nowhere.bin", "chunk_size": 0, "dim": None, "chunk_bytes": 0})
    (folder / "index.json").write_text(json.dumps(index))
    reader = LitdataReader(folder)
    assert [value["value"] for value in reader.take(np.arange(3)).values] == [1, 2, 3]
    assert reader.where(2) == f"item 0 of {folder / 'chunk-0-1.bin'}"


def test_a_missing_chunk_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, [[1], [2]])
    (folder / "chunk-0-1.bin").unlink()
    reader = LitdataReader(folder)
    assert reader.take(np.array([0])).values == [{"value": 1}]
    with pytest.raises(SourceError, match=r"chunk-0-1\.bin") as caught:
        reader.take(np.array([1]))
    assert caught.value.hint


def test_few_chunks_are_kept_open_and_the_answer_is_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path, [[row, row + 1] for row in range(0, 12, 2)], "chunk")
    rows = np.random.default_rng(0).permutation(12)
    small = LitdataReader(folder, cache_bytes=1)
    assert [value["value"] for value in small.take(rows).values] == rows.tolist()
    assert len(small._open) == 1
    small.close()
    small.close()
    assert [value["value"] for value in small.take(rows[:2]).values] == rows[:2].tolist()
    assert small.ahead(rows) is None
