from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.kernels.rows.gather_rows import Columns, RowTable
from marrow.loader.batch import IGNORED, Batch, make_batch
from marrow.loader.loader import Loader
from marrow.loader.reader import Rows, ShardReader


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A context and rows, each the lengths of its pieces."""
    context = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        lengths: list[int] = []
        while (room := context + 1 - sum(lengths)) >= 2 and (not lengths or draw(st.booleans())):
            lengths.append(draw(st.integers(2, room)))
        rows.append(lengths)
    return context, rows


def as_arrays(context: int, rows: list[list[int]], *, use_native: bool = True) -> Rows:
    """Every token is a number of its own, from 1 on; padding is 0."""
    tokens = np.zeros((len(rows), context + 1), dtype=np.uint16)
    starts: list[int] = []
    counter = 1
    for out, lengths in zip(tokens, rows, strict=True):
        out[: sum(lengths)] = np.arange(counter, counter + sum(lengths))
        counter += sum(lengths)
        starts += [sum(lengths[:i]) for i in range(len(lengths))]
    columns = Columns(
        tokens=tokens,
        starts=np.array(starts, dtype=np.int32),
        starts_of=np.cumsum([0, *map(len, rows)], dtype=np.int32),
        num_tokens=np.array([sum(lengths) for lengths in rows], dtype=np.int32),
    )
    table = RowTable([len(rows)], context + 1, lambda _: columns, use_native=use_native)
    return Rows(table, np.arange(len(rows)))


def by_hand(context: int, rows: list[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token by token, with loops."""
    tokens, targets, positions, documents = [], [], [], []
    counter, document = 1, -1
    for lengths in rows:
        row: list[tuple[int, int, int, int]] = []
        for length in lengths:
            document += 1
            for i in range(length):
                target = counter + 1 if i < length - 1 else IGNORED
                row.append((counter, target, i, document))
                counter += 1
        while len(row) < context + 1:
            row.append((0, IGNORED, row[-1][2] + 1, document))
        for token, target, position, number in row[:context]:
            tokens.append(token)
            targets.append(target)
            positions.append(position)
            documents.append(number)
    return tokens, targets, positions, documents


@settings(deadline=None, max_examples=120)
@given(packed=packed_rows(), use_native=st.booleans())
def test_a_batch_is_what_loops_make(packed: tuple[int, list[list[int]]], use_native: bool) -> None:
    context, rows = packed
    batch = make_batch(as_arrays(context, rows, use_native=use_native), range(5, 5 + len(rows)))
    tokens, targets, positions, documents = by_hand(context, rows)
    assert batch.tokens_N.tolist() == tokens
    assert batch.targets_N.tolist() == targets
    assert batch.positions_N.tolist() == positions
    assert batch.document_N.tolist() == documents
    assert batch.num_targets == sum(target != IGNORED for target in targets)
    assert batch.num_targets == sum(length - 1 for lengths in rows for length in lengths)
    assert (batch.rows, batch.T, batch.samples) == (len(rows), context, range(5, 5 + len(rows)))


def test_the_picture_in_the_docstring() -> None:
    batch = make_batch(as_arrays(7, [[4, 4]]), range(1))
    assert batch.tokens_N.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.targets_N.tolist() == [2, 3, 4, IGNORED, 6, 7, 8]
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.document_N.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_types_and_shapes(shards: Path) -> None:
    with Loader(shards, 6, seed=0) as loader:
        batch = next(loader)
        for name in ("tokens_N", "targets_N", "positions_N"):
            assert getattr(batch, name).dtype == torch.int64
        assert batch.document_N.dtype == torch.int32
        for name in ("tokens_N", "targets_N", "positions_N", "document_N"):
            tensor = getattr(batch, name)
            assert tensor.shape == (6 * loader.manifest.context,)
            assert tensor.is_contiguous()
            tensor.add_(0)  # writable, or torch would have warned


def batches_of_an_epoch(shards: Path) -> list[Batch]:
    with Loader(shards, 1, seed=0) as loader:
        return [next(loader) for _ in range(loader.manifest.num_rows)]


def test_an_epoch_predicts_every_token_exactly_once(shards: Path) -> None:
    """From the batches alone, with the places that the reader gives for each row."""
    seen: Counter[tuple[int, int, int]] = Counter()
    length: dict[int, int] = {}
    with ShardReader(shards) as reader, Loader(shards, 1, seed=0) as loader:
        for row_of_epoch in range(loader.manifest.num_rows):
            batch = next(loader)
            [row] = loader.order.rows(np.array([row_of_epoch])).tolist()
            for number, (document_id, offset, start, end) in enumerate(reader.documents(row)):
                inside = (batch.document_N == number).nonzero().flatten()
                assert inside[0] == start
                counted = inside[batch.targets_N[inside] != IGNORED]
                for place in counted.tolist():
                    predicted = offset + place - start + 1
                    seen[document_id, predicted, int(batch.targets_N[place])] += 1
                length[document_id] = max(length.get(document_id, 0), offset + end - start)
        manifest = loader.manifest
    assert set(seen.values()) == {1}
    places = Counter((document_id, place) for document_id, place, _ in seen)
    assert places == Counter({(d, place): 1 for d, n in length.items() for place in range(1, n)})
    assert len(seen) == manifest.num_predicted_tokens
    bos_predicted = [place for _, place, _ in seen if place == 0]
    assert bos_predicted == []


def test_targets_never_cross_documents(shards: Path) -> None:
    for batch in batches_of_an_epoch(shards):
        counted = (batch.targets_N != IGNORED).nonzero().flatten()
        inner = counted[counted + 1 < len(batch.tokens_N)]
        assert torch.equal(batch.targets_N[inner], batch.tokens_N[inner + 1])
        assert torch.equal(batch.document_N[inner], batch.document_N[inner + 1])
        assert torch.equal(batch.positions_N[inner] + 1, batch.positions_N[inner + 1])


@pytest.mark.parametrize("batch_rows", [1, 5])
def test_positions_restart_with_each_document(shards: Path, batch_rows: int) -> None:
    with Loader(shards, batch_rows, seed=0) as loader:
        batch = next(loader)
    new = torch.cat((torch.tensor([True]), batch.document_N[1:] != batch.document_N[:-1]))
    assert torch.equal(batch.positions_N == 0, new)
    assert bool((torch.diff(batch.document_N) >= 0).all())
    rows = torch.arange(batch.rows).repeat_interleave(batch.T)
    for number in batch.document_N.unique():
        assert len(rows[batch.document_N == number].unique()) == 1, "a document number is of one row"
