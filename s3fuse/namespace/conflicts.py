"""When somebody else changed the object that a change here is about: both versions survive.

Called by `syncer` when a condition failed or an object is gone. First it finds out whether that was us: an upload
carries a token in its metadata, so one whose answer was lost, or that a crash cut off, is recognised.
"""

from __future__ import annotations

import logging
import random
import socket
import time
from typing import TYPE_CHECKING

from s3fuse import keys
from s3fuse.errors import NotFound, PreconditionFailed, StoreError
from s3fuse.namespace.doubts import adopt, carries, look
from s3fuse.store.base import MAX_KEY_BYTES, UNMADE_ETAG, ObjectInfo
from s3fuse.writing.layers import BASE

if TYPE_CHECKING:
    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.store.base import Store

log = logging.getLogger(__name__)


class Conflicts:
    """Resolves one failed operation at a time; `resolved` lists what came of it for `status`."""

    def __init__(self, store: Store, inodes: Inodes, changes: Changes) -> None:
        self.store = store
        self.inodes = inodes
        self.changes = changes
        self.resolved: list[str] = []

    async def resolve(self, inode: Inode, key: str, error: StoreError) -> ObjectInfo | None:
        """The object at `key` if it is the result of our own operation; else the conflict is dealt with.

        Raises OSError(ESTALE) where the bytes that the change is based on are gone: it then stays in the journal.
        """
        info = await look(self.store, key)
        data = inode.data
        if inode.is_directory:  # its marker holds nothing that could be lost: it is written anew
            self._forget_remote(inode)
            self._again(inode)
            return None
        if info is not None and carries(info, [self.changes.token(inode)]):
            return info
        if info is None and isinstance(error, PreconditionFailed):
            theirs = await self._directory_there(inode, key)
            if theirs is not None:
                self._step_aside(inode, theirs)
                return None
        earlier = [] if data is None else data.outdated_tokens
        if info is not None and carries(info, [inode.token, *earlier]) and not self._is_known(inode, info):
            self._come_on_top(inode, info)
            return None
        if data is None or not data.layers:
            await self._object_changed(inode, key, info)
        elif inode.remote is not None and any(piece.source == BASE for piece in data.pieces(0, data.size)):
            raise OSError(116, f"version {inode.remote.etag}, which this change is based on, is gone") from error
        elif info is None:  # deleted by somebody else: our version is a new file
            self._forget_remote(inode)
            self._again(inode)
        else:
            self._step_aside(inode, info)
        return None

    async def _directory_there(self, inode: Inode, key: str) -> ObjectInfo | None:
        """Somebody else's directory where the inode's object was to be made: SeaweedFS has one of the two only."""
        marker = f"{key}/"
        if (inode.remote is not None and inode.remote.key == key) or len(marker.encode()) > MAX_KEY_BYTES:
            return None
        page = await self.store.list_page(marker)
        info: ObjectInfo | None = ObjectInfo(marker, 0, "", 0)
        if not {entry.key for entry in page.objects}.union(page.prefixes) - {marker}:
            info = await look(self.store, marker)
            if info is not None and info.etag == UNMADE_ETAG:  # what is left of one, or begins to be one
                return None
        # What is there may also be, or go with, something of ours.
        if self.inodes.displaced.has_below(marker) or any(held.startswith(marker) for held in self.inodes.claimed):
            return None
        return info if self.changes.late.is_over else None

    @staticmethod
    def _is_known(inode: Inode, info: ObjectInfo) -> bool:
        return inode.remote is not None and (inode.remote.key, inode.remote.etag) == (info.key, info.etag)

    def _come_on_top(self, inode: Inode, info: ObjectInfo) -> None:
        """An earlier operation of ours, whose answer was lost, has written the object: this one follows it."""
        before = inode.remote
        with self.changes.journal.transaction():
            if before is not None and before.key != info.key:
                self.inodes.displaced.settle(before.key, inode)
                self.changes.orphan(before)
            adopt(self.changes, inode, info)
            if inode.data is not None:
                inode.data.base_bytes = info.size_bytes
        self.changes.queue(inode)

    async def _object_changed(self, inode: Inode, key: str, info: ObjectInfo | None) -> None:
        """Only name or attributes changed here, and the object was changed elsewhere: they go onto its new version."""
        remote = inode.remote
        if info is not None and (remote is None or remote.key != key):
            self._step_aside(inode, info)
            return
        if remote is None:
            raise PreconditionFailed(f"{key} cannot be written: its state in the bucket keeps changing", key)
        try:
            current = info or await self.store.head(remote.key)
        except NotFound:
            log.warning("%s was deleted by somebody else while it was renamed or its attributes were changed", key)
            with self.changes.journal.transaction():
                self._forget_remote(inode)
                self.changes.synced(inode, inode.version)
            self.inodes.detach(inode)
            return
        if current.etag == remote.etag:
            inode.remote = current
            self._again(inode)
        else:
            self._succeed(inode, current)

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
        self.inodes.drop_if_unused(inode)

    def _forget_remote(self, inode: Inode) -> None:
        self.inodes.keep(inode)
        if inode.remote is not None:
            self.inodes.displaced.settle(inode.remote.key, inode)
            inode.remote = None

    def _again(self, inode: Inode) -> None:
        self.changes.record(inode)
        self.changes.queue(inode)

    def _step_aside(self, inode: Inode, theirs: ObjectInfo) -> None:
        """The bucket's version keeps the name, ours goes beside it."""
        parent = inode.parent
        assert parent is not None
        name = keys.conflict_name(inode.name, socket.gethostname(), time.time())
        while name in parent.children:
            name = keys.conflict_name(inode.name, f"{socket.gethostname()}-{random.randrange(1000)}", time.time())
        log.warning(
            "%s was changed by somebody else (%s); the version of this mount is now %s", theirs.key, theirs.etag, name
        )
        self.resolved.append(f"{theirs.key} -> {name}")
        if inode.remote is not None and inode.remote.key == theirs.key:
            self._forget_remote(inode)
        inode.maybe_at = None
        self.changes.moved(inode, parent, name)
        reason = f"{theirs.key} was changed by somebody else; this version is kept as {name}"
        self.changes.failed(inode, reason, for_good=False)
        self.changes.queue(inode)
        parent.folder().complete = False
