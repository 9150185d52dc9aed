"""Read-ahead policy of one open handle: which bytes should be in flight or cached after a read."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

#: What a stream starts with. From here to 32 MiB takes six more reads.
INITIAL_BYTES: Final = 512 << 10
#: The kernel sends the requests of one stream out of order; it has a few in flight, all of about one size.
TOLERANCE_REQUESTS: Final = 4


class Window:
    """Tells a stream from random reads and sizes its window.

    A stream is a sequence of reads that each begin within `TOLERANCE_REQUESTS` times their own size of where the
    stream got to. Its window doubles with every read that brings it forward. Any other read ends it and asks only
    for the blocks it touches. The first read of a handle, at offset 0, is taken for the start of a stream.
    """

    __slots__ = ("_block_bytes", "_frontier", "_max_bytes", "_window_bytes")

    def __init__(self, block_bytes: int = 128 << 10, max_bytes: int = 32 << 20) -> None:
        self._block_bytes = block_bytes
        self._max_bytes = max(max_bytes, block_bytes)
        self._frontier = 0
        self._window_bytes = 0

    @property
    def window_bytes(self) -> int:
        """How far ahead of the stream we read; 0 while reads are random."""
        return self._window_bytes

    def on_read(self, offset: int, size: int, file_size: int) -> tuple[int, int]:
        """The range [start, stop) to have in flight or cached for a read of `size` bytes at `offset`.

        It holds the requested bytes that exist, begins on a block and ends on a block or at the end of the file, at
        most `max_bytes` ahead of the stream. Empty where no byte is asked for.
        """
        end = min(offset + size, file_size)
        if offset >= end:
            return file_size, file_size
        block = self._block_bytes
        start = offset - offset % block
        stop = end + -end % block
        tolerance = TOLERANCE_REQUESTS * size
        # A new handle has its frontier at 0, so that a first read there continues a stream.
        if abs(offset - self._frontier) <= tolerance and (self._frontier or not offset):
            if end > self._frontier:
                self._window_bytes = min(self._window_bytes * 2 or INITIAL_BYTES, self._max_bytes)
                self._frontier = end
            if self._window_bytes:
                # The window moves in quarters, so that a long stream makes few and large requests.
                quantum = max(self._window_bytes // 4 // block, 1) * block
                ahead = self._frontier + self._window_bytes
                stop = max(stop, ahead - ahead % quantum)
        else:
            self._window_bytes = 0
            self._frontier = end
        return start, min(stop, file_size)


def split(start: int, stop: int, part_bytes: int) -> list[tuple[int, int]]:
    """Cuts [start, stop) at the multiples of `part_bytes`, for requests in parallel."""
    if start >= stop:
        return []
    bounds = [start, *range(start - start % part_bytes + part_bytes, stop, part_bytes), stop]
    return list(pairwise(bounds))
