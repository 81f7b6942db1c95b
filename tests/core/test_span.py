"""The ledger: parts add up to the wall time, whatever is nested, raised or done by other threads."""

import json
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core import span as module
from marrow.core.span import OTHER, Ledger, SpanRecord, charge, enclosing_ledger, is_watched, set_sink, span


class Clock:
    """A clock that the test moves: the `time` module as `core.span` sees it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return time.process_time()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def records():
    found: list[SpanRecord] = []
    set_sink(found.append)
    yield found
    set_sink(None)


def seconds(ledger: Ledger) -> dict[str, float]:
    return {name: part.seconds for name, part in ledger.summary().parts.items()}


# A tree of work: (name, seconds before the children, children)
names = st.sampled_from(["wait", "forward", "save", OTHER])
trees = st.recursive(
    st.tuples(names, st.integers(0, 50), st.just([])),
    lambda inner: st.tuples(names, st.integers(0, 50), st.lists(inner, max_size=4)),
    max_leaves=15,
)


@given(st.lists(trees, max_size=5), st.integers(0, 20))
@settings(max_examples=100)
def test_parts_are_exclusive_and_sum_to_the_wall_time(work, between):
    expected: dict[str, float] = {OTHER: 0.0}
    counts: dict[str, int] = {OTHER: 1}
    clock = Clock()
    start_s = clock.now

    def tick(name, amount):
        clock.now += amount
        expected[name] = expected.get(name, 0.0) + amount

    def do(tree):
        name, own, children = tree
        counts[name] = counts.get(name, 0) + 1
        with span(name):
            tick(name, own)
            for child in children:
                do(child)
                tick(name, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        with Ledger("run") as ledger:
            for tree in work:
                do(tree)
                tick(OTHER, between)
        wall_s = clock.now - start_s
    summary = ledger.summary()
    assert seconds(ledger) == {name: expected.get(name, 0.0) for name in counts}
    assert {name: part.count for name, part in summary.parts.items()} == counts
    assert summary.wall_s == wall_s == sum(part.seconds for part in summary.parts.values())


def test_on_a_real_clock_the_sum_is_the_wall_time_to_rounding():
    with Ledger("run") as ledger:
        for i in range(2000):
            with span("outer"), span(f"inner {i % 7}"):
                pass
    summary = ledger.summary()
    # 4000 subtractions of doubles near 1e5 s: each within 1.5e-11
    assert sum(part.seconds for part in summary.parts.values()) == pytest.approx(summary.wall_s, abs=1e-7)
    assert all(part.seconds >= 0 for part in summary.parts.values())


def test_time_is_charged_when_the_block_raises(clock):
    with suppress(KeyError), Ledger("run") as ledger:
        clock.now += 1
        with span("outer"):
            clock.now += 2
            with suppress(ValueError), span("inner"):
                clock.now += 4
                raise ValueError("inner")
            clock.now += 8
            raise KeyError
    assert seconds(ledger) == {"inner": 4, "outer": 10, OTHER: 1}
    with Ledger("next") as after:  # nothing is left on the thread's stack
        clock.now += 1
    assert seconds(after) == {OTHER: 1}


def test_an_inner_ledger_is_one_part_of_the_outer(clock):
    with Ledger("run") as outer, span("step"):
        clock.now += 1
        with Ledger("evaluate") as inner:
            clock.now += 2
            with span("model"):
                clock.now += 4
        clock.now += 8
    assert seconds(inner) == {"model": 4, OTHER: 2}
    assert seconds(outer) == {"evaluate": 6, "step": 9, OTHER: 0}
    assert outer.summary().wall_s == 15


def test_an_open_ledger_reads_out_up_to_now(clock):
    with Ledger("run") as ledger:
        with span("a"):
            clock.now += 3
        with span("b"):
            clock.now += 4
            assert seconds(ledger) == {"a": 3, OTHER: 4}
            assert ledger.summary().wall_s == 7
    assert seconds(ledger) == {"a": 3, "b": 4, OTHER: 0}


def test_other_threads_do_not_disturb_the_sum():
    """Spans of threads without a ledger go nowhere; what they report stands apart."""
    with Ledger("run") as ledger:

        def work(name):
            start_s = time.perf_counter()
            for _ in range(200):
                with span("elsewhere"):
                    pass
            ledger.overlap(name, time.perf_counter() - start_s)

        threads = [threading.Thread(target=work, args=(f"t{i % 2}",)) for i in range(6)]
        for thread in threads:
            thread.start()
        for _ in range(500):
            with span("here"):
                pass
        for thread in threads:
            thread.join()
    summary = ledger.summary()
    assert set(summary.parts) == {"here", OTHER}
    assert {name: part.count for name, part in summary.overlapped.items()} == {"t0": 3, "t1": 3}
    assert sum(part.seconds for part in summary.parts.values()) == pytest.approx(summary.wall_s, abs=1e-7)


def test_two_threads_keep_two_ledgers(clock):
    ledgers = {}
    barrier = threading.Barrier(2, timeout=10)

    def work(name):
        with Ledger(name) as ledgers[name]:
            for _ in range(50):
                barrier.wait()
                with span(name):
                    barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        parts = ledgers[name].summary().parts
        assert set(parts) == {name, OTHER}
        assert parts[name].count == 50


def test_every_span_reaches_the_sink_with_its_times(clock, records):
    with span("outer", step=3):
        clock.now += 1
        with suppress(ValueError), span("inner"):
            clock.now += 2
            raise ValueError("no")
    assert [(r.name, r.start_s, r.duration_s, r.exclusive_s, dict(r.attributes)) for r in records] == [
        ("inner", 101.0, 2.0, 2.0, {}),
        ("outer", 100.0, 3.0, 1.0, {"step": 3}),
    ]
    assert {r.thread for r in records} == {threading.current_thread().name}
    set_sink(None)
    with span("unheard"):
        pass
    assert len(records) == 2


def test_a_sink_that_fails_does_not_break_the_stack(clock):
    def fail(record):
        raise RuntimeError("sink")

    set_sink(fail)
    try:
        with pytest.raises(RuntimeError, match="sink"), span("a"):
            pass
    finally:
        set_sink(None)
    with Ledger("run") as ledger, span("b"):
        clock.now += 1
    assert seconds(ledger) == {"b": 1, OTHER: 0}


def test_a_summary_is_json_and_counts_cpu_time():
    with Ledger("run") as ledger, span("busy"):
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        ledger.overlap("prefetch", 1.5)
    values = json.loads(json.dumps(ledger.summary().as_dict()))
    assert values["name"] == "run"
    assert values["cpu_s"] >= 0.02
    assert values["parts"]["busy"] == {"seconds": ledger.summary().parts["busy"].seconds, "count": 1}
    assert values["overlapped"] == {"prefetch": {"seconds": 1.5, "count": 1}}


def test_a_span_costs_microseconds():
    """The docstring says about 2; 40 is for a busy machine and a debugger's tracing."""
    costs = []
    for _ in range(5):
        start_s = time.thread_time()
        for _ in range(1000):
            with span("x"):
                pass
        costs.append((time.thread_time() - start_s) / 1000)
    assert min(costs) < 40e-6


def test_charging_keeps_the_ledgers_sum() -> None:
    with Ledger("train") as ledger:
        with span("data wait"):
            time.sleep(0.02)
            charge({"data wait: fetch": 0.015, "data wait: queue": 0.004})
        time.sleep(0.005)
    summary = ledger.summary()
    assert summary.parts["data wait: fetch"].seconds == 0.015
    assert 0 <= summary.parts["data wait"].seconds < 0.02
    assert sum(part.seconds for part in summary.parts.values()) == pytest.approx(summary.wall_s, rel=1e-6)


def test_outside_a_ledger_nothing_is_charged() -> None:
    assert not is_watched()
    with span("data wait"):
        charge({"data wait: fetch": 1.0})
    with Ledger("train") as ledger:
        assert is_watched() and enclosing_ledger() is ledger
    assert ledger.summary().parts.keys() == {"other"}
    assert enclosing_ledger() is None


def test_a_sink_watches_too() -> None:
    set_sink(lambda record: None)
    try:
        assert is_watched() and enclosing_ledger() is None
    finally:
        set_sink(None)
    assert not is_watched()
