"""The disk tier of the block cache: clean blocks of object versions in files, behind those in memory.

Blocks that came with one GET are one record, appended to the newest of the segment files; the segment used longest
ago goes as a whole. A version never changes, so nothing here is ever stale, and records explain themselves: the
index is in memory, and the next mount reads it from them. Every block is checked against its checksum whenever it is
read; what is damaged or gone is forgotten and fetched again.

Nobody waits for this disk but its readers: an offer is queued, and refused where too much is queued already. Writing
takes as much CPU time as the read itself, so it is left for when there is some to spare (`calm`): with two cores and
the server on the same machine, writing at once made a cold read slower by a third.
The index is changed in trio's thread only; worker threads (`segments`) only read and write files.
"""

from __future__ import annotations

import errno
import logging
import os
from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import trio

from s3fuse.reading import segments
from s3fuse.reading.calm import until_calm
from s3fuse.reading.records import HEADER_BYTES, Header, fits
from s3fuse.reading.segments import Found, Record, Write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from s3fuse.store.base import ObjectInfo

log = logging.getLogger(__name__)

MIN_SEGMENT_BYTES = 1 << 20
MAX_SEGMENT_BYTES = 64 << 20
#: The index takes about 400 bytes of memory for each: of files of 4 KiB the disk holds 400 MiB.
MAX_RECORDS = 100_000
BATCH_BYTES = 32 << 20

_first = attrgetter("first")


@dataclass
class Segment:
    """One file of records. `used` grows with each hit; `versions` are those that have records here."""

    number: int
    size_bytes: int = 0
    used: int = 0
    versions: set[tuple[str, str, int]] = field(default_factory=set)


class _Offer(NamedTuple):
    version: tuple[str, str, int]
    first: int
    blocks: Sequence[memoryview]
    size_bytes: int
    done: Callable[[], None]


