"""Samples: what a transform is told, what happens to those it refuses, and how they stack."""

import pickle
from pathlib import Path
from typing import Any

import loader_jobs as jobs
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import default_collate

from marrow.core.errors import DataError, UsageError
from marrow.loader.samples import Collate, Samples, stack, tensors_of
from marrow.loader.stages import Timeline


class Somewhere:
    def where(self, row: int) -> str:
        return f"row {row} of somewhere"


def samples(*rows: int) -> Samples:
    return Samples([{"id": row} for row in rows], np.array(rows), Somewhere())


def one(number: int) -> dict[str, Any]:
    return {
        "a": number,
        "b": number + 0.5,
        "c": [number, 2, 3],
        "d": number % 2 == 0,
        "e": np.arange(4, dtype=np.float32) * number,
        "f": torch.ones(2) * number,
        "g": f"text {number}",
    }


SAMPLES = [one(1), one(2)]


def test_stacking_agrees_with_pytorchs_default() -> None:
    theirs, ours = default_collate([s | {"c": np.array(s["c"])} for s in SAMPLES]), stack(SAMPLES)
    assert list(ours) == list(theirs)
    for name in theirs:
        if name == "g":
            assert ours[name] == list(theirs[name])
        else:
            assert torch.equal(ours[name], theirs[name]), name
            assert ours[name].dtype == theirs[name].dtype, name


def test_nested_samples_and_tuples_stack() -> None:
    found = stack([{"in": {"x": 1}, "pair": (1, "a")}, {"in": {"x": 2}, "pair": (2, "b")}])
    assert found["in"]["x"].tolist() == [1, 2]
    assert (found["pair"][0].tolist(), found["pair"][1]) == ([1, 2], ["a", "b"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([{"a": [1, 2]}, {"a": [1]}], ["'a'", "hint: make them of one shape"]),
        ([{"a": np.ones(2)}, {"a": np.ones(3)}], ["'a'", "shape"]),
        ([{"a": 1}, {"b": 1}], ["'a'", "KeyError"]),
        ([{"a": None}, {"a": None}], ["'a'", "NoneType"]),
        ([{"a": {"b": 1}}, {"a": {"b": None}}], ["['a']['b']"]),
        ([{"a": object()}], ["'a'", "object"]),
        ([{"a": (1, 2)}, {"a": (1,)}], ["'a'"]),
    ],
)
def test_what_does_not_stack_is_named(values: list[Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        stack(values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_columns_become_tensors() -> None:
    table = pa.table(
        {
            "n": pa.array([1, 2, 3], pa.int32()),
            "f": pa.array([0.5, 1.5, 2.5], pa.float32()),
            "b": [True, False, True],
            "fixed": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2)),
            "list": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
            "text": ["a", "b", "c"],
            "raw": [b"1", b"2", b"3"],
            "word": pa.array(["x", "y", "x"]).dictionary_encode(),
        }
    )
    for given in (table, pa.concat_tables([table.slice(0, 2), table.slice(2)]), table.slice(1)):
        found = tensors_of(given)
        rows = given.to_pydict()
        for name in ("n", "f", "b", "fixed", "list"):
            assert found[name].tolist() == rows[name], name
        assert found["n"].dtype == torch.int32
        assert (found["text"], found["raw"], found["word"]) == (rows["text"], rows["raw"], rows["word"])
        found["n"] += 1  # its own memory


@pytest.mark.parametrize(
    ("column", "word"),
    [
        (pa.array([1, None]), "1 nulls in 2 rows"),
        (pa.array([[1, 2], [3]]), "2 different lengths, from 1 to 2"),
        (pa.array([{"a": 1}, {"a": 2}]), "struct"),
        (pa.array([[1, None], [3, 4]]), "list"),
        (pa.array([[["a"]], [["b"]]]), "list"),
    ],
)
def test_columns_that_no_tensor_holds_are_named(column: pa.Array, word: str) -> None:
    with pytest.raises(DataError, match="column 'bad'") as caught:
        tensors_of(pa.table({"good": [1, 2], "bad": column}))
    assert word in str(caught.value)


def test_a_transform_is_told_each_samples_position() -> None:
    found = Collate(jobs.double)(samples(7, 3, 9), range(100, 103))
    assert found["double"].tolist() == [14, 6, 18]
    assert found["position"].tolist() == [100, 101, 102]


def test_positions_that_are_left_out_are_not_counted() -> None:
    collate = Collate(jobs.double, skip=((101, 103), (105, 106)))
    assert collate(samples(1, 2, 3), range(100, 105))["position"].tolist() == [100, 103, 104]


def test_a_failing_transform_names_transform_position_row_and_reason() -> None:
    with pytest.raises(DataError) as caught:
        Collate(jobs.fails_on_multiples_of_50)(samples(49, 50, 51), range(10, 13))
    assert caught.value.message == (
        "the transform fails_on_multiples_of_50 failed at sample 11 (row 50 of somewhere): "
        "KeyError: 'no such word'"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_samples_that_fail_can_be_left_out_and_are_counted_and_named() -> None:
    with Timeline() as timeline:
        found = Collate(jobs.fails_on_multiples_of_50, "skip")(samples(49, 50, 51, 100), range(4))
    assert found["id"].tolist() == [49, 51]
    assert timeline.counts == {"samples skipped": 2}
    assert timeline.notes[0] == "sample 1 (row 50 of somewhere): KeyError: 'no such word'"


def test_a_batch_of_which_nothing_is_left_is_an_error() -> None:
    with pytest.raises(DataError, match="none of the 2 samples of this batch could be used; the first: Val"):
        Collate(jobs.fails_always, "skip")(samples(1, 2), range(2))


def test_interrupts_are_not_taken_for_broken_samples() -> None:
    def interrupt(sample: Any, position: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Collate(interrupt, "skip")(samples(1, 2), range(2))


def test_a_stack_of_ones_own_gets_the_samples() -> None:
    assert Collate(jobs.double, stack=len)(samples(1, 2), range(2)) == 2
    assert Collate(stack=len)(samples(1, 2), range(2)) == 2


def test_a_collate_travels(tmp_path: Path) -> None:
    collate = Collate(jobs.double, "skip", skip=((1, 2),))
    assert pickle.loads(pickle.dumps(collate)) == collate


def test_an_unknown_way_with_errors_is_refused() -> None:
    with pytest.raises(UsageError, match="'ignore'") as caught:
        Collate(on_error="ignore")  # type: ignore[arg-type]
    assert "raise, skip" in str(caught.value.hint)
