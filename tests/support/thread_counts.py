"""Run something with one thread of torch's and with two."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def one_and_two(work: Callable[[], T]) -> tuple[T, T]:
    """Return what `work` gives with one thread, and with two."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = work()
        torch.set_num_threads(2)
        return one, work()
    finally:
        torch.set_num_threads(before)
