"""When somebody else changed the object that a change here is about: both versions survive.

Called by `syncer` when a condition failed or an object is gone. First it finds out whether that was us: an upload
carries a token in its metadata, so one whose answer was lost, or that a crash cut off, is recognised.
"""

from __future__ import annotations

import errno
import logging
import random
import socket
import time
from typing import TYPE_CHECKING

from s3fuse import keys
from s3fuse.errors import PreconditionFailed, StoreError
from s3fuse.namespace.bases import base_ranges
from s3fuse.namespace.doubts import adopt, carries, look
from s3fuse.namespace.moment import Moment
from s3fuse.store.base import MAX_KEY_BYTES, UNMADE_ETAG, ObjectInfo

if TYPE_CHECKING:
    from s3fuse.namespace.bases import Bases
    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.store.base import Store
    from s3fuse.tree.stale import StaleNames
    from s3fuse.writing.dirty import DirtyFile

log = logging.getLogger(__name__)

#: `resolved` has so many; the log has all.
MOST_TOLD = 1000


class Conflicts:
    """Resolves one failed operation at a time; `resolved` lists what came of the last ones for `status`.

    Nothing is decided by an answer about an inode that was renamed, removed or written anew while it was waited for:
    every method that awaits raises MovedOn then.
    """

    def __init__(self, store: Store, inodes: Inodes, changes: Changes, bases: Bases, stale: StaleNames) -> None:
        self.store = store
        self.inodes = inodes
        self.changes = changes
        self.bases = bases
        self.stale = stale
        self.resolved: list[str] = []

    async def resolve(self, inode: Inode, key: str, error: StoreError) -> ObjectInfo | None:
        """The object at `key`, the inode's, if it is the result of our own operation; else the conflict is dealt with.

        Raises StoreError, OSError and MovedOn; then nothing has changed but what is staged.
        """
        moment = Moment(self.inodes, inode)
        info = await look(self.store, key)
        moment.check()
        data = inode.data
        if inode.is_directory:  # its marker holds nothing that could be lost: it is written anew
            self._forget_remote(inode)
            self._again(inode)
            return None
        if info is not None and carries(info, [self.changes.token(inode)]):
            return info
        if info is None and isinstance(error, PreconditionFailed):
            theirs = await self._directory_there(inode, key)
            moment.check()
            if theirs is not None:
                self._step_aside(inode, theirs)
                return None
        earlier = [] if data is None else data.outdated_tokens
        if info is not None and carries(info, [inode.token, *earlier]) and not self._is_known(inode, info):
            self._come_on_top(inode, info)
        elif data is None or not data.layers:
            await self._object_changed(inode, key, info)
        else:
            await self._written_here(inode, data, key, info)
        return None

    async def _written_here(self, inode: Inode, data: DirtyFile, key: str, info: ObjectInfo | None) -> None:
        """Both versions survive: what others made keeps its name, what was written here is made whole.

        `info` is what is at the key now.
        """
        base, moment = inode.remote, Moment(self.inodes, inode)
        if data.parked.packs:  # the oldest layer is on its way to where it is parked, as it is
            self._again(inode)
            return
        if base is not None:
            there = info if base.key == key else await look(self.store, base.key)
            moment.check()
            if there is None or there.version != base.version:
                if base_ranges(data) and data.give_up_oldest():
                    self._again(inode)  # all of it was written over since: nobody needs that base
                    return
                if base_ranges(data) and not await self.bases.keep(inode, base):
                    await self._mix(inode, there)
                    return
                self._forget_remote(inode)
            elif info is there:  # what failed was something else
                info = None
        if info is None:  # there is nothing of others under the name
            self._again(inode)
        else:
            self._step_aside(inode, info)

    async def _mix(self, inode: Inode, theirs: ObjectInfo | None) -> None:
        """What was written here goes over what others made of the rest, under a name that says so."""
        base = inode.remote
        assert base is not None
        if theirs is not None:
            copy = await self.bases.copied(inode, theirs)
            with self.changes.journal.transaction():
                self.bases.put_below(inode, copy)
                self._step_aside(inode, theirs, "the bytes that were not written here are those of the other version")
        else:
            with self.changes.journal.transaction():
                self.bases.put_below(inode, None)
                self._step_aside(inode, base, "the bytes that were not written here are gone: zeros are in their place")

    async def _directory_there(self, inode: Inode, key: str) -> ObjectInfo | None:
        """Somebody else's directory where the inode's object was to be made: SeaweedFS has one of the two only."""
        marker = f"{key}/"
        if (inode.remote is not None and inode.remote.key == key) or len(marker.encode()) > MAX_KEY_BYTES:
            return None
        page = await self.store.list_page(marker)
        info: ObjectInfo | None = ObjectInfo(marker, 0, "", 0)
        if not {entry.key for entry in page.objects}.union(page.prefixes, page.unreadable) - {marker}:
            info = await look(self.store, marker)
            if info is not None and info.etag == UNMADE_ETAG:  # what is left of one, or begins to be one
                return None
        # What is there may also be, or go with, something of ours.
        if self.inodes.displaced.has_below(marker) or any(held.startswith(marker) for held in self.inodes.claimed):
            return None
        return info if self.changes.late.is_over else None

    @staticmethod
    def _is_known(inode: Inode, info: ObjectInfo) -> bool:
        return inode.remote is not None and inode.remote.version == info.version

    def _come_on_top(self, inode: Inode, info: ObjectInfo) -> None:
        """An earlier operation of ours, whose answer was lost, has written the object: this one follows it."""
        before = inode.remote
        with self.changes.journal.transaction():
            if before is not None and before.key != info.key:
                self.inodes.displaced.settle(before.key, inode)
                self.changes.orphan(before)
            adopt(self.changes, inode, info)
            if inode.data is not None:
                inode.data.set_base(info.size_bytes)
        self.changes.queue(inode)

    async def _object_changed(self, inode: Inode, key: str, info: ObjectInfo | None) -> None:
        """Only name or attributes changed here, and the object was changed elsewhere: they go onto its new version."""
        remote, moment = inode.remote, Moment(self.inodes, inode)
        if info is not None and (remote is None or remote.key != key):
            self._step_aside(inode, info)
            return
        if remote is None:
            self._again(inode)
            return
        current = info or await look(self.store, remote.key)
        moment.check()
        if current is not None and current.version == remote.version:
            inode.remote = current
            self._again(inode)
        elif current is not None and inode.writers and remote.key == key:
            version = inode.version
            await self.bases.pass_on(inode, current)
            with self.changes.journal.transaction():
                self.changes.synced(inode, version)
        elif inode.writers:  # what they write must not go with the old version
            raise OSError(errno.ESTALE, f"{remote.key} was changed by somebody else while it is open for writing here")
        elif current is not None:
            self._succeed(inode, current)
        else:
            log.warning("%s was deleted by somebody else while it was renamed or its attributes were changed", key)
            with self.changes.journal.transaction():
                self._forget_remote(inode)
                self.changes.synced(inode, inode.version)
            self.inodes.detach(inode)

    def _succeed(self, inode: Inode, current: ObjectInfo) -> None:
        """The name and attributes go on as another inode with the new version; open handles keep the old one."""
        parent, name = inode.parent, inode.name
        assert parent is not None
        with self.changes.journal.transaction():
            if inode.remote is not None:
                self.inodes.displaced.settle(inode.remote.key, inode)
            self.inodes.unlink(inode)
            self.changes.synced(inode, inode.version)
            heir = self.inodes.add(parent, name, inode.attributes())
            heir.remote, heir.size = current, current.size_bytes
            self.inodes.displace_if_moved(heir)
            self.changes.record(heir)
        self.changes.queue(heir)
        self.stale.add(parent.number, name)
        self.inodes.drop_if_unused(inode)

    def _forget_remote(self, inode: Inode) -> None:
        self.inodes.keep(inode)
        if inode.remote is not None:
            self.inodes.displaced.settle(inode.remote.key, inode)
            inode.remote = None
            if inode.data is not None:
                inode.data.set_base(0)

    def _again(self, inode: Inode) -> None:
        self.changes.record(inode)
        self.changes.queue(inode)

    def _step_aside(self, inode: Inode, theirs: ObjectInfo, note: str = "") -> None:
        """The bucket's version keeps the name, ours goes beside it; `note` says what our file has of others."""
        parent = inode.parent
        assert parent is not None
        name = keys.conflict_name(inode.name, socket.gethostname(), time.time())
        while name in parent.children:
            name = keys.conflict_name(inode.name, f"{socket.gethostname()}-{random.randrange(1000)}", time.time())
        but = f"; {note}" if note else ""
        log.warning(
            "%s was changed by somebody else (%s); the version of this mount is now %s%s",
            theirs.key,
            theirs.etag,
            name,
            but,
        )
        self.resolved.append(f"{theirs.key} -> {name}{but}")
        del self.resolved[:-MOST_TOLD]
        if inode.remote is not None and inode.remote.key == theirs.key:
            self._forget_remote(inode)
        inode.maybe_at = None
        self.stale.add(parent.number, inode.name)
        self.changes.moved(inode, parent, name)
        reason = f"{theirs.key} was changed by somebody else; this version is kept as {name}{but}"
        self.changes.failed(inode, reason, for_good=False)
        self.changes.queue(inode)
        parent.folder().complete = False
