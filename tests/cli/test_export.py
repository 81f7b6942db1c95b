"""`marrow export` to a bucket: the shards that arrive are streamed by a loader, row for row."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from marrow.cli.export import command
from marrow.core.errors import UsageError
from marrow.loader.loader import Loader
from marrow.loader.streaming.cache import Cache
from marrow.store.remote.client import Remote
from marrow.store.store import Store


@pytest.fixture
def named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of the shards of a finished run."""
    monkeypatch.setenv("MARROW_HOME", str(finished))
    with Store.open(finished) as store:
        return next(artifact.id for artifact in store.catalog.latest() if artifact.kind == "shards")


def test_shards_exported_to_a_bucket_are_streamed_by_the_loader(
    named: str, bucket: str, tmp_path: Path
) -> None:
    url = f"{bucket}/data/first"
    runner = CliRunner()
    done = runner.invoke(command, [named, url], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.splitlines() == [url]
    assert "0 were there already" in done.stderr
    again = runner.invoke(command, [named, url], catch_exceptions=False)
    assert "0 files sent" in again.stderr
    runner.invoke(command, [named, str(tmp_path / "local")], catch_exceptions=False)
    with Remote.open(url) as remote:
        names = [file.name for file in remote.list()]
    assert names == sorted(path.name for path in (tmp_path / "local").iterdir())
    cache = Cache(tmp_path / "cache", 1 << 30)
    with (
        Loader(url, 8, 0, cache=cache, stop=64) as streamed,
        Loader(tmp_path / "local", 8, 0, stop=64) as local,
    ):
        for a, b in zip(streamed, local, strict=True):
            assert np.array_equal(a.tokens_N.numpy(), b.tokens_N.numpy())
            assert a.samples == b.samples
        counted = streamed.counters()["shards"]
        assert counted["misses"] >= 1 and counted["evicted"] == counted["damaged"] == 0
        assert "shards" not in local.counters()


def test_a_folder_that_has_files_is_left_alone(named: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        CliRunner().invoke(command, [named, str(tmp_path)], catch_exceptions=False)
