"""What the files of the journal should hold, as far as SQLite does not look itself.

SQLite takes a write-ahead log (WAL) up to the last frame that is whole, and says nothing about frames that are gone:
a log that was cut or removed makes an older state. The index of the log (`-shm`) says how many frames there were: it
survives the process, and in it `mxFrame` is the last one committed (https://sqlite.org/walformat.html, 2.1).
"""

from __future__ import annotations

import os
import struct
from contextlib import closing, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from s3fuse.writing.lock import DirectoryLock

FILE = "journal.sqlite"
LOG, INDEX = "-wal", "-shm"
SUFFIXES = (LOG, INDEX)
#: Page size and mxFrame, in the byte order of the machine; nBackfill behind two such headers.
_HEAD = struct.Struct("=14xHI76xI")
_LOG_HEAD_BYTES, _FRAME_HEAD_BYTES = 32, 24


class LogIndex:
    """The index of the log of a journal, open: closing it takes SQLite's locks on it from the whole process.

    Raises FileNotFoundError where there is none.
    """

    def __init__(self, directory: Path) -> None:
        self._index = os.open(directory / (FILE + INDEX), os.O_RDONLY | os.O_CLOEXEC)

    def _read(self) -> tuple[int, int, int]:
        """Bytes a page has, how many frames the log has, and how many of them are in the database."""
        page_bytes, frames, backfilled = _HEAD.unpack(os.pread(self._index, _HEAD.size, 0).ljust(_HEAD.size, b"\0"))
        return 65536 if page_bytes == 1 else page_bytes, frames, backfilled

    @property
    def frames(self) -> int:
        """How many frames were committed since the log was last begun anew."""
        return self._read()[1]

    def least_bytes(self) -> int:
        """The length that the log has at least."""
        page_bytes, frames, _ = self._read()
        return _log_bytes(page_bytes, frames)

    def used_bytes(self) -> int:
        """Up to where the log is in use: 0 once all of it is in the database, since the next frame is its first."""
        page_bytes, frames, backfilled = self._read()
        return 0 if frames == backfilled else _log_bytes(page_bytes, frames)

    def close(self) -> None:
        os.close(self._index)


def _log_bytes(page_bytes: int, frames: int) -> int:
    return _LOG_HEAD_BYTES + frames * (page_bytes + _FRAME_HEAD_BYTES) if frames else 0


class Before:
    """What is there before the journal is opened: opening repairs it."""

    def __init__(self, directory: Path, lock: DirectoryLock) -> None:
        self.directory = directory
        self._was_open = lock.was_open
        self._there = (directory / FILE).exists()
        self._log_there = (directory / (FILE + LOG)).exists()
        self._frames = 0
        with suppress(FileNotFoundError), closing(LogIndex(directory)) as index:
            self._frames = index.frames

    def lost(self, index: LogIndex) -> str:
        """What the journal, now open and read, has lost, as a text; "" for nothing."""
        if not self._there:
            return "the journal was removed" if self._was_open or self._anything_staged() else ""
        if self._was_open and not self._log_there:
            return "the journal's log was removed"
        lost = self._frames - index.frames
        if self._log_there and lost > 0:
            return f"the journal's log was damaged: {lost} of its last {self._frames} pages are lost"
        return ""

    def _anything_staged(self) -> bool:
        try:
            return any(entry.stat().st_size for entry in os.scandir(self.directory / "staging"))
        except FileNotFoundError:
            return False


class Files:
    """The files of an open journal, as they are when it was opened."""

    def __init__(self, directory: Path, index: LogIndex) -> None:
        self._index = index
        self._paths = {suffix: directory / (FILE + suffix) for suffix in ("", *SUFFIXES)}
        self._inodes = {suffix: path.stat().st_ino for suffix, path in self._paths.items()}
        self._least_bytes = 0

    def damage(self) -> str:
        """What is not as SQLite left it, as a text; "" for nothing."""
        sizes = {}
        for suffix, path in self._paths.items():
            try:
                status = path.stat()
            except FileNotFoundError:
                return f"{path.name} was removed"
            if status.st_ino != self._inodes[suffix]:
                return f"{path.name} was replaced"
            sizes[suffix] = status.st_size
        if sizes[LOG] < self._index.least_bytes():
            return f"{self._paths[LOG].name} was cut"
        if sizes[""] < self._least_bytes:
            return f"{self._paths[''].name} was cut"
        self._least_bytes = sizes[""]
        return ""
