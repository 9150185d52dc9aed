"""Changes that the bucket does not have yet: each is journaled here, before it is acknowledged, and queued.

An inode is dirty while `version` and `synced_version` differ. A change is sent once no other has come for
`QUIET_S`, at the latest after `SETTLE_S`: so a temporary file that is written, renamed and given its times is one
upload, and a burst of small files is taken in at local speed before uploads compete with it. Nothing here awaits: a
change is whole in memory and in the journal before anybody else runs. In a transaction that fails it is in neither.
"""

from __future__ import annotations

import heapq
import itertools
import secrets
import sqlite3
import stat
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from s3fuse.attrs import Attributes
from s3fuse.journal.seals import of_file
from s3fuse.namespace.lateness import Lateness
from s3fuse.namespace.retries import Retries
from s3fuse.store.base import ObjectInfo
from s3fuse.writing.rows import NodeRow, encode_map, encode_xattrs

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.writing.journal import Journal

#: User metadata that tells an operation of ours, whose answer was lost, from somebody else's.
TOKEN = "s3fuse-write"
#: The seal of a file of which nothing is staged.
UNCHANGED = of_file([], None)
QUIET_S = 0.1
SETTLE_S = 1.0
#: So many entries of the queue that are void, and as many as count, may wait for their time.
MOST_VOID = 100
#: Objects left behind are deleted in steps of this, so that many go with one request.
GATHER_S = 0.1


def tokens(inode: Inode) -> list[str]:
    """What objects may carry that operations on the inode wrote that are not known to have happened."""
    written = inode.data.tokens[:1] if inode.data is not None else []
    return [token for token in (*written, *inode.token.split(",")) if token]


def _seal(inode: Inode) -> int:
    return inode.data.seal() if inode.data is not None else UNCHANGED


