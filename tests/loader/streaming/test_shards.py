import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from object_server import Fault, Seen
from shard_origin import Origin, content

from marrow.core.errors import (
    DataError,
    DiskFull,
    NotPermitted,
    ResourceError,
    SourceError,
    Unreachable,
    UsageError,
)
from marrow.loader.reader import ShardReader
from marrow.loader.stages import Timeline, totals
from marrow.loader.streaming import fetch
from marrow.loader.streaming.cache import Cache
from marrow.loader.streaming.shards import CachedShards
from marrow.store.remote.client import Remote
from marrow.store.remote.retry import Retry

KB = 1000


def test_shards_come_whole_and_in_any_order(origin: Origin, tmp_path: Path) -> None:
    files = origin.add(8, 5 * KB)
    with origin.open(Cache(tmp_path, 100 * KB)) as shards:
        for index in [3, 0, 7, 3, 1]:
            path = shards.path(index)
            assert path.suffix == ".arrow"
            assert origin.is_whole(index, path) and shards.is_verified(index)
            shards.release(index)
        shards.release(3)  # once too often is fine
        counters = shards.counters()
    assert counters["misses"] == counters["requests"] == 4
    assert counters["hits"] == 1
    assert counters["fetched_bytes"] == sum(files[index].num_bytes for index in (3, 0, 7, 1))


def test_what_comes_soon_is_fetched_before_it_is_asked_for(origin: Origin, tmp_path: Path) -> None:
    origin.add(8, 5 * KB)
    with origin.open(Cache(tmp_path, 100 * KB), in_flight=1) as shards:
        order = [5, 2, 7, 0]
        shards.ahead(order)
        wait_for(lambda: shards.counters()["misses"] == 4)
        names = [seen.path[-7:-6] for seen in origin.proxy.seen]
        assert names == [str(index) for index in order], "not in the order of use"
        origin.proxy.down = True
        for index in order:
            assert origin.is_whole(index, shards.path(index))
            shards.release(index)
        assert shards.counters()["waits"] == 0


