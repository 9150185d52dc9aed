"""Journal and staged bytes of a mount that keeps nothing on disk: both are in memory and end with the process."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from s3fuse.writing.database import connect
from s3fuse.writing.journal import Journal
from s3fuse.writing.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from s3fuse.writing.rows import StagedLayer

#: Each layer with more than a slot has a region of one sparse file in memory; a file has at most 5 TiB.
REGION_BITS = 43
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_libc = ctypes.CDLL(None, use_errno=True)


class MemoryJournal(Journal):
    """A journal that no other process sees. Its `directory` is none, only how messages name the place."""

    def __init__(self, store: str) -> None:
        self.directory = Path(f"memory of process {os.getpid()}")
        self.store = store
        self.suspect = False
        self.lost = ""
        self._boot, self._noted = "", False
        self._after: list[Callable[[], None]] = []
        self._db = connect(Path(":memory:"), self.directory, store)
        with ExitStack() as stack:
            stack.callback(self._db.close)
            self._held = stack.pop_all()

    @property
    def wal_bytes(self) -> int:
        return 0

    def checkpoint(self) -> None:
        """There is no log."""

    def damage(self) -> str:
        return ""

    def sync(self) -> None:
        """There is no disk."""


class MemoryStaging(Staging):
    """Staged bytes in two files in memory: the slab, and one for whatever outgrew its slot."""

    def __init__(self, journal: Journal) -> None:
        self._large = os.memfd_create("s3fuse-large")
        self._regions: dict[tuple[int, int], int] = {}
        self._free_regions: list[int] = []
        super().__init__(journal.directory, journal)

    def _open_slab(self) -> int:
        return os.memfd_create("s3fuse-slab")

    def begin(self, layers: Iterable[tuple[int, StagedLayer]], keep_in: Path | None = None) -> None:
        """Nothing is ever left of an earlier process."""

    def mend(self) -> list[str]:
        return []

    def own_place(self, number: int, generation: int) -> tuple[int, int]:
        whose = (number, generation)
        region = self._regions.get(whose)
        if region is None:
            region = self._free_regions.pop() if self._free_regions else len(self._regions)
            self._regions[whose] = region
        return self._large, region << REGION_BITS

    def drop_own(self, number: int, generation: int) -> None:
        region = self._regions.pop((number, generation), None)
        if region is None:
            return
        start, length = ctypes.c_int64(region << REGION_BITS), ctypes.c_int64(1 << REGION_BITS)
        if _libc.fallocate(self._large, _PUNCH_HOLE, start, length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._free_regions.append(region)

    def close(self) -> None:
        super().close()
        os.close(self._large)
