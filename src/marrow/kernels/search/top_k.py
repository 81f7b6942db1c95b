"""Exact search: the k vectors whose inner products with a query are largest, without an index.

Every vector is read once and every product is summed in fp32; no score that is not among the best is kept,
so memory does not grow with the number of vectors. Equal scores are in order of rows. A score that is NaN
or minus infinity is no result: where too few are left, rows are -1 and scores minus infinity.

Axes: Q queries, N vectors, C channels, K results, M rows to look at. Bound by memory up to about 16 queries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native, tile
from marrow.kernels.arguments import FLOATS, Expects
from marrow.kernels.dispatch import Case, Example, Operator
from marrow.kernels.tile import tl

CHUNK_ROWS = 1 << 16  # of the plain version: scores of as many rows are kept at once
MOST_TAKEN = 32  # results that Triton's version takes one by one
SHAPES = ("few queries", "many queries", "few queries, many results", "many queries, many results")


class Found(NamedTuple):
    """scores_QK: fp32, falling; rows_QK: int64, where the vectors stand."""

    scores_QK: Tensor
    rows_QK: Tensor


def top_k(queries_QC: Tensor, vectors_NC: Tensor, k: int, *, among: Tensor | None = None) -> Found:
    """Return the k largest inner products of each query, exactly.

    Args: queries_QC: [Q, C], any float dtype. vectors_NC: [N, C], fp32, bf16 or fp16. k: >= 1. among: rows to
    look at: bool [N], or int64 [M] of numbers, in any order; all where it is None.
    Returns: scores [Q, K] in fp32 and rows [Q, K] in int64, best first, equal scores by row; -inf and -1
    where there are fewer.
    Raises: UsageError if shapes, k or rows do not fit.
    Cost: reads N C elements once for up to 16 queries; 2 Q N C FLOPs; O(Q K) memory.
    """
    check(queries_QC, vectors_NC, k)
    rows_M = None if among is None else listed(among, len(vectors_NC))
    return Found(*OPERATOR(vectors_NC, queries_QC, k, rows_M))


def top_k_reference(
    vectors_NC: Tensor, queries_QC: Tensor, k: int, rows_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `top_k` in plain torch, with all scores at once. rows_M: rising."""
    dtype = torch.promote_types(vectors_NC.dtype, torch.float32)
    if rows_M is None:
        rows_M = torch.arange(len(vectors_NC), device=vectors_NC.device)
    scores_QM = queries_QC.to(dtype) @ vectors_NC[rows_M].to(dtype).T
    scores_QM = scores_QM.masked_fill(scores_QM.isnan(), -torch.inf)
    scores_QK, order_QK = scores_QM.sort(dim=1, descending=True, stable=True)
    return _padded(scores_QK[:, :k], rows_M[order_QK[:, :k]], k)


def check(queries_QC: Tensor, vectors_NC: Tensor, k: int) -> None:
    """Refuse what cannot be searched.

    Raises: UsageError.
    """
    shapes = f"queries {list(queries_QC.shape)}, vectors {list(vectors_NC.shape)}"
    if queries_QC.ndim != 2 or vectors_NC.ndim != 2 or queries_QC.shape[1] != vectors_NC.shape[1]:
        raise UsageError(f"search: {shapes} do not fit", hint="give [Q, C] and [N, C] of one C")
    if k < 1:
        raise UsageError(f"search: k = {k} is too small", hint="k >= 1")


def listed(among: Tensor, num_rows: int) -> Tensor:
    """Return the rows that a mask or a list of numbers means, rising, each once.

    Raises: UsageError for a mask of another length, for numbers that are not whole, or of rows not there.
    """
    if among.dtype == torch.bool:
        if among.shape != (num_rows,):
            raise UsageError(f"search: a mask of {list(among.shape)} for {num_rows} vectors")
        return among.nonzero().squeeze(1)
    if among.is_floating_point():
        raise UsageError(f"search: rows of {among.dtype}", hint="bool [N], or int64 [M] of numbers")
    rows_M: Tensor = torch.unique(among.long())
    if len(rows_M) and not 0 <= int(rows_M[0]) <= int(rows_M[-1]) < num_rows:
        raise UsageError(f"search: rows {rows_M[0]} to {rows_M[-1]} of {num_rows} vectors")
    return rows_M


