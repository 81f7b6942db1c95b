"""Personal data and secrets in texts: found by their form and checksum, replaced, counted or dropped.

    email            name@host.tld
    phone            +CC and 8 to 15 digits; (415) 555-0132 and 415-555-0132 of North America
    ip               public IPv4 and IPv6 addresses
    card             13 to 19 digits of a card scheme, with Luhn's check digit
    iban             country, length and the check of ISO 7064
    national_id      of eight countries, each with its checksum (`identity.py`)
    url_credentials  the user and password of scheme://user:password@host
    secret           keys and tokens with a known prefix, JSON web tokens, private key blocks

One scan finds zones with digits, within which the forms of numbers are tried; the rest is found by
its telling characters. A kind that is off still takes what it finds, so that switching one off
does not make another see its digits. Names and addresses are not looked for: they have no
form, and a rule that guesses would damage texts. Nothing here keeps what it found: samples are masked.

Source: Luhn 1960 (US 2,950,048); ISO 13616 and 7064 (IBAN); ITU-T E.164; RFC 5321, 5952.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from marrow.data.quality.identity import NUMBERS, is_national_id
from marrow.data.quality_config import Action, PiiRecipe

PLACEHOLDERS = {
    "email": "[EMAIL]",
    "phone": "[PHONE]",
    "ip": "[IP]",
    "card": "[CARD]",
    "iban": "[IBAN]",
    "national_id": "[ID]",
    "url_credentials": "[CREDENTIALS]",
    "secret": "[SECRET]",
}

_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_][A-Za-z0-9_.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w@-])"
)
_CREDENTIALS = re.compile(r"(?<=://)[^\s/:@\"'<>\[\]{}]{1,256}:[^\s/@\"'<>\[\]{}]{1,256}(?=@[\w\[])")
# The longest forms first: what a private key block holds must not be taken for something else.
_SECRETS = (
    ("-", "-----BEGIN", re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----[\s\S]{1,10000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----"
    )),
    ("ey", "eyJ", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
    ("AK", "AKIA", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("AS", "ASIA", re.compile(r"\bASIA[0-9A-Z]{16}\b")),
    ("AI", "AIza", re.compile(r"\bAIza[\w-]{35}(?![\w-])")),
    ("_", "gh", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b")),
    ("_", "github_pat_", re.compile(r"\bgithub_pat_\w{22,255}\b")),
    ("-", "glpat-", re.compile(r"\bglpat-[\w-]{20,64}(?![\w-])")),
    ("-", "xox", re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,255}")),
    ("-", "sk-", re.compile(r"\bsk-(?:[a-z]+-)*[\w-]{20,255}(?![\w-])")),
    ("_", "k_live_", re.compile(r"\b[rsp]k_live_[A-Za-z0-9]{16,255}\b")),
    ("_", "hf_", re.compile(r"\bhf_[A-Za-z0-9]{30,64}\b")),
    ("_", "npm_", re.compile(r"\bnpm_[A-Za-z0-9]{36}\b")),
    ("-", "pypi-", re.compile(r"\bpypi-[\w-]{50,255}(?![\w-])")),
    ("SG", "SG.", re.compile(r"\bSG\.[\w-]{16,32}\.[\w-]{16,64}(?![\w-])")),
    ("-", "AGE-SECRET-KEY-", re.compile(r"\bAGE-SECRET-KEY-1[0-9A-Z]{58}\b")),
)  # fmt: skip
# Scans begin with a character that is rare in prose, since Python's engine then leaps from one to the
# next; what lies to the left of it is looked at afterwards.
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6_LETTERS = frozenset("0123456789abcdefABCDEF:")
_ZONE = re.compile(r"\d[0-9A-Z .()/\u00a0+-]{6,}")
_LEFT = re.compile(r"(?:\+|\+?\(|[A-Z]{1,6}(?:\d\d[A-Z])?-?)$")
_LEFT_CHARS = 8
_LETTERS_AROUND = r"(?<![\w@#$.+-])(?:{})(?![\w@]|[.-]\d)"
_SPACE = "[ \u00a0]"


_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29,
    "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28,
    "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """Where something stands in a text: from `start` up to `end`, in characters."""

    kind: str
    start: int
    end: int


@dataclass(slots=True)
class Scrubbed:
    """A text after the rules: `dropped_by` names the kind that drops it, `found` all that was found."""

    text: str
    found: list[Finding] = field(default_factory=list)
    dropped_by: str | None = None


def scrubber(recipe: PiiRecipe) -> Callable[[str], Scrubbed] | None:
    """Return the function that applies a recipe to a text, or None if every kind is off.

    A second application finds nothing that the first replaced. A text without findings is the
    very same text.
    """
    actions: dict[str, Action] = dict(recipe.actions())
    if not actions:
        return None

    def scrub(text: str) -> Scrubbed:
        found = [finding for finding in find(text) if finding.kind in actions]
        if not found:
            return Scrubbed(text)
        dropped = next((one.kind for one in found if actions[one.kind] == "drop"), None)
        pieces, at = [], 0
        for one in found:
            if actions[one.kind] != "count":  # what is dropped is replaced too: its sample may be shown
                pieces += [text[at : one.start], PLACEHOLDERS[one.kind]]
                at = one.end
        return Scrubbed("".join([*pieces, text[at:]]), found, dropped)

    return scrub


def find(text: str) -> list[Finding]:
    """Find all kinds in a text, in order, none overlapping: of two, the one that begins first stays.

    Cost: two scans of the text, about 15 ns a character of prose.
    """
    found = sorted(_all(text), key=lambda one: (one.start, -one.end))
    kept: list[Finding] = []
    for one in found:
        if not kept or one.start >= kept[-1].end:
            kept.append(one)
    return kept


def masked(text: str) -> str:
    """Show the form of a finding and nothing else: letters become x, digits 0.

    The mask of "jane@example.org" is "xxxx@xxxxxxx.xxx"; 40 characters at most.
    """
    form = "".join(
        "0" if c.isdigit() else "x" if c.isalpha() else c if c in "@.:/+-() " else "*" for c in text
    )
    return form if len(form) <= 40 else f"{form[:37]}..."


def _all(text: str) -> Iterator[Finding]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Finding("email", *match.span())
        if "://" in text:
            for match in _CREDENTIALS.finditer(text):
                yield Finding("url_credentials", *match.span())
    for rare, prefix, pattern in _SECRETS:  # PERF: most texts are done with the rare letters
        if rare in text and prefix in text:
            for match in pattern.finditer(text):
                yield Finding("secret", *match.span())
    yield from _ipv6(text)
    for match in _ZONE.finditer(text):
        zone = match[0]
        few = zone.count(".") < 3 and sum(map(zone.count, "0123456789")) < 7
        if few and text[max(0, match.start() - 2) : match.start()] not in _IBAN_LENGTHS:
            continue
        left = _LEFT.search(text, max(0, match.start() - _LEFT_CHARS), match.start())
        start = left.start() if left else match.start()
        for kind, pattern, is_one in _FORMS:
            # A character more on the right, so that a number that goes on is no number.
            for inner in pattern.finditer(text, start, match.end() + 2):
                if is_one(inner[0]):
                    yield Finding(kind, *inner.span())


def _ipv6(text: str) -> Iterator[Finding]:
    end = 0
    for match in _COLONS.finditer(text):
        if match.start() < end:
            continue
        start, end = match.span()
        while start > 0 and text[start - 1] in _IPV6_LETTERS:
            start -= 1
        while end < len(text) and text[end] in _IPV6_LETTERS:
            end += 1
        groups = sum(map(bool, text[start:end].split(":")))
        around = text[max(0, start - 1) : start] + text[end : end + 1]
        is_word = any(c.isalnum() or c in "_.@" for c in around.rstrip("."))
        if groups >= 3 and not is_word and _is_public(text[start:end]):
            yield Finding("ip", start, end)


def is_iban(text: str) -> bool:
    """Check an IBAN: the number that its letters and digits make is 1 modulo 97."""
    text = text.replace(" ", "").replace("\u00a0", "")
    if len(text) != _IBAN_LENGTHS.get(text[:2], -1):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """Check a card number: a scheme's first digits, its length, and Luhn's check digit."""
    digits = "".join(c for c in text if c.isdigit())
    first = int(digits[:4])
    schemes = (
        (digits[0] == "4" and len(digits) in (13, 16, 19))
        or ((5100 <= first <= 5599 or 2221 <= first <= 2720) and len(digits) == 16)
        or (digits[:2] in ("34", "37") and len(digits) == 15)
        or ((first == 6011 or digits[:2] == "65" or 6440 <= first <= 6499) and len(digits) in (16, 19))
        or (3528 <= first <= 3589 and len(digits) in (16, 19))
        or ((3000 <= first <= 3059 or digits[:2] in ("36", "38", "39")) and len(digits) == 14)
        or (digits[:2] == "62" and 16 <= len(digits) <= 19)
    )
    return schemes and luhn(digits)


def luhn(digits: str) -> bool:
    """Tell whether the last of the digits is Luhn's check digit of the others."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def _is_public_host(text: str) -> bool:
    return not text.endswith(".0") and _is_public(text)  # a network, or the version of a program


