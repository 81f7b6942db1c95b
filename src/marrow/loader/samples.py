"""Samples: rows as dictionaries, what a transform makes of them, and batches of tensors.

    Reader.take(rows) -> Samples -> transform(sample, position) for each -> collate -> batch

One idea: a transform is a function of the sample and its position in the global order. Whoever
needs chance draws it from (seed, position), so a batch is the same on any number of workers, and
after a resume. A sample that cannot be used is an error that names it, or is left out and counted,
as the user chooses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marrow.core.errors import DataError, MarrowError, UsageError
from marrow.loader.stages import count, stage

Int64Array = NDArray[np.int64]
Sample = dict[str, Any]
Transform = Callable[[Sample, int], Any]
OnError = Literal["raise", "skip"]
SKIPPED = "samples skipped"


class Origins(Protocol):
    """Says where rows come from."""

    def where(self, row: int) -> str:
        """Name a row for a human: its file and its place in it."""
        ...


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows as a reader gives them: a table, or dictionaries; in the order of rows_B, int64 [B]."""

    values: pa.Table | list[Any]
    rows_B: Int64Array
    origins: Origins

    def __len__(self) -> int:
        return len(self.rows_B)

    def as_list(self) -> list[Any]:
        """Return the rows one by one, as Python values."""
        if isinstance(self.values, list):
            return self.values
        rows: list[Any] = self.values.to_pylist()
        return rows


@dataclass(frozen=True, slots=True)
class Collate:
    """Turns Samples into a batch: each through the transform, then all through `stack`.

    transform: gets a sample and its position; None takes columns as they are. on_error: "raise"
    names the sample that failed; "skip" leaves it out, counts it and notes why. stack: makes a
    batch of a list of samples. skip: the ranges that the loader leaves out, so that each row's own
    position is known. Picklable if its parts are.
    """

    transform: Transform | None = None
    on_error: OnError = "raise"
    stack: Callable[[list[Any]], Any] | None = None
    skip: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise UsageError(
                f"on_error = {self.on_error!r} is unknown",
                hint=f"choose one of {', '.join(get_args(OnError))}",
            )

    def __call__(self, samples: Samples, positions: range) -> Any:
        """Make a batch.

        Args: positions: those in the global order that the samples span.
        Raises: DataError for a sample that failed, or if none is left.
        """
        if self.transform is None and self.stack is None and isinstance(samples.values, pa.Table):
            with stage("collate"):
                return tensors_of(samples.values)
        made = samples.as_list() if self.transform is None else self._transformed(samples, positions)
        with stage("collate"):
            return (self.stack or stack)(made)

    def _transformed(self, samples: Samples, spanned: range) -> list[Any]:
        assert self.transform is not None
        positions: Sequence[int] = spanned
        if len(spanned) != len(samples):
            positions = [one for one in spanned if not any(low <= one < high for low, high in self.skip)]
        made: list[Any] = []
        first: Exception | None = None
        with stage("decode"):
            values = samples.as_list()
        with stage("transform"):
            for value, row, position in zip(values, samples.rows_B.tolist(), positions, strict=True):
                try:
                    made.append(self.transform(value, position))
                except Exception as error:
                    told = f"sample {position} ({samples.origins.where(row)}): {_said(error)}"
                    if self.on_error == "raise":
                        raise _failed(self.transform, told) from error
                    count(SKIPPED, told)
                    first = first or error
        if not made:
            raise DataError(
                f"none of the {len(samples)} samples of this batch could be used; the first: {_said(first)}",
                hint="is the transform the right one for this data?",
            ) from first
        return made


def stack(samples: list[Any]) -> Any:
    """Make a batch of samples, as PyTorch's default does: dictionaries of tensors with one more axis.

    Numbers and arrays of one shape become a tensor [B, ...], texts and bytes a list, dictionaries and
    tuples are gone into. Raises: DataError naming the key whose values do not stack.
    """
    return _stack(samples, "")


def tensors_of(table: pa.Table) -> dict[str, Any]:
    """Turn columns into tensors without a loop over rows: numbers [B], lists of one length [B, L].

    Texts and bytes become lists. Raises: DataError naming a column that holds nulls, or lists of
    several lengths, or structures.
    """
    return {name: _column(name, table.column(name)) for name in table.column_names}


def _column(name: str, column: pa.ChunkedArray) -> Any:
    if column.null_count:
        raise DataError(
            f"column {name!r} has {column.null_count} nulls in {len(column)} rows; no tensor can hold them",
            hint="fill or drop them in a transform, or leave the column out",
        )
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if (
        is_text
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        return column.to_pylist()
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _tensor(column.to_numpy())
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0) if lists.num_chunks else pa.array([], kind)
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        flat = lists.flatten()
        if flat.null_count == 0 and (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)):
            lengths = np.unique(np.asarray(lists.value_lengths()))
            if len(lengths) == 1:
                return _tensor(flat.to_numpy(zero_copy_only=False).reshape(len(lists), int(lengths[0])))
            raise DataError(
                f"the lists in column {name!r} have {len(lengths)} different lengths, "
                f"from {lengths[0]} to {lengths[-1]}",
                hint="pad them in a transform, or give a `stack` of your own",
            )
    raise DataError(
        f"column {name!r} is of type {kind}, which does not stack into a tensor",
        hint="leave it out with columns=[...], or take it apart in a transform",
    )


def _stack(values: list[Any], name: str) -> Any:
    first = values[0]
    try:
        if isinstance(first, Mapping):
            return {key: _stack([value[key] for value in values], f"{name}[{key!r}]") for key in first}
        if isinstance(first, str | bytes):
            return values
        if isinstance(first, tuple):
            return tuple(_stack(list(column), name) for column in zip(*values, strict=True))
        if isinstance(first, np.ndarray):
            return _tensor(np.stack(values))
        if isinstance(first, bool | int | float | list | np.generic):
            array = np.asarray(values)
            if array.dtype == object:
                raise ValueError("they are not all numbers")
            return _tensor(array)
        if hasattr(first, "new_empty"):  # a tensor; torch is loaded then
            import torch

            return torch.stack(values)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise DataError(
            f"the values{name and f' of {name}'} do not stack into a batch: {_said(error)}",
            hint="make them of one shape and type in a transform, or give a `stack` of your own",
        ) from error
    raise DataError(
        f"the values{name and f' of {name}'} are of type {type(first).__name__}, "
        "a batch is made of numbers, arrays, tensors and texts",
        hint="leave the column out, or turn it into one of these in a transform",
    )


def _tensor(array: NDArray[Any]) -> Any:
    import torch  # a worker whose transforms make no tensors needs it here only

    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    return torch.from_numpy(array)


def _failed(transform: Transform, told: str) -> DataError:
    name = getattr(transform, "__qualname__", type(transform).__name__)
    return DataError(
        f"the transform {name} failed at {told}",
        hint='on_error="skip" leaves such samples out and counts them; skip= leaves positions out',
    )


def _said(error: Exception | None) -> str:
    if isinstance(error, MarrowError):
        return error.message
    return f"{type(error).__name__}: {error}"
