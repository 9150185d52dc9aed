"""Open directories: each is read from one list of its entries, whose places are the numbers that the kernel gets.

A list does not outlive the process, so for a handle of an earlier one the entries are listed anew, and numbered so
that reading goes on behind the name where it had come to.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s3fuse.namespace.inodes import Inode
    from s3fuse.vfs.core import Core
    from s3fuse.vfs.names import Names

#: How many children of a directory get their attributes fetched at once, where a listing did not give them.
LEARN_AHEAD = 64
#: Apart from the handles of files.
FIRST_HANDLE = 1 << 62


class _Listing:
    __slots__ = ("children", "directory", "places", "shift")

    def __init__(self, directory: Inode) -> None:
        self.directory = directory
        self.children: list[Inode] | None = None
        self.shift = 0  # entry number `cookie` is children[cookie - 1 + shift]
        self.places: dict[int, str] = {}  # names by number, in the list that an earlier process had


class Listings:
    """The handles of open directories."""

    def __init__(self, core: Core, names: Names) -> None:
        self._core = core
        self._names = names
        self._open: dict[int, _Listing] = {}
        self._next = FIRST_HANDLE

    def open(self, directory: Inode) -> int:
        """A new handle."""
        directory.opens += 1
        handle, self._next = self._next, self._next + 1
        self._open[handle] = _Listing(directory)
        return handle

    def restore(self, handle: int, directory: Inode, places: Iterable[tuple[int, str]]) -> None:
        """A handle of an earlier process, which counted it already; `places` are numbers and names of entries."""
        self._next = max(self._next, handle + 1)
        listing = self._open[handle] = _Listing(directory)
        listing.places = dict(places)

    def directory(self, handle: int) -> Inode:
        return self._open[handle].directory

    async def entries(self, handle: int, start: int) -> tuple[list[Inode], int]:
        """The list to read on behind number `start`, and its shift: the entry `at` has number `at + 1 - shift`.

        Entries may be gone meanwhile (not `linked`); those whose attributes are not known are for `learn`.
        """
        listing = self._open[handle]
        if start == 0 or listing.children is None:
            children = await self._names.entries(listing.directory)
            listing.children, listing.shift = children, 0
            name = listing.places.get(start)
            if start and name is not None:
                listing.shift = bisect_right(children, name, key=lambda child: child.name) - start
        return listing.children, listing.shift

    async def learn(self, children: list[Inode], at: int) -> int:
        """Fetches attributes of some entries from `at` on; gives which is the first that it was not asked for.

        What the server says of an entry may be impossible: then it stays unknown, and is listed with the others.
        """
        await self._core.directories.learn_all(children[at : at + LEARN_AHEAD], leave_bad=True)
        return at + LEARN_AHEAD

    def close(self, handle: int) -> None:
        """Drops a handle; nothing where it is none (an earlier process was killed before it said so)."""
        listing = self._open.pop(handle, None)
        if listing is None:
            return
        directory = listing.directory
        directory.opens -= 1
        if not directory.opens and directory.dirty:
            self._core.changes.settle(directory)
        self._core.inodes.drop_if_unused(directory)
