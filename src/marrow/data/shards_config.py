"""The [shards] table of a recipe."""

from dataclasses import dataclass
from typing import Annotated

from marrow.core.config import Bytes, Count, Range


@dataclass(frozen=True, slots=True)
class ShardsRecipe:
    """How documents are packed into rows of tokens.

    context: tokens that a model sees at once; a stored row has one more, the last target.
    max_padding: share of stored tokens that may be padding. A document that fits a row is cut only
        where whole ones would leave more than this empty; 1 never cuts such a document.
    shard_bytes: size of a shard file; also about what writing and reading one needs in memory.
    """

    context: Annotated[Count, Range(8, 1 << 24)] = 512
    max_padding: Annotated[float, Range(0, 1)] = 0.03
    shard_bytes: Annotated[Bytes, Range(1 << 12, 1 << 31)] = 64 << 20
