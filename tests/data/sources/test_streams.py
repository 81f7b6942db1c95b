"""The bytes of a source: packed, in other encodings, damaged. Python's own codecs are the oracle."""

import bz2
import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError, SourceError
from marrow.data.config import DataRecipe
from marrow.data.sources.listing import find_files
from marrow.data.sources.streams import encoding_of, open_bytes

ROWS = "".join(f"{i},naïve café {i}\n" for i in range(3000))
DATA = ("n,text\n" + ROWS).encode()


def zst(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def content(path: Path, encoding: str = "auto") -> bytes:
    with open_bytes(find_files(str(path), "text", encoding).files[0]) as stream:
        return stream.read()


@pytest.mark.parametrize(
    ("suffix", "packed"),
    [
        (".gz", gzip.compress(DATA)),
        (".gz", b"".join(gzip.compress(DATA[i : i + 5000]) for i in range(0, len(DATA), 5000))),
        (".zst", zst(DATA)),
        (".zst", zst(DATA, level=19, write_checksum=True)),
        (".zstd", b"".join(zst(DATA[i : i + 5000]) for i in range(0, len(DATA), 5000))),
    ],
    ids=["gzip", "many members", "zstd", "checked", "many frames"],
)
def test_packed_files_give_the_rows_of_the_plain_one(tmp_path, read_rows, suffix, packed):
    (tmp_path / f"a.csv{suffix}").write_bytes(packed)
    table, facts = read_rows(tmp_path / f"a.csv{suffix}")
    assert table["text"].to_pylist() == [f"naïve café {i}" for i in range(3000)]
    assert facts["broken_rows"] == 0


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
        ),
        lambda data: b"not packed at all\n" * 9,
    ],
    ids=["half", "one byte short", "10 bytes", "one byte wrong", "plain"],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_a_damaged_packed_file_is_an_error_and_no_shorter_one(tmp_path, read_rows, name, suffix, damage):
    text = "".join(json.dumps({"n": i, "t": f"{i * 7919}"}) + "\n" for i in range(3000)).encode()
    packed = gzip.compress(text) if suffix == ".gz" else zst(text, write_checksum=True)
    path = tmp_path / (name + suffix)
    path.write_bytes(damage(packed))
    with pytest.raises(SourceError, match=r"no whole (gzip|zstd) file") as caught:
        read_rows(path)
    assert path.name in caught.value.message
    assert "again" in str(caught.value.hint)


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]),
    st.sampled_from([1, 3, 7, 1 << 20]),
)
def test_a_byte_order_mark_tells_the_encoding(tmp_path_factory, text, encoding, block_bytes):
    assume(not text.startswith("\0"))  # a mark of UTF-16 and a NUL are the mark of UTF-32
    path = tmp_path_factory.mktemp("e") / "a.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marrow.data.sources.streams.BLOCK_BYTES", block_bytes)
        assert content(path).decode() == text


ALPHABETS = {
    "latin-1": "aé\nÿ", "cp1252": "a€é\n", "shift_jis": "aア漢\n", "gb18030": "a漢😀\n", "utf-8": "aé漢😀\n",
    "utf-16-be": "aé漢😀\n", "utf-16-le": "aé漢😀\n", "utf-32-le": "aé漢😀\n", "utf-7": "aé漢+\n",
}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(ALPHABETS)), st.sampled_from([1, 3, 7, 1 << 20]), st.data())
def test_an_encoding_of_the_recipe_is_read_as_python_reads_it(tmp_path_factory, encoding, block_bytes, data):
    text = data.draw(st.text(st.sampled_from(ALPHABETS[encoding]), min_size=1, max_size=40))
    path = tmp_path_factory.mktemp("e") / "a.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marrow.data.sources.streams.BLOCK_BYTES", block_bytes)
        assert content(path, encoding).decode() == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.csv.gz", "a.jsonl.zst"])
