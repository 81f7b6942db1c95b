"""Packed attention: causal, over rows of T tokens, within documents.

    document   0 0 0 1 1 1 1 2        a query sees the keys of its own document
    first      0 0 0 3 3 3 3 7        that are not after it: from first[query] to query
    query 5          x x x

A document is a run of equal numbers in a row, so two numbers a token, where its document begins and
ends, say all that a mask of T x T would. `pack` computes them once for a batch; all layers share them.

What is finite in a document changes no bit of another on any path. NaN and infinity stay within their own
document on the CPU path alone. The reference, torch's kernels and Triton's multiply what is not seen by a
p of 0, which makes NaN of them in documents of the same row or, in Triton, of the same block of tokens. That
is no loss in training: its loss is a sum over documents, and not finite with any of them.

Axes: N = B T tokens, B rows, T tokens a row, H query heads, K kv heads, G = H/K, D head size, S keys,
M = H B. Source: FlashAttention (Dao et al. 2022; Dao 2023).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.attention.attention_torch import (
    backward_torch,
    forward_torch,
    rows_of,
    seen_by,
    tokens_of,
)
from marrow.kernels.attention.flash import backward_triton, forward_triton
from marrow.kernels.dispatch import Example, Gradient, Operator


@dataclass(frozen=True, slots=True)
class Packing:
    """Which tokens of a batch may see each other.

    first_N, last_N: int32, the numbers of the tokens that begin and end each token's document.
    row_tokens: T. is_whole: no row holds two documents.
    """

    first_N: Tensor
    last_N: Tensor
    row_tokens: int
    is_whole: bool


def pack(document_N: Tensor, row_tokens: int, *, is_whole: bool | None = None) -> Packing:
    """Describe a batch, once for all layers.

    Args: document_N: integers [B T]; a run of equal numbers in a row is one document. Padding may have
        any number, such as its predecessor's: causality keeps it from being seen. row_tokens: T, divides
        B T. is_whole: no row holds two documents; found out where it is None, but not
        on a GPU, where asking would stop the host: there None is False.
    Cost: O(B T).
    """
    document_BT = document_N.view(-1, row_tokens)
    at_BT = torch.arange(document_N.numel(), device=document_N.device).view_as(document_BT)
    differs_BT = document_BT[:, 1:] != document_BT[:, :-1]
    if is_whole is None:
        is_whole = document_N.device.type == "cpu" and not bool(differs_BT.any())
    begins_BT = F.pad(differs_BT, (1, 0), value=True)
    ends_BT = F.pad(differs_BT, (0, 1), value=True)
    first_BT = torch.where(begins_BT, at_BT, 0).cummax(1).values
    last_BT = torch.where(ends_BT, at_BT, document_N.numel()).flip(1).cummin(1).values.flip(1)
    return Packing(first_BT.flatten().int(), last_BT.flatten().int(), row_tokens, is_whole)


def attention(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing, *, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Attend within documents, causally, with scale D^-0.5.

    Args: q_NHD: [B T, H, D]; k_NKD, v_NKD: [B T, K, D], H a multiple of K (grouped queries).
        window: a query sees that many keys at most, its own and those before it; 0 for all.
        softcap: scores s become softcap tanh(s / softcap); 0 leaves them.
    Returns: o_NHD of q's dtype; softmax in fp32.
    Raises: UsageError for what does not fit.
    Cost: reads N (H + 2K) D, writes N H D elements; 2 N (T + 1) H D FLOPs; backward 2.5x.
    """
    result: Tensor = OPERATOR(q_NHD, k_NKD, v_NKD, *_plain(packing), window, softcap)
    return result


