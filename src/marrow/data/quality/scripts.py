"""Scripts of letters: which share of a text's letters are Latin, Cyrillic, Han, ...

A script is told by ranges of code points, within which only letters count. Texts of several
scripts (Japanese) have a name of their own here. Source: Unicode Character Database, Scripts.txt.
"""

import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

_HAN = (
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_KANA = ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F))
_HANGUL = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "Latin": ((0x41, 0x24F), (0x250, 0x2B8), (0x1D00, 0x1D25), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F),
              (0xA722, 0xA7FF), (0xAB30, 0xAB64), (0xFB00, 0xFB06), (0xFF21, 0xFF5A)),
    "Greek": ((0x370, 0x3E1), (0x3F0, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C88), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Armenian": ((0x531, 0x58A),),
    "Hebrew": ((0x591, 0x5F4), (0xFB1D, 0xFB4F)),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "Devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "Bengali": ((0x980, 0x9FE),),
    "Gurmukhi": ((0xA01, 0xA76),),
    "Gujarati": ((0xA81, 0xAFF),),
    "Tamil": ((0xB82, 0xBFA),),
    "Telugu": ((0xC00, 0xC7F),),
    "Kannada": ((0xC80, 0xCF3),),
    "Malayalam": ((0xD00, 0xD7F),),
    "Sinhala": ((0xD81, 0xDF4),),
    "Thai": ((0xE01, 0xE5B),),
    "Lao": ((0xE81, 0xEDF),),
    "Tibetan": ((0xF00, 0xFDA),),
    "Myanmar": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2D)),
    "Ethiopic": ((0x1200, 0x139F), (0x2D80, 0x2DDE)),
    "Khmer": ((0x1780, 0x17F9),),
    "Hangul": _HANGUL,
    "Han": _HAN,
    "Japanese": _HAN + _KANA,
    "Korean": _HANGUL + _HAN,
}  # fmt: skip
_LAST = 0x323B0


def script_share(text: str, script: str) -> float:
    """Share of a text's letters that are of a script; 0 for a text without letters.

    Cost: about 10 ns a character; the first call of a process reads the character database (0.1 s).
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    points = np.minimum(points, _LAST)
    num_letters = int(_letters()[points].sum())
    return int(_letters_of(script)[points].sum()) / num_letters if num_letters else 0.0


@cache
def _letters() -> NDArray[np.bool_]:
    category = unicodedata.category
    return np.array([category(chr(point))[0] == "L" for point in range(_LAST)] + [False])


@cache
def _letters_of(script: str) -> NDArray[np.bool_]:
    within = np.zeros(_LAST + 1, bool)
    for low, high in SCRIPTS[script]:
        within[low : high + 1] = True
    return within & _letters()
