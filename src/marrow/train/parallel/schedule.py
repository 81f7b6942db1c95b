"""The order in which a pipeline's ranks compute: pure functions, proved by playing them through.

    rank 0   F0 F1 F2 B0 F3 B1 .. B2 B3        1f1b, 3 ranks, 4 micro-batches: few activations wait
    rank 1      F0 F1 B0 F2 B1 F3 B2 B3
    rank 2         F0 B0 F1 B1 F2 B2 F3 B3

One forward, one backward: after its first forwards a rank alternates, so that it keeps at most as many
activations as there are stages behind it. Interleaved: each rank has several stages, stage s on rank s mod P,
and the bubble at both ends is divided by their number, for more traffic.

Source: Narayanan et al. 2019 (PipeDream-Flush, 1F1B); Narayanan et al. 2021 (interleaved).
"""

from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"


class Action(NamedTuple):
    """What a rank does next. stage: of all stages. micro: number of the micro-batch."""

    kind: str
    stage: int
    micro: int


def actions(rank: int, ranks: int, micros: int, stages_per_rank: int = 1) -> list[Action]:
    """Return what a rank does in a step, in order.

    Args: micros: micro-batches; a multiple of `ranks` where a rank has several stages.
    """
    assert stages_per_rank == 1 or micros % ranks == 0
    total = micros * stages_per_rank
    forwards = [_action(FORWARD, k, rank, ranks, stages_per_rank) for k in range(total)]
    backwards = [_action(BACKWARD, k, rank, ranks, stages_per_rank) for k in range(total)]
    ahead = ranks - rank - 1
    if stages_per_rank > 1:
        ahead = 2 * ahead + (stages_per_rank - 1) * ranks
    ahead = min(ahead, total)
    order = forwards[:ahead]
    for number in range(total - ahead):
        order += [forwards[ahead + number], backwards[number]]
    return order + backwards[total - ahead :]


def bubble(ranks: int, micros: int, stages_per_rank: int = 1) -> float:
    """Return the share of a step that a rank waits, if all stages take equally long."""
    idle = (ranks - 1) / stages_per_rank
    return idle / (idle + micros)


def _action(kind: str, number: int, rank: int, ranks: int, stages_per_rank: int) -> Action:
    """Return a rank's number-th forward or backward: `ranks` micro-batches a stage, then its next stage."""
    block, within = divmod(number, ranks * stages_per_rank)
    chunk, micro = divmod(within, ranks)
    if stages_per_rank == 1:
        return Action(kind, rank, number)
    if kind == BACKWARD:
        chunk = stages_per_rank - 1 - chunk
    return Action(kind, chunk * ranks + rank, block * ranks + micro)
