import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import ResourceError, SourceError
from marrow.loader.streaming.cache import SLACK, Busy, Cache, Pin

FOREVER_S = 100 * 365 * 86400


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path / "cache", 1000)
    yield cache
    cache.close()


def put(cache: Cache, key: str, num_bytes: int = 100) -> Pin:
    claim = cache.claim(key, num_bytes)
    os.pwrite(claim.descriptor, key[:1].encode() * num_bytes, 0)
    pin = cache.publish(claim)
    assert pin is not None
    return pin


def keys(cache: Cache) -> list[str]:
    return sorted(path.name for path in (cache.folder / "shards").iterdir())


def parts(cache: Cache) -> list[str]:
    return sorted(path.name for path in (cache.folder / "parts").iterdir())


def test_a_file_is_there_for_all_once_it_is_published(cache: Cache) -> None:
    other = Cache(cache.folder, 1000)
    assert cache.pin("a") is None
    claim = cache.claim("a", 3)
    os.write(claim.descriptor, b"abc")
    assert other.pin("a") is None
    pin = cache.publish(claim)
    assert pin is not None
    theirs = other.pin("a")
    assert theirs is not None
    assert theirs.path == pin.path and theirs.path.read_bytes() == b"abc"
    assert parts(cache) == []
    pin.close()
    pin.close()
    theirs.close()


def test_what_is_being_fetched_is_fetched_by_one_only(cache: Cache) -> None:
    other = Cache(cache.folder, 1000)
    claim = cache.claim("a", 3)
    for someone in (other, cache):
        with pytest.raises(Busy) as caught:
            someone.claim("a", 3)
        assert not caught.value.full
    claim.close()
    claim.close()
    assert parts(cache) == []
    other.claim("a", 3).close()


def test_what_was_published_meanwhile_is_not_claimed_again(cache: Cache) -> None:
    put(cache, "a").close()
    with pytest.raises(Busy):
        cache.claim("a", 100)
    assert parts(cache) == []


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=60))
def test_the_least_recently_used_goes_first(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[int, int]]
) -> None:
    """The oracle is a list in order of use; now and then another process's object is used."""
    folder = tmp_path_factory.mktemp("lru")
    caches = [Cache(folder, 1000), Cache(folder, 1000)]
    oracle: OrderedDict[str, int] = OrderedDict()
    for number, (which, grow) in enumerate(uses):
        key, num_bytes = str(which), 100 + 50 * which + grow
        cache = caches[number % 2]
        pin = cache.pin(key)
        assert (pin is not None) == (key in oracle)
        if pin is None:
            if sum(oracle.values()) + num_bytes > 1000:
                while oracle and sum(oracle.values()) > int(1000 - num_bytes - 1000 * SLACK):
                    oracle.popitem(last=False)
            pin = put(cache, key, num_bytes)
            oracle[key] = num_bytes
        oracle.move_to_end(key)
        pin.close()
        assert keys(cache) == sorted(oracle)
        assert cache.usage().num_bytes == sum(oracle.values()) <= 1000
    shutil.rmtree(folder)


def test_what_is_in_use_is_never_evicted(cache: Cache) -> None:
    pins = [put(cache, key, 200) for key in "abcd"]
    pins[1].close()
    put(cache, "e", 200).close()
    put(cache, "f", 300).close()
    assert keys(cache) == ["a", "c", "d", "f"]
    with pytest.raises(Busy) as caught:
        cache.claim("g", 500)
    assert caught.value.full
    assert cache.usage().pinned_bytes == 600
    for pin in pins:
        pin.close()
    put(cache, "g", 500).close()


def test_room_that_is_given_up_goes_to_who_gave_it(cache: Cache) -> None:
    other = Cache(cache.folder, 1000)
    mine = [put(cache, key, 250) for key in "ab"]
    theirs = put(other, "c", 500)
    looking = threading.Event()

    def look() -> bool:
        looking.set()
        try:
            other.claim("e", 250).close()
        except Busy:
            return False
        return True

    def give_up() -> bool:
        mine.pop().close()
        assert looking.wait(10)
        time.sleep(0.05)
        return True

    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(look)
        claim = cache.claim("d", 500, give_up=give_up)
        assert not mine and not taken.result(10)
    claim.close()
    theirs.close()


