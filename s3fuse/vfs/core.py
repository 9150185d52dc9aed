"""What the operations of one mount share: its parts, its limits, and how full they are."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from s3fuse.config import MountConfig
    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.directories import Directories
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.namespace.syncer import Syncer
    from s3fuse.reading.blocks import BlockCache
    from s3fuse.writing.staging import Staging


@dataclass
class Core:
    """The parts of one mount, made and ended by `mount`."""

    config: MountConfig
    inodes: Inodes
    directories: Directories
    changes: Changes
    staging: Staging
    syncer: Syncer
    blocks: BlockCache
    #: How far above its limit dirty data may be: while the mount ends, as much as the kernel may hold of it.
    extra_dirty_bytes: int = 0

    def check_writable(self) -> None:
        if self.config.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def over_budget(self) -> bool:
        return self.staging.staged_bytes >= self.config.dirty_size_bytes + self.extra_dirty_bytes

    async def wait_for_budget(self, writing: Inode) -> None:
        """Returns when less is dirty than the limit, or when only files that are still open hold it.

        Staged bytes of an open file cannot leave before it is closed or synced, so waiting for them would hang.
        """
        while self.over_budget():
            waiting = [
                i for i in self.changes.dirty.values() if i is not writing and i.data is not None and not i.writers
            ]
            if not waiting:
                return
            for inode in waiting:
                if inode.error is None:
                    self.changes.queue(inode)
            await self.changes.attempted(waiting[0])
            await trio.lowlevel.checkpoint()
