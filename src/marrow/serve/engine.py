"""The engine: a thread that owns sequences, blocks and weights, and gives each request its tokens.

    submit ---> commands ---> plan -> forward -> draw -> deliver ---> Stream
    (any thread)             '------- one step, engine thread ---'    (the caller's thread or loop)

Only the engine's thread touches state; others post commands that it takes between two steps. So
an abort frees blocks before the next step begins, and new weights never change within a step. A
request that fails (its logits are NaN, its text cannot be decoded) ends alone; if a whole step
fails, each sequence is tried alone, and only those that fail again end.
"""

import asyncio
import contextlib
import itertools
import json
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from marrow.core.errors import ModelError, RequestError, ServeError
from marrow.core.records import Completion, FinishReason, Sampling
from marrow.core.span import Ledger, LedgerSummary, span
from marrow.models import huggingface
from marrow.models.decoder import Decoder
from marrow.serve.blocks import BlockManager
from marrow.serve.config import ServeRecipe
from marrow.serve.metrics import Metrics
from marrow.serve.runner import Runner
from marrow.serve.sampling import Draw, draw, logprobs
from marrow.serve.scheduler import Chunk, Scheduler
from marrow.serve.sequence import Request, Sequence, TokenLogprobs
from marrow.serve.stream import Delta, Stream, TextStream
from marrow.text.tokenizer import Detokenizer, Tokenizer

T = TypeVar("T")
MAX_LOGPROBS = 20
MAX_STOP = 16


@dataclass(slots=True)
class _Reader:
    """The outside of a sequence: where its text goes."""

    stream: Stream
    text: TextStream
    last_token_s: float = 0.0