def test_as_many_are_in_flight_as_asked_for_and_no_more(origin: Origin, tmp_path: Path) -> None:
    origin.add(24, KB)
    lock, now, most = threading.Lock(), 0, 0
    full = threading.Event()

    def slow(request: Seen, number: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 6:
                full.set()
        assert full.wait(30)  # the first ones wait for each other
        time.sleep(0.03)  # so that one too many has its time to come
        with lock:
            now -= 1

    origin.proxy.fault = slow
    with origin.open(Cache(tmp_path, 100 * KB), in_flight=6) as shards:
        shards.ahead(range(24))
        wait_for(lambda: shards.counters()["misses"] == 24)
    assert most == 6


def test_one_that_is_waited_for_goes_before_the_plan(origin: Origin, tmp_path: Path) -> None:
    origin.add(20, KB)
    origin.proxy.fault = lambda request, n: Fault(wait_s=0.02)
    with origin.open(Cache(tmp_path, 100 * KB), in_flight=1) as shards:
        shards.ahead(range(19))
        shards.path(19)
        assert len(origin.proxy.seen) <= 4


def test_what_was_fetched_ahead_stays_until_it_is_used(origin: Origin, tmp_path: Path) -> None:
    origin.add(10, 10 * KB)
    cache = Cache(tmp_path, 60 * KB)
    with origin.open(cache) as shards:
        shards.ahead([0, 1, 2])
        wait_for(lambda: shards.counters()["misses"] == 3)
        for index in (5, 6, 7, 8, 5, 6, 7, 8):  # much more than fits beside them
            shards.path(index)
            shards.release(index)
        misses = shards.counters()["misses"]
        for index in (0, 1, 2):
            shards.path(index)
            shards.release(index)
        assert shards.counters()["misses"] == misses


def test_the_plan_takes_half_of_the_cache_at_most(origin: Origin, tmp_path: Path) -> None:
    origin.add(20, 10 * KB)
    cache = Cache(tmp_path, 80 * KB)
    with origin.open(cache) as shards:
        assert shards.max_open == 4
        shards.ahead(range(20))
        wait_for(lambda: shards.counters()["misses"] == 4)
        time.sleep(0.2)
        assert shards.counters()["misses"] == 4
        assert cache.usage().num_bytes == 40 * KB
        shards.path(0)
        wait_for(lambda: shards.counters()["misses"] == 5)
        shards.ahead([15, 16])  # a new plan: what the old one held may go
        wait_for(lambda: shards.counters()["misses"] == 7)
        shards.release(0)
        wait_for(lambda: cache.usage().pinned_bytes == 20 * KB)


def test_a_dataset_larger_than_its_cache_is_read_within_the_limit(origin: Origin, tmp_path: Path) -> None:
    origin.add(12, 10 * KB)
    cache = Cache(tmp_path, 35 * KB)
    with origin.open(cache) as shards:
        for _ in range(2):
            for index in range(12):
                shards.ahead(range(index, min(index + 3, 12)))
                assert origin.is_whole(index, shards.path(index))
                usage = cache.usage()
                assert usage.num_bytes <= 35 * KB
                shards.release(index)
        assert shards.counters()["evicted"] >= 16


def test_one_shard_larger_than_the_cache_is_an_error_with_a_hint(origin: Origin, tmp_path: Path) -> None:
    origin.add(2, 10 * KB)
    with (
        origin.open(Cache(tmp_path, 9 * KB)) as shards,
        pytest.raises(ResourceError, match="10000 bytes does not fit"),
    ):
        shards.path(0)


def test_a_cache_that_others_keep_full_is_an_error_in_bounded_time(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_S", 0.3)
    origin.add(4, 10 * KB)
    cache = Cache(tmp_path, 25 * KB)
    with origin.open(cache) as mine, origin.open(Cache(tmp_path, 25 * KB)) as theirs:
        theirs.path(0)
        theirs.path(1)
        with pytest.raises(ResourceError, match="20000 bytes are in use"):
            mine.path(2)
        assert mine.counters()["full_waits"] == 1
        theirs.release(0)
        assert origin.is_whole(2, mine.path(2))


def test_two_jobs_that_wait_for_each_others_room_go_on(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds half of the cache and wants one more: what one has mapped it keeps, without its name."""
    monkeypatch.setattr(fetch, "STUCK_S", 0.2)
    origin.add(6, 10 * KB)
    with ExitStack() as stack:
        jobs = [stack.enter_context(origin.open(Cache(tmp_path, 25 * KB))) for _ in range(2)]
        held = [job.path(index).open("rb") for index, job in enumerate(jobs)]
        for file in held:
            stack.callback(file.close)
        with ThreadPoolExecutor(2) as pool:
            more = [pool.submit(job.path, 2 + index) for index, job in enumerate(jobs)]
            paths = [one.result(timeout=30) for one in more]
        assert all(origin.is_whole(2 + index, path) for index, path in enumerate(paths))
        assert [file.read() for file in held] == [content(index, 10 * KB) for index in range(2)]
        assert sum(job.counters()["overdrawn"] for job in jobs) >= 1


def test_room_that_a_job_gives_up_is_not_taken_by_another(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else that one has both, and whoever gave waits for it: for ever, if it waits for something in turn."""
    monkeypatch.setattr(fetch, "PATIENCE_S", 1.0)
    origin.add(6, 10 * KB)
    with (
        origin.open(Cache(tmp_path, 25 * KB)) as giver,
        origin.open(Cache(tmp_path, 25 * KB)) as taker,
        ThreadPoolExecutor(1) as pool,
    ):
        give_up = giver._fetcher._give_up

        def slowly(num_bytes: int, is_stuck: bool) -> bool:
            gave = give_up(num_bytes, True)
            time.sleep(0.1)  # the other one looks for room many times
            return gave

        giver.path(0)
        taker.path(1)
        waiting = pool.submit(taker.path, 3)
        wait_for(lambda: taker.counters()["full_waits"])
        monkeypatch.setattr(giver._fetcher, "_give_up", slowly)
        assert origin.is_whole(2, giver.path(2))
        assert not waiting.done()
        giver.release(2)
        assert origin.is_whole(3, waiting.result(timeout=30))


def test_a_wait_for_a_fetch_that_fails_is_no_wait_for_room(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1.0
    clock = SimpleNamespace(monotonic=lambda: now_s, perf_counter=time.perf_counter)
    monkeypatch.setattr(fetch, "time", clock)
    origin.add(4, 10 * KB)
    theirs = Cache(tmp_path, 25 * KB)
    with (
        origin.open(Cache(tmp_path, 25 * KB)) as shards,
        origin.open(theirs) as others,
        ThreadPoolExecutor(1) as pool,
    ):
        others.path(0)
        others.path(1)
        fetching = theirs.claim(shards._fetcher.key(2), 5 * KB)
        waiting = pool.submit(shards.path, 2)
        wait_for(lambda: shards.counters()["shared_waits"])
        now_s += 2 * fetch.PATIENCE_S
        fetching.close()
        wait_for(lambda: shards.counters()["full_waits"] or waiting.done())
        others.release(0)
        assert origin.is_whole(2, waiting.result(timeout=30))


def test_what_was_given_up_in_use_and_comes_again_can_be_given_up_again(
    origin: Origin, tmp_path: Path
) -> None:
    origin.add(5, 10 * KB)
    cache = Cache(tmp_path, 25 * KB)
    with origin.open(cache) as shards:
        for index in (0, 1, 2, 0, 1, 2, 3):  # none is released
            assert origin.is_whole(index, shards.path(index))
        assert shards.counters()["overdrawn"] == 5
        for index in (0, 0, 1, 1, 2, 2, 3):
            shards.release(index)
        assert cache.usage().pinned_bytes == 0


def test_room_that_the_plan_took_is_given_to_one_that_is_waited_for(origin: Origin, tmp_path: Path) -> None:
    origin.add(8, 10 * KB)
    cache = Cache(tmp_path, 30 * KB)
    with origin.open(cache) as shards:
        shards.path(0)
        shards.path(1)
        shards.ahead([2])
        wait_for(lambda: shards.counters()["misses"] == 3)
        assert origin.is_whole(7, shards.path(7))
        assert shards.counters()["dropped_ahead"] == 1


def test_a_second_process_finds_what_the_first_has_fetched(origin: Origin, tmp_path: Path) -> None:
    origin.add(6, 5 * KB)
    cache = Cache(tmp_path, 100 * KB)
    with origin.open(cache) as shards:
        for index in range(6):
            shards.path(index)
    counters = origin.start(cache, reads=30).wait()
    assert counters["misses"] == counters["requests"] == 0
    assert counters["verified"] == 6, "each process checks each shard once"
    assert len(origin.proxy.seen) == 6


@pytest.mark.slow
def test_two_processes_of_four_threads_fetch_each_shard_once(origin: Origin, tmp_path: Path) -> None:
    origin.add(12, 20 * KB)
    origin.proxy.fault = lambda request, n: Fault(wait_s=0.02)
    cache = Cache(tmp_path, 1000 * KB)
    processes = [origin.start(cache, seed=seed, reads=20, threads=4) for seed in range(2)]
    counters = [process.wait() for process in processes]
    assert origin.proxy.count("GET") <= 12
    assert sum(each["misses"] for each in counters) == origin.proxy.count("GET")
    assert cache.usage().pinned_bytes == cache.usage().part_bytes == 0


@pytest.mark.slow
def test_two_processes_hammering_a_small_cache_keep_the_limit(origin: Origin, tmp_path: Path) -> None:
    files = origin.add(10, 10 * KB)
    # Room for what 8 threads hold at once, and for what they fetch ahead, but not for all.
    cache = Cache(tmp_path, 95 * KB)
    processes = [origin.start(cache, seed=seed, reads=25, threads=4) for seed in range(2)]
    while any(process.process.poll() is None for process in processes):
        assert cache.usage().num_bytes <= 95 * KB
        time.sleep(0.005)
    counters = [process.wait() for process in processes]
    usage = cache.usage()
    assert usage.pinned_bytes == usage.part_bytes == 0
    fetched = sum(each["misses"] for each in counters)
    asked = 2 * 4 * 25
    requests = origin.proxy.count("GET")
    # A process that closes lets go of what is still on its way ahead: a request, but nothing fetched.
    assert len(files) <= fetched <= requests <= fetched + 2 * len(files)
    # Without a cache each read and each shard fetched ahead would be a request.
    assert requests < asked / 2
    assert sum(each["damaged"] for each in counters) == 0


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(10, id="few", marks=pytest.mark.slow),
        pytest.param(200, id="many", marks=pytest.mark.soak),
    ],
)
def test_killed_at_random_moments_nothing_is_lost_or_wrong(
    kills: int, origin: Origin, tmp_path: Path
) -> None:
    """Fetching and reading processes are killed; a survivor's reads and the end are bit for bit right."""
    origin.add(8, 40 * KB)
    origin.proxy.fault = lambda request, n: Fault(bytes_per_s=4000 * KB) if n % 2 else None
    cache = Cache(tmp_path, 200 * KB)
    rng = random.Random(0)
    survivor = origin.start(cache, seed=99, reads=10 * kills, threads=2)
    for kill in range(kills):
        victim = origin.start(cache, seed=kill, reads=10**6, threads=2, say=True)
        victim.wait_for_start()
        time.sleep(rng.uniform(0, 0.15))
        victim.kill()
    counters = survivor.wait(timeout_s=30 + kills)
    assert counters["damaged"] == 0
    usage = cache.usage()
    assert usage.pinned_bytes == 0 and usage.num_bytes <= 200 * KB
    with origin.open(cache) as shards:
        for index in range(8):
            assert origin.is_whole(index, shards.path(index))
            shards.release(index)
        assert shards.counters()["damaged"] == 0
    assert cache.usage().part_bytes == 0 or (cache.evict(10**9) and cache.usage().part_bytes == 0)


@pytest.mark.parametrize(
    "fault",
    [Fault(short_by=10), Fault(flip=77), Fault(cut_after=2000), Fault(status=503)],
    ids=["short", "wrong byte", "cut", "503"],
)
def test_a_shard_that_arrives_wrong_is_fetched_again_and_counted(
    fault: Fault, origin: Origin, tmp_path: Path
) -> None:
    origin.add(6, 5 * KB)
    origin.proxy.fault = lambda request, n: fault if n % 2 == 0 else None
    with origin.open(Cache(tmp_path, 100 * KB), in_flight=1) as shards:
        for index in range(6):
            assert origin.is_whole(index, shards.path(index))
        counters = shards.counters()
    kind = "retries" if fault.status or fault.cut_after else "damaged"
    assert counters[kind] == 6 and counters["misses"] == 6


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault(short_by=10), "4990 bytes came instead of 5000"),
        (Fault(flip=77), "its xxh3 is"),
    ],
    ids=["short", "wrong byte"],
)
def test_a_shard_that_stays_wrong_is_named_with_its_url_and_tries(
    fault: Fault, problem: str, origin: Origin, tmp_path: Path
) -> None:
    origin.add(3, 5 * KB)
    origin.proxy.fault = lambda request, n: fault if "00001" in request.path else None
    cache = Cache(tmp_path, 100 * KB)
    with origin.open(cache) as shards:
        shards.ahead([0, 1, 2])
        assert origin.is_whole(0, shards.path(0)) and origin.is_whole(2, shards.path(2))
        with pytest.raises(DataError, match=problem) as caught:
            shards.path(1)
        assert f"{origin.url}/train-00001.arrow" in str(caught.value) and "3 tries" in str(caught.value)
        assert cache.usage().num_files == 2 and cache.usage().part_bytes == 0
        origin.proxy.fault = lambda request, n: None
        assert origin.is_whole(1, shards.path(1)), "an error is not for ever"


