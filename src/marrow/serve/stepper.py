"""One step of the engine, and the books between steps. Single-threaded; no clock but for ledgers.

    expire -> plan -> forward -> draw -> append -> deliver

Everything that changes between two tokens happens here: who is admitted, what is computed, which
token follows, which piece of text leaves. A request that fails (its logits are NaN, its text
cannot be decoded) ends alone; if a whole step raises, each sequence is tried alone, and only those
that fail again end. Blocks of a failed request are shared with nobody from then on.

Axes: N tokens of the step, S sequences that draw, C hidden size, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from marrow.core.errors import RequestError, ServeError
from marrow.core.records import FinishReason
from marrow.core.span import span
from marrow.models.decoder import Decoder
from marrow.serve.blocks import BlockManager
from marrow.serve.config import ServeRecipe
from marrow.serve.metrics import Metrics
from marrow.serve.runner import Runner
from marrow.serve.sampling import Draw, draw, logprobs
from marrow.serve.scheduler import Chunk, Scheduler
from marrow.serve.sequence import Sequence, TokenLogprobs
from marrow.serve.stream import Delta, Outbox, Stream, TextStream
from marrow.text.tokenizer import Detokenizer, Tokenizer


@dataclass(slots=True)
class _Reader:
    """The outside of a sequence: where its text goes."""

    stream: Stream
    text: TextStream
    last_token_s: float = 0.0


class Stepper:
    """Owns sequences, blocks, weights and cache. One thread calls it, whichever that is.

    Args: stop_ids: tokens that end a text. ended: called once for each request that ends.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        recipe: ServeRecipe,
        stop_ids: Iterable[int],
        ended: Callable[[], None],
    ) -> None:
        self.metrics = Metrics()
        self.runner = Runner(decoder, recipe)
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        # A model may have more rows than its tokenizer has tokens; those are never drawn.
        self._vocabulary = min(decoder.config.vocab_size, tokenizer.vocab_size)
        self._ended = ended
        self._num_weights = 0  # weights loaded so far: part of what names a shared block
        blocks = BlockManager(
            self.runner.num_blocks, recipe.block_size, self._model_id(), cache=recipe.prefix_cache
        )
        self._scheduler = Scheduler(
            blocks, max_batch_tokens=recipe.max_batch_tokens, max_sequences=recipe.max_sequences
        )
        self._readers: dict[int, tuple[Sequence, _Reader]] = {}
        self._outbox = Outbox()
        self.metrics.blocks = blocks.num_usable

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return self._scheduler.is_idle

    def add(self, sequence: Sequence, stream: Stream) -> None:
        """Queue a validated sequence; its pieces go to the stream."""
        text = TextStream(Detokenizer(self._tokenizer), sequence.request.sampling.stop)
        self._readers[sequence.id] = sequence, _Reader(stream, text)
        self._scheduler.add(sequence)

    def step(self) -> bool:
        """Do one step; return whether anything was computed."""
        now = time.perf_counter()
        for sequence, _ in list(self._readers.values()):
            if now > sequence.deadline_s:
                waited = now - sequence.arrived_s
                self._fail(sequence, RequestError(f"no end after {waited:.1f} s", status=504))
        with span("schedule"):
            chunks = self._scheduler.plan()
            self._enter_stages(chunks, now)
        if chunks:
            hidden_NC, good = self._forward(chunks)
            self._draw(hidden_NC, good)
            self.metrics.steps += 1
        with span("deliver"):
            self._outbox.flush()
        self.gauge()
        return bool(chunks)

    def end(self, sequence: Sequence, reason: FinishReason, last: Delta | None = None) -> None:
        """End a sequence and free its blocks; one that has ended already is left alone."""
        if sequence.id not in self._readers:
            return
        _, reader = self._readers.pop(sequence.id)
        self._scheduler.finish(sequence, reason, spoiled=reason == "error")
        now = time.perf_counter()
        sequence.enter(None, now)
        self.metrics.finished[reason] += 1
        self.metrics.e2e_s.observe(now - sequence.arrived_s)
        last = last or Delta()
        self._outbox.put(
            reader.stream,
            replace(
                last,
                text=last.text + ("" if reason == "error" else reader.text.finish()),
                finish_reason=reason,
                ledger=sequence.ledger,
                num_shared=sequence.num_shared,
                num_preemptions=sequence.num_preemptions,
            ),
        )
        self._ended()

    def end_all(self, error: ServeError | None = None) -> None:
        """Abort every request, or fail it with the error, and tell its reader at once."""
        for sequence, _ in list(self._readers.values()):
            if error is None:
                self.end(sequence, "abort")
            else:
                self._fail(sequence, error)
        self._outbox.flush()

    def load_weights(self, path: Path) -> None:
        """Take other weights; whoever runs is computed anew. Raises: ModelError; the old ones stay."""
        self.runner.load_weights(path)
        self._scheduler.restart(self._model_id())

    def check(self) -> None:
        """Raise AssertionError unless all books agree."""
        self._scheduler.check()
        assert {s.id for s in (*self._scheduler.running, *self._scheduler.waiting)} == set(self._readers)

    def gauge(self) -> None:
        """Bring the gauges up to date."""
        metrics, blocks = self.metrics, self._scheduler.blocks
        metrics.running, metrics.waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        metrics.blocks_used, metrics.blocks_cached = blocks.num_used, blocks.num_cached
        metrics.preemptions, metrics.evictions = self._scheduler.num_preemptions, blocks.num_evicted

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
                return self.runner.forward(chunks), chunks
            except Exception as error:  # noqa: BLE001  whoever caused it is found below
                first = error
        self.metrics.failed_steps += 1
        parts, good = [], []
        for chunk in chunks:
            try:
                with span("forward"):
                    parts.append(self.runner.forward([chunk]))
                good.append(chunk)
            except Exception as error:  # noqa: BLE001  the request's reader gets it
                failure = ServeError(f"the model failed on this request: {error or first}")
                failure.__cause__ = error
                self._fail(chunk.sequence, failure)
        empty_NC = torch.empty(0, self.runner.decoder.config.hidden_size, dtype=self.runner.dtype)
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
            logits_SV = self._logits(hidden_NC[rows])
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
            logits_MV = self._logits(hidden_NC[first - chunk.start : last - chunk.start])
            scored += [
                logprobs(logits_V, prompt[at + 1], wanted or 0)
                for at, logits_V in zip(range(first, last), logits_MV, strict=True)
            ]
        sequence.num_scored += len(scored)
        if scored:
            self._outbox.put(reader.stream, Delta(prompt_logprobs=tuple(scored)))

    def _append(
        self, sequence: Sequence, reader: _Reader, token_id: int, logits_V: Tensor, now: float
    ) -> None:
        """Give a sequence its next token, and end it if that was the last."""
        sampling = sequence.request.sampling
        if sampling.max_tokens == 0:
            self.end(sequence, "length")
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
            self._outbox.put(reader.stream, delta)
        else:
            self.end(sequence, reason, delta)

    def _fail(self, sequence: Sequence, error: ServeError) -> None:
        self.end(sequence, "error", Delta(error=error))

    def _logits(self, hidden_MC: Tensor) -> Tensor:
        return self.runner.logits(hidden_MC)[:, : self._vocabulary]

    def _model_id(self) -> str:
        self._num_weights += 1
        return f"weights {self._num_weights}"