class Engine:
    """Completes many prompts at once. A context manager; `close` ends the thread.

    Args: decoder, tokenizer: taken over; nobody else may use the decoder meanwhile.
        stop_ids: tokens that end a text, beside the tokenizer's eos. name: of the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        recipe: ServeRecipe,
        *,
        stop_ids: Iterable[int] = (),
        name: str = "model",
    ) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.name = name
        self.config = decoder.config
        self.metrics = Metrics()
        self._stop_ids = frozenset(stop_ids) | {tokenizer.eos_id}
        self._runner = Runner(decoder, recipe)
        self._generation = itertools.count()
        blocks = BlockManager(
            self._runner.num_blocks, recipe.block_size, self._model_id(), cache=recipe.prefix_cache
        )
        self._scheduler = Scheduler(
            blocks, max_batch_tokens=recipe.max_batch_tokens, max_sequences=recipe.max_sequences
        )
        self.metrics.blocks = blocks.num_usable
        self._readers: dict[int, tuple[Sequence, _Reader]] = {}
        self._outbox: defaultdict[asyncio.AbstractEventLoop | None, list[tuple[Stream, Delta]]] = defaultdict(
            list
        )
        self._probes: list[Future[None]] = []
        self._condition = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._ids = itertools.count(1)
        self._live = 0  # requests accepted and not ended; guarded by the condition
        self._accepting = True
        self._stopping = False
        self._closed = False  # nobody takes commands any more
        self._dead: BaseException | None = None
        self._ledger = Ledger("engine")
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: Path, recipe: ServeRecipe, *, name: str | None = None) -> "Engine":
        """Open a Hugging Face folder (config.json, model.safetensors, tokenizer.json).

        Raises: ModelError, SourceError if the folder does not hold a model.
        """
        decoder = huggingface.load(folder)
        tokenizer = Tokenizer.load(folder)
        return cls(decoder, tokenizer, recipe, stop_ids=_stop_ids(folder), name=name or folder.name)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the KV cache."""
        return self._runner.dtype

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted now."""
        return self._accepting and self._dead is None

    def submit(
        self,
        request: Request,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        deadline_s: float | None = None,
    ) -> Stream:
        """Queue one request; see `submit_all`."""
        return self.submit_all([request], loop=loop, deadline_s=deadline_s)[0]

    def submit_all(
        self,
        requests: Several[Request],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        deadline_s: float | None = None,
    ) -> list[Stream]:
        """Queue requests, all or none. Any thread.

        Args: loop: the event loop that will read the streams; None for a plain thread.
            deadline_s: seconds until they fail; by default the recipe's.
        Raises: RequestError, with status 400 for what can never run, 429 when the queue is full,
            503 when the engine is closing; ServeError if its thread died.
        """
        for request in requests:
            self._validate(request)
        with self._condition:
            if self._dead is not None:
                raise ServeError(f"the engine died: {self._dead}", hint="start the server again")
            if not self._accepting:
                raise RequestError("the engine is shutting down", status=503, hint="try another replica")
            room = self.recipe.max_sequences + self.recipe.max_waiting - self._live
            if len(requests) > room:
                raise RequestError(
                    f"the queue is full: {self._live} requests run or wait, "
                    f"{self.recipe.max_sequences} + {self.recipe.max_waiting} is the limit",
                    status=429,
                    hint="try again later, or raise serve.max_waiting",
                )
            self._live += len(requests)
            streams = [self._enqueue(request, loop, deadline_s) for request in requests]
            self._condition.notify()
        return streams

    def generate(self, prompts: Several[str | Several[int]], sampling: Sampling) -> list[Completion]:
        """Complete prompts and wait for all. Strings get a bos token in front, ids are taken as they are.

        Raises: RequestError if one can never run; ServeError if one fails.
        """
        requests = [Request(tuple(self.encode(p) if isinstance(p, str) else p), sampling) for p in prompts]
        done: list[Completion] = []
        window: deque[Stream] = deque()
        for request in requests:
            if len(window) == self.recipe.max_sequences:
                done.append(window.popleft().result())
            window.append(self.submit(request))
        return done + [stream.result() for stream in window]

    def max_tokens(self, num_prompt: int) -> int:
        """Return how many tokens can follow a prompt: bounded by the model and by the cache."""
        cache = self.metrics.blocks * self.recipe.block_size + 1
        return min(self.config.max_positions, cache) - num_prompt

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, bos first."""
        return self.tokenizer.encode(text, bos=True)

    def update_weights(self, path: Path) -> None:
        """Load other weights of the same shape between two steps; running requests go on with them.

        Their keys and values, and the prefix cache, are computed anew. Blocks until done.
        Raises: ModelError if the file does not fit; the old weights then stay.
        """

        def load() -> None:
            self._runner.load_weights(path)
            self._scheduler.restart(self._model_id())

        self._call(load).result()

    def probe(self) -> "Future[None]":
        """Return a future that is done after the next real step (of one token if idle)."""
        future: Future[None] = Future()
        self._post(lambda: self._probes.append(future))
        return future

    def check(self) -> None:
        """Raise AssertionError unless all books agree; between two steps, on the engine's thread."""
        self._call(self._check).result()

    def ledger(self) -> LedgerSummary:
        """Tell where the engine thread's time went so far; the parts add up to its wall time."""
        return self._ledger.summary()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let the others end; those left after `timeout_s` are aborted.

        Returns: whether all ended by themselves.
        """
        with self._condition:
            self._accepting = False
            ended = self._condition.wait_for(lambda: self._live == 0 or self._dead is not None, timeout_s)
        if not ended:
            with contextlib.suppress(ServeError):  # closed meanwhile: aborted already
                self._call(self._abort_all).result()
        return ended

    def close(self) -> None:
        """Abort what runs, end the thread and free the cache. Twice is fine."""
        with self._condition:
            self._accepting = False
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- any thread -------------------------------------------------------------------------

    def _validate(self, request: Request) -> None:
        _validate_sampling(request.sampling)
        length, most = len(request.prompt), self.config.max_positions
        if not length:
            raise RequestError("the prompt is empty", param="prompt", hint="give at least one token")
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise RequestError(
                f"token {bad} is not in the vocabulary of {self.config.vocab_size}", param="prompt"
            )
        total = length + request.sampling.max_tokens
        if total > most:
            raise RequestError(
                f"{length} prompt tokens and max_tokens = {request.sampling.max_tokens} "
                f"are {total}, more than the model's {most}",
                param="max_tokens" if length < most else "prompt",
                hint=f"at most {most} together",
            )
        if not self._scheduler.fits(total):
            raise RequestError(
                f"{total} tokens do not fit the KV cache of {self.metrics.blocks} blocks",
                param="max_tokens",
                hint="ask for fewer tokens, or raise serve.kv_memory",
            )
        if request.num_logprobs is not None and not 0 <= request.num_logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"logprobs = {request.num_logprobs} is not within 0 to {MAX_LOGPROBS}", param="logprobs"
            )

    def _enqueue(
        self, request: Request, loop: asyncio.AbstractEventLoop | None, deadline_s: float | None
    ) -> Stream:
        seed = request.sampling.seed
        now = time.perf_counter()
        sequence = Sequence(
            id=next(self._ids),
            request=request,
            seed=secrets.randbits(63) if seed is None else seed,
            arrived_s=now,
            deadline_s=now + (self.recipe.deadline if deadline_s is None else deadline_s),
        )
        stream = Stream(len(request.prompt), lambda: self._post(lambda: self._end(sequence, "abort")), loop)
        text = TextStream(Detokenizer(self.tokenizer), request.sampling.stop)

        def add() -> None:
            self._readers[sequence.id] = sequence, _Reader(stream, text)
            self._scheduler.add(sequence)

        self._commands.append(add)
        return stream

    def _post(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the engine's thread between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001  it belongs to the caller, who gets it
                future.set_exception(error)

        with self._condition:
            if self._closed:
                raise ServeError("the engine is closed")
            self._commands.append(command)
            self._condition.notify()
        return future

    # -- the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._ledger, torch.inference_mode():
                while self._take_commands():
                    self._step()
        except BaseException as error:  # noqa: BLE001  nobody is above; the streams and /health tell
            self._dead = error
        finally:
            self._close_books()

    def _take_commands(self) -> bool:
        """Wait for something to do, take what was posted; False ends the thread."""
        with self._condition:
            if self._scheduler.is_idle and not self._commands and not self._stopping:
                self._gauge()
                with span("idle"):
                    self._condition.wait_for(lambda: self._commands or self._stopping)
            commands, self._commands = self._commands, deque()
            stopping = self._stopping
        for command in commands:
            command()
        return not stopping

    def _step(self) -> None:
        now = time.perf_counter()
        for sequence, _ in list(self._readers.values()):
            if now > sequence.deadline_s:
                waited = now - sequence.arrived_s
                self._fail(sequence, RequestError(f"no end after {waited:.1f} s", status=504))
        with span("schedule"):
            chunks = self._scheduler.plan()
            self._enter_stages(chunks, now)
        if chunks:
            hidden_NC, chunks = self._forward(chunks)
            self._draw(hidden_NC, chunks)
            self.metrics.steps += 1
        with span("deliver"):
            self._flush()
        if self._probes:
            if not chunks:
                self._runner.probe()
            for future in self._probes:
                if future.set_running_or_notify_cancel():
                    future.set_result(None)
            self._probes.clear()
        self._gauge()

    def _enter_stages(self, chunks: list[Chunk], now: float) -> None:
        for sequence in self._scheduler.waiting:
            if sequence.num_preemptions == 0:
                break  # the preempted are at the head
            sequence.enter("preempted", now)
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.stage == "queue":
                self.metrics.prompt_tokens += sequence.num_prompt
                self.metrics.shared_tokens += sequence.num_shared
            sequence.enter("decode" if sequence.is_decoding else "prefill", now)

    def _forward(self, chunks: list[Chunk]) -> tuple[Tensor, list[Chunk]]:
        """Compute the chunks; return hidden [N, C] of those that could be, in order."""
        with span("forward"):
            try:
                return self._runner.forward(chunks), chunks
            except Exception as error:  # noqa: BLE001  whoever caused it is found below
                first = error
        self.metrics.failed_steps += 1
        parts, good = [], []
        for chunk in chunks:
            try:
                with span("forward"):
                    parts.append(self._runner.forward([chunk]))
                good.append(chunk)
            except Exception as error:  # noqa: BLE001  the request's reader gets it
                failure = ServeError(f"the model failed on this request: {error or first}")
                failure.__cause__ = error
                self._fail(chunk.sequence, failure)
        empty_NC = torch.empty(0, self.config.hidden_size, dtype=self._runner.dtype)
        return torch.cat(parts) if parts else empty_NC, good

    def _draw(self, hidden_NC: Tensor, chunks: list[Chunk]) -> None:
        """Commit the chunks, draw where one reaches its sequence's end, and put out what is new."""
        drawing: list[Chunk] = []
        rows: list[int] = []
        row = 0
        for chunk in chunks:
            self._scheduler.commit(chunk)
            self.metrics.computed_tokens += chunk.count
            if chunk.sequence.request.prompt_logprobs:
                self._score_prompt(chunk, hidden_NC[row : row + chunk.count])
            row += chunk.count
            if chunk.draws:
                drawing.append(chunk)
                rows.append(row - 1)
        if not drawing:
            return
        with span("draw"):
            logits_SV = self._runner.logits(hidden_NC[rows])
            draws = [
                Draw(c.sequence.request.sampling, c.sequence.seed, len(c.sequence.tokens)) for c in drawing
            ]
            tokens = draw(logits_SV, draws)
        now = time.perf_counter()
        with span("detokenize"):
            for chunk, token_id, logits_V in zip(drawing, tokens, logits_SV, strict=True):
                sequence, reader = self._readers[chunk.sequence.id]
                try:
                    self._append(sequence, reader, token_id, logits_V, now)
                except Exception as error:  # noqa: BLE001  the request's reader gets it; others go on
                    failure = error if isinstance(error, ServeError) else ServeError(f"failed: {error!r}")
                    self._fail(sequence, failure)

    def _score_prompt(self, chunk: Chunk, hidden_NC: Tensor) -> None:
        """Put out log-probabilities of the prompt tokens that this chunk predicts."""
        sequence, reader = self._readers[chunk.sequence.id]
        prompt, wanted = sequence.request.prompt, sequence.request.num_logprobs
        scored = []
        if sequence.num_scored == 0:
            scored.append(TokenLogprobs(prompt[0], None))
        first = max(chunk.start, sequence.num_scored - 1)  # a recomputed prompt was scored in part
        last = min(chunk.start + chunk.count, len(prompt) - 1)
        if first < last:
            logits_MV = self._runner.logits(hidden_NC[first - chunk.start : last - chunk.start])
            scored += [
                logprobs(logits_V, prompt[at + 1], wanted or 0)
                for at, logits_V in zip(range(first, last), logits_MV, strict=True)
            ]
        sequence.num_scored += len(scored)
        if scored:
            self._put(reader, Delta(prompt_logprobs=tuple(scored)))

    def _append(
        self, sequence: Sequence, reader: _Reader, token_id: int, logits_V: Tensor, now: float
    ) -> None:
        """Give a sequence its next token, and end it if that was the last."""
        sampling = sequence.request.sampling
        if sampling.max_tokens == 0:
            self._end(sequence, "length")
            return
        if token_id < 0:
            raise ServeError("the model gave no finite logits for this request")
        reported = sequence.request.num_logprobs
        scores = () if reported is None else (logprobs(logits_V, token_id, reported),)
        sequence.tokens.append(token_id)
        self.metrics.drawn_tokens += 1
        if sequence.num_drawn == 1:
            self.metrics.ttft_s.observe(now - sequence.arrived_s)
        else:
            self.metrics.itl_s.observe(now - reader.last_token_s)
        reader.last_token_s = now
        text = ""
        reason: FinishReason | None = None
        if token_id in self._stop_ids and not sampling.ignore_eos:
            reason = "stop"
        else:
            text, stopped = reader.text.add(token_id)
            reason = "stop" if stopped else "length" if sequence.num_drawn == sampling.max_tokens else None
        delta = Delta(text, (token_id,), scores)
        if reason is None:
            self._put(reader, delta)
        else:
            self._end(sequence, reason, delta)

    def _end(self, sequence: Sequence, reason: FinishReason, last: Delta | None = None) -> None:
        """End a sequence and free its blocks; one that has ended already is left alone."""
        if sequence.id not in self._readers:
            return
        _, reader = self._readers.pop(sequence.id)
        wiped = self._scheduler.finish(sequence, reason, spoiled=reason == "error")
        if wiped:
            self._runner.wipe(wiped)
        now = time.perf_counter()
        sequence.enter(None, now)
        self.metrics.finished[reason] += 1
        self.metrics.e2e_s.observe(now - sequence.arrived_s)
        last = last or Delta()
        self._put(
            reader,
            replace(
                last,
                text=last.text + ("" if reason == "error" else reader.text.finish()),
                finish_reason=reason,
                ledger=sequence.ledger,
                num_shared=sequence.num_shared,
                num_preemptions=sequence.num_preemptions,
            ),
        )
        with self._condition:
            self._live -= 1
            self._condition.notify_all()

    def _fail(self, sequence: Sequence, error: ServeError) -> None:
        self._end(sequence, "error", Delta(error=error))

    def _put(self, reader: _Reader, delta: Delta) -> None:
        self._outbox[reader.stream.loop].append((reader.stream, delta))

    def _flush(self) -> None:
        """Hand all that is new to its readers, with one call for each event loop."""
        outbox, self._outbox = self._outbox, defaultdict(list)
        for loop, items in outbox.items():
            if loop is None:
                _hand_over(items)
                continue
            try:
                loop.call_soon_threadsafe(_hand_over, items)
            except RuntimeError:  # the loop was closed: nobody reads these any more
                for stream, _ in items:
                    stream.abort()

    def _abort_all(self, error: ServeError | None = None) -> None:
        for sequence, _ in list(self._readers.values()):
            if error is None:
                self._end(sequence, "abort")
            else:
                self._fail(sequence, error)
        self._flush()

    def _close_books(self) -> None:
        """Leave nobody waiting: end every request, answer every command and probe."""
        with self._condition:
            self._accepting, self._closed = False, True
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        died = self._dead
        self._abort_all(None if died is None else ServeError(f"the engine died: {died!r}"))
        for probe in self._probes:
            if probe.set_running_or_notify_cancel():
                probe.set_exception(ServeError("the engine is closed"))
        with self._condition:
            self._condition.notify_all()

    def _model_id(self) -> str:
        return f"{self.name}#{next(self._generation)}"

    def _gauge(self) -> None:
        metrics, blocks = self.metrics, self._scheduler.blocks
        metrics.running, metrics.waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        metrics.blocks_used, metrics.blocks_cached = blocks.num_used, blocks.num_cached
        metrics.preemptions, metrics.evictions = self._scheduler.num_preemptions, blocks.num_evicted

    def _check(self) -> None:
        self._scheduler.check()
        assert {s.id for s in (*self._scheduler.running, *self._scheduler.waiting)} == set(self._readers)


