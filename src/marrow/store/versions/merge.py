"""Three-way merge of manifests: pure functions over names and hashes; no file is read.

For each name the merge looks at three hashes: base, ours, theirs. Who changed it wins; if both
did, and not to the same, it is a conflict, to be decided by `take`. To delete is to change.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from marrow.core.errors import MergeConflict
from marrow.store.datasets.manifests import Entry, printable

Side = Literal["ours", "theirs"]
Parents = Callable[[str], list[str]]

SHOWN = 10  # conflicts that the message lists


def merge_entries(
    base: Iterable[Entry],
    ours: Iterable[Entry],
    theirs: Iterable[Entry],
    take: Side | None = None,
    names: tuple[str, str] = ("ours", "theirs"),
) -> tuple[list[Entry], list[str]]:
    """Merge two versions that come from a third.

    Args: names: of the two branches, for the message.
    Returns: the merged files, sorted by name; the names of conflicts that `take` decided.
    Raises: MergeConflict, naming them, if there are any and `take` is None.
    """
    before, mine, other = ({entry.name: entry for entry in side} for side in (base, ours, theirs))
    merged: list[Entry] = []
    conflicts: list[str] = []
    for name in sorted(mine.keys() | other.keys()):
        was, own, new = before.get(name), mine.get(name), other.get(name)
        if own == new or new == was:
            kept = own
        elif own == was:
            kept = new
        else:
            conflicts.append(name)
            kept = new if take == "theirs" else own
        if kept is not None:
            merged.append(kept)
    conflicts += _file_and_folder(merged)
    if conflicts and (take is None or _file_and_folder(merged)):
        listed = "".join(
            f"\n  {printable(name)}: {_what(before, mine, name)} in {names[0]}, "
            f"{_what(before, other, name)} in {names[1]}"
            for name in conflicts[:SHOWN]
        )
        more = f"\n  and {len(conflicts) - SHOWN:,} more" if len(conflicts) > SHOWN else ""
        raise MergeConflict(
            f"{len(conflicts):,} file{'s' * (len(conflicts) > 1)} changed in both {names[0]} and {names[1]}:"
            f"{listed}{more}",
            hint=f"--take ours keeps those of {names[0]}, --take theirs those of {names[1]}",
        )
    return merged, conflicts


def is_ancestor(old: str, new: str, parents: Parents) -> bool:
    """Tell whether a version is another one or one of those that it was made from."""
    return old in ancestors(new, parents)


def common_ancestor(one: str, other: str, parents: Parents) -> str | None:
    """Return the version that two branches share last; None if they share none.

    Where they share several last ones (branches that were merged both ways) the one with most
    ancestors is taken, and of equals the smaller id: the same on every machine.
    """
    shared = ancestors(one, parents) & ancestors(other, parents)
    if not shared:
        return None
    return min(shared, key=lambda i: (-len(ancestors(i, parents)), i))


def ancestors(start: str, parents: Parents) -> set[str]:
    """Return a version and all that it was made from."""
    found = {start}
    waiting = [start]
    while waiting:
        for parent in parents(waiting.pop()):
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def _file_and_folder(merged: list[Entry]) -> list[str]:
    """Return names that would have to be a file and a folder at once."""
    names = {entry.name for entry in merged}
    clashes = set()
    for name in names:
        head = name
        while "/" in head:
            head = head.rpartition("/")[0]
            if head in names:
                clashes.add(head)
    return sorted(clashes)


def _what(before: dict[str, Entry], after: dict[str, Entry], name: str) -> str:
    if name not in after:
        return "deleted" if name in before else "not there"
    return "changed" if name in before else "added"
