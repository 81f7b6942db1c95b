import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.core.hashes import check_file
from marrow.loader import reader as reader_module
from marrow.loader.reader import Rows, ShardReader
from marrow.loader.source import LocalFiles


@pytest.fixture(scope="module")
def table(shards: Path) -> list[dict[str, object]]:
    """All rows, read by pyarrow alone."""
    names = [shard["name"] for shard in json.loads((shards / "manifest.json").read_text())["shards"]]
    assert len(names) > 2
    return [row for name in names for row in pa.ipc.open_file(shards / name).read_all().to_pylist()]


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_rows_come_in_the_order_asked_for(
    shards: Path, table: list[dict[str, object]], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=30))
    with ShardReader(shards) as reader:
        picked = reader.take(np.array(rows))
    expected = [table[row] for row in rows]
    assert picked.tokens.tolist() == [row["tokens"] for row in expected]
    assert picked.num_tokens.tolist() == [row["num_tokens"] for row in expected]
    starts = [
        picked.starts[low:high].tolist()
        for low, high in zip(picked.starts_of[:-1], picked.starts_of[1:], strict=True)
    ]
    assert starts == [row["document_starts"] for row in expected]


def test_what_is_picked_outlives_the_reader(shards: Path, table: list[dict[str, object]]) -> None:
    with ShardReader(shards) as reader:
        picked = reader.take(np.arange(3))
    out = np.empty((3, reader.manifest.context + 1), dtype=np.int64)
    picked.stack(out)
    assert out.tolist() == [row["tokens"] for row in table[:3]]
    assert picked.tokens[2].tolist() == table[2]["tokens"]


def test_a_row_tells_its_documents(shards: Path, table: list[dict[str, object]]) -> None:
    with ShardReader(shards) as reader:
        for number, row in enumerate(table):
            starts = row["document_starts"]
            assert isinstance(starts, list)
            assert (
                reader.documents(number)
                == list(
                    zip(
                        row["document_ids"],  # type: ignore[call-overload]
                        row["document_offsets"],
                        starts,
                        [*starts[1:], row["num_tokens"]],
                        strict=True,
                    )
                )
            )


def read(reader: ShardReader, rows: Sequence[int]) -> list[list[int]]:
    out = np.empty((len(rows), reader.manifest.context + 1), dtype=np.int64)
    reader.take(np.array(rows)).stack(out)
    found: list[list[int]] = out.tolist()
    return found


def spoil(path: Path, row: int) -> None:
    """Change a token of a row of a shard, in the file as it is mapped elsewhere."""
    data = path.read_bytes()
    tokens = pa.ipc.open_file(data).get_batch(0).column("tokens")
    at = data.index(tokens[row].values.to_numpy().tobytes()) + 6
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))


def test_a_row_is_checked_once_a_process_and_only_when_read(copy: Path) -> None:
    path = copy / "train-00000.arrow"
    with ShardReader(copy) as reader:
        before = read(reader, [0, 1])
        at = path.stat().st_mtime_ns
        spoil(path, 0)  # behind its back: row 0 is known to be right, row 2 is not looked at yet
        spoil(path, 2)
        os.utime(path, ns=(at, at))
        assert read(reader, [1]) == before[1:]
        assert read(reader, [0]) != before[:1]
        with pytest.raises(DataError, match=r"train-00000\.arrow is damaged: row 2: its XXH64") as error:
            read(reader, [3, 2])
        assert "run the shards step again" in error.value.hint
    with ShardReader(copy) as again:  # another loader of this process
        assert read(again, [1]) == before[1:]
        with pytest.raises(DataError, match="row 2"):
            read(again, [2])
    reader_module.forget_verified()
    with ShardReader(copy) as forgetful, pytest.raises(DataError, match="row 0"):
        read(forgetful, [0])


def test_a_shard_that_changed_is_checked_again(copy: Path) -> None:
    with ShardReader(copy) as reader:
        every = range(reader.num_rows)
        read(reader, every)
    path = copy / "train-00001.arrow"
    at = path.stat().st_mtime_ns
    spoil(path, 1)
    os.utime(path, ns=(at, at + 1))
    with ShardReader(copy) as reader, pytest.raises(DataError, match=r"train-00001.*row 1: its XXH64"):
        read(reader, every)


