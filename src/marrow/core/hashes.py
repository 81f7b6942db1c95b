"""Hashes and ids.

SHA-256 names things (blobs, artifacts, recipes); xxh3 only checks that bytes are still the
same bytes, at memory speed. What is hashed as a value is first written as canonical JSON, so
that equal values have equal hashes in every process and on every machine.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """Write a value as JSON with sorted keys and no spaces.

    Args: value: dataclasses, mappings with string keys, sequences, sets of items that have an
        order, paths and JSON scalars, nested at will.
    Raises: TypeError for anything else, since its text might differ between processes, or be the
        text of another value too; ValueError for NaN and infinities.
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _plain(value: Any) -> Any:
    """Turn a value into one that `json` writes in one way only."""
    if value is None or isinstance(value, str | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):  # json would write 1 and "1" alike
                raise TypeError(f"keys must be strings, {key!r} is a {type(key).__name__}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no canonical text")


def hash_value(value: Any) -> str:
    """Return the SHA-256 (64 hex digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 (64 hex digits) of some bytes."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 (64 hex digits) of a file. Cost: one read, 1 MiB of memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path) -> str:
    """Return the xxh3-128 (32 hex digits) of a file: a check, never a name."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def hash_sources(paths: Iterable[Path]) -> str:
    """Return one SHA-256 over files' names and contents, the same in every checkout.

    Folders stand for the source files (`*.py`, `*.c`, `*.h`, `*.html`) in them, each under its
    path within the folder; a file that is given itself has the name of its folder before its own.
    """
    files: set[tuple[str, Path]] = set()
    for path in paths:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix in {".py", ".c", ".h", ".html"})
            files.update((p.relative_to(path).as_posix(), p) for p in found)
        else:
            files.add((f"{path.parent.name}/{path.name}", path))
    return hash_value(sorted([name, hash_file(path)] for name, path in files))
