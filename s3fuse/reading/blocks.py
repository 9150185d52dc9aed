"""The block cache: bytes of object versions in memory, up to a hard limit, fetched once however many wait.

Behind the memory is the disk (`disk`): what is there is read from there, what came from the store is offered to it.

A block is `BLOCK_BYTES` of one version, keyed by (key, etag, size, index): a version never changes, so a block is never
stale; where our own upload replaces a version, its blocks become those of the next one. Neighbouring blocks that are
missing come with one ranged GET, which fills their buffers one after the other. Buffers are allocated once and used
again; the least recently used block gives its buffer up.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

import trio

from s3fuse import waits
from s3fuse.errors import StoreError
from s3fuse.reading.records import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from s3fuse.reading.disk import DiskTier
    from s3fuse.reading.segments import Record
    from s3fuse.store.base import ObjectInfo, Store

#: Longest range of one GET; longer ones are fetched as several in parallel.
RANGE_BYTES = 8 << 20

BlockKey = tuple[str, str, int, int]
#: Makes a buffer the bytes of a version from an offset; True: it holds those of the version before. Gives whether it
#: could, else the buffer is as it was or worth nothing.
Fill: TypeAlias = "Callable[[int, memoryview, bool], bool]"


class Fetch:
    """One GET under way. `error` is set before `done` when it failed."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None


class Block:
    """A buffer and what fills it; `fetch` is None once all bytes are there, `stored` False while the disk copies it."""

    __slots__ = ("buffer", "fetch", "stored")

    def __init__(self, buffer: bytearray, fetch: Fetch | None) -> None:
        self.buffer = buffer
        self.fetch = fetch
        self.stored = True