def test_a_body_longer_than_the_manifest_says_is_not_swallowed(origin: Origin, tmp_path: Path) -> None:
    files = origin.add(2, 5 * KB)
    origin.files[0] = replace(files[0], num_bytes=4000)
    with (
        origin.open(Cache(tmp_path, 100 * KB)) as shards,
        pytest.raises(DataError, match="more than its 4000"),
    ):
        shards.path(0)


def test_a_file_damaged_in_the_cache_is_found_by_the_next_process(origin: Origin, tmp_path: Path) -> None:
    origin.add(3, 5 * KB)
    cache = Cache(tmp_path, 100 * KB)
    with origin.open(cache) as shards:
        damaged = [shards.path(index) for index in range(3)]
    os.truncate(damaged[0], 100)
    with damaged[1].open("r+b") as file:
        file.write(b"?")
    with origin.open(cache) as shards:
        for index in range(3):
            assert origin.is_whole(index, shards.path(index))
        counters = shards.counters()
    assert (counters["damaged"], counters["misses"], counters["hits"]) == (2, 2, 1)


def test_a_format_without_checks_is_checked_by_size(origin: Origin, tmp_path: Path) -> None:
    origin.add(2, 5 * KB)
    origin.files[:] = [replace(file, xxh3="") for file in origin.files]
    origin.proxy.fault = lambda request, n: Fault(short_by=1) if n == 0 else None
    with origin.open(Cache(tmp_path, 100 * KB)) as shards:
        assert origin.is_whole(0, shards.path(0))
        assert shards.counters()["damaged"] == 1