def _is_international(text: str) -> bool:
    return 8 <= sum(map(str.isdigit, text)) <= 15


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(_LETTERS_AROUND.format(pattern))


def _ibans() -> str:
    """Write the pattern of every country's IBAN: its letters and its length, in groups or in one."""
    by_length: dict[int, list[str]] = {}
    for country, length in sorted(_IBAN_LENGTHS.items()):
        by_length.setdefault(length, []).append(country)
    return "|".join(
        rf"(?:{'|'.join(countries)})\d\d(?:{_SPACE}?[A-Z0-9]){{{length - 4}}}"
        for length, countries in sorted(by_length.items())
    )


# What has a checksum and what has a form alone. A number that is two things is what begins first,
# then what is longer, then what stands first here.
_FORMS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("iban", _form(_ibans()), is_iban),
    ("card", _form(r"\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|3[47]\d\d([ -])\d{6}\2\d{5}"), is_card),
    ("national_id", _form(NUMBERS), is_national_id),
    ("ip", _form(r"(?:\d{1,3}\.){3}\d{1,3}"), _is_public_host),
    (
        "phone",
        _form(rf"\+[1-9]\d{{0,2}}(?:(?:\.\d{{2,4}}){{2,4}}|(?:(?:{_SPACE}|[()/-]){{0,2}}\d){{6,14}})"),
        _is_international,
    ),
    ("phone", _form(r"(?:\+?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-. ]\d{4}"), lambda _: True),
)
