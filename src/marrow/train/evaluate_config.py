"""The [evaluate] table of a recipe: how a model is measured on the held-out texts."""

from dataclasses import dataclass
from typing import Annotated, Literal

from marrow.core.config import Bytes, Count, Range


@dataclass(frozen=True, slots=True)
class EvaluateRecipe:
    """How a model is measured.

    context: tokens a window gives the model; 0 takes the model's `max_positions`. stride: new
        tokens scored by each further window of a document; 0 takes half the context, so that
        every token has at least half a window before it, where the document has that much.
    batch_tokens: tokens computed at once. PERF: 2048 takes a quarter less CPU than 8192, since
        activations stay in cache.
    dtype: of weights and activations of a model read from a folder; "auto" takes bfloat16 where
        its measured matrix product is faster. The facts say which.
    ngram_order: of the n-gram baseline.
    heldout_bytes: at most about this much held-out text is measured; baseline_bytes: at most
        about this much training text is given to the n-gram and to xz. Longer files are thinned
        to every k-th document. The n-gram needs about 50 bytes of memory per byte of text.
    snapshot_bytes: held-out text on which the snapshots of the training are compared.
    """

    context: Annotated[Count, Range(0)] = 0
    stride: Annotated[Count, Range(0)] = 0
    batch_tokens: Annotated[Count, Range(1)] = 2048
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    ngram_order: Annotated[int, Range(1, 8)] = 5
    heldout_bytes: Annotated[Bytes, Range(1)] = 8 << 20
    baseline_bytes: Annotated[Bytes, Range(1)] = 16 << 20
    snapshot_bytes: Annotated[Bytes, Range(0)] = 64 << 10

    def __post_init__(self) -> None:
        if self.context and self.stride > self.context:
            raise ValueError(f"stride = {self.stride} is more than context = {self.context}: it skips tokens")
