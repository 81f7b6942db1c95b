"""The figures of a run add up over windows, checkpoints and kills; a torn line costs nothing else."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.train import meter as meters
from marrow.train.meter import FILE_NAME, Meter, MetricsFile

STEPS = st.lists(
    st.tuples(
        st.floats(0.01, 20),  # loss
        st.integers(1, 4096),  # tokens
        st.integers(1, 1000).map(lambda ms: ms / 1024),  # seconds: sums of these are exact
        st.integers(0, 1).map(float),  # share of it that was a wait
    ),
    min_size=1,
    max_size=12,
)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(meters.time, "perf_counter", lambda: self.now_s)


def run(meter: Meter, clock: Clock, steps: list[tuple[float, int, float, float]]) -> None:
    for loss, tokens, seconds, wait_share in steps:
        clock.now_s += seconds
        meter.add(loss, tokens=tokens, targets=tokens - 1, wait_s=seconds * wait_share)


def new(clock: Clock) -> Meter:
    return Meter(flops_per_token=6.0, peak_flops=1e3, _mark_s=clock.now_s)


@given(STEPS, STEPS)
def test_a_window_has_its_own_steps_and_the_facts_have_all(first, second) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        meter = new(clock)
        for steps in (first, second):
            run(meter, clock, steps)
            seconds = sum(step[2] for step in steps)
            figures = meter.read()
            assert figures["loss"] == sum(step[0] for step in steps) / len(steps)
            assert figures["tokens_per_s"] == sum(step[1] for step in steps) / seconds
            assert figures["data_wait_share"] == sum(step[2] * step[3] for step in steps) / seconds
            assert figures["mfu"] == figures["tokens_per_s"] * 6.0 / 1e3
        both = first + second
        facts = meter.facts()
        assert facts["tokens"] == figures["tokens"] == sum(step[1] for step in both)
        assert facts["targets"] == facts["tokens"] - len(both)
        assert facts["seconds"] == figures["seconds"] == sum(step[2] for step in both)
        assert facts["tokens_per_s"] == facts["tokens"] / facts["seconds"]


@given(STEPS, STEPS)
def test_a_resumed_meter_ends_with_the_figures_of_an_unbroken_one(first, second) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        unbroken = new(clock)
        run(unbroken, clock, first)
        kept = json.loads(json.dumps(unbroken.state()))  # as a checkpoint keeps it
        clock.now_s += 1000  # the machine was off, which is no time of the run
        resumed = new(clock)
        resumed.load_state(kept)
        unbroken._mark_s = clock.now_s
        before_s = clock.now_s
        run(unbroken, clock, second)
        clock.now_s = before_s
        run(resumed, clock, second)
        assert resumed.read() == unbroken.read()
        assert resumed.facts() == unbroken.facts()


def test_the_machine_of_before_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    state = new(Clock(monkeypatch)).state()
    assert not {"flops_per_token", "peak_flops", "_mark_s"} & state.keys()


def test_time_between_two_steps_belongs_to_the_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = new(clock)
    clock.now_s += 3
    meter.checkpoint_s += 2
    meter.add(1.0, tokens=10, targets=9, wait_s=0.5)
    facts = meter.facts()
    assert (facts["seconds"], facts["data_wait_share"], facts["checkpoint_share"]) == (3.0, 0.5 / 3, 2 / 3)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()]


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0)
    for step in (1, 2):
        file.write(step, {"loss": step / 2})
        assert lines(tmp_path)[-1] == {"step": step, "loss": step / 2}
    file.close()
    file.close()
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("after", [0, 1, 4, 7, 100])
def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path, after: int) -> None:
    file = MetricsFile(tmp_path, 0)
    for step in range(1, 8):
        file.write(step, {"loss": 1.0})
    file.close()
    again = MetricsFile(tmp_path, after)
    assert [line["step"] for line in lines(tmp_path)] == [step for step in range(1, 8) if step <= after]
    again.write(after + 1, {"loss": 2.0})
    again.close()
    assert lines(tmp_path)[-1] == {"step": after + 1, "loss": 2.0}


@pytest.mark.parametrize("cut", [1, 5, 12, 20])
def test_a_line_torn_by_a_kill_goes_and_those_before_it_stay(tmp_path: Path, cut: int) -> None:
    file = MetricsFile(tmp_path, 0)
    for step in (1, 2, 3):
        file.write(step, {"loss": 1.0})
    file.close()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    MetricsFile(tmp_path, 10).close()
    assert [line["step"] for line in lines(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 2])
