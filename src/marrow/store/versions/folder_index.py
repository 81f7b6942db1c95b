"""What is known of a user's folder, so that unchanged files are not read again.

Like git's index: for each file its size, times and inode at the moment its bytes were hashed. All
equal now: the bytes are the same and the hash is known. A file changed within the granularity of
the file system's clock of being read could change once more and keep its times (git calls it
racy); such a file is noted with a stamp that no file has, and read again next time.

The index holds one version's files, all of them: `manifest` says which. So what differs from the
index is what differs from that version, and nothing else need be looked at. Files are kept a
folder at a time; a folder that did not change is compared as bytes.

The index is a cache: damaged, lost or written by another version of Marrow, it costs one full read.
What must not be lost with it (which version the folder stands on) is small and lies beside it.
"""

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from marrow.core.errors import explain_os_errors
from marrow.core.files import TEMPORARY, atomic_file
from marrow.core.records import FileEntry
from marrow.store.datasets.manifests import Entry
from marrow.store.versions.folder_walk import Listing, Seen, Stamp

Known = dict[str, tuple[Stamp, str]]
"""name -> stamp and SHA-256"""

UNSETTLED = -1  # in place of the inode: no file's
_MAGIC = b"marrow-index 2\n"
_HEAD = struct.Struct("<32sQ")  # manifest, number of packs
_BLOCK = struct.Struct("<QQQ")  # files, bytes of the folder's name, bytes of the names


@dataclass(frozen=True, slots=True)
class Block:
    """The files of one folder: names joined by NUL, 32 bytes of stamp and of hash each, 1 if packed."""

    names: bytes
    stamps: bytes
    digests: bytes
    packed: bytes

    def files(self) -> Iterator[tuple[str, Stamp, str]]:
        """Yield names, stamps and hashes."""
        numbers = array("q")
        numbers.frombytes(self.stamps)
        stamps: Any = zip(*[iter(numbers)] * 4, strict=True)
        text = self.digests.hex()
        digests = (text[start : start + 64] for start in range(0, len(text), 64))
        names = map(os.fsdecode, self.names.split(b"\0"))
        return zip(names, stamps, digests, strict=True)

    def sizes(self) -> "array[int]":
        """Return the sizes of the files."""
        numbers = array("q")
        numbers.frombytes(self.stamps)
        return numbers[0::4]

    def packed_by_hash(self) -> dict[str, bool]:
        """Return whether bytes lie in a pack, by their hash."""
        return {d: p == 1 for (_, _, d), p in zip(self.files(), self.packed, strict=True)}

    def asked(self, packed: bool) -> Iterator[str]:
        """Yield the hashes whose bytes lie in no pack, with `packed` all hashes."""
        if packed:
            yield from (digest for _, _, digest in self.files())
            return
        at = self.packed.find(0)
        while at >= 0:
            yield self.digests[32 * at : 32 * at + 32].hex()
            at = self.packed.find(0, at + 1)


@dataclass(frozen=True, slots=True)
class Difference:
    """How a folder differs from its index.

    read: files that are new, changed, or whose bytes the store has lost. before: what was known of
    those, and of the files that are gone. same: the other files of the folders where anything differs.
    """

    read: list[Seen]
    before: Known
    same: Known

    @property
    def gone(self) -> set[str]:
        """Names that the index has and the folder has not."""
        return self.before.keys() - {seen.name for seen in self.read}


