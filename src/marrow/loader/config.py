"""The `[loader]` table of a recipe: which rows come in which order, and how they are made ready.

    [loader]
    window = 16                     # shards shuffled together; 0 shuffles all rows
    stop_after = "2B tokens"        # of context, padding included
    phases = [0, 1_000_000]         # positions at which weights change
    [loader.mixture.books]
    shards = "books-shards@2"       # a folder of shards, or their artifact; "" are this recipe's own
    weights = [0.7, 0.4]            # one for each phase, in any unit
    [loader.mixture.code]
    shards = "data/code"
    weights = [0.3, 0.6]

`settings_of` tells which values decide what is trained on; the rest say only how fast it comes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from marrow.core.config import Bytes, Count, Range
from marrow.core.frozen_map import EMPTY, FrozenMap
from marrow.loader.mixture import Mixture, Phase, check_phases
from marrow.loader.plan import FullShuffle, Order, WindowShuffle, order_keys
from marrow.loader.reader import ShardReader

HOW = ("prefetch", "workers", "cache_bytes")  # fields that do not change a batch


@dataclass(frozen=True, slots=True)
class SourceRecipe:
    """One source of a mixture: its shards, and its weight in each phase.

    shards: a folder of shards, a URL, or a name, version or id of the catalog; empty for those of the
    recipe.
    """

    shards: str = ""
    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class LoaderRecipe:
    """Which rows come in which order, and how they are made ready.

    window: shards that are shuffled together; 0 shuffles all rows. stop_after: tokens of context
    after which there is no more, 0 for no end. phases: positions at which the mixture's weights
    change. prefetch: batches made ahead. workers: processes that make them, 0 for a thread.
    cache_bytes: room on this disk for shards at URLs, which are fetched as they are needed.
    """

    window: Annotated[int, Range(0)] = 0
    stop_after: Annotated[Count, Range(0)] = 0
    phases: tuple[int, ...] = (0,)
    mixture: Mapping[str, SourceRecipe] = EMPTY
    prefetch: Annotated[int, Range(0, 1024)] = 2
    workers: Annotated[int, Range(0, 1024)] = 0
    cache_bytes: Annotated[Bytes, Range(1 << 20)] = 16 << 30

    def __post_init__(self) -> None:
        if self.mixture:
            check_phases(self.schedule(), len(self.mixture))
        elif self.phases != (0,):
            raise ValueError(
                "phases are of a mixture, and there is none; name sources in [loader.mixture.NAME]"
            )

    def schedule(self) -> tuple[Phase, ...]:
        """Return the weights of all sources, in the order of their names, phase by phase."""
        sources = [self.mixture[name] for name in sorted(self.mixture)]
        for name, source in self.mixture.items():
            if len(source.weights) != len(self.phases):
                raise ValueError(
                    f"mixture.{name} has {len(source.weights)} weights for {len(self.phases)} phases; "
                    "give one for each"
                )
        return tuple(
            Phase(start, tuple(source.weights[i] for source in sources))
            for i, start in enumerate(self.phases)
        )

    def folders(self, own: Path = Path()) -> list[Path]:
        """Return the folders of shards that are read, in the order in which their rows are numbered.

        Args: own: those of the recipe. Sources that are names must have been replaced by folders.
        """
        names = sorted(self.mixture)
        return [Path(self.mixture[name].shards or own) for name in names] if names else [own]

    def with_folders(self, folders: Mapping[str, Path]) -> "LoaderRecipe":
        """Return the recipe with the sources' shards replaced by folders, by the sources' names."""
        mixture = {name: replace(self.mixture[name], shards=str(path)) for name, path in folders.items()}
        return replace(self, mixture=FrozenMap(mixture))

    def stop(self, context: int) -> int | None:
        """Return the first position that is not given out, for rows of `context` tokens."""
        return -(-self.stop_after // context) if self.stop_after else None

    def order(self, reader: ShardReader, seed: int) -> Order:
        """Make the order of samples: pass this method to the loader as `order`."""
        if not self.mixture:
            return one_order(reader.rows_of_shards, seed, self.window)
        orders, first = [], 0
        for name, manifest in zip(sorted(self.mixture), reader.manifests, strict=True):
            rows_of_S = reader.rows_of_shards[first : first + len(manifest.shards)]
            first += len(manifest.shards)
            orders.append(source_order(name, rows_of_S, seed, self.window))
        return Mixture(orders, self.schedule(), seed)


def one_order(rows_of_S: Any, seed: int, window: int) -> Order:
    """Return the order of one source: all rows shuffled, or windows of shards."""
    return WindowShuffle(rows_of_S, seed, window) if window else FullShuffle(int(sum(rows_of_S)), seed)


def source_order(name: str, rows_of_S: Any, seed: int, window: int) -> Order:
    """Return the order of a mixture's source: by its name, not by which others stand beside it."""
    return one_order(rows_of_S, order_keys(seed, 0, f"source {name}")[0], window)


def settings_of(recipe: LoaderRecipe) -> dict[str, Any]:
    """Return the values that decide which rows come and in which order: a part of a step's key.

    Which shards a source has is left to the caller: it knows them by their contents.
    """
    values = asdict(recipe)
    values["mixture"] = {name: source.weights for name, source in recipe.mixture.items()}
    return {name: value for name, value in values.items() if name not in HOW}
