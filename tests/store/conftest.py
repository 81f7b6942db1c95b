"""Fixtures of the store's tests: a store, both databases, second processes, small disks."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from marrow.core.hashes import hash_value
from marrow.core.records import Artifact, FileEntry, Parent
from marrow.store.database import Database
from marrow.store.store import Store, artifact_id


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARROW_HOME", raising=False)
    monkeypatch.delenv("MARROW_CATALOG", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open(home) as opened:
        yield opened


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with files of the given texts, as in fill(a="x") or fill(**{"b/c": "y"})."""

    def make(**texts: str) -> Path:
        folder = tmp_path / f"fill-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        for name, content in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def make_artifact() -> Callable[..., Artifact]:
    """Make an artifact record without a store; its files exist by name only."""

    def make(label: str, *parents: Artifact, kind: str = "shards", files: int = 1, **fields: Any) -> Artifact:
        key = hash_value(["key", label])
        edges = tuple(Parent(f"role-{i}", parent.id, {"part": i}) for i, parent in enumerate(parents))
        entries = tuple(
            FileEntry(f"sub/{i}", hash_value([label, i]), hash_value(i)[:32], 10 + i) for i in range(files)
        )
        values: dict[str, Any] = {
            "id": artifact_id(kind, key, edges, entries),
            "kind": kind,
            "key": key,
            "parents": edges,
            "files": entries,
            "facts": {"rows": 3, "share": 0.25, "nested": {"ü": [1, None, True]}},
            "code_version": "0.1.0",
            "recipe_hash": "r" * 64,
            "environment": {"python": "3.11"},
            "created_s": 1.5e9 + 0.25,
        }
        return Artifact(**(values | fields))

    return make


# Second processes


@dataclass
class Child:
    """A second Python that runs some code and talks in lines."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        """Return its next line; it must not end before."""
        assert self.process.stdout is not None
        got = self.process.stdout.readline()
        assert got, f"the child ended with {self.process.wait()}: {self.errors()}"
        return got.rstrip("\n")

    def go(self) -> None:
        """Send it an empty line."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self.process.kill()
        self.process.wait()

    def result(self) -> list[str]:
        """Wait for a good end; return its remaining lines."""
        out, errors = self.process.communicate(timeout=250)
        assert self.process.returncode == 0, errors
        return out.splitlines()

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Run code in a second Python process: spawn(code, *arguments)."""
    children: list[Child] = []

    def start(code: str, *arguments: object) -> Child:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )
        children.append(Child(process))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
        child.process.communicate()


# Databases


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server of our own on a Unix socket; give its URL."""
    initdb = _postgres_program("initdb")
    if initdb is None:
        pytest.skip("needs PostgreSQL: no initdb (Debian package postgresql)")
    pytest.importorskip("psycopg", reason="needs psycopg (the postgres extra)")
    folder = Path(tempfile.mkdtemp(prefix="marrow-pg-", dir="/tmp"))  # a socket's path must be short
    as_user: list[str] = []
    user = pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0:  # the server refuses to run as root
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv to start PostgreSQL as root")
        names = {entry.pw_name for entry in pwd.getpwall()}
        owner = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = owner.pw_name
        as_user = [
            "setpriv",
            f"--reuid={owner.pw_uid}",
            f"--regid={owner.pw_gid}",
            "--clear-groups",
        ]
    data, log = folder / "data", folder / "log"
    environment = {**os.environ, "LC_ALL": "C", "HOME": str(folder)}
    server = None
    try:
        subprocess.run(
            [*as_user, initdb, "-D", data, "-A", "trust", "-U", user, "--no-sync", "-E", "UTF8"],
            check=True,
            capture_output=True,
            cwd=folder,
            env=environment,
        )
        settings = {"listen_addresses": "", "unix_socket_directories": str(folder), "fsync": "off"}
        flags = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with log.open("wb") as output:
            server = subprocess.Popen(
                [*as_user, str(Path(initdb).with_name("postgres")), "-D", str(data), *flags],
                stdout=output,
                stderr=output,
                cwd=folder,
                env=environment,
            )
        url = f"postgresql://{user}@/postgres?host={folder}"
        _wait_for_postgres(url, server, log)
        yield url
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # fast shutdown
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _postgres_program(name: str) -> str | None:
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: path.parts[4])
    return str(places[-1]) if places else shutil.which(name)


def _wait_for_postgres(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    until = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, home: Path) -> str:
    """Give the URL of an empty catalog, once on SQLite and once on a real PostgreSQL."""
    if request.param == "sqlite":
        home.mkdir(exist_ok=True)
        return f"sqlite:///{home / 'catalog.sqlite'}"
    url: str = request.getfixturevalue("postgres")
    schema = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{schema}"


@pytest.fixture
def database(catalog_url: str, home: Path) -> Iterator[Database]:
    opened = Database(home, catalog_url)
    yield opened
    opened.close()


# Small disks


@pytest.fixture
def read_only() -> Callable[[Path], None]:
    """Remount a small disk read-only: permissions do not stop root, this does."""

    def remount(folder: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)

    return remount


# Datasets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a user's folder with small files in two folders and one too large for a pack."""
    made = tmp_path / "folder"
    (made / "part").mkdir(parents=True)
    for number in range(12):
        (made / "part" / f"{number:02d}.txt").write_text(f"text of {number}\n" * (number + 1))
    (made / "large.bin").write_bytes(bytes(range(256)) * 1024)
    (made / "empty").write_bytes(b"")
    return made


@pytest.fixture
def versions(store: Store) -> Any:
    from marrow.store.versions.versions import Versions

    return Versions(store)


@pytest.fixture
def wait_a_tick() -> Callable[[], None]:
    """Let the file system's clock move on, so that files written before are settled."""
    from marrow.store.versions.folder_walk import FINE_GRAIN_NS

    return lambda: time.sleep(1.5e-9 * FINE_GRAIN_NS)
