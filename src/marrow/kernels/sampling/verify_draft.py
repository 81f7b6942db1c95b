"""Tell which drafts of speculative decoding stand, so that what comes out is drawn from the target.

A sequence has G drafts and G + 1 rows of the target's logits: each draft's own, and one behind the last.
Drafts are taken from the left while they stand; the first that falls is replaced, and behind the last comes
one more.

    drawn from q    stands with probability min(1, p / q); the one that falls is replaced by a draw from
                    max(p - q, 0), scaled to 1 (Leviathan et al. 2023, Chen et al. 2023)
    only guessed    stands where it is what `sample` draws, and is replaced by that where it is not: so the
                    text is, to the token, what it is without drafts

p is what `sample` draws from: after penalties, temperature and filters. Temperature 0 accepts the largest
alone. The random numbers of acceptance are a stream of their own; q must be drawn with others (`draft_seed`).

Axes: S sequences, N rows of all of them, V vocabulary.
"""

import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.sampling.draws import Draw, Draws, collect_reference, mixed, penalised, uniform
from marrow.kernels.sampling.sample import sample as draw_rows
from marrow.kernels.sampling.sample import scratch
from marrow.kernels.sampling.thresholds import collect, cut_of, draw, inverse_of, maxima, row_options
from marrow.kernels.tile import tl

_ACCEPT = 0x5851F42D4C957F2D


