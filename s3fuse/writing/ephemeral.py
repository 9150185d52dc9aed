"""Journal and staged bytes of a mount that keeps nothing on disk: both are in memory and end with the process."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from s3fuse.journal.undo import Undo
from s3fuse.staging.sparse import punch
from s3fuse.writing.database import connect
from s3fuse.writing.journal import Journal
from s3fuse.writing.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from s3fuse.writing.footprint import Footprint
    from s3fuse.writing.rows import StagedLayer

#: Each layer with more than a slot has a region of one sparse file in memory; a file has at most 5 TiB.
REGION_BITS = 43


class MemoryJournal(Journal):
    """A journal that no other process sees. Its `directory` is none, only how messages name the place."""

    def __init__(self, store: str) -> None:
        self.directory = Path(f"memory of process {os.getpid()}")
        self.store = store
        self.suspect = ""
        self.lost, self.is_mixed = "", False
        self._boot, self._noted = "", False
        self.undo = Undo()
        self._after: list[Callable[[], None]] = []
        self._deferred: dict[int, tuple[str, tuple[object, ...]]] = {}
        self._db = connect(Path(":memory:"), self.directory, store)
        with ExitStack() as stack:
            stack.callback(self._db.close)
            self._held = stack.pop_all()

    def _check_room(self, least_bytes: int, rows: int) -> None:
        """There is no disk."""

    def note_recovered(self) -> None:
        """There is no disk."""

    def keep_directory(self) -> bool:
        return False

    def keep_room(self) -> None:
        """There is no disk."""

    def is_long(self, log_bytes: int) -> bool:
        return False

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
        punch(self._large, [(region << REGION_BITS, (region + 1) << REGION_BITS)])
        self._free_regions.append(region)

    def cut_own(self, number: int, generation: int, stop: int, footprint: Footprint) -> bool:
        first, last = footprint.beyond(stop)
        return first == last or self.punch_own(number, generation, [(first, last)])

    def punch_own(self, number: int, generation: int, ranges: list[tuple[int, int]]) -> bool:
        fd, base = self.own_place(number, generation)
        return punch(fd, [(base + start, base + stop) for start, stop in ranges])

    def close(self) -> None:
        super().close()
        os.close(self._large)