def test_every_text_format_understands_marks(tmp_path, read_rows, name, encoding):
    texts = {
        "csv": "text\nnaïve\n漢\n",
        "jsonl": '{"text": "naïve"}\n{"text": "漢"}\n',
        "txt": "naïve\n漢\n",
    }
    pack = {"gz": gzip.compress, "zst": zst}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(texts[name.split(".")[1]].encode(encoding)))
    values = read_rows(tmp_path / name)[0]["text"].to_pylist()
    assert "\n".join(values).split() == ["naïve", "漢"]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.csv", b"n,t\n1,caf\xe9\n2,\x81\n3,ok\n4,ok\n"),
        ("a.jsonl", b'{"n":0}\n{"t":"caf\xe9"}\n{"t":"\x81"}\n{"t":"ok"}\n'),
    ],
)
def test_a_byte_that_the_encoding_lacks_costs_its_row(tmp_path, read_rows, name, body):
    (tmp_path / name).write_bytes(body)
    table, facts = read_rows(tmp_path / name, encoding="cp1252")
    assert table["t"].to_pylist()[-3:] == (["café", "ok", "ok"] if name == "a.csv" else [None, "café", "ok"])
    assert facts["broken_rows"] == 1
    broken = json.loads((tmp_path / "rows-0" / "quarantine.jsonl").read_text())
    assert (broken["line"], broken["reason"]) == (3, "not CP1252")


def test_the_wrong_encoding_is_seen_as_broken_rows(tmp_path, read_rows):
    (tmp_path / "a.csv").write_bytes("t\nnaïve\ncafé\nok\n".encode("latin-1"))
    with pytest.raises(SourceError, match="2 of 3 rows are broken") as caught:
        read_rows(tmp_path / "a.csv")
    assert "data.encoding" in str(caught.value.hint)


def test_an_unknown_encoding_is_refused_with_the_recipes_line(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[data]\nsource = "x"\nencoding = "latin1000"\n')
    with pytest.raises(RecipeError, match=r'r.toml:3.*encoding = "latin1000" is not known'):
        load_recipe(path, {"data": DataRecipe})
    with pytest.raises(ValueError, match="is not known"):
        DataRecipe(source="x", encoding="rot13")  # a codec, but not of bytes


def test_another_way_of_packing_is_no_known_format(tmp_path):
    (tmp_path / "a.csv.bz2").write_bytes(bz2.compress(b"a\n1\n"))
    with pytest.raises(SourceError, match=r"known format .*1 \.bz2"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_nul_bytes_are_data_and_invalid_utf8_is_broken(tmp_path, read_rows, name):
    good, bad = {
        "a.csv": ("t\n" + "a\0b\n" * 5, b"\xc3\x28\n"),
        "a.jsonl": ('{"t": "a\\u0000b"}\n' * 5, b'{"t": "\xc3\x28"}\n'),
        "a.txt": ("a\0b\n\n" * 40_000, b"\xc3\x28\n\n"),
    }[name]
    (tmp_path / name).write_bytes(good.encode() + bad)
    table, facts = read_rows(tmp_path / name)
    column = "text" if name == "a.txt" else "t"
    assert all("a\0b" in value for value in table[column].to_pylist())
    assert facts["broken_rows"] == 1


def test_an_encoding_is_named_as_it_was_found(tmp_path):
    for encoding, name in (("utf-8", "UTF-8"), ("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
        (tmp_path / "a.txt").write_bytes("text".encode(encoding))
        with open_bytes(find_files(str(tmp_path / "a.txt")).files[0]) as stream:
            assert encoding_of(stream) == name
            assert isinstance(stream, io.RawIOBase)


def test_a_refused_file_says_what_is_wrong_with_its_first_broken_row(tmp_path, read_rows):
    (tmp_path / "a.csv").write_bytes(b"t,u\n1,2,3\n1,2,3\n")
    with pytest.raises(SourceError, match=r"not 2 fields, in line 2 of .*a\.csv") as caught:
        read_rows(tmp_path / "a.csv")
    assert "delimiter" in str(caught.value.hint)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SourceError, match=r"1 of 1 rows .*not UTF-8, in line 1 of .*a\.txt") as caught:
        read_rows(tmp_path / "a.txt")
    assert "data.encoding" in str(caught.value.hint)


def test_one_text_in_another_encoding_does_not_stop_the_others(tmp_path, read_rows):
    """A row may be a whole text, so that one broken row is all rows of its file."""
    for i in range(30):
        (tmp_path / f"{i:02}.md").write_text(f"# {i}\n")
    (tmp_path / "07.md").write_bytes(b"caf\xe9\n")
    table, facts = read_rows(tmp_path)
    assert (table.num_rows, facts["broken_rows"]) == (29, 1)
    broken = json.loads((tmp_path / "rows-0" / "quarantine.jsonl").read_text())
    assert (broken["file"], broken["line"], broken["reason"]) == ("07.md", 1, "not UTF-8")