class Changes:
    """The set of dirty inodes of one mount."""

    def __init__(self, inodes: Inodes, journal: Journal) -> None:
        self.inodes = inodes
        self._session = secrets.token_hex(6)
        self.journal = journal
        self.undo = inodes.undo
        self.late = Lateness(journal)
        self.retries = Retries()
        self.dirty: dict[int, Inode] = {}
        #: What `syncer` is bringing to the bucket at this moment, with the keys that it holds for that.
        self.in_flight: dict[int, set[str]] = {}
        #: Copies under temporary keys that no inode's row names yet, with their tokens: see `temporaries`.
        self.temporaries: dict[str, str] = {}
        self._settling: deque[tuple[float, int, Inode]] = deque()  # (since when, order, inode), oldest first
        self._timed: list[tuple[float, int, Inode]] = []  # heap of (due, order, inode)
        self._entry: dict[int, tuple[int, float]] = {}  # inode -> (order, due) of the one entry that counts
        self._order = itertools.count()
        self._last_change = 0.0
        self._waiters: dict[int, list[trio.Event]] = {}
        self._wake = trio.Event()

    def record(self, inode: Inode, *, is_whole: bool = True) -> None:
        """Journals the inode as it is now and counts it as changed.

        `is_whole` is False where a program is about to write the file; while it is open for writing it is not, anyway.
        """
        self.inodes.keep(inode)
        inode.token = inode.token or f"{self._session}.{inode.number}"
        if is_whole:
            self.put_row(inode)
        else:
            self.journal.put_node(self.row(inode))
        self.count(inode)

    def put_row(self, inode: Inode) -> None:
        """Journals the inode as it is now, with the seal of its last state that was whole."""
        if not inode.writers:
            inode.whole = _seal(inode)
        self.journal.put_node(self.row(inode), inode.whole)

    def seal(self, inode: Inode) -> None:
        """Notes in the journal that the inode's file is whole as it is: somebody has closed or synced it."""
        if inode.dirty and inode.linked and inode.whole != (seal := _seal(inode)):
            self.journal.seal(inode.number, seal)
            inode.whole = seal

    def count(self, inode: Inode) -> None:
        """Counts the inode as changed; where the journal could not record it, it learns of that when written anew."""
        inode.version += 1
        self.undo.item(self.dirty, inode.number)
        self.dirty[inode.number] = inode

    def changed(self, inode: Inode) -> None:
        """`record`, and send it when things have settled; a file that somebody writes is sent when it is closed."""
        self.record(inode)
        if not inode.writers:
            self.settle(inode)

    def removed(self, inode: Inode) -> None:
        """The name is gone: what is staged is dropped once nobody has it open, and the object is deleted."""
        self.inodes.keep(inode)
        key = self.inodes.object_key(inode)
        if inode.listing is not None and inode.remote is None and not inode.listing.is_ours_alone:
            # Some servers keep a prefix that was never made as a directory: deleting its marker ends it.
            inode.remote = ObjectInfo(key, 0, "", 0)
        self.inodes.displaced.add(inode)
        self.inodes.unlink(inode)
        if inode.number not in self.in_flight:
            self.doubt(inode)
        if inode.remote is not None or inode.number in self.in_flight:
            self.changed(inode)
            self._notify(inode)
        else:
            self.synced(inode, inode.version)
            if inode.data is not None and not inode.opens:
                inode.data.discard()
            self.inodes.drop_if_unused(inode)
        self._hand_back(key)

    def moved(self, inode: Inode, parent: Inode, name: str) -> None:
        """The inode (of a directory: with all below it) has another name from now on."""
        with self.journal.transaction():
            left = [self.inodes.object_key(step) for step in self.inodes.walk(inode)]
            self.inodes.move(inode, parent, name)
            for step in self.inodes.walk(inode):
                if step.remote is not None or step.dirty:
                    self.inodes.displaced.add(step)
                    if step.number not in self.in_flight:
                        self.doubt(step)
                    self.changed(step)
        for key in left:
            self._hand_back(key)

    def _hand_back(self, key: str) -> None:
        """A name was given up: an older object at its key, kept until the name's new one came, goes after all."""
        older = self.inodes.displaced.get(key)
        if older is not None and not older.linked and older.number not in self._entry:
            self.settle(older)

    def doubt(self, inode: Inode) -> None:
        """An operation that failed may have written a key that the inode no longer wants: whatever it did is undone.

        Not where the inode's own object is: bytes of the file may be there only.
        """
        if inode.maybe_at is not None and (inode.remote is None or inode.remote.key != inode.maybe_at):
            self.inodes.keep(inode)
            self.orphan(ObjectInfo(inode.maybe_at, 0, "", 0, {TOKEN: ",".join(tokens(inode))}, {}))
            inode.maybe_at = None

    @staticmethod
    def token(inode: Inode) -> str:
        """What the object carries that the next operation on the inode writes."""
        return inode.data.tokens[0] if inode.data is not None and inode.data.layers else inode.token

    def orphan(self, remote: ObjectInfo) -> None:
        """Gives an object that nobody wants any more to an inode without a name, so that it is hidden and deleted.

        Without an etag it is deleted only if it carries one of the tokens in `remote.metadata`.
        """
        if not remote.etag and self._joins(remote):
            return
        inode = self.inodes.add_orphan(Attributes(stat.S_IFREG, 0, 0, 0, 0, 0))
        inode.remote = remote
        self.inodes.displaced.add(inode)
        self.record(inode)
        self.queue(inode, GATHER_S - time.monotonic() % GATHER_S)

    def _joins(self, remote: ObjectInfo) -> bool:
        """Leaves a doubtful object to the inode whose removed object may still be at its key, if there is one.

        Two inodes for one key would each take the other's object for somebody else's.
        """
        before = self.inodes.displaced.get(remote.key)
        if before is None or before.linked or before.remote is None or before.number in self.in_flight:
            return False
        self.inodes.keep(before)
        written = (remote.metadata or {})[TOKEN]
        if before.remote.etag:
            before.token = ",".join(filter(None, (before.token, written)))
            before.doubtful = True
        else:
            older = (before.remote.metadata or {}).get(TOKEN, "")
            before.remote = replace(before.remote, metadata={TOKEN: f"{older},{written}"})
        self.record(before)
        self.queue(before)
        return True

    def settle(self, inode: Inode) -> None:
        """Asks for the inode to be brought to the bucket once things are quiet, unless it is to be sooner anyway."""
        now = self._last_change = time.monotonic()
        if self._entry.get(inode.number, (0, float("inf")))[1] <= now + SETTLE_S:
            return
        order = self._enter(inode, now + SETTLE_S)
        self._settling.append((now, order, inode))
        if len(self._settling) == 1:
            self._wake.set()

    def queue(self, inode: Inode, delay_s: float = 0.0) -> None:
        """Asks for the inode to be brought to the bucket after `delay_s`."""
        due = time.monotonic() + delay_s
        heapq.heappush(self._timed, (due, self._enter(inode, due), inode))
        if not self.undo.is_on and len(self._timed) > 2 * len(self._entry) + MOST_VOID:  # else one may count again
            self._timed = [entry for entry in self._timed if not self._stale(entry)]
            heapq.heapify(self._timed)
        self._wake.set()

    def hasten(self, inode: Inode) -> None:
        """`queue` at once, unless the inode is being sent or its time has come anyway."""
        if inode.number in self.in_flight:
            return
        if self._entry.get(inode.number, (0, float("inf")))[1] > time.monotonic():
            self.queue(inode)
        self._wake.set()

    def _enter(self, inode: Inode, due: float) -> int:
        """The order number of a new entry of the queue, which makes an earlier one of the inode void."""
        order = next(self._order)
        self.undo.item(self._entry, inode.number)  # a later entry that does not count any more is skipped
        self._entry[inode.number] = (order, due)
        return order

    def _settled_at(self) -> float:
        """When the oldest settling change may be sent, if no further one comes."""
        since = self._settling[0][0]
        return min(since + SETTLE_S, max(since, self._last_change) + QUIET_S)

    def pop_due(self) -> Inode | None:
        """The next inode whose time has come, or None."""
        self._record_seals()
        now = time.monotonic()
        while True:
            if self._timed and self._timed[0][0] <= now:
                _, order, inode = heapq.heappop(self._timed)
            elif self._settling and (self._stale(self._settling[0]) or self._settled_at() <= now):
                _, order, inode = self._settling.popleft()
            else:
                return None
            if self._entry.get(inode.number, (-1, 0.0))[0] == order:
                del self._entry[inode.number]
                return inode

    def _record_seals(self) -> None:
        """Records seals soon after the last of many changes: each of these has taken those before it along."""
        with suppress(OSError, sqlite3.DatabaseError):  # later, then
            self.journal.record_deferred()

    def _stale(self, entry: tuple[float, int, Inode]) -> bool:
        return self._entry.get(entry[2].number, (-1, 0.0))[0] != entry[1]

    async def wait_due(self) -> None:
        """Returns when `pop_due` is worth asking."""
        self._wake = trio.Event()
        due = self._timed[0][0] if self._timed else float("inf")
        if self._settling:
            due = min(due, self._settled_at())
        with trio.move_on_after(max(0.0, due - time.monotonic())):
            await self._wake.wait()

    def synced(self, inode: Inode, version: int) -> None:
        """The bucket has the inode as it was at `version`; call it in the transaction that records this."""
        self.inodes.keep(inode)
        self.undo.item(self.dirty, inode.number)
        inode.synced_version = version
        inode.synced_at = time.monotonic()
        inode.error = None
        self.journal.drop_refusal(inode.number)
        if inode.dirty:
            self.put_row(inode)
            if not inode.writers:
                self.settle(inode)
        else:
            self.dirty.pop(inode.number, None)
            self.retries.forget(inode.number)
            self.journal.drop_node(inode.number)
        self._notify(inode)

    def failed(self, inode: Inode, reason: str, *, for_good: bool) -> None:
        """An attempt failed: the inode stays dirty, and who waits for it is told.

        What does not heal by itself is recorded, for whoever finds the change when nothing is mounted any more.
        """
        if for_good and inode.error != reason:
            self.journal.put_refusal(inode.number, reason)
        inode.error = reason
        self._notify(inode)

    def looked_at(self, inode: Inode) -> None:
        """Nothing of the inode came to the bucket, and nothing failed: who waits for it asks again."""
        inode.error = None
        self._notify(inode)

    def _notify(self, inode: Inode) -> None:
        self.journal.after_commit(partial(self._wake_waiters, inode))

    def _wake_waiters(self, inode: Inode) -> None:
        for event in self._waiters.pop(inode.number, ()):
            event.set()

    @property
    def queued(self) -> int:
        """How many inodes have their time to come."""
        return len(self._entry)

    @property
    def waiting(self) -> int:
        """How many callers wait for an attempt."""
        return sum(map(len, self._waiters.values()))

    async def attempted(self, inode: Inode) -> None:
        """Returns after the next attempt to bring the inode to the bucket, whatever came of it."""
        event = trio.Event()
        self._waiters.setdefault(inode.number, []).append(event)
        try:
            await event.wait()
        finally:
            if not event.is_set():
                events = self._waiters[inode.number]
                events.remove(event)
                if not events:
                    del self._waiters[inode.number]

    def row(self, inode: Inode) -> NodeRow:
        remote = inode.remote
        return NodeRow(
            inode.number,
            self.inodes.object_key(inode) if inode.linked else None,
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
            inode.token,
            None if remote is None else remote.key,
            None if remote is None else remote.etag,
            None if remote is None else remote.size_bytes,
            None if remote is None else encode_map(remote.metadata),
            None if remote is None else encode_map(remote.headers),
            inode.maybe_at,
        )
