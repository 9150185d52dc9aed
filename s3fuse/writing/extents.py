"""Sets of byte ranges: which bytes of a file are staged."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Extents:
    """Sorted, disjoint, non-adjacent half-open ranges of byte offsets.

    `add`, `pieces`, `covers` and `overlaps` take O(log n) plus the ranges they touch; growing the last range, as
    a sequential writer does, takes O(1).
    """

    __slots__ = ("_starts", "_stops", "_total")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._total = 0
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        return f"Extents({list(self)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Extents):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    @property
    def total_bytes(self) -> int:
        """How many bytes are inside."""
        return self._total

    @property
    def end(self) -> int:
        """The stop of the last range, 0 if there is none."""
        return self._stops[-1] if self._stops else 0

    def add(self, start: int, stop: int) -> None:
        """Puts [start, stop) inside; an empty range changes nothing."""
        if start >= stop:
            return
        starts, stops = self._starts, self._stops
        if not stops or start > stops[-1]:
            starts.append(start)
            stops.append(stop)
            self._total += stop - start
            return
        if start >= starts[-1]:
            if stop > stops[-1]:
                self._total += stop - stops[-1]
                stops[-1] = stop
            return
        first = bisect_left(stops, start)  # ranges [first, last) overlap or touch the new one
        last = bisect_right(starts, stop)
        if first < last:
            start = min(start, starts[first])
            stop = max(stop, stops[last - 1])
            self._total -= sum(stops[first:last]) - sum(starts[first:last])
        starts[first:last] = [start]
        stops[first:last] = [stop]
        self._total += stop - start

    def clip(self, stop: int) -> None:
        """Drops all bytes at or beyond `stop`."""
        keep = bisect_left(self._starts, stop)
        self._total -= sum(self._stops[keep:]) - sum(self._starts[keep:])
        del self._starts[keep:], self._stops[keep:]
        if keep and self._stops[-1] > stop:
            self._total -= self._stops[-1] - stop
            self._stops[-1] = stop

    def remove(self, start: int, stop: int) -> None:
        """Takes [start, stop) out; an empty range changes nothing."""
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if start >= stop or first >= last:
            return
        left = [(self._starts[first], start)] if self._starts[first] < start else []
        right = [(stop, self._stops[last - 1])] if self._stops[last - 1] > stop else []
        kept = left + right
        self._total -= sum(self._stops[first:last]) - sum(self._starts[first:last])
        self._total += sum(end - begin for begin, end in kept)
        self._starts[first:last] = [begin for begin, _ in kept]
        self._stops[first:last] = [end for _, end in kept]

    def covers(self, start: int, stop: int) -> bool:
        """Whether every byte of [start, stop) is inside; true of an empty range."""
        if start >= stop:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and stop <= self._stops[at]

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any byte of [start, stop) is inside."""
        if start >= stop:
            return False
        at = bisect_right(self._stops, start)
        return at < len(self._starts) and self._starts[at] < stop

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """Cuts [start, stop) into maximal (start, stop, inside), in order."""
        if start >= stop:
            return []
        starts, stops = self._starts, self._stops
        found: list[tuple[int, int, bool]] = []
        for at in range(bisect_right(stops, start), len(starts)):
            first = starts[at]
            if first >= stop:
                break
            if start < first:
                found.append((start, first, False))
                start = first
            last = stops[at]
            if last >= stop:
                found.append((start, stop, True))
                return found
            found.append((start, last, True))
            start = last
        found.append((start, stop, False))
        return found