@dataclass
class FolderIndex:
    """The known hashes of a folder's files, and the versions that it stands on, by name."""

    path: Path
    manifest: bytes = b""
    packs: frozenset[str] = frozenset()
    blocks: dict[str, Block] = field(default_factory=dict)
    bases: dict[str, list[str]] = field(default_factory=dict)
    _known: Known | None = None

    @classmethod
    def open(cls, home: Path, folder: Path) -> "FolderIndex":
        """Read the index of a folder; empty if there is none that can be read."""
        key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
        path = home / "indexes" / key
        index = cls(path)
        try:
            index.manifest, index.packs, index.blocks = _unpack(path.read_bytes())
        except (FileNotFoundError, ValueError, struct.error):
            index.blocks = {}
        try:
            found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            index.bases = {str(name): [str(i) for i in ids] for name, ids in found["bases"].items()}
        except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
            index.bases = {}
        return index

    @property
    def known(self) -> Known:
        """All files by name. Cost: about 2 us each, the first time."""
        if self._known is None:
            self._known = {
                prefix + name: (stamp, digest)
                for prefix, block in self.blocks.items()
                for name, stamp, digest in block.files()
            }
        return self._known

    @property
    def num_files(self) -> int:
        """How many files are known."""
        return sum(len(block.packed) for block in self.blocks.values())

    @property
    def num_bytes(self) -> int:
        """The bytes of all files."""
        return sum(sum(block.sizes()) for block in self.blocks.values())

    def sizes(self) -> set[int]:
        """Return the sizes that occur."""
        return {size for block in self.blocks.values() for size in block.sizes()}

    def digest(self, seen: Seen) -> str | None:
        """Return the hash of a file that has not changed since it was read, else None."""
        known = self.known.get(seen.name)
        return known[1] if known is not None and known[0] == seen.stamp else None

    def compare(self, listings: Iterable[Listing], has: Callable[[str], bool], packs: Set[str]) -> Difference:
        """Find what differs from the index.

        Args: has: whether the store has bytes of that hash. packs: those that it has; bytes in a
            pack are asked for only if one that was there is gone.
        Cost: a comparison of bytes for each folder that did not change.
        """
        ask_packed = not self.packs <= packs
        read: list[Seen] = []
        before: Known = {}
        same: Known = {}
        left = dict(self.blocks)
        for listing in listings:
            prefix = listing.prefix
            block = left.pop(prefix, None)
            lost = [] if block is None else _lost(block, has, ask_packed)
            if block is not None and not lost and _is_as_it_was(block, listing):
                continue
            files = {} if block is None else {prefix + n: (s, d) for n, s, d in block.files()}
            for seen in listing.seen():
                known = files.get(seen.name)
                if known is not None and known[0] == seen.stamp and known[1] not in lost:
                    same[seen.name] = files.pop(seen.name)
                else:
                    read.append(seen)
            before |= files
        for prefix, block in left.items():
            before |= {prefix + name: (stamp, digest) for name, stamp, digest in block.files()}
        read.sort(key=lambda seen: seen.name)
        return Difference(read, before, same)

    def save(
        self,
        known: Mapping[str, tuple[Stamp, str]],
        files: Iterable[FileEntry] = (),
        *,
        listings: Iterable[Listing] | None = None,
        packs: Set[str] = frozenset(),
        is_packed: Callable[[str], bool] = lambda digest: False,
    ) -> None:
        """Replace what is known. Not flushed to disk: it is a cache. Cost: about 80 bytes a file.

        Args: known: the files that are as they were when they were hashed. files: the manifest of
            the version that they make. listings: the folders as they are; one none of whose files is in
            `known` keeps what is known of it. packs: those that the store has; is_packed: whether
            bytes lie in one of them.
        """
        touched = {name[: name.rfind("/") + 1] for name in known}
        blocks = {}
        for listing in _listings_of(known) if listings is None else listings:
            prefix = listing.prefix
            before = self.blocks.get(prefix)
            if prefix not in touched and before is not None:
                blocks[prefix] = before
                continue
            found = [(name, known.get(prefix + name)) for name in listing.names]
            pairs = [(name, file) for name, file in found if file is not None]
            if pairs:
                sure = before.packed_by_hash() if before is not None and self.packs <= packs else {}
                blocks[prefix] = _block(pairs, is_packed, sure)
        self.blocks, self._known = blocks, None
        self.manifest, self.packs = manifest_check(files), frozenset(packs)
        self._replace(self.path, _pack(self.manifest, self.packs, blocks))

    def stand_on(self, name: str, *artifact_ids: str) -> None:
        """Note the version of a name that the folder stands on.

        Several while a commit is under way: that needs to outlive a kill, which needs no fsync.
        """
        self.bases[name] = list(artifact_ids)
        if len(artifact_ids) > 1:
            self._replace(self.path.with_suffix(".json"), self._bases_text().encode())
        else:
            self._save_bases()

    def forget(self, name: str) -> None:
        """Note that the folder stands on no version of a name."""
        self.bases.pop(name, None)
        self._save_bases()

    def _save_bases(self) -> None:
        with (
            explain_os_errors("write the index of a folder", self.path),
            atomic_file(self.path.with_suffix(".json"), "w") as file,
        ):
            file.write(self._bases_text())

    def _bases_text(self) -> str:
        return json.dumps({"bases": self.bases})

    def _replace(self, path: Path, data: bytes) -> None:
        with explain_os_errors("write the index of a folder", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}")
            try:
                temporary.write_bytes(data)
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)


