"""Journals as earlier versions wrote them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING
from zlib import crc32

from s3fuse.writing import wal

if TYPE_CHECKING:
    from pathlib import Path

FORMAT_3 = """
CREATE TABLE identity (format INTEGER NOT NULL, store TEXT NOT NULL, boot TEXT);
CREATE TABLE node (
    number INTEGER PRIMARY KEY, key TEXT, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, rdev INTEGER NOT NULL,
    xattrs TEXT NOT NULL, target BLOB, size INTEGER NOT NULL, token TEXT NOT NULL,
    remote_key TEXT, remote_etag TEXT, remote_size INTEGER, remote_metadata TEXT, remote_headers TEXT,
    maybe_at TEXT
) STRICT;
CREATE TABLE layer (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, size INTEGER NOT NULL, below INTEGER NOT NULL,
    token TEXT NOT NULL, slot INTEGER, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    crc INTEGER NOT NULL, synced INTEGER NOT NULL, PRIMARY KEY (number, generation)
) STRICT, WITHOUT ROWID;
CREATE TABLE segment (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    crc INTEGER NOT NULL, synced INTEGER NOT NULL, PRIMARY KEY (number, generation, start)
) STRICT, WITHOUT ROWID;
CREATE TABLE upload (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, upload_id TEXT, begun_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE overlay (number INTEGER PRIMARY KEY, below INTEGER NOT NULL) STRICT;
CREATE TABLE parked (
    number INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    key TEXT NOT NULL, etag TEXT NOT NULL, size INTEGER NOT NULL, shift INTEGER NOT NULL,
    PRIMARY KEY (number, start)
) STRICT, WITHOUT ROWID;
CREATE TABLE temporary (key TEXT PRIMARY KEY, number INTEGER NOT NULL, token TEXT NOT NULL) STRICT;
CREATE TABLE late (
    key TEXT NOT NULL, request INTEGER NOT NULL, until REAL NOT NULL, PRIMARY KEY (key, request)
) STRICT, WITHOUT ROWID;
CREATE TABLE refusal (number INTEGER PRIMARY KEY, reason TEXT NOT NULL) STRICT;
CREATE TABLE step (id INTEGER PRIMARY KEY, done INTEGER NOT NULL) STRICT;
"""
#: Format 2, before what was synced was noted.
FORMAT_2 = FORMAT_3.replace(" synced INTEGER NOT NULL,", "").replace(", boot TEXT)", ")")


def of_42383ae(cache: Path, store: str, files: dict[str, bytes]) -> None:
    """A cache directory in which small new files wait, each in a slot, written in two pieces."""
    (cache / "staging").mkdir(parents=True)
    slab = bytearray()
    with closing(sqlite3.connect(cache / wal.FILE)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(FORMAT_3)
        db.execute("INSERT INTO identity VALUES (3, ?, NULL)", (store,))
        for slot, (key, body) in enumerate(files.items()):
            number, half = slot + 2, len(body) // 2
            db.execute(
                "INSERT INTO node VALUES (?,?,33188,1,2,3,4,5,0,'{}',NULL,0,?,NULL,NULL,NULL,NULL,NULL,?)",
                (number, key, f"t{number}", key),
            )
            first = (0, half, crc32(body[:half]), 0)
            db.execute("INSERT INTO layer VALUES (?,?,?,0,?,?,?,?,?,?)", (number, 7, half, f"l{number}", slot, *first))
            second = (half, len(body), crc32(body[half:]), 0)
            db.execute("INSERT INTO segment VALUES (?,?,?,?,?,?)", (number, 7, *second))
            slab += body.ljust(64 << 10, b"\0")
        db.commit()
    (cache / "staging" / "slab").write_bytes(slab)