class DiskTier:
    """Clean blocks below `directory`, in at most `limit_bytes` less what `others_bytes` says is used beside them.

    `reserve_bytes` stay free on that disk; `queue_bytes` may wait to be written. `hits` and `dropped` count blocks.
    """

    def __init__(
        self,
        directory: Path,
        limit_bytes: int,
        *,
        reserve_bytes: int = 0,
        queue_bytes: int = 64 << 20,
        others_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.directory = os.fspath(directory)
        self.limit_bytes = limit_bytes
        self.used_bytes = self.hits = self.dropped = self.damaged = 0
        self._reserve_bytes = reserve_bytes
        self._queue_bytes = queue_bytes
        self._others_bytes = others_bytes
        self._segment_bytes = min(max(limit_bytes // 16, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)
        self._segments: dict[int, Segment] = {}
        self._records: dict[tuple[str, str, int], list[Record]] = {}  # sorted by `first`
        self._count = 0
        self._ticks = count(1)
        self._open: Segment | None = None
        self._queue: deque[_Offer] = deque()
        self._queued_bytes = 0
        self._wake = trio.Event()
        self._idle = trio.Event()
        directory.mkdir(exist_ok=True, mode=0o700)
        self._earlier = sorted(int(name) for name in os.listdir(directory) if name.isdecimal())
        self._next = self._earlier[-1] + 1 if self._earlier else 0

    # -- reading

    def find(self, version: ObjectInfo, index: int) -> Record | None:
        """The record that has this block, as far as is known without looking."""
        records = self._records.get(version.version)
        if records is None:
            return None
        at = bisect_right(records, index, key=_first) - 1
        if at < 0 or index >= records[at].first + len(records[at].checksums):
            return None
        return records[at]

    async def read(self, version: ObjectInfo, record: Record, index: int, buffers: Sequence[memoryview]) -> bool:
        """Fills the buffers with the blocks from `index` on, all in the record. False where not every byte is good."""
        path = self._path(record.segment)
        problem = await trio.to_thread.run_sync(segments.read, path, record, index, buffers)
        if problem is None:
            self.hits += len(buffers)
            if record.segment in self._segments:
                self._segments[record.segment].used = next(self._ticks)
            return True
        if self._forget(version.version, record):
            self.damaged += 1
            log.warning("cached blocks of %s are damaged (%s: %s); they are fetched again", version.key, path, problem)
        return False

    # -- writing

    def offer(self, version: ObjectInfo, first: int, blocks: Sequence[memoryview], done: Callable[[], None]) -> bool:
        """Has the blocks from `first` on written; they must not change until `done` is called. False: not taken."""
        size = sum(map(len, blocks))
        full = self._queued_bytes + size > self._queue_bytes or size + HEADER_BYTES > self._allowed_bytes()
        if full or not fits(version.key, version.etag, len(blocks)):
            self.dropped += len(blocks)
            return False
        self._queue.append(_Offer(version.version, first, blocks, size, done))
        self._queued_bytes += size
        self._wake.set()
        return True

    def make_room(self) -> None:
        """Has clean blocks go as far as what is used beside them asks for it."""
        if self.used_bytes > self._allowed_bytes():
            self._wake.set()

    async def settle(self) -> None:
        """Returns when all that was offered is written or dropped."""
        while self._queued_bytes:
            await self._idle.wait()

    async def run(self) -> None:
        """Reads the index, then writes what is offered, until cancelled."""
        for found in await trio.to_thread.run_sync(segments.scan, self.directory, self._earlier):
            self._adopt(found)
        while True:
            batch = self._take_batch()
            if not batch and self.used_bytes <= self._allowed_bytes():
                self._idle.set()
                await self._wake.wait()
                self._wake, self._idle = trio.Event(), trio.Event()
                continue
            try:
                await until_calm()
                await self._store(batch)
            finally:
                for offer in batch:
                    self._queued_bytes -= offer.size_bytes
                    offer.done()

    def _take_batch(self) -> list[_Offer]:
        batch: list[_Offer] = []
        size = 0
        while self._queue and size < BATCH_BYTES:
            batch.append(self._queue.popleft())
            size += batch[-1].size_bytes
        return batch

    async def _store(self, batch: list[_Offer]) -> None:
        """Evicts until the batch fits, and writes it. A disk that fails or is full costs the batch, nothing more."""
        places = [self._place(offer) for offer in batch]
        writes = [
            Write(self._path(segment.number), offset, offer.version, offer.first, offer.blocks)
            for offer, (segment, offset) in zip(batch, places, strict=True)
        ]
        victims = self._victims({segment.number for segment, _ in places})
        try:
            await trio.to_thread.run_sync(segments.unlink, victims)
            headers = await trio.to_thread.run_sync(segments.write, writes, self.directory, self._reserve_bytes)
        except OSError as error:
            self.dropped += sum(len(offer.blocks) for offer in batch)
            full = error.errno == errno.ENOSPC
            log.log(logging.DEBUG if full else logging.WARNING, "blocks are not cached: %s", error)
            for segment in {segment.number: segment for segment, _ in places}.values():
                self._drop(segment)  # it has a gap, which `scan` could not pass
            gone = [write.path for write in writes] + (self._victims(set(), one_more=True) if full else [])
            await trio.to_thread.run_sync(segments.unlink, gone)
            return
        for (segment, offset), header in zip(places, headers, strict=True):
            self._add(segment, header, offset + HEADER_BYTES)

    def _place(self, offer: _Offer) -> tuple[Segment, int]:
        room = HEADER_BYTES + offer.size_bytes
        segment = self._open
        if segment is None or (segment.size_bytes and segment.size_bytes + room > self._segment_bytes):
            segment = self._open = self._segments[self._next] = Segment(self._next)
            self._next += 1
        segment.used = next(self._ticks)
        offset = segment.size_bytes
        segment.size_bytes += room
        self.used_bytes += room
        return segment, offset

    def _allowed_bytes(self) -> int:
        return max(0, self.limit_bytes - self._others_bytes())

    def _victims(self, kept: set[int], *, one_more: bool = False) -> list[str]:
        """Forgets segments, those used longest ago first, until the rest fits; gives their files."""
        victims: list[str] = []
        for segment in sorted((s for s in self._segments.values() if s.number not in kept), key=attrgetter("used")):
            fitting = self.used_bytes <= self._allowed_bytes() and self._count <= MAX_RECORDS
            if fitting and not one_more:
                break
            one_more = False
            self._drop(segment)
            victims.append(self._path(segment.number))
        return victims

    # -- the index

    def _path(self, number: int) -> str:
        return os.path.join(self.directory, str(number))

    def _adopt(self, found: Found) -> None:
        """Takes a segment that an earlier mount has written."""
        segment = self._segments[found.number] = Segment(found.number, found.size_bytes, next(self._ticks))
        self.used_bytes += found.size_bytes
        for header, offset in found.headers:
            if header.size_bytes >= 0:
                self._add(segment, header, offset)

    def _add(self, segment: Segment, header: Header, offset: int) -> None:
        version = (header.key, header.etag, header.size_bytes)
        segment.versions.add(version)
        record = Record(segment.number, offset, header.first, header.data_bytes, header.checksums)
        insort(self._records.setdefault(version, []), record, key=_first)
        self._count += 1

    def _forget(self, version: tuple[str, str, int], record: Record) -> bool:
        """Whether the record was still known."""
        records = self._records.get(version, [])
        if record not in records:
            return False
        records.remove(record)
        self._count -= 1
        if not records:
            del self._records[version]
        return True

    def _drop(self, segment: Segment) -> None:
        del self._segments[segment.number]
        self.used_bytes -= segment.size_bytes
        if segment is self._open:
            self._open = None
        for version in segment.versions:
            records = self._records.get(version, [])
            kept = [record for record in records if record.segment != segment.number]
            self._count -= len(records) - len(kept)
            if kept:
                self._records[version] = kept
            else:
                self._records.pop(version, None)
