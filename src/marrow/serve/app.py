"""The OpenAI-compatible HTTP API before one engine, and the page at `/`.

    POST /v1/completions  /v1/chat/completions     whole or streamed (server-sent events)
    GET  /v1/models  /health  /metrics  /

The event loop only parses and writes; the engine's thread computes. A client that goes away, from
a stream or from a whole answer, ends its request before the engine's next step.
"""

import asyncio
import json
import secrets
import string
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marrow.core.errors import RequestError, ServeError
from marrow.serve import sequence
from marrow.serve.answers import ChatChoice, Choice
from marrow.serve.api import (
    ChatBody,
    CompletionBody,
    SamplingFields,
    envelope,
    error_body,
    headers_of,
    parse,
    usage,
    validate_choices,
)
from marrow.serve.engine import Engine
from marrow.serve.metrics import CONTENT_TYPE, prometheus
from marrow.serve.sampling import choice_seed
from marrow.text.chat import ChatTemplate

_LONG_PROMPT = 20_000  # characters; longer ones would hold up the event loop for milliseconds
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(engine: Engine, chat: ChatTemplate | None) -> FastAPI:
    """Build the application. chat: None for a base model."""
    app = FastAPI(title="Marrow", docs_url=None, redoc_url=None)
    service = _Service(engine, chat)
    for method, path, handler in (
        ("POST", "/v1/completions", service.complete),
        ("POST", "/v1/chat/completions", service.converse),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{model_id:path}", service.model),
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.metrics),
        ("GET", "/", service.page),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(ServeError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _refuse)
    app.add_middleware(_RequestIds)
    return app


class _Service:
    """The endpoints."""

    def __init__(self, engine: Engine, chat: ChatTemplate | None) -> None:
        self.engine = engine
        self.chat = chat
        self.started_s = int(time.time())

    async def complete(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request), self.engine.name)
        prompts = [await self._encode(prompt) for prompt in _prompts(body.prompt)]
        scored = bool(body.echo) and body.logprobs is not None
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        requests = self._requests(body, prompts, max_tokens, body.logprobs, scored)
        streams = self._submit(requests)
        texts = [self._text(prompt) if body.echo else "" for prompt in prompts]
        choices = [
            Choice(
                index,
                stream,
                self._token_bytes,
                echo=texts[index // (body.n or 1)],
                with_logprobs=body.logprobs is not None,
            )
            for index, stream in enumerate(streams)
        ]
        return await self._answer(request, body, choices, "cmpl")

    async def converse(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request), self.engine.name)
        if self.chat is None:
            raise RequestError(
                f"{self.engine.name!r} is a base model: it has no chat template",
                param="messages",
                hint="use /v1/completions, or serve a chat-tuned model",
            )
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise RequestError("max_tokens and max_completion_tokens exclude each other", param="max_tokens")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs = true", param="top_logprobs")
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        prompt = await asyncio.to_thread(self.chat.encode, messages, self.engine.tokenizer)
        given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        room = max(self.engine.max_tokens(len(prompt)), 1)
        reported = (body.top_logprobs or 0) if body.logprobs else None
        requests = self._requests(body, [prompt], room if given is None else given, reported, False)
        choices = [
            ChatChoice(index, stream, self._token_bytes, with_logprobs=bool(body.logprobs))
            for index, stream in enumerate(self._submit(requests))
        ]
        return await self._answer(request, body, choices, "chatcmpl")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, model_id: str) -> dict[str, Any]:
        if model_id != self.engine.name:
            raise RequestError(
                f"there is no model {model_id!r} here", status=404, param="model", hint="see /v1/models"
            )
        return self._model()

    async def health(self) -> JSONResponse:
        """Tell whether a step of the engine ends in time; an open port alone says little."""
        start = time.perf_counter()
        try:
            if not self.engine.is_ready:
                raise ServeError("the engine is closed")
            await asyncio.wait_for(
                asyncio.wrap_future(self.engine.probe()), self.engine.recipe.health_deadline
            )
        except TimeoutError:
            return JSONResponse({"status": "stuck", "deadline_s": self.engine.recipe.health_deadline}, 503)
        except ServeError:
            return JSONResponse({"status": "closing or dead"}, 503)
        return JSONResponse({"status": "ok", "step_ms": round((time.perf_counter() - start) * 1e3, 3)})

    async def metrics(self) -> PlainTextResponse:
        text = prometheus(self.engine.metrics, self.engine.name, self.engine.is_ready)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def page(self) -> HTMLResponse:
        text = resources.files("marrow.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(
            text, headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-store"}
        )

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.engine.name,
            "object": "model",
            "created": self.started_s,
            "owned_by": "marrow",
            "max_model_len": self.engine.config.max_positions,
            "chat": self.chat is not None,
        }

    async def _read(self, request: Request) -> bytes:
        """Read a body up to the limit, within the deadline."""
        limit = self.engine.recipe.max_request_bytes
        data, received = bytearray(), 0
        try:
            async with asyncio.timeout(self.engine.recipe.deadline):
                async for part in request.stream():
                    received += len(part)
                    if received <= limit:
                        data += part
                    elif received > 16 * limit:
                        break  # else read on: a client that is cut off while it sends sees no answer
        except TimeoutError:
            raise RequestError("the body did not come in time", status=408) from None
        if received > limit:
            raise RequestError(
                f"the body is larger than {limit} bytes", status=413, hint="send fewer prompts at once"
            )
        return bytes(data)

    async def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) < _LONG_PROMPT:
            return self.engine.encode(prompt)
        return await asyncio.to_thread(self.engine.encode, prompt)

    def _text(self, ids: list[int]) -> str:
        return self.engine.tokenizer.decode(ids)

    @property
    def _token_bytes(self) -> tuple[bytes, ...]:
        return self.engine.tokenizer.token_bytes(skip_special=False)

    def _requests(
        self,
        body: SamplingFields,
        prompts: list[list[int]],
        max_tokens: int,
        reported: int | None,
        scored: bool,
    ) -> list[sequence.Request]:
        """Return one request a choice; each choice of a prompt draws from a seed of its own."""
        count = body.n or 1
        validate_choices(count * len(prompts), self.engine.recipe.max_choices)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        samplings = [body.sampling(max_tokens, choice_seed(seed, index)) for index in range(count)]
        return [
            sequence.Request(tuple(prompt), sampling, reported, scored)
            for prompt in prompts
            for sampling in samplings
        ]

    def _submit(self, requests: list[sequence.Request]) -> list[Any]:
        return self.engine.submit_all(requests, loop=asyncio.get_running_loop())

    async def _answer(
        self, request: Request, body: SamplingFields, choices: list[Any], prefix: str
    ) -> Response:
        answer_id = f"{prefix}-{secrets.token_hex(12)}"
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(choices, answer_id, self.engine.name, wants_usage)
            return _EventStream(events, choices)
        try:
            await _unless_gone(request, _collect(choices))
        finally:
            _abort(choices)
        kind = choices[0].kind
        whole = [choice.whole() for choice in choices]
        return JSONResponse(
            envelope(kind, answer_id, self.engine.name, choices=whole, usage=_usage(choices, body.n or 1))
        )


