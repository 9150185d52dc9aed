"""Changes that the bucket does not have yet: each is journaled here, before it is acknowledged, and queued.

An inode is dirty while `version` and `synced_version` differ. The queue holds (due time, inode): a change is not
sent at once but after a short delay, so that a temporary file that is written, renamed and given its times is one
upload. Nothing here awaits: a change is whole in memory and in the journal before anybody else runs.
"""

from __future__ import annotations

import heapq
import itertools
import time
from typing import TYPE_CHECKING

import trio

from s3fuse.writing.journal import NodeRow, encode_map, encode_xattrs

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.writing.journal import Journal

#: How long a change waits for company before it is sent.
SETTLE_S = 0.15


class Changes:
    """The set of dirty inodes of one mount."""

    def __init__(self, inodes: Inodes, journal: Journal) -> None:
        self.inodes = inodes
        self.journal = journal
        self.dirty: dict[int, Inode] = {}
        #: What `syncer` is bringing to the bucket at this moment, with the keys that it holds for that.
        self.in_flight: dict[int, set[str]] = {}
        self._heap: list[tuple[float, int, Inode]] = []
        self._due: dict[int, float] = {}
        self._order = itertools.count()
        self._waiters: dict[int, list[trio.Event]] = {}
        self._wake = trio.Event()

    def record(self, inode: Inode) -> None:
        """Journals the inode as it is now and counts it as changed."""
        inode.version += 1
        self.dirty[inode.number] = inode
        self.journal.put_node(self.row(inode))

    def changed(self, inode: Inode, delay_s: float = SETTLE_S) -> None:
        """`record`, and send it after the delay; a file that somebody writes is sent when it is closed."""
        self.record(inode)
        if not inode.writers:
            self.queue(inode, delay_s)

    def removed(self, inode: Inode) -> None:
        """The name is gone: what is staged is dropped once nobody has it open, and the object is deleted."""
        self.inodes.displace(inode)
        self.inodes.unlink(inode)
        if inode.remote is not None or inode.number in self.in_flight:
            self.changed(inode)
            return
        self.synced(inode, inode.version)
        if inode.data is not None and not inode.opens:
            inode.data.discard()
        self.inodes.drop_if_unused(inode)

    def moved(self, inode: Inode, parent: Inode, name: str) -> None:
        """The inode (of a directory: with all below it) has another name from now on."""
        with self.journal.transaction():
            self.inodes.move(inode, parent, name)
            for step in self.inodes.walk(inode):
                if step.remote is not None or step.dirty:
                    self.inodes.displace(step)
                    self.changed(step)

    def release(self, inode: Inode) -> None:
        """The last writer, or the last user of an unlinked file, has closed it."""
        self.queue(inode, SETTLE_S if inode.linked else 0.0)

    def queue(self, inode: Inode, delay_s: float = 0.0) -> None:
        """Asks for the inode to be brought to the bucket after `delay_s`."""
        due = time.monotonic() + delay_s
        self._due[inode.number] = due
        heapq.heappush(self._heap, (due, next(self._order), inode))
        self._wake.set()

    def pop_due(self) -> Inode | None:
        """The next inode whose time has come, or None."""
        now = time.monotonic()
        while self._heap and self._heap[0][0] <= now:
            due, _, inode = heapq.heappop(self._heap)
            if self._due.get(inode.number) == due:
                del self._due[inode.number]
                return inode
        return None

    async def wait_due(self) -> None:
        """Returns when `pop_due` is worth asking."""
        self._wake = trio.Event()
        if self._heap:
            with trio.move_on_at(trio.current_time() + self._heap[0][0] - time.monotonic()):
                await self._wake.wait()
        else:
            await self._wake.wait()

    def synced(self, inode: Inode, version: int) -> None:
        """The bucket has the inode as it was at `version`; call it in the transaction that records this."""
        inode.synced_version = version
        inode.synced_at = time.monotonic()
        inode.error = None
        if inode.dirty:
            self.journal.put_node(self.row(inode))
            if not inode.writers:
                self.queue(inode, SETTLE_S)
        else:
            self.dirty.pop(inode.number, None)
            self.journal.drop_node(inode.number)
        self._notify(inode)

    def failed(self, inode: Inode, reason: str) -> None:
        """An attempt failed: the inode stays dirty, and who waits for it is told."""
        inode.error = reason
        self._notify(inode)

    def _notify(self, inode: Inode) -> None:
        for event in self._waiters.pop(inode.number, ()):
            event.set()

    async def attempted(self, inode: Inode) -> None:
        """Returns after the next attempt to bring the inode to the bucket, whatever came of it."""
        event = trio.Event()
        self._waiters.setdefault(inode.number, []).append(event)
        await event.wait()

    def row(self, inode: Inode) -> NodeRow:
        remote = inode.remote
        return NodeRow(
            inode.number,
            self.inodes.key(inode) if inode.linked else None,
            inode.mode,
            inode.uid,
            inode.gid,
            inode.atime_ns,
            inode.mtime_ns,
            inode.ctime_ns,
            inode.rdev,
            encode_xattrs(inode.xattrs),
            inode.target,
            inode.size,
            None if remote is None else remote.key,
            None if remote is None else remote.etag,
            None if remote is None else remote.size_bytes,
            None if remote is None else encode_map(remote.metadata),
            None if remote is None else encode_map(remote.headers),
        )
