"""Whether an inode is still what it was when the bucket was asked about it.

Programs rename, remove and write files while an operation of the write-back waits for an answer. What the answer means
for the inode is decided only where that has not changed meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes


class MovedOn(Exception):
    """The inode was renamed, removed or written meanwhile: what to do for it is to be asked anew."""


class Moment:
    """The key, the version in the bucket and the staged layers that an inode has when this is made."""

    def __init__(self, inodes: Inodes, inode: Inode) -> None:
        self._inodes = inodes
        self._inode = inode
        self._was = self._now()

    def _now(self) -> tuple[object, ...]:
        inode = self._inode
        key = self._inodes.object_key(inode) if inode.linked else None
        version = inode.remote.version if inode.remote is not None else None
        return key, version, tuple(inode.data.tokens) if inode.data is not None else ()

    def check(self) -> None:
        """Raises MovedOn where anything of that has changed. Good until the next await."""
        if self._now() != self._was:
            raise MovedOn(f"{self._inode.name or self._inode.number} was changed meanwhile")
