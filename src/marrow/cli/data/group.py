"""`marrow data`: versions of datasets, their quality, SQL on them. Verbs are imported when used."""

import click

from marrow.cli.verbs import Verbs

VERBS = {  # verb: (module, what it does)
    "commit": ("marrow.cli.data.versions:commit", "Make a folder the next version of a dataset."),
    "log": ("marrow.cli.data.versions:log", "List the versions of a dataset, newest first."),
    "show": ("marrow.cli.data.versions:show", "Show one version: what it is, and its files."),
    "status": ("marrow.cli.data.versions:status", "Show how a folder differs from a version."),
    "diff": ("marrow.cli.data.diff:diff", "Show what changed between two versions, files and rows."),
    "branch": ("marrow.cli.data.versions:branch", "Begin a branch, list them, or remove one."),
    "tag": ("marrow.cli.data.versions:tag", "Give a version a name that never moves."),
    "merge": ("marrow.cli.data.merge:merge", "Bring a branch's changes into another, past a quality gate."),
    "checkout": ("marrow.cli.data.versions:checkout", "Write a version's files to a folder of yours."),
    "push": ("marrow.cli.data.transfer:push", "Bring a dataset to a URL or folder."),
    "pull": ("marrow.cli.data.transfer:pull", "Bring a dataset from a URL or folder; mend what is damaged."),
    "verify": ("marrow.cli.data.transfer:verify", "Hash every stored byte anew; set aside what is damaged."),
    "gc": ("marrow.cli.data.transfer:gc", "Remove stored bytes that nothing needs any more."),
    "profile": ("marrow.cli.data.profile:profile", "Describe the columns of a dataset, as a page or JSON."),
    "drift": ("marrow.cli.data.profile:drift", "Show how the rows of two versions differ in distribution."),
    "sql": ("marrow.cli.data.sql:sql", "Ask a dataset with SQL (DuckDB)."),
}


@click.group("data", cls=Verbs, table=VERBS)
def command() -> None:
    """Keep, compare and check datasets.

    A version is named reviews (the newest), reviews@2 (the second), reviews~1 (the one before the
    newest), by a tag, or by the first digits of its id.
    """
