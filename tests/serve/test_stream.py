"""Shown text never holds half a character, a stop string, or what may become one."""

from hypothesis import given
from hypothesis import strategies as st

from marrow.serve.stream import TextStream


class Letters:
    """A detokenizer whose token ids are code points."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return ""


def show(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    stream = TextStream(Letters(), stop)
    pieces = []
    for character in text:
        piece, stopped = stream.add(ord(character))
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, stream.finish()], False


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert show("ab\n\nx", ("\n\n\n", "yy")) == (["a", "b", "", "", "\n\nx", ""], False)


def test_the_stop_string_is_not_shown() -> None:
    assert show("one##two", ("##",)) == (["o", "n", "e", "", ""], True)


def test_without_stop_strings_nothing_waits() -> None:
    assert show("abc", ()) == (["a", "b", "c", ""], False)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_text_is_cut_where_the_first_stop_string_is_complete(text: str, stop: list[str]) -> None:
    pieces, stopped = show(text, tuple(stop))
    ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    if not ends:
        assert (("".join(pieces)), stopped) == (text, False)
        return
    # Tokens come one by one, so the stop string that is complete first decides, and of those
    # that are complete at the same token the one that begins first.
    end = min(end for end, _ in ends)
    begin = min(at for e, at in ends if e == end)
    assert ("".join(pieces), stopped) == (text[:begin], True)
