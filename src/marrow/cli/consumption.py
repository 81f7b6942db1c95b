"""What a training run notes of the shards that it read, and which of their rows it then consumed.

    detail = note(loader, sources, role, facts)         # on the edge from the run to the shards
    seen(detail, rows_of_shards, rows)                  # how often rows were consumed, and when first

The note is the seed, the positions and the shape of the order; the order is a formula, so that is
all it takes to say of any row whether the run came to it, also where the shards were one source of
a mixture.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from marrow.cli.mixture import Sources
from marrow.loader.config import LoaderRecipe, source_order
from marrow.loader.mixture import Phase, Schedule
from marrow.loader.plan import FullShuffle, WindowShuffle
from marrow.loader.seen import Seen, times_mixed, times_seen

_WINDOW = re.compile(r"window of (\d+) shards")


def note(loader: LoaderRecipe, sources: Sources, role: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be kept on the edge to the shards of a role. Args: facts: of the training."""
    detail = {key: facts[key] for key in ("seed", "samples", "order")}
    if not loader.mixture:
        return detail
    names = sorted(loader.mixture)
    numbers = {name: names.index(name) for name, its_role in sources.roles.items() if its_role == role}
    phases = [[phase.start, list(phase.weights)] for phase in loader.schedule()]
    return detail | {"window": loader.window, "phases": phases, "sources": numbers}


def seen(detail: Mapping[str, Any], rows_of_S: Sequence[int], rows_N: Any) -> Seen | None:
    """Say how often a run consumed some rows of shards, int64 [N]; None if its note does not tell.

    Args: rows_of_S: rows of each shard.
    """
    if "seed" not in detail or "samples" not in detail:
        return None
    seed, (start, stop) = detail["seed"], detail["samples"]
    skip = [(low, high) for low, high in detail.get("skip", ())]
    name = str(detail.get("order", "full"))
    if name == "full":
        return times_seen(FullShuffle(sum(rows_of_S), seed), rows_N, start, stop, skip)
    if window := _WINDOW.fullmatch(name):
        return times_seen(WindowShuffle(rows_of_S, seed, int(window[1])), rows_N, start, stop, skip)
    if "sources" not in detail:
        return None
    schedule = Schedule([Phase(start, tuple(weights)) for start, weights in detail["phases"]], seed)
    found = Seen()
    for source, number in detail["sources"].items():
        order = source_order(source, rows_of_S, seed, detail["window"])
        found = found.and_also(times_mixed(schedule, number, order, rows_N, start, stop, skip))
    return found
