"""MDS and litdata: rows come out as the packages that wrote the golden files put them in."""

import contextlib
import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marrow.core.errors import DataError, SourceError
from marrow.loader.formats.litdata import LitdataReader
from marrow.loader.formats.mds import MdsReader
from marrow.loader.source import Reader

GOLDEN = Path(__file__).parent / "golden"
EXPECTED: list[dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())
MDS = ("mds-plain", "mds-zstd")
TREES = ("litdata-plain", "litdata-zstd-chunk", "litdata-zstd-batch", "litdata-zstd-sample")


def reader_of(name: str, folder: Path | None = None) -> Reader[Any]:
    path = folder or GOLDEN / name
    return MdsReader(path) if name.startswith("mds") else LitdataReader(path)


def is_same(found: Any, kept: Any) -> bool:
    if isinstance(found, bytes):
        return bool(hashlib.sha256(found).hexdigest() == kept["sha256"])
    if isinstance(found, np.ndarray):
        return str(found.dtype) == kept["dtype"] and np.array_equal(
            found, np.array(kept["values"], found.dtype)
        )
    return (bool(found == kept) and type(found) is type(kept)) or float(found) == kept


@pytest.mark.parametrize("name", [*MDS, *TREES])
def test_rows_are_what_the_peer_wrote(name: str) -> None:
    reader = reader_of(name)
    assert reader.num_rows == len(EXPECTED)
    order = np.random.default_rng(1).permutation(len(EXPECTED))
    samples = reader.take(order)
    for row, value in zip(order.tolist(), samples.values, strict=True):
        for key, kept in EXPECTED[row].items():
            assert is_same(value[key], kept), (name, row, key)


@pytest.mark.parametrize("name", MDS)
def test_mds_encodings(name: str) -> None:
    for row, value in enumerate(reader_of(name).take(np.arange(len(EXPECTED))).values):
        assert value["fixed"].tolist() == (np.arange(6).reshape(2, 3) + row).tolist()
        assert value["fixed"].dtype == np.uint16
        assert value["data"] == {"n": row - 5, "list": [1, None, "x"]}
        assert value["big"] == 10**30 + row - 5
        assert value["photo"].startswith(b"\x89PNG")
        assert (value["small"], value["small"].dtype) == (row - 5, np.int8)


@pytest.mark.parametrize("name", TREES)
def test_litdata_leaves(name: str) -> None:
    for row, value in enumerate(reader_of(name).take(np.arange(len(EXPECTED))).values):
        kept = np.array(EXPECTED[row]["array"]["values"], np.float32)
        assert np.array_equal(value["tensor"], kept * 2)
        assert value["line"].tolist() == list(range(row, row + 5))
        assert value["flag"] is (row % 2 == 0)


def test_litdata_trees_that_are_no_dictionary() -> None:
    values = LitdataReader(GOLDEN / "litdata-tuple").take(np.array([3, 20])).values
    assert values == [{"value": (3, "text 3")}, {"value": (20, "text 20")}]


def test_litdata_rows_kept_as_arrow() -> None:
    values = LitdataReader(GOLDEN / "litdata-nested").take(np.array([22, 0])).values
    assert values == [{"a": 22, "b": {"c": [1, 22]}}, {"a": 0, "b": {"c": [1, 0]}}]


def test_litdata_tokens_are_cut_into_rows() -> None:
    reader = LitdataReader(GOLDEN / "litdata-tokens", block_tokens=16)
    assert reader.rows_of_shards.tolist() == [7, 7]  # 120 tokens a chunk
    stream = np.concatenate([np.arange(40) + 100 * item for item in range(6)])
    for row, value in enumerate(reader.take(np.arange(14)).values):
        start = (row // 7) * 120 + (row % 7) * 16
        assert value["value"].dtype == np.int32
        assert value["value"].tolist() == stream[start : start + 16].tolist()


def test_litdata_tokens_need_to_know_the_row() -> None:
    with pytest.raises(DataError, match="block_tokens"):
        LitdataReader(GOLDEN / "litdata-tokens")


@pytest.mark.parametrize("name", [*MDS, "litdata-plain", "litdata-tokens"])
def test_a_worker_opens_the_same_rows(name: str) -> None:
    reader: Any = (
        reader_of(name) if name != "litdata-tokens" else LitdataReader(GOLDEN / name, block_tokens=8)
    )
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.num_rows, copy.check) == (reader.num_rows, reader.check)
    assert str(copy.take(np.array([5])).values) == str(reader.take(np.array([5])).values)


