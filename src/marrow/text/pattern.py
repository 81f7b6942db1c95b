r"""Where a text may be cut before byte pairs are merged: one pattern, written twice.

No token crosses such a cut. The pattern is that of GPT-4 and Llama 3, which suits source code:
a run of blanks is one word whatever its length (an indentation is one token, and leaves its last
blank to the word after it, so that ` return` is the same token at every depth), punctuation takes
the line ends after it (`):\n`), words keep one leading mark (`.append`, `_name`, `(self`), and
numbers fall into groups of three digits, so that their tokens are bounded. A pattern with words
bare of marks and line ends that take the indentation after them scored better with an n-gram and
worse with the quickstart's decoder, in one run of each: docs/lab-log.md.

`ASCII_WORDS` is the same pattern with the Unicode classes narrowed to ASCII. On ASCII text both cut
alike, and the standard library's `re` is three times faster at it than the tokenizer library.
"""

import re
from collections.abc import Iterator

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

ASCII_WORDS = re.compile(
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    r"|[^\r\n0-9A-Za-z]?[A-Za-z]+"
    r"|[0-9]{1,3}"
    r"| ?[^\s0-9A-Za-z]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
    re.ASCII,
)

# After a line end and before a letter every text is cut, whatever stands around: no alternative
# crosses it, and the only look-ahead, (?!\S), is reached by blanks without a line end alone.
_SAFE_CUT = re.compile(r"(?<=\n)(?=[A-Za-z])")


def cut_lines(text: str) -> Iterator[str]:
    """Cut a text into parts that can be encoded one by one with the same result.

    Neighbours that are both ASCII, or both not, stay together, so that a long text with few
    foreign characters becomes few parts.
    """
    start = end = 0
    ascii_so_far = True
    for match in _SAFE_CUT.finditer(text):
        line_end = match.start()
        is_ascii = text[end:line_end].isascii()
        if end > start and is_ascii != ascii_so_far:
            yield text[start:end]
            start = end
        ascii_so_far = is_ascii
        end = line_end
    if end > start and text[end:].isascii() != ascii_so_far:
        yield text[start:end]
        start = end
    yield text[start:]
