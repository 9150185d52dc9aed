"""Disk space for the journal, reserved before it is needed: what has changed in memory can always be recorded.

SQLite puts what a transaction changes at the end of its log, and goes back to the log's beginning once a checkpoint has
moved everything into the database. Both files have blocks beyond their ends (fallocate(2) with FALLOC_FL_KEEP_SIZE,
which changes no length), so transactions still commit when others have filled the disk. Where a disk cannot reserve,
what is free there counts.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from s3fuse.staging.sparse import KEEP_SIZE, fallocate
from s3fuse.writing import wal

if TYPE_CHECKING:
    from pathlib import Path

#: What is kept beyond the used part of the log.
AHEAD_BYTES = 6 << 20
#: What changes leave of that to those who bring them to the bucket, and what these leave to those under way.
SPARE_BYTES = 4 << 20
LEAST_BYTES = 2 << 20
#: What a row takes: an inode with two keys, attributes and its object's metadata, and its part of the tree above it.
ROW_BYTES = 2 << 10
#: An eighth is enough for the index of 128 MiB of log. SQLite cuts the index to nothing when the journal is opened, and
#: others may take some of it before it grows again.
INDEX_BYTES = 2 << 20


def full(directory: Path) -> OSError:
    """What a program is told whose change cannot be recorded."""
    return OSError(errno.ENOSPC, f"the disk of the cache is full; free space in {directory}")


class Room:
    """The space that the files of an open journal have."""

    def __init__(self, directory: Path, index: wal.LogIndex) -> None:
        self._directory = directory
        self._index = index
        # Open until the journal is closed: closing one takes SQLite's locks on that file from the whole process.
        self._files = {
            suffix: os.open(directory / (wal.FILE + suffix), os.O_RDWR | os.O_CLOEXEC)
            for suffix in ("", wal.LOG, wal.INDEX)
        }
        # Up to where the files have blocks; an earlier process may have reserved some.
        self._log_end = self._allocated_bytes(wal.LOG)
        self._database_end = max(1, self._allocated_bytes(""))
        self._kept_for = 0  # the `_log_end` that the database and the index have room for
        self._can_reserve = True
        self.keep()

    @property
    def used_bytes(self) -> int:
        """How much of the log has what is not in the database yet."""
        return self._index.used_bytes()

    @property
    def left_bytes(self) -> int:
        """How much more fits into the log for certain."""
        return self._log_end - self.used_bytes if self._can_reserve else self._free_bytes()

    @property
    def is_short(self) -> bool:
        """Whether a checkpoint would make room that the disk does not give."""
        return self.used_bytes > 0 and self.left_bytes < AHEAD_BYTES

    def check(self, needed_bytes: int) -> None:
        """Returns where so much more fits into the log. Raises OSError(ENOSPC)."""
        if self.left_bytes >= needed_bytes:
            return
        self.keep()
        # Much more than that is for one moment only, and not worth keeping it from others for good.
        if self.left_bytes < needed_bytes and (needed_bytes <= AHEAD_BYTES or self._free_bytes() < needed_bytes):
            raise full(self._directory)

    def keep(self) -> None:
        """Reserves anew what was used up, as far as the disk has it."""
        log_end = self.used_bytes + AHEAD_BYTES
        if log_end > self._log_end and self._reserve(wal.LOG, log_end):
            self._log_end = log_end
        if self._kept_for != self._log_end:
            # A checkpoint adds to the database at most what the log has.
            end = os.fstat(self._files[""]).st_size + self._log_end
            if self._reserve("", end) and self._reserve(wal.INDEX, INDEX_BYTES):
                self._database_end, self._kept_for = end, self._log_end

    def moved(self) -> None:
        """A checkpoint has ended: SQLite has cut the database to its length, and what was reserved beyond is gone."""
        self._reserve("", self._database_end)
        self._kept_for = 0
        self.keep()

    def _reserve(self, suffix: str, end: int) -> bool:
        """Gives whether a file has blocks up to `end` now."""
        try:
            fallocate(self._files[suffix], KEEP_SIZE, 0, end)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._can_reserve = False
            elif error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        return True

    def _allocated_bytes(self, suffix: str) -> int:
        return os.fstat(self._files[suffix]).st_blocks * 512

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
