"""The journal: everything that is acknowledged and not yet in the bucket, in one SQLite file (WAL).

A row of `node` is an inode that differs from the bucket: what it should be (`key`, attributes; key NULL = deleted)
and which object version it is now (`remote_*`, NULL = none). `layer` says which bytes of a regular file are staged,
and in which slot or file; ranges beyond the first one are in `staged`. State, not history: replaying means bringing
each row to the bucket, in any order that `syncer` allows. Statements commit at once; a process crash loses none (WAL
pages are in the page cache), a power failure may lose the last ones unless `sync` returned.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from contextlib import closing, contextmanager
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
    xattrs TEXT NOT NULL, target BLOB, size INTEGER NOT NULL, token TEXT NOT NULL,
    remote_key TEXT, remote_etag TEXT, remote_size INTEGER, remote_metadata TEXT, remote_headers TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS layer (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, size INTEGER NOT NULL, below INTEGER NOT NULL,
    token TEXT NOT NULL, slot INTEGER, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    PRIMARY KEY (number, generation)
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
    token: str
    remote_key: str | None
    remote_etag: str | None
    remote_size: int | None
    remote_metadata: str | None
    remote_headers: str | None


class StagedLayer(NamedTuple):
    """A layer, the token of its upload, and its slot in the slab (None: it has a staging file of its own)."""

    layer: Layer
    token: str
    slot: int | None


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
        execute("PRAGMA wal_autocheckpoint=0")  # it syncs, which takes too long for the event loop; see `checkpoint`
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
        self._db.execute("INSERT OR REPLACE INTO node VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", row)

    def drop_node(self, number: int) -> None:
        self._db.execute("DELETE FROM node WHERE number=?", (number,))

    def put_layer(self, staged: StagedLayer, number: int, start: int, stop: int) -> None:
        """Records a new layer whose one staged range is [start, stop)."""
        layer = staged.layer
        self._db.execute(
            "INSERT OR REPLACE INTO layer VALUES (?,?,?,?,?,?,?,?)",
            (number, layer.generation, layer.size_bytes, layer.below_bytes, staged.token, staged.slot, start, stop),
        )

    def replace_layer(self, staged: StagedLayer, number: int) -> None:
        """Records a layer with all its ranges, whatever was known of it."""
        whose = (number, staged.layer.generation)
        ranges = list(staged.layer.extents)
        first = ranges[0] if ranges else (0, 0)
        with self.transaction():
            self.put_layer(staged, number, *first)
            self._db.execute("DELETE FROM staged WHERE number=? AND generation=?", whose)
            self._db.executemany("INSERT INTO staged VALUES (?,?,?,?)", [(*whose, *extent) for extent in ranges[1:]])

    def add_staged(self, number: int, generation: int, start: int, stop: int) -> int:
        """Records a further range [start, stop) of a layer; gives a row id for `extend`."""
        cursor = self._db.execute("INSERT INTO staged VALUES (?,?,?,?)", (number, generation, start, stop))
        return cursor.lastrowid or 0

    def extend(self, number: int, generation: int, row_id: int, stop: int) -> None:
        """A range now ends at `stop`: that of row `row_id` of `staged`, or for 0 the layer's own."""
        if row_id:
            self._db.execute("UPDATE staged SET stop=? WHERE rowid=?", (stop, row_id))
        else:
            self._db.execute("UPDATE layer SET stop=? WHERE number=? AND generation=?", (stop, number, generation))

    def drop_layer(self, number: int, generation: int) -> None:
        self._db.execute("DELETE FROM layer WHERE number=? AND generation=?", (number, generation))
        self._db.execute("DELETE FROM staged WHERE number=? AND generation=?", (number, generation))

    def nodes(self) -> list[NodeRow]:
        """Every row; parents come before what is in them."""
        return [NodeRow(*row) for row in self._db.execute("SELECT * FROM node ORDER BY key")]

    def layers(self) -> dict[int, list[StagedLayer]]:
        """The layers of every file, oldest first, by inode number."""
        ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, generation, start, stop in self._db.execute("SELECT number, generation, start, stop FROM staged"):
            ranges.setdefault((number, generation), []).append((start, stop))
        found: dict[int, list[StagedLayer]] = {}
        for number, generation, size, below, token, slot, start, stop in self._db.execute(
            "SELECT * FROM layer ORDER BY number, generation"
        ):
            first = [(start, stop)] if start < stop else []
            extents = Extents(first + ranges.get((number, generation), []))
            layer = Layer(generation, extents, below, max(size, extents.end))
            found.setdefault(number, []).append(StagedLayer(layer, token, slot))
        return found

    def drop_layers_without_node(self) -> None:
        """Forgets what was staged for files that were unlinked while open: it ended with the process."""
        for table in ("layer", "staged"):
            self._db.execute(f"DELETE FROM {table} WHERE number NOT IN (SELECT number FROM node)")

    def checkpoint(self) -> None:
        """Moves what the WAL holds into the database and syncs it (blocks; call it in a thread)."""
        with closing(sqlite3.connect(self.directory / "journal.sqlite")) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    @property
    def wal_bytes(self) -> int:
        """How long the WAL is now."""
        return (self.directory / "journal.sqlite-wal").stat().st_size

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
