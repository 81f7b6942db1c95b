"""A mapping that does not change: the value of a table with free keys in a recipe.

Equal maps iterate in the same order, that of their keys, however they were written; so what is
made from equal recipes is made in the same order.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

Item = TypeVar("Item", covariant=True)


class FrozenMap(Mapping[str, Item], Generic[Item]):
    """A mapping that does not change, hashable if its values are; in the order of its keys."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Item] | Iterable[tuple[str, Item]] = ()) -> None:
        self._items = dict(sorted(dict(items).items()))

    def __getitem__(self, key: str) -> Item:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return f"FrozenMap({self._items!r})"


EMPTY: Final[FrozenMap[Any]] = FrozenMap()  # the default of a table with free keys
