"""Bits per byte: each predictor against its definition, written down token by token."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from marrow.core.errors import DataError, ModelError
from marrow.core.records import Sampling
from marrow.kernels.attention.attention import attention_reference, pack
from marrow.models import huggingface
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.text.tokenizer import Tokenizer
from marrow.train.completions import NgramGenerator, share_of_python
from marrow.train.compressors import xz_bytes_given, zlib_bytes
from marrow.train.evaluate import decoder_nats, evaluate, train_ngram
from marrow.train.evaluate_config import EvaluateRecipe
from marrow.train.heldout import HeldOut, Texts
from marrow.train.windows import windows_of

RECIPE = EvaluateRecipe(context=16, stride=8, batch_tokens=64, dtype="float32")


def source_text(seed: int, lines: int) -> str:
    rng = np.random.default_rng(seed)
    names = ["alpha", "beta", "gamma", "größe", "self.x"]
    return "".join(
        f"{names[rng.integers(5)]} = {names[rng.integers(5)]} + {rng.integers(100)}\n" for _ in range(lines)
    )


def write_split(folder: Path, name: str, documents: list[tuple[str, str]]) -> None:
    table = pa.table(
        {
            "text": pa.array([text for text, _ in documents], pa.string()),
            "group": pa.array([group for _, group in documents], pa.string()),
            "num_bytes": pa.array([len(text.encode()) for text, _ in documents], pa.int64()),
        }
    )
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=3)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    write_split(folder, "train", [(source_text(i, 40), f"t{i % 3}") for i in range(12)])
    heldout = [(source_text(100 + i, 2 + 2 * i), f"g{i % 3}") for i in range(7)]
    write_split(folder, "heldout", [*heldout, ("", "empty")])
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, split) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(Texts.open(split / "train.parquet", 1 << 30), 400).save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def heldout(split, tokenizer) -> HeldOut:
    return HeldOut.read(Texts.open(split / "heldout.parquet", 1 << 30), tokenizer)


def tiny(vocab_size: int, seed: int = 0) -> Decoder:
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        max_positions=32,
        initial_std=0.5,  # large enough that the predictions depend on the context
    )
    return Decoder(config, seed=seed)


@torch.no_grad()
def naive_nats(decoder: Decoder, heldout: HeldOut, context: int, stride: int) -> np.ndarray:
    """One forward pass per scored token, over its window up to it, through plain attention."""
    nats = np.zeros(len(heldout.tokens_N))
    tokens = torch.from_numpy(heldout.tokens_N)
    for start, stop in zip(heldout.starts_D[:-1], heldout.starts_D[1:], strict=True):
        for window in windows_of(int(start), int(stop - start), context, stride):
            for i in range(window.score_from, window.end):
                seen = tokens[window.start : i + 1]
                packing = pack(torch.zeros_like(seen), len(seen))
                hidden = decoder(
                    seen,
                    torch.arange(len(seen)),
                    lambda _, q, k, v, packing=packing: attention_reference(q, k, v, packing),
                )
                log_p = decoder.logits(hidden[-1:]).double().log_softmax(-1)
                nats[i + 1] = -log_p[0, tokens[i + 1]]
    return nats


@pytest.mark.parametrize(
    ("context", "stride"),
    [
        (16, 8),
        (16, 16),
        pytest.param(7, 1, marks=pytest.mark.slow),
        pytest.param(1000, 500, marks=pytest.mark.slow),
    ],
)
def test_every_token_costs_what_its_own_window_says(tokenizer, heldout, context, stride):
    decoder = tiny(tokenizer.vocab_size)
    recipe = replace(RECIPE, context=context, stride=stride)
    nats = decoder_nats(decoder, heldout, recipe)
    # fp32 sums in another order: measured 2e-6
    np.testing.assert_allclose(nats, naive_nats(decoder, heldout, context, stride), atol=2e-5)
    assert (nats[heldout.starts_D[:-1]] == 0).all()


def test_the_figure_does_not_depend_on_how_windows_are_batched(tokenizer, heldout):
    decoder = tiny(tokenizer.vocab_size)
    nats = [decoder_nats(decoder, heldout, replace(RECIPE, batch_tokens=n)) for n in (1, 64, 100_000)]
    np.testing.assert_allclose(nats[0], nats[1], atol=2e-5)
    np.testing.assert_allclose(nats[0], nats[2], atol=2e-5)


def test_a_model_that_knows_nothing_costs_log_vocabulary_per_token(tokenizer, heldout):
    decoder = tiny(tokenizer.vocab_size)
    with torch.no_grad():
        decoder.embedding_VC.zero_()
    nats = decoder_nats(decoder, heldout, RECIPE)
    assert nats.sum() == pytest.approx(heldout.num_predicted * math.log(tokenizer.vocab_size), rel=1e-6)


def test_heldout_documents_are_bos_tokens_eos_and_give_the_texts_back(split, tokenizer, heldout):
    texts = pq.read_table(split / "heldout.parquet")
    assert heldout.groups == tuple(texts["group"].to_pylist())
    assert heldout.bytes_D.tolist() == texts["num_bytes"].to_pylist()
    for i, text in enumerate(texts["text"].to_pylist()):
        tokens = heldout.tokens_N[heldout.starts_D[i] : heldout.starts_D[i + 1]].tolist()
        assert tokens[0] == tokenizer.bos_id
        assert tokens[-1] == tokenizer.eos_id
        assert tokenizer.decode(tokens[1:-1]) == text
    assert heldout.num_predicted == len(heldout.tokens_N) - len(texts)


@pytest.mark.parametrize("max_bytes", [1, 300, 1000, 10**6])
def test_long_files_are_thinned_to_every_kth_document(split, max_bytes):
    texts = Texts.open(split / "heldout.parquet", max_bytes)
    table = pq.read_table(split / "heldout.parquet")
    assert list(texts) == table["text"].to_pylist()[:: texts.every]
    assert texts.num_documents == len(list(texts))
    assert texts.num_bytes == sum(len(text.encode()) for text in texts)
    assert texts.every == math.ceil(sum(table["num_bytes"].to_pylist()) / max_bytes)


def test_the_facts_add_up(tmp_path, split, tokenizer_folder, tokenizer, heldout):
    model = tmp_path / "model"
    decoder = tiny(tokenizer.vocab_size)
    huggingface.save(model, decoder, tokenizer_folder)
    seen = []
    facts = evaluate(RECIPE, model, tokenizer_folder, split, tmp_path, lambda *report: seen.append(report))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert {name: written[name] for name in facts} == json.loads(json.dumps(facts))
    bits = facts["bits_per_byte"]
    assert set(bits) == {"model", "ngram5", "unigram", "xz", "zlib"}
    assert bits["ngram5"] < bits["unigram"]
    assert facts["num_bytes"] == sum(len(t.encode()) for t in Texts.open(split / "heldout.parquet", 1 << 30))
    known = Texts.open(split / "train.parquet", 1 << 30)
    asked = Texts.open(split / "heldout.parquet", 1 << 30)
    size = known.num_bytes + known.num_documents + asked.num_bytes + asked.num_documents
    xz_bytes = xz_bytes_given(known.__iter__, asked.__iter__, size)
    assert bits["xz"] == pytest.approx(8 * xz_bytes / facts["num_bytes"])
    assert bits["zlib"] == pytest.approx(8 * zlib_bytes(asked) / facts["num_bytes"])
    assert bits["xz"] < bits["zlib"]  # it has seen the training text
    total = decoder_nats(decoder, heldout, RECIPE).sum()
    assert bits["model"] == pytest.approx(total / math.log(2) / facts["num_bytes"], rel=1e-6)
    for predictor in ("model", "ngram5"):
        weighted = sum(group["num_bytes"] * group[predictor] for group in written["groups"])
        empty = 0.002 * facts["num_bytes"]  # the group without a byte has only an eos to pay
        assert weighted == pytest.approx(bits[predictor] * facts["num_bytes"], rel=0.02, abs=empty)
    assert [group["model"] for group in written["groups"]] == sorted(
        (group["model"] for group in written["groups"]), reverse=True
    )
    assert facts["worst"][0] == written["groups"][0]
    done, total_tokens, unit, _ = seen[-1]
    assert (done, total_tokens, unit) == (facts["num_tokens"], facts["num_tokens"], "tokens")


def test_evaluation_writes_the_same_bytes_twice(tmp_path, split, tokenizer_folder, tokenizer):
    decoder = tiny(tokenizer.vocab_size)
    for name in ("a", "b"):
        evaluate(RECIPE, decoder, tokenizer_folder, split, tmp_path / name)
    assert (tmp_path / "a/evaluation.json").read_bytes() == (tmp_path / "b/evaluation.json").read_bytes()


def test_snapshots_are_compared_with_the_final_weights_on_the_same_text(
    tmp_path, split, tokenizer_folder, tokenizer, heldout
):
    model = tmp_path / "model"
    (model / "snapshots").mkdir(parents=True)
    huggingface.save(model, tiny(tokenizer.vocab_size, seed=3), tokenizer_folder)
    for step, seed in ((0, 1), (500, 2)):
        decoder = tiny(tokenizer.vocab_size, seed=seed)
        huggingface.save_weights(model / "snapshots" / f"step-{step:06d}.safetensors", decoder)
    recipe = replace(RECIPE, snapshot_bytes=1 << 20)
    facts = evaluate(recipe, model, tokenizer_folder, split, tmp_path)
    by_name = {snapshot["name"]: snapshot["bits_per_byte"] for snapshot in facts["snapshots"]}
    assert list(by_name) == ["step-000000", "step-000500", "final"]
    assert by_name["final"] == facts["bits_per_byte"]["model"]
    alone = decoder_nats(tiny(tokenizer.vocab_size, seed=1), heldout, RECIPE).sum()
    assert by_name["step-000000"] == pytest.approx(alone / math.log(2) / heldout.num_bytes, rel=1e-6)


def test_bfloat16_changes_the_figure_by_less_than_a_hundredth(tokenizer, heldout):
    config = replace(tiny(tokenizer.vocab_size).config, initial_std=0.05)
    figures = [
        decoder_nats(Decoder(config, seed=0, dtype=dtype), heldout, RECIPE).sum()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert figures[0] != figures[1]
    assert figures[1] == pytest.approx(figures[0], rel=0.01)  # 8 bits of mantissa, averaged: measured 1e-4


def test_the_ngram_completes_prompts_the_same_way_twice(split, tokenizer):
    ngram = train_ngram(RECIPE, tokenizer, split)
    generator = NgramGenerator(ngram, tokenizer)
    prompts = ["alpha", "beta ="]
    sampling = Sampling(max_tokens=40, temperature=0.3)
    judged, completions = share_of_python(generator, prompts, sampling, samples=3)
    assert completions == share_of_python(generator, prompts, sampling, samples=3)[1]
    assert len(completions) == len(judged.parses) == 6
    assert judged.share > 0.5  # trained on nothing but assignments
    assert re.match(r" = \S+ [+] \d+\n", completions[0].text)
    for completion in completions:
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == ("length" if len(completion.token_ids) == 40 else "stop")


def test_a_split_without_heldout_text_is_refused_with_a_hint(tmp_path, split, tokenizer_folder, tokenizer):
    (tmp_path / "train.parquet").symlink_to(split / "train.parquet")
    write_split(tmp_path, "heldout", [("", "a")])
    with pytest.raises(DataError, match=r"no text to measure[\s\S]*hint: hold out a larger share"):
        evaluate(RECIPE, tiny(tokenizer.vocab_size), tokenizer_folder, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_vocabulary_is_refused(heldout):
    with pytest.raises(ModelError, match=r"does not fit the model's vocabulary of 100"):
        decoder_nats(tiny(100), heldout, RECIPE)


def test_a_model_that_gives_no_number_is_refused(tokenizer, heldout):
    decoder = tiny(tokenizer.vocab_size)
    with torch.no_grad():
        decoder.norm_C.fill_(math.nan)
    with pytest.raises(ModelError, match="no finite number"):
        decoder_nats(decoder, heldout, RECIPE)


def test_a_stride_that_would_skip_tokens_is_refused():
    with pytest.raises(ValueError, match="skips tokens"):
        EvaluateRecipe(context=8, stride=9)