@pytest.mark.parametrize("name", [*MDS, *TREES])
def test_any_changed_byte_of_a_shard_is_no_silent_change(name: str, tmp_path: Path) -> None:
    """MDS carries hashes: every change is found. litdata has none: what still decodes cannot be told."""
    draw = np.random.default_rng(7)
    rows = np.arange(len(EXPECTED))
    for trial in range(12):
        folder = tmp_path / str(trial)
        shutil.copytree(GOLDEN / name, folder)
        shard = sorted(path for path in folder.iterdir() if path.name != "index.json")[0]
        data = bytearray(shard.read_bytes())
        data[int(draw.integers(0, len(data)))] ^= 0x41
        shard.write_bytes(data)
        if name in MDS:
            with pytest.raises(DataError, match="is damaged"):
                reader_of(name, folder).take(rows)
        else:
            found = None
            with contextlib.suppress(DataError):
                found = reader_of(name, folder).take(rows)
            assert found is None or len(found) == len(rows)  # no other error, no crash


@pytest.mark.parametrize("name", [*MDS, *TREES, "litdata-nested"])
def test_a_shard_cut_short_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    shard = sorted(path for path in folder.iterdir() if path.name != "index.json")[1]
    for kept in (shard.stat().st_size // 2, 3, 0):
        shard.write_bytes(shard.read_bytes()[:kept])
        with pytest.raises(DataError, match="is damaged") as caught:
            reader_of(name, folder).take(np.arange(len(EXPECTED)))
        assert shard.name in str(caught.value)


@pytest.mark.parametrize("name", [MDS[0], TREES[0]])
def test_a_shard_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    shard = sorted(path for path in folder.iterdir() if path.name != "index.json")[0]
    shard.unlink()
    with pytest.raises(SourceError, match=shard.name):
        reader_of(name, folder).take(np.arange(3))


@pytest.mark.parametrize("kind", ["mds", "litdata"])
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 3, "shards": []}', '{"chunks": 5, "config": {}}']
)
def test_what_is_no_index_is_refused(kind: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match="index"):
        reader_of(kind, tmp_path)


@pytest.mark.parametrize("kind", ["mds", "litdata"])
def test_without_an_index_the_folder_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"index\.json"):
        reader_of(kind, tmp_path)


def changed(name: str, folder: Path, old: str, new: str) -> Reader[Any]:
    shutil.copytree(GOLDEN / name, folder)
    text = (folder / "index.json").read_text()
    assert old in text
    (folder / "index.json").write_text(text.replace(old, new))
    return reader_of(name, folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "word"),
    [
        ("mds-plain", '"bytes"', '"pkl"', "run"),
        ("litdata-plain", '"bytes"', '"pickle"', "run"),
        ("litdata-plain", '"bytes"', '"mesh"', "known are"),
        ("mds-plain", '"bytes"', '"hologram"', "known are"),
        ("litdata-plain", '"encryption": null', '"encryption": {"a": 1}', "encrypted"),
    ],
)
def test_what_cannot_be_read_safely_is_refused(
    name: str, old: str, new: str, word: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=word):
        changed(name, tmp_path / name, old, new).take(np.arange(2))


def test_rows_know_where_they_come_from() -> None:
    assert MdsReader(GOLDEN / "mds-plain").where(0).startswith("sample 0 of ")
    assert LitdataReader(GOLDEN / "litdata-plain").where(10).startswith("item 1 of ")
    assert LitdataReader(GOLDEN / "litdata-plain").where(10).endswith("chunk-0-1.bin")
