"""stat, chmod, chown, utimens, xattrs, readlink, statfs."""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from s3fuse import attrs, waits
from s3fuse.namespace.changes import TOKEN
from s3fuse.session import operations

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode
    from s3fuse.vfs.core import Core
    from s3fuse.vfs.files import Files

#: What statfs answers: larger than any program asks for, far from overflowing a signed 64-bit count of bytes.
FREE_BYTES = 1 << 50
FREE_INODES = 1 << 40
SERVED_XATTRS = ("user.", "trusted.", "security.")


@dataclass(slots=True)
class Wanted:
    """What a setattr asks to change; None = leave. Times may be any, and are kept as `attrs.clamp_ns` gives them."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None


class AttributeOperations:
    """Operations on attributes. All raise OSError with the errno that the program gets, or StoreError."""

    def __init__(self, core: Core, files: Files) -> None:
        self.core = core
        self.files = files

    async def getattr(self, inode: Inode) -> None:
        """Returns when the inode's attributes are fresh. Raises ESTALE where its version is no longer in the tree."""
        await self.core.directories.refresh(inode)

    async def setattr(self, inode: Inode, wanted: Wanted) -> None:
        self.core.check_changeable()
        if wanted.size is not None and not inode.is_regular:
            raise OSError(errno.EISDIR if inode.is_directory else errno.EINVAL, "cannot be truncated", inode.name)
        if not inode.attributes_known:
            await self.core.directories.refresh(inode)
        now = time.time_ns() if wanted.ctime_ns is None else attrs.clamp_ns(wanted.ctime_ns)
        is_held = inode.data is not None and inode.data.is_held  # cutting it to what length it seems to have heals
        resized = wanted.size is not None and (wanted.size != inode.size or is_held)
        if not resized and self._wanted(inode, wanted) == self._values(inode):
            inode.ctime_ns = now  # sent again by the kernel with each flush; alone it is not worth a request
            return
        with self.core.changes.journal.transaction():
            self.core.inodes.keep(inode)
            if wanted.size is not None and resized:
                self.files.truncate(inode, wanted.size)
            inode.mode, inode.uid, inode.gid, inode.atime_ns, inode.mtime_ns = self._wanted(inode, wanted)
            if wanted.mtime_ns is not None:
                inode.entries_changed_ns = 0
            inode.ctime_ns = now
            self._changed(inode)

    @staticmethod
    def _values(inode: Inode) -> tuple[int, int, int, int, int]:
        return inode.mode, inode.uid, inode.gid, inode.atime_ns, inode.mtime_ns

    @staticmethod
    def _wanted(inode: Inode, wanted: Wanted) -> tuple[int, int, int, int, int]:
        """The `_values` that the inode is to have."""
        return (
            inode.mode if wanted.mode is None else stat.S_IFMT(inode.mode) | stat.S_IMODE(wanted.mode),
            inode.uid if wanted.uid is None else wanted.uid,
            inode.gid if wanted.gid is None else wanted.gid,
            inode.atime_ns if wanted.atime_ns is None else attrs.clamp_ns(wanted.atime_ns),
            inode.mtime_ns if wanted.mtime_ns is None else attrs.clamp_ns(wanted.mtime_ns),
        )

    def _changed(self, inode: Inode) -> None:
        if inode.linked:
            self.core.changes.changed(inode)
        elif inode.known is not None:
            inode.known.changed(inode)

    async def readlink(self, inode: Inode) -> bytes:
        """A symlink's target, fetched once where only its object has it."""
        if not stat.S_ISLNK(inode.mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), inode.name)
        if inode.target is None:
            remote = inode.remote
            if remote is None or remote.size_bytes > 4095:
                raise OSError(errno.EIO, "the object holds no symlink target", inode.name)
            buffer = bytearray(remote.size_bytes)
            if buffer:
                with waits.interruptible():
                    await self.core.directories.store.get_into(
                        remote.key, 0, [memoryview(buffer)], etag=remote.etag, size_bytes=remote.size_bytes
                    )
            if not buffer or b"\0" in buffer:
                raise OSError(errno.EIO, "the object holds no symlink target", inode.name)
            inode.target = bytes(buffer)
        return inode.target

    async def getxattr(self, inode: Inode, name: bytes) -> bytes:
        """Raises ENODATA. Answered from memory where attributes are known: each write(2) asks for a capability."""
        if not inode.attributes_known:
            await self.core.directories.refresh(inode)
        text = name.decode("utf-8", "surrogateescape")
        if text in SERVED_XATTRS:  # a prefix with nothing after it
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), inode.name)
        value = inode.xattrs.get(text)
        if value is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), inode.name)
        return value

    async def listxattr(self, inode: Inode) -> list[bytes]:
        await self.core.directories.refresh(inode)
        return [name.encode("utf-8", "surrogateescape") for name in inode.xattrs]

    async def setxattr(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Raises ENOTSUP for system attributes (ACLs), ENOSPC where S3's metadata limit would be exceeded."""
        self.core.check_changeable()
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise OSError(errno.EINVAL, "xattr names are UTF-8 here", inode.name) from None
        if text in SERVED_XATTRS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), inode.name)
        if not text.startswith(SERVED_XATTRS):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), inode.name)
        await self.core.directories.refresh(inode)
        kept = (inode.remote.metadata if inode.remote is not None else None) or {}
        xattrs = {**inode.xattrs, text: value}
        attrs.encode(replace(inode.attributes(), xattrs=xattrs), {**kept, TOKEN: "x" * 24})
        self._set_xattrs(operations.SETXATTR, inode, name, xattrs)

    def _set_xattrs(self, operation: int, inode: Inode, name: bytes, xattrs: dict[str, bytes]) -> None:
        with self.core.known.step(operation, inode.number, name):
            self.core.inodes.keep(inode)
            inode.xattrs, inode.ctime_ns = xattrs, time.time_ns()
            self._changed(inode)

    async def removexattr(self, inode: Inode, name: bytes) -> None:
        self.core.check_changeable()
        await self.getxattr(inode, name)
        left = {key: value for key, value in inode.xattrs.items() if key != name.decode()}
        self._set_xattrs(operations.REMOVEXATTR, inode, name, left)
