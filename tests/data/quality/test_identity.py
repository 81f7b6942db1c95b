"""National numbers: a checksum lets one of its letters or digits through, and notices a slip of one digit."""

import random
import re
from collections.abc import Callable

import pytest

from marrow.data.quality import identity
from marrow.data.quality.identity import (
    NUMBERS,
    is_chinese,
    is_codice_fiscale,
    is_cpf,
    is_hetu,
    is_national_id,
    is_nir,
    is_pesel,
    is_spanish,
    is_swedish,
)

Check = Callable[[str], bool]
DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def date(draw: random.Random) -> tuple[str, str, str]:
    return f"{draw.randrange(100):02}", f"{draw.randrange(1, 13):02}", f"{draw.randrange(1, 29):02}"


def digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(DIGITS, k=count))


def cpf(draw: random.Random) -> str:
    return f"{digits(draw, 3)}.{digits(draw, 3)}.{digits(draw, 3)}-"


def chinese(draw: random.Random) -> str:
    year, month, day = date(draw)
    return f"{draw.randrange(1, 9)}{digits(draw, 5)}19{year}{month}{day}{digits(draw, 3)}"


def hetu(draw: random.Random) -> str:
    year, month, day = date(draw)
    return f"{day}{month}{year}{draw.choice('-+A')}{digits(draw, 3)}"


def nir(draw: random.Random) -> str:
    year, month, _ = date(draw)
    place = draw.choice([digits(draw, 2), "2A", "2B"])
    return f"{draw.choice('12')}{year}{month}{place}{digits(draw, 6)}"


def codice(draw: random.Random) -> str:
    name = "".join(draw.choices(LETTERS, k=6))
    born = f"{digits(draw, 2)}{draw.choice('ABCDEHLMPRST')}{digits(draw, 2)}"
    return f"{name}{born}{draw.choice(LETTERS)}{digits(draw, 3)}"


def pesel(draw: random.Random) -> str:
    year, month, day = date(draw)
    return f"{year}{int(month) + draw.choice([0, 20, 40, 60, 80]):02}{day}{digits(draw, 4)}"


def spanish(draw: random.Random) -> str:
    return draw.choice([digits(draw, 8), draw.choice("XYZ") + digits(draw, 7)]) + "-"


def swedish(draw: random.Random) -> str:
    year, month, day = date(draw)
    return (
        f"{draw.choice(['', '19', '20'])}{year}{month}{int(day) + draw.choice([0, 60]):02}-{digits(draw, 3)}"
    )


# check, what stands before its last sign(s), those it may end with, how many of them are right
KINDS: list[tuple[Check, Callable[[random.Random], str], list[str], int]] = [
    (is_cpf, cpf, [f"{n:02}" for n in range(100)], 1),
    (is_chinese, chinese, [*DIGITS, "X"], 1),
    (is_hetu, hetu, list(DIGITS + "ABCDEFHJKLMNPRSTUVWXY"), 1),
    (is_nir, nir, [f"{n:02}" for n in range(100)], 1),
    (is_codice_fiscale, codice, list(LETTERS), 1),
    (is_pesel, pesel, list(DIGITS), 1),
    (is_spanish, spanish, list("ABCDEFGHJKLMNPQRSTVWXYZ"), 1),
    (is_swedish, swedish, list(DIGITS), 1),
]
ids = [check.__name__ for check, *_ in KINDS]


def complete(check: Check, body: str, ends: list[str]) -> list[str]:
    return [body + end for end in ends if check(body + end)]


@pytest.mark.parametrize(("check", "body", "ends", "right"), KINDS, ids=ids)
def test_of_all_check_signs_just_one_is_right(check, body, ends, right: int) -> None:
    draw = random.Random(1)
    for _ in range(100):
        start = body(draw)
        if check is is_cpf and len(set(re.sub(r"\D", "", start))) == 1:
            continue  # eleven equal digits are never given out
        assert len(complete(check, start, ends)) == right, start


