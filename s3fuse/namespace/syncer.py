"""Brings the bucket to where the tree is: each dirty inode is uploaded, copied, moved or deleted.

For one inode at a time: what should be at its key is compared with where its object is (`remote`), and the
difference is one of upload, metadata-only copy, copy to another key, delete. Order between inodes follows from keys
alone. An operation holds the keys it reads and writes, so no two touch one key at once. A key whose object still
belongs to another inode is cleared first: that inode is brought to its own place, or, where that goes in a circle
or the object is only kept for open handles, its object is set aside under a temporary key.

After an operation memory and journal change in one step without awaits. A crash before that step repeats the
operation; repeats are harmless, since our own result in the bucket is recognised (`conflicts`).
"""

from __future__ import annotations

import errno
import logging
import random
import time
from typing import TYPE_CHECKING

import trio

from s3fuse import attrs, keys
from s3fuse.errors import NeedsCredentials, NotFound, PreconditionFailed, StoreError, described
from s3fuse.namespace.arrivals import Arrivals
from s3fuse.namespace.bases import Bases
from s3fuse.namespace.changes import TOKEN
from s3fuse.namespace.clearing import Clearing, kept
from s3fuse.namespace.conflicts import Conflicts
from s3fuse.namespace.deletes import Behind, Deletes
from s3fuse.namespace.doubts import look, settle
from s3fuse.namespace.moment import MovedOn
from s3fuse.namespace.parking import Parking
from s3fuse.namespace.temporaries import Temporaries
from s3fuse.store.base import ANY, Bytes, Condition, ObjectInfo
from s3fuse.tree.stale import StaleNames
from s3fuse.writing.copying import Copies
from s3fuse.writing.leftovers import Uploads
from s3fuse.writing.plan import Limits
from s3fuse.writing.upload import Target, Version, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.directories import Directories
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.reading.blocks import BlockCache
    from s3fuse.store.base import Store
    from s3fuse.writing.dirty import DirtyFile

log = logging.getLogger(__name__)

#: How long an inode waits for another one that is in its way.
BEHIND_S = 0.02
#: The same where that one fails: it is looked at again this often.
FAILING_BEHIND_S = 0.5
#: Over how long the uploads that waited for the server are spread when it is back.
WAKE_S = 0.3
DELETE_BATCH = 1000


def _places(wanted: set[str]) -> set[str]:
    return {key.rstrip("/") for key in wanted}


