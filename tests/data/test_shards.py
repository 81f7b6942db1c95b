import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from marrow.core.config import load_recipe
from marrow.core.errors import DataError, DiskFull, ModelError, RecipeError, SourceError
from marrow.core.hashes import check_file, hash_file
from marrow.data import shards as shards_module
from marrow.data.engine import INLINE, Engine, Processes, Threads
from marrow.data.manifest import Manifest
from marrow.data.shards import take_tokenizer, train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.text.config import TokenizerRecipe
from marrow.text.tokenizer import Tokenizer

TEXTS = ["", "x", "def f(x):\n    return x\n" * 40, "naïve 中 😀", "import os\n", "class A:\n    pass\n" * 9]


def write_split(folder: Path, texts: Sequence[str | None], row_group_size: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "document_id": pa.array([100 + 3 * i for i in range(len(texts))], pa.int64()),
            "text": pa.array(texts, pa.string()),
            "num_bytes": pa.array([len((text or "").encode()) for text in texts], pa.int64()),
        }
    )
    pq.write_table(table, folder / "train.parquet", row_group_size=row_group_size)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    split = write_split(tmp_path_factory.mktemp("split"), TEXTS)
    train_tokenizer(TokenizerRecipe(vocab_size=360), split, folder)
    return folder


def read_documents(folder: Path) -> dict[int, list[int]]:
    """Put the documents together again from the raw Arrow files, by another road than the loader's."""
    manifest = json.loads((folder / "manifest.json").read_text())
    pieces: dict[int, list[tuple[int, list[int]]]] = {}
    for shard in manifest["shards"]:
        table = pa.ipc.open_file(folder / shard["name"]).read_all()
        for row in table.to_pylist():
            ends = [*row["document_starts"][1:], row["num_tokens"]]
            assert row["document_starts"][0] == 0
            assert row["tokens"][row["num_tokens"] :] == [manifest["pad_id"]] * (
                manifest["context"] + 1 - row["num_tokens"]
            )
            for start, end, document_id, offset in zip(
                row["document_starts"], ends, row["document_ids"], row["document_offsets"], strict=True
            ):
                pieces.setdefault(document_id, []).append((offset, row["tokens"][start:end]))
    documents = {}
    for document_id, parts in pieces.items():
        tokens: list[int] = []
        for offset, piece in sorted(parts):
            assert not tokens or (offset, piece[0]) == (len(tokens) - 1, tokens[-1]), "overlap by one"
            tokens += piece[1:] if tokens else piece
        documents[document_id] = tokens
    return documents


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text(st.sampled_from("ab \n(é😀"), max_size=120), min_size=1, max_size=12),
    context=st.sampled_from([8, 13, 64]),
    shard_bytes=st.sampled_from([64, 500, 1 << 20]),
)
def test_shards_hold_every_document_once(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    texts: list[str],
    context: int,
    shard_bytes: int,
) -> None:
    tmp = tmp_path_factory.mktemp("shards")
    split = write_split(tmp / "split", texts)
    recipe = ShardsRecipe(context=context, shard_bytes=shard_bytes)
    write_shards(recipe, split, tokenizer_folder, tmp)
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert read_documents(tmp) == {
        100 + 3 * i: [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for i, text in enumerate(texts)
    }
    manifest = Manifest.read(tmp)
    assert manifest.num_predicted_tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_the_manifest_tells_the_truth(tmp_path: Path, tokenizer_folder: Path) -> None:
    split = write_split(tmp_path / "split", TEXTS)
    facts = write_shards(ShardsRecipe(context=16, shard_bytes=300), split, tokenizer_folder, tmp_path)
    manifest = Manifest.read(tmp_path)
    tables = [pa.ipc.open_file(tmp_path / shard.name).read_all() for shard in manifest.shards]
    assert len(tables) > 3
    assert [table.num_rows for table in tables] == [shard.num_rows for shard in manifest.shards]
    assert manifest.num_rows == sum(table.num_rows for table in tables) == facts["num_rows"]
    assert manifest.num_tokens == sum(sum(table["num_tokens"].to_pylist()) for table in tables)
    assert manifest.num_bytes_text == len("".join(TEXTS).encode())
    assert manifest.num_documents == len(TEXTS)
    assert manifest.padding_share == round(1 - manifest.num_tokens / (17 * manifest.num_rows), 6)
    assert manifest.tokenizer_sha256 == hash_file(tokenizer_folder / "tokenizer.json")
    for shard in manifest.shards:
        path = tmp_path / shard.name
        assert (shard.num_bytes, shard.xxh3) == (path.stat().st_size, check_file(path))
        assert pa.ipc.open_file(path).num_record_batches == 1
    assert json.loads(json.dumps(facts)) == facts


def test_the_schema_is_the_documented_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_shards(ShardsRecipe(context=16), write_split(tmp_path / "s", TEXTS), tokenizer_folder, tmp_path)
    schema = pa.ipc.open_file(tmp_path / "train-00000.arrow").schema
    assert {field.name: str(field.type) for field in schema} == {
        "tokens": "fixed_size_list<item: uint16>[17]",
        "document_starts": "list<item: int32>",
        "document_ids": "list<item: int64>",
        "document_offsets": "list<item: int64>",
        "num_tokens": "int32",
        "row_xxh64": "uint64",
    }


def test_a_shard_is_read_without_a_copy(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_shards(ShardsRecipe(context=16), write_split(tmp_path / "s", TEXTS), tokenizer_folder, tmp_path)
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(tmp_path / "train-00000.arrow")) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
        view = batch.column("tokens").flatten().to_numpy(zero_copy_only=True)
        assert not view.flags.owndata
        assert pa.total_allocated_bytes() - before < view.nbytes
        del view, batch


def test_equal_inputs_give_equal_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    split = write_split(tmp_path / "split", TEXTS)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(ShardsRecipe(context=16, shard_bytes=300), split, tokenizer_folder, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_row_groups_do_not_change_the_shards(tmp_path: Path, tokenizer_folder: Path) -> None:
    for size in (1, 100):
        split = write_split(tmp_path / f"split-{size}", TEXTS, row_group_size=size)
        (tmp_path / str(size)).mkdir()
        write_shards(ShardsRecipe(context=16), split, tokenizer_folder, tmp_path / str(size))
    assert check_file(tmp_path / "1/manifest.json") == check_file(tmp_path / "100/manifest.json")


def test_a_large_vocabulary_is_stored_wide(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_split(tmp_path / "split", TEXTS)
    load = Tokenizer.load

    def load_large(path: Path) -> Tokenizer:
        tokenizer = load(path)
        tokenizer.vocab_size = (1 << 16) + 1  # to train one this large would take minutes
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", load_large)
    write_shards(ShardsRecipe(context=16), split, tokenizer_folder, tmp_path)
    assert Manifest.read(tmp_path).dtype == "uint32"
    assert pa.ipc.open_file(tmp_path / "train-00000.arrow").schema.field("tokens").type.value_type == "uint32"


def test_progress_reaches_its_total(tmp_path: Path, tokenizer_folder: Path) -> None:
    split = write_split(tmp_path / "split", TEXTS, row_group_size=1)
    calls: list[tuple[float, float | None]] = []

    def progress(done: float, total: float | None, unit: str, figures: object = None) -> None:
        assert unit == "B"
        calls.append((done, total))

    write_shards(ShardsRecipe(context=16), split, tokenizer_folder, tmp_path, progress)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] == len("".join(TEXTS).encode())


def test_a_text_too_small_for_the_vocabulary_is_said(tmp_path: Path) -> None:
    split = write_split(tmp_path / "split", ["tiny tiny"])
    facts = train_tokenizer(TokenizerRecipe(vocab_size=4096), split, tmp_path)
    assert facts["vocab_size"] == Tokenizer.load(tmp_path).vocab_size < 330
    assert "4096 tokens were asked for" in facts["note"]


def test_a_tokenizer_of_the_size_asked_for_needs_no_note(tmp_path: Path) -> None:
    split = write_split(tmp_path / "split", TEXTS)
    facts = train_tokenizer(TokenizerRecipe(vocab_size=330), split, tmp_path)
    assert facts == {
        "vocab_size": 330,
        "num_documents": len(TEXTS),
        "num_bytes_text": len("".join(TEXTS).encode()),
    }


# Bad input


Step = Callable[[Path, Path, Path], object]
STEPS: list[Step] = [
    lambda split, tokenizer, out: write_shards(ShardsRecipe(context=16), split, tokenizer, out),
    lambda split, tokenizer, out: train_tokenizer(TokenizerRecipe(), split, out),
]


@pytest.mark.parametrize("step", STEPS, ids=["shards", "tokenizer"])
@pytest.mark.parametrize("texts", [[], ["x", None]], ids=["empty", "null"])
def test_a_split_without_text_is_a_clear_error(
    tmp_path: Path, tokenizer_folder: Path, step: Step, texts: list[str | None]
) -> None:
    split = write_split(tmp_path / "split", texts)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DataError) as error:
        step(split, tokenizer_folder, out)
    assert error.value.hint
    assert not list(out.iterdir()), "nothing that looks whole"


@pytest.mark.parametrize("step", STEPS, ids=["shards", "tokenizer"])
def test_a_missing_split_is_a_clear_error(tmp_path: Path, tokenizer_folder: Path, step: Step) -> None:
    with pytest.raises(DataError, match=r"train\.parquet"):
        step(tmp_path, tokenizer_folder, tmp_path)


def test_a_full_disk_is_a_clear_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full (Linux)")
    split = write_split(tmp_path / "split", TEXTS)
    (tmp_path / "train-00000.arrow").symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        write_shards(ShardsRecipe(context=16), split, tokenizer_folder, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "line", ["context = 4", "max_padding = 2", 'shard_bytes = "1 furlong"', "contxt = 8"]
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"[shards]\n{line}\n")
    with pytest.raises(RecipeError, match=r"recipe\.toml:2"):
        load_recipe(path, {"shards": ShardsRecipe, "tokenizer": TokenizerRecipe})


def test_recipe_units(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[shards]\ncontext = "1k"\nshard_bytes = "16MiB"\n[tokenizer]\nvocab_size = "32k"\n')
    recipe = load_recipe(path, {"shards": ShardsRecipe, "tokenizer": TokenizerRecipe})
    assert recipe.section(ShardsRecipe) == ShardsRecipe(1000, shard_bytes=16 << 20)
    assert recipe.section(TokenizerRecipe).vocab_size == 32000


# Manifest


@pytest.fixture
def shards(tmp_path: Path, tokenizer_folder: Path) -> Path:
    write_shards(ShardsRecipe(context=16), write_split(tmp_path / "s", TEXTS), tokenizer_folder, tmp_path)
    return tmp_path


def test_a_manifest_survives_writing_and_reading(
    shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("copy")
    Manifest.read(shards).write(other)
    assert (other / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"context"', '"contxt"'),
        lambda text: text.replace('"num_rows": ', '"num_rows": 1', 1),
    ],
    ids=["cut", "other", "version", "key", "rows"],
)
def test_a_damaged_manifest_is_a_clear_error(shards: Path, damage: Callable[[str], str]) -> None:
    path = shards / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=r"manifest\.json") as error:
        Manifest.read(shards)
    assert error.value.hint


def test_a_missing_manifest_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="manifest"):
        Manifest.read(tmp_path)


