import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from marrow.core.errors import UsageError
from marrow.loader.prefetch.thread import Prefetcher

NAME = "prefetch-under-test"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def counter() -> Callable[[], int]:
    numbers = count()
    return lambda: next(numbers)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_items_come_in_order() -> None:
    prefetcher = Prefetcher(counter(), 3, NAME)
    assert [prefetcher.take() for _ in range(1000)] == list(range(1000))
    prefetcher.close()


def test_no_more_is_made_than_the_queue_holds() -> None:
    made: list[int] = []

    def make() -> None:
        time.sleep(0.001)  # long enough for working ahead to pay
        made.append(0)

    prefetcher = Prefetcher(make, 3, NAME)
    wait_until(lambda: len(made) == 3)
    time.sleep(0.05)  # time enough to make one too many
    assert len(made) == 3
    prefetcher.take()
    wait_until(lambda: len(made) == 4)
    prefetcher.close()


def test_an_error_is_raised_in_its_turn_and_again() -> None:
    numbers = counter()

    def make() -> int:
        if (number := numbers()) == 2:
            raise OSError("the disk is gone")
        return number

    prefetcher = Prefetcher(make, 5, NAME)
    assert [prefetcher.take(), prefetcher.take()] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            prefetcher.take()
    wait_until(lambda: threads() == [])  # ended by itself, before close
    prefetcher.close()


def test_closing_wakes_a_producer_that_waits_for_room() -> None:
    prefetcher = Prefetcher(counter(), 1, NAME)
    wait_until(lambda: len(prefetcher._ready) == 1)
    prefetcher.close()
    prefetcher.close()
    assert threads() == []


def test_closing_wakes_a_consumer_that_waits_for_an_item() -> None:
    release = threading.Event()
    raised: list[BaseException] = []
    prefetcher = Prefetcher(release.wait, 1, NAME)

    def consume() -> None:
        try:
            prefetcher.take()
        except UsageError as error:
            raised.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    consumer.join(10)
    assert len(raised) == 1, "the consumer hears of it while the item is still being made"
    release.set()
    closer.join(10)


def test_taking_after_close_is_refused() -> None:
    prefetcher = Prefetcher(counter(), 2, NAME)
    prefetcher.close()
    with pytest.raises(UsageError, match="closed"):
        prefetcher.take()


def test_opening_and_closing_often_leaves_nothing() -> None:
    for i in range(200):
        prefetcher = Prefetcher(counter(), 2, NAME)
        if i % 2:
            assert prefetcher.take() == 0
        prefetcher.close()
        assert threads() == []


def test_a_waiting_producer_uses_no_cpu() -> None:
    prefetcher = Prefetcher(counter(), 2, NAME)
    wait_until(lambda: len(prefetcher._ready) == 2)
    start_s = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start_s < 0.05
    prefetcher.close()


def test_a_consumer_that_only_takes_makes_the_items_itself() -> None:
    makers: list[str] = []

    def make() -> None:
        makers.append(threading.current_thread().name)

    prefetcher = Prefetcher(make, 2, NAME)
    for _ in range(500):
        prefetcher.take()
    prefetcher.close()
    assert makers[-400:].count(NAME) == 0


def test_a_consumer_that_works_in_between_has_items_made_ahead() -> None:
    makers: list[str] = []

    def make() -> None:
        time.sleep(0.002)
        makers.append(threading.current_thread().name)

    prefetcher = Prefetcher(make, 2, NAME)
    for _ in range(20):
        prefetcher.take()
    makers.clear()
    for number in range(30):
        time.sleep(0.006)
        if number >= 5:  # by then a thread makes them, while this one is busy elsewhere
            wait_until(lambda: len(prefetcher._ready) > 0)
        prefetcher.take()
    prefetcher.close()
    assert makers[5:].count(NAME) == len(makers[5:])


def test_make_is_called_by_one_thread_at_a_time_and_no_item_is_lost() -> None:
    """The consumer changes between work and no work, so that the two take turns in making."""
    busy = threading.Lock()
    numbers = count()

    def make() -> int:
        assert busy.acquire(blocking=False), "two threads make items at once"
        time.sleep(0.0003)
        number = next(numbers)
        busy.release()
        return number

    prefetcher = Prefetcher(make, 3, NAME)
    for number in range(400):
        if number // 40 % 2:
            time.sleep(0.0007)
        assert prefetcher.take() == number
    prefetcher.close()


def test_the_first_item_is_made_by_whoever_waits_for_it_and_the_next_ahead() -> None:
    makers: list[str] = []

    def make() -> int:
        makers.append(threading.current_thread().name)
        time.sleep(0.001)  # worth a thread
        return len(makers)

    prefetcher = Prefetcher(make, 2, "ahead", is_waited_for=True)
    try:
        time.sleep(0.01)
        assert makers == []
        assert prefetcher.take() == 1
        wait_until(lambda: len(makers) == 3)
        assert makers == [threading.current_thread().name, "ahead", "ahead"]
        assert [prefetcher.take(), prefetcher.take()] == [2, 3]
    finally:
        prefetcher.close()


def test_a_consumer_that_takes_a_dozen_at_once_and_then_works_has_items_made_ahead() -> None:
    makers: list[str] = []

    def make() -> None:
        makers.append(threading.current_thread().name)
        time.sleep(0.0005)  # worth a thread

    prefetcher = Prefetcher(make, 12, "ahead", is_waited_for=True)
    try:
        for _ in range(6):
            for _ in range(12):
                prefetcher.take()
            made = len(makers)
            time.sleep(0.05)  # a step
        assert makers[made:].count("ahead") >= 6
    finally:
        prefetcher.close()


def test_one_pause_now_and_then_wakes_nobody() -> None:
    """On a machine with pauses of its own several may meet by chance: one trial of five has none."""

    def made_ahead() -> int:
        makers: list[str] = []

        def make() -> None:
            makers.append(threading.current_thread().name)
            time.sleep(0.0003)

        prefetcher = Prefetcher(make, 2, "ahead", is_waited_for=True)
        try:
            for _ in range(3):
                for _ in range(80):
                    prefetcher.take()
                time.sleep(0.01)
        finally:
            prefetcher.close()
        return makers[3:].count("ahead")  # the first two are made ahead, nothing being known yet

    assert any(made_ahead() == 0 for _ in range(5))
