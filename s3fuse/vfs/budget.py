"""The dirty budget: how many bytes may be staged, and what makes room when that many are.

The limit is `--dirty-size`, or less where the disk has less: a reserve stays free there. It is for what staged bytes
take (see `staging.ledger`), over all files, open or not, and no write goes beyond it: a writer waits instead, in the
order of coming. Room is made by giving back what nobody uses, uploading what is closed, and parking what is open or
only held by readers. Clean blocks on the disk go first, without anybody waiting for that (`DiskTier`). Parking of large
open files begins at half the limit, so that their writers need not stop.

A writer waits as long as something leaves: a place that is freed, or a part that has arrived in the bucket.
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

#: A writer gives up when nothing at all has left for so long, and for as long as the largest body under way may take
#: at this rate, the slowest that the store accepts. Where nothing is staged only others could make room.
STALL_S = 300.0
SLOWEST_BYTES_PER_S = 256 << 10
OTHERS_STALL_S = 10.0
#: How often a waiting writer looks by itself.
LOOK_S = 1.0
#: How often, at most, everything dirty is gone through for what could leave.
PUSH_S = 0.05
#: The disk is looked at again after so many bytes; the reserve is never smaller than this.
CHECK_BYTES = 4 << 20
#: Below half the limit, no file with less than this part of the limit is parked.
LARGE_PART = 8


#: What a disk says that has no room, or no more for us.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class Patience:
    """How long one write has waited. `refused_at`: when the disk first refused what there seemed to be room for."""

    __slots__ = ("refused_at", "since")

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.refused_at: float | None = None


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
        self._ledger = staging.ledger
        self._turn = trio.Lock()  # whose write is next; it serves in the order of coming
        self._changes = changes
        self._parking = parking
        self._directory = directory
        self._reserve_bytes = reserve_bytes
        self._clean_up = clean_up
        self._on_disk_bytes = 1 << 62  # how many staged bytes the disk has room for
        self._unchecked_bytes = CHECK_BYTES

    def taken_bytes(self) -> int:
        """What clean blocks have to leave room for: what is staged, and everything where the disk is nearly full."""
        held_bytes = self._ledger.held_bytes
        short = self._on_disk_bytes < self.limit_bytes and self._on_disk_bytes - held_bytes < self._reserve_bytes
        return 1 << 62 if short else held_bytes

    def _most_bytes(self) -> int:
        return min(self.limit_bytes, self._on_disk_bytes)

    def is_full(self, size: int) -> bool:
        """Whether a write of `size` bytes has to wait: it would be too many, or others wait already."""
        return self._exceeds(size) or self._turn.locked()

    def _exceeds(self, size: int) -> bool:
        """Whether `size` bytes more would be too many. One write is let through where nothing is staged."""
        self._unchecked_bytes += size
        if self._unchecked_bytes >= CHECK_BYTES:
            self._look_at_disk()
        held_bytes = self._ledger.held_bytes
        needed_bytes = held_bytes + self._staging.in_blocks(size)
        if needed_bytes > self._on_disk_bytes:
            return True
        return needed_bytes > self.limit_bytes + self.extra_bytes and held_bytes > 0

    def _look_at_disk(self) -> None:
        self._unchecked_bytes = 0
        if self._directory is not None:
            disk = os.statvfs(self._directory)
            free = disk.f_bavail * disk.f_frsize - self._reserve_bytes
            self._on_disk_bytes = self._ledger.held_bytes + free
        self._clean_up()

    def refused(self, patience: Patience) -> None:
        """The disk has refused a write: it may have no more room than what is staged takes."""
        self._unchecked_bytes, self._on_disk_bytes = 0, self._ledger.held_bytes
        if patience.refused_at is None:
            patience.refused_at = time.monotonic()

    def staged(self) -> None:
        """Something was staged: has large open files parked in good time."""
        if not self._parking.wanted and 2 * self._used_bytes() > self._most_bytes():
            self._park(self._most_bytes() // LARGE_PART, 0)

    def _used_bytes(self) -> int:
        return self._ledger.held_bytes - self._ledger.idle_bytes

    async def wait(self, size: int, patience: Patience) -> None:
        """Returns when `size` bytes more may be staged. Raises OSError where no room comes: ETIMEDOUT, ENOSPC.

        A write that the disk has refused returns after a while as well, to be tried again.
        """
        self.waiting += 1
        try:
            if patience.refused_at is not None:  # others may have room: they need not wait for this one
                await self._staging.give_back()
                await self._pause(size, patience)
            async with self._turn:
                while self._is_full_now(size):
                    await self._staging.give_back()
                    if self._is_full_now(size):
                        await self._pause(size, patience)
        finally:
            self.waiting -= 1

    def _is_full_now(self, size: int) -> bool:
        self._unchecked_bytes = CHECK_BYTES
        return self._exceeds(size)

    async def _pause(self, size: int, patience: Patience) -> None:
        """Has room made, and returns when some may have come. Raises OSError where waiting longer is of no use."""
        if time.monotonic() >= self._next_push:
            self._make_room(size)
        self._check_patience(patience)
        await self._ledger.changed(LOOK_S if self._ledger.staged_bytes else LOOK_S / 20)

    def _check_patience(self, patience: Patience) -> None:
        ledger = self._ledger
        now = time.monotonic()
        stalled_s = now - max(patience.since, ledger.progressed_at)
        refused_s = 0.0 if patience.refused_at is None else now - patience.refused_at
        if not ledger.staged_bytes and max(stalled_s, refused_s) > OTHERS_STALL_S:
            raise self._no_room()
        most_s = STALL_S + ledger.largest_sending_bytes / SLOWEST_BYTES_PER_S
        if refused_s > most_s:  # others' bytes leave, and that does not help
            raise self._no_room()
        if stalled_s > most_s:
            used_up = "--dirty-size is used up"
            if self._on_disk_bytes < self.limit_bytes:
                used_up = f"the disk of {self._directory} has no room for more"
            raise OSError(errno.ETIMEDOUT, f"nothing could be uploaded for {most_s:.0f} s, and {used_up}")

    def _no_room(self) -> OSError:
        if self._directory is None:
            return OSError(errno.ENOSPC, "there is no memory left for what is written")
        disk = os.statvfs(self._directory)
        if disk.f_files and not disk.f_favail:
            text = f"the cache disk has no free inodes; remove files from the disk of {self._directory}"
        else:
            text = f"the cache disk is full; free space in {self._directory}"
        return OSError(errno.ENOSPC, text)

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
        excess = self._used_bytes() - min(most // 2, most - wanted_bytes)
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
            if inode.number not in seen and inode.data is not None and self._parking.can(inode):
                seen.add(inode.number)
                yield inode.data.layers[0].extents.total_bytes, inode
