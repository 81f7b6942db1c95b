"""Pieces of work for engines: top-level functions, since other processes import them."""

import os
import signal
import threading
import time
from pathlib import Path

from marrow.core.errors import DataError, RequestError


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    time.sleep(0.02)  # so that one worker cannot take all pieces
    return os.getpid()


def thread_id(_: int) -> int:
    time.sleep(0.02)
    return threading.get_ident()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError(f"piece {number} is broken", hint="mend it")
    return number


def refuse(_: int) -> int:
    raise RequestError("no", hint="ask otherwise", status=429, param="n")


def fail_oddly(_: int) -> int:
    raise Odd(1, 2)


class Odd(Exception):
    """An error that pickle cannot make again: its arguments are not those of its class."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")


def die(number: int) -> int:
    """Be killed, as by the system when memory runs out."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(place: tuple[str, int]) -> int:
    """Be killed the first time; the next attempt finds the mark of the first."""
    folder, number = place
    mark = Path(folder) / str(number)
    if number % 3 == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def sleep_then_mark(place: tuple[str, float]) -> str:
    folder, seconds = place
    (Path(folder) / f"started-{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(seconds)
    (Path(folder) / f"ended-{os.getpid()}-{time.monotonic_ns()}").touch()
    return folder


def large(num_bytes: int) -> bytes:
    return bytes(num_bytes)


def leave(_: int) -> int:
    os._exit(7)


def slow_square(number: int) -> int:
    time.sleep(0.03)
    return number * number
