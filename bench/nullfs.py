"""A filesystem that does nothing: what one FUSE request costs in Python. python -m bench.nullfs MOUNTPOINT

Names and sizes are in dicts, contents are zeros, and it waits for requests as s3fuse does (`fuse.wait`), so what
s3fuse costs above it is s3fuse's own work.
"""

from __future__ import annotations

import errno
import stat
import sys
from typing import TYPE_CHECKING, cast

import pyfuse3
import trio

from s3fuse.fuse.wait import quick_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyfuse3 import EntryAttributes, FileInfo, ReaddirToken, RequestContext, SetattrFields

ZEROS = memoryview(bytes(1 << 20))
DIRECTORY = stat.S_IFDIR | 0o755


class Null(pyfuse3.Operations):
    """Every answer is ready at once and good for a minute."""

    enable_writeback_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.modes = {1: DIRECTORY}
        self.sizes = {1: 0}
        self.names: dict[int, dict[bytes, int]] = {1: {}}

    def _entry(self, inode: int) -> EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode, entry.st_size = self.modes[inode], self.sizes[inode]
        entry.attr_timeout = entry.entry_timeout = 60
        return entry

    def _add(self, parent: int, name: bytes, mode: int) -> int:
        inode = len(self.modes) + 1
        self.modes[inode], self.sizes[inode] = mode, 0
        self.names[parent][name] = inode
        if stat.S_ISDIR(mode):
            self.names[inode] = {}
        return inode

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = self.names[parent_inode].get(name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry(inode)

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if fields.update_size:
            self.sizes[inode] = attr.st_size
        return self._entry(inode)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._add(parent_inode, name, stat.S_IFDIR | mode))

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        inode = self._add(parent_inode, name, stat.S_IFREG | mode)
        return pyfuse3.FileInfo(fh=inode), self._entry(inode)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return cast("bytes", ZEROS[: max(0, min(size, self.sizes[fh] - off))])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self.sizes[fh] = max(self.sizes[fh], off + len(buf))
        return len(buf)

    async def flush(self, fh: int) -> None: ...

    async def release(self, fh: int) -> None: ...

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        for cookie, (name, inode) in enumerate(list(self.names[fh].items())[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._entry(inode), cookie):
                return

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        del self.names[parent_inode][name]

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        raise pyfuse3.FUSEError(errno.ENODATA)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None: ...


def main() -> None:
    pyfuse3.init(Null(), sys.argv[1], set(pyfuse3.default_options) | {"fsname=null", "subtype=null"})
    try:
        with quick_device():
            trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
