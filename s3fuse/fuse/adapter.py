"""The kernel's requests as calls of `vfs`: decode, one call, encode. No decisions are made here."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, cast

import pyfuse3

from s3fuse import waits
from s3fuse.errors import StoreError
from s3fuse.fuse.errno import answers
from s3fuse.fuse.listings import Listings
from s3fuse.fuse.repeats import Repeats
from s3fuse.fuse.signals import process_threads
from s3fuse.session import operations
from s3fuse.session.records import Opened
from s3fuse.vfs.attributes import FREE_BYTES, FREE_INODES, AttributeOperations, Wanted
from s3fuse.vfs.files import Files
from s3fuse.vfs.links import Links
from s3fuse.vfs.names import Names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pyfuse3 import EntryAttributes, FileInfo, ReaddirToken, RequestContext, SetattrFields, StatvfsData

    from s3fuse.namespace.inodes import Inode
    from s3fuse.vfs.core import Core

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096


class Adapter(pyfuse3.Operations):
    """One mount. Lookup counts follow the kernel's rules: each entry given to it counts one, forget takes them back."""

    supports_dot_lookup = True
    enable_writeback_cache = True

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.inodes = core.inodes
        self.known = core.known
        self.repeats = Repeats(core.known)
        self.names = Names(core)
        self.files = Files(core)
        self.attributes = AttributeOperations(core, self.files)
        self.links = Links(core, self.names, self.files, self.attributes)
        self.listings = Listings(core, self.names)
        self._openers: dict[int, tuple[int, int]] = {}  # handle -> its inode and the thread that opened it
        for opened in core.known.opened.values():  # by the process before this one
            inode = self.inodes[opened.number]
            self._openers[opened.handle] = (opened.number, opened.pid)
            if inode.is_directory:
                self.listings.restore(opened.handle, inode, core.known.places.get(opened.handle, ()))
            else:
                self.files.restore(opened.handle, inode, opened.writes)

    def _opened(self, handle: int, inode: Inode, flags: int, ctx: RequestContext, *, writes: bool = False) -> int:
        self._openers[handle] = (inode.number, ctx.pid)
        self.known.handle_given(inode, Opened(handle, inode.number, ctx.pid, flags, writes))
        return handle

    def _give(self, handle: int, inode: Inode, flags: int, ctx: RequestContext, *, writes: bool) -> None:
        """`_opened` for a file; where that fails nobody has it open."""
        try:
            self._opened(handle, inode, flags, ctx, writes=writes)
        except BaseException:
            self._openers.pop(handle, None)
            self.files.release(handle)
            raise

    def threads(self, fh: int) -> Iterable[int]:
        """The threads that a request on this handle may be for: those of the process that opened it."""
        return process_threads(self._openers[fh][1]) if fh in self._openers else ()

    def _writers(self, fh: int) -> Iterator[int]:
        """The threads that may wait for a write: the kernel writes by any handle what was written by all of a file."""
        written = self._openers[fh][0] if fh in self._openers else 0
        for thread in {thread for inode, thread in self._openers.values() if inode == written}:
            yield from process_threads(thread)

    # -- encoding

    def _entry(self, inode: Inode) -> EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode.number
        entry.st_mode = inode.mode
        entry.st_uid, entry.st_gid = inode.uid, inode.gid
        entry.st_size = inode.size
        entry.st_blocks = -(-inode.size // 512)
        entry.st_rdev = inode.rdev
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = inode.atime_ns, inode.mtime_ns, inode.ctime_ns
        if not inode.linked:
            entry.st_nlink = 0
        elif inode.listing is not None:
            entry.st_nlink = 2
        timeout = self.core.config.attr_ttl_s
        if not inode.attributes_known:  # the kernel asks again before it shows or checks any of them
            timeout = 0.0
        elif not inode.dirty:
            timeout = max(0.0, min(timeout, inode.valid_until - time.monotonic()))
        entry.attr_timeout = entry.entry_timeout = timeout
        return entry

    def _known(self, inode: Inode) -> EntryAttributes:
        """The entry of an inode whose number the kernel gets with this answer."""
        inode.lookups += 1
        try:
            self.known.counted(inode)
            return self._entry(inode)
        except BaseException:  # it gets an error instead
            inode.lookups -= 1
            raise

    async def _made(self, number: int, parent: int, name: bytes) -> Inode:
        """The inode that an earlier process made for a request and did not tell of."""
        inode = self.inodes.table.get(number) or await self.names.lookup(self.inodes[parent], name)
        if inode is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return inode

    def _new(self, inode: Inode) -> EntryAttributes:
        """The entry of an inode that was just made; one that was made by an earlier process may be counted already."""
        return self._entry(inode) if inode.lookups else self._known(inode)

    # -- names

    @answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self.inodes[parent_inode]
        inode = await self.names.lookup(parent, name)
        if inode is not None:
            return self._known(inode)
        absent = pyfuse3.EntryAttributes()
        absent.st_ino = 0
        absent.entry_timeout = self.core.directories.absent_for_s(parent, name)
        return absent

    @answers
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        done = self.repeats.done(operations.CREATE, parent_inode, name)
        if done is None:
            inode = await self.names.create(self.inodes[parent_inode], name, mode & ~ctx.umask, ctx.uid, ctx.gid)
            handle = None
        else:
            inode = await self._made(done, parent_inode, name)
            handle = next((at for at, opened in self.files.handles.items() if opened.inode is inode), None)
        if handle is None:
            handle = self.files.open_known(inode, writes=True)
            self._give(handle, inode, flags, ctx, writes=True)
        return pyfuse3.FileInfo(fh=handle, keep_cache=True), self._new(inode)

    @answers
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        if (done := self.repeats.done(operations.MKDIR, parent_inode, name)) is not None:
            return self._new(await self._made(done, parent_inode, name))
        return self._known(await self.names.mkdir(self.inodes[parent_inode], name, mode & ~ctx.umask, ctx.uid, ctx.gid))

    @answers
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        if (done := self.repeats.done(operations.MKNOD, parent_inode, name)) is not None:
            return self._new(await self._made(done, parent_inode, name))
        return self._known(
            await self.names.mknod(self.inodes[parent_inode], name, mode & ~ctx.umask, rdev, ctx.uid, ctx.gid)
        )

    @answers
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        if (done := self.repeats.done(operations.SYMLINK, parent_inode, name)) is not None:
            return self._new(await self._made(done, parent_inode, name))
        return self._known(await self.names.symlink(self.inodes[parent_inode], name, target, ctx.uid, ctx.gid))

    @answers
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self.inodes[new_parent_inode]
        if (done := self.repeats.done(operations.LINK, parent.number, new_name)) is not None:
            return self._new(await self._made(done, parent.number, new_name))
        if self.repeats.is_half_linked(parent.number, new_name):
            with contextlib.suppress(FileNotFoundError):
                await self.names.unlink(parent, new_name)
        made = await self.links.link(self.inodes[inode], parent, new_name)
        with self.known.step(operations.LINK, parent.number, new_name, made.number):
            pass  # a copy takes several steps, and is one from here on
        return self._known(made)

    @answers
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        if self.repeats.done(operations.UNLINK, parent_inode, name) is None:
            await self.names.unlink(self.inodes[parent_inode], name)

    @answers
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        if self.repeats.done(operations.RMDIR, parent_inode, name) is None:
            await self.names.rmdir(self.inodes[parent_inode], name)

    @answers
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        what = operations.renaming(name_old, parent_inode_new, name_new)
        if self.repeats.done(operations.RENAME, parent_inode_old, what) is not None:
            return
        await self.names.rename(self.inodes[parent_inode_old], name_old, self.inodes[parent_inode_new], name_new, flags)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self.forgotten(inode_list)

    def forgotten(self, counts: Sequence[tuple[int, int]]) -> None:
        """The kernel has dropped so many references to each inode."""
        inodes = [inode for number, _ in counts if (inode := self.inodes.table.get(number)) and inode.known]
        try:
            for number, count in counts:
                self.inodes.forget(number, count)
            self.known.all_counted(inodes)
        except Exception:  # it has no answer: what went wrong may cost memory, not the mount
            log.exception("what the kernel has forgotten is kept")

    # -- directories

    @answers
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        handle = self.repeats.opened(inode, ctx.pid, os.O_DIRECTORY)
        if handle is not None:
            return handle
        directory = self.inodes[inode]
        return self._opened(self.listings.open(directory), directory, os.O_DIRECTORY, ctx)

    @answers
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        names, shift = await self.listings.entries(fh, start_id)
        given: list[Inode] = []
        last = 0
        try:
            for at in range(max(0, start_id + shift), len(names)):
                child = await self.listings.child(fh, at)
                if child is None:
                    continue
                if not pyfuse3.readdir_reply(token, names[at].encode(), self._entry(child), at + 1 - shift):
                    return
                child.lookups += 1
                given.append(child)
                last = at + 1 - shift
        except (OSError, StoreError):
            if not given:
                raise
            # What is given already is answered; the next request fails by itself, if it does.
        finally:
            if given:
                self.known.all_counted(given)
                self.known.read_up_to(fh, last, names[last - 1 + shift])

    @answers
    async def releasedir(self, fh: int) -> None:
        self._openers.pop(fh, None)
        self.listings.close(fh)
        self.known.handle_gone(fh)

    @answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.files.sync_directory(self.listings.directory(fh))

    # -- files

    @answers
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        handle = self.repeats.opened(inode, ctx.pid, flags)
        if handle is None:
            node = self.inodes[inode]
            handle = await self.files.open(node, flags)
            self._give(handle, node, flags, ctx, writes=self.files.handles[handle].writes)
        # What the kernel has cached of an inode stays good, unless others' bytes have come below what was written.
        return pyfuse3.FileInfo(fh=handle, keep_cache=not self.files.handles[handle].inode.era)

    @answers
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return cast("bytes", await self.files.read(fh, off, size))  # pyfuse3 takes any buffer, its stubs only bytes

    @answers
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        waits.caller.set((self._writers, (fh,)))
        return await self.files.write(fh, off, buf)

    @answers
    async def flush(self, fh: int) -> None:
        await self.files.flush(fh)

    @answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.files.fsync(fh)

    @answers
    async def release(self, fh: int) -> None:
        self._openers.pop(fh, None)
        if fh in self.files.handles:  # else an earlier process has closed it, and was killed before it said so
            self.files.release(fh)
        self.known.handle_gone(fh)

    # -- attributes

    @answers
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        node = self.inodes[inode]
        await self.attributes.getattr(node)
        return self._entry(node)

    @answers
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self.inodes[inode]
        await self.attributes.setattr(
            node,
            Wanted(
                mode=attr.st_mode if fields.update_mode else None,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                size=attr.st_size if fields.update_size else None,
                atime_ns=attr.st_atime_ns if fields.update_atime else None,
                mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
                ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
            ),
        )
        return self._entry(node)

    @answers
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self.attributes.readlink(self.inodes[inode])

    @answers
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if self.repeats.was_absent(inode, name, ctx.pid):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return await self.attributes.getxattr(self.inodes[inode], name)

    @answers
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return await self.attributes.listxattr(self.inodes[inode])

    @answers
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        if self.repeats.done(operations.SETXATTR, inode, name) is None:
            await self.attributes.setxattr(self.inodes[inode], name, value)
        self.repeats.is_set(inode, name, ctx.pid)

    @answers
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        if self.repeats.done(operations.REMOVEXATTR, inode, name) is None:
            await self.attributes.removexattr(self.inodes[inode], name)

    @answers
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        stats = pyfuse3.StatvfsData()
        stats.f_bsize = stats.f_frsize = BLOCK_BYTES
        stats.f_blocks = stats.f_bfree = stats.f_bavail = FREE_BYTES // BLOCK_BYTES
        stats.f_files = stats.f_ffree = stats.f_favail = FREE_INODES
        stats.f_namemax = 255
        return stats
