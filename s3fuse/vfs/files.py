"""Open files: read, write, truncate, flush, fsync, release."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from s3fuse import waits
from s3fuse.errors import NotFound, PreconditionFailed, StoreError
from s3fuse.reading.records import BLOCK_BYTES
from s3fuse.reading.siblings import Siblings
from s3fuse.reading.window import INITIAL_BYTES, Window
from s3fuse.store.base import ObjectInfo
from s3fuse.store.s3checks import same_bytes
from s3fuse.vfs.budget import NO_ROOM, Patience
from s3fuse.writing.dirty import DirtyFile
from s3fuse.writing.layers import BASE

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode
    from s3fuse.vfs.core import Core
    from s3fuse.writing.overlay import Parked

log = logging.getLogger(__name__)

#: Largest file: what S3 can hold as one object.
MAX_FILE_BYTES = 5 << 40
#: What is read ahead of parked bytes.
PARKED_AHEAD_BYTES = 4 << 20


class Handle:
    """One open of one file."""

    __slots__ = ("ahead", "era", "inode", "window", "writes")

    def __init__(self, inode: Inode, writes: bool, window: Window) -> None:
        self.inode = inode
        self.era = inode.era  # of the bytes that it reads
        self.writes = writes
        self.window = window
        self.ahead = 0  # up to where the window has been asked for


def _stale(inode: Inode) -> OSError:
    return OSError(errno.ESTALE, "the object was replaced or deleted", inode.name)


class Files:
    """Operations on open regular files. All raise OSError with the errno that the program gets, or StoreError."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.handles: dict[int, Handle] = {}
        self._siblings = Siblings(core.blocks.limit_bytes // 8 // INITIAL_BYTES)
        core.budget.handles = self.handles
        self._next = 1

    async def open(self, inode: Inode, flags: int) -> int:
        """A handle. Looks at the bucket again when what is known is older than the TTL; ESTALE when it changed.

        A file that may be half written is EIO unless it is opened to be written anew: its length may be wrong, too.
        """
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes:
            self.core.check_writable()
        await self.core.directories.refresh(inode)
        if not inode.linked and not inode.opens:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), inode.name)
        if not flags & os.O_TRUNC and inode.data is not None and inode.data.is_held:
            raise OSError(errno.EIO, inode.data.poisoned_text(), inode.name)
        handle = self.open_known(inode, writes)
        if flags & os.O_TRUNC:
            try:
                self.truncate(inode, 0)
            except BaseException:
                self.release(handle)
                raise
        return handle

    def open_known(self, inode: Inode, writes: bool) -> int:
        """A handle on an inode that needs no look at the bucket."""
        handle = self._next
        self.restore(handle, inode, writes)
        inode.opens += 1
        inode.writers += writes
        return handle

    def restore(self, handle: int, inode: Inode, writes: bool) -> None:
        """A handle as it was given out: new, or by the process before this one, which counted it already."""
        self._next = max(self._next, handle + 1)
        window = Window(BLOCK_BYTES, max(BLOCK_BYTES, min(32 << 20, self.core.blocks.limit_bytes // 8)))
        self.handles[handle] = Handle(inode, writes, window)

    async def read(self, number: int, offset: int, size: int) -> bytes | memoryview:
        """Up to `size` bytes from `offset`; fewer only at the end of the file.

        Raises OSError(ESTALE) where the version that was opened can be had no more.
        """
        handle = self.handles[number]
        while True:
            inode, before = handle.inode, self._content(handle.inode)
            stop = min(offset + size, inode.size)
            if offset >= stop:
                return b""
            try:
                return await self._read(handle, offset, stop)
            except (NotFound, PreconditionFailed):
                if self._content(inode) == before and not await self._goes_on(inode):
                    inode.valid_until = 0.0
                    raise _stale(inode) from None
                # Our own upload or rename came between: the file goes on with what it has become, or ends earlier.

    async def _goes_on(self, inode: Inode) -> bool:
        """Whether only attributes of the version were changed by others: what they made of it has the same bytes."""
        before = inode.remote
        if before is None or inode.dirty:  # what is to be sent is based on the version that was opened
            return False
        try:
            now = await self.core.blocks.store.head(before.key)
        except StoreError:
            return False
        if inode.remote is not before or inode.dirty:
            return inode.remote is not before
        if now.version == before.version or not same_bytes(before, now):
            return False
        inode.remote, inode.outdated, inode.valid_until = now, True, 0.0
        return True

    @staticmethod
    def _content(inode: Inode) -> tuple[object, ...]:
        """Where in the bucket the inode's bytes are."""
        overlay = inode.data.parked.overlay if inode.data is not None else None
        return inode.remote.version if inode.remote is not None else None, overlay

    async def _read(self, handle: Handle, offset: int, stop: int) -> bytes | memoryview:
        """Bytes [offset, stop). Raises NotFound and PreconditionFailed where a version that has some is gone."""
        inode = handle.inode
        if handle.era != inode.era:  # what was not written here is of others by now
            raise _stale(inode)
        if inode.data is None or not inode.data.layers:
            if inode.remote is None:  # it has a length, but nothing has its bytes
                raise _stale(inode)
            return await self._read_version(handle, inode.remote, offset, stop)
        data, base = inode.data, inode.remote
        parts: list[bytes | memoryview] = []
        # A piece that is not local may await, and layers move meanwhile; so all local bytes are read first.
        pieces = data.pieces(offset, stop)
        local = {piece.start: data.read_piece(piece) for piece in pieces if piece.is_local}
        for piece in pieces:
            if piece.source == BASE:
                assert base is not None
                parts.append(bytes(await self._read_version(handle, base, piece.start, piece.stop)))
            elif piece.parked is not None:
                parts.append(await self._read_parked(piece.parked, piece.start, piece.stop))
            else:
                parts.append(local[piece.start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_parked(self, parked: Parked, start: int, stop: int) -> bytes:
        """Bytes of a temporary object."""
        version = ObjectInfo(parked.key, parked.size_bytes, parked.etag, 0)
        first, last = start - parked.shift, stop - parked.shift
        self.core.blocks.prefetch(version, first, min(last + PARKED_AHEAD_BYTES, version.size_bytes))
        return bytes(await self.core.blocks.read(version, first, last))

    async def _read_version(self, handle: Handle, version: ObjectInfo, start: int, stop: int) -> bytes | memoryview:
        blocks = self.core.blocks
        _, ahead = handle.window.on_read(start, stop - start, version.size_bytes)
        if ahead != handle.ahead:
            blocks.prefetch(version, handle.ahead if start < handle.ahead < ahead else start, ahead)
            handle.ahead = ahead
        if not start and version.size_bytes <= INITIAL_BYTES:
            self._fetch_siblings(handle.inode)
        return await blocks.read(version, start, stop)

    def _fetch_siblings(self, inode: Inode) -> None:
        """Starts fetching the small files that whoever reads this one will want next."""
        parent = inode.parent
        if parent is None or not inode.linked:
            return
        for name in self._siblings.on_read(parent.number, inode.name, parent.children):
            sibling = parent.children.get(name)
            if sibling is not None and sibling.is_regular and sibling.data is None and sibling.remote is not None:
                size_bytes = sibling.remote.size_bytes
                if 0 < size_bytes <= INITIAL_BYTES:
                    self.core.blocks.prefetch(sibling.remote, 0, size_bytes)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Stages and journals the bytes; waits while more is dirty than the mount may hold.

        The times of the file stay: a page may come long after the program has written it, and the kernel, which has
        the times of files that it caches for writing, sends them with each flush, unless they are the same.

        What a writer wrote that has a signal to act on is taken at once, above the limit: the kernel holds it in the
        writer's name, keeps the writer until it is taken, and would lose it by an error.
        """
        inode = self.handles[number].inode
        stop = offset + len(data)
        try:
            if stop > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), inode.name)
            await self._write(inode, offset, data)
        except Exception as error:
            self._lose(inode, offset, stop, error)
            raise
        self._touch(inode, max(inode.size, stop))
        return len(data)

    def _lose(self, inode: Inode, start: int, stop: int, error: Exception) -> None:
        """Bytes of a write could not be taken. The kernel has told the program that they are written: see `poison`."""
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        if inode.data is None or not inode.data.poisoned_text():  # not for each of many
            log.info("bytes that a program wrote to %r could not be taken: %s", inode.name, error)
        with suppress(OSError, sqlite3.DatabaseError):  # memory knows; the journal is written anew when it can be
            self._stage(inode).poison(start, stop, reason)
        try:
            self._touch(inode, max(inode.size, stop))
        except (OSError, sqlite3.DatabaseError):
            inode.size = max(inode.size, stop)
            self.core.changes.count(inode)

    async def _write(self, inode: Inode, offset: int, data: bytes) -> None:
        budget, interrupted = self.core.budget, False
        patience: Patience | None = None
        while True:
            if patience is not None or budget.is_full(len(data)):
                patience = patience or Patience()
                try:
                    with waits.interruptible(for_room=True):
                        await budget.wait(len(data), patience)
                except waits.Interrupted:  # an answer lets the writer end; its bytes are still taken if they can be
                    interrupted = True
            try:
                self.core.changes.journal.check_room()
                self._stage(inode).write(offset, data)
            except OSError as error:
                if error.errno not in NO_ROOM or interrupted:
                    raise
                patience = patience or Patience()
                budget.refused(patience)
            else:
                budget.staged()
                return

    def truncate(self, inode: Inode, size: int) -> None:
        """Cuts or grows the file; nothing is fetched or sent."""
        if size > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), inode.name)
        self.core.changes.journal.check_room()
        with self.core.changes.journal.transaction():
            self.core.inodes.keep(inode)
            self._stage(inode).truncate(size)
            inode.size = size
            inode.mtime_ns = inode.ctime_ns = time.time_ns()
            if inode.linked:
                self.core.changes.changed(inode)

    def _stage(self, inode: Inode) -> DirtyFile:
        if inode.data is None:
            base = inode.remote.size_bytes if inode.remote is not None else 0
            inode.data = DirtyFile(self.core.staging, inode.number, base)
        return inode.data

    def _touch(self, inode: Inode, size: int) -> None:
        """Counts a write as a change; its row is written once per upload, the bytes have rows of their own."""
        inode.writes += 1
        if not inode.linked or (inode.dirty and inode.number not in self.core.changes.in_flight):
            inode.size = size
            return
        with self.core.changes.journal.transaction():
            self.core.inodes.keep(inode)
            inode.size = size
            self.core.changes.changed(inode)

    async def flush(self, number: int) -> None:
        """Every close(2) of a duplicate: waits for the bucket only where the mount says `--close upload`."""
        handle = self.handles[number]
        if handle.writes and self.core.config.close == "upload" and handle.inode.linked and handle.inode.dirty:
            with waits.interruptible():
                await self.core.syncer.arrivals.sync(handle.inode)

    async def fsync(self, number: int) -> None:
        """Returns when the bucket (or with `--fsync local` the local disk) has the file. Raises OSError(EIO)."""
        await self.sync(self.handles[number].inode)

    async def sync(self, inode: Inode) -> None:
        if not inode.dirty or not inode.linked:
            return
        if self.core.config.fsync == "upload":
            with waits.interruptible():
                await self.core.syncer.arrivals.sync(inode)
            return
        if inode.data is not None:
            await inode.data.sync()  # before the journal's rows that name these bytes
        self.core.changes.seal(inode)
        await self._sync_journal()

    async def _sync_journal(self) -> None:
        journal = self.core.staging.journal
        journal.note_boot()
        journal.record_deferred()
        await trio.to_thread.run_sync(journal.sync)

    async def sync_directory(self, directory: Inode) -> None:
        """Returns when the directory and the names in it are as durable as `fsync` makes a file."""
        if self.core.config.fsync == "local":
            await self._sync_journal()
            return
        with waits.interruptible():
            await self.core.syncer.arrivals.sync_names(directory)

    def release(self, number: int) -> None:
        """The last close of a handle: a dirty file is queued, an unlinked one is dropped."""
        handle = self.handles.pop(number)
        inode = handle.inode
        inode.opens -= 1
        inode.writers -= handle.writes
        if handle.writes and not inode.writers:
            self.core.changes.seal(inode)
        if inode.opens:
            if inode.dirty and not inode.writers:
                self.core.changes.settle(inode)
            return
        if inode.data is not None:
            if not inode.linked and not inode.dirty:
                inode.data.discard()
            inode.data.close()
        if inode.dirty:
            self.core.changes.settle(inode)
        self.core.inodes.drop_if_unused(inode)
