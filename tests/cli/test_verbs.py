"""Verbs in a table: help lists them in order and imports none; a call imports just the one."""

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from marrow.cli.verbs import Verbs

MODULE = """
import click

@click.command("{name}")
@click.argument("word", default="nothing")
def command(word):
    click.echo(f"{name} says {{word}}")

@click.command("other")
def other():
    click.echo("the other one")
"""


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> click.Group:
    """Four verbs of three modules, one of which is broken."""
    for name in ("verbs_zebra", "verbs_apple"):
        (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "verbs_broken.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    table = {
        "zebra": ("verbs_zebra", "Be striped."),
        "apple": ("verbs_apple", "Be red."),
        "other": ("verbs_apple:other", "Be another."),
        "broken": ("verbs_broken", "Be broken."),
    }
    return Verbs("animals", table=table)


def loaded() -> set[str]:
    return {name for name in sys.modules if name.startswith("verbs_")}


def test_help_lists_all_in_the_tables_order_and_imports_none(group: click.Group) -> None:
    shown = CliRunner().invoke(group, ["--help"])
    assert shown.exit_code == 0
    lines = [line.strip() for line in shown.output.partition("Commands:")[2].splitlines() if line.strip()]
    assert [line.split()[0] for line in lines] == ["zebra", "apple", "other", "broken"]
    assert "Be striped." in shown.output
    assert loaded() == set()


def test_a_call_imports_just_its_module(group: click.Group) -> None:
    shown = CliRunner().invoke(group, ["apple", "hello"])
    assert (shown.exit_code, shown.output) == (0, "verbs_apple says hello\n")
    assert loaded() == {"verbs_apple"}


def test_a_module_may_hold_several(group: click.Group) -> None:
    assert CliRunner().invoke(group, ["other"]).output == "the other one\n"


def test_a_broken_verb_breaks_no_other(group: click.Group) -> None:
    assert CliRunner().invoke(group, ["zebra"]).exit_code == 0
    assert isinstance(CliRunner().invoke(group, ["broken"]).exception, ModuleNotFoundError)


@pytest.mark.parametrize(("typed", "meant"), [("zbera", "zebra"), ("appel", "apple"), ("brokn", "broken")])
def test_a_slip_is_told_what_was_probably_meant(group: click.Group, typed: str, meant: str) -> None:
    shown = CliRunner().invoke(group, [typed])
    assert shown.exit_code == 2
    assert f"No such command '{typed}'. Did you mean '{meant}'?" in shown.output
    assert loaded() == set()


def test_a_word_that_is_like_none_gets_no_suggestion(group: click.Group) -> None:
    shown = CliRunner().invoke(group, ["qqqqqq"])
    assert shown.exit_code == 2
    assert "No such command 'qqqqqq'." in shown.output
    assert "Did you mean" not in shown.output


def test_asking_for_a_verb_that_is_not_in_the_table_gives_none(group: click.Group) -> None:
    with click.Context(group) as context:
        assert group.get_command(context, "elephant") is None
        assert group.list_commands(context) == ["zebra", "apple", "other", "broken"]
