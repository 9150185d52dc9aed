"""Requests that outlive the process that sent them: what an earlier one asked for may still happen for a while.

Most writes have a condition, and come too late where something else is there by now. But nothing stops a write of a new
name once what is there was deleted here, and a delete, a directory's marker and a copy to another key (on servers that
ignore its condition) have no condition at all. So where such a request may still come

- nothing is deleted: what comes after that would stay, under a name that was removed;
- nothing of another inode is written: a late delete would take it, a late write would be taken for somebody else's;
- what was written without a condition is written once more when nothing can come any more.

A file and a directory of the same name are one place: SeaweedFS deletes an empty file "n" when it is asked to delete
"n/", and refuses "n" while there is a directory; MinIO shows nothing below a file.

The keys are in the journal, as the next process may die before that.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from s3fuse.namespace.displaced import ancestors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from s3fuse.writing.journal import Journal

#: A server may carry out a request so long after the process that sent it has died.
LATE_S = 5.0
#: Stands for a delete. A write is the number of its inode, negative where it has no condition.
DELETE = 0
#: Stands for a write without a condition of no inode that there is: numbers begin with that of the root.
OF_NOBODY = -1


class Lateness:
    """Keys, and the requests that may still come there. Nothing is known before `expect`."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._until: dict[str, dict[int, float]] = {}
        #: When the last write may come below a directory's key.
        self._below: dict[str, float] = {}
        self._end = 0.0

    def expect(self, requests: Iterable[tuple[str, int]]) -> None:
        """The last process may have sent these: each a key and `DELETE` or a write. Those before it are journaled."""
        now, wall = time.monotonic(), time.time()
        for key, request, until in self._journal.late():
            self._note(key, request, now + min(LATE_S, until - wall))
        for key, request in requests:
            self._note(key, request, now + LATE_S)
        self.journal_again()

    def journal_again(self) -> None:
        """Records all of them anew."""
        offset = time.time() - time.monotonic()
        self._journal.put_late(
            (key, request, until + offset) for key, found in self._until.items() for request, until in found.items()
        )

    def _note(self, key: str, request: int, until: float) -> None:
        if until > time.monotonic():
            found = self._until.setdefault(key, {})
            found[request] = max(until, found.get(request, 0.0))
            self._end = max(self._end, until)
            if request != DELETE:
                for above in ancestors(key.rstrip("/")):
                    self._below[above] = max(until, self._below.get(above, 0.0))

    @property
    def is_over(self) -> bool:
        """Whether nothing can come any more, to any key."""
        if self._until and time.monotonic() >= self._end:
            self._until.clear()
            self._below.clear()
        return not self._until

    def before_delete_s(self, key: str) -> float:
        """For how long no object at the key may be deleted yet."""
        path = key.rstrip("/")
        return max(self._left_s(form, lambda request: request != DELETE) for form in (path, f"{path}/"))

    def before_write_s(self, key: str, number: int) -> float:
        """For how long the inode may not be written at the key yet, where it was not, or not by this process."""
        path = key.rstrip("/")
        left_s = [self._left_s(path, lambda request: abs(request) != number)]
        if key.endswith("/"):  # markers take each other's place; the last one is written again
            left_s.append(self._left_s(key, lambda request: request == DELETE))
        else:
            left_s.append(self._left_s(f"{path}/", lambda request: abs(request) != number))
            left_s.append(self._below.get(f"{path}/", 0.0) - time.monotonic())
        left_s += [self._left_s(above[:-1], lambda request: request != DELETE) for above in ancestors(path)]
        return max(0.0, *left_s)

    def before_rewrite_s(self, key: str) -> float:
        """For how long what this process has written at the key may be replaced by what comes without a condition."""
        return self._left_s(key, lambda request: request < 0)

    def _left_s(self, key: str, applies: Callable[[int], bool]) -> float:
        if self.is_over or key not in self._until:
            return 0.0
        until = max((until for request, until in self._until[key].items() if applies(request)), default=0.0)
        return max(0.0, until - time.monotonic())
