"""Bad input and a hostile machine: a clear error with a hint, the right status, nothing half done."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from marrow_process import Marrow, command, environment, write_csv

from marrow.store.store import Store

pytestmark = pytest.mark.slow


def refusal(told: "subprocess.CompletedProcess[str]") -> tuple[int, str]:
    """Give the status and the words of a command that refused in the form that every refusal has."""
    assert told.stdout == ""
    assert "error:" in told.stderr
    assert "hint:" in told.stderr
    assert "Traceback" not in told.stderr
    return told.returncode, told.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.stepz=3", "did you mean 'steps'?"),
        ("train.checkpoint_every=3 parsecs", "train.checkpoint_every"),
        ("train.steps=many", "train.steps"),
        ("data.format=cvs", "did you mean 'csv'?"),
    ],
)
def test_a_wrong_recipe_ends_with_status_2(setting: str, said: str, marrow: Marrow, tiny: Path) -> None:
    status, words = refusal(marrow("run", tiny, "--set", setting))
    assert status == 2
    assert said in words


def test_a_missing_recipe_names_one_that_is_there(marrow: Marrow, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("", encoding="utf-8")
    status, words = refusal(marrow("run", "mien.toml"))
    assert status == 2
    assert "mine.toml" in words


def test_a_missing_source_is_an_error(marrow: Marrow, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    status, words = refusal(marrow("run", tiny, "--set", "data.source=nots"))
    assert status == 1
    assert "nots" in words
    assert "notes" in words


def test_an_empty_source_is_an_error(marrow: Marrow, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, words = refusal(marrow("run", tiny, "--set", "data.source=empty"))
    assert status == 1
    assert "empty" in words
    (tmp_path / "empty.csv").write_bytes(b"")
    status, words = refusal(marrow("run", tiny, "--set", "data.source=empty.csv"))
    assert status == 1
    assert "empty" in words


def test_too_few_rows_for_a_heldout_part_is_an_error(marrow: Marrow, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text\na single row of text that is long enough\n", encoding="utf-8")
    status, _ = refusal(marrow("run", tiny, "--set", "data.source=one.csv"))
    assert status == 1


def test_a_broken_csv_row_is_counted_and_the_run_goes_on(marrow: Marrow, tiny: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "notes.csv", 400)
    with (tmp_path / "notes.csv").open("a", encoding="utf-8") as file:
        file.write("one,two,three,four fields where two are declared\n")
    told = marrow("run", tiny, "--set", "data.source=notes.csv")
    assert told.returncode == 0, told.stderr
    with Store.open(tmp_path / "home") as store:
        rows = store.catalog.latest(kind="ingest")[0]
        assert rows.facts["broken_rows"] == 1
        assert rows.facts["rows"] == 400
        quarantine = (store.view(rows) / "quarantine.jsonl").read_text(encoding="utf-8")
        assert '"line": 402' in quarantine


def test_a_port_in_use_is_an_error(marrow: Marrow, finished: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, words = refusal(marrow("serve", "tiny", "--port", port, home=finished))
        assert status == 1
        assert port in words


def test_a_full_disk_is_an_error_and_leaves_only_whole_artifacts(
    small_disk: Callable[[str], Path], marrow: Marrow, tiny: Path, csv_source: Path
) -> None:
    home = small_disk("3m") / "home"
    arguments = ["run", tiny, "--set", f"data.source={csv_source}", "--set", "model.hidden_size=256"]
    status, words = refusal(marrow(*arguments, home=home))
    assert status == 1
    assert "no space left" in words
    assert "MARROW_HOME" in words
    with Store.open(home) as store:
        found = store.catalog.latest()
        assert found, "the first steps fit"
        for artifact in found:
            assert not store.verify(artifact)


def test_a_store_that_cannot_be_written_is_an_error(
    marrow: Marrow, tiny: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if os.getuid():
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    else:  # root may write anywhere but on a file system that is mounted read-only
        folder = request.getfixturevalue("small_disk")("3m")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    status, words = refusal(marrow("run", tiny, home=folder / "home"))
    assert status == 1
    assert "no permission" in words
    assert "MARROW_HOME" in words


@pytest.mark.parametrize("verb", ["lineage", "why", "complete", "chat", "serve"])
def test_verbs_that_read_make_no_store(verb: str, marrow: Marrow, tmp_path: Path) -> None:
    status, words = refusal(marrow(verb, "quickstart"))
    assert status == 1
    assert "no store" in words
    assert "run a recipe first" in words
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_failure(finished: Path) -> None:
    shell = f"set -o pipefail; {' '.join(command('lineage', 'tiny', '--json'))} | true"
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, env=environment(finished), check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_context_longer_than_the_model_is_refused_before_any_step(marrow: Marrow, tiny: Path) -> None:
    status, words = refusal(marrow("run", tiny, "--set", "shards.context=128"))
    assert status == 2
    assert "max_positions = 64" in words
    assert "tiny.toml:" in words


def test_a_prompt_that_is_not_utf8_is_refused(finished: Path) -> None:
    done = subprocess.run(
        command("complete", "tiny"),
        input=b"\xff\xfe\xfa",
        capture_output=True,
        env=environment(finished),
        check=False,
    )
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr
