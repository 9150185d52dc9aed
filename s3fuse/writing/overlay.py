"""Staged bytes that were parked: sent to temporary objects because the dirty budget was full while their file is open.

They lie between the object that the file is based on and the staged layers. Each range of an `Overlay` is part of one
temporary object, so that it can be read from there, and copied by the server into the file's next version.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from s3fuse.journal.seals import of_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Parked(NamedTuple):
    """A temporary object; a byte at offset `x` of the file is at `x - shift` in it."""

    key: str
    etag: str
    size_bytes: int
    shift: int


class Range(NamedTuple):
    """Bytes [start, stop) of a file and the object that they are in."""

    start: int
    stop: int
    parked: Parked


class Overlay:
    """Disjoint ranges of parked bytes in order. Elsewhere the base object shows up to `below_bytes`, then zeros."""

    __slots__ = ("_ranges", "below_bytes")

    def __init__(self, below_bytes: int, ranges: Iterable[Range] = ()) -> None:
        self.below_bytes = below_bytes
        self._ranges = sorted(ranges)

    def __iter__(self) -> Iterator[Range]:
        return iter(self._ranges)

    def checksum(self, number: int) -> int:
        """The checksum of all of it, as the overlay of file `number`."""
        numbers, texts = [number, self.below_bytes], list[str]()
        for start, stop, (key, etag, size_bytes, shift) in self._ranges:
            numbers += (start, stop, size_bytes, shift)
            texts += (key, etag)
        return of_row(numbers, texts)

    def objects(self) -> set[str]:
        """The objects that have bytes which are still part of the file."""
        return {found.parked.key for found in self._ranges}

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Parked | None]]:
        """Cuts [start, stop) into (start, stop, object or None), in order."""
        at = max(0, bisect_right(self._ranges, start, key=_start) - 1)
        while start < stop and at < len(self._ranges):
            found = self._ranges[at]
            at += 1
            if found.stop <= start:
                continue
            if found.start >= stop:
                break
            if start < found.start:
                yield start, found.start, None
            yield max(start, found.start), min(stop, found.stop), found.parked
            start = found.stop
        if start < stop:
            yield start, stop, None

    def with_layer(self, below_bytes: int, ranges: Sequence[Range]) -> Overlay:
        """This overlay under a parked layer that shows what is below it up to `below_bytes`; `ranges` in order."""
        kept: list[Range] = []
        done = 0
        for start, stop in [*((found.start, found.stop) for found in ranges), (below_bytes, below_bytes)]:
            for first, last, parked in self.pieces(done, min(start, below_bytes)):
                if parked is not None:
                    kept.append(Range(first, last, parked))
            done = max(done, stop)
        return Overlay(min(self.below_bytes, below_bytes), [*kept, *ranges])


def _start(found: Range) -> int:
    return found.start


def pack(ranges: Iterable[tuple[int, int]], total_bytes: int, pack_bytes: int) -> list[list[tuple[int, int]]]:
    """Divides ranges of `total_bytes` in all among objects of about equal size, none under `pack_bytes` if possible."""
    count = max(1, total_bytes // pack_bytes)
    packs: list[list[tuple[int, int]]] = [[]]
    room = total_bytes // count
    for start, stop in ranges:
        while start < stop:
            if not room:
                done = len(packs)
                packs.append([])
                room = total_bytes * (done + 1) // count - total_bytes * done // count
            end = min(stop, start + room)
            packs[-1].append((start, end))
            room -= end - start
            start = end
    return packs
