"""Which files of a directory are about to be read: programs that read a tree take its files in the order of names.

Each small file is a request of its own, so whoever reads a directory file by file waits for one answer after the
other, unless the next ones are fetched meanwhile. Pure policy: names in, names out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

#: How many files ahead a walk begins with, and the most.
INITIAL_FILES: Final = 4
MAX_FILES: Final = 64
#: A reader may leave out a few names, and several readers of one directory overtake each other.
TOLERANCE_FILES: Final = 8
#: Sorting the names of a larger directory takes longer than is won.
MAX_NAMES: Final = 20_000
#: Directories that are walked at the same time.
MAX_WALKS: Final = 32


class _Walk:
    __slots__ = ("asked", "at", "files", "names")

    def __init__(self, names: Sequence[str], last: str | None) -> None:
        """`last` is the file that was read before, None where the walk comes from another directory."""
        self.names = names
        self.at = bisect_left(names, last) if last is not None else -1
        self.asked = self.at + 1
        self.files = 0  # how many are fetched ahead; 0 while reads are in no order


class Siblings:
    """Tells walks from single reads. A walk is two reads in the order of names, none far from the other.

    Its window doubles with every further one. Where the last file read anywhere was one of a walk, the first read in
    another directory begins a walk there at once, since programs go through a tree directory by directory.
    """

    def __init__(self, max_files: int = MAX_FILES) -> None:
        self._max_files = max(INITIAL_FILES, min(MAX_FILES, max_files))
        self._walks: OrderedDict[int, _Walk | str] = OrderedDict()
        self._walking = False

    def on_read(self, directory: int, name: str, names: Collection[str]) -> Sequence[str]:
        """The names to fetch, each given once per walk, after `name` was read in a directory that has `names`."""
        walk = self._walks.pop(directory, None)
        if len(names) > MAX_NAMES:
            return ()
        if len(self._walks) >= MAX_WALKS:
            self._walks.popitem(last=False)
        if walk is None and not self._walking:
            self._walks[directory] = name  # sorting can wait until a second file is read
            return ()
        if not isinstance(walk, _Walk):
            walk = _Walk(sorted(names), walk)
        self._walks[directory] = walk
        found = self._advance(walk, name)
        self._walking = walk.files > 0
        return found

    def _advance(self, walk: _Walk, name: str) -> Sequence[str]:
        index = bisect_left(walk.names, name)
        distance = index - walk.at
        if 0 < distance <= TOLERANCE_FILES:
            walk.at = index
            walk.files = min(walk.files * 2 or INITIAL_FILES, self._max_files)
        elif not -TOLERANCE_FILES <= distance <= 0:
            walk.at, walk.asked, walk.files = index, index + 1, 0
        start = max(walk.asked, walk.at + 1)
        stop = min(walk.at + 1 + walk.files, len(walk.names))
        if start >= stop:
            return ()
        walk.asked = stop
        return walk.names[start:stop]
