"""Answers over http(s) whose length nobody says before: what a program writes while it is asked.

obstore refuses them. The standard library reads them, one connection, from the beginning.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from marrow.store.remote.backend import Buffer, Failure, Opened, RemoteFile

CHUNK_BYTES = 1 << 20
UNKNOWN = -1  # num_bytes of a file that has no known size


def open_unsized(url: str, name: str, timeout_s: float) -> Opened:
    """Send the request; raises Failure."""
    try:
        answer = urllib.request.urlopen(url, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        raise Failure(
            str(error.code), f"status {error.code} {error.reason}", transient=error.code >= 500
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _cut_off(error) from error
    date = answer.headers.get("Last-Modified")
    modified_s = parsedate_to_datetime(date).timestamp() if date else 0.0
    return Opened(RemoteFile(name, UNKNOWN, answer.headers.get("ETag") or "", modified_s), _chunks(answer))


def _chunks(answer: http.client.HTTPResponse) -> Iterator[Buffer]:
    with answer:
        while True:
            try:
                chunk = answer.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _cut_off(error) from error
            if not chunk:
                return
            yield chunk


def _cut_off(error: Exception) -> Failure:
    timed_out = isinstance(error, TimeoutError) or "timed out" in str(error)
    return Failure("timeout" if timed_out else "cut", f"{type(error).__name__}: {error}", transient=True)
