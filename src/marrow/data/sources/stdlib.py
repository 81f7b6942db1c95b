"""The documentation that every Python brings: its standard library, read and never run.

One row per module (its whole source), per class, function and method (signature and docstring,
no source, so that every source byte is in the data once), and per topic of `help()`. Everything
is read with `ast`; nothing is imported or executed. Tests, installed packages and files that the
build of the interpreter wrote are left out. The order is that of the file names, then of lines,
so that one interpreter always gives the same rows.

`pydoc_data/topics.py` is a dict literal: its entries are the topics, and the file itself is no
module row, or its bytes would be in twice.
"""

import ast
import hashlib
import io
import os
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from marrow.core.errors import SourceError

LICENSE = "PSF-2.0"
TOPICS = "pydoc_data/topics.py"
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)
MIN_MODULES = 20  # a minimal Debian python3 has 50, a zipped one none
_SPREAD = ast.If | ast.Try | ast.TryStar | ast.With | ast.For | ast.While

DESCRIPTIONS = {
    "module": "dotted name of the module; empty for a topic",
    "qualified_name": "dotted name of the thing, module included; for a topic topics.<name>",
    "kind": "module, class, function or topic",
    "signature": "class bases or parameters and return type as written; null for module and topic",
    "doc": "docstring, indentation removed; null where there is none",
    "source": "full text of a module or topic; null for class and function, which lie in their module's",
    "license": "SPDX identifier",
    "source_hash": "SHA-256 of the bytes of the file that the row comes from",
    "file": "path below the standard library's folder",
    "line": "line of the file at which it begins, from 1",
}
SCHEMA = pa.schema(
    [
        pa.field(name, pa.int64() if name == "line" else pa.string(), metadata={"description": text})
        for name, text in DESCRIPTIONS.items()
    ]
)


@dataclass(frozen=True, slots=True)
class StdlibRow:
    """One row of the documentation; the fields are the columns of SCHEMA."""

    module: str
    qualified_name: str
    kind: str
    signature: str | None
    doc: str | None
    source: str | None
    license: str
    source_hash: str
    file: str
    line: int


def stdlib_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    # Not from sysconfig, which imports the build's variables to know it.
    return Path(getattr(os, "__file__", None) or sys.executable).parent


def stdlib_files(folder: Path | None = None) -> list[Path]:
    """List the standard library's source files in the order of their names.

    Raises: SourceError where the interpreter brings no sources.
    """
    root = folder or stdlib_folder()
    files = [
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]) and not _is_built(path, root)
    ]
    if len(files) < MIN_MODULES:
        raise SourceError(
            f"this Python brings no standard library in source form: {len(files)} .py files in {root}",
            hint="use a Python that has it (python.org, pyenv; on Debian: apt install python3 idlelib), "
            "or give your own rows with --set data.source=FOLDER",
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_stdlib(path: Path, folder: Path) -> Iterator[StdlibRow]:
    """Yield the rows of one file of the standard library.

    A file that does not parse still gives its module row.
    Raises: SourceError if the bytes are not the text that they claim to be.
    """
    data = path.read_bytes()
    name = path.relative_to(folder).as_posix()
    digest = hashlib.sha256(data).hexdigest()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is no Python text: {error}", hint="reinstall this Python") from error
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        tree = None
    if name == TOPICS and tree is not None:
        yield from _topics(tree, name, digest)
        return
    module = _module_name(name)
    doc = ast.get_docstring(tree) if tree is not None else None
    yield StdlibRow(module, module, "module", None, doc, text, LICENSE, digest, name, 1)
    if tree is not None:
        for qualified, kind, node in _definitions(tree.body, module):
            signature, doc = _signature(node), ast.get_docstring(node)
            yield StdlibRow(module, qualified, kind, signature, doc, None, LICENSE, digest, name, node.lineno)


def group_of(module: str, qualified_name: str) -> str:
    """Name the split group: the top-level package, private twins (`_pyio`) with theirs.

    Each topic is a group of its own: they are separate texts of a few kilobytes.
    """
    if not module:
        return qualified_name
    return module.partition(".")[0].removeprefix("_py").strip("_")


def _is_built(path: Path, root: Path) -> bool:
    """Tell whether the interpreter's build wrote the file: it holds paths of the building machine."""
    top = path.relative_to(root).parts[0]
    return top.startswith(("_sysconfigdata", "_sysconfig_vars", "config-"))


def _module_name(name: str) -> str:
    parts = name.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str, _Definition]]:
    """Yield (qualified name, kind, node) for what a module or class defines, not for locals."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield f"{prefix}.{node.name}", "class", node
            yield from _definitions(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", "function", node
        elif isinstance(node, _SPREAD):
            for part in ("body", "handlers", "orelse", "finalbody"):
                for child in getattr(node, part, []):
                    inner = child.body if isinstance(child, ast.ExceptHandler) else [child]
                    yield from _definitions(inner, prefix)


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(ast.unparse(base) for base in [*node.bases, *node.keywords])})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"({ast.unparse(node.args)}){returns}"


def _topics(tree: ast.Module, name: str, digest: str) -> Iterator[StdlibRow]:
    """Yield the entries of the one dict literal of the topics file, in the order of their names."""
    rows = []
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for key, value in zip(statement.value.keys, statement.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    text, qualified = str(value.value), f"topics.{key.value!s}"
                    rows.append(
                        StdlibRow("", qualified, "topic", None, None, text, LICENSE, digest, name, key.lineno)
                    )
    yield from sorted(rows, key=lambda row: row.qualified_name)