def test_bytes_in_flight_count_with_their_full_length(cache: Cache) -> None:
    claims = [cache.claim(key, 300) for key in "abc"]
    with pytest.raises(Busy) as caught:
        cache.claim("d", 101)
    assert caught.value.full
    assert cache.usage().part_bytes == 900
    claims[0].close()
    cache.claim("d", 300).close()


def test_a_file_that_can_never_fit_is_an_error_with_a_hint(cache: Cache) -> None:
    with pytest.raises(ResourceError, match="1001 bytes does not fit") as caught:
        cache.claim("a", 1001)
    assert caught.value.hint is not None
    put(cache, "a", 1000).close()


def test_two_jobs_may_have_limits_of_their_own(cache: Cache) -> None:
    small = Cache(cache.folder, 500)
    for key in "abcdefgh":
        put(cache, key).close()
    put(small, "i").close()
    assert cache.usage().num_bytes <= 500


CLAIM = """
import os, sys, time
from pathlib import Path
from marrow.loader.streaming.cache import Cache
cache = Cache(Path(sys.argv[1]), 1000)
if sys.argv[2] == "claim":
    held = cache.claim("a", 800)
    os.write(held.descriptor, b"half")
else:
    held = cache.pin("a")
print("held", flush=True)
time.sleep(100)
"""


