"""C files compiled at first use: one source file, one shared library, called through ctypes.

    library = load(Path("csrc/gather_rows.c"))      # None where there is no compiler
    library.gather_rows.argtypes = [...]

No build step, no ABI of Python or torch: a function takes pointers and sizes, and ctypes lets go of
Python's lock while it runs. A library is kept in the user's cache under a key of its source, the
compiler, the flags and the CPU, with the SHA-256 of its bytes behind them: a damaged file is made
anew, and so is one that another machine with the same home compiled. Whoever calls has a Python twin
of every function, which is the oracle in tests and serves where nothing can be compiled.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from marrow.core.files import atomic_file
from marrow.core.hashes import hash_value

CACHE_ENVIRONMENT = "MARROW_CACHE"
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-Wall", "-Werror=implicit")
_NATIVE = ("-march=native", "-mprefer-vector-width=512")
_THREADS = ("-fopenmp", "-Wl,--as-needed")  # needed: libgomp is loaded only with files that use it
_TIMEOUT_S = 120.0
_DIGEST_BYTES = 32


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """Return the library of a C file, compiled if need be; None, with one warning, where that fails.

    Cost: about half a second of compilation once a machine; then a millisecond a process.
    """
    compiler = find_compiler()
    if compiler is None:
        _warn_of_missing_compiler()
        return None
    folder = cache_folder()
    library = folder / f"{source.stem}-{_key(source, compiler)}.so"
    if not _is_whole(library):
        try:
            _compile(compiler, source, library)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            warnings.warn(
                f"{source.name} is not compiled: {compiler} failed: {said.strip()[:500]}; "
                "a slower path is used (set CC to another compiler)",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # such as a cache on a file system that is mounted without execution
        warnings.warn(
            f"{source.name} is compiled, but not loaded: {error}; a slower path is used "
            f"(set {CACHE_ENVIRONMENT} to a folder that may hold programs)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def find_compiler() -> str | None:
    """Return the path of $CC, or of the system's C compiler; None if there is none."""
    named = os.environ.get("CC")
    return next(filter(None, map(shutil.which, [named] if named else ["cc", "gcc", "clang"])), None)


@cache
def cache_folder() -> Path:
    """Return where compiled libraries are kept: $MARROW_CACHE, or Marrow's folder in the user's cache.

    Code is loaded from it, so a folder that other users may write to is not used: then, and where
    the home cannot be written, libraries go to a private folder that ends with the process.
    """
    given = os.environ.get(CACHE_ENVIRONMENT)
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "marrow"
    try:
        folder = base.expanduser().absolute() / "native"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        is_ours = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if is_ours and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    private = Path(tempfile.mkdtemp(prefix="marrow-native-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return private


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Compile to a private file, then publish it with its digest."""
    with tempfile.TemporaryDirectory(prefix="marrow-") as folder:
        made = Path(folder) / "library.so"
        last: subprocess.CalledProcessError | None = None
        # Not every compiler knows every CPU, or OpenMP.
        for extra in ((*_NATIVE, *_THREADS), (*_NATIVE[:1], *_THREADS), _NATIVE[:1], ()):
            command = [compiler, *_FLAGS, *extra, "-o", str(made), str(source), "-lm", "-lpthread"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
                break
            except subprocess.CalledProcessError as error:
                last = last or error
        else:
            assert last is not None
            raise last
        code = made.read_bytes()
    with atomic_file(library) as file:
        file.write(code + hashlib.sha256(code).digest())  # loaders read an ELF file by its headers only


def _is_whole(library: Path) -> bool:
    try:
        data = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-_DIGEST_BYTES]).digest() == data[-_DIGEST_BYTES:]


def _key(source: Path, compiler: str) -> str:
    """Hash what the library depends on: the source, the headers beside it, the compiler, the CPU."""
    info = os.stat(compiler)
    files = [source, *sorted(source.parent.glob("*.h"))]
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    made = [compiler, info.st_size, info.st_mtime_ns, _FLAGS, _NATIVE, _THREADS, _cpu()]
    return hash_value([code, made])[:32]


@cache
def _cpu() -> str:
    """Name what `-march=native` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@cache  # once a process, not once a file
def _warn_of_missing_compiler() -> None:
    warnings.warn(
        "there is no C compiler: slower paths are used (install gcc or clang, or set CC)",
        RuntimeWarning,
        stacklevel=3,
    )
