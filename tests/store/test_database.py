import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect, text, update

from marrow.core.errors import DiskFull, NotPermitted, StoreError, UsageError
from marrow.store import tables
from marrow.store.database import Database
from marrow.store.store import Store
from marrow.store.versions.versions import Versions

OPEN = """
import sys
from pathlib import Path
from marrow.store.database import Database
print("ready")
sys.stdin.readline()
Database(Path(sys.argv[1]), sys.argv[2]).close()
"""

ADD = """
import sys
from pathlib import Path
from sqlalchemy import text
from marrow.store.database import Database
database = Database(Path(sys.argv[1]), sys.argv[2])
for _ in range(50):
    with database.write() as connection:
        count = connection.execute(text("SELECT n FROM counter")).scalar_one()
        connection.execute(text("UPDATE counter SET n = :n"), {"n": count + 1})
database.close()
"""


def test_the_schema_is_made_once_and_found_again(home: Path, catalog_url: str) -> None:
    for _ in range(2):
        database = Database(home, catalog_url)
        with database.read() as connection:
            assert set(inspect(connection).get_table_names()) == set(tables.metadata.tables)
            versions = connection.execute(text("SELECT version FROM marrow_schema")).all()
        assert [tuple(row) for row in versions] == [(tables.SCHEMA_VERSION,)]
        database.close()
        database.close()


def test_sqlite_writes_ahead_and_survives_power_cuts(home: Path) -> None:
    home.mkdir()
    database = Database(home)
    with database.read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 60_000}
    database.close()


def test_an_error_inside_a_write_undoes_all_of_it(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            connection.execute(update(tables.schema).values(version=77))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.read() as connection:
        version = connection.execute(text("SELECT version FROM marrow_schema")).scalar_one()
        assert version == tables.SCHEMA_VERSION


def test_a_newer_schema_is_refused_with_a_hint(home: Path, database: Database, catalog_url: str) -> None:
    with database.write() as connection:
        connection.execute(update(tables.schema).values(version=tables.SCHEMA_VERSION + 1))
    with pytest.raises(StoreError, match="schema version 3, this Marrow knows up to 2") as caught:
        Database(home, catalog_url)
    assert caught.value.hint is not None and "upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "catalog_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_two_processes_make_one_schema(home: Path, catalog_url: str, spawn: Callable[..., Any]) -> None:
    children = [spawn(OPEN, home, catalog_url) for _ in range(2)]
    for child in children:
        assert child.line() == "ready"
    for child in children:
        child.go()
    for child in children:
        child.result()


@pytest.mark.slow
def test_writers_in_two_processes_lose_no_update(
    home: Path, catalog_url: str, database: Database, spawn: Callable[..., Any]
) -> None:
    with database.write() as connection:
        connection.execute(text("CREATE TABLE counter (n INTEGER)"))
        connection.execute(text("INSERT INTO counter VALUES (0)"))
    for child in [spawn(ADD, home, catalog_url) for _ in range(2)]:
        child.result()
    with database.read() as connection:
        assert connection.execute(text("SELECT n FROM counter")).scalar_one() == 100


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/x", "http://example", "://"])
def test_what_is_no_database_url_is_refused(home: Path, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Database(home, url)
    assert "MARROW_CATALOG" in str(caught.value)


def test_a_server_that_does_not_answer_is_said_without_the_password(home: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="the catalog at") as caught:
        Database(home, f"postgresql://me:secret@/none?host={home}")
    assert "secret" not in str(caught.value)
    assert "is the database server running?" in str(caught.value)


def test_a_file_that_is_no_database_is_said(home: Path) -> None:
    home.mkdir()
    (home / "catalog.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Database(home)


def test_a_torn_database_is_said(home: Path) -> None:
    home.mkdir()
    Database(home).close()
    path = home / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    data[100:5000] = b"\xff" * 4900
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        Database(home)


def test_a_full_disk_is_said_and_keeps_what_was_committed(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("1m")
    database = Database(disk)
    with database.write() as connection:
        connection.execute(text("CREATE TABLE filler (x TEXT)"))
        connection.execute(text("INSERT INTO filler VALUES ('first')"))

    def fill_it() -> None:
        with database.write() as connection:
            for _ in range(20):
                connection.execute(text("INSERT INTO filler VALUES (:x)"), {"x": "y" * 100_000})

    with pytest.raises(DiskFull) as caught:
        fill_it()
    assert "MARROW_HOME" in str(caught.value)
    with database.read() as connection:
        assert connection.execute(text("SELECT x FROM filler")).scalars().all() == ["first"]
    database.close()


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_without_one_free_byte_is_said(small_disk: Callable[[str], Path], existing: bool) -> None:
    disk = small_disk("1m")
    if existing:
        Database(disk).close()
    with (disk / "filler").open("ab", 0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
    with pytest.raises(DiskFull):
        Database(disk)


def test_a_catalog_that_cannot_be_written_is_said(
    small_disk: Callable[[str], Path], read_only: Callable[[Path], None]
) -> None:
    disk = small_disk("1m")
    Database(disk).close()
    read_only(disk)
    with pytest.raises(NotPermitted):
        Database(disk)


def test_readers_are_not_stopped_by_a_writer(home: Path) -> None:
    home.mkdir()
    database = Database(home)
    other = sqlite3.connect(home / "catalog.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE marrow_schema SET version = 9")
    with database.read() as connection:
        version = connection.execute(text("SELECT version FROM marrow_schema")).scalar_one()
        assert version == tables.SCHEMA_VERSION
    other.execute("ROLLBACK")
    other.close()
    database.close()


def make_old(url: str) -> None:
    """Turn a catalog into one of schema version 1, which had neither of the two tables."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        for table in ("absent", "refs"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("UPDATE marrow_schema SET version = 1"))
    engine.dispose()


def test_a_catalog_of_version_1_opens_and_keeps_its_artifacts(
    home: Path, catalog_url: str, fill: Callable[..., Path]
) -> None:
    with Store.open(home, catalog=catalog_url) as store:
        kept = store.publish("export", "k" * 64, fill(a="kept"), facts={"rows": 3})
        store.name(kept, "model")
    make_old(catalog_url)
    with Store.open(home, catalog=catalog_url) as store:
        assert store.resolve("model@1") == kept
        assert store.view(kept).joinpath("a").read_text() == "kept"
        assert store.refs.all() == []
        assert Versions(store).commit(fill(b="new"), "d").version.label == "d@1"
        assert store.verify(kept) == ()


@pytest.mark.parametrize(
    "catalog_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_two_processes_upgrade_one_catalog(home: Path, catalog_url: str, spawn: Callable[..., Any]) -> None:
    Database(home, catalog_url).close()
    make_old(catalog_url)
    children = [spawn(OPEN, home, catalog_url) for _ in range(2)]
    for child in children:
        assert child.line() == "ready"
    for child in children:
        child.go()
    for child in children:
        child.result()
    database = Database(home, catalog_url)
    with database.read() as connection:
        assert set(inspect(connection).get_table_names()) == set(tables.metadata.tables)
    database.close()
