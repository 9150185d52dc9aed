"""The journal: everything that is acknowledged and not yet in the bucket, in one SQLite file (WAL).

A row of `node` is an inode that differs from the bucket: what it should be (`key`, attributes; key NULL = deleted)
and which object version it is now (`remote_*`, NULL = none). `layer` and `staged` say which bytes of a regular file
are in which staging file. State, not history: replaying means bringing each row to the bucket, in any order that
`syncer` allows. Statements commit at once; a process crash loses none (WAL pages are in the page cache), a power
failure may lose the last ones unless `sync` returned.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from s3fuse.errors import UserError
from s3fuse.writing.extents import Extents
from s3fuse.writing.layers import Layer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

FORMAT = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (format INTEGER NOT NULL, store TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS node (
    number INTEGER PRIMARY KEY, key TEXT, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, rdev INTEGER NOT NULL,
    xattrs TEXT NOT NULL, target BLOB, size INTEGER NOT NULL,
    remote_key TEXT, remote_etag TEXT, remote_size INTEGER, remote_metadata TEXT, remote_headers TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS layer (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, size INTEGER NOT NULL, below INTEGER NOT NULL,
    token TEXT NOT NULL, PRIMARY KEY (number, generation)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS staged (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS staged_of ON staged (number, generation);
"""


class NodeRow(NamedTuple):
    """One row of `node`; the order of fields is the order of columns."""

    number: int
    key: str | None
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int
    xattrs: str
    target: bytes | None
    size: int
    remote_key: str | None
    remote_etag: str | None
    remote_size: int | None
    remote_metadata: str | None
    remote_headers: str | None


def encode_map(values: Mapping[str, str] | None) -> str | None:
    return None if values is None else json.dumps(dict(values)) if values else "{}"


def decode_map(text: str | None) -> dict[str, str] | None:
    return None if text is None else {str(k): str(v) for k, v in json.loads(text).items()}


def encode_xattrs(xattrs: Mapping[str, bytes]) -> str:
    return json.dumps({name: value.hex() for name, value in xattrs.items()}) if xattrs else "{}"


def decode_xattrs(text: str) -> dict[str, bytes]:
    return {str(name): bytes.fromhex(value) for name, value in json.loads(text).items()}


class Journal:
    """The journal of one cache directory, locked against a second process while open."""

    def __init__(self, directory: Path, store: str) -> None:
        """Opens or makes it for the bucket that `store` names.

        Raises UserError where another process has it, it belongs to another bucket, or its format is unknown.
        """
        self.directory = directory
        self._lock = self._take_lock(directory)
        try:
            self._db = sqlite3.connect(directory / "journal.sqlite", isolation_level=None, cached_statements=64)
            self._prepare(directory, store)
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            raise UserError(
                f"the journal in {directory} cannot be read ({error}); move that directory aside to start with an "
                "empty cache, and keep it: files waiting for upload are in its folder staging/"
            ) from error
        except BaseException:
            os.close(self._lock)
            raise

    @staticmethod
    def _take_lock(directory: Path) -> int:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(
                f"cache directory {directory} cannot be used: {error.strerror}; choose another with --cache-dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"cache directory {directory} is in use by another mount; unmount that one or choose another "
                "with --cache-dir"
            ) from None
        return lock

    def _prepare(self, directory: Path, store: str) -> None:
        execute = self._db.execute
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        execute("PRAGMA wal_autocheckpoint=4000")
        self._db.executescript(SCHEMA)
        found = execute("SELECT format, store FROM identity").fetchone()
        if found is None:
            execute("INSERT INTO identity VALUES (?, ?)", (FORMAT, store))
        elif found[0] != FORMAT:
            raise UserError(
                f"cache directory {directory} has journal format {found[0]}, this s3fuse knows {FORMAT}; mount it "
                "with the version that wrote it until everything is uploaded, or choose another with --cache-dir"
            )
        elif found[1] != store:
            raise UserError(
                f"cache directory {directory} belongs to {found[1]}, not to {store}; choose another with --cache-dir"
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside become visible together or not at all. No awaits inside."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def put_node(self, row: NodeRow) -> None:
        self._db.execute("INSERT OR REPLACE INTO node VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", row)

    def drop_node(self, number: int) -> None:
        self._db.execute("DELETE FROM node WHERE number=?", (number,))

    def put_layer(self, number: int, layer: Layer, token: str) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO layer VALUES (?,?,?,?,?)",
            (number, layer.generation, layer.size_bytes, layer.below_bytes, token),
        )

    def resize_layer(self, number: int, layer: Layer) -> None:
        """Records a truncation: size, what shows from below, and the extents that are left."""
        whose = (number, layer.generation)
        with self.transaction():
            self._db.execute(
                "UPDATE layer SET size=?, below=? WHERE number=? AND generation=?",
                (layer.size_bytes, layer.below_bytes, *whose),
            )
            self._db.execute("DELETE FROM staged WHERE number=? AND generation=?", whose)
            self._db.executemany("INSERT INTO staged VALUES (?,?,?,?)", [(*whose, *extent) for extent in layer.extents])

    def add_staged(self, number: int, generation: int, start: int, stop: int) -> int:
        """Records bytes [start, stop) as staged; gives a row id that `extend_staged` takes."""
        cursor = self._db.execute("INSERT INTO staged VALUES (?,?,?,?)", (number, generation, start, stop))
        return cursor.lastrowid or 0

    def extend_staged(self, row_id: int, stop: int) -> None:
        self._db.execute("UPDATE staged SET stop=? WHERE rowid=?", (stop, row_id))

    def drop_layer(self, number: int, generation: int) -> None:
        self._db.execute("DELETE FROM layer WHERE number=? AND generation=?", (number, generation))
        self._db.execute("DELETE FROM staged WHERE number=? AND generation=?", (number, generation))

    def drop_layers_without_node(self) -> None:
        """Forgets what was staged for files that were unlinked while open: it ended with the process."""
        for table in ("layer", "staged"):
            self._db.execute(f"DELETE FROM {table} WHERE number NOT IN (SELECT number FROM node)")

    def nodes(self) -> list[NodeRow]:
        """Every row; parents come before what is in them."""
        return [NodeRow(*row) for row in self._db.execute("SELECT * FROM node ORDER BY key")]

    def layers(self, number: int) -> list[tuple[Layer, str]]:
        """The layers of one file, oldest first, each with its token."""
        rows = self._db.execute(
            "SELECT generation, size, below, token FROM layer WHERE number=? ORDER BY generation", (number,)
        ).fetchall()
        found = []
        for generation, size, below, token in rows:
            extents = Extents(
                self._db.execute("SELECT start, stop FROM staged WHERE number=? AND generation=?", (number, generation))
            )
            found.append((Layer(generation, extents, below, max(size, extents.end)), token))
        return found

    def sync(self) -> None:
        """Returns when everything recorded so far is on the disk (blocks; call it in a thread).

        The WAL holds every commit since the last checkpoint, and a checkpoint syncs what it moves.
        """
        wal = os.open(self.directory / "journal.sqlite-wal", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(wal)
        finally:
            os.close(wal)

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)
