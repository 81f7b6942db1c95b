"""The serve step of a run: a real server in a process of its own, loaded over HTTP, then stopped.

The server is the one of `marrow serve`. It holds the end of a pipe to this process, so that it
stops even if this process is killed.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from marrow.cli.recipe import LoadRecipe
from marrow.core.errors import ServeError
from marrow.core.files import atomic_file
from marrow.core.progress import Progress
from marrow.core.span import span
from marrow.serve.config import ServeRecipe
from marrow.serve.load import Load, drive

START_S = 120.0
STOP_S = 20.0  # beyond the time to drain


def try_server(
    name: str,
    folder: Path,
    prompts: list[str],
    serve: ServeRecipe,
    load: LoadRecipe,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Serve a model folder, send it concurrent streaming requests, check the answers, stop it.

    Args: prompts: taken in turn; every second request of one prompt is greedy.
    Returns: facts: rates and latencies as the clients felt them; `greedy_agreement`: the share of
        prompts whose greedy completion, asked for twice among other requests, was the same (in bf16
        the batch around a request may change a token).
    Raises: ServeError if it does not start, an answer is missing or broken, or it ends badly.
    """
    with span("start the server"), running_server(folder, name, serve) as server:
        wanted = Load(
            prompts=prompts,
            num_requests=load.requests,
            concurrency=load.concurrency,
            max_tokens=load.max_tokens,
            model=name,
            body={"temperature": 0.8, "seed": 1},
        )
        with span("load"):
            measured, answers = drive(server.url, wanted, progress)
        with span("check"):
            again, greedy = drive(server.url, greedy_twice(wanted), progress)
        with span("drain and stop"):
            measured["exit_status"] = server.stop(serve.drain)
    broken = [answer for answer in (*answers, *greedy) if answer.error or answer.finish_reason is None]
    if broken:
        raise ServeError(
            f"{len(broken)} of {measured['requests'] + again['requests']} requests failed: "
            f"{broken[0].error or 'the stream ended early'}",
            hint="run `marrow serve` on the model and look at its log",
        )
    if measured["exit_status"] != 0:
        raise ServeError(f"the server ended with status {measured['exit_status']} instead of draining")
    half = len(greedy) // 2
    texts = [answer.text for answer in sorted(greedy, key=lambda answer: answer.number)]
    same = sum(first == second for first, second in zip(texts[:half], texts[half:], strict=True))
    measured["greedy_agreement"] = same / half
    measured["concurrency"] = load.concurrency
    with atomic_file(out / "serving.json", "w") as file:
        json.dump(measured | {"answers": [asdict(answer) for answer in answers[:8]]}, file, indent=2)
    return measured


def greedy_twice(load: Load) -> Load:
    """Return a load that asks each of the first prompts twice, without chance."""
    prompts = list(load.prompts[:4])
    return Load(prompts, 2 * len(prompts), load.concurrency, None, 16, load.model, {"temperature": 0})


class Server:
    """A child process that serves; `url` is where."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self._process = process
        self.url = url

    def stop(self, drain_s: float) -> int:
        """Ask it to drain and stop; return its exit status (0: done, 130: interrupted).

        Raises: ServeError if it does not.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=drain_s + STOP_S)
        except subprocess.TimeoutExpired:
            raise ServeError(f"the server did not stop within {drain_s + STOP_S:.0f} s") from None


@contextmanager
def running_server(folder: Path, name: str, recipe: ServeRecipe) -> Iterator[Server]:
    """Start `marrow serve` on a free port in a child process; kill it, if need be, at the end."""
    settings = [f"serve.{key}={toml(value)}" for key, value in asdict(recipe).items() if key != "port"]
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "marrow", "serve", str(folder), "--name", name, "--port", "0", "--json"]
            + [word for setting in settings for word in ("--set", setting)]
            + ["--parent-fd", str(read_end)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(read_end,),
        )
    finally:
        os.close(read_end)
    try:
        yield Server(process, _announced(process))
    finally:
        os.close(write_end)
        try:
            process.wait(timeout=recipe.drain + STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _announced(process: "subprocess.Popen[str]") -> str:
    """Wait for the line with the address. Raises: ServeError if the child ends or says nothing."""
    first: queue.Queue[str] = queue.Queue()
    stdout = process.stdout
    assert stdout is not None
    threading.Thread(target=lambda: first.put(stdout.readline()), daemon=True).start()
    try:
        line = first.get(timeout=START_S)
    except queue.Empty:
        process.kill()
        raise ServeError(
            f"the server said nothing for {START_S:.0f} s", hint="is the machine busy?"
        ) from None
    if not line:
        raise ServeError(f"the server ended with status {process.wait()} before it was ready")
    url: str = json.loads(line)["url"]
    return url


def toml(value: Any) -> str:
    """Write a recipe value for `--set`."""
    return json.dumps(value)
