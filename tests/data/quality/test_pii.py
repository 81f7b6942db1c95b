"""Personal data: what has the form and the checksum is found, what only looks alike is not."""

import random
import re
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.data.quality.pii import (
    _IBAN_LENGTHS,
    PLACEHOLDERS,
    find,
    is_card,
    is_iban,
    luhn,
    masked,
    scrubber,
)
from marrow.data.quality_config import PiiRecipe

ALL = PiiRecipe(*["replace"] * 8)
A36 = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6"


def found(text: str) -> list[tuple[str, str]]:
    return [(one.kind, text[one.start : one.end]) for one in find(text)]


def scrubbed(text: str, recipe: PiiRecipe = ALL) -> str:
    scrub = scrubber(recipe)
    assert scrub is not None
    return scrub(text).text


FOUND = [
    ("email", "jane.doe+news@mail.example.co.uk"),
    ("email", "x_1@sub-domain.example.museum"),
    ("phone", "+49 (0)30 1234567"),
    ("phone", "+442071838750"),
    ("phone", "+1.415.555.0132"),
    ("phone", "(415) 555-0132"),
    ("phone", "415-555-0132"),
    ("phone", "1-415-555-0132"),
    ("ip", "8.8.8.8"),
    ("ip", "2001:4860:4860::8888"),
    ("ip", "2606:4700:4700:0:0:0:0:1111"),
    ("card", "4111 1111 1111 1111"),
    ("card", "5555-5555-5555-4444"),
    ("card", "378282246310005"),
    ("card", "3782 822463 10005"),
    ("card", "6011111111111117"),
    ("card", "30569309025904"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82WEST12345698765432"),
    ("iban", "FR14 2004 1010 0505 0001 3M02 606"),
    ("iban", "NO9386011117947"),
    ("iban", "MT84MALT011000012345MTLCAST001S"),
    ("national_id", "529.982.247-25"),
    ("national_id", "11010519491231002X"),
    ("national_id", "131052-308T"),
    ("national_id", "2 69 05 49 588 157 80"),
    ("national_id", "RSSMRA85T10A562S"),
    ("national_id", "44051401359"),
    ("national_id", "12345678-Z"),
    ("national_id", "X1234567-L"),
    ("national_id", "811218-9876"),
    ("secret", "AKIAIOSFODNN7EXAMPLE"),
    ("secret", f"ghp_{A36}"),
    ("secret", f"github_pat_{A36}"),
    ("secret", "glpat-abcdefghij0123456789"),
    ("secret", "xoxb-123456789012-abcdefABCDEF"),
    ("secret", f"sk-proj-{A36}"),
    ("secret", f"sk_live_{A36}"),
    ("secret", f"hf_{A36}"),
    ("secret", f"npm_{A36}"),
    ("secret", f"AIza{A36[:35]}"),
    ("secret", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijklmnop"),
    ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"),
]


@pytest.mark.parametrize(("kind", "value"), FOUND)
def test_each_kind_is_found_within_any_text(kind, value):
    for frame in (
        "{}",
        "Call {}.",
        "({})",
        "is {}, and",
        "a\n{}\nb",
        '"{}"',
        "x: {}; y",
        "word {} word",
        "<{}>",
    ):
        assert found(frame.format(value)) == [(kind, value)], frame
    assert scrubbed(f"is {value}, and") == f"is {PLACEHOLDERS[kind]}, and"


def test_credentials_go_and_the_rest_of_the_address_stays():
    assert scrubbed("postgres://admin:s3cr.t!@db.example.org:5432/x") == (
        "postgres://[CREDENTIALS]@db.example.org:5432/x"
    )
    assert found("https://example.org:8080/a:b@c") == []
    assert found("see https://example.org/@user") == []


NOT_FOUND = [
    "user@localhost",
    "@handle and a @ b",
    "a@b",
    "decorator @property.setter",
    "version 1.2.3.4.5",
    "v1.2.3.4",
    "10.0.0.1 and 192.168.1.1 and 127.0.0.1 and 224.0.0.1",
    "1.0.0.0",
    "256.1.1.1",
    "a[::2] and std::vec::new and 12:30:45 and ::1 and fe80::1",
    "de:ad:be:ef:00:01",
    "200:: is a section::",
    "4111 1111 1111 1112",
    "1234567812345678",
    "4111111111111111111111",
    "DE89 3704 0044 0532 0130 01",
    "GB82 WEST 1234 5698 7654",
    "555-0132",
    "2024-01-31 12:00:00",
    "1,234,567.89 and 3.14159265358979",
    "+1234567.8",
    "order 12345678901",
    "529.982.247-26",
    "12345678-A",
    "811218-9875",
    "0.123456789012345678",
    "sk-short and ghp_short and AKIA1234 and hf_x",
    "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    "f47ac10b-58cc-4372-a567-0e02b2c3d479",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "ISBN 978-3-16-148410-0",
    "call 415-555-01321",
    "0x4111111111111111",
]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_alike_stays(text):
    assert found(text) == []
    assert scrubbed(text) == text


def test_several_in_one_text_are_all_found_in_order():
    text = "8.8.8.8 4111 1111 1111 1111 +442071838750 378282246310005 jane@example.org 415-555-0132"
    assert [kind for kind, _ in found(text)] == ["ip", "card", "phone", "card", "email", "phone"]
    assert scrubbed(text) == "[IP] [CARD] [PHONE] [CARD] [EMAIL] [PHONE]"


# Checksums against a second way to compute them


@given(st.text(string.digits, min_size=12, max_size=18))
def test_one_wrong_digit_is_no_card(digits):
    check = next(c for c in string.digits if luhn(digits + c))
    assert sum(luhn(digits + c) for c in string.digits) == 1
    table = "0246813579"  # the digits sums of doubled digits
    total = sum(int(table[int(c)]) if i % 2 else int(c) for i, c in enumerate(reversed(digits + check)))
    assert total % 10 == 0


@given(st.sampled_from(sorted(_IBAN_LENGTHS)), st.randoms(use_true_random=False))
def test_an_iban_is_one_of_ninety_seven(country, generator):
    body = "".join(generator.choices(string.digits + string.ascii_uppercase, k=_IBAN_LENGTHS[country] - 4))
    remainder = 0
    for letter in body + country + "00":  # digit by digit, as ISO 7064 says
        for digit in str(int(letter, 36)):
            remainder = (remainder * 10 + int(digit)) % 97
    whole = f"{country}{98 - remainder:02}{body}"
    assert is_iban(whole)
    assert found(f"pay {whole} now") == [("iban", whole)]
    at = generator.randrange(4, len(whole))
    other = generator.choice([c for c in string.digits if c != whole[at]])
    assert not is_iban(whole[:at] + other + whole[at + 1 :]) or whole[at].isalpha()


def test_random_numbers_are_seldom_something():
    generator = random.Random(3)
    text = " ".join(
        "".join(generator.choices(string.digits, k=generator.randint(5, 20))) for _ in range(20_000)
    )
    kinds = [kind for kind, _ in found(text)]
    # Luhn lets one of ten through; a scheme's first digits and length about one of 25 of those lengths.
    assert kinds.count("card") < 120
    assert kinds.count("national_id") < 120
    assert len(kinds) < 240


def test_a_card_is_of_a_scheme():
    assert is_card("4242424242424242")
    assert not is_card("1242424242424240")
    assert not is_card("0000000000000000")


# Scrubbing

TEXTS = st.lists(
    st.one_of(
        st.sampled_from([value for _, value in FOUND]),
        st.sampled_from(NOT_FOUND),
        st.text("aZ1 9.-@:+/()\n", max_size=12),
        st.sampled_from(list(PLACEHOLDERS.values())),
    ),
    max_size=8,
).flatmap(lambda parts: st.sampled_from([" ", "\n", ", ", ""]).map(lambda sep: sep.join(parts)))


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_findings_do_not_overlap_and_the_rest_of_the_text_stays(text):
    pieces, at = [], 0
    for one in find(text):
        assert at <= one.start < one.end
        pieces.append(re.escape(text[at : one.start]) + re.escape(PLACEHOLDERS[one.kind]))
        at = one.end
    assert re.fullmatch("".join(pieces) + re.escape(text[at:]), scrubbed(text))
    assert text.count("\n") >= scrubbed(text).count("\n")


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_a_second_scrub_changes_nothing_that_stood_apart(text):
    once = scrubbed(text)
    placeholders = set(PLACEHOLDERS.values())
    for one in find(once):  # only what was glued to something else before may show itself now
        around = once[max(0, one.start - 14) : one.end + 14]
        assert any(placeholder in around for placeholder in placeholders)


def test_a_text_without_findings_is_the_same_object():
    scrub = scrubber(ALL)
    assert scrub is not None
    text = "nothing to see here"
    assert scrub(text).text is text
    assert scrubber(PiiRecipe()) is None


def test_each_kind_has_its_own_action():
    scrub = scrubber(PiiRecipe(email="replace", card="drop", phone="count"))
    assert scrub is not None
    text = "a@example.org +442071838750 8.8.8.8"
    result = scrub(text)
    assert result.text == "[EMAIL] +442071838750 8.8.8.8"
    assert [one.kind for one in result.found] == ["email", "phone"]
    assert result.dropped_by is None
    assert scrub("4111 1111 1111 1111").dropped_by == "card"
    assert "4111" not in scrub("4111 1111 1111 1111").text


def test_switching_a_kind_off_does_not_make_another_see_its_digits():
    everything = {one.kind for one in find(" ".join(value for _, value in FOUND))}
    assert everything == set(PLACEHOLDERS) - {"url_credentials"}
    scrub = scrubber(PiiRecipe(phone="replace"))
    assert scrub is not None
    for kind, value in FOUND:
        assert (scrub(value).text == value) == (kind != "phone")


@given(st.text(max_size=60))
def test_a_mask_shows_no_letter_or_digit(text):
    mask = masked(text)
    assert set(mask) <= set("x0@.:/+-() *")
    assert len(mask) <= 40


def test_a_mask_keeps_the_form():
    assert masked("jane@example.org") == "xxxx@xxxxxxx.xxx"
    assert masked("+49 (0)30 123") == "+00 (0)00 000"
    assert masked("秘密٣") == "xx0"


@pytest.mark.parametrize(
    "text",
    ["1" * 100_000, "1 " * 50_000, "a@" * 50_000, "://" * 30_000, ":" * 100_000, "AB12" * 25_000,
     "(1)-" * 25_000, "+1." * 30_000, "sk-" * 30_000, "-----BEGIN PRIVATE KEY-----" * 2_000,
     "eyJ" * 30_000, "a." * 50_000 + "@", "aa:" * 30_000],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_no_text_takes_forever(text):
    start_s = time.process_time()
    kinds = {one.kind for one in find(text)}
    # A pattern that backtracks would take hours; a linear one takes well under a second.
    assert time.process_time() - start_s < 20
    assert kinds <= PLACEHOLDERS.keys()
