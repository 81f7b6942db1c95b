"""The catalog's tables. The same on SQLite and PostgreSQL; JSON is kept as canonical text.

    artifacts --< files                 what an artifact consists of, by blob
    artifacts --< edges >-- artifacts   child used parent as role
    artifacts --< names                 name@version -> artifact
    artifacts --< refs                  branches and tags of datasets: where they stand
    artifacts --< absent                dataset versions whose files are not kept here
    runs --< run_steps                  what a run did, in order
    runs --< points                     metric values over steps

`seq` counts in order of insertion, which clocks do not promise.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
)

SCHEMA_VERSION = 2
"""2 added refs and absent; a catalog of version 1 gets them when it is opened."""

metadata = MetaData()

schema = Table("marrow_schema", metadata, Column("version", Integer, nullable=False))

artifacts = Table(
    "artifacts",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False, index=True),
    Column("facts", Text, nullable=False),
    Column("code_version", Text, nullable=False),
    Column("recipe_hash", Text, nullable=False),
    Column("environment", Text, nullable=False),
    Column("created_s", Float(53), nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("artifact_id", Text, ForeignKey("artifacts.id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("sha256", Text, nullable=False, index=True),
    Column("xxh3", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

edges = Table(
    "edges",
    metadata,
    Column("child_id", Text, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("role", Text, nullable=False),
    Column("parent_id", Text, ForeignKey("artifacts.id"), nullable=False, index=True),
    Column("detail", Text, nullable=False),
    sqlite_with_rowid=False,
)

names = Table(
    "names",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("artifact_id", Text, ForeignKey("artifacts.id"), nullable=False, index=True),
    Column("created_s", Float(53), nullable=False),
    sqlite_with_rowid=False,
)

# A branch moves by compare-and-swap on artifact_id, its new version of `names` in the same transaction.
refs = Table(
    "refs",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("artifact_id", Text, ForeignKey("artifacts.id"), nullable=False, index=True),
    Column("updated_s", Float(53), nullable=False),
    sqlite_with_rowid=False,
)

absent = Table(
    "absent",
    metadata,
    Column("artifact_id", Text, ForeignKey("artifacts.id"), primary_key=True),
    Column("since_s", Float(53), nullable=False),
    sqlite_with_rowid=False,
)

runs = Table(
    "runs",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("recipe", Text, nullable=False, index=True),
    Column("recipe_hash", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("started_s", Float(53), nullable=False),
    Column("ended_s", Float(53)),
)

run_steps = Table(
    "run_steps",
    metadata,
    Column("run_id", Text, ForeignKey("runs.id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("artifact_id", Text, ForeignKey("artifacts.id"), index=True),
    Column("wall_s", Float(53), nullable=False),
    sqlite_with_rowid=False,
)

# The key makes a repeated step (training resumed from a checkpoint) replace its point, and keeps
# each curve together on disk, in order.
points = Table(
    "points",
    metadata,
    Column("run_id", Text, ForeignKey("runs.id"), primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("value", Float(53)),  # NULL is NaN: SQLite has no NaN
    Column("time_s", Float(53), nullable=False),
    sqlite_with_rowid=False,
)

Index("artifacts_by_kind", artifacts.c.kind, artifacts.c.seq)
