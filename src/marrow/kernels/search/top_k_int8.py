"""Exact search that reads a quarter: int8 codes say which vectors cannot be among the best.

A vector is v = s c + e, with integers |c| <= 127 and a rest e whose length is known. A query is q = t d + f,
with integers |d| <= 16,319 (two digits of eight bits), so |f| <= r |q| with r = sqrt(C) / 32,638. Then

    q v - (s t) (d c)  =  q e + f s c,    at most  |q| (|e| + r (|v| + |e|))

which the stored error of a vector bounds, with what fp32 sums can round added to it. A vector whose estimate
plus that error is below the worst of k scores found so far is no result; each other one is scored in fp32
from its own numbers. So the results are those of `top_k`, to the bit, whatever the data; only how many
vectors must be scored depends on them (a few dozen of 200,000 where scores are spread).

Axes: as in `top_k`; P channels padded to 64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native
from marrow.kernels.arguments import FLOATS, Expects
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.matmul.int4_weights import in_large_pages
from marrow.kernels.search import top_k as exact
from marrow.kernels.search.top_k import Found

DIGITS = 127 * 128 + 63  # of a query's largest number
MOST_CHANNELS = 16_384  # beyond, sums of 32 bits may overflow
_ROWS_AT_ONCE = 16_384
_LEAST = 1e-30  # shorter vectors have no codes: their scale would leave the normal fp32 numbers


class Packed(NamedTuple):
    """codes_NP: uint8, 128 + c; scales_N: fp32, s; errors_N: fp32, not below the error for |q| = 1."""

    codes_NP: Tensor
    scales_N: Tensor
    errors_N: Tensor


def quantise_vectors(vectors_NC: Tensor) -> Packed:
    """Return int8 codes of vectors, with a scale and a bound of the error for each.

    Args: vectors_NC: [N, C], any float dtype, C <= 16,384.
    Returns: N (C padded to 64 + 8) bytes. A vector that is not finite has an infinite error.
    Raises: UsageError for too many channels.
    Cost: O(N C), once for all searches.
    """
    num_rows, columns = vectors_NC.shape
    if columns > MOST_CHANNELS:
        raise UsageError(f"{columns} channels are too many for int8 search", hint=f"at most {MOST_CHANNELS}")
    codes_NP = vectors_NC.new_full((num_rows, -(-columns // 64) * 64), 128, dtype=torch.uint8)
    scales_N = vectors_NC.new_empty(num_rows, dtype=torch.float32)
    errors_N = torch.empty_like(scales_N)
    rounding = (columns + 32) * 2.0**-23  # of any order of fp32 sums, here and in `top_k`, twice over
    query_error = columns**0.5 / (2 * DIGITS - 1)
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        vectors_BC = vectors_NC[some].double()
        largest_B = vectors_BC.abs().amax(1) if columns else vectors_BC.new_zeros(len(vectors_BC))
        is_plain_B = (largest_B > _LEAST) & (largest_B < 1 / _LEAST)
        scale_B = torch.where(is_plain_B, largest_B / 127, 0.0).float()
        steps_BC = vectors_BC / torch.where(is_plain_B, scale_B.double(), 1.0)[:, None]
        codes_BC = torch.where(is_plain_B[:, None], steps_BC.round().clamp(-127, 127), 0.0)
        rest_BC = vectors_BC - codes_BC * scale_B.double()[:, None]
        length_B, rest_B = vectors_BC.norm(dim=1), rest_BC.norm(dim=1)
        error_B = rest_B + (query_error + rounding) * (length_B + rest_B)
        codes_NP[some, :columns] = (codes_BC + 128).to(torch.uint8)
        scales_N[some] = scale_B
        # Rounded up; what is not a number, or beyond fp32, is infinite.
        errors_N[some] = (error_B * (1 + 2.0**-20)).nan_to_num(torch.inf, posinf=torch.inf).float()
    # PERF: one query takes 0.93 times as long as with pages of 4 KiB.
    return Packed(in_large_pages(codes_NP), scales_N, errors_N)


def top_k_int8(
    queries_QC: Tensor, packed: Packed, vectors_NC: Tensor, k: int, *, among: Tensor | None = None
) -> Found:
    """Return what `top_k` returns, to the bit, by way of the codes of the vectors.

    Args: queries_QC: [Q, C]. packed: `quantise_vectors(vectors_NC)`. vectors_NC: [N, C], fp32 or bf16, the
    very numbers that were packed. k, among: as for `top_k`.
    Raises: UsageError if shapes, k or rows do not fit.
    Cost: reads N (C + 8) bytes, and the vectors that are scored.
    """
    exact.check(queries_QC, vectors_NC, k)
    num_rows, columns = vectors_NC.shape
    if packed.codes_NP.shape != (num_rows, -(-columns // 64) * 64):
        raise UsageError(
            f"search: codes {list(packed.codes_NP.shape)} are not of vectors {[num_rows, columns]}",
            hint="pack them again: quantise_vectors(vectors)",
        )
    rows_M = None if among is None else exact.listed(among, num_rows)
    return Found(*OPERATOR(vectors_NC, *packed, queries_QC, k, rows_M))


def top_k_int8_reference(
    vectors_NC: Tensor,
    codes_NP: Tensor,
    scales_N: Tensor,
    errors_N: Tensor,
    queries_QC: Tensor,
    k: int,
    rows_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `top_k_int8` in plain torch, without the codes: they do not change what is found."""
    return exact.top_k_reference(vectors_NC, queries_QC, k, rows_M)


