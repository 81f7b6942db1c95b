"""Which files a source means, and what format each has.

A source is a file, a folder (searched to its bottom, hidden names aside) or a glob, on this machine,
at s3:// or http(s):// (`remote_sources.py`), or a dataset in the Hugging Face layout (`hub.py`). A
file's format is known by its name; `.gz` or `.zst` may follow. In a folder, files of no known format
are skipped and counted; a file that is named itself must be known or given a format. Nothing here
reads rows.
"""

import glob
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from marrow.core.errors import SourceError, explain_os_errors
from marrow.core.hashes import hash_value
from marrow.data.config import PYTHON, DataRecipe
from marrow.data.sources.file import HUB, KNOWN, FileList
from marrow.data.sources.file import SourceFile as SourceFile
from marrow.data.sources.hub import find_in_hub, select_files
from marrow.data.sources.remote import find_remote
from marrow.data.sources.stdlib import stdlib_files, stdlib_folder


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a source, in the order of their names, and what was passed over by suffix."""

    files: FileList
    skipped: dict[str, int]


def find_sources(recipe: DataRecipe) -> Found:
    """List the files that a recipe's source means.

    Raises: SourceError if there is none, or none with bytes in it; NotPermitted; Unreachable.
    """
    return find_files(recipe.source, recipe.format, recipe.encoding, recipe.subset, recipe.splits)


def find_files(
    source: str, format: str = "auto", encoding: str = "auto", subset: str = "", splits: tuple[str, ...] = ()
) -> Found:
    """List the files of a source. Raises: as `find_sources`."""
    if source.startswith(HUB):
        return found(source, find_in_hub(source, format, encoding, subset, splits))
    if "://" in source:
        return found(source, find_remote(source, format, encoding))
    path = Path(source).expanduser()
    with explain_os_errors("read the source", path):
        if path.is_dir():
            base, names = str(path), _walk(str(path))
            card = path / "README.md"
            if subset or splits or card.is_file():
                text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
                names = select_files(names, text, source, subset, splits)
        elif subset or splits:
            raise SourceError(
                f"data.subset and data.splits need a folder; data.source is {source}",
                hint="give the dataset's folder, or leave them out",
            )
        elif path.exists():
            base, names = str(path.parent), [path.name]
        elif glob.has_magic(source):
            folder = _glob_base(path)
            paths = (p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            base, names = str(folder), sorted((os.path.relpath(p, folder) for p in paths), key=_order)
        else:
            raise SourceError(f"data.source: no file or folder at {source}", hint=_nearby(path))
        base = "" if base == "." else base if base.endswith("/") else base + "/"
        return found(
            source,
            FileList(
                ((name, *_stat(base + name)) for name in names), base=base, format=format, encoding=encoding
            ),
        )


def found(source: str, files: FileList) -> Found:
    """Check that there is something to read."""
    if not files:
        raise _no_files(source, files.skipped)
    if not files.num_bytes:
        raise SourceError(
            f"data.source: {source} is empty: {len(files)} file{'s' * (len(files) > 1)} of 0 bytes",
            hint="check how the file was written",
        )
    return Found(files, dict(sorted(files.skipped.items())))


def fingerprint(recipe: DataRecipe) -> str:
    """Return a hash that changes when the files of the source do: the outside part of ingest's key.

    Names, sizes and times of change (etags of files elsewhere) are hashed, not contents, so that it
    costs no reading. Times are only compared, so that a clock that is wrong does no harm.
    Raises: as `find_sources`.
    """
    if recipe.source == PYTHON:
        root = stdlib_folder()
        stats = [(p.relative_to(root).as_posix(), p.stat()) for p in stdlib_files(root)]
        return hash_value([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    return hash_value([[f.name, f.format, f.num_bytes, f.version] for f in find_sources(recipe).files])


def _walk(folder: str) -> list[str]:
    """Return the names of all files below a folder, hidden ones aside."""
    names: list[str] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{below}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name + "/")
                elif entry.is_file():
                    names.append(name)
    return sorted(names, key=_order)


def _order(name: str) -> str:
    """Sort a folder's files together, as paths do."""
    return name.replace("/", "\0")


def _stat(path: str) -> tuple[int, str]:
    with explain_os_errors("read the source", path):
        stat = os.stat(path)
    return stat.st_size, str(stat.st_mtime_ns)


def _glob_base(path: Path) -> Path:
    """Return the part of a glob before its first magic name."""
    plain: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        plain.append(part)
    return Path(*plain) if plain else Path()


def _nearby(path: Path) -> str:
    import difflib  # only on the way to an error

    parent = path.parent
    looked = f"looked in {parent.resolve()}"
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {parent / close[0]}?"
    return f'{looked}; give "python", a file, a folder or a glob such as "data/*.csv"'


def _no_files(source: str, skipped: Counter[str]) -> SourceError:
    if skipped:
        seen = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
        return SourceError(
            f"data.source: no file of a known format in {source} (there: {seen})",
            hint=f"known: {KNOWN}; or set data.format",
        )
    what = "is an empty folder" if Path(source).expanduser().is_dir() else "matches no file"
    return SourceError(f"data.source: {source} {what}", hint=f"looked for {KNOWN}")