@pytest.mark.parametrize(("check", "body", "ends", "right"), KINDS, ids=ids)
def test_each_is_found_by_the_pattern_of_all_and_by_the_check_of_all(check, body, ends, right) -> None:
    draw = random.Random(2)
    pattern = re.compile(NUMBERS)
    assert pattern.groups == 0
    for _ in range(50):
        for text in complete(check, body(draw), ends):
            assert pattern.fullmatch(text)
            assert is_national_id(text)
            assert not is_national_id(f"{text}0")
            assert not is_national_id(f"0{text}") or re.fullmatch(r"\d+", text)


@pytest.mark.parametrize(("check", "body", "ends", "right"), KINDS, ids=ids)
def test_a_slip_of_one_digit_is_noticed(check, body, ends, right) -> None:
    """All but few: the sums modulo 10, 26 and of the birth date miss none or hardly any."""
    draw = random.Random(3)
    missed = tried = 0
    for _ in range(60):
        for text in complete(check, body(draw), ends):
            at = draw.choice([i for i, c in enumerate(text) if c in DIGITS])
            other = draw.choice([c for c in DIGITS if c != text[at]])
            tried += 1
            missed += check(text[:at] + other + text[at + 1 :])
    assert tried >= 50
    assert missed <= tried * 0.06  # the century of a Swedish number is outside its sum


@pytest.mark.parametrize(("check", "body", "ends", "right"), KINDS, ids=ids)
def test_digits_of_other_scripts_make_no_number(check, body, ends, right) -> None:
    draw = random.Random(4)
    arabic = str.maketrans(DIGITS, "٠١٢٣٤٥٦٧٨٩")
    for _ in range(20):
        for text in complete(check, body(draw), ends):
            assert not check(text.translate(arabic))
            assert not is_national_id(text.translate(arabic))


PUBLISHED = [  # examples that the issuers or their documentation give
    (is_cpf, "529.982.247-25"),
    (is_chinese, "11010519491231002X"),
    (is_hetu, "131052-308T"),
    (is_nir, "1 84 12 76 451 089 46"),
    (is_nir, "2 55 08 14 168 025 38"),
    (is_codice_fiscale, "RSSMRA85T10A562S"),
    (is_pesel, "44051401359"),
    (is_spanish, "12345678-Z"),
    (is_spanish, "X1234567-L"),
    (is_swedish, "811218-9876"),
    (is_swedish, "19811218-9876"),
]


@pytest.mark.parametrize(("check", "text"), PUBLISHED)
def test_published_examples_are_numbers_of_their_country(check: Check, text: str) -> None:
    assert check(text)
    assert is_national_id(text)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (is_cpf, "111.111.111-11"),  # its sums agree
        (is_cpf, "52998224725"),
        (is_chinese, "11010519491331002X"),  # month 13
        (is_chinese, "11010518491231002X"),  # 1849
        (is_hetu, "321052-308T"),  # day 32
        (is_hetu, "131052-308t"),
        (is_nir, "1 84 13 76 451 089 46"),  # month 13
        (is_nir, "3 84 12 76 451 089 46"),
        (is_codice_fiscale, "RSSMRA85T10A562s"),
        (is_codice_fiscale, "RSSMRA85Z10A562S"),
        (is_pesel, "44131401359"),
        (is_spanish, "12345678Z"),  # without the hyphen any eight digits and a letter would do
        (is_spanish, "1234567-L"),
        (is_spanish, "X12345678-L"),
        (is_swedish, "811318-9876"),
        (is_swedish, "8112189876"),
    ],
)
def test_what_has_another_form_is_none(check: Check, text: str) -> None:
    assert not check(text)


def test_every_check_is_asked() -> None:
    assert set(identity._CHECKS) == {check for check, *_ in KINDS}
    assert not is_national_id("")
