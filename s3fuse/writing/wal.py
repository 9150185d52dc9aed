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
#: Page, size of the database after a commit (0: none), salts, and checksums of a frame; the salts in the log's head.
_FRAME_HEAD = struct.Struct(">IIII8x")
_SALTS = struct.Struct(">16x2I")
#: What was there before the journal was opened, where recovery has not ended.
NOTE = f"{FILE}-before"
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

    @property
    def moved(self) -> int:
        """How many of them are in the database."""
        return self._read()[2]

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


def committed_frames(log: Path) -> int:
    """How many frames a log has up to its last commit, by what is written in each, whole or not.

    -1 where its own head is not right: then SQLite takes nothing of it.
    """
    try:
        with log.open("rb") as file:
            head = file.read(_LOG_HEAD_BYTES)
            if not head:
                return 0
            if len(head) < _LOG_HEAD_BYTES or not _is_right(head):
                return -1
            (page_bytes,) = struct.unpack_from(">8xI", head)
            found = 0
            for number in range(1, (log.stat().st_size - _LOG_HEAD_BYTES) // (page_bytes + _FRAME_HEAD_BYTES) + 1):
                file.seek(_log_bytes(page_bytes, number - 1) or _LOG_HEAD_BYTES)
                _, commit, *salts = _FRAME_HEAD.unpack(file.read(_FRAME_HEAD.size))
                if commit and salts == list(_SALTS.unpack_from(head)):
                    found = number
            return found
    except FileNotFoundError:
        return 0


def _is_right(head: bytes) -> bool:
    """Whether the checksum in the head of a log fits (https://sqlite.org/walformat.html, 3)."""
    order = ">" if head[3] & 1 else "<"
    values = struct.unpack(f"{order}6I", head[:24])
    first = second = 0
    for at in range(0, 6, 2):
        first = (first + values[at] + second) & 0xFFFFFFFF
        second = (second + values[at + 1] + first) & 0xFFFFFFFF
    return (first, second) == struct.unpack_from(">2I", head, 24)


class Before:
    """What is there before the journal is opened: opening repairs it.

    A process that is killed between that and the end of recovery leaves a note of it in the file `NOTE`.
    """

    def __init__(self, directory: Path, lock: DirectoryLock) -> None:
        self.directory = directory
        self._note = directory / NOTE
        self._was_open = lock.was_open
        database, log = directory / FILE, directory / (FILE + LOG)
        self._there = database.exists() and database.stat().st_size > 0
        self._log_there = log.exists()
        self._frames = self._moved = 0
        self._told, self._was_mixed = "", False
        with suppress(FileNotFoundError), closing(LogIndex(directory)) as index:
            self._frames, self._moved = index.frames, index.moved
        written = committed_frames(log)
        self._has_head = written >= 0
        self._frames = max(self._frames, written)
        with suppress(FileNotFoundError, ValueError):
            self._read_note(self._note.read_text())

    def _read_note(self, text: str) -> None:
        frames, moved, is_mixed, told = text.split(" ", 3)
        self._frames, self._moved = max(self._frames, int(frames)), max(self._moved, int(moved))
        self._told, self._was_mixed = told, is_mixed == "1"

    def note(self, lost: str = "") -> None:
        """Notes what was there, and what is lost of it once that is known. A full disk is no reason to stop."""
        with suppress(OSError):
            self._note.write_text(f"{self._frames} {self._moved} {int(self._was_mixed)} {lost}")

    def is_mixed(self, index: LogIndex) -> bool:
        """Whether some pages of the database are newer than what is left of the log, and others are not."""
        return self._was_mixed or self._moved > index.frames

    def lost(self, index: LogIndex) -> str:
        """What the journal, now open and read, has lost, as a text; "" for nothing."""
        if self._told:
            return self._told
        if not self._there:
            return "the journal was removed" if self._was_open or self._anything_staged() else ""
        if self._was_open and not self._log_there:
            return "the journal's log was removed"
        if not self._has_head:
            return "the journal's log was damaged: nothing of it can be read"
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
