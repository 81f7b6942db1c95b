"""A batch: packed rows laid end to end, with what the model needs to keep documents apart.

Axes: B rows, T tokens of context, N = B T. There is no batch axis: the model sees one line of
tokens, and `document_N` tells which of them may attend to each other.

    tokens     b 1 2 e | b 7 8 9        one row with two documents, T = 7
    targets    1 2 e -   7 8 9 e
    positions  0 1 2 3 | 0 1 2 3

Two ways to collate `Rows`: `LayRows` makes this `Batch` (28 bytes written a token); `StackRows`
makes what a plain PyTorch loop wants, tokens [B, T+1] of which inputs and targets are views
(8 bytes a token), documents not told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marrow.kernels.rows.gather_rows import IGNORED as IGNORED
from marrow.loader.buffers import Ring
from marrow.loader.reader import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step.

    tokens_N: int64 [B T], inputs. targets_N: int64 [B T], the next token of the same document,
    -100 where there is none (padding, a document's end). positions_N: int64 [B T], from 0 at each
    document or piece. document_N: int32 [B T], a number for each (row, document), rising.
    num_targets: targets that count. samples: the global positions that the rows come from, those
    that the loader was told to skip excepted. rows: B. T: tokens of context.
    """

    tokens_N: Tensor
    targets_N: Tensor
    positions_N: Tensor
    document_N: Tensor
    num_targets: int
    samples: range
    rows: int
    T: int


class LayRows:
    """Lay packed rows end to end, in memory that is used again when a batch is gone."""

    decodes = True  # rows are read, checked and laid in one pass

    def __init__(self) -> None:
        self._ring = Ring()

    def row_bytes(self, stored: int) -> int:
        """Return the bytes that a row of T + 1 tokens takes."""
        return 28 * (stored - 1)

    def __call__(self, picked: Rows, samples: range) -> Batch:
        """Make a batch of rows."""
        return self.many(picked, [samples])[0]

    def many(self, picked: Rows, samples: Sequence[range]) -> list[Batch]:
        """Make batches of equally many rows, one for each of `samples`, in one pass."""
        rows, context = len(picked) // len(samples), picked.stored - 1
        total, count = len(picked) * context, rows * context
        long = _padded(8 * total)
        slab = self._ring.take(3 * long + 4 * total)
        tokens_N, targets_N, positions_N = (
            slab[low : low + 8 * total].view(np.int64) for low in (0, long, 2 * long)
        )
        document_N = slab[3 * long :].view(np.int32)
        num_targets = picked.lay(tokens_N, targets_N, positions_N, document_N, rows)
        return [
            Batch(
                tokens_N=torch.from_numpy(tokens_N[low : low + count]),
                targets_N=torch.from_numpy(targets_N[low : low + count]),
                positions_N=torch.from_numpy(positions_N[low : low + count]),
                document_N=torch.from_numpy(document_N[low : low + count]),
                num_targets=num_targets[i],
                samples=samples[i],
                rows=rows,
                T=context,
            )
            for i, low in enumerate(range(0, total, count))
        ]


class StackRows:
    """Stack packed rows to tokens, int64 [B, T+1]: inputs are [:, :-1] of it, targets [:, 1:]."""

    decodes = True

    def __init__(self) -> None:
        self._ring = Ring()

    def row_bytes(self, stored: int) -> int:
        """Return the bytes that a row of T + 1 tokens takes."""
        return 8 * stored

    def __call__(self, picked: Rows, samples: range) -> Tensor:
        """Make the tensor of rows; `samples` is not in it."""
        out = self._ring.take((len(picked), picked.stored), np.int64)
        picked.stack(out)
        return torch.from_numpy(out)

    def many(self, picked: Rows, samples: Sequence[range]) -> list[Tensor]:
        """Make tensors of equally many rows, one for each of `samples`, in one pass."""
        whole, rows = self(picked, samples[0]), len(picked) // len(samples)
        return [whole[low : low + rows] for low in range(0, len(picked), rows)]


def make_batch(picked: Rows, samples: range) -> Batch:
    """Lay packed rows end to end in fresh memory. Cost: some nanoseconds a token."""
    return LayRows()(picked, samples)


def lay_samples(samples: Sequence[NDArray[Any]], span: range) -> Batch:
    """Lay samples of any lengths end to end, without padding: one row, each a document.

    Args: samples: tokens of each, any integer type, at least one. span: their global positions.
    """
    lengths = np.array([len(sample) for sample in samples])
    tokens_N = np.concatenate(samples).astype(np.int64)
    ends = np.cumsum(lengths)
    targets_N = np.append(tokens_N[1:], IGNORED)
    targets_N[ends - 1] = IGNORED
    return Batch(
        tokens_N=torch.from_numpy(tokens_N),
        targets_N=torch.from_numpy(targets_N),
        positions_N=torch.from_numpy(np.arange(len(tokens_N)) - np.repeat(ends - lengths, lengths)),
        document_N=torch.from_numpy(np.repeat(np.arange(len(samples), dtype=np.int32), lengths)),
        num_targets=len(tokens_N) - len(samples),
        samples=span,
        rows=1,
        T=len(tokens_N),
    )


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64
