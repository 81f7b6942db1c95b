"""Fixtures that several folders share: a real headless browser, driven over the DevTools protocol.

`browser` gives each test a fresh private tab (own cookies, own cache) of one Chromium per test
process. It reaches this host only: every other name fails to resolve, and each request, console
error and uncaught exception of the tab is kept for the test to judge.
"""

import base64
import contextlib
import gc
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from object_server import CREDENTIALS, DIRECT, FaultProxy, S3Server

# Tests start hundreds of Python processes, and each compiles this package anew (0.2 s to 1 s) where
# the environment forbids bytecode files; they go to the usual __pycache__ folders.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline for an example: on a loaded machine any may take a second. `make test` tries all the
# examples that a property asks for; `make check` asks for the quick profile, at most so many of each.
settings.register_profile("marrow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", parent=settings.get_profile("marrow"), max_examples=10)
settings.load_profile("marrow")

# Before any operator is imported, while tests are collected: without a GPU Triton's kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

OWN_SETTINGS = "_hypothesis_internal_use_settings"


# Fixtures that cost 4 to 7 CPU-seconds: a whole run, the interpreter's documentation as rows, a browser.
COSTLY = {"finished", "stdlib_rows", "chromium"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs a costly fixture as slow, and cut properties to the examples of the profile."""
    is_quick = config.getoption("--hypothesis-profile") == "quick"
    most = settings.get_profile("quick").max_examples
    for item in items:
        if COSTLY & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        function = getattr(item, "obj", None)
        own = getattr(function, OWN_SETTINGS, None)  # of @settings; the profile gives those without
        if is_quick and own is not None and own.max_examples > most:
            setattr(function, OWN_SETTINGS, settings(own, max_examples=most))


# PERF: what is imported stays. Without a collector at work meanwhile, test files are collected in
# 5.4 CPU-seconds for 6.4; frozen, it makes a test's own gc.collect() cost 3 ms for 150.
gc.disable()


def pytest_collection_finish() -> None:
    """Begin to collect garbage, all that is there by now left out; interpret Triton in this process alone."""
    gc.freeze()
    gc.enable()
    # Processes that tests start are as a user's, and load no Triton.
    if os.environ.pop("TRITON_INTERPRET", None) and "triton" in sys.modules:
        sys.modules["triton"].knobs.runtime.interpret = True


def pytest_sessionfinish() -> None:
    """Let the collector see all again: at the end some libraries count what was left."""
    gc.unfreeze()


CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-default-browser-check",
    "--no-first-run",
    "--password-store=basic",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)
KEYS = {  # key -> (code, Windows virtual key code, text)
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Backspace": ("Backspace", 8, ""),
    "Delete": ("Delete", 46, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    " ": ("Space", 32, " "),
}
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}


class DevTools:
    """One WebSocket to a Chromium: commands in, answers and events out."""

    def __init__(self, url: str) -> None:
        import websocket

        # Chromium refuses a client that names an origin, as this library does by itself.
        self._socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            if "method" in answer:
                self.events.append(answer)

    def close(self) -> None:
        self._socket.close()


class Browser:
    """A tab. `errors` holds what the console and the page complained of, `requests` every URL asked for."""

    def __init__(self, tools: DevTools) -> None:
        self._tools = tools
        self._context = tools.call("Target.createBrowserContext")["browserContextId"]
        target = tools.call("Target.createTarget", url="about:blank", browserContextId=self._context)
        self._session = tools.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
            "sessionId"
        ]
        self._errors: list[str] = []
        self._requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(1280, 800)

    @property
    def errors(self) -> list[str]:
        """Console errors, uncaught exceptions and failed loads so far."""
        self.evaluate("new Promise(done => setTimeout(done, 0))")
        return self._errors

    @property
    def requests(self) -> list[str]:
        """URLs that the tab asked for so far, the page's own included; data: URLs left out."""
        self.evaluate("0")
        return self._requests

    def open(self, target: str | Path, *, timeout_s: float = 30) -> None:
        """Go to a URL or a local file and wait until its load event is over."""
        url = target.resolve().as_uri() if isinstance(target, Path) else target
        if "://" not in url and not url.startswith(("data:", "about:")):
            url = Path(url).resolve().as_uri()
        answer = self._call("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer.get('errorText')}"
        self.wait_for("document.readyState === 'complete'", timeout_s=timeout_s)

    def evaluate(self, expression: str) -> Any:
        """Run JavaScript in the page, await it if it is a promise, and return its value."""
        answer = self._call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if problem := answer.get("exceptionDetails"):
            raise AssertionError(problem.get("exception", {}).get("description") or problem["text"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, *, timeout_s: float = 10) -> Any:
        """Wait until the JavaScript expression is truthy; return its value."""
        until = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < until, f"not true within {timeout_s:g} s: {expression}"
            time.sleep(0.02)
        return value

    def press(self, key: str) -> None:
        """Press and release a key, as in "Enter", "a", "Shift+Tab", "Control+Enter"."""
        *held, name = key.split("+") if len(key) > 1 else [key]
        modifiers = sum(MODIFIERS[modifier] for modifier in held)
        code, number, text = KEYS.get(name, (f"Key{name.upper()}", ord(name[0].upper()), name))
        event = {"key": name, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        typed = {"text": text} if text and not modifiers & ~MODIFIERS["Shift"] else {}
        self._call("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **event, **typed)
        self._call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self._call("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, dark: bool = False, media: str = "screen") -> None:
        """Set the viewport in CSS pixels, the colour scheme and the medium ("screen" or "print")."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(
        self, path: Path | str, width: int, height: int, dark: bool = False, *, full: bool = False
    ) -> Path:
        """Write a PNG of the viewport, or of the `full` page, at this size."""
        self.resize(width, height, dark=dark)
        image = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        Path(path).write_bytes(base64.b64decode(image["data"]))
        return Path(path)

    def close(self) -> None:
        self._tools.call("Target.disposeBrowserContext", browserContextId=self._context)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        answer = self._tools.call(method, self._session, **params)
        for event in self._tools.events:
            if event.get("sessionId") == self._session:
                self._note(event["method"], event["params"])
        self._tools.events.clear()
        return answer

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self._errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self._errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self._errors.append(f"{entry['text']} {entry.get('url', '')}".strip())
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self._requests.append(params["request"]["url"])


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevTools]:
    """Start one Chromium for this test process; skip where it, or the WebSocket client, is missing."""
    pytest.importorskip("websocket", reason="needs the websocket-client package (a test extra)")
    program = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if program is None:
        pytest.skip("needs chromium: no chromium or google-chrome in PATH")
    profile = tmp_path_factory.mktemp("chromium")
    process = subprocess.Popen(
        [program, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(profile)},
        start_new_session=True,  # its helper processes end with it
    )
    tools: DevTools | None = None
    try:
        tools = DevTools(_devtools_url(process, profile / "DevToolsActivePort"))
        yield tools
    finally:
        with contextlib.ExitStack() as last:
            last.callback(_end, process)
            if tools is not None:
                last.callback(tools.close)
                tools.call("Browser.close")
        shutil.rmtree(profile, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait a little for Chromium to leave by itself, then end all of its process group."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _devtools_url(process: subprocess.Popen[bytes], port_file: Path, *, timeout_s: float = 30) -> str:
    """Wait for Chromium to write the port it chose; two lines: port, path."""
    until = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None, f"chromium ended at once with exit code {process.returncode}"
        assert time.monotonic() < until, f"chromium opened no port within {timeout_s:g} s"
        lines = port_file.read_text().split("\n") if port_file.exists() else []
        if len(lines) >= 2 and lines[1]:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.02)


@pytest.fixture
def browser(chromium: DevTools) -> Iterator[Browser]:
    """Give a fresh tab, and take it away afterwards."""
    tab = Browser(chromium)
    try:
        yield tab
    finally:
        tab.close()


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_stay_together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let what a killed process leaves lie in pytest's own folder, which pytest clears, not in /tmp."""
    folder = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        if len(str(folder)) < 64:  # sockets lie in it, and their paths must be short
            compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)))
            patch.setenv("TMPDIR", str(folder))
            patch.setattr(tempfile, "tempdir", str(folder))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all test processes of one call of pytest share: what is costly is made there once."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount disks of a given size, as in small_disk("256k"); they are unmounted whatever happens."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("needs root on Linux to mount a small tmpfs")
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "marrow-test", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    try:
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Start one real S3 server for this test process."""
    server = S3Server()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set credentials that mean nothing; `setenv("AWS_ENDPOINT_URL", ...)` says where S3 is."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**CREDENTIALS, **DIRECT}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def bucket(s3_server: S3Server, s3_environment: pytest.MonkeyPatch) -> str:
    """Give an empty bucket of the real S3 server as s3://..., reached through AWS_ENDPOINT_URL."""
    s3_environment.setenv("AWS_ENDPOINT_URL", s3_server.url)
    return s3_server.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def fault_proxy(s3_server: S3Server, bucket: str, s3_environment: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Put a proxy that can break things between `bucket` and whoever opens it from now on."""
    with FaultProxy(s3_server.url) as proxy:
        s3_environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy
