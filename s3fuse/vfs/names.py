"""The tree: lookup, readdir, create, mkdir, mknod, symlink, unlink, rmdir, rename.

A change is decided after its last await: names are looked up first, then everything from check to journal row runs
without a pause, so that two programs never both get a name. All that it changes is one step (`Known.step`): where
anything of it fails, tree, journal and session are as they were.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from s3fuse import keys
from s3fuse.attrs import Attributes
from s3fuse.errors import Refused
from s3fuse.session import operations

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode
    from s3fuse.vfs.core import Core

RENAME_NOREPLACE = 1
#: How often a rename begins anew where others replace what it is about.
ATTEMPTS = 5


def fail(code: int, name: str = "") -> NoReturn:
    raise OSError(code, os.strerror(code), name)


class Names:
    """Operations on names. All raise OSError with the errno that the program gets, or StoreError."""

    def __init__(self, core: Core) -> None:
        self.core = core

    async def lookup(self, parent: Inode, name: bytes) -> Inode | None:
        """The child, or None. `.` and `..` are the directory itself and its parent."""
        if name == b".":
            return parent
        if name == b"..":
            return parent.parent or parent
        if len(name) > keys.MAX_NAME_BYTES:
            fail(errno.ENAMETOOLONG)
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return None  # no key can stand for it, so there is none
        if self._reserved(parent, text):
            return None
        return await self.core.directories.lookup(parent, text)

    @staticmethod
    def _reserved(parent: Inode, name: str) -> bool:
        return parent.parent is None and name == keys.RESERVED

    async def entries(self, directory: Inode) -> list[Inode]:
        """Every child, in the order of names."""
        if not directory.linked:
            return []
        with self.core.inodes.unused.hold(directory):
            await self.core.directories.load(directory)
            return [child for _, child in sorted(directory.children.items())]

    async def _free_name(self, parent: Inode, name: bytes, end: str = "") -> str:
        """The name as text, once it is known that nothing has it. Raises OSError that says why it cannot be made."""
        self.core.check_changeable()
        text = keys.check_name(name)
        if self._reserved(parent, text):
            fail(errno.EPERM, text)
        self._check_key(parent, text + end)
        if await self.core.directories.lookup(parent, text) is not None or text in parent.children:
            fail(errno.EEXIST, text)
        if not parent.linked:
            fail(errno.ENOENT, text)
        return text

    def _check_key(self, parent: Inode, name: str) -> None:
        """Raises ENAMETOOLONG where the path is too long for a key, EINVAL where the server cannot hold that key."""
        key = keys.join(self.core.inodes.key(parent), name)
        try:
            self.core.directories.store.check_key(key)
        except Refused:
            fail(errno.EINVAL, name)

    def _add(
        self,
        operation: int,
        parent: Inode,
        name: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        now = time.time_ns()
        if parent.mode & stat.S_ISGID:  # System V group inheritance, as mount(8) describes for "grpid" directories
            gid = parent.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        inodes = self.core.inodes
        with self.core.known.step(operation, parent.number, name.encode(), inodes.next_number):
            inode = inodes.add(parent, name, Attributes(mode, uid, gid, now, now, now, rdev, {}, target))
            inode.size = len(target) if target is not None else 0
            if inode.listing is not None:
                inode.listing.complete, inode.listing.valid_until = True, float("inf")
            self._modified(parent)
            is_whole = operation != operations.CREATE  # whoever creates it has it open
            self.core.changes.record(inode, is_whole=is_whole)
            if is_whole:
                self.core.changes.settle(inode)
        return inode

    def _modified(self, parent: Inode) -> None:
        """A directory's times move in memory only: each entry made would else be a request for its marker."""
        self.core.inodes.keep(parent)
        parent.mtime_ns = parent.ctime_ns = parent.entries_changed_ns = time.time_ns()
        if parent.listing is not None and parent.listing.absent:
            parent.listing.absent = {}

    async def create(self, parent: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """A new empty regular file, which its creator has open: it is sent when that is closed, never before."""
        text = await self._free_name(parent, name)
        return self._add(operations.CREATE, parent, text, stat.S_IFREG | stat.S_IMODE(mode), uid, gid)

    async def mkdir(self, parent: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        text = await self._free_name(parent, name, "/")
        return self._add(operations.MKDIR, parent, text, stat.S_IFDIR | stat.S_IMODE(mode), uid, gid)

    async def mknod(self, parent: Inode, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Inode:
        """A fifo, socket, device or regular file."""
        text = await self._free_name(parent, name)
        return self._add(operations.MKNOD, parent, text, mode, uid, gid, rdev=rdev)

    async def symlink(self, parent: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        text = await self._free_name(parent, name)
        return self._add(operations.SYMLINK, parent, text, stat.S_IFLNK | 0o777, uid, gid, target=target)

    async def _child(self, parent: Inode, name: bytes) -> Inode:
        self.core.check_changeable()
        child = await self.lookup(parent, name)
        if child is None or not child.linked:
            fail(errno.ENOENT, os.fsdecode(name))
        return child

    async def unlink(self, parent: Inode, name: bytes) -> None:
        child = await self._child(parent, name)
        if child.is_directory:
            fail(errno.EISDIR, child.name)
        self.remove(child)

    async def rmdir(self, parent: Inode, name: bytes) -> None:
        child = await self._child(parent, name)
        with self.core.inodes.unused.hold(child):
            await self._check_empty(child)
            if not child.linked:
                fail(errno.ENOENT, child.name)
            self.remove(child)

    async def _check_empty(self, directory: Inode) -> None:
        """Raises ENOTDIR, or ENOTEMPTY where anything is in it, also a key that has no name. The caller holds it."""
        if not directory.is_directory:
            fail(errno.ENOTDIR, directory.name)
        if not any(child.dirty for child in directory.children.values()):
            await self.core.directories.load(directory)
        if directory.children or self.core.directories.unseen(directory):
            fail(errno.ENOTEMPTY, directory.name)

    def remove(self, child: Inode) -> None:
        """Takes a name out of the tree at once; a directory must be empty."""
        parent = child.parent
        assert parent is not None
        operation = operations.RMDIR if child.is_directory else operations.UNLINK
        with self.core.known.step(operation, parent.number, child.name.encode()):
            if child.is_directory:
                self.core.inodes.leave(child)
            self.core.inodes.keep(child)
            child.ctime_ns = time.time_ns()
            self.core.changes.removed(child)
            self._modified(parent)
            self._keep(parent)

    def _keep(self, directory: Inode) -> None:
        """A directory that exists only by what is in it gets a marker before its last entry goes."""
        if directory.parent is None or directory.remote is not None or directory.dirty or directory.children:
            return
        self.core.changes.changed(directory)

    async def rename(self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int) -> None:
        """Moves a file or a tree; on the bucket it follows as server-side copies, journaled as a whole here."""
        if flags & ~RENAME_NOREPLACE:  # EXCHANGE and WHITEOUT: callers fall back, as on filesystems without them
            fail(errno.EINVAL)
        text = keys.check_name(new_name)
        if self._reserved(new_parent, text):
            fail(errno.EPERM, text)
        for _ in range(ATTEMPTS):
            inode = await self._child(parent, name)
            with ExitStack() as held:
                held.enter_context(self.core.inodes.unused.hold(inode))
                await self._know(inode, new_parent, text, held)
                if parent.children.get(inode.name) is inode:
                    self._move(inode, new_parent, text, flags)
                    return
        raise OSError(errno.EBUSY, "others keep replacing it", os.fsdecode(name))

    async def _know(self, inode: Inode, new_parent: Inode, name: str, held: ExitStack) -> None:
        """Makes known and holds what a rename is about. Raises OSError where it cannot be done."""
        self._check_key(new_parent, name + ("/" if inode.is_directory else ""))
        if inode.is_directory:
            await self._know_tree(inode, new_parent, name)
        victim = await self.core.directories.lookup(new_parent, name)
        if victim is not None:
            held.enter_context(self.core.inodes.unused.hold(victim))
        if victim is not None and victim.is_directory and inode.is_directory and victim is not inode:
            await self._check_empty(victim)
        self.core.check_changeable(sum(1 for _ in self.core.inodes.walk(inode)))

    async def _know_tree(self, inode: Inode, new_parent: Inode, name: str) -> None:
        """Makes everything below a directory known, since each object moves on its own."""
        step: Inode | None = new_parent
        while step is not None:
            if step is inode:
                fail(errno.EINVAL, name)
            step = step.parent
        hidden = await self.core.directories.tree(inode)
        if hidden:
            raise OSError(errno.EBUSY, f"{hidden} keys below it have no path and would be left behind", inode.name)
        # Their attributes move with them, so they must be known, also where listings do not give them.
        await self.core.directories.learn_all(list(self.core.inodes.walk(inode)))
        for below in self.core.inodes.walk(inode):
            if below is not inode:
                self._check_key(new_parent, f"{name}/{self._path(inode, below)}{'/' if below.is_directory else ''}")

    @staticmethod
    def _path(top: Inode, inode: Inode) -> str:
        names = []
        while inode is not top and inode.parent is not None:
            names.append(inode.name)
            inode = inode.parent
        return "/".join(reversed(names))

    def _move(self, inode: Inode, parent: Inode, name: str, flags: int) -> None:
        """The atomic part: what was looked up is looked at once more, since others ran in between."""
        victim = parent.children.get(name)
        if not inode.linked or not parent.linked:
            fail(errno.ENOENT, name)
        if victim is inode:
            return
        if victim is not None:
            if flags & RENAME_NOREPLACE:
                fail(errno.EEXIST, name)
            if victim.is_directory != inode.is_directory:
                fail(errno.EISDIR if victim.is_directory else errno.ENOTDIR, name)
            if victim.children:
                fail(errno.ENOTEMPTY, name)
        old_parent = inode.parent
        assert old_parent is not None
        what = operations.renaming(inode.name.encode(), parent.number, name.encode())
        with self.core.known.step(operations.RENAME, old_parent.number, what):
            if victim is not None:
                self.core.changes.removed(victim)
            if inode.is_directory:
                self.core.inodes.leave(inode)
            self.core.inodes.keep(inode)
            inode.ctime_ns = time.time_ns()
            self.core.changes.moved(inode, parent, name)
            self._modified(old_parent)
            self._modified(parent)
            self._keep(old_parent)
