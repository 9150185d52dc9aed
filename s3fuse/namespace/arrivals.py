"""Waiting until what is dirty has arrived in the bucket: fsync, flush, unmount. The syncer does the work."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.deletes import Deletes
    from s3fuse.namespace.inodes import Inode, Inodes


class Arrivals:
    """Waits for inodes."""

    def __init__(self, inodes: Inodes, changes: Changes, deletes: Deletes) -> None:
        self._inodes = inodes
        self._changes = changes
        self._deletes = deletes

    async def sync(self, inode: Inode) -> None:
        """Returns when the bucket has the inode as it is now. Raises OSError(EIO) when an attempt fails.

        For a file that was unlinked there may be nothing to wait for: see `_can_arrive`.
        """
        wanted = inode.version
        while inode.synced_version < wanted and self._can_arrive(inode):
            self._changes.queue(inode)
            await self._changes.attempted(inode)
            if inode.error is not None:
                raise OSError(errno.EIO, inode.error, inode.name)

    def _can_arrive(self, inode: Inode) -> bool:
        """Not so for an unlinked inode that goes only with its last close, or when the next one of its name comes."""
        return inode.linked or self._deletes.may_go(inode)

    async def sync_names(self, directory: Inode) -> None:
        """Returns when the bucket has the directory and every name that was made, moved or removed in it."""
        prefix = self._inodes.key(directory)
        for _ in range(2):  # what was renamed away leaves, once copied, an object that is still to be deleted
            dirty = self._changes.dirty.values()
            mine = [inode for inode in dirty if not inode.writers and self._names(inode, directory, prefix)]
            for inode in mine:
                self._changes.queue(inode)
            for inode in mine:
                await self.sync(inode)

    @staticmethod
    def _names(inode: Inode, directory: Inode, prefix: str) -> bool:
        """Whether the inode is the directory, is in it, or has its object in it still."""
        remote = inode.remote
        if remote is None or inode.opens or not remote.key.startswith(prefix):
            return inode is directory or (inode.linked and inode.parent is directory)
        return "/" not in remote.key[len(prefix) :].rstrip("/")

    async def drain(self, progress: Callable[[], None] = lambda: None, *, give_up: bool = False) -> list[Inode]:
        """Brings everything that is dirty now to the bucket and gives what the server refuses for good.

        With `give_up` one failed attempt of any kind ends the wait for an inode.
        """
        failed: list[Inode] = []
        waited: set[int] = set()
        for again in (False, True):  # what was moved leaves, once copied, an object that is still to be deleted
            dirty = self._changes.dirty.values()
            pending = [i for i in dirty if i.number not in waited and not (again and i.linked)]
            failed += await self._bring_all(pending, progress, give_up=give_up)
            waited.update(inode.number for inode in pending)
        return failed

    async def _bring_all(self, inodes: list[Inode], progress: Callable[[], None], *, give_up: bool) -> list[Inode]:
        pending = [(inode, inode.version) for inode in inodes]
        failed: list[Inode] = []
        for inode, _ in pending:
            self._changes.retries.ended_well(inode.number)
            inode.error = None
            self._changes.queue(inode)  # all at once; one by one below they are only waited for
        for inode, version in pending:
            while inode.synced_version < version and self._can_arrive(inode):
                retries = self._changes.retries
                if retries.is_hopeless(inode.number) or (give_up and retries.is_failing(inode.number)):
                    failed.append(inode)
                    break
                if inode.error is None:
                    self._changes.queue(inode)
                await self._changes.attempted(inode)
                progress()
        return failed
