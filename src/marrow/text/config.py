"""The [tokenizer] table of a recipe."""

from dataclasses import dataclass
from typing import Annotated

from marrow.core.config import Count, Range
from marrow.text.special import NUM_SPECIAL

SMALLEST_VOCABULARY = NUM_SPECIAL + 256  # the reserved slots and one token for each byte


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """What tokenizer is trained, or which is taken.

    file: a tokenizer.json of any maker, or a folder with one, to take as it is; nothing is trained.
    vocab_size: tokens in all, the 64 reserved ones included; a text too small to fill it gives a
        smaller vocabulary, which the step's facts say.
    min_frequency: a pair seen fewer times than this is never merged.
    """

    file: str = ""
    vocab_size: Annotated[Count, Range(SMALLEST_VOCABULARY, 1 << 24)] = 4096
    min_frequency: Annotated[int, Range(1)] = 2
