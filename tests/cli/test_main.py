"""The command itself: fast to start, and its errors say what to do."""

import resource
import statistics
import subprocess
import sys

import pytest
from click.testing import CliRunner

from marrow.cli.main import VERBS, cli, run
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
