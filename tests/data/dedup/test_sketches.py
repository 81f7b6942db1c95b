import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.data.dedup.sketches import Signing, Sketches, scratch, sign
from marrow.kernels.search.minhash import shingle_sets

TEXTS = [
    "one two three four five six",
    "one two three four five seven",
    " one two three four five six\n",
    "",
    "!",
]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.sampled_from([0, 3, 6, 31]), st.booleans())
def test_a_sketch_depends_on_the_text_alone(texts, band_rows, exact):
    """However texts are batched: else the answer would depend on the workers."""
    signing = Signing(exact, band_rows)
    together = sign(signing, pa.array(texts, pa.string()))
    assert sorted(together.keys) == sorted(signing.columns())
    alone = [sign(signing, pa.array([text], pa.large_string())) for text in texts]
    for name, column in together.keys.items():
        assert column.tolist() == [int(one.keys[name][0]) for one in alone]
    assert together.shingles.tolist() == [int(x) for one in alone for x in one.shingles]
    assert together.sizes.tolist() == [int(one.sizes[0]) for one in alone]


def test_equal_texts_have_equal_digests_and_equal_words_equal_sets():
    keys = sign(Signing(True, 6), pa.array(TEXTS)).keys
    digests = list(zip(keys["digest-0"].tolist(), keys["digest-1"].tolist(), strict=True))
    assert digests[0] == digests[2] and len(set(digests)) == 4
    whole = np.frombuffer(xxhash.xxh3_128_digest(TEXTS[0].encode()), "<u8")
    assert digests[0] == tuple(whole.tolist())
    assert keys["set"][0] == keys["set"][2] and len(set(keys["set"].tolist())) == 4
    bands = np.stack([keys[name] for name in sorted(keys) if name.startswith("band")])
    assert len(bands) == 21
    assert (bands[:, 0] == bands[:, 2]).all()
    assert (bands[:, 0] != bands[:, 1]).any()


def test_the_upper_bits_of_all_keys_are_spread_evenly():
    """They choose the file that a key is sorted in."""
    texts = pa.array([f"text number {i} of very many that are alike" for i in range(20_000)])
    for name, column in sign(Signing(True, 6), texts).keys.items():
        distinct = np.unique(column)
        shares = np.bincount((distinct >> np.uint64(60)).astype(int), minlength=16) / len(distinct)
        deviation = (1 / 16 * 15 / 16 / len(distinct)) ** 0.5
        assert abs(shares - 1 / 16).max() < 5 * deviation, name  # 16 shares of 24 columns: chance 2e-4


def test_what_is_appended_is_what_is_mapped(tmp_path):
    signing = Signing(True, 6)
    with Sketches(tmp_path, signing) as sketches:
        for start in range(0, len(TEXTS), 2):
            sketches.append(sign(signing, pa.array(TEXTS[start : start + 2])))
    whole = sign(signing, pa.array(TEXTS))
    for name in signing.columns():
        np.testing.assert_array_equal(sketches.column(name), whole.keys[name])
    values, starts = sketches.sets()
    expected, expected_starts = shingle_sets(pa.array(TEXTS), 5)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(starts, expected_starts)
    assert (sketches.num_texts, sketches.num_shingles) == (len(TEXTS), len(expected))


def test_no_texts_make_empty_columns(tmp_path):
    with Sketches(tmp_path, Signing(True, 6)) as sketches:
        pass
    assert len(sketches.column("band-00")) == 0
    values, starts = sketches.sets()
    assert len(values) == 0 and starts.tolist() == [0]


def test_scratch_removes_what_the_dead_left_and_nothing_of_the_living(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    left = tmp_path / f".tmp-{int(dead.stdout)}-abc"
    left.mkdir()
    (left / "shingles").write_bytes(b"x")
    living = tmp_path / f".tmp-{os.getpid()}-abc"
    living.mkdir()
    (tmp_path / "rows.parquet").write_bytes(b"x")
    with scratch(tmp_path) as folder:
        (folder / "file").write_bytes(b"x")
        assert not left.exists() and living.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "rows.parquet"]
