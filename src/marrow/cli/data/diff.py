"""`marrow data diff`: which files and which of their rows changed between two versions."""

from collections.abc import Callable
from typing import Any

import click

from marrow.cli import console
from marrow.cli.data.versions import SHOWN, change_data, change_line, echo_json, open_versions
from marrow.core.errors import DataError, SourceError
from marrow.data.diff_tables import can_compare
from marrow.store.datasets.manifests import Change
from marrow.store.versions.versions import Versions

MAX_FILES = 100  # whose rows are compared unless --all is given


@click.command("diff")
@click.argument("old")
@click.argument("new")
@click.option("--files", "files_only", is_flag=True, help="Only files: no row is read.")
@click.option("--key", multiple=True, help="Column that names a row; then rows count as changed. Repeatable.")
@click.option("--all", "all_files", is_flag=True, help=f"Compare rows of more than {MAX_FILES} files.")
@click.option("--json", "as_json", is_flag=True, help="Print the changes as JSON.")
def diff(old: str, new: str, files_only: bool, key: tuple[str, ...], all_files: bool, as_json: bool) -> None:
    """Show what changed from version OLD to NEW.

    Letters: A added, D deleted, M modified, R renamed. For modified files that hold rows it says
    how many were added, removed and (with --key) changed, and shows the first of them.
    """
    with open_versions(reading=True) as versions, console.progress_of("diff") as progress:
        changes = versions.diff(old, new)
        compared = [c for c in changes if c.letter == "M" and can_compare(c.name)]
        wanted = compared if all_files else compared[:MAX_FILES]
        rows: dict[str, Any] = {}
        if not files_only:
            for done, change in enumerate(wanted):
                progress(done, len(wanted), "files")
                rows[change.name] = _compare(versions, change, key)
    if as_json:
        echo_json(
            {
                "old": old,
                "new": new,
                "changes": [change_data(c) | {"rows": _plain(rows.get(c.name))} for c in changes],
            }
        )
        return
    for change in changes:
        click.echo(change_line(change))
        if change.name in rows:
            _tell(rows[change.name], click.echo)
    letters = [change.letter for change in changes]
    said = ", ".join(
        f"{letters.count(letter):,} {word}"
        for letter, word in {"A": "added", "D": "deleted", "M": "modified", "R": "renamed"}.items()
        if letter in letters
    )
    console.say(f"{old} -> {new}: {said or 'no file changed'}")
    if len(compared) > len(wanted) and not files_only:
        console.say(f"hint: rows of {len(wanted)} of {len(compared):,} files were compared; --all takes all")


def _compare(versions: Versions, change: Change, key: tuple[str, ...]) -> Any:
    from marrow.data.diff import diff_rows  # numpy and Arrow's kernels

    assert change.old is not None and change.new is not None
    with versions.as_files(change.old, change.new) as (before, after):
        try:
            return diff_rows(before, after, key=key)
        except (DataError, SourceError) as error:
            return error


def _plain(found: Any) -> Any:
    if found is None:
        return None
    return {"error": found.message} if isinstance(found, DataError | SourceError) else found.as_dict()


def _tell(found: Any, echo: Callable[[str], None]) -> None:
    if isinstance(found, DataError | SourceError):
        echo(f"     rows not compared: {found.message}")
        return
    echo(f"     {found.told()}")
    for mark, samples in (("-", found.samples_removed), ("+", found.samples_added)):
        for row in samples[:SHOWN]:
            echo(f"     {mark} {_row(row)}")
    for before, after in found.samples_changed[:SHOWN]:
        echo(f"     ~ {_row(before)}")
        echo(f"       {_row({name: v for name, v in after.items() if before.get(name) != v})}")


def _row(row: dict[str, str]) -> str:
    text = "  ".join(f"{name}={value}" for name, value in row.items())
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= 160 else f"{text[:159]}…"
