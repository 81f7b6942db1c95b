"""The runner computes what the decoder would over the whole text, however it is cut into chunks."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marrow.core.errors import ModelError, ResourceError
from marrow.core.records import Sampling
from marrow.models import huggingface
from marrow.serve.blocks import SCRATCH
from marrow.serve.config import ServeRecipe
from marrow.serve.runner import Runner, measure_dtype
from marrow.serve.scheduler import Chunk
from marrow.serve.sequence import Request, Sequence

RECIPE = ServeRecipe(dtype="fp32", block_size=4, kv_memory=1 << 18)
WEIGHTS = "model.safetensors"
BLOCK_BYTES = 4 * 2 * 2 * 2 * 8 * 4  # tokens, keys and values, layers, kv heads, head size, float32


def runner_of(folder: Path, **changes: object) -> Runner:
    return Runner(huggingface.load(folder), dataclasses.replace(RECIPE, **changes))  # type: ignore[arg-type]


def sequence(tokens: list[int], blocks: list[int]) -> Sequence:
    made = Sequence(0, Request(tuple(tokens), Sampling()), 0, 0.0)
    made.blocks = blocks
    return made


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(64, 330) for _ in range(count)]


@pytest.fixture
def runner(llama: Path) -> Runner:
    return runner_of(llama)


@pytest.fixture
def whole(runner: Runner) -> torch.Tensor:
    """The hidden rows of 23 tokens, computed at once in blocks 1 to 6."""
    text = sequence(tokens(23), [1, 2, 3, 4, 5, 6])
    return runner.forward([Chunk(text, 0, 23)])


@pytest.mark.parametrize("cuts", [[1, 22], [4, 8, 16], [3, 5, 6, 7, 21], list(range(1, 23))])
@pytest.mark.parametrize("blocks", [[7, 8, 9, 10, 11, 12], [30, 9, 21, 8, 40, 7]])
def test_any_cut_into_chunks_over_any_blocks_gives_the_same_rows(
    runner: Runner, whole: torch.Tensor, cuts: list[int], blocks: list[int]
) -> None:
    text = sequence(tokens(23), blocks)
    edges = [0, *cuts, 23]
    rows = [runner.forward([Chunk(text, low, high - low)]) for low, high in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-4, atol=1e-5)


def test_sequences_of_one_step_do_not_see_each_other(runner: Runner) -> None:
    texts = [sequence(tokens(n, n), list(range(1 + 5 * i, 6 + 5 * i))) for i, n in enumerate((1, 9, 17))]
    alone = [runner.forward([Chunk(text, 0, len(text.tokens))]) for text in texts]
    together = runner.forward([Chunk(text, 0, len(text.tokens)) for text in texts])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_shared_beginning_is_read_from_the_block_of_another(runner: Runner) -> None:
    beginning = tokens(8)
    first = sequence([*beginning, 100, 101], [1, 2, 3])
    runner.forward([Chunk(first, 0, 10)])
    second = sequence([*beginning, 200, 201], [1, 2, 9])
    expected = runner.forward([Chunk(sequence(second.tokens, [20, 21, 22]), 0, 10)])[8:]
    torch.testing.assert_close(runner.forward([Chunk(second, 8, 2)]), expected, rtol=1e-4, atol=1e-5)


def test_a_probe_touches_the_scratch_block_alone(runner: Runner, whole: torch.Tensor) -> None:
    text = sequence([*tokens(23), 99], [1, 2, 3, 4, 5, 6])
    before = runner.forward([Chunk(text, 23, 1)])
    for _ in range(3):
        runner.probe()
    assert torch.equal(runner.forward([Chunk(text, 23, 1)]), before)
    assert SCRATCH not in text.blocks


def test_what_a_block_holds_behind_a_sequence_is_not_seen(runner: Runner) -> None:
    """Such as what a failed request left there: NaN times a weight of 0 would be NaN."""
    long, short = sequence(tokens(7), [1, 2]), sequence(tokens(6, 1), [3, 4])
    runner.forward([Chunk(long, 0, 6), Chunk(short, 0, 5)])
    last = [Chunk(long, 6, 1), Chunk(short, 5, 1)]
    expected = runner.forward(last)
    for cache in (*runner._keys, *runner._values):
        cache[4, 2:] = float("nan")
    assert torch.equal(runner.forward(last), expected)


@pytest.mark.parametrize(("kv_memory", "num_blocks"), [(2, 2), (2.99, 2), (3, 3), (100, 100)])
def test_memory_is_cut_into_whole_blocks(llama: Path, kv_memory: float, num_blocks: int) -> None:
    assert runner_of(llama, kv_memory=int(kv_memory * BLOCK_BYTES)).num_blocks == num_blocks


@pytest.mark.parametrize("num_bytes", [1, BLOCK_BYTES, 2 * BLOCK_BYTES - 1])
def test_memory_without_a_block_to_use_is_refused_with_the_least_that_does(
    llama: Path, num_bytes: int
) -> None:
    with pytest.raises(ResourceError, match=f"kv_memory = {num_bytes} bytes") as caught:
        runner_of(llama, kv_memory=num_bytes)
    assert caught.value.hint is not None and str(2 * BLOCK_BYTES) in caught.value.hint


def test_other_weights_give_their_rows_and_back_again(
    runner: Runner, whole: torch.Tensor, llama: Path, other_weights: Path
) -> None:
    chunk = Chunk(sequence(tokens(23), [1, 2, 3, 4, 5, 6]), 0, 23)
    expected = runner_of(other_weights).forward([chunk])
    runner.load_weights(other_weights / WEIGHTS)
    assert torch.equal(runner.forward([chunk]), expected)
    assert not torch.allclose(expected, whole, rtol=0.1)
    runner.load_weights(llama / WEIGHTS)
    assert torch.equal(runner.forward([chunk]), whole)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def one_of_another_shape(path: Path) -> None:
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].contiguous()
    save_file(tensors, path)


def one_missing(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [cut_short, one_of_another_shape, one_missing, a_folder, Path.unlink])
def test_weights_that_cannot_be_taken_leave_every_old_one(
    runner: Runner, other_weights: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes((other_weights / WEIGHTS).read_bytes())
    spoil(path)
    before = [parameter.clone() for parameter in runner.decoder.parameters()]
    with pytest.raises(ModelError, match=WEIGHTS if spoil is not one_missing else "model.norm.weight"):
        runner.load_weights(path)
    assert all(map(torch.equal, runner.decoder.parameters(), before))


def test_logits_are_float32_whatever_the_weights_are(llama: Path) -> None:
    runner = runner_of(llama, dtype="bf16")
    hidden_NC = runner.forward([Chunk(sequence(tokens(3), [1]), 0, 3)])
    assert hidden_NC.dtype == torch.bfloat16 and runner.logits(hidden_NC).dtype == torch.float32


def test_the_type_is_one_of_two_and_weights_are_not_changed_by_the_measurement(llama: Path) -> None:
    decoder = huggingface.load(llama)
    before = [parameter.clone() for parameter in decoder.parameters()]
    assert measure_dtype(decoder, num_tokens=2, repeats=1) in (torch.float32, torch.bfloat16)
    assert all(map(torch.equal, decoder.parameters(), before))