# Triton


@tile.jit
def _search(  # type: ignore[no-untyped-def]
    vectors,
    queries,
    listed_rows,
    scores,
    rows,
    num_queries,
    num_rows,
    columns,
    k,
    split_rows,
    HAS_LIST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keep the best k of BLOCK_Q queries in a split of the rows: [split, query, BLOCK_K]."""
    split = tl.program_id(0)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slots = tl.arange(0, BLOCK_K)
    is_query = query < num_queries
    # Slots beyond k hold infinity: they are never the worst.
    best = tl.where(slots < k, -float("inf"), float("inf"))[None, :] + tl.zeros(
        [BLOCK_Q, BLOCK_K], tl.float32
    )
    best_rows = tl.full([BLOCK_Q, BLOCK_K], -1, tl.int64)
    first = split.to(tl.int64) * split_rows
    for block in range(0, split_rows, BLOCK_N):
        at = first + block + tl.arange(0, BLOCK_N)
        inside = (at < first + split_rows) & (at < num_rows)
        row = tl.load(listed_rows + at, mask=inside, other=0) if HAS_LIST else at
        if BLOCK_Q == 1:
            terms = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            for channel in range(0, columns, BLOCK_C):
                c = channel + tl.arange(0, BLOCK_C)
                q = tl.load(
                    queries + query[:, None].to(tl.int64) * columns + c[None, :],
                    mask=c[None, :] < columns,
                    other=0.0,
                )
                mask = inside[:, None] & (c[None, :] < columns)
                v = tl.load(vectors + row[:, None] * columns + c[None, :], mask=mask, other=0.0)
                terms += v.to(tl.float32) * q.to(tl.float32)
            found = tl.sum(terms, 1)[None, :]
        else:
            found = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
            for channel in range(0, columns, BLOCK_C):
                c = channel + tl.arange(0, BLOCK_C)
                mask = is_query[:, None] & (c[None, :] < columns)
                q = tl.load(
                    queries + query[:, None].to(tl.int64) * columns + c[None, :], mask=mask, other=0.0
                )
                mask = inside[None, :] & (c[:, None] < columns)
                v = tl.load(vectors + row[None, :] * columns + c[:, None], mask=mask, other=0.0)
                if q.dtype != v.dtype:
                    q, v = q.to(tl.float32), v.to(tl.float32)
                found = tl.dot(q, v, found, input_precision="ieee")
        found = tl.where(inside[None, :] & (found == found), found, -float("inf"))
        top = tl.max(found, 1)
        worst = tl.min(best, 1)
        # Few blocks hold a new result, and few of those more than one.
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            is_new = (top > worst)[:, None]
            place = tl.argmax(found, 1)[:, None]  # the first of equal ones
            column = tl.arange(0, BLOCK_N)[None, :]
            new_row = tl.sum(tl.where(column == place, row[None, :], 0), 1)[:, None]
            # Of equal worst ones the last row leaves.
            leaving = tl.argmax(tl.where(best == worst[:, None], best_rows, -2), 1)[:, None]
            is_slot = is_new & (slots[None, :] == leaving)
            best = tl.where(is_slot, top[:, None], best)
            best_rows = tl.where(is_slot, new_row, best_rows)
            found = tl.where(is_new & (column == place), -float("inf"), found)
            top = tl.max(found, 1)
            worst = tl.min(best, 1)
    to = (split.to(tl.int64) * num_queries + query[:, None]) * BLOCK_K + slots[None, :]
    tl.store(scores + to, best, mask=is_query[:, None])
    tl.store(rows + to, best_rows, mask=is_query[:, None])


def forward_triton(
    vectors_NC: Tensor, queries_QC: Tensor, k: int, rows_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each program keeps the best of its share of the rows; torch sorts what the shares found."""
    vectors_NC, queries_QC = vectors_NC.contiguous(), queries_QC.contiguous()
    rows_M = None if rows_M is None else rows_M.contiguous()
    (num_queries, columns), device = queries_QC.shape, vectors_NC.device
    num_rows = len(vectors_NC) if rows_M is None else len(rows_M)
    block_k = max(2, 1 << (k - 1).bit_length())
    options = _options(num_queries, columns, vectors_NC.dtype)
    query_blocks = -(-num_queries // options["BLOCK_Q"])
    programs = -(-8 * tile.multiprocessors(device) // max(1, query_blocks))
    split_rows = max(1, -(-num_rows // (programs * options["BLOCK_N"]))) * options["BLOCK_N"]
    splits = -(-num_rows // split_rows)
    scores_SQK = torch.empty(splits, num_queries, block_k, device=device)
    rows_SQK = torch.empty(splits, num_queries, block_k, device=device, dtype=torch.int64)
    arguments = (vectors_NC, queries_QC, rows_M, scores_SQK, rows_SQK)
    sizes = (num_queries, num_rows, columns, k, split_rows)
    constants = {"HAS_LIST": rows_M is not None, "BLOCK_K": block_k}
    tile.launch(_search, (splits, query_blocks), *arguments, *sizes, **constants, **options)
    return _sorted(scores_SQK[..., :k], rows_SQK[..., :k], k)


def _options(num_queries: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Return tile sizes: one query reads whole rows; several share what was read."""
    if num_queries == 1:
        block_c = min(256, max(16, 1 << (columns - 1).bit_length()))
        default = {"BLOCK_Q": 1, "BLOCK_N": 32, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 2}
        others = ({"BLOCK_N": 16}, {"BLOCK_N": 64, "num_warps": 8}, {"BLOCK_N": 16, "num_warps": 2})
        return tile.config("top_k", ("one", str(dtype)), default, others)
    # Fewer warps spill registers in fp32.
    default = {"BLOCK_Q": 16, "BLOCK_N": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}
    others = ({"BLOCK_N": 128, "num_warps": 8}, {"BLOCK_C": 32}, {"num_stages": 4})
    return tile.config("top_k", ("many", str(dtype)), default, others)


def _sorted(scores_SQK: Tensor, rows_SQK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort what the splits found by falling score and, among equals, by rising row."""
    scores_QS, rows_QS = (x.transpose(0, 1).flatten(1) for x in (scores_SQK, rows_SQK))
    rows_QS, order_QS = rows_QS.sort(dim=1)
    scores_QK, order_QK = scores_QS.gather(1, order_QS).sort(dim=1, descending=True, stable=True)
    return _padded(scores_QK[:, :k], rows_QS.gather(1, order_QK[:, :k]), k)


# CPU


def forward_cpu(
    vectors_NC: Tensor, queries_QC: Tensor, k: int, rows_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows in C, shared among torch's threads; results do not depend on their number."""
    vectors_NC, queries_QP = vectors_NC.contiguous(), padded(queries_QC)
    scores_QK, rows_QK = _empty(vectors_NC, queries_QC, k, rows_M)
    rows_M = None if rows_M is None else rows_M.contiguous()
    num_rows = len(vectors_NC) if rows_M is None else len(rows_M)
    list_start = 0 if rows_M is None else rows_M.data_ptr()
    native.function("top_k", "top_k", "pppppllllii")(
        *(queries_QP.data_ptr(), vectors_NC.data_ptr(), list_start, *native.pointers(scores_QK, rows_QK)),
        *(len(queries_QC), num_rows, vectors_NC.shape[1], k),
        *(torch.get_num_threads(), native.type_of(vectors_NC)),
    )
    return scores_QK, rows_QK


def padded(queries_QC: Tensor) -> Tensor:
    """Return queries in fp32, with zeros up to whole sixteens, as the C files read them."""
    missing = -queries_QC.shape[1] % 16
    return torch.nn.functional.pad(queries_QC.float(), (0, missing)).contiguous()


# Plain


def forward_torch(
    vectors_NC: Tensor, queries_QC: Tensor, k: int, rows_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: a matrix product, then `torch.topk` on keys that hold score and row."""
    num_rows = len(vectors_NC) if rows_M is None else len(rows_M)
    best, best_rows = (
        x.fill_(y) for x, y in zip(_empty(vectors_NC, queries_QC, k, rows_M), (-torch.inf, -1), strict=True)
    )
    queries_QC = queries_QC.float()
    for first in range(0, num_rows, CHUNK_ROWS):
        some = slice(first, min(first + CHUNK_ROWS, num_rows))
        rows_B = torch.arange(some.start, some.stop, device=best.device) if rows_M is None else rows_M[some]
        chunk_BC = vectors_NC[some] if rows_M is None else vectors_NC[rows_B]
        scores_QB = queries_QC @ chunk_BC.float().T + 0.0  # -0 becomes 0, its equal
        scores_QB = scores_QB.masked_fill(scores_QB.isnan(), -torch.inf)
        bits_QB = scores_QB.view(torch.int32).long()
        rising_QB = torch.where(bits_QB < 0, -1 - (bits_QB & 0x7FFFFFFF), bits_QB)
        place_B = torch.arange(len(rows_B), device=best.device)
        _, order_QK = (rising_QB * CHUNK_ROWS - place_B).topk(min(k, len(rows_B)), dim=1)
        scores_QJ = torch.cat([best, scores_QB.gather(1, order_QK)], 1)
        rows_QJ = torch.cat([best_rows, rows_B[order_QK]], 1)
        best, order_QK = scores_QJ.sort(dim=1, descending=True, stable=True)
        best, best_rows = best[:, :k], rows_QJ.gather(1, order_QK[:, :k])
    return _padded(best, best_rows, k)


# What all paths share


def _padded(scores_QK: Tensor, rows_QK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Fill up to k results; what is minus infinity is none."""
    missing = (0, k - scores_QK.shape[1])
    scores_QK = torch.nn.functional.pad(scores_QK, missing, value=-torch.inf)
    rows_QK = torch.nn.functional.pad(rows_QK, missing, value=-1)
    return scores_QK, rows_QK.masked_fill(scores_QK == -torch.inf, -1)


def _empty(vectors_NC: Tensor, queries_QC: Tensor, k: int, rows_M: Tensor | None) -> tuple[Tensor, Tensor]:
    """Allocate scores and rows."""
    scores_QK = vectors_NC.new_empty((queries_QC.shape[0], k), dtype=torch.float32)
    return scores_QK, torch.empty_like(scores_QK, dtype=torch.int64)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """One query and a batch, against vectors of a sentence encoder and of a larger one."""
    examples = []
    for queries, rows, columns in ((1, 200_000, 384), (64, 200_000, 384), (1, 1_000_000, 768)):
        if device == "cpu" and rows > 200_000:
            continue  # 3 GB
        vectors_NC = torch.randn(rows, columns, device=device, dtype=dtype)
        queries_QC = torch.randn(queries, columns, device=device, dtype=dtype)
        cost = (vectors_NC.numel() * dtype.itemsize, 2 * queries * vectors_NC.numel())
        inputs = (vectors_NC, queries_QC, 10, None)
        examples.append(Example(f"{queries} of {rows}x{columns}, 10", inputs, *cost))
    return examples


def _shape_class(vectors_NC: Tensor, queries_QC: Tensor, k: int, rows_M: Tensor | None) -> str:
    return SHAPES[int(queries_QC.shape[0] > 16) + 2 * int(k > MOST_TAKEN)]


def _triton_loses(case: Case) -> str | None:
    """Not measured on a GPU; by the number of operations."""
    if case.shape in SHAPES[2:]:
        return f"it takes results one by one: torch.topk is better beyond {MOST_TAKEN}"
    if case.shape == SHAPES[1]:
        return "more than 16 queries are bound by fp32 arithmetic, at which cuBLAS is better"
    return None


OPERATOR = Operator(
    "top_k",
    top_k_reference,
    fake=_empty,
    results=2,
    examples=_examples,
    shape_class=_shape_class,
    expects=Expects(dtypes={"queries_QC": FLOATS, "rows_M": torch.int64}),
)
OPERATOR.add("torch", forward_torch)
OPERATOR.add("cpu", forward_cpu, **native.path("top_k"))
OPERATOR.add("triton", forward_triton, loses=_triton_loses, **tile.path())