class _EventStream(StreamingResponse):
    """Server-sent events; whatever ends the response ends its requests."""

    def __init__(self, events: AsyncIterator[str], choices: list[Choice]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _abort(self._choices)


async def _events(choices: list[Choice], answer_id: str, model: str, wants_usage: bool) -> AsyncIterator[str]:
    """Yield the choices' pieces as they come, then usage, then [DONE]; an error is the last event."""

    def event(**fields: Any) -> str:
        extra = {"usage": None} if wants_usage and "usage" not in fields else {}
        value = envelope(choices[0].event_kind, answer_id, model, **fields, **extra)
        return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"

    arrived: asyncio.Queue[dict[str, Any] | ServeError | None] = asyncio.Queue()

    async def read(choice: Choice) -> None:
        try:
            async for delta in choice.stream:
                if (piece := choice.take(delta)) is not None:
                    arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except ServeError as error:
            arrived.put_nowait(error)

    readers = [asyncio.create_task(read(choice)) for choice in choices]
    try:
        for choice in choices:
            for piece in choice.opening():
                yield event(choices=[piece])
        left = len(choices)
        while left:
            item = await arrived.get()
            if isinstance(item, ServeError):
                yield f"data: {json.dumps(error_body(_as_request_error(item)))}\n\n"
                break
            if item is None:
                left -= 1
            else:
                yield event(choices=[item])
        else:
            if wants_usage:
                yield event(choices=[], usage=_usage(choices, 1))
        yield "data: [DONE]\n\n"
    finally:
        for reader in readers:
            reader.cancel()


async def _collect(choices: list[Choice]) -> None:
    async def read(choice: Choice) -> None:
        async for delta in choice.stream:
            choice.take(delta)

    tasks = [asyncio.create_task(read(choice)) for choice in choices]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _unless_gone(request: Request, work: Any) -> None:
    """Await the work; if the client goes away first, cancel it. Raises: RequestError then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("the client closed the connection", status=499)
        await task
    finally:
        task.cancel()
        watch.cancel()


def _abort(choices: list[Any]) -> None:
    for choice in choices:
        if choice.stream.last is None:
            choice.stream.abort()


def _usage(choices: list[Any], per_prompt: int) -> dict[str, Any]:
    first_of_each = choices[::per_prompt]
    return usage(
        sum(choice.stream.num_prompt for choice in first_of_each),
        sum(choice.num_drawn for choice in choices),
        sum(choice.num_shared for choice in first_of_each),
    )


def _prompts(prompt: Any) -> list[Any]:
    """Return a list of prompts: the field holds one text, one list of ids, or a list of either."""
    if isinstance(prompt, list) and not prompt:
        raise RequestError("the prompt is empty", param="prompt", hint="give at least one token")
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(str(error.detail), status=error.status_code)
    if isinstance(error, ServeError):
        return RequestError(error.message, status=500, hint=error.hint)
    return RequestError(f"the server failed: {type(error).__name__}", status=500)


async def _refuse(request: Request, error: Exception) -> Response:
    refusal = _as_request_error(error)
    return JSONResponse(error_body(refusal), refusal.status, headers=dict(headers_of(refusal)))


class _RequestIds:
    """Gives every answer an `x-request-id`: the client's own if it sent a sane one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        sane = 0 < len(given) <= 128 and set(given) <= set(string.ascii_letters + string.digits + "-_.:")
        request_id = given if sane else f"req-{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, receive, send_with_id)
