"""What can never run is refused before it queues, by the name of the field that is wrong."""

import math

from marrow.core.errors import RequestError
from marrow.core.records import Sampling
from marrow.models.config import ModelConfig
from marrow.serve.sequence import Request

MAX_LOGPROBS = 20
MAX_STOP = 16


def validate(request: Request, config: ModelConfig, cache_tokens: int) -> None:
    """Check one request.

    Args: cache_tokens: tokens that the whole KV cache holds.
    Raises: RequestError with the field's name and what is allowed.
    """
    _validate_sampling(request.sampling)
    _validate_length(request, config, cache_tokens)
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= config.vocab_size:
        raise RequestError(
            f"token {low if low < 0 else high} is not in the vocabulary of {config.vocab_size}",
            param="prompt",
            hint=f"token ids are 0 to {config.vocab_size - 1}",
        )
    if request.num_logprobs is not None and not 0 <= request.num_logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"logprobs = {request.num_logprobs} is not allowed",
            param="logprobs",
            hint=f"allowed: 0 to {MAX_LOGPROBS}",
        )


def _validate_length(request: Request, config: ModelConfig, cache_tokens: int) -> None:
    length, wanted, most = len(request.prompt), request.sampling.max_tokens, config.max_positions
    if not length:
        raise RequestError("the prompt is empty", param="prompt", hint="give at least one token")
    if length + wanted > most:
        raise RequestError(
            f"{length} prompt tokens and max_tokens = {wanted} are more than the model's {most}",
            param="max_tokens" if length < most else "prompt",
            hint=f"at most {most} together",
        )
    if length + wanted - 1 > cache_tokens:  # the last token drawn is never computed
        raise RequestError(
            f"{length} prompt tokens and max_tokens = {wanted} do not fit the KV cache of {cache_tokens}",
            param="max_tokens" if length <= cache_tokens else "prompt",
            hint="ask for fewer tokens, or raise serve.kv_memory",
        )


def _validate_sampling(sampling: Sampling) -> None:
    """Refuse what cannot be drawn."""
    checks = (
        ("max_tokens", sampling.max_tokens >= 0, "at least 0"),
        ("temperature", math.isfinite(sampling.temperature) and 0 <= sampling.temperature <= 100, "0 to 100"),
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
