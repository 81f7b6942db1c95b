"""Bits per byte of held-out text: the decoder beside an n-gram, a unigram, xz and zlib.

    bits per byte = (nats that a predictor needs for every token, eos included) / (bytes * ln 2)

All predictors are treated alike. They pay for the same documents, each to its end: token models
for eos, compressors for one zero byte. None pays for where a document begins. The divisor is the
UTF-8 bytes of the texts alone, so vocabularies of any size compare. The decoder reads sliding
windows (`train/windows.py`): every token once, with at least half a window before it.
The n-gram and xz get the same training text. The decoder's tokens are also the n-gram's.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from marrow.core.errors import ModelError
from marrow.core.files import atomic_file
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.kernels.attention.attention import attention, pack
from marrow.kernels.device import choose_dtype
from marrow.kernels.losses.linear_log_probs import linear_log_probs
from marrow.models import huggingface
from marrow.models.decoder import Decoder
from marrow.text.tokenizer import Tokenizer
from marrow.train.compressors import xz_bytes_given, zlib_bytes
from marrow.train.evaluate_config import EvaluateRecipe
from marrow.train.heldout import HELDOUT, TRAIN, HeldOut, Texts, tokens_of
from marrow.train.ngram import NgramModel
from marrow.train.windows import Batch, batch_of, rows_of, windows_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN_GROUPS = 3
SMALL_GROUP_BYTES = 1024  # smaller groups say little; they are in the file, not among worst and best

Floats = npt.NDArray[np.float64]


def evaluate(
    recipe: EvaluateRecipe,
    model: Path | Decoder,
    tokenizer_folder: Path,
    split_folder: Path,
    out: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model and its baselines; write out/evaluation.json.

    Args: model: a decoder, or a folder with config.json and model.safetensors; snapshots in its
        folder `snapshots` are compared on a part of the text. split_folder: train.parquet and
        heldout.parquet.
    Returns: the facts: bits_per_byte by predictor, the groups with the worst and the best, counts.
    Raises: DataError without held-out text; ModelError for a model that does not fit the
        tokenizer or gives no finite number.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    decoder = model if isinstance(model, Decoder) else huggingface.load(model, _dtype(recipe))
    texts = Texts.open(split_folder / HELDOUT, recipe.heldout_bytes)
    known = Texts.open(split_folder / TRAIN, recipe.baseline_bytes)
    with span("tokenise"):
        heldout = HeldOut.read(texts, tokenizer)
    baselines = _baselines(recipe, heldout, texts, known, tokenizer, progress)
    with span("model"):
        nats = decoder_nats(decoder, heldout, recipe, progress)
    ngram = f"ngram{recipe.ngram_order}"
    nats_by_document = {
        "model": heldout.nats_by_document(nats),
        ngram: heldout.nats_by_document(baselines.pop("ngram_nats")),
    }
    bits_per_byte = {name: _bits(each.sum(), heldout.num_bytes) for name, each in nats_by_document.items()}
    groups = _by_group(heldout, nats_by_document)
    shown = [group for group in groups if group["num_bytes"] >= SMALL_GROUP_BYTES] or groups
    context, stride = _context(recipe, decoder)
    facts = {
        "bits_per_byte": bits_per_byte | baselines,
        "worst": shown[:SHOWN_GROUPS],
        "best": shown[: -SHOWN_GROUPS - 1 : -1],
        "num_bytes": heldout.num_bytes,
        "num_tokens": heldout.num_predicted,
        "num_documents": len(heldout.groups),
        "heldout_every": texts.every,
        "baseline_bytes": known.num_bytes,
        "context": context,
        "stride": stride,
        "dtype": str(decoder.embedding_VC.dtype).removeprefix("torch."),
    }
    if isinstance(model, Path) and recipe.snapshot_bytes:
        with span("snapshots"):
            facts["snapshots"] = evaluate_snapshots(recipe, decoder, model, tokenizer, split_folder)
    with atomic_file(out / "evaluation.json", "w") as file:
        json.dump(facts | {"groups": groups}, file, indent=2)
    return facts


def evaluate_snapshots(
    recipe: EvaluateRecipe, decoder: Decoder, model_folder: Path, tokenizer: Tokenizer, split_folder: Path
) -> list[dict[str, Any]]:
    """Measure each of model_folder/snapshots/*.safetensors and the final weights on a part of the text.

    Args: decoder: made from the same folder; its weights are replaced, by the final ones at last.
    Returns: {"name", "bits_per_byte"} of each, by name, the final weights ("final") last; all on
        the same `recipe.snapshot_bytes` of text. Empty if the folder has no snapshots.
    """
    paths = sorted((model_folder / "snapshots").glob("*.safetensors"))
    if not paths:
        return []
    texts = Texts.open(split_folder / HELDOUT, min(recipe.snapshot_bytes, recipe.heldout_bytes))
    heldout = HeldOut.read(texts, tokenizer)
    found = []
    for path in [*paths, model_folder / huggingface.WEIGHTS]:
        huggingface.load_weights(decoder, path)
        nats = decoder_nats(decoder, heldout, recipe)
        name = "final" if path.name == huggingface.WEIGHTS else path.stem
        found.append({"name": name, "bits_per_byte": _bits(nats.sum(), heldout.num_bytes)})
    return found


def train_ngram(
    recipe: EvaluateRecipe, tokenizer: Tokenizer, split_folder: Path, *, order: int | None = None
) -> NgramModel:
    """Train the baseline n-gram on the split's training text, as `evaluate` does.

    Cost: about 3 CPU-seconds for 12 MB.
    """
    known = Texts.open(split_folder / TRAIN, recipe.baseline_bytes)
    return _ngram(tokens_of(known, tokenizer), order or recipe.ngram_order, tokenizer)


def decoder_nats(
    decoder: Decoder, heldout: HeldOut, recipe: EvaluateRecipe, progress: Progress = silent
) -> Floats:
    """Return the nats that the decoder needs for each token.

    Returns: float64 [N], >= 0; 0 at each bos, which is given.
    Raises: ModelError if the vocabulary is too small or a number is not finite.
    Cost: context / stride forward passes over the text; the head runs once a token.
    """
    top = int(heldout.tokens_N.max())
    if top >= decoder.config.vocab_size:
        raise ModelError(
            f"token {top} does not fit the model's vocabulary of {decoder.config.vocab_size}",
            hint="the model was trained with another tokenizer",
        )
    context, stride = _context(recipe, decoder)
    lengths = np.diff(heldout.starts_D).tolist()
    windows = [
        window
        for start, length in zip(heldout.starts_D[:-1].tolist(), lengths, strict=True)
        for window in windows_of(start, length, context, stride)
    ]
    row_tokens = max((window.length for window in windows), default=1)
    rows = rows_of(windows, row_tokens)
    nats_N = np.zeros(len(heldout.tokens_N))
    done = 0
    batch_rows = max(1, recipe.batch_tokens // row_tokens)
    for first in range(0, len(rows), batch_rows):
        batch = batch_of(rows[first : first + batch_rows], heldout.tokens_N, row_tokens)
        nats_N[batch.target_N] = _score(decoder, batch, heldout.tokens_N[batch.target_N], row_tokens)
        done += len(batch.target_N)
        progress(done, heldout.num_predicted, "tokens", {"scoring": "model"})
    if not np.isfinite(nats_N).all():
        raise ModelError("the model gives a loss that is no finite number", hint="its training went wrong")
    return nats_N


@torch.inference_mode()
def _score(decoder: Decoder, batch: Batch, targets_N: npt.NDArray[np.int64], row_tokens: int) -> Floats:
    """Return the nats of each scored token of a batch."""
    device = decoder.embedding_VC.device

    def tensor(array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    packing = pack(tensor(batch.document_BT), row_tokens)
    hidden_BTC = decoder(
        tensor(batch.tokens_BT),
        tensor(batch.position_BT),
        lambda layer, q_NHD, k_NKD, v_NKD: attention(
            q_NHD, k_NKD, v_NKD, packing, window=decoder.config.window(layer)
        ),
    )
    hidden_NC, target_N = hidden_BTC[tensor(batch.scored_N)], tensor(targets_N)
    log_probs_N, _ = linear_log_probs(hidden_NC, decoder.output_weight, target_N)
    nats_N: Floats = -log_probs_N.double().cpu().numpy()
    return nats_N


def _baselines(
    recipe: EvaluateRecipe,
    heldout: HeldOut,
    texts: Texts,
    known: Texts,
    tokenizer: Tokenizer,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the baselines: bits per byte, and under "ngram_nats" the n-gram's nats per token."""
    total = heldout.num_predicted
    found: dict[str, Any] = {}
    progress(0, total, "tokens", {"scoring": f"{recipe.ngram_order}-gram"})
    with span("ngram"):
        tokens_N = tokens_of(known, tokenizer)
        found["ngram_nats"] = -_ngram(tokens_N, recipe.ngram_order, tokenizer).log_probabilities(
            heldout.tokens_N
        )
        unigram = _ngram(tokens_N, 1, tokenizer).log_probabilities(heldout.tokens_N)
        found["unigram"] = _bits(-unigram.sum(), heldout.num_bytes)
    progress(0, total, "tokens", {"scoring": "xz"})
    with span("xz"):
        both_bytes = known.num_bytes + known.num_documents + texts.num_bytes + texts.num_documents
        xz = xz_bytes_given(known.__iter__, texts.__iter__, both_bytes)
        found["xz"] = xz * 8 / heldout.num_bytes
        found["zlib"] = zlib_bytes(texts) * 8 / heldout.num_bytes
    return found


def _ngram(tokens_N: npt.NDArray[np.integer], order: int, tokenizer: Tokenizer) -> NgramModel:
    return NgramModel.train(tokens_N, order=order, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id)


def _dtype(recipe: EvaluateRecipe) -> torch.dtype:
    return choose_dtype().dtype if recipe.dtype == "auto" else DTYPES[recipe.dtype]


def _context(recipe: EvaluateRecipe, decoder: Decoder) -> tuple[int, int]:
    context = recipe.context or decoder.config.max_positions
    return context, min(recipe.stride or max(1, context // 2), context)


def _bits(nats: float, num_bytes: int) -> float:
    return float(nats) / (num_bytes * math.log(2))


def _by_group(heldout: HeldOut, nats: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """Return each group's bytes and bits per byte, worst for the model first."""
    names = sorted(set(heldout.groups))
    index = {name: i for i, name in enumerate(names)}
    of_document = np.array([index[name] for name in heldout.groups])
    bytes_G = np.bincount(of_document, heldout.bytes_D, len(names))
    sums = {predictor: np.bincount(of_document, each, len(names)) for predictor, each in nats.items()}
    groups = [
        {"group": name, "num_bytes": int(bytes_G[i])}
        | {predictor: _bits(each[i], int(bytes_G[i])) for predictor, each in sums.items()}
        for i, name in enumerate(names)
        if bytes_G[i]
    ]
    return sorted(groups, key=lambda group: (-group["model"], group["group"]))