def test_dtype_is_one_that_numpy_reads(shards: Path) -> None:
    assert np.dtype(Manifest.read(shards).dtype) == np.uint16


# Engines


@settings(deadline=None, max_examples=15)
@given(
    texts=st.lists(st.text(st.sampled_from("ab \n(é😀"), max_size=80), min_size=1, max_size=30),
    row_group_size=st.integers(1, 9),
)
@pytest.mark.slow
def test_every_engine_writes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    engines: dict[str, Engine],
    texts: list[str],
    row_group_size: int,
) -> None:
    tmp = tmp_path_factory.mktemp("engines")
    split = write_split(tmp / "split", texts, row_group_size)
    written = {}
    for name, engine in engines.items():
        (tmp / name).mkdir()
        recipe = ShardsRecipe(context=8, shard_bytes=200)
        facts = write_shards(recipe, split, tokenizer_folder, tmp / name, engine=engine)
        written[name] = [facts, {path.name: path.read_bytes() for path in (tmp / name).iterdir()}]
    assert written["threads"] == written["inline"]
    assert written["processes"] == written["inline"]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    with Threads(3) as threads, Processes(2) as processes:
        yield {"inline": INLINE, "threads": threads, "processes": processes}


def test_errors_of_a_row_group_name_it_whatever_the_engine(
    tmp_path: Path, tokenizer_folder: Path, engines: dict[str, Engine]
) -> None:
    split = write_split(tmp_path / "split", ["a", "b", "c", None, "e"], row_group_size=2)
    for engine in engines.values():
        with pytest.raises(DataError, match=r"train\.parquet: row group 1 has a document without text"):
            write_shards(ShardsRecipe(context=8), split, tokenizer_folder, tmp_path, engine=engine)


