"""Checksums of staged bytes: what is read back is what was written, or it is known not to be.

The staged bytes of a layer are cut into segments, each with the CRC-32 of its bytes (7 GB/s here). A segment lies in
one block of `BLOCK_BYTES`, so that changing or reading a few bytes costs one block and not the whole file. Pure: who
uses this gives the bytes, and writes them.

Overwriting a segment has a moment in which its bytes fit neither the checksum before nor the one after. For that long
the journal has no checksum for it (`IN_DOUBT`), so that a crash right then is not taken for damage.

A segment that was synced to the disk keeps its range as long as it is there: what is written after it becomes another
one, what is written into it changes only its checksum. So that after a power failure it is known which bytes were
promised (see `power`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import crc32

from s3fuse.journal.seals import of_segment, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    #: Gives the staged bytes [start, stop), fewer where they are not there any more.
    Read = Callable[[int, int], bytes]

BLOCK_BYTES: Final = 128 << 10
#: The checksum of a segment that was being overwritten when the process ended: any bytes are taken.
IN_DOUBT: Final = -1
#: The checksum of what is left of a segment that was found damaged: no bytes are taken.
DAMAGED: Final = -2
#: `Segment.synced` while a sync of it is under way, and once it has returned.
SYNCING: Final = 1
SYNCED: Final = 2


class Damage(Exception):
    """Staged bytes [start, stop) are not what was written."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(f"staged bytes {start} to {stop} are not what was written")
        self.start, self.stop = start, stop


class Segment(NamedTuple):
    """Bytes [start, stop) of a file with their CRC-32, or IN_DOUBT or DAMAGED. `synced`: 0, SYNCING or SYNCED."""

    start: int
    stop: int
    crc: int
    synced: int = 0

    @property
    def is_possible(self) -> bool:
        """Whether there can be such a segment."""
        return 0 <= self.start < self.stop and self.start // BLOCK_BYTES == (self.stop - 1) // BLOCK_BYTES

    def fits(self, data: bytes | memoryview) -> bool:
        """Whether these can be its bytes."""
        if len(data) != self.stop - self.start or self.crc == DAMAGED:
            return False
        return self.crc == IN_DOUBT or crc32(data) == self.crc


def _part(segment: Segment) -> int:
    return of_segment(segment.start, segment.stop, segment.crc)


class Step(NamedTuple):
    """What a write makes of the segments of one block: `before` are replaced by `after`.

    `overwrites`: bytes of `before` change, so it is in doubt until the write is done.
    """

    before: list[Segment]
    after: list[Segment]
    overwrites: bool


