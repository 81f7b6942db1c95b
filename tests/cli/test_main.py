"""The command itself: fast to start, and its errors say what to do."""

import errno
import os
import resource
import statistics
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from marrow import __version__
from marrow.cli.main import VERBS, cli, run
from marrow.core.errors import ArtifactNotFound, Interrupted, UsageError
from marrow.store.store import Store

HELP = [sys.executable, "-m", "marrow", "--help"]


def cpu_s(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # in microseconds; os.times counts in 10 ms
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_at_most_six_bare_pythons() -> None:
    bare, ours = [], []
    for _ in range(15):  # interleaved, so that a busy moment of the machine meets both
        bare.append(cpu_s([sys.executable, "-c", "pass"]))
        ours.append(cpu_s(HELP))
    assert statistics.median(ours) <= 6 * statistics.median(bare)


def test_help_loads_neither_torch_nor_rich() -> None:
    code = (
        "import sys\nfrom marrow.cli.main import run\nstatus = run(['--help'])\n"
        "heavy = {'torch', 'rich', 'pyarrow', 'numpy', 'sqlalchemy', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(status or ','.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_the_table_tells_the_truth(verb: str) -> None:
    shown = CliRunner().invoke(cli, [verb, "--help"])
    assert shown.exit_code == 0, shown.output
    assert "Usage: marrow" in shown.output or "Usage: cli" in shown.output
    assert VERBS[verb][1].endswith(".")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "x.toml", "--sett", "a=b"], "--set"),
        (["serve", "x", "--port", "99999"], "65535"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""


def test_an_unknown_target_is_an_error_with_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("MARROW_HOME", f"{tmp_path}/home")
    Store.open().close()
    assert run(["lineage", "nothing-here"]) == 1
    told = capsys.readouterr().err
    assert "nothing-here" in told
    assert "hint:" in told
    assert "Traceback" not in told


def test_a_bug_of_ours_is_no_traceback_without_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VERBS, "doctor", ("marrow.cli.no_such_module", "Broken on purpose."))
    assert run(["doctor"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        run(["--debug", "doctor"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/locked/file"), "no permission at /locked/file"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), "no space left at /full/file"),
    ],
)
def test_a_machine_that_says_no_is_no_bug_of_ours(
    error: OSError, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Store, "open", refuse)
    assert run(["lineage", "x"]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "hint: " in told
    assert "bug" not in told


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\nhint: finished work is kept"),
        (Interrupted("at step 7"), 130, "interrupted: at step 7"),
        (click.Abort(), 130, "interrupted\n"),
        (
            ArtifactNotFound("no such thing", hint="look elsewhere"),
            1,
            "error: no such thing\nhint: look elsewhere",
        ),
        (UsageError("asked wrongly", hint="ask rightly"), 2, "error: asked wrongly\nhint: ask rightly"),
        (ZeroDivisionError("a bug"), 1, "error: ZeroDivisionError: a bug\nhint: this is a bug in Marrow"),
        (OSError(errno.EIO, "Input/output error", "/broken"), 1, "hint: this is a bug in Marrow"),
        (click.UsageError("no such option"), 2, "no such option"),
        (click.exceptions.Exit(3), 3, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_end_has_its_status_and_its_words(
    error: BaseException,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Store, "open", fail)
    assert run(["lineage", "x"]) == status
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""
    assert "Traceback" not in told.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ArtifactNotFound("x"), ZeroDivisionError()])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_where_it_came_from_wherever_it_is_written(
    error: BaseException, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Store, "open", fail)
    arguments = ["lineage", "x"]
    arguments.insert(place, "--debug")
    with pytest.raises(type(error)):
        run(arguments)


def test_a_stop_that_was_asked_for_is_no_bug_with_debug_either(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Interrupted("at step 7")

    monkeypatch.setattr(Store, "open", fail)
    assert run(["--debug", "lineage", "x"]) == 130
    assert "interrupted: at step 7" in capsys.readouterr().err


def test_a_reader_of_stdout_that_has_gone_ends_it_quietly() -> None:
    """The pipe is closed before anything is written: no status, no words, no complaint at exit."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*HELP], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"marrow, version {__version__}\n"