def test_bytes_that_are_no_utf8_are_told_with_their_place(tmp_path: Path, tokenizer_folder: Path) -> None:
    split = write_split(tmp_path / "split", ["fine", "four"])
    bad = pa.array([b"fine", b"f\xff"], pa.binary()).view(pa.string())
    table = pq.read_table(split / "train.parquet").set_column(1, "text", bad)
    pq.write_table(table, split / "train.parquet")
    with pytest.raises(
        DataError, match=r"row group 0 of .*train\.parquet: text 1 of 2 is no UTF-8 at byte 1"
    ):
        write_shards(ShardsRecipe(context=8), split, tokenizer_folder, tmp_path)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_columns_are_read_where_they_lie(kind: pa.DataType) -> None:
    for values in (["", "é", "abc", ""], [], ["x"]):
        whole = pa.array(["before", *values, "after"], kind)
        data, offsets = shards_module._utf8(whole.slice(1, len(values)))
        assert data.tobytes() == "".join(values).encode()
        assert offsets.tolist() == [0, *np.cumsum([len(v.encode()) for v in values]).tolist()]


def test_another_tokenizer_at_the_same_place_is_read_anew(tmp_path: Path) -> None:
    """Workers keep a tokenizer, by its hash."""
    texts = ["hello hello world world " * 9, "other words of the same text"]
    split = write_split(tmp_path / "split", texts)
    for vocab_size in (324, 330):
        train_tokenizer(TokenizerRecipe(vocab_size=vocab_size), split, tmp_path)
        write_shards(ShardsRecipe(context=16), split, tmp_path, tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.vocab_size == vocab_size
        tokens = read_documents(tmp_path)
        assert tokenizer.decode(tokens[100]) == texts[0]
        assert len(tokens[100]) == len(tokenizer.encode(texts[0])) + 2


def foreign(folder: Path, *, byte_level: bool) -> Path:
    """Write a tokenizer of another maker."""
    folder.mkdir()
    if byte_level:
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<end>", "<begin>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
    else:
        library = Library(models.WordPiece(unk_token="[UNK]"))
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    library.train_from_iterator(TEXTS, trainer)
    library.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_of_another_maker_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs", byte_level=True)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<begin>", "eos_token": "<end>"}')
    for number, place in enumerate((folder, folder / "tokenizer.json")):
        (out := tmp_path / f"taken-{number}").mkdir()
        facts = take_tokenizer(place, out)
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        taken = Tokenizer.load(out)
        assert (taken.bos_id, taken.eos_id, taken.vocab_size) == (1, 0, facts["vocab_size"])
    split = write_split(tmp_path / "split", TEXTS)
    (tmp_path / "shards").mkdir()
    write_shards(ShardsRecipe(context=16), split, out, tmp_path / "shards")
    decoded = [taken.decode(ids) for ids in read_documents(tmp_path / "shards").values()]
    assert sorted(decoded) == sorted(TEXTS)


def test_a_tokenizer_that_cannot_be_taken_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no tokenizer\.json at .*absent"):
        take_tokenizer(tmp_path / "absent", tmp_path)
    with pytest.raises(ModelError, match="not byte-level") as caught:
        take_tokenizer(foreign(tmp_path / "words", byte_level=False), tmp_path)
    assert "byte-level" in str(caught.value.hint)
