"""link(2) as a copy.

A bucket has no second name for an object, so that a true hard link would be visible in one mount only, or unreadable
for every other tool. What most programs want of link(2) is a whole file under a new name that nobody has: images have
hard links to save space, mail and package tools use them to put a file in place. A copy gives that. From then on it is
a file of its own, and st_nlink stays 1, which tells so.
"""

from __future__ import annotations

import errno
import stat
import time
from typing import TYPE_CHECKING

from s3fuse.vfs.names import fail

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode
    from s3fuse.vfs.attributes import AttributeOperations
    from s3fuse.vfs.core import Core
    from s3fuse.vfs.files import Files
    from s3fuse.vfs.names import Names

#: A file up to this size appears under its new name at once and whole, as link(2) promises.
AT_ONCE_BYTES = 16 << 20
_STEP_BYTES = 1 << 20
_ATTEMPTS = 3


class Links:
    """link(2). Raises OSError with the errno that the program gets, or StoreError."""

    def __init__(self, core: Core, names: Names, files: Files, attributes: AttributeOperations) -> None:
        self.core = core
        self.names = names
        self.files = files
        self.attributes = attributes

    async def link(self, source: Inode, parent: Inode, name: bytes) -> Inode:
        """A copy of a file under a free name.

        EPERM where the mount refuses links, or somebody has the file open for writing: the kernel may hold what was
        written, and the copy would lack it.
        """
        if self.core.config.hard_links == "refuse" or source.is_directory:
            fail(errno.EPERM, source.name)
        await self.attributes.getattr(source)
        if stat.S_ISLNK(source.mode):
            target = await self.attributes.readlink(source)
            return self._like(source, await self.names.symlink(parent, name, target, source.uid, source.gid))
        if not source.is_regular:
            made = await self.names.mknod(parent, name, source.mode, source.rdev, source.uid, source.gid)
            return self._like(source, made)
        reading = self.files.open_known(source, writes=False)
        try:
            for _ in range(_ATTEMPTS):
                if not source.writers and (copy := await self._copy(source, reading, parent, name)) is not None:
                    return self._like(source, copy)
        finally:
            self.files.release(reading)
        raise OSError(errno.EPERM, "it is open for writing", source.name)

    async def _copy(self, source: Inode, reading: int, parent: Inode, name: bytes) -> Inode | None:
        """The copy; None where the source changed meanwhile, and then there is none."""
        before, size = (source.ctime_ns, source.writes), source.size
        head = await self.files.read(reading, 0, min(size, AT_ONCE_BYTES))
        copy = await self.names.create(parent, name, source.mode, source.uid, source.gid)
        writing = self.files.open_known(copy, writes=True)
        whole = False
        try:
            if size:
                await self.files.write(writing, 0, bytes(head))
            for offset in range(len(head), size, _STEP_BYTES):
                data = await self.files.read(reading, offset, min(_STEP_BYTES, size - offset))
                await self.files.write(writing, offset, bytes(data))
            whole = ((source.ctime_ns, source.writes), source.size, source.writers) == (before, size, 0)
        finally:
            if not whole and copy.linked:
                self.names.remove(copy)
            self.files.release(writing)
        return copy if whole else None

    def _like(self, source: Inode, copy: Inode) -> Inode:
        try:
            with self.core.changes.journal.transaction():
                self.core.inodes.keep(copy)
                copy.set_attributes(source.attributes())
                copy.ctime_ns = time.time_ns()
                self.core.changes.changed(copy)
        except BaseException:
            if copy.linked:
                self.names.remove(copy)
            raise
        return copy
