"""Scripts: letters are of the script that their Unicode name says."""

import unicodedata

import pytest

from marrow.data.quality.scripts import SCRIPTS, script_share

NAMES = {
    "Latin": "LATIN", "Greek": "GREEK", "Cyrillic": "CYRILLIC", "Armenian": "ARMENIAN", "Hebrew": "HEBREW",
    "Arabic": "ARABIC", "Devanagari": "DEVANAGARI", "Bengali": "BENGALI", "Gurmukhi": "GURMUKHI",
    "Gujarati": "GUJARATI", "Tamil": "TAMIL", "Telugu": "TELUGU", "Kannada": "KANNADA",
    "Malayalam": "MALAYALAM", "Sinhala": "SINHALA", "Thai": "THAI", "Lao": "LAO", "Tibetan": "TIBETAN",
    "Myanmar": "MYANMAR", "Georgian": "GEORGIAN", "Ethiopic": "ETHIOPIC", "Khmer": "KHMER",
    "Hangul": "HANGUL", "Han": "CJK UNIFIED",
}  # fmt: skip
COMMON = ("MICRO SIGN", "MASCULINE", "FEMININE", "MODIFIER", "ARABIC TATWEEL")


@pytest.mark.parametrize("script", sorted(NAMES))
def test_letters_of_the_basic_plane_are_of_the_script_in_their_name(script):
    right = wrong = 0
    for low, high in SCRIPTS[script]:
        for point in range(low, min(high, 0xFFFF) + 1):
            name = unicodedata.name(chr(point), "")
            if unicodedata.category(chr(point))[0] == "L" and not any(word in name for word in COMMON):
                is_one = NAMES[script] in name or (script == "Han" and ("CJK" in name or "IDEOGRAPH" in name))
                right += is_one
                wrong += not is_one
    assert right > 25
    assert wrong <= 0.02 * right + 3  # blocks hold a few letters of their neighbours


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("abc где", "Latin", 0.5),
        ("abc где", "Cyrillic", 0.5),
        ("123 !?", "Latin", 0.0),
        ("", "Latin", 0.0),
        ("naïve Übermut", "Latin", 1.0),
        ("e\u0301te\u0301", "Latin", 1.0),
        ("私はKenです", "Japanese", 4 / 7),
        ("한국어 漢字", "Korean", 1.0),
        ("𠀀𠀁", "Han", 1.0),
        ("😀 a", "Latin", 1.0),
        ("\ud800a", "Latin", 1.0),
    ],
)
def test_shares_are_of_letters_alone(text, script, share):
    assert script_share(text, script) == pytest.approx(share)
