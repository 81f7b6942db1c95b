"""One step at a time, by hand: budgets, deadlines, failures, and books that agree after each."""

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marrow.core.errors import RequestError, ServeError
from marrow.core.records import Sampling
from marrow.models import huggingface
from marrow.models.decoder import Decoder
from marrow.serve.config import ServeRecipe
from marrow.serve.sequence import Request, Sequence
from marrow.serve.stepper import Stepper
from marrow.serve.stream import Stream
from marrow.text.tokenizer import Tokenizer

RECIPE = ServeRecipe(dtype="fp32", block_size=4, max_batch_tokens=16, max_sequences=4, kv_memory=1 << 16)
GREEDY = Sampling(max_tokens=6, temperature=0, ignore_eos=True)


class Room:
    """A stepper, and who uses it."""

    def __init__(self, folder: Path, stop_ids: tuple[int, ...] = (), **changes: object) -> None:
        decoder, self.tokenizer = huggingface.load(folder), Tokenizer.load(folder)
        recipe = dataclasses.replace(RECIPE, **changes)  # type: ignore[arg-type]
        self.num_ended = 0
        self.decoder = decoder
        self.stepper = Stepper(decoder, self.tokenizer, recipe, stop_ids, self._note)
        self.sequences: list[Sequence] = []

    def _note(self) -> None:
        self.num_ended += 1

    def ask(
        self,
        prompt: list[int],
        sampling: Sampling = GREEDY,
        *,
        deadline_s: float = float("inf"),
        num_logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> Stream:
        request = Request(tuple(prompt), sampling, num_logprobs, prompt_logprobs)
        sequence = Sequence(len(self.sequences), request, 0, time.perf_counter(), deadline_s)
        self.sequences.append(sequence)
        stream = Stream(len(prompt), lambda: self.stepper.end(sequence, "abort"), None)
        self.stepper.add(sequence, stream)
        return stream

    def run(self) -> int:
        """Step until idle, the books checked after each; return how many steps it took."""
        count = 0
        while not self.stepper.is_idle:
            assert self.stepper.step(), "there was work"
            self.stepper.check()
            count += 1
            assert count < 2000
        assert not self.stepper.step(), "and now there is none"
        assert self.stepper.metrics.blocks_used == 0
        return count


@pytest.fixture
def room(llama: Path) -> Callable[..., Room]:
    return lambda *arguments, **changes: Room(llama, *arguments, **changes)


def prompt(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(64, 330) for _ in range(count)]


@pytest.mark.parametrize("budget", [4, 5, 16, 512])
@pytest.mark.parametrize("blocks", [17, 64])
def test_neither_budget_nor_memory_changes_what_is_drawn(
    room: Callable[..., Room], budget: int, blocks: int
) -> None:
    """17 blocks: a scratch block, and room for little more than one of the texts, so some are preempted."""
    prompts = [prompt(n, n) for n in (1, 7, 30, 12, 45)]
    alone = []
    for one in prompts:
        calm = room(max_batch_tokens=512)
        stream = calm.ask(one)
        calm.run()
        alone.append(stream.result().token_ids)
    tight = room(max_batch_tokens=budget, kv_memory=blocks * 4 * 256)
    streams = [tight.ask(one) for one in prompts]
    tight.run()
    assert [stream.result().token_ids for stream in streams] == alone
    assert tight.num_ended == len(prompts)


def test_a_step_computes_no_more_tokens_than_its_budget(room: Callable[..., Room]) -> None:
    crowd = room(max_batch_tokens=5, max_sequences=3)
    for seed in range(5):
        crowd.ask(prompt(11, seed))
    before = 0
    while not crowd.stepper.is_idle:
        crowd.stepper.step()
        now = crowd.stepper.metrics.computed_tokens
        assert 0 < now - before <= 5
        assert crowd.stepper.metrics.running <= 3
        before = now
    # Each prompt once, and each drawn token but the last, which nothing follows.
    assert before == 5 * (11 + GREEDY.max_tokens - 1)


def test_the_figures_count_what_was_asked_and_drawn(room: Callable[..., Room]) -> None:
    shared = prompt(16)
    one = room(max_batch_tokens=512)
    first = one.ask([*shared, 70])
    one.run()
    second = one.ask([*shared, 71])
    one.run()
    metrics = one.stepper.metrics
    assert (metrics.prompt_tokens, metrics.drawn_tokens) == (34, 12)
    assert first.result().prompt_tokens == 17
    assert second.result() and second.last is not None and second.last.num_shared == 16
    assert metrics.shared_tokens == 16 and metrics.finished["length"] == 2


def test_a_ledger_charges_every_moment_to_one_stage(room: Callable[..., Room]) -> None:
    tight = room(kv_memory=14 * 4 * 256)
    streams = [tight.ask(prompt(20, seed), dataclasses.replace(GREEDY, max_tokens=24)) for seed in range(3)]
    tight.run()
    took_s = time.perf_counter() - tight.sequences[0].arrived_s
    assert tight.stepper.metrics.preemptions > 0, "or the test shows less than it says"
    for stream in streams:
        ledger = stream.result().ledger
        assert set(ledger) <= {"queue", "prefill", "decode", "preempted"}
        assert 0 < sum(ledger.values()) <= took_s
    assert any("preempted" in stream.completion.ledger for stream in streams)


def test_who_is_past_the_deadline_is_told_and_the_rest_go_on(room: Callable[..., Room]) -> None:
    one = room()
    late, calm = one.ask(prompt(8), deadline_s=0.0), one.ask(prompt(9))
    one.run()
    with pytest.raises(RequestError, match="no end after") as caught:
        late.result()
    assert caught.value.status == 504
    assert calm.result().finish_reason == "length"
    assert one.num_ended == 2 and one.stepper.metrics.finished["error"] == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_an_abort_at_any_step_frees_everything_and_twice_is_once(
    room: Callable[..., Room], steps: int
) -> None:
    one = room(max_batch_tokens=4, max_sequences=4)
    stream, other = one.ask(prompt(9)), one.ask(prompt(5, 1))
    for _ in range(steps):
        one.stepper.step()
    stream.abort()
    stream.abort()
    one.stepper.check()
    one.run()
    assert stream.result().finish_reason == "abort" and len(stream.completion.token_ids) <= steps
    assert len(other.result().token_ids) == GREEDY.max_tokens
    assert one.num_ended == 2


def test_all_are_told_when_all_ends(room: Callable[..., Room]) -> None:
    one = room(max_sequences=2)
    running = [one.ask(prompt(6, seed)) for seed in range(4)]
    one.stepper.step()
    one.stepper.end_all()
    assert [stream.result().finish_reason for stream in running] == ["abort"] * 4
    failing = [one.ask(prompt(6, seed)) for seed in range(2)]
    one.stepper.end_all(ServeError("the machine is on fire"))
    for stream in failing:
        with pytest.raises(ServeError, match="on fire"):
            stream.result()
    one.stepper.check()
    assert one.stepper.is_idle and one.num_ended == 6


def test_a_stop_token_ends_the_text_unless_it_is_ignored(room: Callable[..., Room]) -> None:
    first = room()
    stream = first.ask(prompt(8))
    first.run()
    drawn = stream.result().token_ids
    stop = drawn[2]
    ending, ignoring = dataclasses.replace(GREEDY, ignore_eos=False), GREEDY
    second = room((stop,))
    streams = [second.ask(prompt(8), sampling) for sampling in (ending, ignoring)]
    second.run()
    until = drawn.index(stop) + 1
    assert streams[0].result().token_ids == drawn[:until] and streams[0].completion.finish_reason == "stop"
    assert streams[1].result().token_ids == drawn and streams[1].completion.finish_reason == "length"
    assert streams[0].completion.text == second.tokenizer.decode(list(drawn[: until - 1]))


def test_tokens_of_a_prompt_are_scored_once_however_it_is_cut(room: Callable[..., Room]) -> None:
    text = prompt(21)
    told = []
    for budget in (512, 4, 7):
        one = room(max_batch_tokens=budget, max_sequences=4)
        stream = one.ask(
            text, dataclasses.replace(GREEDY, max_tokens=0), num_logprobs=2, prompt_logprobs=True
        )
        one.run()
        told.append([score for delta in stream for score in delta.prompt_logprobs])
        assert stream.completion.token_ids == ()
    assert [score.token_id for score in told[0]] == text
    assert told[0][0].logprob is None and all(len(score.top) == 2 for score in told[0][1:])
    for other in told[1:]:
        assert [score.token_id for score in other] == text
        expected = [score.logprob for score in told[0][1:]]
        assert [score.logprob for score in other[1:]] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_greedy_draws_the_likeliest_and_says_how_likely(room: Callable[..., Room]) -> None:
    one = room()
    stream = one.ask(prompt(8), num_logprobs=3)
    one.run()
    scores = [score for delta in stream for score in delta.logprobs]
    assert len(scores) == GREEDY.max_tokens
    for score in scores:
        assert score.top[0] == (score.token_id, score.logprob)
        assert [value for _, value in score.top] == sorted((value for _, value in score.top), reverse=True)


def test_rows_of_the_model_that_are_no_token_are_never_drawn(llama: Path) -> None:
    """A vocabulary is often padded to a round number, and those rows may hold anything."""
    one = Room(llama)
    real = one.tokenizer.vocab_size
    config = dataclasses.replace(one.decoder.config, vocab_size=real + 8)
    padded = Decoder(config, seed=0)
    with torch.no_grad():
        padded.embedding_VC[real:] *= 1e3
        for name, parameter in padded.named_parameters():
            if parameter.shape == padded.embedding_VC.shape and name != "embedding_VC":
                parameter[real:] *= 1e3
    ended: list[None] = []
    stepper = Stepper(padded, one.tokenizer, RECIPE, (), lambda: ended.append(None))
    streams = []
    for number in range(4):
        request = Request(
            (70 + number,), Sampling(max_tokens=8, temperature=1.0, seed=number, ignore_eos=True)
        )
        stream = Stream(1, lambda: None, None)
        stepper.add(Sequence(number, request, number, time.perf_counter()), stream)
        streams.append(stream)
    while stepper.step():
        pass
    assert len(ended) == 4
    assert all(token < real for stream in streams for token in stream.result().token_ids)


def test_a_step_that_fails_twice_ends_only_who_made_it_fail(
    room: Callable[..., Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = room()
    expected = [calm.ask(prompt(5, seed)) for seed in (1, 2)]
    calm.run()
    one = room()
    forward = one.decoder.forward

    def out_of_memory(tokens_N: torch.Tensor, *rest: object) -> object:
        if bool((tokens_N == 333).any()):
            raise MemoryError("no room for 1 GiB")
        return forward(tokens_N, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(one.decoder, "forward", out_of_memory)
    good = [one.ask(prompt(5, 1)), one.ask(prompt(5, 2))]
    bad = one.ask([*prompt(4), 333])
    one.run()
    with pytest.raises(ServeError, match="no room for 1 GiB") as caught:
        bad.result()
    assert isinstance(caught.value.__cause__, MemoryError)
    assert [s.result().token_ids for s in good] == [s.result().token_ids for s in expected]
    assert one.stepper.metrics.failed_steps == 1


def test_new_weights_in_the_midst_forget_what_was_shared(
    room: Callable[..., Room], other_weights: Path
) -> None:
    one = room(max_batch_tokens=512)
    text = prompt(16)
    before = one.ask(text)
    one.run()
    running = one.ask(text)
    one.stepper.step()
    one.stepper.load_weights(other_weights / "model.safetensors")
    one.stepper.check()
    one.run()
    assert running.result().finish_reason == "length" and running.last is not None
    assert running.last.num_preemptions == 1
    after = one.ask(text)
    one.run()
    fresh = Room(other_weights)
    expected = fresh.ask(text)
    fresh.run()
    assert after.result().token_ids == expected.result().token_ids != before.result().token_ids
