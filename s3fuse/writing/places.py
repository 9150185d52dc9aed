"""Where the layers of one dirty file have their bytes: each in a slot of the slab, or in a file of its own.

What a place takes is in the ledger from before it is written (see `staging.ledger`). A layer's bytes have the same
offsets in its own file as in the file itself.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING

from s3fuse.staging.slab import SLOT_BYTES
from s3fuse.writing.ownfiles import OwnFiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from s3fuse.writing.extents import Extents
    from s3fuse.writing.footprint import Footprint
    from s3fuse.writing.staging import Staging


class Places:
    """The places of file `number`. Layers are named by their generation. Raises OSError of the local disk."""

    __slots__ = ("_footprints", "_number", "_own", "_slots", "_staging", "moves")

    def __init__(self, staging: Staging, number: int) -> None:
        self._staging = staging
        self._number = number
        self._slots: dict[int, int] = {}
        self._footprints: dict[int, Footprint] = {}  # of those without a slot
        self._own = OwnFiles(staging, number)
        self.moves = 0  # how often a layer has left its slot

    def new(self, generation: int) -> bool:
        """A place for a layer that has no bytes yet: a slot. Gives whether the slot has blocks of an earlier layer."""
        slab = self._staging.slab
        slot = self._slots[generation] = slab.take()
        return slab.has_blocks(slot)

    def recovered(self, generation: int, slot: int | None) -> None:
        """The place that an earlier process gave to a layer."""
        if slot is not None:
            self._slots[generation] = slot
        else:
            self._footprints[generation] = self._staging.measure(self._number, generation)

    def keep(self) -> Callable[[], None]:
        """What this gives puts back which layer has which place: those that came since then are the disk's again."""
        return partial(self._put_back, dict(self._slots), dict(self._footprints))

    def _put_back(self, slots: dict[int, int], footprints: dict[int, Footprint]) -> None:
        new_slots = self._slots.items() - slots.items()
        new_files = self._footprints.keys() - footprints.keys()
        found, self._slots, self._footprints = self._footprints, slots, footprints
        for generation in new_files:
            self._drop_own(generation, found[generation])
        for _, slot in new_slots:
            self._staging.slab.give(slot)

    def slot(self, generation: int) -> int | None:
        """None: the layer has a file of its own."""
        return self._slots.get(generation)

    @property
    def are_slots(self) -> bool:
        """Whether no layer has a file of its own."""
        return not self._footprints

    def path(self, generation: int) -> str:
        return self._staging.path(self._number, generation)

    def at(self, generation: int) -> tuple[int, int]:
        """The descriptor and the offset in it where the layer's bytes begin."""
        slot = self._slots.get(generation)
        if slot is not None:
            return self._staging.slab.descriptor, slot * SLOT_BYTES
        own = self._staging.own_place(self._number, generation)
        if own is not None:
            return own
        return self._own.descriptor(generation), 0

    def read(self, generation: int, start: int, stop: int) -> bytes:
        fd, base = self.at(generation)
        return os.pread(fd, stop - start, base + start)

    def write(self, generation: int, offset: int, data: bytes) -> None:
        """Writes all of it. Where that fails the place may take more than before, until `give_back`."""
        slot = self._slots.get(generation)
        if slot is not None:
            self._staging.slab.hold(slot, offset, offset + len(data))
        else:
            self._footprints[generation].hold(offset, offset + len(data))
        fd, base = self.at(generation)
        done = os.pwrite(fd, data, base + offset)
        while done < len(data):
            done += os.pwrite(fd, data[done:], base + offset + done)

    def leave_slot(self, generation: int, staged: Extents) -> tuple[int, int]:
        """Moves a layer to a file of its own; gives the descriptor of that, and the slot, which still has the bytes.

        The slot goes back to the slab when nothing names it any more. Where it fails the layer stays where it was.
        """
        slot = self._slots.pop(generation)
        footprint = self._footprints[generation] = self._staging.footprint()
        try:
            fd, base = self.at(generation)
            for start, stop in staged:
                footprint.hold(start, stop)
                data = os.pread(self._staging.slab.descriptor, stop - start, slot * SLOT_BYTES + start)
                if os.pwrite(fd, data, base + start) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path(generation))
        except BaseException:
            self.back_to_slot(generation, slot)
            raise
        self.moves += 1
        return fd, slot

    def back_to_slot(self, generation: int, slot: int) -> None:
        """The layer is in its slot as it was before `leave_slot`."""
        self._slots[generation] = slot
        self._drop_own(generation, self._footprints.pop(generation))

    def give_back(self, generation: int, staged: Extents) -> None:
        """Has the disk take back what a place has beyond the blocks that `staged` is in, as far as it does."""
        slot, footprint = self._slots.get(generation), self._footprints.get(generation)
        if slot is not None:
            self._staging.slab.keep(slot, staged)
        elif footprint is not None:
            if self._staging.cut_own(self._number, generation, staged.end, footprint):
                footprint.cut(staged.end)
            ranges = footprint.surplus(staged)
            if ranges and self._staging.punch_own(self._number, generation, ranges):
                footprint.keep(staged)

    def drop(self, generation: int) -> Callable[[], None]:
        """Forgets the place of a layer; what this gives has the disk take it back, once nothing names it any more."""
        slot = self._slots.pop(generation, None)
        if slot is not None:
            return partial(self._staging.slab.give, slot)
        return partial(self._drop_own, generation, self._footprints.pop(generation))

    def _drop_own(self, generation: int, footprint: Footprint) -> None:
        self._own.close_one(generation)
        self._staging.drop_own(self._number, generation)
        footprint.keep(())

    def close(self) -> None:
        """Closes own files until they are needed again."""
        self._own.close()