def manifest_check(files: Iterable[FileEntry]) -> bytes:
    """Return 32 bytes that stand for a manifest; equal ones: the same files."""
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).digest()


def known_entries(known: Known) -> list[Entry]:
    """Return files as a manifest has them."""
    return [Entry(name, digest, stamp[0]) for name, (stamp, digest) in known.items()]


def unsettled(stamp: Stamp) -> Stamp:
    """Return a stamp of that size which no file has."""
    return stamp[0], 0, 0, UNSETTLED


def _listings_of(known: Mapping[str, tuple[Stamp, str]]) -> list[Listing]:
    """Return the folders of files that were not listed, each in the order of names."""
    made: dict[str, Listing] = {}
    for name, (stamp, _) in known.items():
        head, slash, tail = name.rpartition("/")
        listing = made.setdefault(head + slash, Listing(head + slash, [], array("q")))
        listing.names.append(tail)
        listing.stamps.extend(stamp)
    return list(made.values())


def _is_as_it_was(block: Block, listing: Listing) -> bool:
    return block.stamps == listing.stamps.tobytes() and block.names == _joined(listing.names)


def _lost(block: Block, has: Callable[[str], bool], ask_packed: bool) -> list[str]:
    return [digest for digest in block.asked(ask_packed) if not has(digest)]


def _joined(names: Iterable[str]) -> bytes:
    return os.fsencode("\0".join(names))


def _block(
    pairs: list[tuple[str, tuple[Stamp, str]]], is_packed: Callable[[str], bool], sure: Mapping[str, bool]
) -> Block:
    numbers = array("q")
    for _, (stamp, _) in pairs:
        numbers.extend(stamp)
    digests = [digest for _, (_, digest) in pairs]
    packed = bytes(sure[digest] if digest in sure else is_packed(digest) for digest in digests)
    return Block(_joined(n for n, _ in pairs), numbers.tobytes(), bytes.fromhex("".join(digests)), packed)


def _pack(manifest: bytes, packs: Iterable[str], blocks: Mapping[str, Block]) -> bytes:
    names = sorted(packs)
    parts = [_HEAD.pack(manifest, len(names)), bytes.fromhex("".join(names))]
    for prefix, block in blocks.items():
        place = os.fsencode(prefix)
        parts.append(_BLOCK.pack(len(block.packed), len(place), len(block.names)))
        parts += [place, block.names, block.stamps, block.digests, block.packed]
    body = b"".join(parts)
    return _MAGIC + xxhash.xxh3_128_digest(body) + body


def _unpack(data: bytes) -> tuple[bytes, frozenset[str], dict[str, Block]]:
    at = len(_MAGIC) + 16
    body = memoryview(data)[at:]
    if not data.startswith(_MAGIC) or xxhash.xxh3_128_digest(body) != data[at - 16 : at]:
        raise ValueError("not an index, or damaged")
    manifest, num_packs = _HEAD.unpack_from(data, at)
    at += _HEAD.size
    packs = frozenset(data[at + 32 * n : at + 32 * n + 32].hex() for n in range(num_packs))
    at += 32 * num_packs
    blocks: dict[str, Block] = {}
    while at < len(data):
        count, *lengths = _BLOCK.unpack_from(data, at)
        at += _BLOCK.size
        parts = []
        for length in (*lengths, 32 * count, 32 * count, count):
            parts.append(data[at : at + length])
            at += length
        blocks[os.fsdecode(parts[0])] = Block(*parts[1:])
    return manifest, packs, blocks
