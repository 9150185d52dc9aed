"""What the operations of one mount share: its parts, its limits, and how full they are."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s3fuse.config import MountConfig
    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.directories import Directories
    from s3fuse.namespace.inodes import Inodes
    from s3fuse.namespace.known import Known
    from s3fuse.namespace.syncer import Syncer
    from s3fuse.reading.blocks import BlockCache
    from s3fuse.vfs.budget import Budget
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
    budget: Budget
    known: Known

    def check_changeable(self, rows: int = 1) -> None:
        """Raises EROFS, or ENOSPC where a change of so many inodes could not be recorded."""
        self.check_writable()
        self.changes.journal.check_room(rows)

    def check_writable(self) -> None:
        if self.config.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
