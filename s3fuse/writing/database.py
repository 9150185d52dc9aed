"""The journal's database: its tables, opening it, and the lock that keeps others from it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from s3fuse.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 5
SCHEMA = """
CREATE TABLE IF NOT EXISTS node (
    number INTEGER PRIMARY KEY, key TEXT, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, rdev INTEGER NOT NULL,
    xattrs TEXT NOT NULL, target BLOB, size INTEGER NOT NULL, token TEXT NOT NULL,
    remote_key TEXT, remote_etag TEXT, remote_size INTEGER, remote_metadata TEXT, remote_headers TEXT,
    maybe_at TEXT, row_crc INTEGER, seal INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS layer (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, size INTEGER NOT NULL, below INTEGER NOT NULL,
    token TEXT NOT NULL, slot INTEGER, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    crc INTEGER NOT NULL, synced INTEGER NOT NULL, row_crc INTEGER, PRIMARY KEY (number, generation)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segment (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    crc INTEGER NOT NULL, synced INTEGER NOT NULL, PRIMARY KEY (number, generation, start)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS poisoned (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (number, generation, start)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS upload (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, upload_id TEXT, begun_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS overlay (number INTEGER PRIMARY KEY, below INTEGER NOT NULL, row_crc INTEGER) STRICT;
CREATE TABLE IF NOT EXISTS parked (
    number INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    key TEXT NOT NULL, etag TEXT NOT NULL, size INTEGER NOT NULL, shift INTEGER NOT NULL,
    PRIMARY KEY (number, start)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS temporary (key TEXT PRIMARY KEY, number INTEGER NOT NULL, token TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS late (
    key TEXT NOT NULL, request INTEGER NOT NULL, until REAL NOT NULL, PRIMARY KEY (key, request)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refusal (number INTEGER PRIMARY KEY, reason TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS step (id INTEGER PRIMARY KEY, done INTEGER NOT NULL) STRICT;
"""

_IDENTITY = "CREATE TABLE IF NOT EXISTS identity (format INTEGER NOT NULL, store TEXT NOT NULL, boot TEXT);"

#: What makes a database of an earlier format one of the next.
_CHANGES = {
    2: (
        "ALTER TABLE layer ADD COLUMN synced INTEGER NOT NULL DEFAULT 0;"
        "ALTER TABLE segment ADD COLUMN synced INTEGER NOT NULL DEFAULT 0;"
        "ALTER TABLE identity ADD COLUMN boot TEXT;"
        "UPDATE identity SET format=3;"
    ),
    3: (
        # A size that a write gave: from now on the row has the one that the file has without what is staged.
        "UPDATE layer SET size=min(size, below) WHERE (start < size AND size <= stop) OR EXISTS (SELECT 1 FROM segment "
        "WHERE segment.number=layer.number AND segment.generation=layer.generation "
        "AND segment.start < layer.size AND layer.size <= segment.stop);"
        "UPDATE identity SET format=4;"
    ),
    4: (
        "ALTER TABLE node ADD COLUMN row_crc INTEGER;"
        "ALTER TABLE node ADD COLUMN seal INTEGER;"
        "ALTER TABLE layer ADD COLUMN row_crc INTEGER;"
        "ALTER TABLE overlay ADD COLUMN row_crc INTEGER;"
        "UPDATE identity SET format=5;"
    ),
}


def unreadable(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"the journal in {directory} cannot be read ({error}); move that directory aside to start with an empty cache, "
        "and keep it: files waiting for upload are in its folder staging/"
    )


def full_disk(directory: Path) -> UserError:
    return UserError(
        f"the disk of cache directory {directory} is full; free space there, or choose another with --cache-dir"
    )


def is_full(error: sqlite3.DatabaseError) -> bool:
    """Whether a full disk is the reason: SQLite has another error for what it maps, which is the index of the log."""
    code = getattr(error, "sqlite_errorcode", None)  # none where it is not SQLite that raises it
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def connect(path: Path, directory: Path, store: str) -> sqlite3.Connection:
    """Opens or makes the database of a cache directory for the bucket that `store` names.

    Raises UserError where it belongs to another bucket, its format is unknown, it cannot be read, or the disk is full.
    """
    try:
        db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        try:
            _prepare(db, directory, store)
        except BaseException:
            db.close()
            raise
    except sqlite3.DatabaseError as error:
        if is_full(error):
            raise full_disk(directory) from error
        raise unreadable(directory, error) from error
    except UnicodeDecodeError as error:  # a text in it, or one of SQLite's own about it, is damaged
        raise unreadable(directory, error) from error
    return db


def _prepare(db: sqlite3.Connection, directory: Path, store: str) -> None:
    execute = db.execute
    execute("PRAGMA journal_mode=WAL")
    execute("PRAGMA synchronous=NORMAL")
    execute("PRAGMA wal_autocheckpoint=0")  # it syncs, which takes too long for the event loop: Journal.checkpoint
    (state,) = execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise sqlite3.DatabaseError(state)
    execute(_IDENTITY)
    found = execute("SELECT format, store FROM identity").fetchone()
    if found is None:
        execute("INSERT INTO identity VALUES (?, ?, NULL)", (FORMAT, store))
    elif found[0] != FORMAT and found[0] not in _CHANGES:
        raise UserError(
            f"cache directory {directory} has journal format {found[0]}, this s3fuse knows {FORMAT}; mount it "
            "with the version that wrote it until everything is uploaded, or choose another with --cache-dir"
        )
    elif found[1] != store:
        raise UserError(
            f"cache directory {directory} belongs to {found[1]}, not to {store}; choose another with --cache-dir"
        )
    elif found[0] != FORMAT:
        changes = "".join(_CHANGES[step] for step in range(found[0], FORMAT))
        db.executescript(f"BEGIN IMMEDIATE;{changes}COMMIT;")
    db.executescript(SCHEMA)
    _check_tables(db)


def _check_tables(db: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError where a table or column has another name: a new table would hide its rows."""
    query = "SELECT m.name, c.name FROM sqlite_schema m, pragma_table_info(m.name) c WHERE m.type='table'"
    with closing(sqlite3.connect(":memory:")) as wanted:
        wanted.executescript(f"{_IDENTITY}{SCHEMA}")
        if set(db.execute(query)) != set(wanted.execute(query)):
            raise sqlite3.DatabaseError("its tables are not those of its format")
