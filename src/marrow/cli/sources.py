"""Which source files a step depends on: the modules it imports, and what those import.

A cached step is right only as long as the code that made it is the same code. The closure of
imports says which code that is, without anyone keeping a list. `marrow.core` is left out, since it
carries results and talks about them but makes none; all but its pages, which are what a report is.
"""

import ast
import re
from functools import cache
from pathlib import Path

import marrow

PACKAGE = Path(marrow.__file__).parent
PAGES = {"marrow.core.page", "marrow.core.charts", "marrow.core.graph"}


def source_files(*modules: str) -> tuple[Path, ...]:
    """Return the source files of the modules and of all `marrow` modules they import, sorted.

    Args: modules: names such as "marrow.data.ingest".
    Cost: parses each file once a process, about 1 ms a file.
    """
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports_of(module)
    paths = {file_of(module) for module in found}
    native = {c_file for path in paths if path for c_file in c_files(path)}
    return tuple(sorted({path for path in paths if path} | native))


@cache
def c_files(path: Path) -> tuple[Path, ...]:
    """Return the C file of a module (the same name in `csrc`, beside it or above) and its headers."""
    found = [folder / "csrc" / f"{path.stem}.c" for folder in (path.parent, path.parent.parent)]
    sources = [c_file for c_file in found if c_file.is_file()]
    for source in sources:
        for name in re.findall(r'^#include "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE):
            if (header := source.parent / name) not in sources:
                sources.append(header)
    return tuple(sources)


@cache
def imports_of(module: str) -> tuple[str, ...]:
    """Return the `marrow` modules that one module imports anywhere in its text, core left out."""
    path = file_of(module)
    if path is None:
        return ()
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(sorted(name for name in names if _counts(name) and file_of(name)))


def _counts(name: str) -> bool:
    return name in PAGES or (name.startswith("marrow.") and not name.startswith("marrow.core"))


def file_of(module: str) -> Path | None:
    """Return the file of a `marrow` module, None for what is no module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    init = path / "__init__.py"
    return init if module != "marrow" and init.is_file() else None