def verify_draft(
    logits_NV: Tensor,
    drafts_N: Tensor,
    begins_S1: Tensor,
    draws: Draws,
    draft_probs_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return how many drafts of each sequence stand, and the token that comes behind them.

    Args: logits_NV: [N, V], fp32 or bf16, of the target, each sequence's rows in order. drafts_N: int64
        [N], the token drafted at each row; a sequence's last row has none, whatever stands there.
        begins_S1: int64 [S + 1], where each sequence's rows begin; at least one row each. draws: one a row,
        its position that of the row's token. draft_probs_NV: fp32 [N, V], what each draft was drawn from;
        None for guesses.
    Returns: (accepted_S, next_S): int64. next -1: a row that nothing can be drawn from.
    Raises: UsageError if there is not a draft, a draw and a row of probabilities for each row.
    Cost: as `sample` for each row that is reached, and for all of them where drafts are guesses.
    """
    draws.check(logits_NV)
    if drafts_N.shape != logits_NV.shape[:1] or drafts_N.dtype != torch.int64:
        raise UsageError(
            f"drafts {list(drafts_N.shape)} of {drafts_N.dtype} for logits {list(logits_NV.shape)}",
            hint="give int64 [N], one a row",
        )
    if draft_probs_NV is None:
        return match(draw_rows(logits_NV, draws).tokens_S, drafts_N, begins_S1)
    if draft_probs_NV.shape != logits_NV.shape or draft_probs_NV.dtype != torch.float32:
        raise UsageError(
            f"probabilities {list(draft_probs_NV.shape)} of {draft_probs_NV.dtype} for logits "
            f"{list(logits_NV.shape)}",
            hint="give fp32, a number for each logit",
        )
    packed = draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1
    accepted_S, next_S = OPERATOR(logits_NV, drafts_N, begins_S1, draft_probs_NV, *packed)
    return accepted_S, next_S


def match(tokens_N: Tensor, drafts_N: Tensor, begins_S1: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each sequence, how many drafts are what was drawn, and the draw behind them.

    Args: tokens_N: int64, drawn from the target at each row, -1 where that failed. Others: `verify_draft`.
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
    is_last_N = torch.zeros_like(is_bad_N).index_fill(0, begins_S1[1:] - 1, True)
    stands_N = is_token_N & (p_N > 0) & (accept_N * q_N < p_N) & ~is_bad_N & ~is_last_N
    rest_NV = (target_NV - draft_NV).clamp(min=0)
    has_rest_N1 = (rest_NV.sum(-1, keepdim=True) > 0) & ~is_last_N[:, None]
    sums_NV = torch.where(has_rest_N1, rest_NV, target_NV).cumsum(-1)
    aim_N1 = uniform(keys_N4[:, 1], keys_N4[:, 2])[:, None] * sums_NV[:, -1:]
    tokens_N = (sums_NV > aim_N1).long().argmax(-1).masked_fill(is_bad_N, -1)
    # In `match`, a row whose draft stands has drawn it.
    return match(torch.where(stands_N, drafts_N, tokens_N), torch.where(stands_N, drafts_N, -2), begins_S1)


# Triton


@tile.jit
def _verify(  # type: ignore[no-untyped-def]
    logits,
    drafts,
    begins,
    probs,
    factors,
    keys,
    uniforms,
    accepts,
    accepted,
    tokens,
    values,
    places,
    columns,
    BLOCK: tl.constexpr,
):
    """One program a sequence, which walks its rows while drafts stand."""
    sequence = tl.program_id(0).to(tl.int64)
    values, places = values + sequence * columns, places + sequence * columns
    first, last = tl.load(begins + sequence), tl.load(begins + sequence + 1) - 1
    row = first
    token = tl.full([], -1, tl.int64)
    while row <= last:
        x = logits + row * columns
        temperature, top_p = tl.load(factors + row * 6), tl.load(factors + row * 6 + 1)
        min_p, top_k = tl.load(factors + row * 6 + 2), tl.load(keys + row * 4)
        top_k = tl.where((top_k <= 0) | (top_k > columns), columns, top_k)
        best, nans = maxima(x, columns, BLOCK)
        most = tl.max(best, 0)
        stands = tl.full([], 0, tl.int32)
        if (nans == 0) & (most > float("-inf")) & (most < float("inf")):
            inverse, cut = inverse_of(temperature, BLOCK), cut_of(most, temperature, min_p, BLOCK)
            u, accept, draft = tl.load(uniforms + row), tl.load(accepts + row), tl.load(drafts + row)
            count, limit, ties = collect(x, columns, best, temperature, top_p, top_k, values, places, BLOCK)
            place, _kept, total, own = draw(
                values,
                places,
                probs,
                count,
                most,
                inverse,
                limit,
                ties,
                cut,
                1.0,
                draft,
                u,
                BLOCK,
                True,
                False,
            )
            if row < last:
                theirs = probs + row * columns
                is_token = (draft >= 0) & (draft < columns)
                q = tl.load(theirs + draft, mask=is_token, other=0.0).to(tl.float64)
                stands = (is_token & (own > 0.0) & (accept * q < own / total)).to(tl.int32)
                if stands == 0:
                    other, _kept, rest, own = draw(
                        values,
                        places,
                        theirs,
                        count,
                        most,
                        inverse,
                        limit,
                        ties,
                        cut,
                        total,
                        draft,
                        u,
                        BLOCK,
                        True,
                        True,
                    )
                    place = tl.where(rest > 0.0, other, place)
            if stands == 0:
                token = tl.load(places + place).to(tl.int64)
            tl.debug_barrier()  # the places are read before the next row's take theirs
        if stands == 1:
            row += 1
        else:
            tl.store(accepted + sequence, row - first)
            tl.store(tokens + sequence, token)
            row = last + 1


def forward_triton(
    logits_NV: Tensor,
    drafts_N: Tensor,
    begins_S1: Tensor,
    draft_probs_NV: Tensor,
    factors_N6: Tensor,
    keys_N4: Tensor,
    history_M: Tensor,
    starts_N1: Tensor,
) -> tuple[Tensor, Tensor]:
    """One program a sequence; penalties, where there is a history, by torch."""
    given = drafts_N, begins_S1, draft_probs_NV, factors_N6, keys_N4
    accepted_S, next_S = _empty(logits_NV, *given, history_M, starts_N1)
    x_NV, sequences, columns = logits_NV.contiguous(), len(accepted_S), logits_NV.shape[1]
    if len(history_M):
        x_NV = penalised(logits_NV.float(), factors_N6[:, 3:], keys_N4[:, 3], history_M, starts_N1)
    arguments = (
        *(x_NV, *(each.contiguous() for each in given)),
        *(uniform(keys_N4[:, 1], keys_N4[:, 2]), uniform(mixed(keys_N4[:, 1]) ^ _ACCEPT, keys_N4[:, 2])),
        *(accepted_S, next_S),
        logits_NV.new_empty(sequences, columns, dtype=torch.float32),
        logits_NV.new_empty(sequences, columns, dtype=torch.int32),
    )
    tile.launch(_verify, (sequences,), *arguments, columns, **row_options("verify_draft", columns))
    return accepted_S, next_S


# CPU


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
    # PERF: one core, 8 sequences of 4 drafts, against plain torch on all rows at once: 2k tokens 4.3 times as
    # fast, 32k 5.7, 152k 5.4.
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


# What all paths share


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
    sequences = begins_S1.shape[0] - 1
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


OPERATOR = Operator(
    "verify_draft",
    verify_draft_reference,
    fake=_empty,
    results=2,
    examples=_examples,
    expects=Expects(
        dtypes=dict.fromkeys(("draft_probs_NV", "factors_N6"), torch.float32)
        | dict.fromkeys(("drafts_N", "begins_S1", "keys_N4", "history_M", "starts_N1"), torch.int64),
        axes={"begins_S1": "Y", "starts_N1": "Z"},
    ),
)
OPERATOR.add("cpu", forward_cpu, **native.path("verify_draft"))
OPERATOR.add("triton", forward_triton, **tile.path())
