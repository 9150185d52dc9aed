"""The inode table: names, attributes and lookup counts in memory, and where each inode is in the bucket.

Nothing here does I/O or awaits. Two places say where an inode is: its name in the tree (what programs see) and
`remote` (the object version that the bucket has). `syncer` moves the second to the first. While they differ the
inode is in `displaced` under its remote key, so that listings hide that key and nothing overwrites it unasked.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from functools import partial
from typing import TYPE_CHECKING

from cachetools import TTLCache

from s3fuse import keys
from s3fuse.attrs import Attributes
from s3fuse.journal.undo import Undo
from s3fuse.namespace.displaced import Displaced
from s3fuse.tree.unused import Unused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s3fuse.namespace.known import Known
    from s3fuse.store.base import ObjectInfo
    from s3fuse.writing.dirty import DirtyFile

ROOT = 1
#: No answer of the bucket comes so long after it was asked for, a listing of many pages neither.
ANSWER_S = 300.0


class Listing:
    """What is known of a directory's names beyond `Inode.children`. Times are `time.monotonic()` seconds."""

    __slots__ = ("absent", "asked_at", "complete", "listed_by", "pages", "probes", "unreadable", "valid_until")

    def __init__(self) -> None:
        self.complete = False  # children held every name at the last listing
        self.asked_at = 0.0  # when that was begun
        self.valid_until = 0.0
        self.pages = 1  # how many pages a full listing is thought to take
        self.probes = 0  # single names asked since the last listing
        self.listed_by = 0  # listings under way
        self.absent: dict[str, float] = {}  # name -> when the answer was asked for that it is not there
        #: Names that are there, but the server says impossible things of them; "" where these are about the name.
        self.unreadable: set[str] = set()

    @property
    def names_all(self) -> bool:
        """Whether a name that the last listing did not have was not there."""
        return self.complete and "" not in self.unreadable

    @property
    def is_ours_alone(self) -> bool:
        """Nothing of this directory has been in the bucket yet, so nobody else can have put anything into it."""
        return self.valid_until == float("inf")

    def is_absent(self, name: str, since: float) -> bool:
        """Whether an answer that was asked for after `since` said that there is no such name."""
        return self.absent.get(name, -1.0) > since or (
            self.complete and self.asked_at > since and not self.is_ours_alone
        )

    def in_bucket(self, valid_until: float) -> None:
        """Something of it is there now."""
        self.valid_until = min(self.valid_until, valid_until)


class Inode:
    """One file, directory, symlink or special file. Sizes in bytes, times in ns unless they say otherwise."""

    __slots__ = (
        "_remote",
        "asked_at",
        "atime_ns",
        "attributes_known",
        "children",
        "ctime_ns",
        "data",
        "doubtful",
        "entries_changed_ns",
        "era",
        "error",
        "gid",
        "known",
        "linked",
        "listing",
        "lookups",
        "maybe_at",
        "mode",
        "mtime_ns",
        "name",
        "number",
        "opens",
        "outdated",
        "parent",
        "rdev",
        "size",
        "synced_at",
        "synced_version",
        "target",
        "token",
        "uid",
        "valid_until",
        "version",
        "whole",
        "writers",
        "writes",
        "xattrs",
    )

    def __init__(self, number: int, parent: Inode | None, name: str, attributes: Attributes) -> None:
        self.number = number
        self.parent = parent
        self.name = name
        self.linked = True
        self.children: dict[str, Inode] = {}
        self.listing = Listing() if stat.S_ISDIR(attributes.mode) else None
        self.size = 0
        self._remote: ObjectInfo | None = None
        self.known: Known | None = None  # where it is recorded that the kernel knows this inode
        self.data: DirtyFile | None = None
        self.lookups = self.opens = self.writers = 0
        self.writes = 0  # how often bytes were written here, which moves no time: the kernel has the times
        self.version = self.synced_version = 0
        self.synced_at = 0.0
        self.asked_at = 0.0  # when the answer of the bucket was asked for that says how it is
        self.valid_until = 0.0
        self.attributes_known = True  # False: what is here are defaults, the bucket was not asked yet
        self.outdated = False  # they were known, but must be asked for again
        self.error: str | None = None
        self.whole: int | None = None  # the seal of the last state of a file in which nobody wrote it
        self.token = ""  # tells what an operation on this inode wrote from what others wrote
        self.doubtful = False  # an operation whose outcome is unknown may have replaced the object at `remote.key`
        self.maybe_at: str | None = None  # a key that an operation whose outcome is unknown may have written
        self.entries_changed_ns = 0  # when names in a directory last changed here; its marker may say an earlier time
        self.era = 0  # how often the bytes below what is staged became others: handles of earlier ones read no more
        self.set_attributes(attributes)

    def set_attributes(self, attributes: Attributes) -> None:
        self.mode = attributes.mode
        self.uid, self.gid = attributes.uid, attributes.gid
        self.atime_ns, self.mtime_ns, self.ctime_ns = attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns
        self.rdev = attributes.rdev
        self.xattrs = dict(attributes.xattrs)
        self.target = attributes.target

    def attributes(self) -> Attributes:
        return Attributes(
            self.mode,
            self.uid,
            self.gid,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.rdev,
            dict(self.xattrs),
            self.target,
        )

    def learned(self, attributes: Attributes | None) -> None:
        """The bucket was asked; None = it has none of its own for this inode, what is here stays."""
        self.attributes_known, self.outdated = True, False
        if attributes is not None:
            self.set_attributes(attributes)

    @property
    def remote(self) -> ObjectInfo | None:
        """The object version that the bucket has of it."""
        return self._remote

    @remote.setter
    def remote(self, info: ObjectInfo | None) -> None:
        before, self._remote = self._remote, info
        if self.known is not None and (info is None or before is None or info.version != before.version):
            self.known.changed(self)

    @property
    def is_directory(self) -> bool:
        return self.listing is not None

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def dirty(self) -> bool:
        """Something here is not in the bucket yet."""
        return self.version != self.synced_version

    def folder(self) -> Listing:
        """The listing of a directory. Raises NotADirectoryError for anything else."""
        if self.listing is None:
            raise NotADirectoryError(20, "Not a directory", self.name)
        return self.listing

    def __repr__(self) -> str:
        return (
            f"<inode {self.number} {self.name!r}{' dirty' if self.dirty else ''}{'' if self.linked else ' unlinked'}>"
        )


