"""A finished miniature run, made once per test process, and a way to call the command line."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from marrow_process import TINY, Marrow, command, environment, write_csv

from marrow.store.lock import FileLock


@pytest.fixture(scope="session")
def csv_source(shared: Path) -> Path:
    """A folder with a CSV file of 400 different rows of text."""
    folder = shared / "cli-source"
    with FileLock(shared / "cli.lock"):
        if not folder.exists():
            folder.mkdir()
            write_csv(folder / "notes.csv", 400)
    return folder


@pytest.fixture
def marrow(tmp_path: Path) -> Marrow:
    """Call `marrow` in a process of its own, with a store in the test's folder."""

    def call(*arguments: str | Path, home: Path | None = None, text: str | None = None) -> Any:
        return subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            input="" if text is None else text,
            env=environment(home or tmp_path / "home"),
            cwd=tmp_path,
            timeout=200,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shared: Path, csv_source: Path) -> Path:
    """The store of a finished run of the miniature recipe; tests that change it take `home`.

    One test process makes it, each has a copy of its own.
    """
    made = shared / "cli-finished"
    with FileLock(shared / "cli.lock"):
        if not made.exists():
            done = subprocess.run(
                command("run", TINY, "--set", f"data.source={csv_source}"),
                capture_output=True,
                text=True,
                env=environment(shared / "cli-making"),
                timeout=200,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            (shared / "cli-making").rename(made)
    home = tmp_path_factory.mktemp("finished") / "home"
    shutil.copytree(made, home, symlinks=True)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run's store."""
    copy = tmp_path / "home"
    shutil.copytree(finished, copy, symlinks=True)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture
def tiny() -> Path:
    """The miniature recipe."""
    return TINY


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models of random weights: `base`, and `chat`, which brings a template too.

    Their context holds 96 tokens.
    """
    from marrow.models import huggingface
    from marrow.models.config import ModelConfig
    from marrow.models.decoder import Decoder
    from marrow.text.chat import CHATML
    from marrow.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("spoken")
    tokenizer = Tokenizer.train([f"the loader reads row {n}; größer\n" for n in range(50)], 340)
    tokenizer.save(folder / "tokenizer.json")
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
        num_kv_heads=1, head_size=8, max_positions=96, initial_std=0.4,
    )  # fmt: skip
    for name in ("base", "chat"):
        huggingface.save(folder / name, Decoder(shape, seed=0), folder)
    (folder / "chat" / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture
def small_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the verbs that talk begin with 1 MiB of cache, a type that is not measured, and malloc as it is.

    To clear 256 MiB takes most of a second; two measurements may differ; malloc's thresholds would stay
    with all tests that follow in this process.
    """
    from marrow.kernels import device
    from marrow.serve import config

    small = partial(config.ServeRecipe, dtype="fp32", kv_memory=1 << 20)
    monkeypatch.setattr(config, "ServeRecipe", small)
    monkeypatch.setattr(device, "raise_malloc_thresholds", lambda: False)
