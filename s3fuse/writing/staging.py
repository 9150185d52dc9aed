"""The folder of local bytes of dirty files, at the same offsets as in the file itself.

A small layer lives in a slot of one shared slab file, which costs no create and no unlink; one that outgrows its
slot gets a sparse staging file of its own. Bytes that no journal row names are never read, so a slot is used again as
it is. What one file has here is in `dirty`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from s3fuse.writing.durable import sync_new_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from s3fuse.writing.checks import Read
    from s3fuse.writing.journal import Journal
    from s3fuse.writing.ownfiles import OwnFiles
    from s3fuse.writing.parking import Temporary
    from s3fuse.writing.rows import StagedLayer

SLOT_BYTES = 64 << 10
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
    """The folder of staged bytes of one mount, with how many there are."""

    def __init__(self, directory: Path, journal: Journal) -> None:
        self.directory = directory
        self.journal = journal
        self._session = secrets.token_hex(6)
        self._tokens = 0
        self.slab = self._open_slab()
        self.open_files: set[OwnFiles] = set()  # those that have some open
        self.freed = trio.Event()  # set whenever staged bytes go
        self.abandon: Callable[[Temporary], None] = lambda temporary: None  # gets parked objects that nobody needs
        self._staged_bytes = 0
        # After a power failure the journal may name a file of an earlier process that this one knew to be gone: none
        # of the same name must be there by then.
        self._generation = time.time_ns()
        self._free: list[int] = []
        self._slots = 0

    @property
    def staged_bytes(self) -> int:
        """How many there are over all files."""
        return self._staged_bytes

    @staged_bytes.setter
    def staged_bytes(self, value: int) -> None:
        if value < self._staged_bytes:
            self.freed.set()
        self._staged_bytes = value

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

    def take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._slots += 1
        return self._slots - 1

    def give_slot(self, slot: int) -> None:
        self._free.append(slot)

    def begin(self, layers: Iterable[tuple[int, StagedLayer]], keep_in: Path | None = None) -> None:
        """Keeps what the journal names and drops the rest: its writes were never acknowledged, or are uploaded.

        With `keep_in`, for a journal that may not name everything, the rest goes there, and a copy of the slab.
        """
        used: set[int] = set()
        files: set[str] = {SLAB}
        for number, staged in layers:
            self._generation = max(self._generation, staged.layer.generation)
            if staged.slot is None:
                files.add(f"{number}.{staged.layer.generation}")
            else:
                used.add(staged.slot)
        self._slots = max(used, default=-1) + 1
        self._free = [slot for slot in range(self._slots) if slot not in used]
        if keep_in is not None:
            keep_in.mkdir(mode=0o700)
            shutil.copy2(self.directory / SLAB, keep_in / SLAB)
        if not used:
            os.ftruncate(self.slab, 0)
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
        if not os.fstat(self.slab).st_nlink:
            whole = os.pread(self.slab, os.fstat(self.slab).st_size, 0)
            slab = os.open(self.directory / SLAB, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.pwrite(slab, whole, 0)
            os.dup2(slab, self.slab, inheritable=False)
            os.close(slab)
            mended.append(SLAB)
        for files in list(self.open_files):
            mended += files.mend()
        return mended

    def close(self) -> None:
        os.close(self.slab)