def attention_reference(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing, *, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Compute `attention` in plain torch: all scores, one mask, one softmax."""
    return _reference(q_NHD, k_NKD, v_NKD, *_plain(packing), window, softcap)


def _misfit(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, *plain: Any) -> tuple[str, str] | None:
    """Say what does not fit, beyond what the names of the inputs say."""
    row_tokens, window = plain[2], plain[4]
    if q_NHD.shape[1] % max(1, k_NKD.shape[1]):
        return f"{q_NHD.shape[1]} query heads for {k_NKD.shape[1]} kv heads", "a multiple, for equal groups"
    if row_tokens < 1 or q_NHD.shape[0] % row_tokens:
        return f"{q_NHD.shape[0]} tokens in rows of {row_tokens}", "pack the batch that is attended in"
    if window < 0:
        return f"window = {window}", "0 for all keys, or how many"
    return None


def _plain(packing: Packing) -> tuple[Tensor, Tensor, int, bool]:
    return packing.first_N, packing.last_N, packing.row_tokens, packing.is_whole


def _reference(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> Tensor:
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    q_BHTD = rows_of(q_NHD, row_tokens).to(wide)
    k_BHSD = rows_of(k_NKD, row_tokens).to(wide).repeat_interleave(groups, dim=1)
    v_BHSD = rows_of(v_NKD, row_tokens).to(wide).repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTD @ k_BHSD.mT) * q_NHD.shape[-1] ** -0.5
    if softcap:
        scores_BHTS = torch.tanh(scores_BHTS / softcap) * softcap
    scores_BHTS = scores_BHTS.masked_fill(~seen_by(first_N, row_tokens, window), float("-inf"))
    return tokens_of(scores_BHTS.softmax(-1) @ v_BHSD).to(q_NHD.dtype)


# CPU


def forward_cpu(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """In C: blocks of queries, shared among torch's threads."""
    # PERF: against torch's fused kernel, one core with AMX, interleaved, forward / backward. bf16: 4 rows of
    # 512, 3 heads of 64, 1.6x / 4.9x; 16 rows of 128, 1.5x / 8.2x; 2 of 1024, 8 heads over 2, 1.5x / 4.5x; 1
    # of 2048, heads of 128, 1.1x / 2.5x; with four documents a row 2 to 7x / 3 to 14x, for what is masked is
    # not read. fp32: 0.93x (1 row of 2048, heads of 128) to 1.4x / 1.0 to 1.4x, with four documents 1.3 to
    # 5.8x / 1.2 to 6.2x.
    q_NHD, k_NKD, v_NKD, first_N = (x.contiguous() for x in (q_NHD, k_NKD, v_NKD, first_N.int()))
    o_NHD, lse_HN = _empty(q_NHD, k_NKD, v_NKD, first_N, last_N, row_tokens, is_whole, window, softcap)
    if q_NHD.numel():
        native.function("attention", "attention_forward", "ppppppllllllffii")(
            *native.pointers(q_NHD, k_NKD, v_NKD, first_N, o_NHD, lse_HN),
            *_sizes(q_NHD, k_NKD, row_tokens, window, softcap),
        )
    return o_NHD, lse_HN


def backward_cpu(
    do_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    o_NHD: Tensor,
    lse_HN: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """In C: rows of the batch and kv heads, shared among torch's threads."""
    given = [x.contiguous() for x in (do_NHD, q_NHD, k_NKD, v_NKD, o_NHD, lse_HN, first_N.int())]
    grads = [torch.empty_like(x) for x in given[1:4]]
    if q_NHD.numel():
        native.function("attention", "attention_backward", "ppppppppppllllllffii")(
            *native.pointers(*given, *grads), *_sizes(q_NHD, k_NKD, row_tokens, window, softcap)
        )
    return grads[0], grads[1], grads[2]


def _sizes(q_NHD: Tensor, k_NKD: Tensor, row_tokens: int, window: int, softcap: float) -> tuple[Any, ...]:
    """Return what both C functions are told besides where the tensors are."""
    tokens, heads, head_size = q_NHD.shape
    numbers = tokens, heads, k_NKD.shape[1], head_size, row_tokens, window, head_size**-0.5, softcap
    return *numbers, torch.get_num_threads(), native.type_of(q_NHD)


# What all paths share


def _empty(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Allocate o and the log-sum-exp of each query's scores."""
    lse_HN = q_NHD.new_empty(q_NHD.shape[1], q_NHD.shape[0], dtype=torch.float32)
    return torch.empty_like(q_NHD, memory_format=torch.contiguous_format), lse_HN


def _empty_gradients(
    do_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    o_NHD: Tensor,
    lse_HN: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
    dk_NKD = torch.empty_like(k_NKD, memory_format=torch.contiguous_format)
    return dq_NHD, dk_NKD, torch.empty_like(dk_NKD)


def _shape_class(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, *plain: Any) -> tuple[str, int]:
    """Name what the choice of a path depends on: the mask, and the power of 2 that T reaches."""
    _, _, row_tokens, is_whole, window, softcap = plain
    mask = "softcap" if softcap else "window" if window else "whole" if is_whole else "packed"
    return mask, 1 << (int(row_tokens) - 1).bit_length()


def cost(
    rows: int, row_tokens: int, heads: int, kv_heads: int, head_size: int, dtype_bytes: int
) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one forward over full rows."""
    tokens = rows * row_tokens
    return {
        "bytes": 2 * tokens * (heads + kv_heads) * head_size * dtype_bytes,
        "flops": 2 * tokens * (row_tokens + 1) * heads * head_size,
    }


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Rows of 1k, 4k and 16k tokens with heads of 64 and 128, 32 over 8, and a packed row; fewer on a CPU."""
    shapes = [(16384 // tokens, tokens, size, 1) for tokens in (1024, 4096, 16384) for size in (64, 128)]
    shapes.append((4, 4096, 128, 8))
    if device == "cpu":
        shapes = [(4, 512, 64, 1), (2, 1024, 128, 1), (4, 512, 64, 4)]
    examples = []
    for rows, row_tokens, head_size, documents in shapes:
        tokens = rows * row_tokens
        q_NHD = torch.randn(tokens, 32, head_size, device=device, dtype=dtype)
        k_NKD, v_NKD = (torch.randn(tokens, 8, head_size, device=device, dtype=dtype) for _ in range(2))
        document_N = torch.arange(tokens, device=device) * documents // row_tokens
        packing = pack(document_N, row_tokens, is_whole=documents == 1)
        price = cost(rows * documents, row_tokens // documents, 32, 8, head_size, dtype.itemsize)
        label = f"{rows}x{row_tokens} d{head_size}" + (f" {documents} documents" if documents > 1 else "")
        inputs = (q_NHD, k_NKD, v_NKD, *_plain(packing), 0, 0.0)
        examples.append(Example(label, inputs, price["bytes"], price["flops"]))
    return examples


OPERATOR = Operator(
    "attention",
    _reference,
    fake=_empty,
    gradient=Gradient(
        inputs=(0, 1, 2),
        saves=lambda inputs, outputs: (*inputs[:3], *outputs, *inputs[3:]),
        fake=_empty_gradients,
    ),
    examples=_examples,
    shape_class=_shape_class,
    expects=Expects(dtypes={"first_N": torch.int32, "last_N": torch.int32}, also=_misfit),
)
OPERATOR.add("torch", forward_torch, backward_torch, dtypes=(torch.float32, torch.bfloat16, torch.float16))
OPERATOR.add(
    "triton", forward_triton, backward_triton, **tile.path(), loses=tile.slower("attention", "torch")
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("attention"))
