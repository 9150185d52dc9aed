"""Objects in the bucket that are not where the tree has their inodes: what moved, or was removed, and has not arrived.

Nothing here does I/O or awaits.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from s3fuse.journal.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s3fuse.namespace.inodes import Inode


#: How many directories that were removed or renamed are looked at a second.
MOST_LOOKS = 1000


def ancestors(key: str) -> list[str]:
    """The keys of the directories that a key is in, and its own if it is one."""
    found = []
    at = key.find("/")
    while at >= 0:
        found.append(key[: at + 1])
        at = key.find("/", at + 1)
    return found


class Displaced(dict[str, "Inode"]):
    """The inode whose object is at a key that its name does not stand for (it may, after a move back: no harm).

    Of several at one key the last whose object was there for certain counts; the others follow when that settles.
    Changed by `add` and `settle` only.
    """

    def __init__(self, undo: Undo | None = None) -> None:
        self._undo = undo or Undo()
        self._others: dict[str, list[Inode]] = {}
        #: How many keys are below that of a directory.
        self._below: Counter[str] = Counter()
        #: Keys of directories that were removed or renamed here, and when the last object below them had gone.
        self._left: dict[str, float] = {}

    def _keep(self, key: str) -> None:
        """Has a transaction that fails put back what is known of a key."""
        if self._undo.is_on:
            self._undo.item(self, key)
            self._undo.item(self._others, key)
            for above in ancestors(key):
                self._undo.item(self._below, above)
                self._undo.item(self._left, above)

    def add(self, inode: Inode) -> None:
        """Notes where the inode's object is, if it has one."""
        if inode.remote is None:
            return
        key = inode.remote.key
        self._keep(key)
        before = self.get(key)
        if before is None:
            self._below.update(ancestors(key))
        elif before is not inode:
            others = self._others[key] = [other for other in self._others.get(key, ()) if other is not inode]
            if before.remote is not None and before.remote.etag and not inode.remote.etag:
                others.append(inode)
                return
            others.append(before)
        self[key] = inode

    def settle(self, key: str, inode: Inode) -> None:
        """The inode's object has left `key`, or `key` has become its place."""
        self._keep(key)
        if self.get(key) is not inode:
            if inode in self._others.get(key, ()):
                self._others[key] = [other for other in self._others[key] if other is not inode]
            return
        others = self._others[key] = list(self._others.get(key, ()))
        while others:
            other = others.pop()
            if other.remote is not None and other.remote.key == key:
                self[key] = other
                return
        self._others.pop(key, None)
        del self[key]
        for above in ancestors(key):
            self._below[above] -= 1
            if self._below[above] <= 0:
                del self._below[above]
                if above in self._left:
                    self._left[above] = time.monotonic()

    def all_at(self, key: str) -> list[Inode]:
        """Every inode that has, or may have, an object at the key."""
        first = self.get(key)
        return [] if first is None else [first, *self._others.get(key, ())]

    def files_above(self, key: str) -> list[str]:
        """Where objects of files are still that have left, as somebody made a directory there that the key is in."""
        return [above[:-1] for above in ancestors(key) if above[:-1] in self] if self else []

    def with_more_below(self, keys_to_delete: Iterable[str]) -> set[str]:
        """Those of these keys, each of them here, that are directories with other objects below, not among them."""
        wanted = list(keys_to_delete)
        below = Counter(above for key in wanted for above in ancestors(key))
        return {key for key in wanted if key.endswith("/") and self._below[key] > below[key]}

    def has_below(self, key: str) -> bool:
        """Whether the marker at a directory's key, or an object below it, is one of these."""
        return self._below[key] > 0

    def leave(self, key: str) -> None:
        """A directory is removed or renamed: what is still below its key is on its way out."""
        self._undo.item(self._left, key)
        self._left[key] = time.monotonic()

    def left_at(self, key: str) -> float | None:
        """When the last object below such a directory went (`time.monotonic()`), inf while one is there; else None."""
        when = self._left.get(key)
        return float("inf") if when is not None and self._below[key] > 0 else when

    @property
    def leaving(self) -> int:
        """How many such directories are remembered."""
        return len(self._left)

    def forget_old(self, before: float, held: Iterable[str]) -> None:
        """Forgets directories that had gone `before`, some at a time: no answer is that old. Not those above `held`."""
        above = {key for one in held for key in ancestors(one)}
        for key in list(islice(self._left, MOST_LOOKS)):
            when = self._left.pop(key)
            if when >= before or self._below[key] > 0 or key in above:
                self._left[key] = when  # at the end: the others come first the next time

    def forget_leaving(self, key: str) -> None:
        """Nothing of such a directory is shown any more, or there is another one at its key."""
        self._undo.item(self._left, key)
        self._left.pop(key, None)