class Segments:
    """The segments of one layer: sorted and disjoint."""

    __slots__ = ("_segments", "_starts", "_sum")

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._segments = sorted(segments)
        self._starts = [segment.start for segment in self._segments]
        self._sum = sum(map(_part, self._segments))

    @property
    def sealed(self) -> int:
        """What a seal has of them (see `seals.of_layer`)."""
        return total((self._sum,))

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    def _between(self, start: int, stop: int) -> list[Segment]:
        """Those that overlap [start, stop)."""
        first = bisect_right(self._starts, start)
        if first and self._segments[first - 1].stop > start:
            first -= 1
        return self._segments[first : bisect_left(self._starts, stop)]

    def _touched(self, start: int, stop: int) -> list[Segment]:
        """Those that overlap [start, stop), after the one that ends at `start` in the same block."""
        first = bisect_right(self._starts, start)
        stop_before = self._segments[first - 1].stop if first else -1
        if stop_before > start or (stop_before == start and start % BLOCK_BYTES):
            first -= 1
        return self._segments[first : bisect_left(self._starts, stop)]

    def apply(self, step: Step) -> None:
        """Puts `step.after` where `step.before` was."""
        if not step.before and (not self._starts or step.after[0].start > self._starts[-1]):
            at = stop = len(self._starts)
        else:
            at = bisect_left(self._starts, (step.before or step.after)[0].start)
            stop = at + len(step.before)
        self._sum += sum(map(_part, step.after)) - sum(map(_part, self._segments[at:stop]))
        self._segments[at:stop] = step.after
        self._starts[at:stop] = [segment.start for segment in step.after]

    def doubt(self, steps: Iterable[Step]) -> None:
        """What is to be overwritten fits no checksum until `apply`, nor if that does not come."""
        for step in steps:
            if step.overwrites:
                self.apply(Step(step.before, [segment._replace(crc=IN_DOUBT) for segment in step.before], True))

    def write(self, start: int, data: bytes, read: Read) -> list[Step]:
        """What writing `data` at `start` will do; it is asked for before the bytes are written.

        Bytes of a segment that stay are checked first: its new checksum must not make damage look right.
        """
        stop = start + len(data)
        view = memoryview(data)
        steps = []
        at = start
        while at < stop:
            end = min(stop, at - at % BLOCK_BYTES + BLOCK_BYTES)
            touched = self._touched(at, end)
            if any(segment.synced for segment in touched):
                end = self._end_beside_synced(touched, at, end)
                touched = [segment for segment in touched if segment.start < end]
            steps.append(self._step(touched, at, end, view[at - start : end - start], read))
            at = end
        return steps

    @staticmethod
    def _end_beside_synced(touched: list[Segment], start: int, stop: int) -> int:
        """Up to where a write from `start` is all inside one synced segment, or all outside of them.

        Those that such a part does not belong to are taken out of `touched`.
        """
        inside = next(
            (segment for segment in touched if segment.synced and segment.start <= start < segment.stop), None
        )
        if inside is not None:
            touched[:] = [inside]
            return min(stop, inside.stop)
        ahead = next((segment.start for segment in touched if segment.synced and segment.start > start), stop)
        touched[:] = [segment for segment in touched if not segment.synced]
        return min(stop, ahead)

    def _step(self, before: list[Segment], start: int, stop: int, data: memoryview, read: Read) -> Step:
        if not before:
            return Step(before, [Segment(start, stop, crc32(data))], False)
        first, last = before[0], before[-1]
        if first is last and first.stop == start and first.crc >= 0:
            return Step(before, [Segment(first.start, stop, crc32(data, first.crc))], False)
        after: list[Segment] = []
        begin, crc, end = start, 0, stop
        old = self._right(first, read) if first.start < start else None
        if old is not None:
            begin, crc = first.start, crc32(old[: start - first.start])
        elif first.start < start:
            after.append(Segment(first.start, start, DAMAGED))
        crc = crc32(data, crc)
        if last.stop > stop and (first is not last or first.start >= start):
            old = self._right(last, read)
        if last.stop > stop and old is not None:
            end, crc = last.stop, crc32(old[stop - last.start :], crc)
        after.append(Segment(begin, end, crc, first.synced))
        if end < last.stop:
            after.append(Segment(stop, last.stop, DAMAGED))
        return Step(before, after, True)

    @staticmethod
    def _right(segment: Segment, read: Read) -> memoryview | None:
        """The bytes of a segment, None where they are damaged."""
        data = read(segment.start, segment.stop)
        return memoryview(data) if segment.fits(data) else None

    def syncing(self) -> list[Segment]:
        """Fixes the ranges of those that are not synced, and gives them: a sync of their bytes begins.

        One at a time; those of a sync that failed are among them again.
        """
        begun = []
        for at, segment in enumerate(self._segments):
            if segment.synced != SYNCED:
                self._segments[at] = segment._replace(synced=SYNCING)
                begun.append(self._segments[at])
        return begun

    def synced(self, begun: Iterable[Segment]) -> list[Segment]:
        """The sync of these has returned; gives what has become of those that are still there."""
        done = []
        for segment in begun:
            at = bisect_left(self._starts, segment.start)
            if at < len(self._starts) and self._starts[at] == segment.start and self._segments[at].synced == SYNCING:
                self._segments[at] = self._segments[at]._replace(synced=SYNCED)
                done.append(self._segments[at])
        return done

    def has_synced(self, start: int, stop: int | None = None) -> bool:
        """Whether bytes at or beyond `start` (before `stop`) are in a segment that is synced, or about to be."""
        last = len(self._starts) if stop is None else bisect_left(self._starts, stop)
        first = max(0, bisect_right(self._starts, start) - 1)
        return any(segment.synced and segment.stop > start for segment in self._segments[first:last])

    def clip(self, stop: int, read: Read) -> Segment | None:
        """Drops what is at or beyond `stop`; gives the segment that was cut, if there is one."""
        keep = bisect_left(self._starts, stop)
        self._sum -= sum(map(_part, self._segments[keep:]))
        del self._segments[keep:], self._starts[keep:]
        if not keep or self._segments[-1].stop <= stop:
            return None
        whole = self._segments[-1]
        old = read(whole.start, whole.stop)
        crc = crc32(old[: stop - whole.start]) if whole.fits(old) else DAMAGED
        self._segments[-1] = Segment(whole.start, stop, crc, whole.synced)
        self._sum += _part(self._segments[-1]) - _part(whole)
        return self._segments[-1]

    def read(self, start: int, stop: int, read: Read) -> bytes:
        """Staged bytes [start, stop), all of which must be staged. Raises Damage."""
        found = self._between(start, stop)
        if not found:
            return b""
        begin, end = found[0].start, found[-1].stop
        data = read(begin, end)
        view = memoryview(data)
        for segment in found:
            if not segment.fits(view[segment.start - begin : segment.stop - begin]):
                raise Damage(segment.start, segment.stop)
        return data if (begin, end) == (start, stop) else bytes(view[start - begin : stop - begin])
