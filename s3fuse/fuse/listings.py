"""Open directories: each is read from one list of its names, whose places are the numbers that the kernel gets.

What a name stands for is looked up when it is given: it may have been moved, replaced or freed since the list was made.

A list does not outlive the process, so for a handle of an earlier one the entries are listed anew, and numbered so
that reading goes on behind the name where it had come to.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING

from s3fuse.errors import BadResponse

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
    __slots__ = ("asked", "directory", "names", "places", "shift")

    def __init__(self, directory: Inode) -> None:
        self.directory = directory
        self.names: list[str] | None = None
        self.asked = 0  # the attributes of entries before this one were asked for
        self.shift = 0  # entry number `cookie` is names[cookie - 1 + shift]
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

    async def entries(self, handle: int, start: int) -> tuple[list[str], int]:
        """The names to read on behind number `start`, and their shift: the entry `at` has number `at + 1 - shift`."""
        listing = self._open[handle]
        if start == 0 or listing.names is None:
            names = [child.name for child in await self._names.entries(listing.directory)]
            listing.names, listing.asked, listing.shift = names, 0, 0
            name = listing.places.get(start)
            if start and name is not None:
                listing.shift = bisect_right(names, name) - start
        return listing.names, listing.shift

    async def child(self, handle: int, at: int) -> Inode | None:
        """What has the name of an entry now, None where nothing does.

        Attributes that are not known are asked for, those of some further entries with them. What the server says of
        an entry may be impossible: then they stay unknown, and it is listed with the others.
        """
        listing = self._open[handle]
        assert listing.names is not None
        name, children = listing.names[at], listing.directory.children
        child = children.get(name)
        if child is not None and at >= listing.asked and (child.outdated or not child.attributes_known):
            listing.asked = at + LEARN_AHEAD
            ahead = [found for one in listing.names[at : listing.asked] if (found := children.get(one)) is not None]
            await self._core.directories.learn_all(ahead, leave_bad=True)
            child = children.get(name)
        if child is None and listing.directory.linked:
            with suppress(BadResponse):
                child = await self._names.lookup(listing.directory, name.encode())
        return child

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
