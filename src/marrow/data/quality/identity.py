"""National identity numbers that carry a checksum, as they are written.

Only forms whose check and structure let fewer than about one in 200 random numbers through: a
nine-digit number with one check digit alone (the Dutch BSN, the American SSN without any) would
make every ninth number a person.

    Brazil    CPF        ddd.ddd.ddd-dd                two digits modulo 11
    China     resident   region, birth date, 17 digits and one of 0-9X, modulo 11-2 (GB 11643)
    Finland   HETU       ddmmyy[-+A]nnnc               letter modulo 31, birth date
    France    NIR        s yy mm dd ccc nnn kk         97 minus number modulo 97
    Italy     codice     AAAAAA00A00A000A              letter modulo 26
    Poland    PESEL      yymmdd and five digits        weighted modulo 10, birth date
    Spain     DNI, NIE   dddddddd-L, Xddddddd-L        letter modulo 23, hyphen asked for
    Sweden    number     yymmdd-nnnc                   Luhn, birth date

Eight countries. Others are not looked for: the Danish CPR, for one, has had no check digit that
holds since 2007.
"""

import re
from collections.abc import Callable

_CPF = re.compile(r"\d{3}\.\d{3}\.\d{3}-\d{2}", re.ASCII)
_CHINA = re.compile(r"[1-8]\d{5}(?:19|20)\d{2}(\d{2})(\d{2})\d{3}[0-9X]", re.ASCII)
_HETU = re.compile(r"(\d{2})(\d{2})\d{2}[-+A]\d{3}[0-9A-FHJ-NPR-Y]", re.ASCII)
_NIR = re.compile(r"([12]) ?(\d{2}) ?(\d{2}) ?(\d{2}|2[AB]) ?(\d{3}) ?(\d{3}) ?(\d{2})", re.ASCII)
_CODICE = re.compile(r"[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]", re.ASCII)
_PESEL = re.compile(r"\d{2}(\d{2})(\d{2})\d{5}", re.ASCII)
_SPAIN = re.compile(r"([XYZ]?)-?(\d{7,8})-([A-HJ-NP-TV-Z])", re.ASCII)
_SWEDEN = re.compile(r"(?:19|20)?\d{2}(\d{2})(\d{2})[-+]\d{4}", re.ASCII)

_CODICE_ODD = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12,
         14, 16, 10, 22, 25, 24, 23],
        strict=True,
    )
)  # fmt: skip

NUMBERS = "|".join(
    re.sub(r"\((?!\?)", "(?:", pattern.pattern)
    for pattern in (_CPF, _CHINA, _HETU, _NIR, _CODICE, _PESEL, _SPAIN, _SWEDEN)
)  # a pattern for all forms, without groups


def is_national_id(text: str) -> bool:
    """Tell whether a text is one of the numbers above, checksum included."""
    return any(is_one(text) for is_one in _CHECKS)


def is_cpf(text: str) -> bool:
    """Check a Brazilian CPF."""
    if not _CPF.fullmatch(text):
        return False
    digits = [int(c) for c in text if c.isdigit()]
    if len(set(digits)) == 1:
        return False
    for n in (9, 10):
        rest = sum(digit * (n + 1 - i) for i, digit in enumerate(digits[:n])) * 10 % 11
        if rest % 10 != digits[n]:
            return False
    return True


def is_chinese(text: str) -> bool:
    """Check a Chinese resident identity number."""
    match = _CHINA.fullmatch(text)
    if not match or not _is_day(match[1], match[2]):
        return False
    total = sum(int(c) * pow(2, 17 - i, 11) for i, c in enumerate(text[:17]))
    return "10X98765432"[total % 11] == text[17]


def is_hetu(text: str) -> bool:
    """Check a Finnish personal identity code."""
    match = _HETU.fullmatch(text)
    if not match or not _is_day(match[2], match[1]):
        return False
    return "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(text[:6] + text[7:10]) % 31] == text[10]


def is_nir(text: str) -> bool:
    """Check a French social security number with its key."""
    match = _NIR.fullmatch(text)
    if not match or not (1 <= int(match[3]) <= 12 or 20 <= int(match[3]) <= 42):
        return False
    number = "".join(match.groups()[:6]).replace("2A", "19").replace("2B", "18")
    return 97 - int(number) % 97 == int(match[7])


def is_codice_fiscale(text: str) -> bool:
    """Check an Italian fiscal code."""
    if not _CODICE.fullmatch(text):
        return False
    total = sum(
        _CODICE_ODD[c] if i % 2 == 0 else (int(c) if c.isdigit() else ord(c) - 65)
        for i, c in enumerate(text[:15])
    )
    return chr(65 + total % 26) == text[15]


def is_pesel(text: str) -> bool:
    """Check a Polish PESEL; the month carries the century."""
    match = _PESEL.fullmatch(text)
    if not match or not _is_day(f"{int(match[1]) % 20:02}", match[2]):
        return False
    total = sum(int(c) * w for c, w in zip(text, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1), strict=True))
    return total % 10 == 0


def is_spanish(text: str) -> bool:
    """Check a Spanish DNI or NIE written with a hyphen before its letter."""
    match = _SPAIN.fullmatch(text)
    if not match or len(match[2]) != (7 if match[1] else 8):
        return False
    number = int({"X": "0", "Y": "1", "Z": "2"}.get(match[1], "") + match[2])
    return "TRWAGMYFPDXBNJZSQVHLCKE"[number % 23] == match[3]


def is_swedish(text: str) -> bool:
    """Check a Swedish personal identity number; coordination numbers add 60 to the day."""
    match = _SWEDEN.fullmatch(text)
    if not match or not _is_day(match[1], f"{int(match[2]) % 60:02}"):
        return False
    digits = [int(c) for c in text if c.isdigit()][-10:]
    doubled = [digit * (2 - i % 2) for i, digit in enumerate(digits)]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _is_day(month: str, day: str) -> bool:
    return 1 <= int(month) <= 12 and 1 <= int(day) <= 31


_CHECKS: tuple[Callable[[str], bool], ...] = (
    is_cpf,
    is_chinese,
    is_hetu,
    is_nir,
    is_codice_fiscale,
    is_pesel,
    is_spanish,
    is_swedish,
)