def bounds_reference(packed: Packed, queries_QC: Tensor) -> Tensor:
    """Return what no score exceeds, [Q, N] in fp64: the estimate and its error, as the file's head says."""
    wide_QC = queries_QC.double()
    step_Q1 = (wide_QC.abs().amax(1, keepdim=True) / DIGITS).float().double()
    whole_QC = (wide_QC / step_Q1).nan_to_num().round().clamp(-DIGITS, DIGITS)
    codes_NC = packed.codes_NP[:, : queries_QC.shape[1]].double() - 128
    estimates_QN: Tensor = (whole_QC @ codes_NC.T) * step_Q1 * packed.scales_N.double()
    errors_QN: Tensor = wide_QC.norm(dim=1, keepdim=True) * packed.errors_N.double()
    return estimates_QN + errors_QN


# CPU


def forward_cpu(
    vectors_NC: Tensor,
    codes_NP: Tensor,
    scales_N: Tensor,
    errors_N: Tensor,
    queries_QC: Tensor,
    k: int,
    rows_M: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in C, shared among torch's threads; results do not depend on their number."""
    vectors_NC, queries_QP = vectors_NC.contiguous(), exact.padded(queries_QC)
    packed = Packed(codes_NP.contiguous(), scales_N.contiguous(), errors_N.contiguous())
    outputs = _empty(vectors_NC, *packed, queries_QC, k, rows_M)
    rows_M = None if rows_M is None else rows_M.contiguous()
    num_rows = len(vectors_NC) if rows_M is None else len(rows_M)
    list_start = 0 if rows_M is None else rows_M.data_ptr()
    native.function("top_k_int8", "top_k_int8", "pppppppppllllii")(
        *(queries_QP.data_ptr(), *native.pointers(*packed, vectors_NC), list_start),
        *native.pointers(*outputs),
        *(len(queries_QC), num_rows, vectors_NC.shape[1], k),
        *(torch.get_num_threads(), native.type_of(vectors_NC)),
    )
    return outputs


# Plain


def forward_torch(
    vectors_NC: Tensor,
    codes_NP: Tensor,
    scales_N: Tensor,
    errors_N: Tensor,
    queries_QC: Tensor,
    k: int,
    rows_M: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every vector, by what `top_k` takes; the codes save nothing here."""
    scores_QK, rows_QK = exact.OPERATOR(vectors_NC, queries_QC, k, rows_M)
    count = (len(vectors_NC) if rows_M is None else len(rows_M)) * len(queries_QC)
    return scores_QK, rows_QK, torch.full((1,), count, device=vectors_NC.device)


def _empty(
    vectors_NC: Tensor,
    codes_NP: Tensor,
    scales_N: Tensor,
    errors_N: Tensor,
    queries_QC: Tensor,
    k: int,
    rows_M: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate scores, rows, and how many scores were computed."""
    scores_QK = vectors_NC.new_empty((queries_QC.shape[0], k), dtype=torch.float32)
    rows_QK = torch.empty_like(scores_QK, dtype=torch.int64)
    return scores_QK, rows_QK, rows_QK.new_empty(1)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """One query and a batch, against vectors of a sentence encoder."""
    examples = []
    rows, columns = 200_000, 384
    vectors_NC = torch.randn(rows, columns, device=device, dtype=dtype)
    packed = quantise_vectors(vectors_NC)
    for queries in (1, 64):
        queries_QC = torch.randn(queries, columns, device=device, dtype=dtype)
        cost = (rows * (columns + 8), 4 * queries * vectors_NC.numel())
        inputs = (vectors_NC, *packed, queries_QC, 10, None)
        examples.append(Example(f"{queries} of {rows}x{columns}, 10", inputs, *cost))
    return examples


OPERATOR = Operator(
    "top_k_int8",
    top_k_int8_reference,
    fake=_empty,
    results=2,
    examples=_examples,
    expects=Expects(
        dtypes={
            "codes_NP": torch.uint8,
            "scales_N": torch.float32,
            "errors_N": torch.float32,
            "queries_QC": FLOATS,
            "rows_M": torch.int64,
        }
    ),
)
OPERATOR.add("torch", forward_torch)
OPERATOR.add("cpu", forward_cpu, **native.path("top_k_int8"))
