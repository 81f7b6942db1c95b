"""The engine draws what the reference draws, whatever happens around it, and loses no block."""

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marrow.core.errors import ModelError, RequestError, ResourceError, ServeError
from marrow.core.records import Completion, Sampling
from marrow.models import huggingface
from marrow.serve.config import ServeRecipe
from marrow.serve.engine import Engine
from marrow.serve.sequence import Request
from marrow.text.tokenizer import Tokenizer

GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)


def random_prompts(count: int, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Return prompts of which half share a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(64, 330) for _ in range(40)]
    return [
        shared[: rng.randrange(0, 40) if i % 2 else 0]
        + [rng.randrange(64, 330) for _ in range(rng.randrange(1, longest))]
        for i in range(count)
    ]


def reference(folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """Let transformers draw greedily, recomputing all at each token."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def ids_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_equals_transformers_under_concurrency_preemption_and_sharing(
    family: str, request: pytest.FixtureRequest, start: Callable[..., Engine]
) -> None:
    folder: Path = request.getfixturevalue(family)
    prompts = random_prompts(12)
    expected = [tuple(reference(folder, prompt, 12)) for prompt in prompts]
    engine = start(folder, kv_memory=16 * 16 * 256)  # 15 blocks of 16 tokens, 256 bytes each
    assert ids_of(engine.generate(prompts, GREEDY)) == expected
    assert ids_of(engine.generate(prompts, GREEDY)) == expected  # now with hits in the prefix cache
    engine.check()
    metrics = engine.metrics
    assert metrics.preemptions > 0 and metrics.shared_tokens > 0 and metrics.evictions > 0


@pytest.mark.parametrize("sampling", [Sampling(12, seed=5), Sampling(12, 0.7, 20, 0.9, seed=6), GREEDY])
def test_a_request_draws_the_same_alone_and_in_a_full_batch(
    sampling: Sampling, llama: Path, start: Callable[..., Engine]
) -> None:
    prompts = random_prompts(16)
    engine = start(llama, prefix_cache=False)
    alone = [engine.submit(Request(tuple(prompt), sampling)).result() for prompt in prompts]
    together = start(llama, kv_memory=20 * 16 * 256).generate(prompts, sampling)
    assert ids_of(alone) == ids_of(together)
    assert [c.text for c in alone] == [c.text for c in together]


def test_random_traffic_with_aborts_leaks_nothing(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama, kv_memory=14 * 16 * 256, max_waiting=400)
    rng = random.Random(3)
    streams = []
    for number, prompt in enumerate(random_prompts(320, longest=30)):
        sampling = Sampling(rng.randrange(1, 10), seed=number, ignore_eos=True)
        stream = engine.submit(Request(tuple(prompt), sampling))
        streams.append(stream)
        if rng.random() < 0.3:
            rng.choice(streams).abort()
        if number % 40 == 0:
            engine.check()
    reasons = [stream.result().finish_reason for stream in streams]
    assert set(reasons) == {"length", "abort"}
    engine.check()
    assert engine.metrics.preemptions > 0
    assert engine.metrics.ended == 320
    assert engine._stepper._scheduler.blocks.num_used == 0


def test_an_abort_frees_the_blocks_before_the_next_step(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    stream = engine.submit(Request((70,) * 40, Sampling(2000, ignore_eos=True)))
    next(iter(stream))
    stream.abort()
    steps = engine.metrics.steps
    engine.check()  # posted after the abort, so it runs after it
    assert engine._stepper._scheduler.is_idle and engine._stepper._scheduler.blocks.num_used == 0
    assert engine.metrics.steps <= steps + 1
    assert stream.result().finish_reason == "abort"


def test_the_ledger_of_a_request_adds_up_to_its_time(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama, kv_memory=9 * 16 * 256, max_sequences=4)
    begin = time.perf_counter()
    streams = [engine.submit(Request(tuple(p), GREEDY)) for p in random_prompts(12)]
    done = [stream.result() for stream in streams]
    wall = time.perf_counter() - begin
    stages = {stage for completion in done for stage in completion.ledger}
    assert stages == {"queue", "prefill", "decode", "preempted"}
    sums = [sum(completion.ledger.values()) for completion in done]
    assert max(sums) <= wall
    assert max(sums) >= 0.8 * wall  # the last one was there nearly all the time
    assert engine.metrics.e2e_s.total == pytest.approx(sum(sums), rel=1e-6)


def test_the_engine_thread_knows_where_its_time_went(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    engine.generate(random_prompts(8), GREEDY)
    summary = engine.ledger()
    assert {"schedule", "forward", "draw", "detokenize", "deliver"} <= set(summary.parts)
    assert sum(part.seconds for part in summary.parts.values()) == pytest.approx(summary.wall_s)


def test_pieces_of_text_make_the_whole_text(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    stream = engine.submit(Request(tuple(engine.encode("def größer")), Sampling(60, seed=1)))
    deltas = list(stream)
    ids = [token for delta in deltas for token in delta.token_ids]
    assert "".join(delta.text for delta in deltas) == engine.tokenizer.decode(ids)
    assert stream.completion.token_ids == tuple(ids)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_stop_strings_end_the_text_before_them(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    sampling = Sampling(60, seed=2, ignore_eos=True)
    prompt = "return self"
    [whole] = engine.generate([prompt], sampling)
    stop = whole.text[10:13]
    [cut] = engine.generate([prompt], dataclasses.replace(sampling, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_the_end_token_ends_the_text_unless_ignored(
    llama: Path, tmp_path: Path, start: Callable[..., Engine]
) -> None:
    """Zeroed weights make all logits equal; greedy then takes token 0, made an end token here."""
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    engine = start(tmp_path)
    [ended] = engine.generate([[70]], Sampling(3, temperature=0))
    assert (ended.token_ids, ended.finish_reason, ended.text) == ((0,), "stop", "")
    [ignored] = engine.generate([[70]], Sampling(3, temperature=0, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == ((0, 0, 0), "length")


@pytest.mark.slow
def test_log_probabilities_are_those_of_transformers(llama: Path, start: Callable[..., Engine]) -> None:
    transformers = pytest.importorskip("transformers")
    [prompt] = random_prompts(1, longest=100, seed=9)
    engine = start(llama, max_batch_tokens=8)  # the prompt is computed in several chunks
    request = Request(tuple(prompt), GREEDY, num_logprobs=3, prompt_logprobs=True)
    deltas = list(engine.submit(request))
    scores = [s for d in deltas for s in (*d.prompt_logprobs, *d.logprobs)]
    ids = prompt + [token for delta in deltas for token in delta.token_ids]
    assert [score.token_id for score in scores] == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.inference_mode():
        expected_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert scores[0].logprob is None
    for at, score in enumerate(scores[1:]):
        # fp32 through two layers: 1e-4 is about ten times the rounding seen.
        assert score.logprob == pytest.approx(float(expected_TV[at, score.token_id]), abs=1e-4)
        assert [value for _, value in score.top] == pytest.approx(
            expected_TV[at].topk(3).values.tolist(), abs=1e-4
        )


def test_no_token_is_asked_for_and_none_is_drawn(llama: Path, start: Callable[..., Engine]) -> None:
    [completion] = start(llama).generate([[70, 71]], Sampling(max_tokens=0))
    assert (completion.token_ids, completion.finish_reason) == ((), "length")


def test_new_weights_take_over_between_two_steps(
    llama: Path, other_weights: Path, start: Callable[..., Engine]
) -> None:
    prompts = random_prompts(4)
    engine = start(llama)
    before = engine.generate(prompts, GREEDY)
    expected = start(other_weights).generate(prompts, GREEDY)
    running = engine.submit(Request(tuple(prompts[0]), dataclasses.replace(GREEDY, max_tokens=100)))
    next(iter(running))
    engine.update_weights(other_weights / "model.safetensors")
    engine.check()
    assert ids_of(engine.generate(prompts, GREEDY)) == ids_of(expected) != ids_of(before)
    assert len(running.result().token_ids) == 100


def test_weights_that_do_not_fit_leave_the_old_ones(
    llama: Path, qwen3: Path, start: Callable[..., Engine]
) -> None:
    prompts = random_prompts(3)
    engine = start(llama)
    before = engine.generate(prompts, GREEDY)
    with pytest.raises(ModelError):
        engine.update_weights(qwen3 / "model.safetensors")
    assert ids_of(engine.generate(prompts, GREEDY)) == ids_of(before)


def test_a_request_that_turns_to_nan_fails_alone_and_taints_no_block(
    llama: Path, tmp_path: Path, start: Callable[..., Engine]
) -> None:
    """Token 100's embedding is NaN, so whoever sends it gets NaN keys and values into the cache."""
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][100] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    engine = start(tmp_path, kv_memory=12 * 16 * 256)
    # Short ones first: they leave most of the block that they inherit as they found it.
    short = [[70], [71, 72], [73, 74, 75]]
    good = short + [[token if token != 100 else 101 for token in prompt] for prompt in random_prompts(6)]
    expected = engine.generate(good, GREEDY)
    for _ in range(6):
        bad = engine.submit(Request((100, *range(64, 96)), GREEDY))  # all 33 tokens see the NaN
        with pytest.raises(ServeError, match="finite"):
            bad.result()
        assert ids_of(engine.generate(good, GREEDY)) == ids_of(expected)
    engine.check()
    assert engine.metrics.finished["error"] == 6


