"""The OpenAI HTTP API as data: what a body may hold, and what goes back.

Every field of a body is honoured or refused with the field's name: unknown ones always, known but
unsupported ones unless they hold the value that changes nothing (a client library may send it).
Errors have OpenAI's shape. pydantic stays here, at the door.
"""

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from marrow.core.errors import RequestError
from marrow.core.records import Sampling

Body = TypeVar("Body", bound="SamplingFields")
TokenIds = list[Annotated[int, Field(strict=True)]]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class SamplingFields(BaseModel):
    """What both endpoints take. top_k and ignore_eos are extensions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    # Known, and accepted only where they change nothing: see `_NEUTRAL`.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def sampling(self, max_tokens: int, seed: int) -> Sampling:
        """Return how to draw; OpenAI's defaults where a field is missing."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
            stop=tuple(stop or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionBody(SamplingFields):
    """POST /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}


def parse(kind: type[Body], data: bytes, served: str) -> Body:
    """Read and check a body.

    Args: served: the model's name; another one is a 404.
    Raises: RequestError naming the field.
    """
    try:
        body = kind.model_validate(json.loads(data, parse_constant=_refuse_constant))
    except ValidationError as error:
        raise _explain(error, kind) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", hint="send a JSON object") from None
    if body.model != served:
        raise RequestError(
            f"there is no model {body.model!r} here", status=404, param="model", hint=f"served: {served!r}"
        )
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise RequestError(f"{name} = {value!r} is not supported", param=name, hint=f"leave {name} out")
    if isinstance(body, CompletionBody) and body.best_of not in (None, body.n or 1):
        raise RequestError(f"best_of = {body.best_of} is not supported", param="best_of", hint="leave it out")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream = true", param="stream_options")
    return body


def error_body(error: RequestError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    codes = {404: "model_not_found", 413: "request_too_large", 429: "queue_full", 503: "unavailable"}
    code = None if error.status == 404 and error.param != "model" else codes.get(error.status)
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": code}}


def usage(prompt: int, drawn: int, shared: int) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": shared},
    }


def envelope(kind: str, request_id: str, model: str, **fields: Any) -> dict[str, Any]:
    """Return the outer object of an answer or of one event."""
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model, **fields}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _explain(error: ValidationError, kind: type[BaseModel]) -> RequestError:
    """Say which field is wrong; of a union's complaints the deepest is nearest to the cause."""
    problem = max(
        error.errors(include_url=False), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"]))
    )
    place = [part for part in problem["loc"] if isinstance(part, int) or not _is_branch(part)]
    name = ".".join(map(str, place)) or "body"
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return RequestError(f"unknown field {name!r}", param=name, hint=f"known: {known}")
    if problem["type"] == "missing":
        return RequestError(f"{name!r} is missing", param=name, hint=f"add {name}")
    got = json.dumps(problem["input"], default=str)
    got = got if len(got) <= 80 else got[:77] + "..."
    return RequestError(f"{name} = {got}: {problem['msg'].lower()}", param=str(place[0]) if place else None)


def _is_branch(part: str) -> bool:
    """Whether a part of pydantic's location names a branch of a union, not a field."""
    return part in ("str", "int", "float", "bool") or part.startswith(("list[", "dict["))


def validate_choices(count: int, most: int) -> None:
    """Refuse a request for too many completions at once."""
    if count > most:
        raise RequestError(
            f"{count} completions in one request, at most {most} are allowed", param="n", hint="split it"
        )


def headers_of(error: RequestError) -> Mapping[str, str]:
    """Tell a client that came too early when to come again."""
    return {"Retry-After": "1"} if error.status in (429, 503) else {}
