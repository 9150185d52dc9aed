"""Makes sure that a key may be written: its directory is there, and no other inode's object is in the way."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from s3fuse.errors import PreconditionFailed
from s3fuse.namespace.deletes import Behind
from s3fuse.namespace.doubts import carries, expected, look, settle
from s3fuse.namespace.moment import Moment
from s3fuse.store.base import MAX_KEY_BYTES, UNMADE_ETAG, ObjectInfo

if TYPE_CHECKING:
    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.deletes import Deletes
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.namespace.temporaries import Temporaries
    from s3fuse.store.base import Store


async def kept(store: Store, inode: Inode) -> ObjectInfo | None:
    """The remote version with its metadata and headers, which a rewrite must keep."""
    remote = inode.remote
    if remote is None or (remote.metadata is not None and remote.headers is not None):
        return remote
    info = await store.head(remote.key)
    if info.version != remote.version:
        raise PreconditionFailed(f"{remote.key} was changed by somebody else", remote.key)
    if inode.remote is remote:
        inode.remote = dataclasses.replace(remote, metadata=info.metadata, headers=info.headers)
    return info


class Clearing:
    """Looks at what an operation would meet."""

    def __init__(
        self,
        store: Store,
        inodes: Inodes,
        changes: Changes,
        deletes: Deletes,
        temporaries: Temporaries,
    ) -> None:
        self.store = store
        self.inodes = inodes
        self.changes = changes
        self.deletes = deletes
        self.temporaries = temporaries

    def directory_first(self, inode: Inode) -> None:
        """Raises Behind where the marker of the directory it is in has still to come, which is asked for.

        SeaweedFS loses a marker that arrives at the same moment as the first object below it.
        """
        parent = inode.parent
        if parent is None or parent.parent is None or not parent.dirty:
            return
        if self.changes.retries.is_failing(parent.number):
            return
        if parent.remote is not None and parent.remote.key == self.inodes.object_key(parent):
            return
        if parent.number not in self.changes.in_flight:
            self.changes.queue(parent)
        raise Behind(parent)

    async def clear(self, inode: Inode, key: str) -> None:
        """Makes sure that `key` may be written now: moves another inode's object out of the way.

        Raises Behind where that one has to go to its own place first, which is asked for unless it is failing.
        """
        for above in self.inodes.displaced.files_above(key):
            await self._clear_above(inode, above)
        other = self.inodes.displaced.get(key)
        if other is None or other is inode or other.remote is None:
            return
        if not other.linked:
            if not other.remote.etag and not other.is_directory:
                await self._look_at_doubtful(other, other.remote)
            else:
                await settle(self.store, self.changes, other)
            if other.opens and other.remote is not None:
                await self._set_aside(other)
            return
        if self._in_circle(inode, other):
            await self._set_aside(other)
            return
        self._bring_soon(other)
        raise Behind(other)

    def _bring_soon(self, other: Inode) -> None:
        """Has another inode brought to the bucket, unless it has a time of its own: it fails, or has to wait."""
        waits = other.remote is not None and self.changes.late.before_delete_s(other.remote.key)
        if not self.changes.retries.is_failing(other.number) and not waits:
            self.changes.queue(other)

    async def _clear_above(self, inode: Inode, key: str) -> None:
        """Raises Behind while the object of a file is where a directory is now, in which the inode's key is.

        MinIO shows nothing of a directory while there is an object of its name. The caller holds that key.
        """
        other = self.inodes.displaced[key]
        if other is inode or other.remote is None:
            return
        if other.linked or other.opens:  # not to its own place: what is there may wait for this inode
            await self._set_aside(other)
            other = self.inodes.displaced.get(key, inode)
        if other is not inode:
            self._bring_soon(other)
            raise Behind(other)

    async def went_by_itself(self, inode: Inode, key: str) -> bool:
        """Whether the object that was to be replaced or deleted at `key` has been replaced or deleted already.

        Then nothing of another inode is there any more, and `inode` can be brought there as a new file.
        """
        other = self.inodes.displaced.get(key)
        if other is None or other is inode or other.linked or other.remote is None:
            return False
        remote = other.remote
        info = await look(self.store, key)
        if other.remote is remote and (info is None or info.version != remote.version):
            with self.changes.journal.transaction():
                self.deletes.forget(other)
        return other.remote is not remote

    async def ended_directory(self, inode: Inode, key: str) -> bool:
        """Whether an empty directory without a marker was at a file's key and is deleted now.

        SeaweedFS keeps the directory of an object that was deleted last below it for minutes, lists it, and refuses a
        file of its name. The caller holds that place. Raises Behind while something of ours is in the directory, and
        MovedOn.
        """
        marker = f"{key}/"
        if inode.is_directory or len(marker.encode()) > MAX_KEY_BYTES:  # S3 refuses it, and has nothing there
            return False
        moment = Moment(self.inodes, inode)
        if self.inodes.displaced.has_below(marker):
            below = [other for at, other in self.inodes.displaced.items() if at.startswith(marker)]
            failing = (other for other in below if self.changes.retries.is_failing(other.number))
            raise Behind(next(failing, below[0]))
        info = await look(self.store, marker)
        if info is None or info.etag != UNMADE_ETAG:
            return False
        page = await self.store.list_page(marker)
        if {entry.key for entry in page.objects}.union(page.prefixes, page.unreadable) - {marker}:
            return False
        moment.check()  # else a directory may have been made here at that key
        await self.store.delete(marker)
        return await look(self.store, marker) is None

    async def _look_at_doubtful(self, other: Inode, remote: ObjectInfo) -> None:
        """Finds out what an operation whose answer was lost has left at a key."""
        info = await look(self.store, remote.key)
        if other.remote is not remote:
            return
        if info is not None and carries(info, expected(remote)):
            other.remote = info
            return
        with self.changes.journal.transaction():
            self.deletes.forget(other)

    def _in_circle(self, inode: Inode, other: Inode) -> bool:
        """Whether bringing `other` to its place would need `inode` to have left its own first."""
        seen = {other.number}
        step: Inode | None = other
        while step is not None and step.linked:
            step = self.inodes.displaced.get(self.inodes.object_key(step))
            if step is inode:
                return True
            if step is not None and step.number in seen:
                return False  # a circle that others will break
            if step is not None:
                seen.add(step.number)
        return False

    async def _set_aside(self, other: Inode) -> None:
        """Copies the object to a temporary key; its old key then belongs to nobody and may be overwritten."""
        await settle(self.store, self.changes, other)
        source = await kept(self.store, other)
        assert source is not None
        copy = await self.temporaries.copy(source, other.token)
        with self.changes.journal.transaction():
            self.temporaries.named(copy.key)
            self.inodes.keep(other)
            self.inodes.displaced.settle(source.key, other)
            other.remote = copy
            self.inodes.displaced.add(other)
            self.changes.record(other)
            self.changes.orphan(source)
