"""Tell which drafted tokens of speculative decoding stand, so that what comes out is drawn from the target.

A sequence has G drafts and G + 1 rows of the target's logits: each draft's own, and one behind the last. Drafts
are taken from the left while they stand; the first that falls is replaced, and after the last comes one more.

    drafts that were drawn from q   stand with probability min(1, p / q); the one that falls is replaced by a
                                    draw from max(p - q, 0), scaled to 1 (Leviathan et al. 2023, Chen et al. 2023)
    drafts that were only guessed   stand where `sample` draws them: p / 1 of the time, with what falls replaced
                                    by the draw itself. So the text is, to the token, what it is without drafts

p is what `sample` draws from: after penalties, temperature and filters. Temperature 0 accepts the largest alone.
The random numbers of acceptance are a stream of their own; q must be drawn with others still (`draft_seed`).

Axes: S sequences, N rows of all of them, V vocabulary.
"""

import torch
from torch import Tensor

from marrow.kernels import native
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.sampling.draws import Draw, Draws, mixed, uniform
from marrow.kernels.sampling.sample import collect_reference, scratch
from marrow.kernels.sampling.sample import sample as draw_rows

_ACCEPT = 0x5851F42D4C957F2D


def verify_draft(
    logits_NV: Tensor,
    drafts_N: Tensor,
    begins_S1: Tensor,
    draws: Draws,
    draft_probs_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return how many drafts of each sequence stand, and the token that comes behind them.

    Args: logits_NV: [N, V], fp32 or bf16, of the target, each sequence's rows in order. drafts_N: int64 [N],
        the token drafted at each row; a sequence's last row has none, whatever stands there. begins_S1:
        int64 [S + 1], where each sequence's rows begin; at least one row each. draws: one a row, its position
        that of the row's token. draft_probs_NV: fp32 [N, V], what each draft was drawn from; None for guesses.
    Returns: (accepted_S, next_S): int64. next -1: a row that nothing can be drawn from.
    Cost: as `sample` for each row that is reached, and for all of them where drafts are guesses.
    """
    if draft_probs_NV is None:
        return match(draw_rows(logits_NV, draws).tokens_S, drafts_N, begins_S1)
    packed = draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1
    accepted_S, next_S = OPERATOR(logits_NV, drafts_N, begins_S1, draft_probs_NV, *packed)
    return accepted_S, next_S


def match(tokens_N: Tensor, drafts_N: Tensor, begins_S1: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each sequence, how many drafts are what was drawn, and the draw behind them.

    Args: tokens_N: int64, drawn from the target at each row, -1 where that failed. Others as in `verify_draft`.
    """
    rows_N = torch.arange(len(tokens_N), device=tokens_N.device)
    # A row ends its sequence's run of accepted drafts where it differs, and where it is the last.
    ends_N = (tokens_N != drafts_N).index_fill(0, begins_S1[1:] - 1, True)
    # The first end at or behind each row: a running minimum from the right.
    end_N = torch.where(ends_N, rows_N, len(tokens_N)).flip(0).cummin(0).values.flip(0)
    end_S = end_N[begins_S1[:-1]]
    return end_S - begins_S1[:-1], tokens_N[end_S]


def draft_seed(seed: int) -> int:
    """Return the seed of what drafts are drawn with, for a request's seed."""
    return seed ^ 0x2545F4914F6CDD1D


def verify_draft_reference(
    logits_NV: Tensor,
    drafts_N: Tensor,
    begins_S1: Tensor,
    draft_probs_NV: Tensor,
    factors_N6: Tensor,
    keys_N4: Tensor,
    history_M: Tensor,
    starts_N1: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute `verify_draft` for drawn drafts in plain torch, by sorting, in fp64."""
    masses_NV, is_bad_N = collect_reference(logits_NV, factors_N6, keys_N4, history_M, starts_N1)
    masses_NV = masses_NV.clamp(min=0)
    target_NV = masses_NV / masses_NV.sum(-1, keepdim=True)
    draft_NV, index_N = draft_probs_NV.double(), drafts_N.clamp(0, logits_NV.shape[1] - 1)[:, None]
    is_token_N = (drafts_N >= 0) & (drafts_N < logits_NV.shape[1])
    p_N, q_N = (each.gather(1, index_N)[:, 0] for each in (target_NV, draft_NV))
    accept_N = uniform(mixed(keys_N4[:, 1]) ^ _ACCEPT, keys_N4[:, 2])
    stands_N = is_token_N & (p_N > 0) & (accept_N * q_N < p_N) & ~is_bad_N
    is_last_N = torch.zeros_like(stands_N).index_fill(0, begins_S1[1:] - 1, True)
    rest_NV = (target_NV - draft_NV).clamp(min=0)
    has_rest_N1 = (rest_NV.sum(-1, keepdim=True) > 0) & ~is_last_N[:, None]
    sums_NV = torch.where(has_rest_N1, rest_NV, target_NV).cumsum(-1)
    aim_N1 = uniform(keys_N4[:, 1], keys_N4[:, 2])[:, None] * sums_NV[:, -1:]
    tokens_N = (sums_NV > aim_N1).long().argmax(-1).masked_fill(is_bad_N, -1)
    # In `match`, a row whose draft stands has drawn it.
    return match(torch.where(stands_N, drafts_N, tokens_N), torch.where(stands_N, drafts_N, -2), begins_S1)


def forward_cpu(
    logits_NV: Tensor,
    drafts_N: Tensor,
    begins_S1: Tensor,
    draft_probs_NV: Tensor,
    factors_N6: Tensor,
    keys_N4: Tensor,
    history_M: Tensor,
    starts_N1: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sequences in C, shared among torch's threads."""
    out = _empty(logits_NV, drafts_N, begins_S1, draft_probs_NV, factors_N6, keys_N4, history_M, starts_N1)
    given = [
        logits_NV,
        drafts_N,
        begins_S1,
        draft_probs_NV.float(),
        factors_N6,
        keys_N4,
        history_M,
        starts_N1,
    ]
    given = [each.contiguous() for each in given]
    sequences, columns = len(out[0]), logits_NV.shape[1]
    threads = max(1, min(sequences, torch.get_num_threads()))
    memory, counts, stride = scratch(threads, columns, has_history=len(history_M) > 0)
    native.function("verify_draft", "verify_draft", "p" * 12 + "lllii")(
        *native.pointers(*given, *out, memory, counts),
        *(sequences, columns, stride, threads, native.type_of(logits_NV)),
    )
    return out


def _empty(
    logits_NV: Tensor,
    drafts_N: Tensor,
    begins_S1: Tensor,
    draft_probs_NV: Tensor,
    factors_N6: Tensor,
    keys_N4: Tensor,
    history_M: Tensor,
    starts_N1: Tensor,
) -> tuple[Tensor, Tensor]:
    """Allocate a count and a token a sequence."""
    sequences = len(begins_S1) - 1
    return begins_S1.new_empty(sequences), begins_S1.new_empty(sequences)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make four drafts a sequence, of a small vocabulary and of a large one."""
    examples = []
    for sequences, vocab in ((2, 2048), (8, 151936)):
        rows = sequences * 5
        logits_NV = torch.randn(rows, vocab, device=device, dtype=dtype) * 3
        probs_NV = torch.randn(rows, vocab, device=device).softmax(-1)
        drafts_N = torch.randint(0, vocab, (rows,), device=device)
        begins_S1 = torch.arange(0, rows + 1, 5, device=device)
        draws = Draws.of([Draw(temperature=0.8, top_p=0.95)] * rows, device)
        packed = draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1
        inputs = (logits_NV, drafts_N, begins_S1, probs_NV, *packed)
        cost = logits_NV.nbytes + probs_NV.nbytes, 4.0 * logits_NV.numel()
        examples.append(Example(f"{sequences}x5x{vocab}", inputs, *cost))
    return examples


OPERATOR = Operator("verify_draft", verify_draft_reference, fake=_empty, results=2, examples=_examples)
OPERATOR.add("cpu", forward_cpu, **native.path("verify_draft"))