def test_a_storm_of_errors_is_survived_and_told(origin: Origin, tmp_path: Path) -> None:
    origin.add(10, 5 * KB)
    storm = [Fault(status=500), Fault(status=503), Fault(cut_after=100), None]
    rng = random.Random(1)
    origin.proxy.fault = lambda request, n: rng.choice(storm)
    with origin.open(Cache(tmp_path, 100 * KB)) as shards:
        shards.ahead(range(10))
        for index in range(10):
            assert origin.is_whole(index, shards.path(index))
        counters = shards.counters()
    assert counters["misses"] == 10
    told = sum(count for name, count in counters.items() if name.startswith("error "))
    assert told == counters["retries"] == len(origin.proxy.seen) - 10 > 5


def test_an_endpoint_that_goes_and_comes_back_costs_time_only(origin: Origin, tmp_path: Path) -> None:
    origin.add(4, 5 * KB)
    patient = Retry(attempts=100, first_delay_s=0.02, max_delay_s=0.05, timeout_s=5.0)
    with origin.open(Cache(tmp_path, 100 * KB), retry=patient) as shards:
        shards.path(0)
        origin.proxy.down = True
        timer = threading.Timer(0.5, lambda: setattr(origin.proxy, "down", False))
        timer.start()
        assert origin.is_whole(1, shards.path(1))
        timer.join()
        assert shards.counters()["wait_s"] >= 0.4 and shards.counters()["retries"] >= 5