def _heals(error: Exception) -> bool:
    """Whether the same attempt may succeed later: others give keys, or space on the disk."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return isinstance(error, NeedsCredentials) or (isinstance(error, StoreError) and error.transient)


class Syncer:
    """Runs `workers` operations at once until cancelled."""

    def __init__(
        self,
        store: Store,
        inodes: Inodes,
        changes: Changes,
        directories: Directories,
        blocks: BlockCache,
        *,
        workers: int = 16,
        limits: Limits | None = None,
    ) -> None:
        self.store = store
        self.inodes = inodes
        self.changes = changes
        self.directories = directories
        self.limits = limits or Limits()
        self.blocks = blocks
        self.uploads = Uploads(store, changes.journal)
        self.copies = Copies(store, self.uploads, self.limits, blocks.cached)
        temporaries = Temporaries(changes, self.copies)
        bases = Bases(inodes, changes, self.copies, temporaries, blocks)
        self.stale = StaleNames()
        self.conflicts = Conflicts(store, inodes, changes, bases, self.stale)
        self.parking = Parking(store, changes, self.limits)
        self.last_error = ""
        #: Told of a version that is about to become `Inode.remote`; must not await.
        self.on_version: Callable[[Inode, ObjectInfo], None] = lambda inode, version: None
        self._slots = trio.CapacityLimiter(workers)
        self._busy: set[str] = set()  # places: a file and a directory of one name have the same
        self._stopped: trio.Event | None = None  # set once nothing is under way any more
        self._goes_on = trio.Event()
        self.deletes = Deletes(store, inodes, changes)
        self.arrivals = Arrivals(inodes, changes, self.deletes)
        self._clearing = Clearing(store, inodes, changes, self.deletes, temporaries)
        store.health.on_recovery(self.wake)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.uploads.run)
            while True:
                if self._stopped is not None:
                    await self._goes_on.wait()
                inode = self.changes.pop_due()
                if inode is None:
                    await self.changes.wait_due()
                    continue
                parked = inode.number in self.parking.wanted
                if (inode.dirty or parked) and not self._take(inode):
                    self.changes.queue(inode, BEHIND_S)
                elif inode.dirty or parked:
                    batch = [inode] if inode.linked or parked else [inode, *self._more_deletes()]
                    await self._slots.acquire_on_behalf_of(batch[0])
                    nursery.start_soon(self._attempt, batch)

    async def stop(self) -> None:
        """Begins nothing more, and returns when what was begun has ended: another process is to go on."""
        self._stopped, self._goes_on = trio.Event(), trio.Event()
        if self.changes.in_flight:
            await self._stopped.wait()

    def go_on(self) -> None:
        """Undoes `stop`: there will be no other process."""
        self._stopped = None
        self._goes_on.set()

    def wake(self) -> None:
        """Tries at once what the server could not take: it works again."""
        for number in self.changes.retries.shorten():
            inode = self.changes.dirty.get(number)
            if inode is not None and number not in self.changes.in_flight:
                self.changes.queue(inode, random.uniform(0.0, WAKE_S))

    # -- one operation

    def _keys(self, inode: Inode) -> set[str]:
        wanted = {inode.remote.key} if inode.remote is not None else set()
        if inode.linked:
            key = self.inodes.object_key(inode)
            wanted.update((key, *self.inodes.displaced.files_above(key)))
        return wanted

    def _take(self, inode: Inode) -> bool:
        """Holds the inode and its keys, if nobody else does."""
        wanted = self._keys(inode)
        places = _places(wanted)
        if inode.number in self.changes.in_flight or not self._busy.isdisjoint(places):
            return False
        self._busy |= places
        self.changes.in_flight[inode.number] = wanted
        self.inodes.claimed.update(dict.fromkeys(wanted, inode))
        return True

    def _more_deletes(self) -> Iterable[Inode]:
        """Further inodes that are due and only want their object deleted; one that is not goes back to the queue."""
        for _ in range(DELETE_BATCH - 1):
            inode = self.changes.pop_due()
            if inode is None:
                return
            parked = inode.number in self.parking.wanted
            if inode.dirty and not inode.linked and not parked and self._take(inode):
                yield inode
            elif inode.dirty or parked:
                self.changes.queue(inode)
                return

    async def _attempt(self, batch: list[Inode]) -> None:
        first = batch[0]
        failed: list[tuple[Inode, Exception]] = []
        try:
            self.changes.journal.check_room_to_send(len(batch))
            if any(inode.linked and self._keys(inode) != self.changes.in_flight[inode.number] for inode in batch):
                self.changes.queue(first)  # renamed since it was taken
            elif await self.parking.park_if_wanted(first) or not first.dirty:
                pass
            elif first.linked:
                await self._bring(first)
            else:
                failed = await self.deletes.run(batch)
            for inode in batch:
                self.changes.retries.ended_well(inode.number)
            for inode, reason in failed:
                self._postpone(inode, reason)
        except Exception as error:
            for inode in batch:
                self._postpone(inode, error)
        finally:
            for inode in batch:
                held = self.changes.in_flight.pop(inode.number)
                if inode.maybe_at is not None and not self.inodes.is_at(inode, inode.maybe_at):
                    self.changes.doubt(inode)  # what it may have written is hidden from now on, too
                self._busy -= _places(held)
                for key in held:
                    del self.inodes.claimed[key]
                if inode.data is not None and not inode.opens:
                    inode.data.close()  # however many files wait for another attempt
            self._slots.release_on_behalf_of(first)
            if self._stopped is not None and not self.changes.in_flight:
                self._stopped.set()

    def _postpone(self, inode: Inode, error: Exception) -> None:
        """Tells who waits, and tries again later: at once, then after up to a minute."""
        if not inode.dirty:  # what failed of the batch was another one
            return
        if isinstance(error, MovedOn):
            self.changes.queue(inode)
            return
        if isinstance(error, Behind):
            self._wait_behind(inode, error)
            return
        reason = str(error)
        if not isinstance(error, (StoreError, OSError)):
            reason = f"an error in s3fuse itself, see the log: {described(error)}"
            if inode.error != reason:
                log.error("bringing %r to the bucket failed; it stays in the journal", inode, exc_info=error)
        retries = self.changes.retries
        failures = retries.failed(inode.number, heals=_heals(error))
        self.last_error = f"{inode.name or inode.number}: {reason}"
        if failures == 1:
            log.info("upload of %r is put off: %s", inode.name, reason)
        self.changes.failed(inode, reason, for_good=retries.is_hopeless(inode.number))
        self.changes.queue(inode, min(60.0, 0.25 * 2 ** min(failures, 9)) * random.uniform(0.5, 1.0))

    def _wait_behind(self, inode: Inode, behind: Behind) -> None:
        """Tries again soon; while the other one fails this one fails with it, and who waits for it is told."""
        other, retries = behind.other, self.changes.retries
        if not retries.is_failing(other.number):
            retries.ended_well(inode.number)
            self.changes.queue(inode, BEHIND_S)
            return
        retries.failed_with(inode.number, other.number)
        self.changes.failed(inode, str(behind), for_good=retries.is_hopeless(inode.number))
        self.changes.queue(inode, FAILING_BEHIND_S)

    async def _bring(self, inode: Inode) -> None:
        key = self.inodes.object_key(inode)
        self._clearing.directory_first(inode)
        is_there = inode.remote is not None and inode.remote.key == key
        late = self.changes.late
        late_s = max(late.before_write_s(key, inode.number), late.before_rewrite_s(key) if is_there else 0.0)
        if late_s:
            self.changes.queue(inode, late_s)
            return
        await self._clearing.clear(inode, key)
        self._check_at(inode, key)
        if inode.maybe_at not in (None, key):
            self.changes.doubt(inode)
        if inode.remote is None or inode.remote.key != key:
            await settle(self.store, self.changes, inode)
            self._check_at(inode, key)
            inode.maybe_at = key
        else:
            inode.doubtful = True
        try:
            if inode.data is not None and inode.data.layers:
                await self._upload(inode, key)
            elif inode.remote is None:
                await self._create(inode, key)
            else:
                await self._copy(inode, key)
        except (PreconditionFailed, NotFound) as error:
            await self._resolve(inode, key, error)

    def _check_at(self, inode: Inode, key: str) -> None:
        """Raises MovedOn where the inode was renamed or removed while the bucket was asked."""
        if not self.inodes.is_at(inode, key):
            raise MovedOn

    async def _resolve(self, inode: Inode, key: str, error: StoreError) -> None:
        """Finds out why an operation's condition failed, and has the inode brought as it is then."""
        self._check_at(inode, key)
        went = await self._clearing.went_by_itself(inode, key) or await self._clearing.ended_directory(inode, key)
        self._check_at(inode, key)
        ours = None
        if not went:
            try:
                ours = await self.conflicts.resolve(inode, key, error)
            except (PreconditionFailed, NotFound):  # others go on changing what is there
                went = True
        if ours is not None:
            target = Target(key, ours.metadata or {}, ours.headers or {}, ANY)
            self._arrived(inode, target, ours.etag, ours.size_bytes, inode.synced_version)
            self.changes.queue(inode)
        elif inode.dirty and not self.changes.retries.met_conflict(inode.number):
            raise error
        elif went:
            self.changes.queue(inode)

    # -- the operations

    def _condition(self, inode: Inode, key: str) -> Condition:
        """What the bucket must have at `key` for our write to be the next version of it."""
        if inode.is_directory:
            return ANY
        if inode.remote is not None and inode.remote.key == key:
            return Condition(etag=inode.remote.etag)
        occupant = self.inodes.displaced.get(key)
        if occupant is not None and occupant.remote is not None:
            return Condition(etag=occupant.remote.etag)
        return Condition(absent=True)

    async def _target(self, inode: Inode, key: str) -> Target:
        before = await kept(self.store, inode)
        metadata = attrs.encode(inode.attributes(), before.metadata or {} if before else {})
        metadata[TOKEN] = self.changes.token(inode)
        guessed = keys.DIRECTORY_TYPE if inode.is_directory else keys.content_type(inode.name)
        headers = dict(before.headers or {}) if before else {"content-type": guessed}
        return Target(key, metadata, headers, self._condition(inode, key))

    async def _upload(self, inode: Inode, key: str) -> None:
        data = inode.data
        assert data is not None
        data.give_up_hidden()
        if text := data.poisoned_text():
            raise OSError(errno.EIO, text)
        data.freeze()
        there = await self._check_staged(data, key) if data.unchecked else None
        if there is None and data.parked.packs:
            await self.parking.park(inode)
            data.freeze()
        version = inode.version if len(data.layers) == 1 else inode.version - 1
        if there is not None:
            found = Target(key, there.metadata or {}, there.headers or {}, ANY)
            self._arrived(inode, found, there.etag, there.size_bytes, version)
            return
        frozen = Version.frozen(data, inode.remote, self.blocks.copy)
        target = await self._target(inode, key)
        etag = await upload(self.store, self.uploads, frozen, target, self.limits)
        self._arrived(inode, target, etag, frozen.size_bytes, version)

    async def _check_staged(self, data: DirtyFile, key: str) -> ObjectInfo | None:
        """Raises OSError(EIO) where staged bytes are damaged, unless they were written anew since then.

        Gives the object where the bucket has them: after a power failure the journal may name bytes that were uploaded
        and whose place was used again.
        """
        try:
            for _ in data.check():
                await trio.lowlevel.checkpoint()
        except OSError:
            if data.give_up_oldest():
                data.freeze()
                return None
            token = data.tokens[0]
            info = await look(self.store, key)
            if info is None or (info.metadata or {}).get(TOKEN) != token or data.tokens[:1] != [token]:
                raise
            return info
        return None

    async def _create(self, inode: Inode, key: str) -> None:
        """Writes what has no staged bytes: directory markers, symlinks, special and empty files."""
        version = inode.version
        body = inode.target or b""
        target = await self._target(inode, key)
        etag = await self.store.put(
            key, Bytes(body), metadata=target.metadata, headers=target.headers, condition=target.condition
        )
        self._arrived(inode, target, etag, len(body), version)

    async def _copy(self, inode: Inode, key: str) -> None:
        """Moves the object, or changes only its metadata."""
        version = inode.version
        target = await self._target(inode, key)
        source = inode.remote
        assert source is not None
        etag = await self.copies.copy(source, target)
        self._arrived(inode, target, etag, source.size_bytes, version)

    def _arrived(self, inode: Inode, target: Target, etag: str, size: int, version: int) -> None:
        """The bucket has `inode` as of `version` at the target: memory and journal learn it in one step."""
        before = inode.remote
        self.changes.retries.forget(inode.number)
        with self.changes.journal.transaction():
            self.inodes.keep(inode)
            inode.maybe_at = None
            inode.doubtful = False
            for occupant in self.inodes.displaced.all_at(target.key):
                if occupant is not inode:
                    self.deletes.forget(occupant)
            now = ObjectInfo(target.key, size, etag, 0, target.metadata, target.headers)
            self.on_version(inode, now)
            if inode.data is not None and inode.data.frozen:
                inode.data.commit(size)
            if before is not None:
                self.inodes.displaced.settle(before.key, inode)
            inode.remote = now
            if before is not None and before.key != target.key:
                self.changes.orphan(before)
            if inode.linked and self.inodes.object_key(inode) == target.key:
                self.changes.synced(inode, version)
                late_s = self.changes.late.before_rewrite_s(target.key)
                if late_s:
                    self.changes.record(inode)
                    self.changes.queue(inode, late_s)
            else:
                self.inodes.displaced.add(inode)
                self.changes.record(inode)
                self.changes.queue(inode)
        inode.valid_until = time.monotonic() + self.directories.ttl_s
        for directory in (inode, inode.parent):
            if directory is not None and directory.listing is not None and directory.listing.is_ours_alone:
                directory.listing.in_bucket(inode.valid_until)
        if inode.data is not None and not inode.data.layers and not inode.opens:
            inode.data.close()
            inode.data = None
        self.inodes.drop_if_unused(inode)
