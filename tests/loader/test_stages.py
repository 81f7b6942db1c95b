"""Stages: a wait is divided by what the awaited batch was in, and the parts add up."""

import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.loader.stages import QUEUE, STAGES, Mark, Timeline, count, split, stage, totals

times = st.floats(0, 100)
lines = st.lists(st.tuples(times, st.sampled_from(STAGES)), max_size=12).map(sorted)


def naive(marks: list[Mark], start_s: float, end_s: float, steps: int = 2000) -> dict[str, float]:
    """Walk the wait in small steps and look up each one's stage."""
    parts: dict[str, float] = {}
    width = (end_s - start_s) / steps
    for number in range(steps):
        now = start_s + (number + 0.5) * width
        inside = QUEUE
        for mark_s, name in marks:
            if mark_s <= now:
                inside = name
        if marks and now >= marks[-1][0]:
            inside = QUEUE
        parts[inside] = parts.get(inside, 0.0) + width
    return parts


@given(lines, times, times)
def test_a_wait_is_split_without_rest(marks: list[Mark], first: float, second: float) -> None:
    start_s, end_s = sorted((first, second))
    assert sum(split(marks, start_s, end_s).values()) == pytest.approx(end_s - start_s, abs=1e-9)


@given(lines, times, times)
def test_a_wait_is_split_as_one_would_by_looking(marks: list[Mark], first: float, second: float) -> None:
    start_s, end_s = sorted((first, second))
    expected = naive(marks, start_s, end_s)
    found = split(marks, start_s, end_s)
    for name in set(expected) | set(found):
        # Each border may fall anywhere within a small step.
        error = (len(marks) + 2) * (end_s - start_s) / 2000 + 1e-9
        assert found.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), abs=error)


def test_an_inner_stage_stops_the_outer_ones_clock() -> None:
    with Timeline() as timeline, stage("decode"):
        with stage("fetch"):
            time.sleep(0.02)
        time.sleep(0.01)
    assert [name for _, name in timeline.marks] == [QUEUE, "decode", "fetch", "decode", QUEUE, QUEUE]
    found = totals(timeline.marks)
    assert found["fetch"] >= 0.02
    assert found["decode"] >= 0.01
    assert sum(found.values()) <= timeline.marks[-1][0] - timeline.marks[0][0]


def test_stages_without_a_recording_cost_nothing_and_do_nothing() -> None:
    with stage("decode"):
        count("samples skipped", "a note")
    with Timeline() as timeline:
        pass
    assert [name for _, name in timeline.marks] == [QUEUE, QUEUE]
    assert (timeline.counts, timeline.notes) == ({}, [])


def test_a_recording_within_another_leaves_it_alone() -> None:
    with Timeline() as outer:
        with Timeline() as inner:
            count("samples skipped", "a")
        count("others")
    assert (inner.counts, inner.notes) == ({"samples skipped": 1}, ["a"])
    assert outer.counts == {"others": 1}


def test_notes_are_bounded() -> None:
    with Timeline() as timeline:
        for number in range(1000):
            count("samples skipped", f"note {number}")
    assert timeline.counts["samples skipped"] == 1000
    assert len(timeline.notes) == 20


def test_a_timeline_travels_without_its_listener() -> None:
    heard: list[str] = []
    with Timeline(heard.append) as timeline, stage("decode"):
        count("samples skipped", "x")
    copy = pickle.loads(pickle.dumps(timeline))
    assert (copy.marks, copy.counts, copy.notes) == (timeline.marks, timeline.counts, timeline.notes)
    assert heard == ["decode", QUEUE, QUEUE]