def test_an_endpoint_that_failed_ahead_of_time_is_asked_again_when_it_matters(
    origin: Origin, tmp_path: Path
) -> None:
    origin.add(2, 5 * KB)
    origin.proxy.down = True
    hasty = Retry(attempts=2, first_delay_s=0.001)
    with origin.open(Cache(tmp_path, 100 * KB), retry=hasty) as shards:
        shards.ahead([0])
        wait_for(lambda: len(origin.proxy.seen) == 2)
        with pytest.raises(Unreachable, match="train-00000"):
            shards.path(0)
        origin.proxy.down = False
        assert origin.is_whole(0, shards.path(0))


def test_an_endpoint_that_hangs_is_left_after_the_timeout(origin: Origin, tmp_path: Path) -> None:
    origin.add(2, 5 * KB)
    origin.proxy.fault = lambda request, n: Fault(wait_s=1.5) if n == 0 else None
    quick = Retry(timeout_s=0.2, first_delay_s=0.001)
    with origin.open(Cache(tmp_path, 100 * KB), retry=quick) as shards:
        assert origin.is_whole(0, shards.path(0))
        assert shards.counters()["error timeout"] == 1
        assert shards.counters()["wait_s"] < 1.4


@pytest.mark.parametrize(("status", "kind"), [(404, SourceError), (403, NotPermitted)])
def test_a_shard_that_is_not_there_or_not_allowed_is_named(
    status: int, kind: type[Exception], origin: Origin, tmp_path: Path
) -> None:
    origin.add(2, 5 * KB)
    origin.proxy.fault = lambda request, n: Fault(status=status)
    with origin.open(Cache(tmp_path, 100 * KB)) as shards:
        with pytest.raises(kind, match=f"{origin.url}/train-00001.arrow"):
            shards.path(1)
        assert len(origin.proxy.seen) == 1, "asked again for what will not come"


