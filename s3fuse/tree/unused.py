"""Inodes that nothing refers to and that are kept all the same: until they are old, or while something is about them.

Most are children that a listing has shown and that the kernel never asked for. Nothing here does I/O or awaits.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s3fuse.namespace.inodes import Inode

#: How long an inode is kept after what is known of it was good.
KEEP_S = 60.0
#: `due` looks at so many inodes, or at this part of all: some milliseconds, and at each of them every minute.
LEAST = 2000
PART = 60


class Unused:
    """Which inodes may be unused, oldest first, and which are held."""

    def __init__(self) -> None:
        self._maybe: dict[int, Inode] = {}
        self._held: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._maybe)

    def note(self, inode: Inode) -> None:
        """The inode is new, or could not be freed yet."""
        self._maybe[inode.number] = inode

    def gone(self, inode: Inode) -> None:
        self._maybe.pop(inode.number, None)

    @contextmanager
    def hold(self, inode: Inode) -> Iterator[None]:
        """Neither the inode nor anything below it is freed meanwhile."""
        number = inode.number
        self._held[number] += 1
        try:
            yield
        finally:
            self._held[number] -= 1
            if not self._held[number]:
                del self._held[number]

    def is_held(self, inode: Inode) -> bool:
        step: Inode | None = inode if self._held else None
        while step is not None:
            if step.number in self._held:
                return True
            step = step.parent
        return False

    def due(self) -> Iterator[Inode]:
        """Takes out inodes that nothing refers to and that are old; call it every second."""
        old = time.monotonic() - KEEP_S
        for _ in range(min(len(self._maybe), max(LEAST, len(self._maybe) // PART))):
            inode = self._maybe.pop(next(iter(self._maybe)))
            if inode.lookups > 0 or inode.opens:
                continue  # it is noted again when that ends
            is_read = inode.parent is not None and inode.parent.opens > 0  # a list of its names is being gone through
            if is_read or self._good_until(inode) > old:
                self.note(inode)
            else:
                yield inode

    @staticmethod
    def _good_until(inode: Inode) -> float:
        listing = inode.parent.listing if inode.parent is not None else None
        if listing is None or listing.is_ours_alone:
            return inode.valid_until
        return max(inode.valid_until, listing.valid_until)
