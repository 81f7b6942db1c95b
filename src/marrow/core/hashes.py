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

    Args: value: dataclasses, mappings, sequences, sets, paths and JSON scalars, nested at will.
    Raises: TypeError for anything else, since its text might differ between processes.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), default=plain, ensure_ascii=False, allow_nan=False
    )


def plain(value: Any) -> Any:
    """Turn one value that `json` does not know into one that it does."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
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
    """Return one SHA-256 over files' names and contents, in sorted order of the names.

    Folders stand for the source files (`*.py`, `*.c`, `*.h`, `*.html`) in them.
    """
    files: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files.update(p for p in path.rglob("*") if p.suffix in {".py", ".c", ".h", ".html"})
        else:
            files.add(path)
    return hash_value([[path.name, hash_file(path)] for path in sorted(files)])
