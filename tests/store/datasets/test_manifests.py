import os
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import DamagedBlob
from marrow.core.hashes import hash_bytes
from marrow.store.datasets.manifests import Entry, compare, decode, encode, printable, splice

part = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8
).filter(lambda text: text not in (".", "..", ".git"))
names = st.lists(part, min_size=1, max_size=3).map("/".join)
bytes_names = (
    st.binary(min_size=1, max_size=8)
    .map(os.fsdecode)
    .filter(lambda n: not {"/", "\0"} & set(n) and n not in (".", "..", ".git"))
)
contents = st.sampled_from([hash_bytes(bytes([n])) for n in range(5)])
manifests = st.dictionaries(names | bytes_names, contents, max_size=30).map(
    lambda files: [Entry(name, digest, len(digest)) for name, digest in sorted(files.items())]
)


@given(manifests)
def test_any_names_come_back(entries: list[Entry]) -> None:
    assert [entry for data in encode(entries) for entry in decode(data)] == entries


def many(count: int) -> list[Entry]:
    return [Entry(f"{n:06d}", hash_bytes(str(n).encode()), n) for n in range(count)]


def test_one_changed_file_changes_one_range() -> None:
    entries = many(60_000)
    changed = [*entries[:30_000], entries[30_000]._replace(sha256="0" * 64), *entries[30_001:]]
    before, after = set(encode(entries)), set(encode(changed))
    assert len(before) > 5
    assert len(before - after) == len(after - before) == 1


cut_names = [f"{n:05d}" for n in range(100_000) if zlib.crc32(b"%05d" % n) & 4095 == 0]
some_names = st.sampled_from([*cut_names, *(f"{n:05d}" for n in range(0, 100_000, 3_001)), "a", " "])
some_files = st.dictionaries(some_names, contents, max_size=30)


@given(some_files, st.dictionaries(some_names, contents | st.none(), max_size=6))
def test_a_spliced_manifest_is_the_one_that_would_be_written(
    old: dict[str, str], changes: dict[str, str | None]
) -> None:
    """Also where names that cut come and go: about half of these do."""

    def entries(files: dict[str, str]) -> list[Entry]:
        return [Entry(name, digest, 1) for name, digest in sorted(files.items())]

    ranges = list(encode(entries(old)))
    new = {n: None if d is None else Entry(n, d, 1) for n, d in changes.items()}
    made = [ranges[p] if isinstance(p, int) else p for p in splice(len(ranges), ranges.__getitem__, new)]
    now = {n: d for n, d in {**old, **changes}.items() if d is not None}
    assert made == list(encode(entries(now)))


def test_a_splice_reads_only_the_ranges_that_it_needs() -> None:
    ranges = list(encode(many(200_000)))
    assert len(ranges) > 30
    read = set()

    def get(number: int) -> bytes:
        read.add(number)
        return ranges[number]

    made = splice(len(ranges), get, {"100000": Entry("100000", "0" * 64, 1)})
    assert sum(isinstance(piece, bytes) for piece in made) == 1
    assert len(read) <= 8


@pytest.mark.parametrize("place", [0, 30_000, 60_000])
def test_an_added_file_moves_no_other_range(place: int) -> None:
    entries = many(60_000)
    more = sorted([*entries, Entry(f"{place:06d}-more", "0" * 64, 1)])
    assert len(set(encode(entries)) - set(encode(more))) <= 1


def test_the_text_is_the_same_in_every_version_of_marrow() -> None:
    entries = [Entry("a b", "0" * 64, 3), Entry("new\nline", "1" * 64, 0), Entry("ü", "2" * 64, 1)]
    assert b"".join(encode(entries)) == (
        b"0" * 64 + b" 3 a b\n" + b"1" * 64 + b' 0 "new\\nline"\n' + b"2" * 64 + " 1 ü\n".encode()
    )


@pytest.mark.parametrize(
    "name",
    ["../outside", "/absolute", "a/../../b", "a//b", "", ".", "a/.git/hooks/x", "nul\0", "a/"],
)
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    (data,) = encode([Entry(name, "0" * 64, 1)])
    with pytest.raises(DamagedBlob, match="cannot be read"):
        decode(data)


@pytest.mark.parametrize(
    "data", [b"" + b"0" * 64 + b' 1 "\\ud800"\n', b"no manifest\n", b"\xff\n", b"0 1\n", b'0 1 "x\n']
)
def test_what_is_no_manifest_is_said(data: bytes) -> None:
    with pytest.raises(DamagedBlob):
        decode(data)


@given(manifests, manifests)
def test_changes_lead_from_one_version_to_the_other(old: list[Entry], new: list[Entry]) -> None:
    files = {entry.name: entry for entry in old}
    for change in compare(old, new):
        if change.old is not None:
            assert files.pop(change.old.name) == change.old
    for change in compare(old, new):
        if change.new is not None:
            files[change.name] = change.new
    assert sorted(files.values()) == new


def test_a_moved_file_is_one_change_and_empty_files_are_never_moved() -> None:
    changes = compare(
        [Entry("a", "1" * 64, 1), Entry("e", "0" * 64, 0)], [Entry("b", "1" * 64, 1), Entry("f", "0" * 64, 0)]
    )
    assert [(c.letter, c.name) for c in changes] == [("R", "b"), ("D", "e"), ("A", "f")]


@given(st.binary(min_size=1, max_size=20))
def test_any_name_prints_on_one_line(data: bytes) -> None:
    shown: Any = printable(os.fsdecode(data))
    assert shown.isprintable()
    shown.encode()
