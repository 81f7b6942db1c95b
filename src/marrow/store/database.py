"""The catalog's connection: SQLite in the store by default, PostgreSQL by URL.

SQLite runs in WAL mode (readers and one writer do not block each other), with synchronous=FULL
(a committed row survives a power cut) and a busy timeout. Writers begin IMMEDIATE, so two
processes queue for the write lock instead of failing when they upgrade a read. On PostgreSQL
registry writes take one advisory lock, which gives the same order.

The database's own errors leave this file as errors of `core/errors.py`.
"""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from marrow.core.errors import DiskFull, MarrowError, NotPermitted, StoreError, UsageError
from marrow.store import tables
from marrow.store.lock import FileLock

BUSY_TIMEOUT_S = 60.0
_ADVISORY_LOCK = 0x4D415252  # "MARR": the registry's lock among all of PostgreSQL's advisory locks
_BEGIN = {"sqlite_begin": "BEGIN IMMEDIATE"}


class Database:
    """An open catalog database, its schema there and of a version that this code knows.

    Args: url: None for SQLite at `home`/catalog.sqlite; else a PostgreSQL or SQLite URL. read_only:
        SQLite's files may not be written, nor any beside them.
    Raises: UsageError for a URL that is none; StoreError if it cannot be opened or is too new.
    """

    def __init__(self, home: Path, url: str | None = None, *, read_only: bool = False) -> None:
        self.url = _parse(home, url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        try:
            self._engine = _engine(self.url, read_only=read_only)
        except ImportError as error:
            raise UsageError(
                f"cannot open {self.url}: {error}", hint="install the driver: pip install marrow[postgres]"
            ) from error
        try:
            self._prepare(home / "locks" / "catalog.lock")
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads: one snapshot for all its queries on SQLite."""
        with self._explained(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, *, alone: bool = True) -> Iterator[Connection]:
        """Open a transaction that is durable once the block ends, and undone if it raises.

        With `alone` no other such writer runs meanwhile, on any machine; without it (appending
        points) PostgreSQL lets writers run side by side. SQLite always has one writer.
        """
        with self._explained(), self._engine.connect() as connection:
            connection = connection.execution_options(**_BEGIN)
            with connection.begin():
                if alone and not self.is_sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                yield connection

    def close(self) -> None:
        """Close all connections; closing twice is fine."""
        self._engine.dispose()

    def _prepare(self, lock_path: Path) -> None:
        """Make the schema if it is not there, bring an older one up to date, refuse a newer one."""
        version = self._version()
        if version is None:
            # Switching a new file to WAL does not honour the busy timeout, hence a lock.
            with FileLock(lock_path, doing="making the catalog"):
                if self.is_sqlite:
                    self._enable_wal()
                with self.write() as connection:
                    if not inspect(connection).has_table(tables.schema.name):
                        tables.metadata.create_all(connection)
                        connection.execute(insert(tables.schema).values(version=tables.SCHEMA_VERSION))
            version = self._version()
        if version is not None and version < tables.SCHEMA_VERSION:
            # So far every version only added tables. One transaction: killed in it, nothing happened.
            with FileLock(lock_path, doing="upgrading the catalog"), self.write() as connection:
                tables.metadata.create_all(connection)
                connection.execute(update(tables.schema).values(version=tables.SCHEMA_VERSION))
            version = self._version()
        if version != tables.SCHEMA_VERSION:
            raise StoreError(
                f"the catalog at {self.url} has schema version {version}, "
                f"this Marrow knows up to {tables.SCHEMA_VERSION}",
                hint="upgrade Marrow, or set MARROW_HOME to another folder",
            )

    def _version(self) -> int | None:
        with self.read() as connection:
            if not inspect(connection).has_table(tables.schema.name):
                return None
            return int(connection.execute(select(tables.schema.c.version)).scalar_one())

    def _enable_wal(self) -> None:
        # On the driver's own connection: the mode cannot change inside a transaction.
        connection = self._engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA journal_mode=WAL")
        except sqlite3.Error as error:
            raise _explain(error, self.url) from error
        finally:
            connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise _explain(error.orig, self.url) from error
        except PoolTimeout as error:
            raise StoreError(f"the catalog at {self.url} has no connection left: {error}") from error


def _parse(home: Path, url: str | None) -> URL:
    if url is None:
        return URL.create("sqlite", database=str(home / "catalog.sqlite"))
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        raise UsageError(f"{url!r} is not a database URL", hint=_URL_HINT) from None
    if backend in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        return parsed.set(drivername="sqlite")
    raise UsageError(f"the catalog cannot be kept in {backend!r}", hint=_URL_HINT)


_URL_HINT = "MARROW_CATALOG is unset (SQLite in the store), or as in postgresql://user@host/database"


def _engine(url: URL, *, read_only: bool) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if read_only and url.database:
        engine = create_engine(url, creator=partial(_connect_to_read, Path(url.database)))
    else:
        engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself; _begin does
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))

    return engine


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Connect to a catalog beside which nothing can be written.

    SQLite in WAL mode makes files beside the database even to read, unless it is told that nobody
    writes. That may only be said where no log is left: what stands in a log would not be seen.
    """
    log = path.with_name(f"{path.name}-wal")
    options = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    address = f"{path.absolute().as_uri()}?{options}"
    return sqlite3.connect(address, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)


_SQLITE_ERRORS: dict[int, tuple[type[MarrowError], str, str]] = {
    sqlite3.SQLITE_FULL: (
        DiskFull,
        "no space left for",
        "free some space, or set MARROW_HOME to a folder on a larger disk",
    ),
    sqlite3.SQLITE_READONLY: (
        NotPermitted,
        "no permission to write",
        "make it writable, or set MARROW_HOME to a folder that you own",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        NotPermitted,
        "cannot open",
        "make its folder writable, or set MARROW_HOME to a folder that you own",
    ),
    sqlite3.SQLITE_BUSY: (
        StoreError,
        f"another process has kept busy for {BUSY_TIMEOUT_S:.0f} s",
        "wait for the other run to end, then run the same command again",
    ),
    sqlite3.SQLITE_CORRUPT: (StoreError, "damaged:", "restore it from a backup, or use a new MARROW_HOME"),
    sqlite3.SQLITE_NOTADB: (StoreError, "not a database:", "move the file away, or use a new MARROW_HOME"),
}
_POSTGRES_ERRORS: dict[str, tuple[type[MarrowError], str, str]] = {
    "53100": (DiskFull, "no space left for", "free some space on the database server"),
    "42501": (NotPermitted, "no permission to write", "ask for CREATE and INSERT rights on the database"),
}


def _explain(error: BaseException | None, url: URL) -> MarrowError:
    """Say what a driver's error means for the user."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits only say where
    if code == sqlite3.SQLITE_IOERR and _is_full(url):
        code = sqlite3.SQLITE_FULL
    found = _SQLITE_ERRORS.get(code) or _POSTGRES_ERRORS.get(getattr(error, "sqlstate", None) or "")
    reason = str(error).strip()
    if found is not None:
        kind, what, hint = found
        return kind(f"{what} the catalog at {url}: {reason}", hint=hint)
    if url.get_backend_name() != "sqlite":
        hint = "is the database server running? unset MARROW_CATALOG to use SQLite in the store"
        return StoreError(f"the catalog at {url} failed: {reason}", hint=hint)
    return StoreError(f"the catalog at {url} failed: {reason}")


def _is_full(url: URL) -> bool:
    """Tell whether a disk error is for lack of space: SQLite cannot grow its shared memory then."""
    folder = Path(url.database or ".").parent
    return folder.is_dir() and shutil.disk_usage(folder).free < 1 << 16