class BlockCache:
    """Reads object versions through memory. `limit_bytes` counts every buffer, filled or not."""

    def __init__(self, store: Store, nursery: trio.Nursery, limit_bytes: int, disk: DiskTier | None = None) -> None:
        self.store = store
        self.disk = disk
        self.hits = self.misses = 0
        self._nursery = nursery
        self._limit_blocks = max(64, limit_bytes // BLOCK_BYTES)
        self._blocks: OrderedDict[BlockKey, Block] = OrderedDict()
        self._free: list[bytearray] = []
        self._allocated = 0
        self._freed = trio.Event()

    @property
    def used_bytes(self) -> int:
        return self._allocated * BLOCK_BYTES

    @property
    def limit_bytes(self) -> int:
        return self._limit_blocks * BLOCK_BYTES

    async def read(self, version: ObjectInfo, start: int, stop: int) -> bytes | memoryview:
        """Bytes [start, stop) of the version, which must be inside it. Raises what the store raised."""
        indexes = range(start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1)
        while True:
            for fetch in await self._demand(version, indexes):
                with waits.interruptible():
                    await fetch.done.wait()
                if fetch.error is not None:
                    raise fetch.error
            blocks = [self._blocks.get((*version.version, index)) for index in indexes]
            ready = [block for block in blocks if block is not None and block.fetch is None]
            if len(ready) == len(indexes):
                break
        first = start - indexes[0] * BLOCK_BYTES
        if len(ready) == 1:
            return memoryview(ready[0].buffer)[first : first + stop - start]
        last = stop - indexes[-1] * BLOCK_BYTES
        views: list[memoryview | bytearray] = [memoryview(ready[0].buffer)[first:]]
        views.extend(block.buffer for block in ready[1:-1])
        views.append(memoryview(ready[-1].buffer)[:last])
        return b"".join(views)

    async def copy(self, version: ObjectInfo, start: int, stop: int) -> bytes:
        """As `read`, for who keeps the bytes while the cache may give their buffers to others."""
        return bytes(await self.read(version, start, stop))

    def has(self, version: ObjectInfo, start: int, stop: int) -> bool:
        """Whether [start, stop) is in memory or, as far as is known without looking, on the disk."""
        for index in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            block = self._blocks.get((*version.version, index))
            in_memory = block is not None and block.fetch is None
            if not in_memory and (self.disk is None or self.disk.find(version, index) is None):
                return False
        return True

    def cached(self, version: ObjectInfo) -> bytes | None:
        """The whole version where all of it is in memory, else None."""
        blocks = []
        for index in range(-(-version.size_bytes // BLOCK_BYTES)):
            block = self._blocks.get((*version.version, index))
            if block is None or block.fetch is not None:
                return None
            blocks.append(block.buffer)
        return bytes(memoryview(b"".join(blocks))[: version.size_bytes])

    def prefetch(self, version: ObjectInfo, start: int, stop: int) -> None:
        """Starts fetching what is missing of [start, stop), as far as buffers can be had without waiting."""
        missing = self._missing(version, range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)))
        for run in missing:
            self._start(version, run, self._buffers(len(run)))

    # -- a version that replaces another one

    def carry_over(self, old: ObjectInfo, new: ObjectInfo, fill: Fill) -> None:
        """Makes blocks of `old` blocks of `new` where `fill` can make their bytes so; the others are given up."""
        count = -(-old.size_bytes // BLOCK_BYTES)
        whose = old.version
        found = range(count) if count <= len(self._blocks) else [key[3] for key in self._blocks if key[:3] == whose]
        for index in found:
            block = self._blocks.get((*whose, index))
            if block is None or block.fetch is not None or not block.stored:
                continue
            del self._blocks[(*whose, index)]
            # A version that was there before may have blocks already; one that is being filled is another's to end.
            if not self._has(new, index) and self._filled(block.buffer, new, index, fill, known=True):
                self._blocks[(*new.version, index)] = block
            else:
                self._free.append(block.buffer)
                self._freed.set()

    def admit(self, version: ObjectInfo, index: int, fill: Fill) -> None:
        """Takes a block that `fill` can make, if there is none and a buffer can be had without waiting."""
        if self._has(version, index):
            return
        for buffer in self._buffers(1):
            if self._filled(buffer, version, index, fill, known=False):
                self._blocks[(*version.version, index)] = Block(buffer, None)
            else:
                self._free.append(buffer)
                self._freed.set()

    @staticmethod
    def _filled(buffer: bytearray, version: ObjectInfo, index: int, fill: Fill, *, known: bool) -> bool:
        start = index * BLOCK_BYTES
        length = min(BLOCK_BYTES, version.size_bytes - start)
        try:
            return length > 0 and fill(start, memoryview(buffer)[:length], known)
        except OSError:  # what is staged is damaged
            return False

    # -- fetching

    async def _demand(self, version: ObjectInfo, indexes: range) -> list[Fetch]:
        """Starts what is missing and gives the fetches to wait for; waits where no buffer can be had."""
        for run in self._missing(version, indexes):
            # Buffers are never held across the wait: readers that each held some could all wait for ever.
            while wanted := [index for index in run if not self._has(version, index)]:
                buffers = self._buffers(len(wanted))
                if buffers:
                    self._start(version, wanted[: len(buffers)], buffers)
                else:
                    with waits.interruptible():
                        await self._freed.wait()
        fetches: list[Fetch] = []
        for index in indexes:
            block_key = (*version.version, index)
            block = self._blocks.get(block_key)
            if block is None:
                continue
            self._blocks.move_to_end(block_key)
            if block.fetch is not None and block.fetch not in fetches:
                fetches.append(block.fetch)
        return fetches

    def _has(self, version: ObjectInfo, index: int) -> bool:
        return (*version.version, index) in self._blocks

    def _missing(self, version: ObjectInfo, indexes: range) -> list[list[int]]:
        """The runs of neighbouring blocks that are neither there nor on their way, none longer than one GET."""
        runs: list[list[int]] = []
        run: list[int] = []
        for index in indexes:
            if self._has(version, index):
                self.hits += 1
                run = []
                continue
            self.misses += 1
            if not run or len(run) * BLOCK_BYTES >= RANGE_BYTES:
                run = []
                runs.append(run)
            run.append(index)
        return runs

    def _buffers(self, wanted: int) -> list[bytearray]:
        """Up to `wanted` buffers: free ones, new ones below the limit, then those of the blocks used longest ago."""
        got: list[bytearray] = []
        while len(got) < wanted:
            if self._free:
                got.append(self._free.pop())
            elif self._allocated < self._limit_blocks:
                self._allocated += 1
                got.append(bytearray(BLOCK_BYTES))
            elif (buffer := self._evict()) is not None:
                got.append(buffer)
            else:
                if self._freed.is_set():
                    self._freed = trio.Event()
                break
        return got

    def _evict(self) -> bytearray | None:
        for _ in range(len(self._blocks)):
            block_key, block = next(iter(self._blocks.items()))
            if block.fetch is None and block.stored:
                del self._blocks[block_key]
                return block.buffer
            self._blocks.move_to_end(block_key)  # it is needed for a while yet: not to be looked at each time
        return None

    def _start(self, version: ObjectInfo, run: list[int], buffers: list[bytearray]) -> None:
        """Spawns a fetch for each stretch of neighbouring blocks that are together, as far as the buffers go."""
        fetch = Fetch()
        taken: list[int] = []
        where: Record | None = None
        for index, buffer in zip(run, buffers, strict=False):
            record = self.disk.find(version, index) if self.disk is not None else None
            if taken and (index != taken[-1] + 1 or record is not where):  # another was faster, or it is elsewhere
                self._nursery.start_soon(self._fetch, version, taken, fetch, where)
                fetch, taken = Fetch(), []
            where = record
            self._blocks[(*version.version, index)] = Block(buffer, fetch)
            taken.append(index)
        if taken:
            self._nursery.start_soon(self._fetch, version, taken, fetch, where)

    async def _fetch(self, version: ObjectInfo, run: list[int], fetch: Fetch, record: Record | None) -> None:
        offset = run[0] * BLOCK_BYTES
        blocks = [self._blocks[(*version.version, index)] for index in run]
        left = min(version.size_bytes - offset, len(run) * BLOCK_BYTES)
        views = []
        for block in blocks:
            views.append(memoryview(block.buffer)[: min(left, BLOCK_BYTES)])
            left -= BLOCK_BYTES
        try:
            if self.disk is None or record is None or not await self.disk.read(version, record, run[0], views):
                await self.store.get_into(version.key, offset, views, etag=version.etag, size_bytes=version.size_bytes)
                self._offer(version, run[0], blocks, views)
        except StoreError as error:
            self._fail(version, run, fetch, error)
        except BaseException:
            self._fail(version, run, fetch, StoreError("the mount is closing", version.key))
            raise
        else:
            for block in blocks:
                block.fetch = None
        finally:
            fetch.done.set()
            self._freed.set()

    def _offer(self, version: ObjectInfo, first: int, blocks: list[Block], views: list[memoryview]) -> None:
        """Has the disk copy the blocks; their buffers are not given to others until it has."""

        def stored() -> None:
            for block in blocks:
                block.stored = True
            self._freed.set()

        if self.disk is not None and self.disk.offer(version, first, views, stored):
            for block in blocks:
                block.stored = False

    def _fail(self, version: ObjectInfo, run: list[int], fetch: Fetch, error: Exception) -> None:
        fetch.error = error
        for index in run:
            self._free.append(self._blocks.pop((*version.version, index)).buffer)