def test_a_full_disk_evicts_and_then_says_so(origin: Origin, small_disk: Callable[[str], Path]) -> None:
    """The disk has 256 KiB, the cache believes in much more."""
    origin.add(8, 60 * KB)
    cache = Cache(small_disk("256k"), 10_000 * KB)
    with origin.open(cache, in_flight=1) as shards:
        for index in [*range(8), 0, 1]:
            assert origin.is_whole(index, shards.path(index))
            shards.release(index)
        assert shards.counters()["disk_full"] > 0
        for index in range(4):
            shards.path(index)
        with pytest.raises(DiskFull, match="no space left") as caught:
            shards.path(4)
        assert caught.value.hint is not None
        assert cache.usage().part_bytes == 0
        shards.release(0)
        assert origin.is_whole(7, shards.path(7))


def test_the_folder_may_be_deleted_while_shards_are_read(origin: Origin, tmp_path: Path) -> None:
    origin.add(6, 5 * KB)
    cache = Cache(tmp_path / "cache", 100 * KB)
    with origin.open(cache) as shards:
        mapped = np.memmap(shards.path(0), dtype=np.uint8, mode="r")
        shards.ahead([1, 2])
        wait_for(lambda: shards.counters()["misses"] == 3)
        shutil.rmtree(cache.folder)
        assert bytes(mapped) == content(0, 5 * KB), "what is mapped stays"
        shards.release(0)
        for index in (0, 3):
            assert origin.is_whole(index, shards.path(index))
        for index in (1, 2):  # pinned ahead, but gone: fetched again, not a path to nowhere
            assert origin.is_whole(index, shards.path(index))


@pytest.mark.slow
def test_a_stopped_fetcher_does_not_stop_the_others(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "STALLED_S", 0.2)
    origin.add(1, 40 * KB)
    cache = Cache(tmp_path, 1000 * KB)
    origin.proxy.fault = lambda request, n: Fault(wait_s=1) if n == 0 else None
    stopped = origin.start(cache, reads=1)
    try:
        wait_for(lambda: len(origin.proxy.seen) == 1)
        stopped.process.send_signal(signal.SIGSTOP)
        with origin.open(cache) as shards:
            assert origin.is_whole(0, shards.path(0))
            assert shards.counters()["shared_waits"] == 1
        stopped.process.send_signal(signal.SIGCONT)
        assert stopped.wait()["damaged"] == 0
    finally:
        stopped.kill()


def test_many_threads_may_wait_for_one_shard(origin: Origin, tmp_path: Path) -> None:
    origin.add(2, 5 * KB)
    origin.proxy.fault = lambda request, n: Fault(wait_s=0.05)
    cache = Cache(tmp_path, 100 * KB)
    with origin.open(cache) as shards:
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(lambda _: shards.path(0), range(8)))
        assert len(set(paths)) == 1 and len(origin.proxy.seen) == 1
        for _ in range(7):
            shards.release(0)
        assert cache.usage().pinned_bytes == 5 * KB
        shards.release(0)
        assert cache.usage().pinned_bytes == 0


def test_closing_is_quick_and_final(origin: Origin, tmp_path: Path) -> None:
    origin.add(8, 5 * KB)
    origin.proxy.fault = lambda request, n: Fault(status=503)
    shards = origin.open(Cache(tmp_path, 100 * KB), retry=Retry(first_delay_s=60, max_delay_s=60))
    shards.ahead(range(8))
    wait_for(lambda: len(origin.proxy.seen) >= 8)
    start_s = time.monotonic()
    shards.close()
    shards.close()
    assert time.monotonic() - start_s < 10  # the threads were to wait for a minute
    assert not [thread for thread in threading.enumerate() if thread.name == "marrow-fetch"]
    with pytest.raises(UsageError, match="closed"):
        shards.path(0)


