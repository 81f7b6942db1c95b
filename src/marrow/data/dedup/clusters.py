"""Clusters: what pairs tie together, as connected components over arrays.

Union-find with path halving; a cluster bears the number of its smallest member.
Source: Tarjan and van Leeuwen 1984.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]


class Clusters:
    """Near pairs, one after the other, become clusters and the texts that go."""

    def __init__(self, count: int) -> None:
        self.near_of: I64 = np.full(count, -1, np.int64)
        self._parents: I64 = np.arange(count, dtype=np.int64)

    def add(self, earlier: I64, later: I64) -> None:
        """Take pairs in the order of their later text, then of their earlier one."""
        parents, near_of = self._parents.data, self.near_of.data
        for first, second in zip(earlier.tolist(), later.tolist(), strict=True):
            if near_of[second] < 0 and near_of[first] < 0:
                near_of[second] = first
            one, other = _root(parents, first), _root(parents, second)
            if one < other:
                parents[other] = one
            elif other < one:
                parents[one] = other

    def roots(self) -> I64:
        """Return each text's cluster."""
        parents = self._parents
        while True:
            above = parents[parents]
            if (above == parents).all():
                return parents
            parents = above


def _root(parents: Any, node: int) -> int:
    while (above := parents[node]) != node:
        parents[node] = node = parents[above]
    return node


def components(count: int, pairs: I64) -> I64:
    """Return for each of `count` nodes the smallest node of its connected component."""
    tree = Clusters(count)
    tree.add(pairs[:, 0], pairs[:, 1])
    return tree.roots()
