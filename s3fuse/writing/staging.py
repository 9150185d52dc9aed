"""The folder of local bytes of dirty files, at the same offsets as in the file itself.

A small layer lives in a slot of one shared slab file, which costs no create and no unlink; one that outgrows its
slot gets a sparse staging file of its own. Bytes that no journal row names are never read. What one file has here is in
`dirty`. What all of it takes is in the ledger: slots and files count there from before they are written until the disk
has their blocks back.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from s3fuse.staging.ledger import Ledger
from s3fuse.staging.slab import SLOT_BYTES, Slab
from s3fuse.staging.sparse import block_bytes, data_ranges, make_anew, punch
from s3fuse.writing.durable import sync_new_directory
from s3fuse.writing.footprint import Footprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from s3fuse.writing.checks import Read
    from s3fuse.writing.dirty import DirtyFile
    from s3fuse.writing.journal import Journal
    from s3fuse.writing.ownfiles import OwnFiles
    from s3fuse.writing.parking import Temporary
    from s3fuse.writing.rows import StagedLayer

log = logging.getLogger(__name__)

SLAB = "slab"


def reader(directory: Path, number: int, staged: StagedLayer) -> Read:
    """Reads staged bytes of a layer in a folder that no mount has open; nothing where their file is missing."""
    path = directory / (SLAB if staged.slot is not None else f"{number}.{staged.layer.generation}")
    base = (staged.slot or 0) * SLOT_BYTES

    def read(start: int, stop: int) -> bytes:
        try:
            with path.open("rb") as file:
                return os.pread(file.fileno(), stop - start, base + start)
        except FileNotFoundError:
            return b""

    return read


class Staging:
    """The folder of staged bytes of one mount, with what they take in `ledger`."""

    def __init__(self, directory: Path, journal: Journal) -> None:
        self.directory = directory
        self.journal = journal
        self.ledger = Ledger()
        self._session = secrets.token_hex(6)
        self._tokens = 0
        self.slab = Slab(self._open_slab(), self.ledger)
        self._block_bytes = block_bytes(self.slab.descriptor)
        self.open_files: set[OwnFiles] = set()  # those that have some open
        #: Layers (by generation) whose places have more than is staged, and whether the journal must say so on the disk
        #: before that goes.
        self.surplus: dict[tuple[DirtyFile, int], bool] = {}
        self.abandon: Callable[[Temporary], None] = lambda temporary: None  # gets parked objects that nobody needs
        # After a power failure the journal may name a file of an earlier process that this one knew to be gone: none
        # of the same name must be there by then.
        self._generation = time.time_ns()

    @property
    def staged_bytes(self) -> int:
        """How many there are over all files."""
        return self.ledger.staged_bytes

    def _open_slab(self) -> int:
        self.directory.mkdir(exist_ok=True, mode=0o700)
        slab = os.open(self.directory / SLAB, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        sync_new_directory(self.directory)
        return slab

    def own_place(self, number: int, generation: int) -> tuple[int, int] | None:
        """Descriptor and offset for a layer that has no slot; None: it has a file of its own, at `path`."""
        return None

    def drop_own(self, number: int, generation: int) -> None:
        """Removes the bytes of a layer that has no slot."""
        with suppress(FileNotFoundError):
            os.unlink(self.path(number, generation))

    def cut_own(self, number: int, generation: int, stop: int, footprint: Footprint) -> bool:
        """Gives back what a layer that has no slot takes beyond its byte `stop`; False where the disk does not."""
        try:
            os.truncate(self.path(number, generation), stop)
        except FileNotFoundError:  # somebody removed it: `mend` makes it anew
            return False
        return True

    def punch_own(self, number: int, generation: int, ranges: list[tuple[int, int]]) -> bool:
        """The same for ranges of a layer's bytes."""
        try:
            descriptor = os.open(self.path(number, generation), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return punch(descriptor, ranges)
        finally:
            os.close(descriptor)

    def in_blocks(self, size: int) -> int:
        """What `size` bytes take."""
        return -(-size // self._block_bytes) * self._block_bytes

    def footprint(self) -> Footprint:
        """What a layer takes that has no slot, and no bytes yet."""
        return Footprint(self.ledger, self._block_bytes)

    def measure(self, number: int, generation: int) -> Footprint:
        """The same for one that an earlier process left."""
        footprint = self.footprint()
        with suppress(FileNotFoundError):
            descriptor = os.open(self.path(number, generation), os.O_RDONLY | os.O_CLOEXEC)
            try:
                for start, stop in data_ranges(descriptor, 0, os.fstat(descriptor).st_size):
                    footprint.hold(start, stop)
            finally:
                os.close(descriptor)
        return footprint

    async def give_back(self) -> None:
        """Returns when the disk has back what takes room for nothing, as far as it takes that."""
        await self.slab.give_back()
        waiting, self.surplus = self.surplus, {}
        if any(waiting.values()):
            try:
                await trio.to_thread.run_sync(self.journal.sync)
            except OSError as error:
                log.info("cut bytes stay in %s: %s", self.directory, error)
                self.surplus = waiting | self.surplus
                return
        for data, generation in waiting.keys() - self.surplus.keys():  # others were cut again meanwhile
            data.give_back(generation)

    def path(self, number: int, generation: int) -> str:
        return os.path.join(self.directory, f"{number}.{generation}")

    def new_token(self) -> str:
        """A text that no other upload ever carries: a version in the bucket that has it is ours."""
        self._tokens += 1
        return f"{self._session}-{self._tokens}"

    def new_generation(self) -> int:
        """A number for a layer, above those of all layers before."""
        self._generation += 1
        return self._generation

    def begin(self, layers: Iterable[tuple[int, StagedLayer]], keep_in: Path | None = None) -> None:
        """Keeps what the journal names and drops the rest: its writes were never acknowledged, or are uploaded.

        With `keep_in`, for a journal that may not name everything, the rest goes there, and a copy of the slab.
        """
        used: set[int] = set()
        files: set[str] = {SLAB}
        slots = -(-os.fstat(self.slab.descriptor).st_size // SLOT_BYTES)
        for number, staged in layers:
            if staged.is_right:
                self._generation = max(self._generation, staged.layer.generation)
            if staged.slot is None:
                files.add(f"{number}.{staged.layer.generation}")
            elif staged.is_right or staged.slot < slots:
                used.add(staged.slot)
        if keep_in is not None:
            shutil.copy2(self.directory / SLAB, keep_in / SLAB)
        self.slab.begin(used)
        for entry in os.scandir(self.directory):
            if entry.name in files:
                continue
            if keep_in is not None:
                os.rename(entry.path, keep_in / entry.name)
            else:
                os.unlink(entry.path)

    def mend(self) -> list[str]:
        """Puts open staging files back that were removed; gives their names."""
        mended = []
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.fstat(self.slab.descriptor).st_nlink:
            make_anew(self.slab.descriptor, os.path.join(self.directory, SLAB))
            mended.append(SLAB)
        for files in list(self.open_files):
            mended += files.mend()
        return mended

    def close(self) -> None:
        self.slab.close()
