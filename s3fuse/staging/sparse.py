"""Files with holes: giving blocks back to the disk, and finding out which there are."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02  # FALLOC_FL_...
#: No disk gives room in larger steps, whatever it says.
MAX_BLOCK_BYTES = 64 << 10
COPY_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(descriptor: int, mode: int, start: int, length: int) -> None:
    """fallocate(2), which `os` has without its modes. Raises OSError."""
    if _libc.fallocate(descriptor, mode, ctypes.c_int64(start), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def punch(descriptor: int, ranges: Iterable[tuple[int, int]]) -> bool:
    """Gives the blocks of byte ranges back to the disk (may block); False where it does not take all of them back.

    Some disks cannot, and a full one may need room for that itself.
    """
    try:
        for start, stop in ranges:
            fallocate(descriptor, KEEP_SIZE | PUNCH_HOLE, start, stop - start)
    except OSError:
        return False
    return True


def block_bytes(descriptor: int) -> int:
    """In what steps the disk of a file gives room."""
    return min(max(512, os.fstatvfs(descriptor).f_frsize), MAX_BLOCK_BYTES)


def data_ranges(descriptor: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where a file has blocks in [start, stop), as far as the disk tells; all of it where it does not."""
    stop = min(stop, os.fstat(descriptor).st_size)
    while start < stop:
        try:
            first = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if first >= stop:
            return
        start = min(stop, os.lseek(descriptor, first, os.SEEK_HOLE))
        yield first, start


def make_anew(descriptor: int, path: str) -> None:
    """Makes a file that was removed anew at `path`, with its holes; the descriptor is one of the new file then."""
    new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        end = os.fstat(descriptor).st_size
        os.ftruncate(new, end)
        for start, stop in data_ranges(descriptor, 0, end):
            for at in range(start, stop, COPY_BYTES):
                data = os.pread(descriptor, min(COPY_BYTES, stop - at), at)
                done = 0
                while done < len(data):
                    done += os.pwrite(new, data[done:], at + done)
        os.dup2(new, descriptor, inheritable=False)
    finally:
        os.close(new)
