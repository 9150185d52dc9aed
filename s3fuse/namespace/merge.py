"""Merges what the bucket said into the tree. Atomic: nothing here awaits.

Four rules. What is dirty here wins over what the bucket says. An answer is not believed about a name where a change of
ours arrived after it was asked for, or an answer that was asked for later is known (`started` is when it was asked for,
as `time.monotonic()`). A remotely changed object is a new inode, because the kernel does not take a new size for one
it knows and an open handle must keep its version. A name has one inode: where that one has to stay, what came to the
bucket under its name is not shown until it has gone.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from s3fuse import attrs, keys
from s3fuse.store.s3checks import same_bytes

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.store.base import ObjectInfo, Page


@dataclasses.dataclass(slots=True)
class Listed:
    """A listing under way.

    Later pages may come from a snapshot that the server made for the first one, so `started`, when the listing began,
    says what they can know; they are good from `asked`, when the last page was asked for. `undecided` are files that
    have the name of a directory, of which a later page may show that it is still there.
    """

    started: float
    asked: float
    undecided: dict[str, ObjectInfo] = dataclasses.field(default_factory=dict)
    _given: dict[int, float] = dataclasses.field(default_factory=dict)

    def give(self, inode: Inode) -> None:
        """A page says how the inode is: what was asked for before that page is older."""
        if inode.asked_at < self.asked:
            self._given[inode.number] = inode.asked_at = self.asked

    def take_back(self, inode: Inode | None) -> None:
        """A later page may say something else of the inode."""
        if inode is not None and self._given.get(inode.number) == inode.asked_at:
            inode.asked_at = self.started


class Merge:
    """Answers of the store become inodes; each is good for `ttl_s` from when it was asked for."""

    def __init__(self, inodes: Inodes, defaults: attrs.Defaults, ttl_s: float) -> None:
        self.inodes = inodes
        self.defaults = defaults
        self.ttl_s = ttl_s

    def page(self, directory: Inode, page: Page, listing: Listed) -> keys.Shown:
        """Merges one page of a listing; gives what it shows."""
        started = listing.started
        objects = tuple(info for info in page.objects if not self._hidden_by_us(info.key, started))
        prefixes = tuple(key for key in page.prefixes if not self.is_leaving(key, started))
        prefix = self.inodes.key(directory)
        shown = keys.shown(dataclasses.replace(page, objects=objects, prefixes=prefixes), prefix)
        if shown.marker is not None:
            self.marker(directory, shown.marker, started)
        if directory.parent is None:
            shown.directories.pop(keys.RESERVED, None)
            shown.files.pop(keys.RESERVED, None)
        for name in shown.directories:
            listing.undecided.pop(name, None)
            listing.take_back(directory.children.get(name))
            self.prefix(directory, name, started)
        for name, info in {**listing.undecided, **shown.files}.items():
            child = directory.children.get(name)
            if child is not None and child.is_directory and page.may_go_on_before(f"{prefix}{name}/"):
                listing.undecided[name] = info
            else:
                listing.undecided.pop(name, None)
                self.object(directory, name, info, started)
        for name in (*shown.files, *shown.directories):
            child = directory.children.get(name)
            if child is not None and not child.dirty and self._is_of(child, shown.files.get(name)):
                child.valid_until = max(child.valid_until, listing.asked + self.ttl_s)
                listing.give(child)
        return shown

    @staticmethod
    def _is_of(child: Inode, info: ObjectInfo | None) -> bool:
        """Whether an answer is about the version that the inode is; without `info` it is about a directory."""
        if info is None:
            return child.is_directory
        return child.remote is not None and (child.remote.key, child.remote.etag) == (info.key, info.etag)

    def believable(self, inode: Inode, started: float) -> bool:
        """Whether an answer asked for at `started` can be newer than what we did to this inode and know of it."""
        return not inode.dirty and max(inode.synced_at, inode.asked_at) <= started

    def answered(self, inode: Inode, started: float) -> None:
        """An answer that was asked for at `started` says how the inode is."""
        inode.asked_at = max(inode.asked_at, started)
        inode.valid_until = max(inode.valid_until, started + self.ttl_s)

    def _hidden_by_us(self, key: str, started: float) -> bool:
        """Whether the object at `key` is one that we have moved away or deleted, or are about to."""
        if key in self.inodes.displaced or self.inodes.deleted_at.get(key, -1.0) >= started:
            return True
        writing = self.inodes.claimed.get(key)
        return writing is not None and not self.inodes.is_at(writing, key)

    def is_leaving(self, key: str, started: float) -> bool:
        """Whether a prefix is only what is left of a directory that we have removed or renamed."""
        return self.inodes.is_leaving(key, started) and self.inodes.at(key) is None

    def object(self, directory: Inode, name: str, info: ObjectInfo, started: float) -> None:
        child = directory.children.get(name)
        if child is None:
            if self._hidden_by_us(info.key, started) or directory.folder().is_absent(name, started):
                return
        elif not self.believable(child, started):
            return
        elif not child.is_directory and child.remote is not None and same_bytes(child.remote, info):
            self._update(child, child.remote, info, started)
            return
        elif not self.vanish(child, started):  # open for writing here, its upload will meet the other version
            return
        attributes = attrs.decode(
            info.metadata, is_directory=False, modified_ns=info.modified_ns, defaults=self.defaults
        )
        inode = self._add(directory, name, attributes)
        inode.attributes_known = info.metadata is not None
        inode.remote, inode.size = info, self._size(inode, info)
        self.answered(inode, started)

    def _add(self, directory: Inode, name: str, attributes: attrs.Attributes) -> Inode:
        directory.folder().absent.pop(name, None)
        return self.inodes.add(directory, name, attributes)

    def _update(self, child: Inode, remote: ObjectInfo, info: ObjectInfo, started: float) -> None:
        """The same bytes, perhaps with other metadata: attributes change in place."""
        self.answered(child, started)
        same = remote.modified_ns in (0, info.modified_ns) and remote.etag == info.etag
        if info.metadata is None and same and child.attributes_known:
            child.remote = dataclasses.replace(remote, modified_ns=info.modified_ns)
            return
        child.outdated = True
        if info.metadata is not None:
            child.learned(
                attrs.decode(info.metadata, is_directory=False, modified_ns=info.modified_ns, defaults=self.defaults)
            )
        child.remote = info
        child.size = self._size(child, info)

    @staticmethod
    def _size(inode: Inode, info: ObjectInfo) -> int:
        if inode.is_regular:
            return info.size_bytes
        return len(inode.target) if inode.target is not None else info.size_bytes

    def prefix(self, directory: Inode, name: str, started: float) -> None:
        child = directory.children.get(name)
        if child is not None and child.is_directory:
            if self.believable(child, started):
                # Its marker is asked for when somebody wants the attributes.
                child.outdated = child.outdated or time.monotonic() >= child.valid_until
                self.answered(child, started)
            return
        if self.is_leaving(keys.join(self.inodes.key(directory), name) + "/", started):
            return
        if child is None:
            if directory.folder().is_absent(name, started):
                return
        elif not self.believable(child, started) or not self.vanish(child, started):
            return  # else a directory shadows a file of the same name
        self._add_directory(directory, name, started)

    def _add_directory(self, directory: Inode, name: str, started: float) -> Inode:
        attributes = attrs.decode(None, is_directory=True, modified_ns=time.time_ns(), defaults=self.defaults)
        inode = self._add(directory, name, attributes)
        inode.attributes_known = False
        self.answered(inode, started)
        return inode

    def marker(self, inode: Inode, info: ObjectInfo, started: float) -> None:
        if not self.believable(inode, started):
            return
        inode.remote = info
        self.answered(inode, started)
        inode.outdated = True
        if info.metadata is not None:
            inode.learned(
                attrs.decode(info.metadata, is_directory=True, modified_ns=info.modified_ns, defaults=self.defaults)
            )
            if inode.entries_changed_ns:
                inode.mtime_ns = max(inode.mtime_ns, inode.entries_changed_ns)
                inode.ctime_ns = max(inode.ctime_ns, inode.entries_changed_ns)

    def has_no_marker(self, inode: Inode, started: float) -> None:
        """A directory is there by what is in it, or has to stay: its attributes are what they were, or the defaults."""
        inode.learned(None)
        self.answered(inode, started)

    def absent(self, directory: Inode, name: str, started: float) -> None:
        """The bucket has nothing of this name."""
        child = directory.children.get(name)
        if child is not None and self.believable(child, started):
            self.vanish(child, started)
        absent = directory.folder().absent
        if len(absent) > 10_000:
            absent.clear()
        absent[name] = max(started, absent.get(name, started))

    def vanish(self, inode: Inode, started: float) -> bool:
        """The bucket no longer has this version under this name: detaches the inode, and gives whether it did.

        It stays where it is written to, or something below it has to stay: dirty, written to, or known to a newer
        answer. Others may have it open all the same.
        """
        for child in list(inode.children.values()):
            if self.believable(child, started):
                self.vanish(child, started)
        if inode.children or inode.writers:
            inode.valid_until = time.monotonic() + self.ttl_s
            return False
        self.inodes.detach(inode)
        return True

    def below(self, directory: Inode, path: str, info: ObjectInfo, started: float) -> bool:
        """One key of a recursive listing; False where no path can be made of it."""
        if not path or self._hidden_by_us(info.key, started):
            return True
        *folders, name = path.split("/")
        try:
            for step in [*folders, name] if name else folders:
                keys.check_name(step.encode())
        except OSError:
            return False
        for folder in folders:
            child = directory.children.get(folder)
            if child is None and directory.folder().is_absent(folder, started):
                return True
            if child is None:
                child = self._add_directory(directory, folder, started)
            elif not child.is_directory:
                return False
            directory = child
        if name:
            self.object(directory, name, info, started)
        else:
            self.marker(directory, info, started)
        return True
