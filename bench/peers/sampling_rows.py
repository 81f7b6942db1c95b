"""What bench/kernels.py measures of sampling: our one pass over the logits beside torch that sorts them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peers.kernel_rows import Row, Work, normal

TEMPERATURE = 0.8
NEVER_SLOWER = 1.0


def peaked(rows: int, vocab: int) -> Tensor:
    """Return logits like a language model's: a normal bulk and a heavy head."""
    make = torch.Generator().manual_seed(rows)
    head = torch.empty(rows, vocab).exponential_(1.0, generator=make)
    return normal(rows, vocab, dtype=torch.float32, scale=2.0) + head


def warpers(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Draw as a chain of warpers does: top-k and mask; sort, cumsum and scatter; softmax and multinomial."""
    scores = logits / TEMPERATURE
    if top_k:
        scores = scores.masked_fill(scores < torch.topk(scores, top_k)[0][..., -1, None], -torch.inf)
    if top_p < 1:
        ordered, index = torch.sort(scores)
        is_out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        is_out[..., -1:] = False
        scores = scores.masked_fill(is_out.scatter(1, index, is_out), -torch.inf)
    if min_p:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def topk_first(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Draw from the k largest alone; there is no such way without a top-k."""
    values, index = torch.topk(logits, top_k)
    p = (values / TEMPERATURE).softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return index.gather(1, torch.multinomial(p, 1))[:, 0]


def sample_row(rows: int, vocab: int, settings: Mapping[str, Any]) -> Row:
    """Draw a token a row."""
    from marrow.kernels.sampling.sample import Draw, Draws, sample

    logits = peaked(rows, vocab)
    draws = Draws.of([Draw(temperature=TEMPERATURE, seed=row, position=3, **settings) for row in range(rows)])
    peers: dict[str, Work] = {"warpers, as torch does it": lambda: warpers(logits, **settings)}
    if "top_k" in settings:
        peers["torch.topk first"] = lambda: topk_first(logits, **settings)
    return Row(lambda: sample(logits, draws), peers, dict.fromkeys(peers, NEVER_SLOWER))


def verify_row(sequences: int, drafts: int, vocab: int) -> Row:
    """Verify drafts that were drawn from a draft model, and draw what comes behind them."""
    from marrow.kernels.sampling.sample import Draw, Draws
    from marrow.kernels.sampling.verify_draft import verify_draft

    rows = drafts + 1
    logits = peaked(sequences * rows, vocab)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    probs = (logits + noise).softmax(-1)
    guesses = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    begins = torch.arange(0, len(logits) + 1, rows)
    draws = Draws.of(
        [Draw(temperature=TEMPERATURE, seed=row // rows, position=row % rows) for row in range(len(logits))]
    )

    def theirs() -> tuple[Tensor, Tensor]:
        p = (logits / TEMPERATURE).softmax(-1)
        at = guesses[:, None]
        stands = (torch.rand(len(p)) * probs.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]).view(-1, rows)
        stands[:, -1] = False
        accepted = stands.long().cumprod(1).sum(1)
        row = torch.arange(sequences) * rows + accepted
        rest = (p[row] - probs[row]).clamp(min=0)
        rest = torch.where((accepted == drafts)[:, None], p[row], rest)
        return accepted, torch.multinomial(rest, 1)[:, 0]

    return Row(
        lambda: verify_draft(logits, guesses, begins, draws, probs),
        {"torch, all rows at once": theirs},
        {"torch, all rows at once": NEVER_SLOWER},
    )


def _rows() -> dict[str, Callable[[], Row]]:
    found: dict[str, Callable[[], Row]] = {}
    for rows, name, settings in (
        (1, "top-k 50, top-p 0.95", {"top_k": 50, "top_p": 0.95}),
        (8, "top-k 50, top-p 0.95", {"top_k": 50, "top_p": 0.95}),
        (8, "top-p 0.95", {"top_p": 0.95}),
        (8, "min-p 0.05", {"min_p": 0.05}),
        (8, "plain", {}),
    ):
        found[f"sample {rows} x 151936, {name}"] = lambda given=(rows, 151_936, settings): sample_row(*given)
    found["verify 8 x 4 drafts, 151936"] = lambda: verify_row(8, 4, 151_936)
    return found


ROWS = _rows()
