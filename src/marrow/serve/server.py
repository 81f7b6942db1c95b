"""The server's process: take the port, load the model, serve until a signal, drain, stop.

SIGTERM stops the listening, lets running requests end within `drain` seconds, then ends them with
an error their clients can read. Nothing is printed here: the caller is told the URL.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from marrow.core.errors import NotPermitted, PortInUse, ServeError
from marrow.serve.app import make_app
from marrow.serve.config import ServeRecipe
from marrow.serve.engine import Engine
from marrow.text.chat import ChatTemplate


def run_server(
    folder: Path,
    recipe: ServeRecipe,
    *,
    name: str,
    announce: Callable[[str], None],
    parent_fd: int | None = None,
) -> int | None:
    """Serve a model folder until a signal comes. Call it in the main thread.

    Args: name: of the model, as clients ask for it. announce: called with the URL once requests
        are taken. parent_fd: a pipe that the parent process holds open; when it closes, the server
        stops as by SIGTERM, so that it never outlives its parent.
    Returns: the signal that ended it.
    Raises: PortInUse, NotPermitted before the model is loaded; ModelError, SourceError.
    """
    listener = bind(recipe.host, recipe.port)
    with contextlib.closing(listener):
        if parent_fd is not None:
            threading.Thread(target=_follow, args=(parent_fd, recipe.drain), daemon=True).start()
        chat = ChatTemplate.load(folder)
        with Engine.load(folder, recipe, name=name) as engine:
            server = Server(make_app(engine, chat), engine, lambda: announce(url_of(listener)))
            server.run(sockets=[listener])
            return server.ended_by


def bind(host: str, port: int) -> socket.socket:
    """Take the address and listen on it, so that nobody else can.

    Raises: PortInUse; NotPermitted for a port below 1024; ServeError for an unknown host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}: {error}", hint="set serve.host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} of {host} is taken by another process",
                hint="--set serve.port=0 takes a free one",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotPermitted(
                f"no permission to listen on port {port}", hint="take a port above 1023"
            ) from None
        raise ServeError(f"cannot listen on {host}: {error}", hint="set serve.host") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address as a browser on this machine takes it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with the engine drained while connections end, and no signal raised again."""

    def __init__(self, app: FastAPI, engine: Engine, ready: Callable[[], None]) -> None:
        self.engine = engine
        self.ready = ready
        self.ended_by: int | None = None
        drain = engine.recipe.drain
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="critical",
                access_log=False,
                lifespan="off",
                ws="none",
                # Beyond the engine's own deadline, so that clients still read why they were ended.
                timeout_graceful_shutdown=int(drain) + 3,
                server_header=False,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests, and say so."""
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the engine while the connections end."""
        drained = asyncio.create_task(asyncio.to_thread(self.engine.drain, self.engine.recipe.drain))
        await super().shutdown(sockets)
        await drained

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM over while serving; a second SIGINT ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can take signals
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the first signal."""
        self.ended_by = self.ended_by or sig
        super().handle_exit(sig, frame)


def _follow(parent_fd: int, drain_s: float) -> None:
    """Wait until the parent's end of the pipe closes, then stop as by SIGTERM, at the latest by force."""
    while os.read(parent_fd, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(drain_s + 10)
    os._exit(1)