def _hand_over(items: list[tuple[Stream, Delta]]) -> None:
    for stream, delta in items:
        stream.put(delta)


def _stop_ids(folder: Path) -> set[int]:
    """Read which tokens end a text: `eos_token_id` (one or a list) of generation_config.json."""
    path = folder / "generation_config.json"
    if not path.exists():
        return set()
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is not a JSON object: {error}", hint="export the model again") from None
    return {eos} if isinstance(eos, int) else set(eos)


def _validate_sampling(sampling: Sampling) -> None:
    """Refuse what cannot be drawn."""
    checks = (
        ("max_tokens", sampling.max_tokens >= 0, "at least 0"),
        ("temperature", 0 <= sampling.temperature <= 100, "0 to 100"),
        ("top_k", sampling.top_k >= 0, "at least 0; 0 keeps all"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0, up to 1"),
        ("stop", len(sampling.stop) <= MAX_STOP, f"at most {MAX_STOP} strings"),
        ("stop", all(sampling.stop), "strings that are not empty"),
        ("seed", sampling.seed is None or -(1 << 63) <= sampling.seed < 1 << 64, "a 64-bit integer"),
    )
    for name, good, allowed in checks:
        if not good:
            value = getattr(sampling, name)
            raise RequestError(f"{name} = {value!r} is not allowed", param=name, hint=f"allowed: {allowed}")
