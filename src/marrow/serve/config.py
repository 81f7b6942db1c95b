"""The `[serve]` table: how an engine is sized and what its server takes. Torch-free.

Everything here is a bound: tokens a step, sequences at once, bytes of KV cache, requests that
wait, bytes of a request, seconds of each wait. Nothing grows past its bound; what does not fit
is refused with a reason.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from marrow.core.config import Bytes, Count, Duration, Range


@dataclass(frozen=True, slots=True)
class ServeRecipe:
    """What the engine may use and the server may take.

    host, port: address to listen on; port 0 takes a free one.
    dtype: of weights and KV cache; "auto" measures fp32 against bf16 on this machine.
    max_batch_tokens: tokens that one step computes at most, prefill and decode together.
    max_sequences: sequences that decode together at most.
    kv_memory: bytes of KV cache, allocated at the start.
    block_size: tokens of one block of KV cache.
    prefix_cache: keep full blocks of ended sequences, and share those with equal beginnings.
    max_waiting: sequences that queue; one more is refused with 429.
    max_choices: completions that one HTTP request may ask for (prompts times n).
    max_request_bytes: size of an HTTP request's body.
    deadline: seconds that a request may take, its wait in the queue included.
    health_deadline: seconds within which a healthy engine ends a step.
    drain: seconds that running requests get to end after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    max_batch_tokens: Annotated[Count, Range(1)] = 512
    max_sequences: Annotated[Count, Range(1)] = 32
    kv_memory: Annotated[Bytes, Range(1)] = 256 << 20
    block_size: Annotated[int, Range(1, 1024)] = 16
    prefix_cache: bool = True
    max_waiting: Annotated[Count, Range(0)] = 256
    max_choices: Annotated[int, Range(1)] = 128
    max_request_bytes: Annotated[Bytes, Range(1)] = 1 << 20
    deadline: Annotated[Duration, Range(0.001)] = 300.0
    health_deadline: Annotated[Duration, Range(0.001)] = 5.0
    drain: Annotated[Duration, Range(0.0)] = 10.0

    def __post_init__(self) -> None:
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens = {self.max_batch_tokens} is less than max_sequences = "
                f"{self.max_sequences}: each running sequence needs one token a step"
            )
