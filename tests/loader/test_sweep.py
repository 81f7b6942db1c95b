"""The sweep: what is recommended follows from what was measured, and sizes are of the user's own rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.loader.formats.mds import MdsReader
from marrow.loader.formats.parquet import ParquetReader
from marrow.loader.loader import Loader
from marrow.loader.reader import ShardReader
from marrow.loader.samples import Collate
from marrow.loader.sweep import Measured, Setting, made_up, page, recommend, resized, settings_of, sweep


def measured(workers: int, prefetch: int, busy: float, step_s: float = 0.01) -> Measured:
    stepped_s = busy if step_s else 0.0
    rate = int(1000 * busy)
    return Measured(Setting(workers, prefetch), 100, rate, 1.0, stepped_s, 0.1, 0.1, {"transform": 1 - busy})


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ({(0, 0): 0.5, (0, 2): 0.99, (1, 2): 0.999, (2, 2): 1.0}, (0, 2)),
        ({(0, 0): 0.99, (0, 2): 0.999}, (0, 0)),
        ({(0, 0): 0.3, (0, 2): 0.5, (1, 2): 0.62, (2, 2): 0.625}, (1, 2)),
        ({(0, 0): 0.3, (0, 2): 0.5, (1, 2): 0.62, (2, 2): 0.70}, (2, 2)),
        ({(0, 4): 0.999, (0, 1): 0.98}, (0, 1)),
    ],
)
def test_the_smallest_setting_that_is_enough(
    busy: dict[tuple[int, int], float], expected: tuple[int, int]
) -> None:
    best = recommend([measured(*setting, share) for setting, share in busy.items()])
    assert best is not None
    assert (best.setting.workers, best.setting.prefetch) == expected


def test_without_a_step_the_rate_decides() -> None:
    best = recommend([measured(0, 0, 0.9, 0), measured(0, 2, 0.93, 0), measured(1, 2, 0.94, 0)])
    assert best is not None
    assert best.setting == Setting(0, 0)


def test_nothing_measured_nothing_recommended() -> None:
    assert recommend([]) is None


def test_the_limit_is_the_stage_that_was_waited_for_unless_nothing_was() -> None:
    assert measured(0, 0, 0.5).limit == "transform"
    assert measured(0, 0, 0.99).limit == ""


def test_settings_are_few_and_workers_bounded() -> None:
    assert settings_of(0) == [Setting(0, depth) for depth in (0, 1, 2, 4)]
    assert [one.workers for one in settings_of(4)][4:] == [1, 2, 3, 4]


@pytest.mark.slow
def test_prefetch_hides_work_behind_a_step(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": np.arange(512)}), tmp_path / "a.parquet", row_group_size=64)

    def slow(samples: object, positions: range) -> int:
        import time

        time.sleep(0.004)
        return len(positions)

    def open_batches(setting: Setting) -> Loader[int]:
        reader = ParquetReader(tmp_path)
        return Loader(reader, 8, 0, collate=slow, prefetch=setting.prefetch)

    # Three times in turns: the machine may be busy with something else for a while.
    settings = [Setting(0, 0), Setting(0, 2)] * 3
    found = sweep(open_batches, settings, 8, step_s=0.006, seconds=0.2)
    inline, ahead = found[::2], found[1::2]
    assert max(one.busy for one in inline) < 0.7  # 6 of at least 10 ms
    assert sum(one.busy for one in ahead) > sum(one.busy for one in inline)
    assert all(one.first_batch_s > 0 for one in found)
    assert all(one.waited_s["collate"] > 0.6 * sum(one.waited_s.values()) for one in inline)


@pytest.mark.parametrize("rows", [7, 64, 10_000])
def test_parquet_written_again_holds_the_same_rows(rows: int, tmp_path: Path) -> None:
    source, copy = made_up(tmp_path, 300), tmp_path / "copy"
    copy.mkdir()
    reader = ParquetReader(source)
    again = resized(reader, copy, rows)
    assert again.rows_of_shards.max() == min(rows, 300)  # type: ignore[attr-defined]
    order = np.random.default_rng(0).permutation(300)
    assert again.take(order).values == reader.take(order).values
    with Loader(again, 10, 0, collate=Collate(), prefetch=0) as loader:
        assert next(loader)["tokens"].shape == (10, 64)


def test_shards_written_again_hold_the_same_rows(shards: Path, tmp_path: Path) -> None:
    with ShardReader(shards) as reader:
        again = resized(reader, tmp_path, 11)
        assert set(again.rows_of_shards[:-1].tolist()) == {11}  # type: ignore[attr-defined]
        assert again.num_rows == reader.num_rows
        rows = np.arange(again.num_rows)
        assert np.array_equal(again.take(rows).tokens, reader.take(rows).tokens)
        assert np.array_equal(again.take(rows).starts, reader.take(rows).starts)
        again.close()


def test_other_formats_are_not_written_again(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="MdsReader"):
        resized(MdsReader(Path(__file__).parent / "golden" / "mds-plain"), tmp_path, 4)


def test_the_page_shows_all_that_was_measured() -> None:
    found = [measured(0, 0, 0.5), measured(0, 2, 0.8), measured(1, 2, 0.99)]
    html = page("Loader: <b>", found, [], "take one worker")
    assert "Loader: &lt;b&gt;" in html
    assert html.count("<svg") >= 2
    assert "take one worker" in html
    assert "workers=1 prefetch=2" in html
    assert html == page("Loader: <b>", found, [], "take one worker")