def without_checks(folder: Path) -> None:
    """Make the shards of a folder as they were before rows had checks."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        batch = pa.ipc.open_file(path.read_bytes()).get_batch(0)
        batch = batch.select([name for name in batch.schema.names if name != "row_xxh64"])
        with pa.ipc.new_file(str(path), batch.schema) as file:
            file.write_batch(batch)
        shard["num_bytes"], shard["xxh3"] = path.stat().st_size, check_file(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_rows_without_checks_are_checked_by_the_shard(copy: Path, table: list[dict[str, object]]) -> None:
    without_checks(copy)
    with ShardReader(copy) as reader:
        assert read(reader, range(len(table))) == [row["tokens"] for row in table]
    path = copy / "train-00001.arrow"
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))
    with ShardReader(copy) as reader:
        read(reader, [0])
        with pytest.raises(DataError, match=r"train-00001\.arrow is damaged: its xxh3"):
            read(reader, range(len(table)))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.one_of(st.integers(0, 1500), st.integers(-1500, -1), st.floats(0, 1)), bit=st.integers(0, 7))
def test_whatever_bit_is_flipped_no_row_comes_out_wrong(
    shards: Path, copy: Path, where: float, bit: int
) -> None:
    """Of the frame around the rows, of the rows, of their checks: found, or of no consequence."""
    whole = (shards / "train-00001.arrow").read_bytes()
    at = int(where * (len(whole) - 1)) if isinstance(where, float) else where % len(whole)
    path = copy / "train-00001.arrow"
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    with ShardReader(shards) as reader:
        every = range(reader.num_rows)
        expected = read(reader, every)
    with ShardReader(copy) as reader:
        found: list[list[int]] | str
        try:
            found = read(reader, every)
        except DataError as error:
            found = error.message
        assert "train-00001.arrow is damaged" in found or found == expected
        # The ids of documents have no check but the shard's, so that is looked at for them.
        first = int(reader.rows_of_shards[0])
        with pytest.raises(DataError, match=r"train-00001\.arrow is damaged"):
            reader.documents(first)


class CountingFiles(LocalFiles):
    """Shards of a folder as a cache gives them: only some may be open, and all is written down."""

    max_open = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(sorted(folder.glob("*.arrow")))
        self.pins: list[int] = []
        self.soon: list[list[int]] = []

    def path(self, index: int) -> Path:
        self.pins.append(index)
        return super().path(index)

    def release(self, index: int) -> None:
        self.pins.remove(index)

    def ahead(self, indices: list[int]) -> None:
        self.soon.append(indices)


def test_shards_that_cost_room_are_let_go(shards: Path, table: list[dict[str, object]]) -> None:
    files = CountingFiles(shards)
    rng = np.random.default_rng(0)
    held: list[tuple[Rows, list[int]]] = []
    with ShardReader(shards, files) as reader:
        shard_of = np.repeat(np.arange(len(reader.rows_of_shards)), reader.rows_of_shards)
        for _ in range(30):
            rows = rng.integers(0, reader.num_rows, 5)
            used = set(shard_of[rows].tolist())
            held.append((reader.take(rows), rows.tolist()))
            assert used <= set(files.pins), "what is read is pinned"
            assert len(files.pins) == len(set(files.pins)) <= max(files.max_open, len(used))
        reader.ahead(np.array([reader.num_rows - 1, 0, 1]))
        reader.ahead(np.array([reader.num_rows - 1, 0, 2]))
        wanted = [index for index in (int(shard_of[-1]), 0) if index not in files.pins]
        assert files.soon == [wanted] != [[]], "what is not open yet, and each list once"
        assert not reader.is_local
    assert files.pins == []
    # Rows outlive the shards that were let go after them.
    for picked, rows in held:
        assert picked.tokens.tolist() == [table[row]["tokens"] for row in rows]
        out = np.empty((5, picked.stored), dtype=np.int64)
        picked.stack(out)
        assert out.tolist() == [table[row]["tokens"] for row in rows]


# Faults


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_shard_cut_short_is_found_at_once(copy: Path, keep: int) -> None:
    path = copy / "train-00001.arrow"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-00001\.arrow is damaged: it has \d+ bytes"):
        ShardReader(copy)


def test_a_missing_shard_is_found_at_once(copy: Path) -> None:
    (copy / "train-00001.arrow").unlink()
    with pytest.raises(SourceError, match=r"train-00001\.arrow"):
        ShardReader(copy)


def test_a_shard_of_another_context_is_found(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["context"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with ShardReader(copy) as reader, pytest.raises(DataError, match="it holds"):
        read(reader, [0])


def test_no_shards_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="manifest"):
        ShardReader(tmp_path)


def test_shards_are_read_through_links(shards: Path, tmp_path: Path) -> None:
    """The store gives a folder of links to read-only blobs."""
    for path in shards.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with ShardReader(tmp_path) as reader:
        assert reader.take(np.array([0])).tokens.shape == (1, reader.manifest.context + 1)
