import gc
import pickle
import threading

import numpy as np
import pytest
import torch

from marrow.loader.buffers import Ring


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    ring = Ring()
    first = address(ring.take(1000))
    assert all(address(ring.take(1000)) == first for _ in range(10))
    assert first % 64 == 0


@pytest.mark.parametrize(
    "hold",
    [
        lambda slab: slab,
        lambda slab: slab[5:9],
        lambda slab: slab.view(np.int64).reshape(5, 25)[:, 1:],
        lambda slab: torch.from_numpy(slab),
        lambda slab: torch.from_numpy(slab).view(torch.int64)[3:7],
        lambda slab: torch.from_numpy(slab).detach().view(10, 100).T,
        lambda slab: torch.from_numpy(slab).numpy()[2:],
        lambda slab: memoryview(slab)[10:20],
        lambda slab: torch.utils.dlpack.to_dlpack(torch.from_numpy(slab)),
        lambda slab: torch.from_numpy(slab).untyped_storage(),
    ],
)
def test_memory_that_anything_can_see_is_never_given_out(hold: object) -> None:
    ring = Ring()
    slab = ring.take(1000)
    at = address(slab)
    held = hold(slab)  # type: ignore[operator]
    del slab
    gc.collect()
    others = [ring.take(1000) for _ in range(3)]
    assert at not in [address(other) for other in others]
    del held, others
    gc.collect()
    again = [ring.take(1000) for _ in range(4)]
    assert at in [address(slab) for slab in again], "it must come back, or nothing is recycled"


def test_a_consumer_that_keeps_every_batch_gets_fresh_memory() -> None:
    ring = Ring(most=4)
    kept = [ring.take(256) for _ in range(50)]
    for number, slab in enumerate(kept):
        slab[:] = number
    assert all((slab == number).all() for number, slab in enumerate(kept))
    assert len(ring._slabs) == 4


def test_larger_batches_replace_smaller_ones() -> None:
    ring = Ring(most=4)
    for size in (100, 10_000, 50, 20_000, 10_000):
        assert ring.take(size).nbytes == size
    assert len(ring._slabs) == 1


def test_threads_do_not_share_a_slab() -> None:
    ring = Ring()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            slab = ring.take(512)
            slab[:] = number
            if not (slab == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_ring_travels_without_its_memory() -> None:
    ring = Ring(most=3)
    ring.take(100_000)
    assert len(pickle.dumps(ring)) < 200
    assert pickle.loads(pickle.dumps(ring)).take(10).nbytes == 10