def test_closing_wakes_whoever_waits(origin: Origin, tmp_path: Path) -> None:
    origin.add(1, 5 * KB)
    origin.proxy.fault = lambda request, n: Fault(status=503)
    shards = origin.open(Cache(tmp_path, 100 * KB), retry=Retry(first_delay_s=60, max_delay_s=60))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shards.path, 0)
        wait_for(lambda: len(origin.proxy.seen) == 1)
        shards.close()
        with pytest.raises((UsageError, Unreachable)):
            waiting.result(timeout=5)


def test_waits_are_charged_to_fetch(origin: Origin, tmp_path: Path) -> None:
    origin.add(2, 5 * KB)
    origin.proxy.fault = lambda request, n: Fault(wait_s=0.1)
    with origin.open(Cache(tmp_path, 100 * KB)) as shards, Timeline() as timeline:
        shards.path(0)
    assert totals(timeline.marks)["fetch"] >= 0.1
    assert set(totals(timeline.marks)) <= {"fetch", "verify"}


FORK = """
import json, os, signal, sys
from pathlib import Path
from marrow.core.errors import UsageError
from marrow.loader.streaming.cache import Cache
from marrow.loader.streaming.shards import CachedShards, ShardFile
url, folder, files, when = json.loads(sys.argv[1])
signal.alarm(60)
shards = CachedShards(url, [ShardFile(*file) for file in files], Cache(Path(folder), 10**6))
if when == "after":
    shards.path(0)
child = os.fork()
if child == 0:
    signal.alarm(20)
    try:
        print("first", len(shards.path(0).read_bytes()), flush=True)
        print("second", len(shards.path(1).read_bytes()), flush=True)
    except UsageError as error:
        print("refused", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent", len(shards.path(1).read_bytes()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forked_child_never_hangs(when: str, origin: Origin, tmp_path: Path) -> None:
    """Before the first request a child may do all; after it, it has what the cache has, else an error."""
    files = [[file.name, file.num_bytes, file.xxh3] for file in origin.add(3, 5 * KB)]
    settings = json.dumps([origin.url, str(tmp_path), files, when])
    command = [sys.executable, "-W", "ignore", "-c", FORK, settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    second = "second 5000" if when == "before" else "refused"
    assert done.stdout.splitlines() == ["first 5000", second, "parent 5000"]


def test_a_pickled_one_opens_anew_on_the_same_cache(origin: Origin, tmp_path: Path) -> None:
    origin.add(3, 5 * KB)
    with origin.open(Cache(tmp_path, 100 * KB)) as shards:
        shards.path(0)
        with pickle.loads(pickle.dumps(shards)) as copy:
            assert origin.is_whole(0, copy.path(0)) and origin.is_whole(1, copy.path(1))
            assert copy.counters()["misses"] == 1


def test_rows_streamed_from_a_bucket_are_the_rows_on_the_disk(
    bucket: str, shards: Path, tmp_path: Path
) -> None:
    with Remote.open(bucket) as remote:
        for path in shards.iterdir():
            remote.write(f"data/{path.name}", path)
    cache = Cache(tmp_path, 9 * KB)  # of about 20 KB
    streamed = CachedShards.open(f"{bucket}/data", cache)
    assert streamed.folder is not None
    rng = np.random.default_rng(0)
    with ShardReader(shards) as local, ShardReader(streamed.folder, streamed) as reader:
        assert reader.num_rows == local.num_rows and reader.check == local.check
        for _ in range(12):
            rows = rng.permutation(local.num_rows)[:7]
            reader.ahead(rows)
            a, b = local.take(rows), reader.take(rows)
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.starts, b.starts)
            assert np.array_equal(a.num_tokens, b.num_tokens)
    assert streamed.counters()["evicted"] > 0


def test_a_manifest_that_is_not_there_is_named(origin: Origin, tmp_path: Path) -> None:
    origin.add(1, 10)
    with pytest.raises(SourceError, match=r"manifest\.json"):
        CachedShards.open(origin.url, Cache(tmp_path, 1000))


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it does not happen"
        time.sleep(0.005)
