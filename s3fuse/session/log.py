"""An append-only file of records that outlives a killed process, written without a system call.

The file is mapped. A record is a byte that tells its kind, the length of its content, the content; the kind is
stored last, so that a record counts from one moment on, wherever a process is killed. The page cache keeps what was
stored; nothing is synced, since a session ends with the machine anyway. Blocks are reserved before they are mapped:
a full disk would be a SIGBUS else.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

from s3fuse.errors import UserError
from s3fuse.host.private import NotPrivate, open_private_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAGIC = b"s3fuses\n"
#: Raise it with every change of what records hold: a session of another version is refused, not guessed at.
VERSION = 1
_HEAD = struct.Struct("<8sII")
_HEAD_BYTES = 64
_RECORD = struct.Struct("<BI")
_LENGTH = struct.Struct("<I")
_BROKEN_AT = _HEAD.size - 4
#: More than any record has: the largest counts the entries of one answer to a readdir.
_MOST_RECORD_BYTES = 1 << 20
_GROW_BYTES = 256 << 10
_MOST_GROWTH_BYTES = 64 << 20


class Log:
    """The log of one session, open for appending. `broken` once something could not be kept: nobody may start from it.

    Raises OSError where the file cannot be made, UserError where it is somebody else's.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self.path = path
        self.broken = False
        self._fd = _opened(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0))
        try:
            if new:
                os.posix_fallocate(self._fd, 0, _GROW_BYTES)
            self._map = mmap.mmap(self._fd, 0)
        except BaseException:
            os.close(self._fd)
            raise
        self._capacity = len(self._map)
        if new:
            self._map[: _HEAD.size] = _HEAD.pack(MAGIC, VERSION, 0)
            self.used_bytes = _HEAD_BYTES
        else:
            self.used_bytes = _end(self._map)
            # The process may have been killed within a record: what is behind the last whole one must read as nothing.
            stop = min(self._capacity, self.used_bytes + _MOST_RECORD_BYTES)
            self._map[self.used_bytes : stop] = bytes(stop - self.used_bytes)

    def append(self, kind: int, content: bytes) -> None:
        """Adds a record. Never raises: what cannot be kept makes the log `broken`."""
        at = self.used_bytes
        start = at + 5
        stop = start + len(content)
        if stop >= self._capacity and not self._grow(stop):
            return
        self._map[at + 1 : stop] = _LENGTH.pack(len(content)) + content
        self._map[at] = kind
        self.used_bytes = stop

    def _grow(self, needed: int) -> bool:
        capacity = self._capacity + max(_GROW_BYTES, min(self._capacity, _MOST_GROWTH_BYTES))
        capacity = max(capacity, needed + _GROW_BYTES) & -mmap.PAGESIZE
        try:
            os.posix_fallocate(self._fd, self._capacity, capacity - self._capacity)
            self._map.resize(capacity)
        except OSError:
            self.broken = True
            self._map[_BROKEN_AT] = 1
            return False
        self._capacity = capacity
        return True

    def replace(self, successor: Log) -> None:
        """`successor`, which holds all of this log's state, takes its place under its name; this one is closed."""
        os.rename(successor.path, self.path)
        self.close()
        successor.path = self.path

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


def _opened(path: Path, flags: int) -> int:
    """A descriptor of a session that is this user's own: what it says is believed. Raises UserError, OSError."""
    try:
        return open_private_file(path, flags)
    except NotPrivate as error:
        raise UserError(f"the session {error}; unmount and mount again") from None


def _end(data: mmap.mmap) -> int:
    at, size = _HEAD_BYTES, len(data)
    while at + 5 <= size and data[at]:
        at += 5 + _LENGTH.unpack_from(data, at + 1)[0]
    return min(at, size)


def read(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every record's kind and content, oldest first.

    Raises UserError for a session of another version or user, or one that is not whole, OSError where it cannot be
    read.
    """
    with open(_opened(path, os.O_RDONLY), "rb") as file:
        data = file.read()
    if len(data) < _HEAD_BYTES:
        raise UserError(f"the session {path} is not whole; unmount and mount again")
    magic, version, broken = _HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise UserError(
            f"the session {path} is of another version ({version}, this s3fuse knows {VERSION}); unmount with the "
            "version that mounted it, and mount again"
        )
    if broken:
        raise UserError(f"the session {path} is not whole: its disk was full; unmount and mount again")
    at, size = _HEAD_BYTES, len(data)
    while at + 5 <= size:
        kind, length = _RECORD.unpack_from(data, at)
        if not kind:
            return
        at += 5 + length
        yield kind, data[at - length : at]
