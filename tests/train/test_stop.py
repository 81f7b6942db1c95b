"""The first signal asks, the second interrupts, and the handlers found are put back."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from marrow.train.stop import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.is_asked
        os.kill(os.getpid(), number)
        assert stop.is_asked


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_interrupts_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert stop.is_asked


def test_handlers_are_put_back_after_an_error_too() -> None:
    mine: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: mine.append(number))
    try:
        with pytest.raises(ValueError, match="a step failed"), StopRequest():
            raise ValueError("a step failed")
        os.kill(os.getpid(), signal.SIGTERM)
        assert mine == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_within_another_gives_its_own_answer() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (inner.is_asked, outer.is_asked) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.is_asked


def test_a_request_can_be_used_again() -> None:
    stop = StopRequest()
    for _ in range(2):
        with stop:
            assert signal.getsignal(signal.SIGINT) == stop._ask
        assert signal.getsignal(signal.SIGINT) != stop._ask


def test_off_the_main_thread_nothing_is_changed_and_nothing_asked() -> None:
    found: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopRequest() as stop:
            found.extend([signal.getsignal(signal.SIGINT) is before, stop.is_asked])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, False]