class Inodes:
    """All inodes of one mount; `prefix` ("" or ends with "/") is the key of the root.

    `undo` is the journal's: what a transaction changes here is put back where it fails.
    """

    def __init__(self, prefix: str, root: Attributes, undo: Undo | None = None) -> None:
        self.undo = undo or Undo()
        self.prefix = prefix
        self.root = Inode(ROOT, None, "", root)
        self.table: dict[int, Inode] = {ROOT: self.root}
        #: Where the bucket holds an inode whose place in the tree is another one, or none.
        self.displaced = Displaced(self.undo)
        #: The keys that an operation in the bucket holds now, with the inode that it is for.
        self.claimed: dict[str, Inode] = {}
        #: When keys were deleted, as `time.monotonic()`: a listing that began earlier may still show them.
        self.deleted_at: TTLCache[str, float] = TTLCache(1 << 20, ANSWER_S, time.monotonic)
        self._next = ROOT + 1
        self.unused = Unused()

    def __getitem__(self, number: int) -> Inode:
        """The inode with this number. Raises OSError(ESTALE) for one that was forgotten."""
        try:
            return self.table[number]
        except KeyError:
            raise OSError(116, "Stale file handle") from None

    def key(self, inode: Inode) -> str:
        """The key that the inode's name stands for; a directory's ends with "/"."""
        names: list[str] = []
        step = inode
        while step.parent is not None:
            names.append(step.name)
            step = step.parent
        path = "/".join(reversed(names))
        return f"{self.prefix}{path}/" if inode.is_directory and names else self.prefix + path

    def object_key(self, inode: Inode) -> str:
        """The key of the object that holds the inode: its `key`, for a whole bucket's root a reserved one."""
        return self.key(inode) or keys.ROOT_MARKER

    def keep(self, inode: Inode) -> None:
        """Has a transaction that fails put the inode back as it is now, with what is known of the names in it."""
        if not self.undo.is_on:
            return
        if inode.known is not None:  # the session has its last state
            self.undo.call(partial(inode.known.changed, inode))
        self.undo.attributes(inode, Inode.__slots__)
        if inode.listing is not None:
            self.undo.attributes(inode.listing, Listing.__slots__)

    def add(self, parent: Inode, name: str, attributes: Attributes, number: int | None = None) -> Inode:
        """A new inode under a name. `number` is given back to one that the journal knew.

        Raises FileExistsError where another inode has the name: nothing takes it from that but `detach` and `move`.
        """
        self._check_free(parent, name)
        if number is None:
            number = self._next
        self.reserve(number)
        inode = Inode(number, parent, name, attributes)
        self.undo.item(self.table, number)
        self.undo.item(parent.children, name)
        self.table[number] = inode
        parent.children[name] = inode
        self.unused.note(inode)
        return inode

    @staticmethod
    def _check_free(parent: Inode, name: str) -> None:
        if name in parent.children:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)

    @property
    def next_number(self) -> int:
        """The number of the next new inode."""
        return self._next

    def reserve(self, number: int) -> None:
        """Numbers up to this one are not given to new inodes."""
        self._next = max(self._next, number + 1)

    def add_orphan(self, attributes: Attributes, number: int | None = None) -> Inode:
        """An inode without a name, for an object that is only still to be deleted."""
        if number is None:
            number = self._next
        self.reserve(number)
        inode = Inode(number, self.root, "", attributes)
        inode.linked = False
        self.undo.item(self.table, number)
        self.table[number] = inode
        return inode

    def unlink(self, inode: Inode) -> None:
        """Takes the inode out of the tree."""
        if inode.linked and inode.parent is not None:
            self.keep(inode)
            self.undo.item(inode.parent.children, inode.name)
            if inode.parent.children.get(inode.name) is inode:
                del inode.parent.children[inode.name]
            inode.linked = False
            if inode.known is not None:
                inode.known.changed(inode)

    def detach(self, inode: Inode) -> None:
        """Takes the inode out of the tree; it lives on while something refers to it."""
        self.unlink(inode)
        self.drop_if_unused(inode)

    def move(self, inode: Inode, parent: Inode, name: str) -> None:
        """Gives the inode another name. Raises FileExistsError where that is another inode's."""
        if parent.children.get(name) is not inode:
            self._check_free(parent, name)
        self.keep(inode)
        self.undo.item(parent.children, name)
        self.unlink(inode)
        inode.parent, inode.name, inode.linked = parent, name, True
        parent.children[name] = inode
        if inode.known is not None:
            inode.known.changed(inode)

    def displace_if_moved(self, inode: Inode) -> None:
        """Notes where the object of an inode is that comes back from the journal."""
        if inode.remote is not None and (not inode.linked or self.object_key(inode) != inode.remote.key):
            self.displaced.add(inode)

    def leave(self, directory: Inode) -> None:
        """A directory is removed or renamed: what is still below its key in the bucket is on its way out."""
        self.displaced.leave(self.key(directory))

    def leave_what_is_not_there(self) -> None:
        """`leave` for every directory that was removed or renamed before the journal was read."""
        for key in self.displaced:
            if key.endswith("/") and self.at(key) is None:
                self.displaced.leave(key)

    def is_at(self, inode: Inode, key: str) -> bool:
        """Whether this is the key that the inode's name stands for."""
        return inode.linked and self.object_key(inode) == key

    def at(self, key: str) -> Inode | None:
        """The inode whose name stands for this key, if it is known."""
        if not key.startswith(self.prefix):
            return None
        inode: Inode | None = self.root
        for name in key[len(self.prefix) :].removesuffix("/").split("/"):
            inode = inode.children.get(name) if inode is not None else None
        return inode if inode is not None and inode.is_directory == key.endswith("/") else None

    def is_leaving(self, key: str, asked_at: float) -> bool:
        """Whether a prefix seen in an answer asked for at `asked_at` may be only what is left of such a directory."""
        when = self.displaced.left_at(key)
        if when is None:
            return False
        if when >= asked_at:
            return True
        if any(held.startswith(key) and not self.is_at(inode, held) for held, inode in self.claimed.items()):
            return True
        self.displaced.forget_leaving(key)
        return False

    def was_file(self, key: str) -> bool:
        """Whether an object at this key was deleted here lately, or is about to be, or is being written."""
        return key in self.deleted_at or key in self.displaced or key in self.claimed

    def note_deleted(self, key: str) -> None:
        self.deleted_at[key] = time.monotonic()

    def forget(self, number: int, count: int) -> None:
        """The kernel drops `count` references."""
        inode = self.table.get(number)
        if inode is not None:
            inode.lookups = max(0, inode.lookups - count)
            self.drop_if_unused(inode)

    def drop_if_unused(self, inode: Inode) -> None:
        """Frees an inode that nothing refers to, unless a listing that is still good holds it, or `hold` does."""
        if inode.lookups > 0 or inode.opens or inode.dirty or inode.number == ROOT or inode.children:
            return
        parent = inode.parent
        if inode.linked and parent is not None and parent.listing is not None:
            is_good = parent.listing.complete and time.monotonic() < parent.listing.valid_until
            # A listing under way may have begun before this name was in the bucket.
            if is_good or parent.listing.listed_by or self.unused.is_held(inode):
                self.unused.note(inode)
                return
            self.keep(parent)
            parent.listing.complete = False
            if inode.is_directory:  # it is there: what the bucket shows of it is more than what an earlier one has left
                self.displaced.forget_leaving(self.key(inode))
            self.unlink(inode)
        self.undo.item(self.table, inode.number)
        self.table.pop(inode.number, None)
        self.unused.gone(inode)
        if parent is not None and not parent.children:
            self.unused.note(parent)

    def sweep(self) -> None:
        """Frees what is kept though nothing refers to it, once it is old; call it every second."""
        self.deleted_at.expire()
        self.displaced.forget_old(time.monotonic() - ANSWER_S, self.claimed)
        for inode in self.unused.due():
            if self.table.get(inode.number) is inode:
                self.drop_if_unused(inode)

    def walk(self, inode: Inode) -> Iterator[Inode]:
        """The inode and all that is known below it, parents first."""
        stack = [inode]
        while stack:
            step = stack.pop()
            yield step
            stack.extend(step.children.values())
