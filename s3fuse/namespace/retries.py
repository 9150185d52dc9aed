"""How the attempts to bring each dirty inode to the bucket have gone.

`Changes` owns the one object of this kind and takes an inode out of it as soon as the inode is clean: nothing is kept
of what is in the bucket.
"""

from __future__ import annotations

#: So many conflicts in a row, with nothing arriving in between, are a failure like any other.
MOST_CONFLICTS = 8


class Retries:
    """Failed attempts and conflicts, by inode number."""

    def __init__(self) -> None:
        self._failures: dict[int, int] = {}  # how often an inode has failed in a row
        self._hopeless: set[int] = set()  # inodes whose last attempt was refused for good
        self._conflicts: dict[int, int] = {}  # how many conflicts there were since something arrived

    def __len__(self) -> int:
        return len(self._failures.keys() | self._hopeless | self._conflicts.keys())

    def failed(self, number: int, *, heals: bool) -> int:
        """An attempt failed; `heals`: the next one may succeed. Gives how many failed in a row."""
        self._note(number, heals=heals)
        self._failures[number] = self._failures.get(number, 0) + 1
        return self._failures[number]

    def failed_with(self, number: int, other: int) -> None:
        """The inode waits for another one that fails, and fails with it."""
        self._note(number, heals=other not in self._hopeless)
        self._failures[number] = 1

    def _note(self, number: int, *, heals: bool) -> None:
        if heals:
            self._hopeless.discard(number)
        else:
            self._hopeless.add(number)

    def met_conflict(self, number: int) -> bool:
        """A conflict was resolved; False where there were too many for one more attempt."""
        self._conflicts[number] = self._conflicts.get(number, 0) + 1
        return self._conflicts[number] < MOST_CONFLICTS

    def is_failing(self, number: int) -> bool:
        """Whether the last attempt failed."""
        return number in self._failures

    def is_hopeless(self, number: int) -> bool:
        """Whether the last attempt failed in a way that does not heal by itself."""
        return number in self._hopeless

    def any_failing(self) -> bool:
        """Whether any inode fails."""
        return bool(self._failures)

    def shorten(self) -> list[int]:
        """Gives what fails and may heal; each begins with the shortest wait where it fails again."""
        curable = [number for number in self._failures if number not in self._hopeless]
        self._failures.update(dict.fromkeys(curable, 0))
        return curable

    def ended_well(self, number: int) -> None:
        """An attempt ended without a failure, or the next one is to count as the first."""
        self._failures.pop(number, None)
        self._hopeless.discard(number)

    def forget(self, number: int) -> None:
        """Something of the inode has arrived, or it is clean."""
        self.ended_well(number)
        self._conflicts.pop(number, None)
