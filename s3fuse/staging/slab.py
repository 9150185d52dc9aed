"""The slab: one file of slots, each for the staged bytes of one small layer. A slot costs no create and no unlink.

Bytes that no journal row names are never read, so a slot is used again as it is, and the blocks of the slot that was
left last serve first. Blocks of free slots are the disk's again at once where they are at the end of the file, and
with `give_back` elsewhere. Until then the ledger counts them.
"""

from __future__ import annotations

import heapq
import os
from typing import TYPE_CHECKING

import trio

from s3fuse.staging.sparse import block_bytes, data_ranges, punch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from s3fuse.staging.ledger import Ledger

SLOT_BYTES = 64 << 10
#: So many slots are punched by one thread before others get their turn with the disk.
BATCH = 1024


def _runs(slots: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Byte ranges of sorted slots, neighbours in one."""
    first = last = -1
    for slot in slots:
        if slot != last:
            if first >= 0:
                yield first * SLOT_BYTES, last * SLOT_BYTES
            first = slot
        last = slot + 1
    if first >= 0:
        yield first * SLOT_BYTES, last * SLOT_BYTES


class Slab:
    """The slots of one open file, which `close` closes."""

    def __init__(self, descriptor: int, ledger: Ledger) -> None:
        self.descriptor = descriptor
        self._ledger = ledger
        self._block_bytes = block_bytes(descriptor)
        self._count = 0  # slots beyond are neither used nor free, and have no blocks
        self._blocks: dict[int, int] = {}  # slot -> a bit for each block that the disk holds for it
        self._idle: list[int] = []  # free slots that still have blocks, the one that was left last at the end
        self._empty: list[int] = []  # a heap of free slots without blocks
        self._giving: set[int] = set()  # free slots whose blocks a thread gives back

    def take(self) -> int:
        """A slot that is nobody's; its bytes may be anything."""
        if self._idle:
            slot = self._idle.pop()
            self._ledger.idle(-self._held_bytes(slot))
            return slot
        if self._empty:
            return heapq.heappop(self._empty)
        self._count += 1
        return self._count - 1

    def has_blocks(self, slot: int) -> bool:
        """Whether the disk holds anything for a slot."""
        return slot in self._blocks

    def give(self, slot: int) -> None:
        """The slot is nobody's any more."""
        if slot in self._blocks:
            self._idle.append(slot)
            self._ledger.idle(self._held_bytes(slot))
        else:
            heapq.heappush(self._empty, slot)

    def hold(self, slot: int, start: int, stop: int) -> None:
        """Bytes [start, stop) of a slot are about to be written."""
        before = self._blocks.get(slot, 0)
        after = before | self._bits(start, stop)
        if after != before:
            self._blocks[slot] = after
            self._ledger.hold((after.bit_count() - before.bit_count()) * self._block_bytes)

    def _bits(self, start: int, stop: int) -> int:
        return (1 << -(-stop // self._block_bytes)) - (1 << start // self._block_bytes)

    def _held_bytes(self, slot: int) -> int:
        return self._blocks.get(slot, 0).bit_count() * self._block_bytes

    def begin(self, used: Iterable[int]) -> None:
        """Takes the file as an earlier process left it (blocks): these slots are used, the others lose their blocks.

        What the used ones have stays as it is, and is counted.
        """
        taken = sorted(used)
        self._count = taken[-1] + 1 if taken else 0
        os.ftruncate(self.descriptor, min(os.fstat(self.descriptor).st_size, self._count * SLOT_BYTES))
        free = sorted(set(range(self._count)).difference(taken))
        punch(self.descriptor, _runs(free))
        for start, stop in data_ranges(self.descriptor, 0, self._count * SLOT_BYTES):
            for slot in range(start // SLOT_BYTES, -(-stop // SLOT_BYTES)):
                base = slot * SLOT_BYTES
                self.hold(slot, max(start - base, 0), min(stop - base, SLOT_BYTES))
        for slot in free:
            self.give(slot)

    def keep(self, slot: int, staged: Iterable[tuple[int, int]]) -> None:
        """Has the disk take back the blocks of a used slot that these bytes are not in, as far as it can (blocks)."""
        held, needed = self._blocks.get(slot, 0), 0
        for start, stop in staged:
            needed |= self._bits(start, stop)
        surplus = held & ~needed
        base, size = slot * SLOT_BYTES, self._block_bytes
        at = [bit for bit in range(surplus.bit_length()) if surplus >> bit & 1]
        if not at or not punch(self.descriptor, [(base + bit * size, base + (bit + 1) * size) for bit in at]):
            return
        self._blocks[slot] = held & needed
        if not held & needed:
            del self._blocks[slot]
        self._ledger.release(len(at) * size)

    async def give_back(self, keep: int = 0) -> None:
        """Returns when the disk has the blocks of all free slots but `keep` back, as far as it takes them."""
        self._shrink()
        done = True
        while done and len(self._idle) > keep:
            some = sorted(self._idle[: min(BATCH, len(self._idle) - keep)])
            del self._idle[: len(some)]
            self._giving.update(some)  # nobody may write into them meanwhile
            done = False
            try:
                done = await trio.to_thread.run_sync(punch, self.descriptor, list(_runs(some)))
            finally:
                self._giving.difference_update(some)
                if not done:
                    self._idle += some
            for slot in some if done else ():
                self._forget_blocks(slot)
                heapq.heappush(self._empty, slot)
        self._shrink()

    def _forget_blocks(self, slot: int) -> None:
        held_bytes = self._held_bytes(slot)
        self._blocks.pop(slot, None)
        self._ledger.idle_bytes -= held_bytes
        self._ledger.release(held_bytes)

    def _shrink(self) -> None:
        """Cuts the file after the last slot that is used."""
        free = {*self._idle, *self._empty}
        count = self._count
        while count and count - 1 in free:
            count -= 1
        if count == self._count:
            return
        os.ftruncate(self.descriptor, min(os.fstat(self.descriptor).st_size, count * SLOT_BYTES))
        self._count = count
        for slot in [slot for slot in self._idle if slot >= count]:
            self._forget_blocks(slot)
        self._idle = [slot for slot in self._idle if slot < count]
        self._empty = [slot for slot in self._empty if slot < count]
        heapq.heapify(self._empty)

    @property
    def used(self) -> int:
        """How many slots are somebody's."""
        return self._count - len(self._idle) - len(self._empty) - len(self._giving)

    def close(self) -> None:
        os.close(self.descriptor)
