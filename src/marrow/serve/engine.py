"""The engine: a thread around the stepper, and the ways in and out of it.

    submit ---> commands ---> step, step, step ---> Stream
    (any thread)              (engine thread)       (the caller's thread or event loop)

Only the engine's thread touches the stepper; others post commands that it takes between two
steps. So an abort frees blocks before the next step begins, and new weights never change within
a step. If the thread dies, every reader, waiter and caller is told why.
"""

import asyncio
import contextlib
import itertools
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

from marrow.core.errors import DataError, ModelError, RequestError, ServeError
from marrow.core.records import Completion, Sampling
from marrow.core.span import Ledger, LedgerSummary, span
from marrow.kernels import dispatch
from marrow.models import huggingface
from marrow.models.decoder import Decoder
from marrow.serve.config import ServeRecipe
from marrow.serve.sequence import Request, Sequence
from marrow.serve.stepper import Stepper
from marrow.serve.stream import Stream
from marrow.serve.validation import validate
from marrow.text.tokenizer import Tokenizer

T = TypeVar("T")


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
        self._stepper = Stepper(
            decoder, tokenizer, recipe, frozenset(stop_ids) | {tokenizer.eos_id}, self._ended
        )
        self.metrics = self._stepper.metrics
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
        dispatch.wanted()  # an unknown MARROW_KERNELS is refused before anything is read
        decoder = huggingface.load(folder)
        tokenizer = Tokenizer.load(folder)
        tokenizer.token_bytes()  # one that cannot be streamed is refused here, not at the first request
        return cls(decoder, tokenizer, recipe, stop_ids=_stop_ids(folder), name=name or folder.name)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the KV cache."""
        return self._stepper.runner.dtype

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
            validate(request, self.config, self._cache_tokens)
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
        return min(self.config.max_positions, self._cache_tokens + 1) - num_prompt

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, bos first. Raises: RequestError for what is no text."""
        try:
            return self.tokenizer.encode(text, bos=True)
        except DataError as error:
            raise RequestError(error.message, param="prompt", hint=error.hint) from None

    def update_weights(self, path: Path) -> None:
        """Load other weights of the same shape between two steps; running requests go on with them.

        Their keys and values, and the prefix cache, are computed anew. Blocks until done.
        Raises: ModelError if the file does not fit; the old weights then stay.
        """
        self._call(lambda: self._stepper.load_weights(path)).result()

    def probe(self) -> "Future[None]":
        """Return a future that is done after the next real step (of one token if idle)."""
        future: Future[None] = Future()
        self._post(lambda: self._probes.append(future))
        return future

    def check(self) -> None:
        """Raise AssertionError unless all books agree; between two steps, on the engine's thread."""
        self._call(self._stepper.check).result()

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
                self._call(self._stepper.end_all).result()
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

    @property
    def _cache_tokens(self) -> int:
        return self.metrics.blocks * self.recipe.block_size

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
        stream = Stream(
            len(request.prompt), lambda: self._post(lambda: self._stepper.end(sequence, "abort")), loop
        )
        self._commands.append(lambda: self._stepper.add(sequence, stream))
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
            if self._stepper.is_idle and not self._commands and not self._stopping:
                self._stepper.gauge()
                with span("idle"):
                    self._condition.wait_for(lambda: self._commands or self._stopping)
            commands, self._commands = self._commands, deque()
            stopping = self._stopping
        for command in commands:
            command()
        return not stopping

    def _step(self) -> None:
        computed = self._stepper.step()
        if self._probes:
            if not computed:
                self._stepper.runner.probe()
            for future in self._probes:
                if future.set_running_or_notify_cancel():
                    future.set_result(None)
            self._probes.clear()

    def _ended(self) -> None:
        with self._condition:
            self._live -= 1
            self._condition.notify_all()

    def _close_books(self) -> None:
        """Leave nobody waiting: end every request, answer every command and probe."""
        with self._condition:
            self._accepting, self._closed = False, True
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        died = self._dead
        self._stepper.end_all(None if died is None else ServeError(f"the engine died: {died!r}"))
        for probe in self._probes:
            if probe.set_running_or_notify_cancel():
                probe.set_exception(ServeError("the engine is closed"))
        with self._condition:
            self._condition.notify_all()


def _stop_ids(folder: Path) -> set[int]:
    """Read which tokens end a text: `eos_token_id` (one or a list) of generation_config.json."""
    path = folder / "generation_config.json"
    if not path.exists():
        return set()
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is not a JSON object: {error}", hint="export the model again") from None
    ids = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(id, int) for id in ids):
        raise ModelError(f"{path}: eos_token_id = {eos!r} is no token id", hint="export the model again")
    return set(ids)
