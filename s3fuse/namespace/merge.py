"""Merges what the bucket said into the tree. Atomic: nothing here awaits.

Three rules. What is dirty here wins over what the bucket says. An answer asked for before a change of ours arrived
there is not believed about that name (`started` is when it was asked for, as `time.monotonic()`). A remotely changed
object is a new inode, because the kernel does not take a new size for one it knows and an open handle must keep its
version.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from s3fuse import attrs, keys

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.store.base import ObjectInfo, Page


class Merge:
    """Answers of the store become inodes; each is good for `ttl_s` from when it was asked for."""

    def __init__(self, inodes: Inodes, defaults: attrs.Defaults, ttl_s: float) -> None:
        self.inodes = inodes
        self.defaults = defaults
        self.ttl_s = ttl_s

    def page(self, directory: Inode, page: Page, started: float, asked: float) -> keys.Shown:
        """Merges one page of a listing; gives what it shows.

        Later pages may come from a snapshot that the server made for the first one, so `started`, when the listing
        began, says what they can know; they are good from `asked`, when the page was asked for.
        """
        objects = tuple(info for info in page.objects if not self._hidden_by_us(info.key, started))
        prefixes = tuple(key for key in page.prefixes if not self.is_leaving(key, started))
        shown = keys.shown(dataclasses.replace(page, objects=objects, prefixes=prefixes), self.inodes.key(directory))
        if shown.marker is not None:
            self.marker(directory, shown.marker, started)
        if directory.parent is None:
            shown.directories.pop(keys.RESERVED, None)
            shown.files.pop(keys.RESERVED, None)
        for name, info in shown.files.items():
            self.object(directory, name, info, started)
        for name in shown.directories:
            self.prefix(directory, name, started)
        for name in (*shown.files, *shown.directories):
            child = directory.children.get(name)
            if child is not None and not child.dirty:
                child.valid_until = max(child.valid_until, asked + self.ttl_s)
        return shown

    def believable(self, inode: Inode, started: float) -> bool:
        """Whether an answer asked for at `started` can be newer than what we did to this inode."""
        return not inode.dirty and inode.synced_at <= started

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
        if child is not None and not self.believable(child, started):
            return
        if child is None and self._hidden_by_us(info.key, started):
            return
        if child is not None:
            remote = child.remote
            if not child.is_directory and remote is not None and (remote.etag == info.etag or child.writers):
                self._update(child, info, started)
                return
            self.vanish(child)
        attributes = attrs.decode(
            info.metadata, is_directory=False, modified_ns=info.modified_ns, defaults=self.defaults
        )
        inode = self.inodes.add(directory, name, attributes)
        inode.attributes_known = info.metadata is not None
        inode.remote, inode.size = info, self._size(inode, info)
        inode.valid_until = started + self.ttl_s

    def _update(self, child: Inode, info: ObjectInfo, started: float) -> None:
        """The same version, perhaps with other metadata: attributes change in place."""
        remote = child.remote
        assert remote is not None
        child.valid_until = started + self.ttl_s
        if remote.etag != info.etag:  # open for writing here: its upload will meet the other version
            return
        # Two sizes of one etag: one of the answers was wrong, and both may be asked for again.
        same = remote.modified_ns in (0, info.modified_ns) and remote.size_bytes == info.size_bytes
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
            if self.believable(child, started) and time.monotonic() >= child.valid_until:
                child.outdated = True  # its marker is asked for when somebody wants the attributes
                child.valid_until = started + self.ttl_s
            return
        if self.is_leaving(keys.join(self.inodes.key(directory), name) + "/", started):
            return
        if child is not None:  # a directory shadows a file of the same name
            if not self.believable(child, started):
                return
            self.vanish(child)
        self._add_directory(directory, name, started)

    def _add_directory(self, directory: Inode, name: str, started: float) -> Inode:
        attributes = attrs.decode(None, is_directory=True, modified_ns=time.time_ns(), defaults=self.defaults)
        inode = self.inodes.add(directory, name, attributes)
        inode.attributes_known = False
        inode.valid_until = started + self.ttl_s
        return inode

    def marker(self, inode: Inode, info: ObjectInfo, started: float) -> None:
        if not self.believable(inode, started):
            return
        inode.remote = info
        inode.valid_until = started + self.ttl_s
        inode.outdated = True
        if info.metadata is not None:
            inode.learned(
                attrs.decode(info.metadata, is_directory=True, modified_ns=info.modified_ns, defaults=self.defaults)
            )
            if inode.entries_changed_ns:
                inode.mtime_ns = max(inode.mtime_ns, inode.entries_changed_ns)
                inode.ctime_ns = max(inode.ctime_ns, inode.entries_changed_ns)

    def absent(self, directory: Inode, name: str, started: float) -> None:
        child = directory.children.get(name)
        if child is not None and self.believable(child, started):
            self.vanish(child)
        absent = directory.folder().absent
        if len(absent) > 10_000:
            absent.clear()
        absent[name] = started + self.ttl_s

    def vanish(self, inode: Inode) -> None:
        """The bucket no longer has this version under this name. What is dirty below a directory keeps it alive."""
        for child in list(inode.children.values()):
            if not child.dirty:
                self.vanish(child)
        if inode.children or inode.writers:
            inode.valid_until = time.monotonic() + self.ttl_s
            return
        self.inodes.detach(inode)

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
