"""What the search for duplicates keeps of each text, in files of a work folder.

    digest-0, digest-1    xxh3-128 of the text: equal texts are equal here
    set                   a hash of its shingle set: texts of the same words
    band-00, band-01, ... hashes of bands of its MinHash signature: texts that may be alike
    shingles, starts      the shingle set itself, to compare two texts exactly

All but the last are one 64-bit number a text, so a column is sorted without the others. Per text:
8 bytes for each band (21 at 0.8) and 32 more, and 4 for each distinct shingle.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from marrow.core.errors import explain_os_errors
from marrow.core.files import sweep, temporary_beside
from marrow.data.dedup.buckets import write_all
from marrow.kernels.search.minhash import NUM_HASHES, shingle_sets, signatures, text_memory

SHINGLE_WORDS = 5

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Signing:
    """What is asked of each text. band_rows: hashes per band, 0 for no search of near-duplicates."""

    exact: bool
    band_rows: int

    def columns(self) -> list[str]:
        """Name the files of keys."""
        names = ["digest-0", "digest-1"] if self.exact else []
        if self.band_rows:
            names += ["set", *(f"band-{i:02}" for i in range(NUM_HASHES // self.band_rows))]
        return names


@dataclass(frozen=True, slots=True)
class Sketch:
    """A batch of texts, signed: keys by column, uint64 [N] each; shingles uint32 [S]; sizes int64 [N]."""

    keys: dict[str, U64]
    shingles: U32
    sizes: I64


def sign(signing: Signing, texts: pa.Array) -> Sketch:
    """Sign a batch of texts: a function of each text alone, safe on any thread or process."""
    keys: dict[str, U64] = {}
    if signing.exact:
        keys["digest-0"], keys["digest-1"] = _digests(texts)
    if not signing.band_rows:
        return Sketch(keys, np.empty(0, np.uint32), np.zeros(len(texts), np.int64))
    values, starts = shingle_sets(texts, SHINGLE_WORDS)
    signatures_NK = signatures(values, starts)
    keys["set"] = _set_keys(values, starts)
    for i, start in enumerate(range(0, NUM_HASHES - signing.band_rows + 1, signing.band_rows)):
        keys[f"band-{i:02}"] = _band_keys(signatures_NK[:, start : start + signing.band_rows])
    return Sketch(keys, values, np.diff(starts))


@dataclass(slots=True)
class Sketches:
    """The files of a work folder: appended to, then read as arrays mapped from disk."""

    folder: Path
    signing: Signing
    num_texts: int = 0
    num_shingles: int = 0
    _files: dict[str, FileIO] = field(default_factory=dict)

    def __enter__(self) -> "Sketches":
        names = [*self.signing.columns(), "shingles", "starts"]
        with explain_os_errors("keep signatures", self.folder):
            for name in names:
                self._files[name] = (self.folder / name).open("wb", buffering=0)
            self._write("starts", np.zeros(1, np.int64))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with explain_os_errors("keep signatures", self.folder):
            for file in self._files.values():
                file.close()

    def append(self, sketch: Sketch) -> None:
        """Add a batch. Raises: DiskFull."""
        with explain_os_errors("keep signatures", self.folder):
            for name, values in sketch.keys.items():
                self._write(name, values)
            self._write("shingles", sketch.shingles)
            self._write("starts", self.num_shingles + np.cumsum(sketch.sizes))
        self.num_texts += len(sketch.sizes)
        self.num_shingles += len(sketch.shingles)

    def column(self, name: str) -> U64:
        """Return a column of keys, uint64 [N]."""
        return _mapped(self.folder / name, np.uint64)

    def sets(self) -> tuple[U32, I64]:
        """Return all shingle sets and their starts [N + 1], as `kernels/search/minhash.py` has them."""
        return _mapped(self.folder / "shingles", np.uint32), _mapped(self.folder / "starts", np.int64)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        write_all(self._files[name], values)


@contextmanager
def scratch(work: Path) -> Iterator[Path]:
    """Give a folder in `work` that goes when the block ends; first remove those of killed processes."""
    with explain_os_errors("make a work folder", work):
        work.mkdir(parents=True, exist_ok=True)
        sweep(work)
        folder = temporary_beside(work / "dedup")
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digests(texts: pa.Array) -> tuple[U64, U64]:
    """Return the two halves of each text's xxh3-128, white space (ASCII) at its ends aside."""
    data, offsets = text_memory(texts)
    memory, digest = data.data, xxhash.xxh3_128_digest
    ends = offsets.tolist()
    hashes = b"".join(digest(bytes(memory[start:end]).strip()) for start, end in pairwise(ends))
    halves = np.frombuffer(hashes, "<u8").reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


def _set_keys(values: U32, starts: I64) -> U64:
    """Return a hash of each set. PERF: about 0.3 microseconds a text beside 12 for its signature."""
    memory, digest = values.data, xxhash.xxh3_64_intdigest
    ends = starts.tolist()
    hashes = (digest(memory[start:end]) for start, end in pairwise(ends))
    return np.fromiter(hashes, np.uint64, len(ends) - 1)


def _band_keys(band_NR: U32) -> U64:
    keys_N = np.zeros(len(band_NR), np.uint64)  # two bands that collide cost one comparison more
    for column in band_NR.T:
        keys_N = (keys_N ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys_N ^= keys_N >> np.uint64(32)
    # The upper bits decide the pass: the product's are well mixed, the last shift leaves them alone.
    return keys_N


def _mapped(path: Path, kind: type) -> NDArray[Any]:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
