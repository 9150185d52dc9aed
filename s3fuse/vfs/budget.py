"""The dirty budget: how many bytes may be staged, and what makes room when that many are.

The limit is `--dirty-size`, or less where the disk has less: a reserve stays free there. It counts all files, open or
not, and no write goes beyond it: a writer waits instead. Room is made by uploading what is closed and parking what is
open. Clean blocks on the disk go first, without anybody waiting for that (`DiskTier`). Parking of large open files
begins at half the limit, so that their writers need not stop.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode
    from s3fuse.namespace.parking import Parking
    from s3fuse.vfs.files import Handle
    from s3fuse.writing.staging import Staging

#: A writer gives up when nothing at all has left for so long; where nothing is staged only others could make room.
STALL_S = 300.0
OTHERS_STALL_S = 10.0
#: How often a waiting writer looks by itself.
LOOK_S = 1.0
#: How often, at most, everything dirty is gone through for what could leave.
PUSH_S = 0.05
#: The disk is looked at again after so many bytes; the reserve is never smaller than this.
CHECK_BYTES = 4 << 20
#: Below half the limit, no file with less than this part of the limit is parked.
LARGE_PART = 8


class Budget:
    """Staged bytes of one mount and their limit. `reserve_bytes` stay free on the disk of `directory` (None: none).

    `clean_up` is called often while bytes are staged: clean blocks may have to go.
    """

    def __init__(
        self,
        limit_bytes: int,
        staging: Staging,
        changes: Changes,
        parking: Parking,
        directory: Path | None = None,
        reserve_bytes: int = 0,
        clean_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.extra_bytes = 0  # how far above the limit it may be: while the mount ends, what the kernel may hold
        self.waiting = 0  # writers
        self._next_push = 0.0
        self.handles: Mapping[int, Handle] = {}
        self._staging = staging
        self._changes = changes
        self._parking = parking
        self._directory = directory
        self._reserve_bytes = reserve_bytes
        self._clean_up = clean_up
        self._on_disk_bytes = 1 << 62  # how many staged bytes the disk has room for
        self._unchecked_bytes = CHECK_BYTES

    @property
    def staged_bytes(self) -> int:
        return self._staging.staged_bytes

    def taken_bytes(self) -> int:
        """What clean blocks have to leave room for: what is staged, and everything where the disk is nearly full."""
        short = self._on_disk_bytes < self.limit_bytes and self._on_disk_bytes - self.staged_bytes < self._reserve_bytes
        return 1 << 62 if short else self.staged_bytes

    def _most_bytes(self) -> int:
        return min(self.limit_bytes, self._on_disk_bytes)

    def is_full(self, size: int) -> bool:
        """Whether `size` bytes more would be too many. One write is let through where nothing is staged."""
        self._unchecked_bytes += size
        if self._unchecked_bytes >= CHECK_BYTES:
            self._look_at_disk()
        staged = self.staged_bytes
        if staged + size > self._on_disk_bytes:
            return True
        return staged + size > self.limit_bytes + self.extra_bytes and staged > 0

    def _look_at_disk(self) -> None:
        self._unchecked_bytes = 0
        if self._directory is not None:
            disk = os.statvfs(self._directory)
            free = disk.f_bavail * disk.f_frsize - self._reserve_bytes
            self._on_disk_bytes = self.staged_bytes + free
        self._clean_up()

    def disk_is_full(self) -> None:
        """A write has failed with ENOSPC: there is no more room than what is staged takes."""
        self._unchecked_bytes, self._on_disk_bytes = 0, self.staged_bytes

    def staged(self) -> None:
        """Something was staged: has large open files parked in good time."""
        if not self._parking.wanted and 2 * self.staged_bytes > self._most_bytes():
            self._park(self._most_bytes() // LARGE_PART, 0)

    async def wait(self, size: int) -> None:
        """Returns when `size` bytes more may be staged. Raises OSError where no room comes: ETIMEDOUT, ENOSPC."""
        self.waiting += 1
        try:
            since, before = time.monotonic(), self.staged_bytes
            while self.is_full(size):
                if time.monotonic() >= self._next_push:
                    self._make_room(size)
                self._staging.freed = trio.Event()
                with trio.move_on_after(LOOK_S if self.staged_bytes else LOOK_S / 20):
                    await self._staging.freed.wait()
                self._unchecked_bytes = CHECK_BYTES
                if self.staged_bytes < before or (before == 0 and self.staged_bytes):
                    since = time.monotonic()
                before = self.staged_bytes
                self._give_up_after(time.monotonic() - since)
        finally:
            self.waiting -= 1

    def _give_up_after(self, stalled_s: float) -> None:
        if not self.staged_bytes and stalled_s > OTHERS_STALL_S:
            raise OSError(errno.ENOSPC, f"the cache disk is full; free space in {self._directory}")
        if stalled_s > STALL_S:
            raise OSError(
                errno.ETIMEDOUT, f"nothing could be uploaded for {STALL_S:.0f} s, and --dirty-size is used up"
            )

    def _make_room(self, size: int) -> None:
        self._next_push = time.monotonic() + PUSH_S
        for inode in self._changes.dirty.values():
            data = inode.data
            # What an earlier process staged of a file that is open still cannot be parked: it may have been sent.
            if data is not None and inode.error is None and (not inode.writers or data.unchecked):
                self._changes.hasten(inode)
        self._park(0, size)

    def _park(self, least_bytes: int, wanted_bytes: int) -> None:
        """Has open files parked, those with most bytes first, until half the limit would be free, or what is wanted."""
        most = self._most_bytes()
        excess = self.staged_bytes - min(most // 2, most - wanted_bytes)
        for size, inode in sorted(self._open(), key=lambda found: found[0], reverse=True):
            if size < max(least_bytes, 1) or excess <= 0:
                return
            self._parking.want(inode)
            excess -= size

    def _open(self) -> Iterator[tuple[int, Inode]]:
        """Files that can be parked, with how many bytes that frees."""
        seen: set[int] = set()
        for handle in self.handles.values():
            inode = handle.inode
            if handle.writes and inode.number not in seen and inode.data is not None and self._parking.can(inode):
                seen.add(inode.number)
                yield inode.data.layers[0].extents.total_bytes, inode