def hold(cache: Cache, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIM, str(cache.folder), what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("then", ["claimed again", "evicted"])
def test_the_claim_of_a_killed_process_is_free(cache: Cache, then: str) -> None:
    process = hold(cache, "claim")
    with pytest.raises(Busy):
        cache.claim("a", 800)
    with pytest.raises(Busy):
        cache.claim("b", 300)
    end(process)
    assert parts(cache) == ["a"]
    if then == "evicted":
        put(cache, "b", 300).close()
        assert parts(cache) == []
        return
    claim = cache.claim("a", 700)
    assert os.fstat(claim.descriptor).st_size == 700
    assert os.pread(claim.descriptor, 4, 0) == bytes(4), "bytes of the killed fetcher are left"
    claim.close()


def test_the_pin_of_a_killed_process_is_free(cache: Cache) -> None:
    put(cache, "a", 800).close()
    process = hold(cache, "pin")
    with pytest.raises(Busy):
        cache.claim("b", 300)
    end(process)
    put(cache, "b", 300).close()
    assert keys(cache) == ["b"]


def test_leftovers_of_the_killed_go_before_what_is_whole(cache: Cache) -> None:
    put(cache, "whole", 150).close()
    end(hold(cache, "claim"))
    put(cache, "new", 300).close()
    assert keys(cache) == ["new", "whole"] and parts(cache) == []


def test_a_mapped_file_outlives_its_eviction(cache: Cache) -> None:
    pin = put(cache, "a", 600)
    with pin.path.open("rb") as file:
        pin.close()
        put(cache, "b", 600).close()
        assert keys(cache) == ["b"]
        assert file.read() == b"a" * 600


@pytest.mark.parametrize("ahead_s", [3600, FOREVER_S, -FOREVER_S / 4])
def test_files_from_another_time_do_not_upset_the_order(cache: Cache, ahead_s: float) -> None:
    for key in "abcdefgh":
        put(cache, key).close()
    then_s = time.time() + ahead_s
    for key in "abcdefgh":
        os.utime(cache.folder / "shards" / key, (then_s, then_s))
    put(cache, "x", 200).close()
    for _ in range(3):  # whatever is old goes; what was used just now stays
        put(cache, f"y{_}", 300).close()
        pin = cache.pin("x")
        assert pin is not None, "the file used last was evicted"
        pin.close()


def test_a_clock_that_is_set_back_does_not_upset_the_order(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = time.time_ns()
    for number, key in enumerate("abcdefghi"):
        monkeypatch.setattr(time, "time_ns", lambda number=number: now_ns - number * 10**12)
        put(cache, key).close()
    pin = cache.pin("a")
    assert pin is not None
    pin.close()
    put(cache, "j", 150).close()
    assert keys(cache) == ["a", *"cdefghij"]


@pytest.mark.parametrize("note", [b"", b"-5", b"many", b"\xff" * 40, b"0", b"999999999"])
def test_the_note_of_the_bytes_used_may_be_wrong(cache: Cache, note: bytes) -> None:
    for key in "abcdefgh":
        put(cache, key).close()
    (cache.folder / "lock").write_bytes(note)
    for key in "ijklmnop":
        put(cache, key).close()
    if note != b"0":  # only someone else's hand writes too little; the next walk finds it
        assert cache.usage().num_bytes <= 1000
    for key in "qrstuvwx":
        put(cache, key).close()
    assert cache.usage().num_bytes <= 1000


def test_the_folder_may_be_deleted_under_a_running_job(cache: Cache) -> None:
    pin = put(cache, "a")
    claim = cache.claim("b", 100)
    shutil.rmtree(cache.folder)
    assert cache.pin("a") is None
    assert cache.publish(claim) is None
    pin.close()
    put(cache, "b").close()
    assert keys(cache) == ["b"]
    shutil.rmtree(cache.folder)
    assert cache.usage().num_files == 0
    assert cache.evict(10**6) == 0


def test_a_damaged_file_is_taken_out_but_not_its_successor(cache: Cache) -> None:
    bad = put(cache, "a")
    also = cache.pin("a")
    assert also is not None
    cache.discard(bad)
    assert cache.pin("a") is None
    put(cache, "a").close()
    cache.discard(also)
    assert keys(cache) == ["a"]


def test_eviction_on_demand_frees_what_is_asked_for(cache: Cache) -> None:
    for key in "abcde":
        put(cache, key).close()
    pin = cache.pin("a")
    assert pin is not None
    assert cache.evict(150) == 200
    assert keys(cache) == ["a", "d", "e"]
    assert cache.evict(10**6) == 200
    assert keys(cache) == ["a"]
    assert cache.evicted == 4 and cache.evicted_bytes == 400
    pin.close()


def test_a_second_fetch_beside_a_stopped_one_is_allowed_and_harmless(cache: Cache) -> None:
    first = cache.claim("a", 100)
    second = cache.claim("a", 100, beside=True)
    for claim in (second, first):
        os.pwrite(claim.descriptor, b"a" * 100, 0)
        pin = cache.publish(claim)
        assert pin is not None
        pin.close()
    pin = cache.pin("a")
    assert pin is not None
    assert pin.path.read_bytes() == b"a" * 100
    pin.close()
    assert parts(cache) == []


def test_a_forked_child_holds_nothing_of_its_parent(cache: Cache) -> None:
    pin = put(cache, "a", 600)
    claim = cache.claim("b", 100)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        signal.pause()
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"x"
        with pytest.raises(Busy):
            cache.claim("c", 500)  # the child has let go, the parent has not
        pin.close()
        claim.close()
        put(cache, "c", 900).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_the_end_of_a_forked_child_frees_nothing_of_its_parent(cache: Cache) -> None:
    pin = put(cache, "a", 600)
    child = os.fork()
    if child == 0:
        cache.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(Busy):
        cache.claim("b", 500)
    pin.close()


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="make the cache"):
        Cache(tmp_path / "file" / "cache", 1000)


def test_threads_keep_the_limit_and_never_see_half_a_file(tmp_path: Path) -> None:
    problems: list[BaseException] = []
    caches = [Cache(tmp_path, 1000), Cache(tmp_path, 1000)]

    def work(number: int) -> None:
        cache = caches[number % 2]
        try:
            for step in range(60):
                key = "abcdefghijklmnop"[(step * 7 + number * 5) % 16]
                try:
                    pin = cache.pin(key) or put(cache, key, 150)
                except Busy:
                    continue
                assert pin.path.read_bytes() == key.encode() * 150
                pin.close()
        except BaseException as problem:
            problems.append(problem)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        usage = caches[0].usage()
        # A file that moves from parts to shards between two looks is counted twice.
        assert usage.num_bytes <= 1000
        time.sleep(0.001)
    assert not problems
    assert caches[0].usage().pinned_bytes == 0 and parts(caches[0]) == []