class Fragile(torch.nn.Module):
    """A decoder that raises on token 100, as a kernel bug would."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.inner = decoder
        self.config = decoder.config
        self.embedding_VC = decoder.embedding_VC
        self.fatal = False

    def forward(self, tokens_N: torch.Tensor, positions_N: torch.Tensor, attend: object) -> torch.Tensor:
        if self.fatal:
            raise SystemExit("the thread is killed")
        if bool((tokens_N == 100).any()):
            raise RuntimeError("out of luck")
        return self.inner(tokens_N, positions_N, attend)

    def logits(self, hidden_NC: torch.Tensor) -> torch.Tensor:
        return self.inner.logits(hidden_NC)


def fragile_engine(folder: Path, recipe: ServeRecipe) -> tuple[Engine, Fragile]:
    fragile = Fragile(huggingface.load(folder))
    return Engine(fragile, Tokenizer.load(folder), recipe), fragile  # type: ignore[arg-type]


def test_a_step_that_raises_costs_only_the_request_that_caused_it(llama: Path) -> None:
    engine, _ = fragile_engine(llama, ServeRecipe(dtype="fp32", kv_memory=1 << 20))
    with engine:
        good = [Request((70 + i, 71, 72), GREEDY) for i in range(4)]
        # None of these texts may draw token 100 itself, or the comparison would be empty.
        expected = [engine.submit(request).result() for request in good]
        streams = engine.submit_all([*good[:2], Request((70, 100), GREEDY), *good[2:]])
        with pytest.raises(ServeError, match="out of luck"):
            streams.pop(2).result()
        assert ids_of([stream.result() for stream in streams]) == ids_of(expected)
        engine.check()
        assert engine.metrics.failed_steps >= 1


def test_a_dead_engine_tells_everybody(llama: Path) -> None:
    engine, fragile = fragile_engine(llama, ServeRecipe(dtype="fp32", kv_memory=1 << 20))
    stream = engine.submit(Request((70,), dataclasses.replace(GREEDY, max_tokens=2000)))
    next(iter(stream))
    fragile.fatal = True
    with pytest.raises(ServeError, match="died"):
        stream.result()
    with pytest.raises(ServeError, match="died"):
        engine.submit(Request((70,), GREEDY))
    assert not engine.is_ready
    engine.close()


def test_a_request_past_its_deadline_fails_and_frees_its_blocks(
    llama: Path, start: Callable[..., Engine]
) -> None:
    engine = start(llama)
    slow = engine.submit(Request((70,), dataclasses.replace(GREEDY, max_tokens=2000)), deadline_s=0.01)
    with pytest.raises(RequestError, match="no end after") as failure:
        slow.result()
    assert failure.value.status == 504
    engine.check()
    assert engine._stepper._scheduler.is_idle


def test_the_queue_is_bounded_and_says_so(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama, max_sequences=2, max_waiting=3)
    request = Request((70,), dataclasses.replace(GREEDY, max_tokens=2000))
    streams = [engine.submit(request) for _ in range(5)]
    with pytest.raises(RequestError, match="queue is full") as refusal:
        engine.submit(request)
    assert refusal.value.status == 429
    for stream in streams:
        stream.abort()
        assert stream.result().finish_reason == "abort"
    engine.check()
    assert engine.submit(dataclasses.replace(request, sampling=GREEDY)).result().finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ((), GREEDY, "prompt"),
        ((10_000,), GREEDY, "prompt"),
        ((-1,), GREEDY, "prompt"),
        ((70,) * 2040, GREEDY, "max_tokens"),
        ((70,) * 2048, GREEDY, "prompt"),
        ((70,), Sampling(temperature=-0.1), "temperature"),
        ((70,), Sampling(temperature=float("nan")), "temperature"),
        ((70,), Sampling(top_p=0.0), "top_p"),
        ((70,), Sampling(top_p=1.1), "top_p"),
        ((70,), Sampling(top_k=-1), "top_k"),
        ((70,), Sampling(max_tokens=-1), "max_tokens"),
        ((70,), Sampling(stop=("",)), "stop"),
        ((70,), Sampling(stop=tuple("abcdefghijklmnopq")), "stop"),
    ],
)
def test_what_can_never_run_is_refused(
    prompt: tuple[int, ...], sampling: Sampling, param: str, llama: Path, start: Callable[..., Engine]
) -> None:
    with pytest.raises(RequestError) as refusal:
        start(llama).submit(Request(prompt, sampling))
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_a_request_larger_than_the_cache_is_refused(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama, kv_memory=4 * 16 * 256)  # three blocks
    assert engine.generate([[70] * 37], GREEDY)[0].finish_reason == "length"  # 48 computed, the 49th drawn
    with pytest.raises(RequestError, match="KV cache"):
        engine.submit(Request((70,) * 38, GREEDY))


def test_too_little_memory_for_one_block_is_told(llama: Path) -> None:
    with pytest.raises(ResourceError, match="kv_memory"):
        Engine.load(llama, ServeRecipe(kv_memory=4096, dtype="fp32"))


def test_drain_lets_the_running_end_and_refuses_the_new(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    stream = engine.submit(Request((70,), dataclasses.replace(GREEDY, max_tokens=100)))
    assert engine.drain(20)
    assert stream.result().finish_reason == "length"
    with pytest.raises(RequestError, match="shutting down") as refusal:
        engine.submit(Request((70,), GREEDY))
    assert refusal.value.status == 503


def test_drain_aborts_what_is_left_at_the_deadline(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    stream = engine.submit(Request((70,), dataclasses.replace(GREEDY, max_tokens=2000)))
    assert not engine.drain(0.0)
    assert stream.result().finish_reason == "abort"


def test_close_ends_everything_and_twice_is_fine(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    streams = [engine.submit(Request((70,), dataclasses.replace(GREEDY, max_tokens=2000))) for _ in range(20)]
    engine.close()
    engine.close()
    assert {stream.result().finish_reason for stream in streams} == {"abort"}
    assert not [t for t in threading.enumerate() if t is engine._thread]


def test_an_event_loop_reads_many_streams_at_once(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    prompts = random_prompts(10)

    async def read(prompt: list[int]) -> Completion:
        stream = engine.submit(Request(tuple(prompt), GREEDY), loop=asyncio.get_running_loop())
        async for _ in stream:
            pass
        return stream.completion

    async def all_of_them() -> list[Completion]:
        return await asyncio.gather(*map(read, prompts))

    assert ids_of(asyncio.run(all_of_them())) == ids_of(engine.generate(prompts, GREEDY))


def test_readers_whose_loop_is_gone_do_not_hold_blocks(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)

    async def leave() -> None:
        engine.submit(
            Request((70,), dataclasses.replace(GREEDY, max_tokens=2000)), loop=asyncio.get_running_loop()
        )

    asyncio.run(leave())
    until = time.monotonic() + 10
    while engine.metrics.ended == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    engine.check()


def test_a_probe_is_a_real_step_also_when_idle(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama)
    engine.probe().result(timeout=10)
    running = engine.submit(Request((70,), dataclasses.replace(GREEDY, max_tokens=100)))
    engine.probe().result(timeout=10)
    assert running.result().finish_reason == "length"


def test_bf16_runs_and_auto_chooses_one_of_the_two(llama: Path, start: Callable[..., Engine]) -> None:
    engine = start(llama, dtype="bf16")
    assert engine.dtype == torch.bfloat16
    assert len(engine.generate(random_prompts(4), GREEDY)) == 4
    assert start(llama, dtype="auto").dtype in (torch.float32, torch.bfloat16)
